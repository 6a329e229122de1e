"""Everything that depends on TensorRT: find it, build with it, read its engines, and write its command lines."""
