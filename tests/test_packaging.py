"""What is built and installed: setup.py's decisions, the modules' symbols, the wheels."""

import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import cuda_kernels
import pytest
import setuptools
import torch
from torch.utils import cpp_extension

import fastprune

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "Makefile", "csrc", "fastprune", "kernels")
COMMANDS = ("export", "info", "report", "search", "train")


def run_setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What setup.py hands to setuptools, as it is called in the current environment."""
    given: dict[str, Any] = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", given.update)
    runpy.run_path("setup.py")
    return given


def names(given: dict[str, Any]) -> list[str]:
    return [module.name for module in given["ext_modules"]]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a CUDA 13 toolkit; with a torch of CUDA 13, no GPU that anyone may ask for, and no switch set."""
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        '--version) echo "Cuda compilation tools, release 13.0, V13.0.88";;\n'
        '--dryrun) echo \'#$ LIBRARIES=  "-L/toolkit/lib/stubs" "-L/toolkit/lib"\' >&2;;\n'
        "esac\n"
    )
    nvcc.chmod(0o755)
    for name in ("FASTPRUNE_NO_EXT", "FASTPRUNE_CUDA", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", str(tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for question in ("is_available", "device_count", "get_device_capability"):
        monkeypatch.setattr(torch.cuda, question, lambda *_: pytest.fail("setup.py asked for a GPU"))
    return tmp_path


def test_the_oldest_that_is_tested_is_the_oldest_promised() -> None:
    pins = dict(re.findall(r"^(\S+)==(\S+)$", (ROOT / ".ci/constraints-oldest.txt").read_text(), re.MULTILINE))
    promised = dict(re.findall(r'"(torch|torchvision|triton)>=([\d.]+)', (ROOT / "pyproject.toml").read_text()))
    assert set(promised) == {"torch", "torchvision", "triton"}
    assert {name: pins[name] for name in promised} == {name: f"{version}.0" for name, version in promised.items()}
    major, minor = map(int, promised["torch"].split("."))
    assert f'TORCH_TARGET = "0x{major:02x}{minor:02x}' in (ROOT / "setup.py").read_text()


@pytest.mark.usefixtures("tools")
def test_cuda_is_built_where_the_tools_are_whether_or_not_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given = run_setup(monkeypatch)
    assert names(given) == ["fastprune._cpu", "fastprune._cuda"]
    cuda = given["ext_modules"][1]
    assert ("USE_CUDA", None) in cuda.define_macros
    assert {"/toolkit/lib", "/toolkit/lib/stubs"} <= set(cuda.library_dirs)
    # Code for each of these GPUs, and PTX for all others.
    targets = [flag.rpartition("=")[2] for flag in cuda.extra_compile_args["nvcc"] if "-gencode" in flag]
    assert targets == ["sm_80", "sm_90", "sm_100", "sm_120", "compute_80"]
    made_of = re.findall(r"arch=compute_(\d+)", " ".join(cuda.extra_compile_args["nvcc"]))
    assert {f"sm_{ptx}" for ptx in made_of} == {cuda_kernels.BUILT_FROM}  # what the budgets are checked of
    assert cpp_extension._get_cuda_arch_flags(cuda.extra_compile_args["nvcc"]) == []  # torch adds none


@pytest.mark.usefixtures("tools")
def test_the_architectures_asked_for_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "10.0")
    flags = run_setup(monkeypatch)["ext_modules"][1].extra_compile_args["nvcc"]
    assert cpp_extension._get_cuda_arch_flags(flags) == ["-gencode=arch=compute_100,code=sm_100"]


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("inplace", [False, True])
def test_the_module_is_small_where_it_is_handed_on(inplace: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    given = run_setup(monkeypatch)
    command = given["cmdclass"]["build_ext"](setuptools.Distribution(given))
    command.inplace = inplace
    command.finalize_options()
    assert ("--compress-mode=size" in command.extensions[1].extra_compile_args["nvcc"]) is not inplace


@pytest.mark.usefixtures("tools")
def test_as_many_jobs_as_cores_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    run_setup(monkeypatch)
    assert os.environ["MAX_JOBS"] == str(os.cpu_count())
    monkeypatch.setenv("MAX_JOBS", "7")
    run_setup(monkeypatch)
    assert os.environ["MAX_JOBS"] == "7"


@pytest.mark.usefixtures("tools")
def test_cuda_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPRUNE_CUDA", "0")
    assert names(run_setup(monkeypatch)) == ["fastprune._cpu"]


@pytest.mark.parametrize("lack", ["nvcc", "torch", "match"])
def test_cuda_is_not_built_where_a_tool_is_missing_and_forcing_it_says_which(
    lack: str, tools: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if lack == "nvcc":
        (tools / "bin" / "nvcc").unlink()
        message = "no nvcc on the PATH or in CUDA_HOME"
    elif lack == "torch":
        monkeypatch.setattr(torch.version, "cuda", None)
        message = "this torch was built without CUDA"
    else:
        monkeypatch.setattr(torch.version, "cuda", "12.8")
        message = r"nvcc is of CUDA 13, torch of 12\.8"
    assert names(run_setup(monkeypatch)) == ["fastprune._cpu"]
    assert re.search(message, capsys.readouterr().err)
    monkeypatch.setenv("FASTPRUNE_CUDA", "1")
    with pytest.raises(SystemExit, match=f"FASTPRUNE_CUDA=1 needs nvcc.*{message}"):
        run_setup(monkeypatch)


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("name", ["FASTPRUNE_CUDA", "FASTPRUNE_NO_EXT"])
def test_other_values_of_a_switch_are_errors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "yes")
    with pytest.raises(SystemExit, match=f"{name} must be 0 or 1, got 'yes'"):
        run_setup(monkeypatch)


@pytest.mark.usefixtures("tools")
def test_modules_are_built_for_every_later_torch_and_python_and_for_any_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    given = run_setup(monkeypatch)
    assert given["options"] == {"bdist_wheel": {"py_limited_api": "cp310"}}
    for module in given["ext_modules"]:
        macros = dict(module.define_macros)
        assert module.py_limited_api
        assert macros["Py_LIMITED_API"] == "0x030A0000"
        assert macros["TORCH_TARGET_VERSION"] == "0x020b000000000000"
        assert "torch_python" not in module.libraries
        assert "cudart" not in module.libraries
        assert not [flag for flag in module.extra_compile_args["cxx"] if flag.startswith(("-march", "-mavx", "-mtune"))]


@pytest.mark.usefixtures("tools")
def test_without_extensions_nothing_is_built_and_torch_is_not_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPRUNE_NO_EXT", "1")
    monkeypatch.setitem(sys.modules, "torch", None)
    assert run_setup(monkeypatch).keys() == {"packages", "package_dir"}


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("here", [("Linux", "aarch64"), ("Darwin", "arm64"), ("Windows", "AMD64")])
def test_an_untried_platform_gets_the_references_unless_told_otherwise(
    here: tuple[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "system", lambda: here[0])
    monkeypatch.setattr(platform, "machine", lambda: here[1])
    assert run_setup(monkeypatch).keys() == {"packages", "package_dir"}
    assert f"no C++ extension under {here[0]} on {here[1]}" in capsys.readouterr().err
    monkeypatch.setenv("FASTPRUNE_NO_EXT", "0")
    assert "fastprune._cpu" in names(run_setup(monkeypatch))


@pytest.mark.usefixtures("tools")
def test_a_build_without_torch_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(SystemExit, match=r"building needs torch.*FASTPRUNE_NO_EXT=1"):
        run_setup(monkeypatch)


@pytest.mark.usefixtures("tools")
def test_a_failed_build_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("g++: not found")

    monkeypatch.setattr(cpp_extension.BuildExtension, "build_extensions", fail)
    command = run_setup(monkeypatch)["cmdclass"]["build_ext"](setuptools.Distribution())
    with pytest.raises(SystemExit, match=r"(?s)g\+\+: not found.*FASTPRUNE_NO_EXT=1"):
        command.build_extensions()


@pytest.mark.usefixtures("tools")
def test_every_package_is_installed_and_kernels_only_inside_fastprune(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTPRUNE_NO_EXT", "1")
    given = run_setup(monkeypatch)
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "fastprune").rglob("__init__.py")}
    assert set(given["packages"]) == {".".join(folder.parts) for folder in folders} | {"fastprune.kernels"}
    assert given["package_dir"] == {"fastprune.kernels": "kernels"}


def built_modules() -> list[Path]:
    specs = (find_spec(f"fastprune.{name}") for name in ("_cpu", "_cuda"))
    return [Path(spec.origin) for spec in specs if spec is not None and spec.origin is not None]


def test_built_modules_use_only_the_stable_abi() -> None:
    for module in built_modules():
        assert module.name.endswith(".abi3.so")
        listing = subprocess.run(
            ["nm", "-D", "--undefined-only", module], capture_output=True, text=True, check=True
        ).stdout
        symbols = [line.split()[-1] for line in listing.splitlines()]
        # A C++ symbol that names one of torch's namespaces: N, qualifiers, then the namespace with its length.
        assert not [name for name in symbols if re.match(r"_Z.*N[rVKRO]*(2at|3c10|5torch|6caffe2)\d", name)]


def test_built_modules_load_without_cuda_and_without_a_certain_python() -> None:
    for module in built_modules():
        dynamic = subprocess.run(["readelf", "-d", module], capture_output=True, text=True, check=True).stdout
        needed = re.findall(r"NEEDED.*\[(.+)\]", dynamic)
        assert not [
            name for name in needed if name.startswith(("libcuda.", "libcudart.", "libpython", "libtorch_python"))
        ]


def test_the_version_has_one_source() -> None:
    assert metadata.version("fastprune") == fastprune.__version__


def test_the_commands_exist() -> None:
    scripts = [
        script for script in metadata.distribution("fastprune").entry_points if script.group == "console_scripts"
    ]
    assert sorted(script.name for script in scripts) == [f"fastprune-{name}" for name in COMMANDS]
    assert all(callable(script.load()) for script in scripts)


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """A copy of the tree without anything built."""
    folder = tmp_path / "clone"
    folder.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        elif (ROOT / name).exists():
            shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.mark.slow
def test_the_wheel_without_extensions_is_pure_and_runs(clone: Path, tmp_path: Path) -> None:
    # A torch that cannot be imported, for the build alone.
    (tmp_path / "no").mkdir()
    (tmp_path / "no" / "torch.py").write_text("raise RuntimeError('the build imported torch')")
    built = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "--no-index", "-w", "dist"],
        cwd=clone,
        env=os.environ | {"FASTPRUNE_NO_EXT": "1", "PYTHONPATH": str(tmp_path / "no")},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    (wheel,) = (clone / "dist").iterdir()
    assert wheel.name == f"fastprune-{fastprune.__version__}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
        files = archive.namelist()
    assert "fastprune/kernels/__init__.py" in files
    assert {name.split("/")[0].split("-")[0] for name in files} == {"fastprune"}
    assert not [name for name in files if name.endswith(".so")]
    # An editable install in this environment would answer for the module that the wheel lacks.
    program = (
        "import sys; sys.meta_path = [f for f in sys.meta_path if getattr(f, '__name__', '') != '_EditableFinder']; "
        "import fastprune; print(fastprune.__file__, sorted({row.implementation for row in fastprune.backends()}))"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path / "site", capture_output=True, text=True, check=True
    )
    assert ran.stdout == f"{tmp_path}/site/fastprune/__init__.py ['reference', 'triton']\n"


@pytest.mark.slow
def test_a_source_distribution_has_all_that_the_build_reads(clone: Path) -> None:
    subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "--formats=zip"],
        cwd=clone,
        env=os.environ | {"FASTPRUNE_CUDA": "0"},
        capture_output=True,
        check=True,
    )
    (archive,) = (clone / "dist").iterdir()
    packed = {name.split("/", 1)[1] for name in zipfile.ZipFile(archive).namelist()}
    sources = {str(path.relative_to(clone)) for path in clone.glob("csrc/**/*") if path.is_file()}
    assert sources <= packed
    assert "kernels/__init__.py" in packed


@pytest.mark.slow
def test_a_build_without_a_compiler_says_what_to_do(clone: Path) -> None:
    built = subprocess.run(
        [sys.executable, "setup.py", "build_ext"],
        cwd=clone,
        env=os.environ | {"FASTPRUNE_CUDA": "0", "CXX": "no-such-compiler"},
        capture_output=True,
        text=True,
    )
    assert built.returncode != 0
    assert "FASTPRUNE_NO_EXT=1" in built.stderr
