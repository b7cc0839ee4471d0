"""The layers that PyTorch's fault on CPUs with AVX2 alone can meet, and the way around it."""

import os
import subprocess
import sys
from collections.abc import Iterator

import convolution_faults
import pytest
import torch
from torch import Tensor, nn

import fastprune
from fastprune import onednn
from fastprune.metapruning.description import Conv
from fastprune.metapruning.encoding import Width
from fastprune.metapruning.hyper import HyperConv2d

AVX2 = {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2", "FASTPRUNE_CPU_ISA": "avx2"}


@pytest.fixture(params=[False, True], ids=["fine", "affected"])
def affected(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[bool]:
    """Both kinds of machine, whatever this one is."""
    monkeypatch.setattr(onednn, "_affected", request.param)
    return request.param


def _images(channels: int = 3) -> Tensor:
    return torch.randn(2, channels, 8, 8).to(memory_format=torch.channels_last)


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 6, 1, 2), nn.Conv2d(6, 8, 1))


@pytest.fixture
def formats(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the input of each convolution is contiguous. None reaches oneDNN, which may be faulty."""
    seen: list[bool] = []

    def conv2d(x: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
        seen.append(x.is_contiguous())
        return x[:, :1] * weight.sum()

    for name in ("conv2d", "conv_transpose2d"):
        monkeypatch.setattr(torch.nn.functional, name, conv2d)
    return seen


def test_only_layers_at_risk_on_affected_machines_become_contiguous(affected: bool) -> None:
    weight = torch.randn(4, 3, 1, 1, requires_grad=True)
    images = _images()
    assert onednn.safe_operands(images, weight, (2, 2))[0].is_contiguous() == affected
    wide = torch.randn(4, 8, 1, 1, requires_grad=True)
    for other, kernel, stride in [
        (images, weight, (1, 1)),
        (images, torch.randn(4, 3, 3, 3, requires_grad=True), (2, 2)),
        (_images(8), wide, (2, 2)),
        (images, weight.detach(), (2, 2)),
        (images.bfloat16(), weight.bfloat16(), (2, 2)),
        (images.contiguous(), weight, (2, 2)),
    ]:
        assert onednn.safe_operands(other, kernel, stride)[0] is other
    with torch.no_grad():
        assert onednn.safe_operands(images, weight, (2, 2))[0] is images
    with torch.autocast("cpu", torch.bfloat16):
        assert onednn.safe_operands(images, weight, (2, 2))[0] is images


def test_a_single_channel_that_has_the_strides_of_channels_last_counts() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(onednn, "_affected", True)
        images = torch.randn(2, 1, 8, 8).clone(memory_format=torch.channels_last)
        made, _ = onednn.safe_operands(images, torch.randn(4, 1, 1, 1, requires_grad=True), (2, 2))
    assert made.stride() == torch.empty(2, 1, 8, 8).stride()


def test_the_strides_of_the_weight_count_too(affected: bool) -> None:
    weight = torch.randn(4, 3, 1, 1).to(memory_format=torch.channels_last).requires_grad_()
    made = onednn.safe_operands(_images().contiguous(), weight, (2, 2))[1]
    assert (made.stride() == (3, 1, 1, 1)) == affected


def test_protect_reaches_ordinary_layers(affected: bool, formats: list[bool]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1, 2))
    assert onednn.protect(model) == (["0"] if affected else [])
    onednn.protect(model)
    assert len(model[0]._forward_pre_hooks) == affected
    model(_images())
    assert formats == [affected]


class Subclass(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.conv2d(x, self.weight, None, self.stride)


@pytest.mark.parametrize(
    "layer", [Subclass(3, 6, 1, 2), nn.ConvTranspose2d(6, 3, 1, 2)], ids=["subclass", "transposed"]
)
def test_protect_reaches_what_convolves_like_them(affected: bool, formats: list[bool], layer: nn.Module) -> None:
    model = nn.Sequential(layer)
    assert onednn.protect(model) == (["0"] if affected else [])
    model(_images(layer.in_channels))
    assert formats == [affected]
    assert onednn.protect(nn.Sequential(nn.ConvTranspose2d(3, 8, 1, 2))) == []


def test_what_changes_the_format_after_protect_is_undone(affected: bool, formats: list[bool]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1, 2))
    onednn.protect(model)
    model.to(memory_format=torch.channels_last)
    values = model[0].weight.detach().clone()
    model[0](input=_images())
    assert formats == [affected]
    assert (model[0].weight.stride() == (3, 1, 1, 1)) == affected
    assert torch.equal(model[0].weight, values)


def test_one_image_without_a_batch_passes(affected: bool) -> None:
    layer = nn.Conv2d(3, 6, 1, 2)
    image = torch.randn(3, 8, 8)
    want = layer(image)
    model = nn.Sequential(layer)
    onednn.protect(model)
    assert torch.equal(model(image), want)
    fastprune.FilterPruner(model, rate=0.0, include=[layer])
    assert torch.equal(model(image), want)
    model(image.unsqueeze(0).permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[0]).sum().backward()


@pytest.mark.parametrize("may_be", [False, True])
def test_where_nothing_is_known_a_compiled_forward_is_safe(
    monkeypatch: pytest.MonkeyPatch, formats: list[bool], may_be: bool
) -> None:
    monkeypatch.setattr(onednn, "_affected", None)
    monkeypatch.setattr(onednn, "_MAY_BE_AFFECTED", may_be)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    model = nn.Sequential(nn.Conv2d(3, 6, 1, 2))
    fastprune.FilterPruner(model, rate=0.5, include=["0"])
    model(_images())
    assert formats == [may_be]
    assert onednn._affected is None


def test_masked_layers_are_safe(affected: bool, formats: list[bool]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 6, 1, 2))
    fastprune.FilterPruner(model, rate=0.5, include=["0"])
    model(_images())
    assert formats == [affected]


def test_the_layers_of_a_pruning_net_are_safe(affected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr("fastprune.metapruning.hyper.functional.conv2d", lambda x, *_, **__: seen.append(x) or x)
    layer = HyperConv2d(Conv(Width(3), Width(8), 1, 2), (Width(3),), 0, 4)
    layer.table = torch.ones(1)
    layer(_images())
    assert seen[0].is_contiguous() == affected


def test_the_report_of_compact_says_so(affected: bool) -> None:
    small = fastprune.compact(_model(), _images())
    assert small.report.unsafe == (("2",) if affected else ())
    assert ("fastprune.onednn.protect" in str(small.report)) == affected


def test_protected_layers_compute_the_same(affected: bool) -> None:
    model, plain = _model(), _model()
    onednn.protect(model)
    images = _images()
    assert torch.equal(model(images), plain(images.contiguous())) or torch.allclose(model(images), plain(images))


def test_tracing_passes_it_by() -> None:
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return onednn.safe_operands(x, self.weight, (2, 2))[0]

    assert "safe_operands" not in torch.fx.symbolic_trace(Layer()).code


@pytest.mark.parametrize(("status", "faulty"), [(0, False), (-6, True), (1, True)])
def test_the_probe_is_said(monkeypatch: pytest.MonkeyPatch, status: int, faulty: bool) -> None:
    runs = []

    def run(*arguments: object, **_: object) -> subprocess.CompletedProcess[bytes]:
        runs.append(arguments)
        return subprocess.CompletedProcess([], status)

    monkeypatch.setattr(onednn.subprocess, "run", run)
    monkeypatch.setenv("FASTPRUNE_NARROW_CONVOLUTIONS", "of another version")
    probe = onednn._probe.__wrapped__
    if faulty:
        verb = "corrupts" if status < 0 else "may corrupt"
        with pytest.warns(RuntimeWarning, match=f"{verb} memory.*1×1.*status {status}"):
            assert probe()
    else:
        assert not probe()
    assert probe() == faulty  # as a process started from here has it
    assert len(runs) == 1


TRAIN = """
import torch
from torch import nn
from fastprune import onednn
model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.Conv2d(5, 64, 1, 2)).to(memory_format=torch.channels_last)
onednn.protect(model)
for _ in range(200):
    model(torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)).sum().backward()
    junk = [torch.empty(7) for _ in range(20)]
"""


@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="needs AVX2")
def test_a_protected_network_trains_with_avx2_alone() -> None:
    environment = {**os.environ, **AVX2, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", TRAIN], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not torch.cpu._is_avx2_supported(), reason="needs AVX2")
def test_no_convolution_is_faulty_but_those_at_risk(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in AVX2.items():
        monkeypatch.setenv(name, value)
    for case in convolution_faults.sweep(few=True):
        assert (case.kernel, case.stride, case.dtype, case.format) == (1, 2, "float32", "channels_last")
        assert case.channels < 8
