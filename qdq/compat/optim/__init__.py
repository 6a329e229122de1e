"""Help for fine-tuning a quantized model."""

from qdq.compat.optim import helper as helper
