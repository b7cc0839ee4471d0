"""Random networks of all known layers, functions and arguments: their graph, small form and saved form do the same."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from random_networks import coverage, faults
from random_networks.checks import check
from random_networks.draw import RECIPES, draw, missing
from random_networks.shrink import shrunk
from torch.nn import functional

from fastprune.layer_kinds import MODULES

# Made by other functions, or of no use to a network.
NOT_GIVEN = {"input", "training", "return_indices", "_stacklevel", "out", "use_input_stats", "momentum", "dropout_p"}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("start", range(0, 100, 10))
def test_forms_of_a_network_compute_the_same(start: int) -> None:
    for seed in range(start, start + 10):
        findings = check(draw(seed)).findings
        if findings:
            program = shrunk(draw(seed), findings[0])
            pytest.fail(f"network {seed}: {findings[0]}\n{program.pruning}, {program.inputs}\n{program.source()}")


def test_there_is_a_recipe_for_each_known_layer_function_and_method() -> None:
    assert missing() == []


def test_recipes_give_every_argument_of_modules() -> None:
    for name, kind in MODULES.items():
        if name != "MaskedConv2d":
            one_value = {"padding_mode"} if "Transpose" in name else set()
            given = {*RECIPES[f"nn.{name}"].options, *NOT_GIVEN}
            assert kind.arguments.keys() - given <= REQUIRED | one_value, name


# Given in every use, so that coverage need not ask for them.
REQUIRED = {
    *("in_channels", "out_channels", "kernel_size", "in_features", "out_features", "num_features", "num_groups"),
    *("num_channels", "num_parameters", "normalized_shape", "size", "output_size", "padding", "value", "groups"),
    *("dim", "p", "mode"),
}


def test_recipes_give_every_argument_of_functions() -> None:
    for kind, recipe in RECIPES.items():
        space, _, name = kind.partition(".")
        if space != "functional" or inspect.isbuiltin(function := getattr(functional, name)):
            continue
        own = set(inspect.signature(function).parameters) - NOT_GIVEN - {"args", "kwargs"}  # of max pools
        assert own - set(recipe.options) <= {"running_mean", "running_var"}, kind


def test_every_layer_function_and_argument_is_in_one_of_a_hundred_networks() -> None:
    covered: Counter[str] = Counter()
    for seed in range(1000):
        covered.update(draw(seed).used)
    assert coverage.rare(covered, 1000) == {}


def test_a_number_always_gives_the_same_network() -> None:
    assert draw(7).source() == draw(7).source()
    assert draw(7).source() != draw(8).source()


def test_findings_are_made_smaller() -> None:
    name = "biases are frozen as their weights"
    seed = next(seed for seed in range(100) if faults.found_after(name, 1, seed))
    program = draw(seed)
    with faults.planted(name):
        (finding, *_) = check(program).findings
        small = shrunk(program, finding)
        assert finding in check(small).findings
    assert len(small.source()) < len(program.source()) / 2
