"""Pre-training objectives: forward(encoder, batch, progress) -> loss and named terms."""
