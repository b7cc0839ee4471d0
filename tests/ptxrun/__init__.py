"""ptxrun: executes PTX on the CPU (see README.md)."""

from .errors import (
    PtxError,
    PtxParseError,
    PtxUnsupported,
    LaunchError,
    DeadlockError,
    StepLimit,
    TrapError,
    CheckError,
    Finding,
)
from .memory import Memory, DevPtr
from .module import load, Module, Out, Result, DEFAULT_CHECKS
from .meter import Stats
from .frontends import (
    NVCC,
    compile_cuda,
    compile_cuda_text,
    compile_triton,
    find_nvcc,
    run_triton,
    pack_struct,
    TritonKernel,
)
from .ops_sm90 import pack_tensormap
