"""Real clusters, one per session and number of nodes, on whatever ports are free."""

import pytest

from tests.slurm.clusters import Cluster, missing


def _running(nodes):
    if reason := missing():
        pytest.skip(reason)
    with Cluster(nodes=nodes) as cluster:
        yield cluster


@pytest.fixture(scope="session")
def cluster():
    """A cluster with one node of 8 CPUs."""
    yield from _running(1)


@pytest.fixture(scope="session")
def two_nodes():
    """A cluster with two nodes of 8 CPUs each."""
    yield from _running(2)
