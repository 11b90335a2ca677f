"""What an evaluation protocol is, and what it works with."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from harmonize.data.module import DataModule
from harmonize.evaluation.features import Features, extract, resolve
from harmonize.files import digest, write_whole
from harmonize.functional.distributed import from_rank_0, gather_images, gather_rows, rank, wait_for_all
from harmonize.functional.hashing import weights_hash
from harmonize.types import Batch, ConfigError, EncoderSpec, FeatureSpec, Result

T = TypeVar("T")


class EvaluationProtocol(Protocol):
    """An evaluation: ``conf/eval/<name>.yaml`` names one by its ``_target_`` and carries its hyper-parameters."""

    def run(self, bench: Bench) -> list[Result]:
        """Evaluate.

        Every rank calls it, and all receive the same results.

        Raises:
            ConfigError: The data or the encoder do not suit the protocol.
        """


@dataclass
class Bench:
    """What a protocol works with.

    Attributes:
        encoder: Frozen, in eval mode, on ``device``; whoever trains it trains a copy.
        make_data: The data with other settings: arguments of ``DataModule`` besides the data set (``recipes``,
            ``required_views``, ``batch_size``, ``eval_interpolation``, ...).
        dataset: The data set itself, for protocols that read more than its images and labels.
        device: Where to compute.
        seed: Everything random is a function of it.
        folder: For what takes up an interrupted evaluation again; what is complete is found there, too.
        cache: For features, which other evaluations of the same network on the same data read as well.
        batch_size: Images at a time through the frozen encoder.
        num_train: At most so many labelled training images, evenly spaced; None: all.
        num_val: The same for validation images.
        head: The classifier that came with the checkpoint (see ``classifier.py``), or None.
        trainable: ``trainable(drop_path, per_block=False)``: a copy of the encoder in which everything is trained, in
            train mode, with stochastic depth and, if asked for, a relative-position table for each block.
        keep: ``keep(encoder, head)`` writes a trained network into the results' folder, as a checkpoint that can be
            evaluated in turn.
        track: Shows a progress bar while one iterates.
        say: Prints a line.
    """

    encoder: nn.Module
    make_data: Callable[..., DataModule]
    dataset: Any
    device: torch.device
    seed: int
    folder: Path
    cache: Path
    batch_size: int = 64
    num_train: int | None = None
    num_val: int | None = None
    head: nn.Module | None = None
    trainable: Callable[..., nn.Module] | None = None
    keep: Callable[[nn.Module, nn.Module], None] = field(default=lambda encoder, head: None)
    track: Callable[[Iterable[T], str], Iterable[T]] = field(default=lambda items, what: items)
    say: Callable[[str], None] = field(default=lambda line: None)

    def __post_init__(self) -> None:
        self.data = self.make_data()

    @property
    def spec(self) -> EncoderSpec:
        """The encoder's."""
        return self.encoder.spec  # type: ignore[return-value]

    @property
    def classes(self) -> list[str]:
        """Names of the classes.

        Raises:
            ConfigError: The data have no labels.
        """
        if self.data.classes is None:
            raise ConfigError("data has no labels, or one class: evaluations by class labels need two classes or more.")
        return self.data.classes

    def load_state(self, name: str) -> dict[str, Any] | None:
        """What an interrupted evaluation stored under a name: tensors and plain values; None if there is nothing.

        Every rank takes part: none goes on, and stores something new, before all have read the same.
        """
        path = self.folder / f"{name}.state"
        state = torch.load(path, map_location="cpu", weights_only=True) if path.is_file() else None
        wait_for_all()
        return state

    def save_state(self, name: str, state: Mapping[str, Any]) -> None:
        """Store what it takes to go on from here; rank 0 writes, whole or not at all."""
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            torch.save(dict(state), content)
            write_whole(self.folder / f"{name}.state", content.getvalue())
        wait_for_all()

    def features(
        self, split: str, specs: Sequence[FeatureSpec], data: DataModule | None = None, key: str = ""
    ) -> list[Features]:
        """Frozen features of clean training or validation images, from the cache where they are there already.

        They are computed and stored a part at a time, so an interrupted evaluation goes on where it stopped. Every
        rank takes part, and needs to see the same ``cache``.

        Args:
            split: ``train`` or ``val``.
            specs: The features; what is not in the cache is made in one pass.
            data: Data with another clean view than the default one.
            key: What tells that view from the default one.
        """
        data = data or self.data
        specs = [resolve(spec, self.spec) for spec in specs]
        indices = data.spread(split, self.num_train if split == "train" else self.num_val)  # type: ignore[arg-type]
        parts = [indices[i : i + PART] for i in range(0, len(indices), PART)]
        found: list[list[Features]] = []
        for part in self.track(parts, f"features, {split}") if len(parts) > 1 else parts:
            images = [self.data.classes, data.names(split, part), list(part)]  # type: ignore[arg-type]
            files = {spec: self._file(split, spec, images, key) for spec in specs}
            # Rank 0 decides: another evaluation may be filling the same cache.
            missing = from_rank_0([spec for spec in dict.fromkeys(specs) if not files[spec].is_file()])
            if missing:
                loader: Iterable[Batch] = data.feature_loader(split, part, self.batch_size)  # type: ignore[arg-type]
                if len(parts) == 1:
                    loader = self.track(loader, f"features, {split}")
                with frozen(self.encoder):
                    computed = extract(self.encoder, loader, missing, self.device)
                for features in computed if rank() == 0 else ():
                    self._store(files[features.spec], features)
                wait_for_all()
            found.append([self._read(files[spec], spec) for spec in specs])
        return [_join(column) for column in zip(*found, strict=True)]

    def per_image(
        self, loader: Iterable[Batch], measure: Callable[[Batch], Tensor], what: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One row of numbers for every image of a loader, over all ranks, in the order of the images, each once.

        Args:
            loader: Batches with a clean view; each rank its own share.
            measure: A batch on the device -> (B, K).
            what: For the progress bar.

        Returns:
            The rows (M, K) fp64, the labels (M,) and the positions (M,) of the images.
        """
        parts = []
        for batch in self.track(loader, what):
            batch = batch.apply(lambda tensor: tensor.to(self.device))
            parts.append((measure(batch).double(), batch.label, batch.index))
        width = torch.tensor([parts[0][0].shape[1] if parts else 0], device=self.device)
        none = torch.empty(0, dtype=torch.int64, device=self.device)  # a rank may get no image at all
        no_rows = torch.empty(0, int(gather_rows(width).max()), dtype=torch.float64, device=self.device)
        parts.append((no_rows, none, none))
        rows, label, index = (torch.cat(column) for column in zip(*parts, strict=True))
        index, rows, label = gather_images(index, rows, label)
        return rows, label, index

    def _file(self, split: str, spec: FeatureSpec, images: list[Any], key: str) -> Path:
        return self.cache / f"{split}-{digest([str(spec), images, key], 16)}.safetensors"

    def _store(self, path: Path, features: Features) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = {"x": features.x, "label": features.label, "index": features.index}
        write_whole(path, save({name: column.cpu().contiguous() for name, column in columns.items()}))

    def _read(self, path: Path, spec: FeatureSpec) -> Features:
        return Features(**load_file(path, device=str(self.device)), spec=spec)


PART = 8192
"""Images per file of the feature cache."""


def _join(parts: Sequence[Features]) -> Features:
    x, label, index = (torch.cat([getattr(part, name) for part in parts]) for name in ("x", "label", "index"))
    return Features(x, label, index, parts[0].spec)


@contextmanager
def frozen(encoder: nn.Module) -> Iterator[None]:
    """See to it that an evaluation of a frozen encoder leaves every parameter and buffer of it as it is.

    Raises:
        RuntimeError: It is in train mode, or something in it has changed.
    """
    if any(module.training for module in encoder.modules()):
        raise RuntimeError("A frozen encoder must be in eval mode: call encoder.eval() first.")
    before = weights_hash(encoder.state_dict())
    yield
    if any(module.training for module in encoder.modules()):
        raise RuntimeError("An evaluation has put the frozen encoder into train mode.")
    if weights_hash(encoder.state_dict()) != before:
        raise RuntimeError("An evaluation has changed the frozen encoder; its numbers cannot be trusted.")
