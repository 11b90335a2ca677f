"""Data sets, augmentation recipes and the loaders that make batches of them."""
