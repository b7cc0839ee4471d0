"""``python -m fastprune.info``: versions, which implementation of each op is active and why, CPU, threads and CUDA.

With ``--layers``, what networks may be made of, and what becomes of it when they are made smaller.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from importlib import metadata
from importlib.util import find_spec
from typing import Any

import torch

from . import __version__, ops
from .supported import FOLLOWED_THROUGH, SMALLER, WHOLE, supported

_PACKAGES = ("torch", "torchvision", "triton", "numpy")
# Of the CPU's features, those that decide how fast this package's arithmetic can be.
_VECTOR = ("sse4_2", "avx", "avx2", "fma3", "f16c", "avx512", "avx10", "avx_vnni", "amx", "neon", "bf16", "sve", "sme")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _module(name: str) -> dict[str, bool]:
    return {"built": find_spec(f"fastprune.{name}") is not None, "loaded": f"fastprune.{name}" in sys.modules}


def _cpu() -> dict[str, Any]:
    # Torch's own detection; its earliest supported releases do not have it.
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "name": capabilities.get("cpu_name") or platform.processor() or platform.machine(),
        "features": sorted(name for name, has in capabilities.items() if has is True and name.startswith(_VECTOR)),
        "instruction_set": ops.cpu_isa(),
        "instruction_sets": list(ops.cpu_isas()),
        "module": _module("_cpu"),
    }


def _cuda() -> dict[str, Any]:
    count = torch.cuda.device_count()
    properties = [torch.cuda.get_device_properties(index) for index in range(count)]
    return {
        "torch": torch.version.cuda,
        "devices": [f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB" for p in properties],
        "module": _module("_cuda"),
    }


def collect() -> dict[str, Any]:
    """Return what ``python -m fastprune.info`` reports, as values that JSON can hold.

    Its keys are ``versions`` (package to version), ``backend`` (the choice made with ``set_backend``), ``ops`` (a list
    of op, device, implementation, why), ``cpu``, ``threads`` and ``cuda``.
    """
    return {
        "versions": {
            "fastprune": __version__,
            "python": platform.python_version(),
            **{package: _version(package) for package in _PACKAGES},
        },
        "backend": ops.get_backend(),
        "ops": [
            {"op": row.op, "device": row.device, "implementation": row.implementation, "why": row.why}
            for row in ops.backends()
        ],
        "cpu": _cpu(),
        "threads": {
            "torch": torch.get_num_threads(),
            "interop": torch.get_num_interop_threads(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        },
        "cuda": _cuda(),
    }


def _state(module: dict[str, bool]) -> str:
    if not module["built"]:
        return "not built"
    return "built and loaded" if module["loaded"] else "built, not loaded: this torch has no CUDA"


def _table(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()


def render(info: dict[str, Any]) -> str:
    """Return `info`, as `collect` made it, as aligned text."""
    cpu, threads, cuda = info["cpu"], info["threads"], info["cuda"]
    sections = {
        "Versions": list(info["versions"].items()),
        f"Ops (backend: {info['backend']})": [
            ("op", "device", "implementation", "why"),
            *(tuple(row.values()) for row in info["ops"]),
        ],
        "CPU": [
            ("name", cpu["name"]),
            ("features", " ".join(cpu["features"]) or "unknown"),
            ("instruction set", f"{cpu['instruction_set']} (of {', '.join(cpu['instruction_sets']) or 'none'})"),
            ("fastprune._cpu", _state(cpu["module"])),
            ("threads", f"{threads['torch']} in an op, {threads['interop']} among ops, {threads['cores']} cores"),
        ],
        "CUDA": [
            ("torch's", cuda["torch"] or "none: this torch was built without"),
            ("devices", "; ".join(cuda["devices"]) or "none"),
            ("fastprune._cuda", _state(cuda["module"])),
        ],
    }
    return "\n\n".join("\n".join([title, *_table(rows)]) for title, rows in sections.items())


def render_layers() -> str:
    """Return the layers and functions that networks may be made of, as aligned text."""
    layers = [row for row in supported() if row.arguments is not None]
    functions = [row for row in supported() if row.arguments is None]
    sections: dict[str, list[tuple[str, ...]]] = {
        "Layers, with the arguments that are saved": [
            (row.name, row.channels, ", ".join(row.arguments or ())) for row in layers
        ],
        "Functions and methods": [(row.name, row.channels) for row in functions],
    }
    explained = (
        f"{SMALLER}: loses pruned filters and the channels they wrote\n"
        f"{FOLLOWED_THROUGH}: channels are removed in front of it and behind it\n"
        f"{WHOLE}: computes what it did, on all of its channels\n"
        f"All of these can be saved. Any other that torch.fx traces is {WHOLE}, too, but cannot be saved."
    )
    return "\n\n".join([explained, *("\n".join([title, *_table(rows)]) for title, rows in sections.items())])


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the report; `arguments` are the command line's, the process's own if None."""
    parser = argparse.ArgumentParser(prog="fastprune-info", description=__doc__)
    parser.add_argument("--json", action="store_true", help="print JSON for machines")
    parser.add_argument("--layers", action="store_true", help="list the layers and functions of networks instead")
    options = parser.parse_args(arguments)
    if options.layers:
        listed = json.dumps([asdict(row) for row in supported()], indent=2) if options.json else render_layers()
        sys.stdout.write(listed + "\n")
        return
    info = collect()
    sys.stdout.write((json.dumps(info, indent=2) if options.json else render(info)) + "\n")


if __name__ == "__main__":
    main()
