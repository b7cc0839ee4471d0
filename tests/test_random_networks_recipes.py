"""The random networks have every layer, function and argument that fastprune knows, and are always the same."""

import inspect
from collections import Counter

import pytest
from random_networks import coverage
from random_networks.draw import RECIPES, draw, missing
from torch.nn import functional

from fastprune.layer_kinds import MODULES

pytestmark = pytest.mark.usefixtures("one_thread")

# Made by other functions, or of no use to a network.
NOT_GIVEN = {"input", "training", "return_indices", "_stacklevel", "out", "use_input_stats", "momentum", "dropout_p"}


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
