"""Do the images come as fast as the network learns from them?"""

from __future__ import annotations

import copy
import io
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import partial
from itertools import chain, repeat
from typing import TYPE_CHECKING, Any

from harmonize.checks.findings import GIB, Finding, Patient, ok, problem, warning
from harmonize.checks.hardware import cores_per_device
from harmonize.types import Batch, Progress

if TYPE_CHECKING:
    from torch.utils.data import DataLoader

    from harmonize.data.batches import RawBatch
    from harmonize.data.module import DataModule
    from harmonize.training.setup import Setup

LOADER_SECONDS = 5.0
STEP_SECONDS = 8.0
LARGEST_WAIT = 0.1


@dataclass(frozen=True)
class LoaderSpeed:
    """How fast images come.

    Attributes:
        rate: Images per second.
        alone: Images per second of the main process without workers.
        workers: Worker processes that were used.
        batch: One of the batches.
        on_device: Whether it is still to be augmented, on the device.
    """

    rate: float
    alone: float
    workers: int
    batch: Batch | RawBatch
    on_device: bool


@dataclass(frozen=True)
class StepSpeed:
    """How fast images are learnt from.

    Attributes:
        rate: Images per second, augmentation on the device included.
        images: Of the largest micro-batch that there was time, and memory, for.
        full: Images of the run's micro-batch.
        out_of_memory: Whether a larger one did not fit.
        peak: Most memory of the GPU that was used, in bytes; 0 on a CPU.
    """

    rate: float
    images: int
    full: int
    out_of_memory: bool = False
    peak: int = 0


def speed(patient: Patient) -> Iterator[Finding]:
    """Whether the images of one device come as fast as it learns from them."""
    setup = patient.setup
    if setup is None:
        return
    if not setup.on_gpu:
        from harmonize.memory import keep_freed_memory

        keep_freed_memory()
    full = setup.data.micro_batch
    loader = time_loader(measured_data(patient))
    step = time_step(setup, loader.batch, full)
    if step.out_of_memory:
        at_once = f"Set trainer.images_at_once={step.images} (the same result, one more forward pass), or "
        yield problem(
            f"A micro-batch of {full} images does not fit into the GPU's memory, {step.images} do.",
            f"{at_once if step.images else 'Set '}trainer.activation_checkpointing=true, or raise trainer.accumulate.",
        )
        if not step.images:
            return
    elif step.peak:
        yield ok(f"{step.images} images at a time take {step.peak / GIB:.1f} GiB of the GPU's memory.")
    wait = waiting(loader, step)
    rates = f"The loader brings {_few(loader.rate)} images per second, a step takes {_few(step.rate)}"
    rates += "" if patient.devices == 1 else ", on each device"
    note = " (its blocks not compiled here)" if setup.compiled else ""
    if wait < LARGEST_WAIT:
        yield ok(f"{rates}{note}: it waits for data {wait:.0%} of the time.")
    else:
        yield warning(f"{rates}{note}: it waits for data {wait:.0%} of the time.", _faster(patient, loader, step))


def waiting(loader: LoaderSpeed, step: StepSpeed) -> float:
    """Share of the time that a step waits for images: workers load ahead, the main process takes turns.

    >>> step = StepSpeed(100.0, 8, 8)
    >>> waiting(LoaderSpeed(50.0, 50.0, 2, None, False), step), waiting(LoaderSpeed(300.0, 300.0, 0, None, False), step)
    (0.5, 0.25)
    """
    load, learn = 1 / loader.rate, 1 / step.rate
    return max(0.0, 1 - learn / load) if loader.workers else load / (load + learn)


def _faster(patient: Patient, loader: LoaderSpeed, step: StepSpeed) -> str:
    """What to change so that images come faster."""
    here, _ = cores_per_device(patient.devices)
    data = patient.cfg.data
    needed, most = math.ceil(1.1 * step.rate / loader.alone), max(1, int(here))
    ways = []
    if loader.workers == 0 and data.num_workers:
        return "Images are copied from one array by the main process, which waits for the disk or the memory."
    if min(needed, most) > loader.workers:
        ways.append(f"data.num_workers={min(needed, most)}")
    if patient.setup is not None and patient.setup.on_gpu and not loader.on_device:
        ways.append("data.augment=device")
    if "cache_size" in data and not data.cache:
        ways.append("data.cache=true (images are decoded once)")
    if ways:
        return f"Use {' or '.join(ways)}."
    return f"{needed} workers would be needed, on as many cores: use more cores, or smaller images."


def measured_data(patient: Patient) -> DataModule:
    """The run's images, without the caches that the run would build first.

    Rendered images get a small cache, so that they come as fast as from the real one; decoded files get none.
    """
    assert patient.setup is not None
    cfg, setup = copy.deepcopy(patient.cfg), patient.setup
    if not cfg.data.get("cache"):
        return setup.data
    from harmonize.data.shapes import LARGEST_CACHE
    from harmonize.training.setup import build_data

    cached = 3 * setup.data.num_train * cfg.data.image_size**2 <= LARGEST_CACHE or cfg.data.cache is True
    if "cache_size" in cfg.data or not cached:
        cfg.data.cache = False
    else:
        parts = cfg.data.batch_size // setup.data.micro_batch
        cfg.data.batch_size = parts * min(setup.data.micro_batch, 64)
        cfg.data.num_train = max(cfg.data.batch_size, min(setup.data.num_train, 512))
    return build_data(cfg, setup.module.objective)


def time_loader(data: DataModule, seconds: float = LOADER_SECONDS) -> LoaderSpeed:
    """Time the training loader: alone first, then with its workers, in batches that do not take long to make."""
    workers, full = data.num_workers, data.micro_batch
    try:
        with _temporary_cache():
            data.num_workers, data.micro_batch = 0, min(8, full)
            alone, _ = _rate(data.train_loader(), seconds / 5)
            data.num_workers, data.micro_batch = workers, max(1, min(full, int(alone / 4)))
            loader = data.train_loader()
            rate, batch = _rate(loader, seconds)
            return LoaderSpeed(rate, alone, loader.num_workers, batch, data.augments_on_device)
    finally:
        data.num_workers, data.micro_batch = workers, full


def _rate(loader: DataLoader, seconds: float) -> tuple[float, Batch | RawBatch]:
    """Images per second of a loader that is under way, and one of its batches."""
    batches = chain.from_iterable(repeat(loader))
    for _ in range(1 + 2 * loader.num_workers):  # workers make their first batches all at once
        batch = next(batches)
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds or not count:
        batch = next(batches)
        count += len(batch)
    return count / elapsed, batch


@contextmanager
def _temporary_cache() -> Iterator[None]:
    """What is rendered meanwhile goes to a folder that is deleted."""
    before = os.environ.get("HARMONIZE_CACHE")
    with tempfile.TemporaryDirectory(prefix="harmonize-doctor-") as folder:
        os.environ["HARMONIZE_CACHE"] = folder
        try:
            with redirect_stderr(io.StringIO()):  # the progress bar of a cache
                yield
        finally:
            if before is None:
                del os.environ["HARMONIZE_CACHE"]
            else:
                os.environ["HARMONIZE_CACHE"] = before


def time_step(setup: Setup, batch: Batch | RawBatch, full: int, seconds: float = STEP_SECONDS) -> StepSpeed:
    """Time training steps on more and more images, until they are a micro-batch or the time is over."""
    import torch

    device = torch.device("cuda" if setup.on_gpu else "cpu")
    setup.module.to(device).train()
    pixels = batch.to(device) if not isinstance(batch, Batch) else batch.apply(lambda tensor: tensor.to(device))
    augmenting = 0.0
    if not isinstance(pixels, Batch):
        _timed(pixels.augment, setup.on_gpu)
        augmenting = _timed(pixels.augment, setup.on_gpu) / len(pixels)
        pixels = pixels.augment()
    start, size, times, out_of_memory = time.perf_counter(), min(4, full), dict[int, float](), False
    while True:
        rows = torch.arange(size, device=device) % len(pixels)
        step = partial(_step, setup, pixels.apply(partial(torch.index_select, dim=0, index=rows)))
        try:
            first = _timed(step, setup.on_gpu)
            again = _timed(step, setup.on_gpu)
        except torch.OutOfMemoryError:
            out_of_memory = True
            break
        times[size] = again
        left = seconds - (time.perf_counter() - start)
        if size == full or left < (0 if setup.on_gpu else 2 * (first + again)):
            break
        size = min(2 * size, full)
    peak = torch.cuda.max_memory_allocated() if setup.on_gpu else 0
    rate = 1 / (step_seconds(times, full) / full + augmenting) if times else 0.0
    return StepSpeed(rate, max(times, default=0), full, out_of_memory, peak)


def step_seconds(times: Mapping[int, float], full: int) -> float:
    """Seconds of a step on ``full`` images, from those on fewer: what grows with the images goes on growing.

    >>> step_seconds({4: 1.5, 8: 2.0}, full=16), step_seconds({4: 1.0}, full=16)
    (3.0, 4.0)
    """
    *earlier, (size, seconds) = times.items()
    if not earlier:
        return seconds * full / size
    fewer, before = earlier[-1]
    return seconds + max(0.0, (seconds - before) / (size - fewer)) * (full - size)


def _step(setup: Setup, batch: Batch) -> None:
    """One training step as far as its speed goes."""
    import torch

    module, types = setup.module, {"bf16": torch.bfloat16, "fp16": torch.float16}
    progress = Progress(1, setup.module.total_steps)
    device, kind = batch.index.device.type, types.get(setup.precision)
    module.objective.before_step(module.encoder, progress)  # type: ignore[operator]
    with torch.autocast(device, kind, enabled=kind is not None):
        loss = module.objective(module.encoder, batch, progress).loss
    loss.backward()
    module.optimization.optimizer.step()
    module.optimization.optimizer.zero_grad()


def _timed(work: Callable[[], Any], on_gpu: bool) -> float:
    """Seconds that something takes, on the device too."""
    import torch

    wait = torch.cuda.synchronize if on_gpu else lambda: None
    wait()
    start = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - start


def _few(number: float) -> str:
    """A number in few digits.

    >>> _few(1853.7), _few(2.34)
    ('1854', '2.3')
    """
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"
