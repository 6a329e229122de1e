"""ONNX editing and reading with onnx-ir: one pass, one file; nothing here needs torch."""
