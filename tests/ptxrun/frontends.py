"""Compilers: nvcc and Triton -> PTX; launch helpers."""

from __future__ import annotations
import os
import shutil
import struct
import subprocess
import tempfile
from dataclasses import dataclass
from importlib import metadata
import numpy as np
from .errors import LaunchError, PtxError
from .module import load, Out


def find_nvcc() -> str:
    """The path of nvcc: what PTXRUN_NVCC names, else on the PATH, else of the package nvidia-cuda-nvcc; or empty."""
    if named := os.environ.get("PTXRUN_NVCC"):
        return shutil.which(named) or ""
    if found := shutil.which("nvcc"):
        return found
    try:
        files = metadata.files("nvidia-cuda-nvcc") or []
    except metadata.PackageNotFoundError:
        return ""
    return next((str(file.locate()) for file in files if file.parts[-2:] == ("bin", "nvcc")), "")


NVCC = find_nvcc()


def compile_cuda(source_path, arch="sm_80", include_dirs=(), extra=()):
    """nvcc -ptx; returns the PTX text."""
    if not NVCC:
        raise PtxError("there is no nvcc: see find_nvcc")
    with tempfile.TemporaryDirectory() as d:
        out = os.path.join(d, "k.ptx")
        cmd = [NVCC, "-ptx", f"-arch={arch}", "-std=c++17", "-lineinfo", "-o", out, str(source_path)]
        cmd += [f"-I{i}" for i in include_dirs] + list(extra)
        r = subprocess.run(cmd, capture_output=True, text=True)
        if r.returncode:
            raise PtxError(f"nvcc failed:\n{' '.join(cmd)}\n{r.stderr}")
        with open(out) as fh:
            return fh.read()


def compile_cuda_text(text, arch="sm_80", include_dirs=(), extra=()):
    with tempfile.NamedTemporaryFile("w", suffix=".cu", delete=False) as fh:
        fh.write(text)
    try:
        return compile_cuda(fh.name, arch, include_dirs, extra)
    finally:
        os.unlink(fh.name)


def pack_struct(fmt, *values):
    """struct.pack with native alignment rules of C (fmt as for the struct module, without a prefix);
    arrays of device pointers: repeat 'Q'. The size is padded to the largest alignment."""
    b = struct.pack("@" + fmt, *[int(v) if not isinstance(v, float) else v for v in values])
    al = max((struct.calcsize("@" + c) for c in fmt if c.isalpha() and c != "x"), default=1)
    return b + bytes(-len(b) % al)


# ---- Triton ---------------------------------------------------------------------------------------
@dataclass
class TritonKernel:
    ptx: str
    name: str
    num_warps: int
    shared: int
    global_scratch: int
    global_scratch_align: int
    arg_names: list  # runtime arguments, in order
    module: object = None

    def __iter__(self):  # (ptx, name, num_warps, shared_bytes)
        return iter((self.ptx, self.name, self.num_warps, self.shared))


_DT = {
    "float32": "fp32",
    "float16": "fp16",
    "bfloat16": "bf16",
    "float64": "fp64",
    "int32": "i32",
    "int64": "i64",
    "int16": "i16",
    "int8": "i8",
    "uint8": "u8",
    "uint16": "u16",
    "uint32": "u32",
    "uint64": "u64",
    "bool": "i1",
    "float8_e4m3fn": "fp8e4nv",
    "float8_e5m2": "fp8e5",
}


def signature_of(a):
    """Triton type of a runtime argument."""
    if isinstance(a, Out):
        a = a.array
    if isinstance(a, np.ndarray) or hasattr(a, "detach"):
        return "*" + _DT[str(a.dtype).replace("torch.", "")]
    if isinstance(a, (bool, np.bool_)):
        return "i1"
    if isinstance(a, (int, np.integer)):
        return "i32" if -(2**31) <= a < 2**31 else "i64" if a < 2**63 else "u64"
    if isinstance(a, (float, np.floating)):
        return "fp32"
    if a is None:
        return "constexpr"
    raise LaunchError(f"no Triton type for {type(a).__name__}")


def compile_triton(fn, signature, constexprs=None, arch=80, num_warps=4, num_stages=3, divisible=None, **options):
    """Compile a @triton.jit function without a GPU.

    signature: {name: type} for all parameters ('*fp32', 'i32', 'constexpr', ...), or a list in the
    order of the parameters. constexprs: {name or (index,): value}. divisible: names (or indices) of
    parameters known to be multiples of 16 (default: none; 'all' = every pointer and integer).
    Returns a TritonKernel, which unpacks as (ptx, name, num_warps, shared_bytes)."""
    import triton
    from triton.compiler import ASTSource
    from triton.backends.compiler import GPUTarget

    names = list(fn.arg_names)
    if not isinstance(signature, dict):
        signature = dict(zip(names, signature))
    cx = {}
    for k, v in (constexprs or {}).items():
        cx[(names.index(k),) if isinstance(k, str) else tuple(k) if isinstance(k, tuple) else (k,)] = v
    sig = {n: ("constexpr" if (i,) in cx else signature[n]) for i, n in enumerate(names)}
    if divisible == "all":
        divisible = [n for n in names if sig[n].startswith("*") or sig[n] in ("i32", "i64")]
    attrs = {}
    for x in divisible or ():
        i = names.index(x) if isinstance(x, str) else x
        attrs[(i,)] = [["tt.divisibility", 16]]
    src = ASTSource(fn=fn, signature=sig, constexprs=cx, attrs=attrs)
    if isinstance(arch, str):
        arch = int(arch.replace("sm_", "").rstrip("a"))
    r = triton.compile(
        src, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=num_warps, num_stages=num_stages, **options)
    )
    md = r.metadata
    return TritonKernel(
        r.asm["ptx"],
        md.name,
        md.num_warps,
        md.shared,
        md.global_scratch_size,
        md.global_scratch_align,
        [n for n in names if sig[n] != "constexpr"],
    )


_cache = {}


def run_triton(
    fn,
    grid,
    args,
    constexprs=None,
    arch=80,
    num_warps=4,
    num_stages=3,
    specialize=True,
    options=None,
    kernel=None,
    **launch,
):
    """Compile (cached) and run a Triton kernel.

    args: runtime arguments in order (or {name: value}); constexprs: {name: value}. With specialize,
    integer arguments divisible by 16 and pointers get the divisibility hint and 1 becomes a
    constant, as Triton's own launcher does. Returns the Result; result.kernel is the TritonKernel."""
    names = list(fn.arg_names)
    cx = dict(constexprs or {})
    if not isinstance(args, dict):
        args = dict(zip([n for n in names if n not in cx], args))
    sig, div, keep = {}, [], {}
    for n in names:
        if n in cx:
            continue
        a = args[n]
        if a is None or (specialize and isinstance(a, (int, np.integer)) and not isinstance(a, bool) and a == 1):
            cx[n] = None if a is None else 1
            continue
        keep[n] = a
        sig[n] = signature_of(a)
        if specialize and (sig[n].startswith("*") or (sig[n] in ("i32", "i64") and a % 16 == 0)):
            base = a.array if isinstance(a, Out) else a
            if (
                not sig[n].startswith("*")
                or not hasattr(base, "detach")
                or base.storage_offset() * base.element_size() % 16 == 0
            ):
                div.append(n)
    if kernel is None:
        key = (
            id(fn),
            repr(sorted(sig.items())),
            repr(sorted(cx.items(), key=str)),
            arch,
            num_warps,
            num_stages,
            tuple(div),
            repr(options),
        )
        kernel = _cache.get(key)
        if kernel is None:
            full = {n: sig.get(n, "constexpr") for n in names}
            kernel = compile_triton(fn, full, cx, arch, num_warps, num_stages, div, **(options or {}))
            kernel.fn = fn
            _cache[key] = kernel
    if kernel.module is None:
        kernel.module = load(kernel.ptx)
    m = kernel.module
    if callable(grid):
        grid = grid(dict(cx, **keep))
    g = (grid,) if isinstance(grid, int) else tuple(grid)
    nblk = int(np.prod(g))
    scratch = m.mem.alloc(int(kernel.global_scratch) * nblk) if kernel.global_scratch else None
    try:
        r = m.launch(
            kernel.name,
            g,
            (32 * kernel.num_warps, 1, 1),
            list(keep.values()) + [scratch, None],
            kernel.shared,
            **launch,
        )
    finally:
        if scratch is not None:
            m.mem.free(scratch)
    r.kernel = kernel
    return r
