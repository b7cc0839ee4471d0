"""A masked model in other tools: right, or an error that says what to do; no tool drops the masks without a word."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.utils.mkldnn
from torch import Tensor, fx, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torchvision.models.feature_extraction import create_feature_extractor

from fastprune import FilterPruner, MaskedConv2d
from fastprune.nn import mask_convolutions
from fastprune.optim import PrunedSGD

IMAGES = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Network(nn.Module):
    """A block in a residual, and a head."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)
        )
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.block(x)).relu().mean((2, 3)))


def mask(model: nn.Module, by_weight: bool = False, feedback: float | None = 0.25) -> nn.Module:
    """The model in eval mode, with random masks."""
    generator = torch.Generator().manual_seed(2)
    for layer in mask_convolutions(model, by_weight=by_weight).values():
        layer.mask.copy_(torch.rand(layer.mask.shape, generator=generator) > 0.6)
        if feedback is not None:
            layer.fill_feedback(feedback)
    return model.eval()


def multiplied(model: nn.Module) -> nn.Module:
    """A copy with the masks multiplied into the weights, and no masks."""
    plain = copy.deepcopy(model)
    for module in plain.modules():
        if isinstance(module, MaskedConv2d):
            with torch.no_grad():
                module.weight *= module.mask if module.mask.dim() > 1 else module.mask.view(-1, 1, 1, 1)
            module.mask.fill_(True)
    return plain


def assert_close(result: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def dense_output(model: nn.Module) -> Tensor:
    """What the model would compute without masks."""
    dense = copy.deepcopy(model)
    for module in dense.modules():
        if isinstance(module, MaskedConv2d):
            module.mask.fill_(True)
    return dense(IMAGES)


# ------------------------------------------------------------------------------------------------- copies and exports


def through_bytes(save: Callable[[Any, io.BytesIO], object], load: Callable[[io.BytesIO], Any], what: Any) -> Any:
    stream = io.BytesIO()
    save(what, stream)
    return load(io.BytesIO(stream.getvalue()))


def exported(model: nn.Module, strict: bool = False) -> Any:
    return torch.export.export(model, (IMAGES,), strict=strict)


COPIES: dict[str, Callable[[nn.Module], Callable[[Tensor], Tensor]]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: through_bytes(torch.save, lambda stream: torch.load(stream, weights_only=False), model),
    "torch.fx": fx.symbolic_trace,
    "torch.jit.trace": lambda model: through_bytes(torch.jit.save, torch.jit.load, torch.jit.trace(model, (IMAGES,))),
    "torch.export": lambda model: exported(model).module(),
    "torch.export, strict": lambda model: exported(model, strict=True).module(),
    "torch.export.save": lambda model: through_bytes(torch.export.save, torch.export.load, exported(model)).module(),
    "decomposed": lambda model: exported(model).run_decompositions().module(),
    "torch.compile": lambda model: torch.compile(model, backend="aot_eager", fullgraph=True),
    "torchvision's extractor": lambda model: lambda x: create_feature_extractor(model, ["head"])(x)["head"],
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("by_weight", [False, True], ids=["filters", "weights"])
@pytest.mark.parametrize("way", COPIES)
def test_copies_and_exports_are_masked(way: str, by_weight: bool) -> None:
    model = mask(Network(), by_weight)
    expected = multiplied(model)(IMAGES)
    assert not torch.allclose(expected, dense_output(model), atol=1e-3)
    assert_close(COPIES[way](model)(IMAGES), expected)


@pytest.mark.parametrize("by_weight", [False, True], ids=["filters", "weights"])
def test_exported_programs_need_no_op_of_ours(by_weight: bool) -> None:
    program = exported(mask(Network(), by_weight))
    assert not any("fastprune" in str(node.target) for node in program.graph.nodes)


@pytest.mark.parametrize("feedback", [None, 0.0, 0.25])
def test_an_exported_program_trains(feedback: float | None) -> None:
    model = mask(Network(), feedback=feedback)
    other = exported(model).module()
    gradients = [torch.autograd.grad(f(IMAGES).square().sum(), list(f.parameters())) for f in (model, other)]
    for gradient, expected in zip(*reversed(gradients), strict=True):
        assert_close(gradient, expected)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("by_weight", [False, True], ids=["filters", "weights"])
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx(tmp_path: Path, dynamo: bool, by_weight: bool) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    model, file = mask(Network(), by_weight), str(tmp_path / "masked.onnx")
    torch.onnx.export(model, (IMAGES,), file, dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    (output,) = session.run(None, {session.get_inputs()[0].name: IMAGES.numpy()})
    assert_close(torch.from_numpy(output), multiplied(model)(IMAGES))


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_scripting_says_what_to_do() -> None:
    with pytest.raises(TypeError, match=r"torch.jit.script cannot take masked convolutions: script what fastprune"):
        torch.jit.script(mask(Network()))


# ------------------------------------------------------------------------------------------------- feature extractors


def test_features_of_timm() -> None:
    torch.manual_seed(0)
    model = mask(timm.create_model("resnet10t", features_only=True, out_indices=(1, 3)))
    images = torch.randn(2, 3, 64, 64)
    for features, expected in zip(model(images), multiplied(model)(images), strict=True):
        assert_close(features, expected)


def test_an_extractor_follows_new_masks_and_trains() -> None:
    model = Network().train()
    pruner = FilterPruner(model, 0.4, every=1)
    extractor = create_feature_extractor(model, ["block", "head"])
    with torch.no_grad():
        model.stem.weight.mul_(torch.linspace(3, 0.1, 8).view(-1, 1, 1, 1))
    pruner.update()
    assert_close(extractor(IMAGES)["head"], model(IMAGES))
    gradients = torch.autograd.grad(extractor(IMAGES)["head"].sum(), model.stem.weight)
    assert_close(gradients[0], torch.autograd.grad(model(IMAGES).sum(), model.stem.weight)[0])


# ------------------------------------------------------------------------------------------------------- quantisation


def relative(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("by_weight", [False, True], ids=["filters", "weights"])
@pytest.mark.parametrize("training", [False, True], ids=["after", "aware"])
def test_quantisation_by_fx(training: bool, by_weight: bool) -> None:
    quantize_fx = pytest.importorskip("torch.ao.quantization.quantize_fx", reason="removed from later PyTorch")
    quantization = torch.ao.quantization
    model = mask(Network(), by_weight).train(training)
    if training:
        mapping = quantization.get_default_qat_qconfig_mapping("x86")
        prepared = quantize_fx.prepare_qat_fx(model, mapping, (IMAGES,))
        prepared(IMAGES).square().sum().backward()
        for name in ("stem", "block.0", "block.3"):
            assert prepared.get_submodule(name).weight.grad.abs().sum() > 0
    else:
        mapping = quantization.get_default_qconfig_mapping("x86")
        prepared = quantize_fx.prepare_fx(model, mapping, (IMAGES,))
    prepared(IMAGES)
    prepared.eval()
    expected, dense = multiplied(model.eval())(IMAGES), dense_output(model)
    assert relative(dense, expected) > 0.2
    # Only numbers on the grid of 8 bits differ from the network's.
    assert relative(prepared(IMAGES), expected) < 0.1
    assert relative(quantize_fx.convert_fx(prepared)(IMAGES), expected) < 0.1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("training", [False, True], ids=["after", "aware"])
def test_quantisation_of_modules_keeps_the_masks_and_says_what_to_do(training: bool) -> None:
    quantization = pytest.importorskip("torch.ao.quantization", reason="removed from later PyTorch")
    model = quantization.QuantWrapper(mask(Network())).train(training)
    expected, dense = multiplied(model.eval())(IMAGES), dense_output(model)
    get = quantization.get_default_qat_qconfig if training else quantization.get_default_qconfig
    model.qconfig = get("x86")
    prepared = (quantization.prepare_qat if training else quantization.prepare)(model.train(training))
    assert sum(isinstance(module, MaskedConv2d) for module in prepared.modules()) == 3
    prepared.eval()(IMAGES)
    assert relative(prepared(IMAGES), expected) < 0.1 < relative(dense, expected)
    with pytest.raises(TypeError, match=r"a masked convolution got a quantized tensor: quantize what fastprune"):
        quantization.convert(prepared)(IMAGES)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_dynamic_quantisation_and_fusion() -> None:
    model = mask(Network())
    expected = multiplied(model)(IMAGES)
    quantization = pytest.importorskip("torch.ao.quantization", reason="removed from later PyTorch")
    quantized = quantization.quantize_dynamic(copy.deepcopy(model), {nn.Linear, nn.Conv2d})
    assert relative(quantized(IMAGES), expected) < 0.05
    with pytest.raises(AssertionError, match=r"did not find fuser method for: .*MaskedConv2d"):
        quantization.fuse_modules(copy.deepcopy(model), [["block.0", "block.1"]])
    fused = copy.deepcopy(model)
    fused.block[0] = torch.nn.utils.fuse_conv_bn_eval(fused.block[0], fused.block[1])  # type: ignore[index]
    fused.block[1] = nn.Identity()  # type: ignore[index]
    assert_close(fused(IMAGES), expected)


# ------------------------------------------------------------------------------- tools that read weights of modules


def to_mkldnn(model: nn.Module) -> Callable[[Tensor], Tensor]:
    converted = torch.utils.mkldnn.to_mkldnn(model)
    return lambda images: converted(images.to_mkldnn()).to_dense()


@pytest.mark.parametrize("convert", [to_mkldnn, timm.utils.model.reparameterize_model], ids=["mkldnn", "timm"])
def test_what_reads_weights_has_the_masks_after_remove(
    convert: Callable[[nn.Module], Callable[[Tensor], Tensor]],
) -> None:
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
    if convert is not to_mkldnn:
        model = timm.create_model("repvgg_a0", num_classes=3)
        model.get_submodule("head.fc").weight.data.mul_(100)
    images = torch.randn(2, 3, 64, 64)
    pruner = FilterPruner(model.eval(), 0.5, every=1)
    expected = model(images)
    assert not torch.allclose(convert(copy.deepcopy(model))(images), expected, rtol=1e-2, atol=1e-2)  # as documented
    pruner.remove()
    assert_close(convert(model)(images), expected, 1e-3)


# ------------------------------------------------------------------------------------------------- function transforms


def state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return dict(model.named_parameters()), dict(model.named_buffers())


@pytest.mark.parametrize("by_weight", [False, True], ids=["filters", "weights"])
@pytest.mark.parametrize("feedback", [None, 0.25])
def test_gradients_and_samples_by_torch_func(by_weight: bool, feedback: float | None) -> None:
    model = mask(Network(), by_weight, feedback)
    parameters, buffers = state(model)

    def loss(parameters: dict[str, Tensor], images: Tensor) -> Tensor:
        return functional_call(model, (parameters, buffers), (images,)).square().sum()

    expected = torch.autograd.grad(model(IMAGES).square().sum(), list(parameters.values()))
    for gradient, other in zip(grad(loss)(parameters, IMAGES).values(), expected, strict=True):
        assert_close(gradient, other, 1e-4)
    by_sample = vmap(grad(loss), in_dims=(None, 0))(parameters, IMAGES[:, None])
    for name, gradient in by_sample.items():
        assert_close(gradient.sum(0), dict(zip(parameters, expected))[name], 1e-4)
    assert_close(vmap(lambda image: model(image[None])[0])(IMAGES), model(IMAGES))


@pytest.mark.parametrize("by_weight", [False, True], ids=["filters", "weights"])
def test_an_ensemble_by_vmap(by_weight: bool) -> None:
    ensemble = [mask(Network(seed), by_weight) for seed in range(3)]
    with torch.no_grad():
        for i, model in enumerate(ensemble):
            for layer in (module for module in model.modules() if isinstance(module, MaskedConv2d)):
                layer.mask.copy_(layer.mask.roll(i, 0))
    parameters, buffers = stack_module_state(ensemble)  # type: ignore[arg-type]
    base = copy.deepcopy(ensemble[0]).to("meta")
    outputs = vmap(lambda p, b: functional_call(base, (p, b), (IMAGES,)))(parameters, buffers)
    assert_close(outputs, torch.stack([model(IMAGES) for model in ensemble]))


def test_forward_mode_over_parameters_is_refused() -> None:
    model = mask(Network())
    parameters, buffers = state(model)
    tangents = {name: torch.ones_like(x) for name, x in parameters.items()}
    with pytest.raises(RuntimeError, match="masked_weights has no forward-mode derivative"):
        jvp(lambda p: functional_call(model, (p, buffers), (IMAGES,)), (parameters,), (tangents,))
    jvp(model, (IMAGES,), (IMAGES,))  # over the input it is the convolution's own


# ------------------------------------------------------------------------------------------------------------ threads


@pytest.mark.parametrize("kept", [None, torch.float32, torch.bfloat16], ids=str)
def test_threads_under_different_autocast_states(kept: torch.dtype | None) -> None:
    """Each thread has a forward and gradients in its own dtype, whatever the others compute in at the same time.

    Autocast's cache, which all threads share, hands biases out in another thread's dtype, of dense models, too.
    """
    model = Network().eval()
    pruner = FilterPruner(model, 0.4, every=1)
    optimizer = PrunedSGD(model.parameters(), lr=0.05, momentum=0.9, pruner=pruner, masked_dtype=kept)
    model(IMAGES).sum().backward()
    optimizer.step()
    pruner.update()
    dtypes = (torch.float32, torch.bfloat16, torch.float16)

    def compute(dtype: torch.dtype) -> tuple[Tensor, ...]:
        amp = dtype != torch.float32
        with torch.autocast("cpu", dtype if amp else None, enabled=amp, cache_enabled=False):
            features = model.block[3](model.stem(IMAGES))  # type: ignore[index]
            assert features.dtype == dtype
            output = model(IMAGES)
        return output.detach(), *torch.autograd.grad(output.float().square().sum(), list(model.parameters()))

    expected = {dtype: compute(dtype) for dtype in dtypes}
    start, wrong = threading.Barrier(len(dtypes)), []

    def work(dtype: torch.dtype) -> None:
        start.wait()
        for _ in range(20):
            try:
                if not all(map(torch.equal, compute(dtype), expected[dtype])):
                    wrong.append(f"{dtype}: another result")
            except BaseException as error:
                wrong.append(f"{dtype}: {error!r}")

    threads = [threading.Thread(target=work, args=(dtype,)) for dtype in dtypes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_buffers_of_two_dtypes_serve_each_autocast_state() -> None:
    model = Network().eval()
    pruner = FilterPruner(model, 0.4, every=1)
    for dtype in (torch.float32, torch.bfloat16):
        with pruner.masked_weights.writing(dtype):
            pass
    pruner.masked_weights.renew()
    expected = copy.deepcopy(model)  # which has no buffers
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model(IMAGES), expected(IMAGES))
    assert torch.equal(model(IMAGES), expected(IMAGES))
