"""Evaluation of frozen features: one protocol per file, all on the features of ``features.py``."""
