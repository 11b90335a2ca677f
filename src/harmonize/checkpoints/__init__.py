"""Checkpoints: what is in a file, and the encoder that it holds."""
