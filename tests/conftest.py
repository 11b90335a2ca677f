"""For all tests: nothing is written to the user's cache, and what waits comes first."""

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_tests(tmp_path_factory):
    """Caches of rendered and decoded images go to a folder of this session, in child processes too."""
    before = os.environ.get("HARMONIZE_CACHE")
    os.environ["HARMONIZE_CACHE"] = str(tmp_path_factory.mktemp("harmonize-cache"))
    yield
    if before is None:
        del os.environ["HARMONIZE_CACHE"]
    else:
        os.environ["HARMONIZE_CACHE"] = before


def pytest_collection_modifyitems(items):
    """Tests that wait for a cluster come first: others have the processors meanwhile."""
    items.sort(key=lambda item: "slurm" not in item.path.parts)
