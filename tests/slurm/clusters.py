"""docker/slurm/cluster.py, which is a script and in no package."""

import importlib.util
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "docker" / "slurm" / "cluster.py"

_spec = importlib.util.spec_from_file_location("slurm_cluster", SCRIPT)
_module = sys.modules.setdefault(_spec.name, importlib.util.module_from_spec(_spec))
_spec.loader.exec_module(_module)

Cluster = _module.Cluster
ClusterError = _module.ClusterError
kill = _module.kill
missing = _module.missing
processes = _module.processes
