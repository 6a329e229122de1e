"""How each layer is quantized: settings, and the overrides of single layers."""
