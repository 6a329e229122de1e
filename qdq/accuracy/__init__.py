"""What wins accuracy back with every layer in int8, each a pass of its own that says what it gained.

Before the swap: `equalize_layers`. After the calibration: `correct_bias`, `round_weights` (AdaRound).
"""
