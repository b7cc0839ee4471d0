"""The steps, in the order of what they teach per second, and what each of them runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from gpu.runner import Step

MINUTES = 8  # what the limits below are for; with more or fewer minutes in all, they grow or shrink alike
PYTEST = ("-m", "pytest", "-q", "--tb=short")
SANITIZER = ("--error-exitcode", "3", "--print-limit", "20")


@dataclass(frozen=True)
class Place:
    """Where the steps run.

    Attributes:
        tree: with tests/ and bench/; the folder that every step runs in.
        out: for the results.
        scratch: for what is not kept.
        pack: what `make gpu-pack` made; None where fastprune is installed already.
        fake: the fake device of the tests is to take its place, to try these steps out where there is no GPU.
        workers: processes of parallel tests.
    """

    tree: Path
    out: Path
    scratch: Path
    pack: Path | None
    fake: bool
    workers: int

    @property
    def site(self) -> Path:
        """Where the pack's wheels are installed."""
        return self.scratch / "site"

    def environment(self) -> dict[str, str]:
        """Of every step."""
        path = [self.tree / "bench", self.tree / "tests"]
        environment = {
            "PYTHONUNBUFFERED": "1",
            "FASTPRUNE_NEEDS_GPU": "0" if self.fake else "1",
            "TRITON_CACHE_DIR": str(self.scratch / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(self.scratch / "inductor"),
        }
        if self.pack:
            path.insert(0, self.site)
            environment |= {"FASTPRUNE_OFFLINE": "1", "FASTPRUNE_DATA": str(self.scratch / "data")}
        return environment | {"PYTHONPATH": ":".join(map(str, path))}


def planned(place: Place, minutes: float) -> list[Step]:
    """All of them, with limits for a run of so many minutes."""
    return [*_install(place), *_steps(place, minutes * 60 / MINUTES)]


def _install(place: Place) -> list[Step]:
    if place.pack is None:
        return []
    wheels = sorted(map(str, (place.pack / "wheels").glob("*.whl")))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-index", "--no-deps"]
    about = "fastprune's wheel and what it needs, into a folder of their own"
    return [Step("install", about, [*pip, "--target", str(place.site), *wheels], 60, essential=True)]


def _steps(place: Place, minute: float) -> list[Step]:
    python, out = sys.executable, place.out
    parallel, one_thread = ["-n", str(place.workers)], {"OMP_NUM_THREADS": "1"}
    expected = ["--site", str(place.site)] if place.pack else []
    fake = ["--fake"] if place.fake else []
    # The table's cases are CPU tensors that are sent to the GPU and back; the fake GPU is the CPU.
    cuda, triton = ("cpu-generic", "triton-interpreted and norms") if place.fake else ("cuda-gpu", "triton-gpu")
    interpreted = {"TRITON_INTERPRET": "1"} if place.fake else {}

    def tests(name: str, about: str, minutes: float, arguments: Sequence[str], environment: dict[str, str]) -> Step:
        junit = out / f"{name}.xml"
        return Step(
            name, about, [python, *PYTEST, f"--junitxml={junit}", *arguments], minutes * minute, environment, junit
        )

    def bench(name: str, about: str, minutes: float, chosen: str, open_ended: bool = False) -> Step:
        # Few files come back from some machines: results of pytest that the JSON file repeats are not kept.
        junit, results = place.scratch / f"{name}.xml", out / f"{name}.json"
        command = [python, *PYTEST, "bench/", "--benchmark-only", "--benchmark-quiet", "--timeout=1800", "-k", chosen]
        command += ["--device=cuda", f"--junitxml={junit}", f"--benchmark-json={results}"]
        command += ["-p", "fake_cuda"] if place.fake else []
        return Step(name, about, command, minutes * minute, {}, junit, [results], open_ended)

    def sanitizer(tool: str, about: str, minutes: float, *options: str) -> Step:
        sanitized = [] if place.fake else ["compute-sanitizer", "--tool", tool, *options, *SANITIZER]
        command = [*sanitized, python, "-m", "gpu.every_op", *fake]
        # Each tensor in an allocation of its own: what is written beside it is out of bounds.
        return Step(tool, about, command, minutes * minute, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})

    table = [str(path.relative_to(place.tree)) for path in sorted((place.tree / "tests").glob("test_op_*.py"))]
    table = [*table, "tests/test_ops.py", "-m", "not gpu_kernels"]
    training = ["--json", str(out / "training.json")]
    images = ["--images", str(place.pack / "cifar10.jpegs")] if place.pack else []
    return [
        Step("info", "the machine, and that it is this fastprune's CUDA module", [
            python, "-m", "gpu.machine", *expected, *fake], 1.25 * minute),  # the first import of torch may take long
        tests("gpu", "each op: values, streams, graphs", 2, ["tests/test_gpu.py"], {}),
        tests("ops-cuda", "the table of cases, by CUDA's kernels", 2, [*table, *parallel, "-k", cuda], one_thread),
        Step("training", "images/s of ResNet-56: eager, and with forward and backward in a graph", [
            python, "-m", "gpu.training", *training, *images, *fake], 1.5 * minute,
            writes=[out / "training.json"]),
        bench("bench", "every op beside its rivals", 2, "not compile"),
        sanitizer("memcheck", "every op, out of bounds or misaligned", 1.25, "--report-api-errors", "no"),
        sanitizer("racecheck", "every op, races in shared memory", 1.25),
        tests("ops-triton", "the table, by Triton's kernels", 1.5, [*table, *parallel, "-k", triton], {
            **one_thread, **interpreted}),
        bench("bench-compile", "the rivals of torch.compile, until time is up", 60, "compile", open_ended=True),
    ]  # fmt: skip
