"""Scales and zero points: modes, clip modes, and the functions of one tensor."""
