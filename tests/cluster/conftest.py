"""Tests on hosts of their own: skipped, with the reason, where there can be none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import hosts
from tests.cluster.hosts import Lab
from tests.cluster.slurm import Slurm
from tests.cluster.slurm import missing as missing_for_slurm


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def session_lab() -> Iterator[Lab]:
    if reason := hosts.missing():
        pytest.skip(reason)
    with Lab(3) as lab:
        yield lab


@pytest.fixture
def lab(session_lab: Lab) -> Iterator[Lab]:
    """A head and three nodes, whole and idle. What a test does to them is undone."""
    yield session_lab
    session_lab.reset()


@pytest.fixture(scope="session")
def session_slurm(session_lab: Lab) -> Slurm:
    if reason := missing_for_slurm():
        pytest.skip(reason)
    return Slurm(session_lab)


@pytest.fixture
def slurm(lab: Lab, session_slurm: Slurm) -> Iterator[Slurm]:
    """Slurm over the nodes of the lab, with no jobs, all nodes idle."""
    session_slurm.make_ready()
    yield session_slurm
    session_slurm.cancel_all()
