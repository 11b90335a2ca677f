"""What a network has learnt, layer by layer: one ``torchmetrics.Metric`` per file, thin shells round ``functional``."""
