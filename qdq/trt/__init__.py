"""All that knows TensorRT: finding it, building with it, reading what it built, and its command line."""
