"""Options of commands that are not settings of a run."""

from __future__ import annotations

import argparse
from typing import NoReturn

from harmonize.types import ConfigError


class Parser(argparse.ArgumentParser):
    """Mistakes are one sentence, like all others."""

    def error(self, message: str) -> NoReturn:
        """Refuse.

        Raises:
            ConfigError: Always.
        """
        raise ConfigError(f"{self.prog}: {message}; see {self.prog} --help")
