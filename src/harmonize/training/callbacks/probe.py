"""k-NN and linear probe on frozen features, at every validation epoch and of the untrained network."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor

from harmonize.evaluation.features import FeatureCollector, Features, extract
from harmonize.evaluation.knn import knn_accuracy
from harmonize.evaluation.linear_probe import linear_probe_accuracy
from harmonize.training.loggers import record
from harmonize.training.module import PretrainModule
from harmonize.types import Batch, ConfigError, FeatureSpec, NonFiniteLossError


class OnlineProbe(pl.Callback):
    """Logs ``val/knn_top1`` and ``val/linear_top1``; before the first step ``untrained/knn_top1`` and so on.

    Beside each accuracy its standard error over images (``_se``), and what naming the commonest class would give.

    The validation loop's sanity check runs over the whole validation set before training: its result is the untrained
    network's, and a broken probe fails in the first minute.

    Args:
        train_loader: Labelled training images, clean view, to fit on. The validation loader is the trainer's.
        num_classes: Classes of the data set.
        feature: The feature, for fitting and scoring.
        k: Neighbours of the k-NN.
        temperature: Of their votes.
        l2: Penalty of the linear probe.
        more: Further features to collect in the same pass, for other callbacks.

    Raises:
        NonFiniteLossError: (from a hook) The features are not finite.

    Attributes:
        more_features: What was collected of ``more`` at the latest validation: (train, val), one of each per feature.
    """

    def __init__(
        self,
        train_loader: Iterable[Batch],
        num_classes: int,
        feature: FeatureSpec | Mapping[str, Any],
        k: int = 20,
        temperature: float = 0.07,
        l2: float = 1e-3,
        more: Sequence[FeatureSpec] = (),
    ) -> None:
        self.train_loader = train_loader
        self.num_classes = num_classes
        self.feature = feature if isinstance(feature, FeatureSpec) else FeatureSpec(**feature)
        self.k, self.temperature, self.l2 = k, temperature, l2
        self.more = list(more)
        self.more_features: tuple[list[Features], list[Features]] = ([], [])
        self._collector: FeatureCollector | None = None

    def on_validation_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Begin a new list of validation features."""
        assert isinstance(module, PretrainModule)
        self._collector = FeatureCollector(module.encoder, [self.feature, *self.more])

    def on_validation_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Batch, *_: Any
    ) -> None:
        """Add one batch of validation features."""
        assert self._collector is not None
        self._collector.update(batch)

    def on_validation_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Fit on training features, score on validation features, log."""
        assert isinstance(module, PretrainModule)
        assert self._collector is not None
        val, *more_val = self._collector.compute()
        self._collector = None
        specs = [self.feature, *self.more]
        train, *more_train = extract(module.encoder, self.train_loader, specs, module.device)
        self.more_features = more_train, more_val
        stage = "untrained" if trainer.sanity_checking else "val"
        try:
            metrics = {
                "knn_top1": knn_accuracy(train, val, self.num_classes, self.k, self.temperature),
                "linear_top1": linear_probe_accuracy(train, val, self.num_classes, self.l2),
            }
        except ConfigError:  # about the data, not the network
            raise
        except ValueError as error:
            raise NonFiniteLossError(
                f"The network has diverged at optimiser step {trainer.global_step}: {error} Try a smaller optimizer.lr "
                "or a longer schedule.warmup."
            ) from error
        num_images = int((val.label >= 0).sum())
        metrics |= {f"{name}_se": math.sqrt(p * (1 - p) / num_images) for name, p in metrics.items()}
        metrics["chance_top1"] = majority_share(val.label)
        record(trainer, {f"{stage}/{name}": value for name, value in metrics.items()})


def majority_share(labels: Tensor) -> float:
    """Accuracy of always naming the commonest class; images without a label (-1) take no part.

    >>> import torch
    >>> majority_share(torch.tensor([0, 1, 1, 1, -1]))
    0.75
    """
    counts = labels[labels >= 0].bincount().tolist()
    return max(counts) / sum(counts)
