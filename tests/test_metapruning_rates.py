"""Kept filters become an encoding, and an encoding rates."""

import dataclasses
import json
from pathlib import Path

import pytest
import run_records

from fastprune import FilterPruner, models, recipes, search
from fastprune.metapruning import PlainNetwork, cost, describe
from fastprune.metapruning.rates import encoding_of_kept, encoding_of_run, rates_of_encoding
from fastprune.metapruning.settings import RECIPES

SEARCHED = ("resnet20", "resnet50_cifar", "mobilenet_v1_cifar", "mobilenet_v2_cifar")


def widths(network: str, encoding: tuple[int, ...]) -> dict[str, int]:
    return {layer.name: layer.conv.outputs.channels(encoding) for layer in describe(network).layers()}


@pytest.mark.parametrize("network", SEARCHED)
def test_names_are_those_of_the_network(network: str) -> None:
    names = [name for name, module in PlainNetwork(network).named_modules() if type(module).__name__ == "Conv2d"]
    assert sorted(layer.name for layer in describe(network).layers()) == sorted(names)


@pytest.mark.parametrize("network", SEARCHED)
def test_an_encoding_comes_back_from_its_widths(network: str) -> None:
    for seed in range(5):
        encoding = tuple((7 * seed + 11 * i) % 31 for i in range(len(describe(network).genes)))
        found = encoding_of_kept(network, widths(network, encoding))
        assert widths(network, found) == pytest.approx(widths(network, encoding), abs=1)


def test_the_most_of_a_stages_convolutions_counts() -> None:
    kept = dict.fromkeys(widths("resnet20", (30,) * 12), 2)
    kept["layer2.1.conv2"] = 17  # of 32, beside a projection and two others of the same stage that keep 2
    kept["layer3.0.conv1"] = 0
    found = encoding_of_kept("resnet20", kept)
    assert found[1] == 14
    assert found[describe("resnet20").genes.index("layer3.0.middle")] == 0


def test_a_pruner_gives_an_encoding() -> None:
    pruner = FilterPruner(models.create("resnet20"), rate=0.5, every=1)
    encoding = encoding_of_kept("resnet20", pruner.kept())
    assert 0 < cost("resnet20", encoding).macs < cost("resnet20", [30] * 12).macs


def test_rates_leave_the_widths_of_the_encoding() -> None:
    encoding = (10, 20, 30, *range(9))
    rates = rates_of_encoding("resnet20", encoding)
    plain = PlainNetwork("resnet20", encoding)
    full = PlainNetwork("resnet20")
    assert list(rates) == [layer.name for layer in describe("resnet20").layers()]
    for name, rate in rates.items():
        filters, kept = full.get_submodule(name).out_channels, plain.get_submodule(name).out_channels
        assert round(filters * (1 - rate)) == kept
    assert set(rates_of_encoding("resnet50", (0,) * 20)) >= {"layer4.0.downsample.0"}
    assert rates_of_encoding("resnet50", (0,) * 20)["layer4.0.downsample.0"] == 0


def test_what_is_missing_or_wrong_is_told() -> None:
    with pytest.raises(ValueError, match="none are given for conv1"):
        encoding_of_kept("resnet20", {})
    with pytest.raises(ValueError, match="conv1 has 16 filters, and 17 are said to be kept"):
        encoding_of_kept("resnet20", {"conv1": 17})


@pytest.fixture
def pruned_run(tmp_path: Path) -> Path:
    full = widths("resnet20", (30,) * 12)
    layers = {"layers": list(full), "filters_per_layer": list(full.values())}
    kept = [max(1, filters // 2) for filters in full.values()]
    run = run_records.write(tmp_path / "pruned", [run_records.record(1, kept_per_layer=kept, **layers)])
    config = dataclasses.replace(recipes.RECIPES["quick"], out=run)
    (run / "config.json").write_text(json.dumps({"config": config.to_json()}), encoding="utf-8")
    return run


def test_a_search_begins_with_what_a_run_keeps(pruned_run: Path) -> None:
    assert encoding_of_run(pruned_run, "resnet20") == (13,) * 12
    config = dataclasses.replace(RECIPES["quick"], init_from=pruned_run, min_macs=None, max_macs="50%")
    images = search.data.embedded(train=20, test=10)
    space = search.make_space(config, images)
    assert search.make_search(config, space).population[0] == (13,) * 12
    # What is not within the budget is led there.
    space = search.make_space(dataclasses.replace(config, max_macs="10%"), images)
    first = search.make_search(config, space).population[0]
    assert space.within([first])[0]
    assert all(gene <= 13 for gene in first)


def test_a_run_of_another_network_is_refused(pruned_run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trained resnet20, and the search is of resnet56"):
        encoding_of_run(pruned_run, "resnet56")
    config = dataclasses.replace(RECIPES["quick"], init_from=tmp_path)
    with pytest.raises(search.SearchError, match=r"--init-from: .* is not the folder of a run"):
        search.make_search(config, search.make_space(config, search.data.embedded(train=20, test=10)))
