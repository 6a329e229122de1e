"""The quantized layers: they read codes, compute on integers and give codes."""
