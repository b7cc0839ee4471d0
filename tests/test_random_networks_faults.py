"""The random networks find mistakes that are planted in fastprune."""

import pytest
from random_networks import faults
from random_networks.checks import check
from random_networks.draw import draw
from random_networks.shrink import shrunk

pytestmark = pytest.mark.usefixtures("one_thread")

QUICKLY_FOUND = (
    "in-place statements are dead code",
    "groups are forgotten",
    "a second input with a default is dropped",
)


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


def test_findings_are_made_smaller() -> None:
    name = "biases are frozen as their weights"
    seed = next(seed for seed in range(100) if faults.found_after(name, 1, seed))
    program = draw(seed)
    with faults.planted(name):
        (finding, *_) = check(program).findings
        small = shrunk(program, finding)
        assert finding in check(small).findings
    assert len(small.source()) < len(program.source()) / 2
