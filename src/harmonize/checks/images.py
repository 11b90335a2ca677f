"""The run, built, and its images: how many, of which classes, and whether they can be read."""

from __future__ import annotations

import copy
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import harmonize
from harmonize.checks.findings import Finding, Patient, first_line, ok, problem, warning
from harmonize.config import check_config, instantiate
from harmonize.types import ConfigError


def run(patient: Patient) -> Iterator[Finding]:
    """Build everything that the run builds before its first step."""
    from harmonize.training.setup import build

    check_config(patient.cfg, machine=False)
    try:
        with _noted_warnings() as said:
            patient.setup = setup = build(patient.cfg)
    except ConfigError as error:
        if patient.downloads and "download=true" in str(error):
            yield warning("The data set is not there; the run downloads it first (data.download=true).")
            return
        raise
    yield from (warning(f"{sentence}.", "See docs/data.md.") for sentence in said)
    parameters = sum(p.numel() for p in setup.module.parameters())
    where = "the GPU" if setup.on_gpu else "the CPU"
    yield ok(
        f"The run can be built: {parameters / 1e6:.1f} M parameters with heads and momentum network, on {where} in "
        f"{setup.precision}; {setup.module.total_steps} steps, {setup.module.steps_per_epoch} an epoch."
    )


SAMPLE = 32
SAMPLE_SECONDS = 10.0


def images(patient: Patient) -> Iterator[Finding]:
    """The data set: how many images and classes, and whether they can be read."""
    cfg = patient.cfg
    if patient.downloads and patient.setup is None:
        return
    with _noted_warnings() as said:
        dataset = patient.setup.data.dataset if patient.setup else instantiate(cfg.data.dataset)
        train, val = dataset.split("train"), dataset.split("val")
    yield from (warning(f"{sentence}.", "See docs/data.md.") for sentence in said)
    classes = dataset.classes
    labels = "no labels: probes are off" if classes is None else f"{len(classes)} classes"
    yield ok(f"{len(train)} images to train on, {len(val)} for validation, {labels}.")
    steps = len(train) // cfg.data.batch_size
    if 0 < steps < 5:
        yield warning(
            f"An epoch has {steps} steps of {cfg.data.batch_size} images: losses move slowly, epoch by epoch.",
            "Reduce data.batch_size, or raise trainer.max_epochs.",
        )
    if classes is not None:
        probed = dataset.probe_split("train") if hasattr(dataset, "probe_split") else train
        yield from _class_sizes(getattr(probed, "labels", None), classes)
    for name, split in {"train": train, "val": val}.items():
        yield from _readable(name, split)


@contextmanager
def _noted_warnings() -> Iterator[list[str]]:
    """What harmonize itself warns of meanwhile, each sentence once; there when the block is over."""
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield said
    own = (w for w in caught if Path(w.filename).is_relative_to(Path(harmonize.__file__).parent))
    said += dict.fromkeys(str(w.message) for w in own)


def _class_sizes(labels: Any, classes: list[str]) -> Iterator[Finding]:
    """Images per class, for the probes."""
    if labels is None:
        return
    import numpy as np

    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    small, large = int(counts.argmin()), int(counts.argmax())
    text = f"Images per class: {counts[small]} ({classes[small]}) to {counts[large]} ({classes[large]})"
    if counts[small] == 0:
        yield warning(f"{text}.", "Probes cannot learn a class without images: raise data.num_train.")
    elif counts[large] > 20 * counts[small]:
        yield warning(f"{text}.", "Chance of the probes is that of the largest class, far above 1 / classes.")
    else:
        yield ok(f"{text}.")


def _readable(name: str, split: Any) -> Iterator[Finding]:
    """Evenly spaced images of a split, decoded."""
    from harmonize.data.sampler import evenly

    split = _uncached(split)
    seconds, reasons = [], []
    for index in split.spread(SAMPLE) if hasattr(split, "spread") else evenly(len(split), SAMPLE):
        start = time.perf_counter()
        try:
            split.load(index)
        except OSError as error:
            reasons.append(f"{split.name(index)}: {first_line(error)}")
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > SAMPLE_SECONDS:
            break
    read = len(seconds)
    share = f"{len(reasons)} of {read} sampled images of {name}"
    if reasons:
        report = problem if len(reasons) == read else warning
        yield report(
            f"{share} cannot be read, first {reasons[0]}.", "They are skipped; replace them, or mount the disk."
        )
    elif read:
        yield ok(f"{read} sampled images of {name} can be read ({1000 * statistics.median(seconds):.1f} ms each).")


def _uncached(split: Any) -> Any:
    """The split reading from its files: a check must not start to build a cache of all of them."""
    if getattr(split, "cache", None) is None:
        return split
    split = copy.copy(split)
    split.cache = None
    return split
