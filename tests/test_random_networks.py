"""Random networks of all known layers, functions and arguments: their graph, small form and saved form do the same."""

import pytest
from random_networks.checks import check
from random_networks.draw import draw
from random_networks.shrink import shrunk

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("start", range(0, 100, 10))
def test_forms_of_a_network_compute_the_same(start: int) -> None:
    for seed in range(start, start + 10):
        findings = check(draw(seed)).findings
        if findings:
            program = shrunk(draw(seed), findings[0])
            pytest.fail(f"network {seed}: {findings[0]}\n{program.pruning}, {program.inputs}\n{program.source()}")
