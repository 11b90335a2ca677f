"""How Hydra reaches harmonize's launchers: it takes plugins from this namespace package only.

Loaded at every start of the program, so that nothing heavy may be imported here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


class SweepLauncher(Launcher):
    """Runs every job of a sweep as ``harmonize <command> <overrides>`` in a process of its own.

    Args:
        **options: Of the launcher, from ``conf/hydra/launcher``.
    """

    def __init__(self, **options: Any) -> None:
        self.options = {k: OmegaConf.to_container(v) if OmegaConf.is_config(v) else v for k, v in options.items()}
        self.config: DictConfig

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the configuration; nothing else of Hydra's travels to the jobs."""
        self.config = config

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run the jobs to their end."""
        from harmonize.sweeps import run_sweep

        run_sweep(self.config, self.kind, self.options, job_overrides, initial_job_idx)
        return [JobReturn(status=JobStatus.COMPLETED) for _ in job_overrides]

    kind = ""


class LocalLauncher(SweepLauncher):
    """On this machine."""

    kind = "local"


class SlurmLauncher(SweepLauncher):
    """As a job array of SLURM."""

    kind = "slurm"
