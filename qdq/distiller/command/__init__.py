"""What `recipes/compress_classifier.py` needs: its options and its log."""
