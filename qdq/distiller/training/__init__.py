"""Quantizers of training, and a training as a file describes it."""
