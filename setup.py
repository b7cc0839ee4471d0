"""Builds fastprune and its extension modules; everything declarative is in pyproject.toml.

Environment:
    FASTPRUNE_NO_EXT=1      build nothing: pure Python, every op by its reference (needs no compiler)
    FASTPRUNE_CUDA=0|1      leave out / force ``fastprune._cuda``; unset: built when nvcc and a CUDA build of torch are there
    TORCH_CUDA_ARCH_LIST    architectures of the CUDA module, as everywhere in PyTorch
    MAX_JOBS                parallel compile jobs
"""

import os
import shutil
from glob import glob

from setuptools import setup

# Both modules use only LibTorch's stable ABI and Python's limited API: one wheel serves every later torch and Python.
TORCH_TARGET = "0x020b000000000000"  # torch 2.11
PYTHON_TARGET = "0x030A0000"  # Python 3.10
PACKAGES = ["fastprune", "fastprune.models", "fastprune.ops", "fastprune.kernels"]


def flag(name):
    """The environment switch ``name``: True, False, or None when unset."""
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, got {value!r}")
    return None if value == "" else value == "1"


def wants_cuda(torch_cuda):
    """Whether to build fastprune._cuda: by the tools that are there, never by a GPU being present."""
    from torch.utils.cpp_extension import CUDA_HOME

    nvcc = shutil.which("nvcc") or (CUDA_HOME and os.path.exists(os.path.join(CUDA_HOME, "bin", "nvcc")))
    forced = flag("FASTPRUNE_CUDA")
    if forced and not (nvcc and torch_cuda):
        raise SystemExit(
            f"FASTPRUNE_CUDA=1 needs nvcc and a CUDA build of torch; found nvcc: {nvcc or 'no'}, torch.version.cuda: {torch_cuda}"
        )
    return bool(nvcc and torch_cuda) if forced is None else forced


def extensions():
    """The extension modules to build, and the command class that builds them."""
    if flag("FASTPRUNE_NO_EXT"):
        return {}
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    macros = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", PYTHON_TARGET)]
    # GCC notes that its 64-byte vectors change the calling convention; ours never cross a function that is not inlined.
    cxx = ["-O3", "-std=c++20", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-psabi", "-fopenmp-simd", "-ffp-contract=fast"]
    headers = glob("csrc/*.h") + glob("csrc/cpu/*.h") + glob("csrc/cpu/*.inl") + glob("csrc/cuda/*.cuh")
    modules = [
        CppExtension(
            "fastprune._cpu",
            ["csrc/module.cpp", *sorted(glob("csrc/cpu/*.cpp"))],
            define_macros=[*macros, ("FASTPRUNE_MODULE", "_cpu")],
            extra_compile_args={"cxx": cxx},
            depends=[*headers, *glob("csrc/cpu/*.cpp")],
            py_limited_api=True,
        )
    ]
    if wants_cuda(torch.version.cuda):
        modules.append(
            CUDAExtension(
                "fastprune._cuda",
                ["csrc/module.cpp", *sorted(glob("csrc/cuda/*.cu"))],
                define_macros=[*macros, ("FASTPRUNE_MODULE", "_cuda"), ("USE_CUDA", None)],
                extra_compile_args={"cxx": cxx, "nvcc": ["-O3", "-lineinfo", "-std=c++20"]},
                depends=headers,
                py_limited_api=True,
            )
        )
    return {"ext_modules": modules, "cmdclass": {"build_ext": BuildExtension}}


build = extensions()
setup(
    packages=PACKAGES,
    # kernels/ is installed as fastprune.kernels: the top-level name belongs to another project.
    package_dir={"fastprune.kernels": "kernels"},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if build else {},
    **build,
)
