"""Where lightning's loops stand after so many optimiser steps, so that a run resumes at any step and on any ranks.

What lightning stores counts micro-batches and remembers which hook it was saved in. The optimiser step alone says where
a run stands: the same step is another micro-batch when the number of micro-batches per step has changed.
"""

from __future__ import annotations

from typing import Any


def loop_state(
    step: int, steps_per_epoch: int, accumulate: int, validation_due: bool, limit: int | None = None
) -> dict[str, Any]:
    """Entries for ``checkpoint["loops"]["fit_loop"]``.

    Args:
        step: Optimiser steps done.
        steps_per_epoch: Optimiser steps of an epoch.
        accumulate: Micro-batches of an optimiser step.
        validation_due: All steps of an epoch are done, its validation is not.
        limit: Micro-batches after which an epoch ends, even if its last step then has fewer.

    >>> state = loop_state(6, 4, 2, False)  # two steps into the second epoch
    >>> state["epoch_progress"]["current"]
    {'ready': 2, 'completed': 1, 'started': 2, 'processed': 1}
    >>> state["epoch_loop.batch_progress"]["current"]
    {'ready': 4, 'completed': 4, 'started': 4, 'processed': 4}
    """
    epoch, offset = divmod(step, steps_per_epoch)
    if validation_due:  # of the epoch before
        epoch, offset = (step - 1) // steps_per_epoch, (step - 1) % steps_per_epoch + 1
    within = offset > 0
    batches = (offset if within else steps_per_epoch) * accumulate
    if limit is not None:
        batches = min(batches, limit)
    return {
        "epoch_progress": _both(_progress(epoch + within, epoch)),
        "epoch_loop.batch_progress": {
            "total": _progress(step * accumulate, step * accumulate),
            "current": _progress(batches, batches),
            "is_last_batch": not within or validation_due,
        },
        "epoch_loop.state_dict": {"_batches_that_stepped": step},
        # One batch begun and none done is how lightning knows that validation is to be taken up again: from the start.
        "epoch_loop.val_loop.batch_progress": _both(_progress(int(validation_due), 0)) | {"is_last_batch": False},
    }


def _progress(begun: int, done: int) -> dict[str, int]:
    return {"ready": begun, "completed": done, "started": begun, "processed": done}


def _both(progress: dict[str, int]) -> dict[str, dict[str, int]]:
    return {"total": dict(progress), "current": dict(progress)}
