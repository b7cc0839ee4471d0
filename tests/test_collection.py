"""What conftest.py makes of the tests: only those that are selected, the longest files first."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cases
import conftest
import pytest


@pytest.mark.skipif(bool(cases.INTERPRETED), reason="then there is one implementation")
@pytest.mark.parametrize(
    ("expression", "own", "generated"),
    [
        ("not slow", [], {"host"}),
        ("not slow", ["slow"], set()),
        ("gpu_kernels", [], {"simulated"}),
        ("slow and not gpu_kernels", [], set()),
        ("slow and not gpu_kernels", ["slow"], {"host"}),
        ("", [], {"host", "simulated"}),
    ],
)
def test_implementations_that_are_not_selected_are_not_generated(
    expression: str, own: list[str], generated: set[str]
) -> None:
    given: list[Any] = []
    function = SimpleNamespace(
        fixturenames=["implementation"],
        config=SimpleNamespace(option=SimpleNamespace(markexpr=expression)),
        definition=SimpleNamespace(iter_markers=lambda: [SimpleNamespace(name=name) for name in own]),
        parametrize=lambda name, parameters, indirect: given.extend(parameters),
    )
    conftest.pytest_generate_tests(function)  # type: ignore[arg-type]
    implementations = [parameter.values[0] for parameter in given]
    on_gpu = [each for each in cases.ON_GPU if "host" in generated]
    host = cases.HOST if "host" in generated else []
    assert implementations == [*host, *(cases.SIMULATED if "simulated" in generated else []), *on_gpu]


def test_the_longest_files_come_first(request: pytest.FixtureRequest) -> None:
    here = Path(__file__).parent
    assert [name for name in conftest.LONGEST if not (here / f"test_{name}.py").exists()] == []
    longest = [item.path.stem.removeprefix("test_") in conftest.LONGEST for item in request.session.items]
    assert longest == sorted(longest, reverse=True)
