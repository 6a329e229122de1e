"""The version of pytorch-quantization whose API this is; qdq has its own."""

__version__ = "2.2.1"
