"""Supervised learning, the network to compare self-supervised ones with."""

from __future__ import annotations

import torch.nn.functional as F
from torch import nn

from harmonize.types import Batch, Encoder, ObjectiveOutput, Progress


class Supervised(nn.Module):
    """Cross-entropy of the images' labels by a linear layer on one feature of the last block.

    Args:
        encoder: The encoder to train.
        num_classes: Outputs of the linear layer: at least as many as the data have classes; further ones do no harm.
        smoothing: Label smoothing, in [0, 1).
        pool: Feature that is classified: ``cls`` or ``patch_mean``.
        recipe: Augmentation recipe of the view.

    Raises:
        ValueError: For a value outside these.

    Source: cross-entropy with smoothed labels as in DeiT (arXiv:2012.12877), without its mixing of images.
    """

    def __init__(
        self,
        encoder: Encoder,
        num_classes: int = 1000,
        smoothing: float = 0.1,
        pool: str = "cls",
        recipe: str = "simmim",
    ) -> None:
        super().__init__()
        if num_classes < 2:
            raise ValueError(f"num_classes={num_classes} must be at least 2")
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing={smoothing} must be in [0, 1)")
        if pool not in ("cls", "patch_mean"):
            raise ValueError(f"pool={pool} must be one of cls, patch_mean")
        self.num_classes, self.smoothing, self.pool = num_classes, smoothing, pool
        self.classifier = nn.Linear(encoder.spec.width, num_classes)
        self.required_views = {"supervised": recipe}

    def before_step(self, encoder: Encoder, progress: Progress) -> None:
        """Nothing to do: no state moves with the step."""

    def forward(self, encoder: Encoder, batch: Batch, progress: Progress) -> ObjectiveOutput:
        """The loss of one micro-batch with one view under ``"supervised"``; images without a label take no part."""
        (images,) = batch.views["supervised"]
        tokens, label = encoder(images), batch.label
        feature = tokens[:, 0] if self.pool == "cls" else tokens[:, encoder.spec.num_prefix_tokens :].mean(dim=1)
        scores = self.classifier(feature).float()
        count = (label >= 0).sum().clamp(min=1)
        summed = F.cross_entropy(scores, label, ignore_index=-1, label_smoothing=self.smoothing, reduction="sum")
        loss = summed / count
        accuracy = (scores.argmax(dim=1) == label).sum() / count
        return ObjectiveOutput(loss=loss, terms={"supervised": loss}, stats={"supervised_accuracy": accuracy})
