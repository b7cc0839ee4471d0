"""Builds fastprune and its extension modules; everything declarative is in pyproject.toml.

Environment:
    FASTPRUNE_NO_EXT=0|1    1: build nothing, pure Python, every op by its reference (needs no compiler); 0: build on
                            every platform; unset: build under Linux on x86-64 alone
    FASTPRUNE_CUDA=0|1      leave out / force ``fastprune._cuda``; unset: built where nvcc and torch's CUDA match
    TORCH_CUDA_ARCH_LIST    architectures of the CUDA module, as everywhere in PyTorch (unset: all from sm_80 on)
    MAX_JOBS                parallel compile jobs (unset: as many as there are cores)
"""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from glob import glob
from typing import Any

from setuptools import Extension, find_packages, setup

# Both modules use only LibTorch's stable ABI and Python's limited API: one wheel serves every later torch and Python.
TORCH_TARGET = "0x020b000000000000"  # torch 2.11
PYTHON_TARGET = "0x030A0000"  # Python 3.10
# What is made of the one PTX, which is kept for what another GPU's driver makes of it. Kernels use nothing newer than
# sm_80, the oldest with bfloat16, and a PTX for each GPU would double the time of the build.
CUDA_PTX, CUDA_CODE = "compute_80", ("sm_80", "sm_90", "sm_100", "sm_120", "compute_80")
CXX_FLAGS = [
    *("-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-fopenmp-simd", "-ffp-contract=fast"),
    # GCC notes that its 64-byte vectors change the calling convention; ours never cross a function that is not inlined.
    *("-Wall", "-Wextra", "-Wno-psabi"),
]
# The level of optimization is that of the launchers; kernels are always optimized in full.
NVCC_FLAGS = ["-O1", "-std=c++20", "-lineinfo", "-Xcompiler=-fvisibility=hidden"]
# A tenth of the bytes, in more time; left out where nothing is handed on. Known since CUDA 12.8.
SMALL = "--compress-mode=size"
# Where the modules have been built and tested, as platform.system() and platform.machine() say it.
TRIED = [("Linux", "x86_64")]
WITHOUT = "FASTPRUNE_NO_EXT=1 installs fastprune without compiled ops (each runs its PyTorch reference)"


def flag(name: str) -> bool | None:
    """The environment switch ``name``: True, False, or None when unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def version_of(nvcc: str) -> tuple[int, int]:
    """Major and minor of an nvcc; (0, 0) where it does not say."""
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", said)
    return (int(release[1]), int(release[2])) if release else (0, 0)


def find_nvcc(torch_cuda: str | None) -> tuple[str | None, str]:
    """The path of the nvcc that can build for this torch, or None and what is missing. No GPU is looked for."""
    from torch.utils.cpp_extension import CUDA_HOME

    if torch_cuda is None:
        return None, "this torch was built without CUDA"
    nvcc = os.path.join(CUDA_HOME or "", "bin", "nvcc")
    if not os.path.isfile(nvcc):
        return None, f"no nvcc on the PATH or in CUDA_HOME ({CUDA_HOME or 'unset'})"
    major = version_of(nvcc)[0]
    if str(major) != torch_cuda.split(".")[0]:
        return None, f"{nvcc} is of CUDA {major or '?'}, torch of {torch_cuda}"
    return nvcc, ""


def cuda_options(nvcc: str) -> dict[str, list[str]]:
    """Extra options of the CUDA module: its own runtime, static, so that importing it needs no CUDA library."""
    # nvcc may be a wrapper far from its toolkit: its dry run names the toolkit's folders.
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True)
    folders = re.findall(r'"-L([^"]+)"', dry_run.stderr)
    # BuildExtension adds what TORCH_CUDA_ARCH_LIST asks for, or the GPUs of this machine, where no option names any.
    codes = () if os.environ.get("TORCH_CUDA_ARCH_LIST") else CUDA_CODE
    return {
        "libraries": ["torch_cuda", "cudart_static", "rt", "pthread", "dl"],
        "library_dirs": folders,
        "nvcc_flags": [
            *([SMALL] if version_of(nvcc) >= (12, 8) else []),
            *(f"-gencode=arch={CUDA_PTX},code={code}" for code in codes),
        ],
    }


def extension(
    name: str,
    sources: Sequence[str],
    macros: Sequence[tuple[str, str | None]] = (),
    libraries: Sequence[str] = (),
    library_dirs: Sequence[str] = (),
    nvcc_flags: Sequence[str] = (),
) -> Extension:
    """The extension module ``fastprune.<name>``, for torch's BuildExtension."""
    from torch.utils.cpp_extension import include_paths, library_paths

    headers = [option for path in include_paths() for option in ("-isystem", path)]
    return Extension(
        f"fastprune.{name}",
        ["csrc/module.cpp", *sorted(sources)],
        define_macros=[
            ("TORCH_TARGET_VERSION", TORCH_TARGET),
            ("Py_LIMITED_API", PYTHON_TARGET),
            ("FASTPRUNE_MODULE", name),
            *macros,
        ],
        library_dirs=[*library_paths(), *library_dirs],
        libraries=["torch_cpu", *libraries],
        # As system headers, torch's own raise no warnings.
        extra_compile_args={"cxx": [*CXX_FLAGS, *headers], "nvcc": [*NVCC_FLAGS, *nvcc_flags, *headers]},
        # What setuptools looks at before it builds again, and what goes into a source distribution: with the sources of
        # CUDA, wherever that is made.
        depends=sorted(glob("csrc/**/*.*", recursive=True)),
        language="c++",
        py_limited_api=True,
    )


def extensions() -> list[Extension]:
    """The extension modules to build."""
    import torch

    os.environ.setdefault("MAX_JOBS", str(os.cpu_count() or 1))  # ninja would run two more, and take longer
    modules = [extension("_cpu", glob("csrc/cpu/*.cpp"))]
    forced = flag("FASTPRUNE_CUDA")
    if forced is False:
        return modules
    nvcc, missing = find_nvcc(torch.version.cuda)
    if nvcc:
        sources = [*glob("csrc/cuda/*.cu"), *glob("csrc/cuda/launchers/*.cpp")]
        modules.append(extension("_cuda", sources, [("USE_CUDA", None)], **cuda_options(nvcc)))
    elif forced:
        raise SystemExit(f"FASTPRUNE_CUDA=1 needs nvcc and a torch built with the same CUDA: {missing}")
    else:
        print(f"fastprune: building without CUDA: {missing}", file=sys.stderr)
    return modules


def build_command() -> type:
    """Torch's build_ext, with a folder of objects for each module and a failure that says what can be done."""
    from torch.utils.cpp_extension import BuildExtension

    class BuildExt(BuildExtension):
        build_temp: str
        extensions: list[Extension]
        inplace: bool

        def finalize_options(self) -> None:
            super().finalize_options()
            for ext in self.extensions if self.inplace else []:
                flags: Any = ext.extra_compile_args
                flags["nvcc"] = [flag for flag in flags["nvcc"] if flag != SMALL]

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except Exception as error:
                raise SystemExit(
                    f"fastprune: building its C++ extension failed: {error}\n"
                    f"It needs a C++20 compiler (GCC 11 or later) and the headers of this Python. {WITHOUT}."
                ) from error

        def build_extension(self, ext: Extension) -> None:
            # csrc/module.cpp is compiled once for each module, to objects of the same name.
            shared = self.build_temp
            self.build_temp = os.path.join(shared, ext.name)
            super().build_extension(ext)
            self.build_temp = shared

    return BuildExt


def compiled() -> dict[str, Any]:
    """What makes the build a compiled one: nothing at all with FASTPRUNE_NO_EXT=1, which does not even import torch."""
    without = flag("FASTPRUNE_NO_EXT")
    here = (platform.system(), platform.machine())
    if without is None and here not in TRIED:
        print(
            f"fastprune: building no C++ extension under {' on '.join(here)}, where none has been tried: each op runs "
            "its PyTorch reference. FASTPRUNE_NO_EXT=0 builds it nevertheless.",
            file=sys.stderr,
        )
        return {}
    if without:
        return {}
    try:
        import torch  # noqa: F401
    except ModuleNotFoundError as error:
        raise SystemExit(
            f"fastprune: building needs torch (install it first, or leave out --no-build-isolation). {WITHOUT}."
        ) from error
    return {
        "ext_modules": extensions(),
        "cmdclass": {"build_ext": build_command()},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(
    packages=[*find_packages(include=["fastprune", "fastprune.*"]), "fastprune.kernels"],
    # kernels/ is installed as fastprune.kernels: the top-level name belongs to another project.
    package_dir={"fastprune.kernels": "kernels"},
    **compiled(),
)
