"""Where the metrics go: whether Weights & Biases can be reached, and what happens if not."""

from __future__ import annotations

import os
from collections.abc import Iterator

from harmonize.checks.findings import Finding, Patient, first_line, ok, warning


def wandb(patient: Patient) -> Iterator[Finding]:
    """Where the metrics go, and whether the server can be reached."""
    cfg = patient.cfg.logger
    if cfg.name != "wandb":
        yield ok(f"logger={cfg.name}: metrics go to the run folder, W&B is not used.")
        return
    nothing_lost = "nothing is lost, metrics.jsonl has every value, and the run logs offline; harmonize sync uploads it"
    import wandb  # noqa: F401 (whether it can be imported is the question)

    from harmonize.training.loggers import has_api_key

    mode = os.environ.get("WANDB_MODE") or cfg.mode
    if mode not in ("auto", "online"):
        yield ok(f"W&B is {mode}: metrics.jsonl has every value{'; harmonize sync uploads it' * (mode == 'offline')}.")
        return
    if not has_api_key():
        yield warning(
            f"W&B has no API key: {nothing_lost}.",
            "wandb login, or set WANDB_API_KEY; logger=csv turns W&B off.",
        )
        return
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    if (error := _unreachable(host)) is None:
        yield ok(f"W&B has an API key, and {host} answers.")
    else:
        yield warning(
            f"W&B has an API key, but {host} does not answer ({error}): {nothing_lost}.",
            "logger.mode=offline does not wait for it; behind a proxy set HTTPS_PROXY.",
        )


def _unreachable(address: str) -> str | None:
    """Why a web server does not answer, or None if it does, with whatever."""
    from urllib.error import HTTPError, URLError
    from urllib.request import urlopen

    try:
        urlopen(address, timeout=5).close()
    except HTTPError:
        return None
    except (OSError, URLError, ValueError) as error:
        return first_line(getattr(error, "reason", error))
    return None
