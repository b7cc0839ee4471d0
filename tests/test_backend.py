"""Which implementation serves: what is there, how it is chosen, and that the choice takes effect."""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import cases
import pytest
import torch
from torch import Tensor

import fastprune
from fastprune import kernels, ops

WEIGHTS = [torch.randn(6, 3, 3, 3), torch.randn(5, 4)]
WITHOUT_EXTENSION = os.environ.get("FASTPRUNE_NO_EXT") == "1"


def names_of_ops_run() -> set[str]:
    """Names of the aten ops beneath filter_mask: the reference sorts, compiled code calls nothing."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        ops.filter_mask(WEIGHTS, 0.5)
    return {event.name for event in profile.events()}


def served_by() -> set[str]:
    return {entry.implementation for entry in ops.backends() if entry.device == "cpu"}


def test_the_extension_is_there() -> None:
    """A build that silently lost its extension must not pass by testing the reference alone."""
    if WITHOUT_EXTENSION:
        assert ops.cpu_isas() == ()
        assert served_by() == {"reference"}
    else:
        assert ops.cpu_isas()[0] == "generic"
        assert ops.cpu_isa() in ops.cpu_isas()
        assert cases.COMPILED


def test_backends_lists_every_op_on_every_device() -> None:
    table = ops.backends()
    assert {entry.device for entry in table} == {"cpu", "cuda"}
    assert {entry.op for entry in table} == {
        "decorrelation",
        "decorrelation_backward",
        "filter_mask",
        "filter_norms",
        "hyper_weight",
        "hyper_weight_backward",
        "kth_threshold",
        "masked_weights",
        "masked_weights_backward",
        "sgd_step_",
        "update_filter_masks_",
        "weight_mask",
    }
    assert len(table) == 2 * len({entry.op for entry in table})
    assert all(entry.why for entry in table)
    assert fastprune.backends() == table


def test_reference_really_serves_when_forced() -> None:
    with cases.active(cases.REFERENCE):
        assert ops.get_backend() == "reference"
        assert served_by() == {"reference"}
        assert {entry.why for entry in ops.backends()} == {"forced"}
        assert "aten::sort" in names_of_ops_run()


@pytest.mark.parametrize("backend", ["auto", "cpp"])
def test_compiled_ops_serve_before_and_after(backend: str) -> None:
    with cases.active(cases.REFERENCE):
        if WITHOUT_EXTENSION:
            with pytest.raises(RuntimeError, match=r"backend 'cpp' is not there: fastprune\._cpu was not built"):
                fastprune.set_backend("cpp")
            return
        fastprune.set_backend(backend)
        assert ops.get_backend() == backend
        assert served_by() == {"cpu"}
        assert "aten::sort" not in names_of_ops_run()
        fastprune.set_backend("reference")
        fastprune.set_backend("reference")  # twice is as good as once
        assert "aten::sort" in names_of_ops_run()
        fastprune.set_backend(backend)
        assert "aten::sort" not in names_of_ops_run()


def test_instruction_set_is_chosen_and_named() -> None:
    for implementation in cases.COMPILED:
        with cases.active(implementation):
            assert ops.cpu_isa() == implementation.isa
            why = {entry.why for entry in ops.backends() if entry.implementation == "cpu"}
            assert why == {f"compiled; {implementation.isa}"}


def test_unknown_names_change_nothing() -> None:
    backend, isa, table = ops.get_backend(), ops.cpu_isa(), ops.backends()
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpp, triton; got 'cuda'"):
        ops.set_backend("cuda")
    with pytest.raises(ValueError, match=r"instruction set must be one of .*; got 'sse9'"):
        ops.set_cpu_isa("sse9")
    assert (ops.get_backend(), ops.cpu_isa(), ops.backends()) == (backend, isa, table)


def test_triton_serves_cuda_when_forced() -> None:
    backend = ops.get_backend()
    try:
        ops.set_backend("triton")
        served = {(entry.device, entry.op): entry.implementation for entry in ops.backends()}
        assert {op for device, op in served if device == "cuda"} == set(kernels.MODULES)
        assert {name for (device, _), name in served.items() if device == "cuda"} == {"triton"}
        assert "triton" not in {name for (device, _), name in served.items() if device == "cpu"}  # not interpreted
    finally:
        ops.set_backend(backend)


@pytest.mark.parametrize("missing", ["triton", "CUDA"])
def test_triton_that_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    if missing == "triton":
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    else:
        monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(RuntimeError, match=r"backend 'triton' is not there: .*(not installed|no CUDA)"):
        ops.set_backend("triton")


def test_gradients_follow_the_backend() -> None:
    def gradient() -> Tensor:
        leaves = [weight.clone().requires_grad_() for weight in WEIGHTS]
        ops.decorrelation(leaves).backward()
        assert leaves[0].grad is not None
        return leaves[0].grad

    with (
        cases.active(cases.REFERENCE),
        torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile,
    ):
        forced = gradient()
    assert "aten::matmul" in {event.name for event in profile.events()}
    torch.testing.assert_close(gradient(), forced, rtol=1e-5, atol=1e-6)


REPORT = """
import fastprune
ops = fastprune.ops
print(ops.get_backend(), ops.cpu_isa(), *{e.implementation for e in ops.backends() if e.device == "cpu"})
"""
AT_IMPORT = {
    "reference": {"FASTPRUNE_BACKEND": "reference"},
    "isa": {"FASTPRUNE_CPU_ISA": "generic"},
    "defaults": {},
    "wrong backend": {"FASTPRUNE_BACKEND": "fastest"},
    "wrong isa": {"FASTPRUNE_CPU_ISA": "avx9000"},
}


@pytest.fixture(scope="module")
def imports() -> dict[str, subprocess.CompletedProcess[str]]:
    """An import of the package under each of the environments, side by side: each takes seconds."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("FASTPRUNE_")}

    def report(extra: dict[str, str]) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", REPORT]
        return subprocess.run(command, env=plain | extra, capture_output=True, text=True, check=False, timeout=120)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(AT_IMPORT, pool.map(report, AT_IMPORT.values())))


def test_environment_forces_the_reference(imports: dict[str, subprocess.CompletedProcess[str]]) -> None:
    backend, _, served = imports["reference"].stdout.split()
    assert (backend, served) == ("reference", "reference")


def test_wrong_environment_is_an_error(imports: dict[str, subprocess.CompletedProcess[str]]) -> None:
    assert imports["wrong backend"].returncode != 0
    assert "ValueError: backend must be one of auto, reference, cpp, triton; got 'fastest'" in (
        imports["wrong backend"].stderr
    )


def test_environment_of_the_compiled_ops(imports: dict[str, subprocess.CompletedProcess[str]]) -> None:
    if WITHOUT_EXTENSION:
        assert imports["defaults"].stdout.split() == ["auto", "none", "reference"]
        return
    assert imports["isa"].stdout.split() == ["auto", "generic", "cpu"]
    assert imports["defaults"].stdout.split() == ["auto", ops.cpu_isas()[-1], "cpu"]
    assert imports["wrong isa"].returncode != 0
    assert "ImportError: FASTPRUNE_CPU_ISA=avx9000: this build or this CPU does not have it" in (
        imports["wrong isa"].stderr
    )
