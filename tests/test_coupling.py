"""Filters that write one channel together: who they are, what they score, and that they go together."""

from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from fastprune import FilterPruner, compact, models
from fastprune.coupling import Coupling, written_channels

IMAGES = torch.zeros(1, 3, 32, 32)


def groups(model: nn.Module) -> dict[str, list[int]]:
    return {name: written.ids.tolist() for name, written in written_channels(model, IMAGES).items()}


def test_a_stream_is_written_by_all_that_are_added_to_it() -> None:
    written = groups(models.create("resnet20"))
    assert len(written) == 21
    for stage, writers in enumerate((["conv1"], ["layer2.0.shortcut.0"], ["layer3.0.shortcut.0"])):
        writers += [f"layer{stage + 1}.{block}.conv2" for block in range(3)]
        writers = [name for name in writers if name in written]
        assert all(written[name] == written[writers[-1]] for name in writers)
        assert len(set(written[writers[0]])) == 16 << stage
    insides = [name for name in written if name.startswith("layer") and name.endswith("conv1")]
    everything = [channel for name in insides for channel in written[name]]
    assert len(set(everything)) == len(everything), "what is inside a block is nobody else's"


def test_a_branch_that_begins_as_zeros_writes_to_its_stream() -> None:
    model = models.create("resnet20")
    expected = groups(model)
    for block in range(3):
        nn.init.zeros_(model.get_submodule(f"layer2.{block}.conv2").weight)
    assert groups(model) == expected


def test_a_depthwise_filter_goes_with_the_one_it_reads() -> None:
    written = groups(torchvision.models.mobilenet_v2(num_classes=10))
    assert written["features.2.conv.0.0"] == written["features.2.conv.1.0"]
    assert written["features.3.conv.2"] == written["features.2.conv.2"], "a residual"
    assert not set(written["features.2.conv.0.0"]) & set(written["features.3.conv.0.0"])


@given(st.lists(st.lists(st.integers(0, 6), max_size=9), min_size=1, max_size=5), st.booleans(), st.integers(0, 99))
def test_together_is_the_mean(channels: list[list[int]], known: bool, seed: int) -> None:
    filters = {str(i): len(ids) for i, ids in enumerate(channels)}
    if not sum(filters.values()):
        return
    written = {str(i): np.array(ids, np.int64) for i, ids in enumerate(channels) if i or known}
    scores = np.random.default_rng(seed).random(sum(filters.values()), np.float32)
    flat = [(c if i or known else -1 - j) for i, ids in enumerate(channels) for j, c in enumerate(ids)]
    if not known:  # the first layer's filters stand alone
        assert len(set(flat[: len(channels[0])])) == len(channels[0])
    expected = [np.mean([s for s, other in zip(scores, flat) if other == mine], dtype=np.float64) for mine in flat]
    found = Coupling(filters, written).together(torch.from_numpy(scores))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    for mine in set(flat):
        assert len({float(x) for x, other in zip(found, flat) if other == mine}) == 1, "to the bit"


def test_a_score_that_is_no_number_is_seen_in_all() -> None:
    found = Coupling({"a": 2, "b": 2}, {"a": np.array([0, 1]), "b": np.array([0, 2])}).together(
        torch.tensor([1.0, 2.0, torch.nan, 4.0])
    )
    assert found.isnan().tolist() == [True, False, True, False]


@pytest.mark.parametrize("options", [{"scope": "layer"}, {"scope": "global"}, {"scope": "layer", "round_to": 8}])
def test_streams_get_narrower(options: dict) -> None:
    torch.manual_seed(0)
    model = models.create("resnet20")
    pruner = FilterPruner(model, 0.6, every=1, example_input=IMAGES, **options)
    masks = pruner.masks()
    assert torch.equal(masks["conv1"], masks["layer1.2.conv2"])
    assert torch.equal(masks["layer2.0.shortcut.0"], masks["layer2.2.conv2"])
    small = compact(model.eval(), IMAGES)
    kept = {layer.name: layer.kept for layer in small.report.layers}
    assert all(kept[name] <= int(mask.sum()) + 1 for name, mask in masks.items())  # one may carry constants
    whys = {layer.name: layer.why for layer in pruner.report().layers}
    assert "scored with those that write the same channels" in whys["layer1.0.conv2"]
    assert "scored" not in whys["layer1.0.conv1"], "inside a block it stands alone"
    if options["scope"] == "layer":
        assert kept["layer1.1.conv2"] < 16, "without coupling some writer keeps every channel"


def test_scores_of_a_stream_are_the_mean_of_its_writers() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.a(x)
            return x + self.b(x)

    model = Residual()
    with torch.no_grad():
        model.a.weight.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None, None].expand(4, 3, 1, 1))
        model.b.weight.copy_(torch.tensor([9.0, 1.0, 1.0, 1.0])[:, None, None, None].expand(4, 4, 1, 1))
    both: dict[str, Any] = {"example_input": IMAGES, "removable_only": False}  # the sum is the output
    masks = FilterPruner(model, 0.5, every=1, **both).export_masks()  # means 5, 1.5, 2, 2.5
    assert masks["a"].tolist() == masks["b"].tolist() == [True, False, False, False]
    masks = FilterPruner(Residual().requires_grad_(False), 0.5, every=1, ignore=["b"], **both).masks()
    assert list(masks) == ["a"]
