"""harmonize: contrastive learning, masked image modelling and their hybrid on one Vision Transformer."""

__version__ = "0.1.0"
