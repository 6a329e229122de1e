"""Passes that recover accuracy with every layer in int8; each reports its gain.

Before the swap: `equalize_layers`, `smooth_inputs`, `center_inputs`, `split_channels`. After the calibration:
`correct_bias`, `round_weights` (AdaRound), `reconstruct_blocks`. The last one, `tune_weights`, is in `qdq.qat`.
"""
