"""Times that processes must agree on, and times in words."""

from __future__ import annotations

HEARTBEAT = 10.0
"""Seconds between a run's signs of life."""

SILENCE = 90.0
"""Seconds without one after which a run that cannot be asked counts as gone."""


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(3725)
    '1:02:05'
    """
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"
