"""Searches for better scales: LAPQ, and greedy by layer."""
