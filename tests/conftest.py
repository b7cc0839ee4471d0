"""Fixtures of the ops' tests: every implementation there is, chosen and restored around each test."""

import os
from collections.abc import Iterator

# Before torch is loaded: threads that spin while they wait make tests several times slower on shared cores.
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import cases
import pytest


def _name(implementation: cases.Implementation) -> str:
    return implementation.name


@pytest.fixture(params=cases.IMPLEMENTATIONS, ids=_name)
def implementation(request: pytest.FixtureRequest) -> Iterator[cases.Implementation]:
    """Each implementation, the compiled CPU one at each of its instruction sets."""
    with cases.active(request.param) as active:
        yield active


@pytest.fixture(params=cases.REGISTERED, ids=_name)
def registered(request: pytest.FixtureRequest) -> Iterator[cases.Implementation]:
    """One implementation of each registration: for tests of the dispatcher, not of the values."""
    with cases.active(request.param) as active:
        yield active
