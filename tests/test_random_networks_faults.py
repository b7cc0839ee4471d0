"""The random networks find mistakes that are planted in fastprune."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from random_networks import faults

QUICKLY_FOUND = (
    "in-place statements are dead code",
    "groups are forgotten",
    "a second input with a default is dropped",
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", QUICKLY_FOUND)
def test_common_faults_are_found_within_sixty_networks(name: str) -> None:
    assert faults.found_after(name, 60) is not None


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", faults.FAULTS)
def test_each_fault_is_found_within_a_thousand_networks(name: str) -> None:
    assert faults.found_after(name, 1000) is not None


def test_there_are_fifteen_faults() -> None:
    assert len(faults.FAULTS) >= 15
