"""The table of clean tests, `clean.txt`: under each test file the keys and names of its tests, sorted."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path

HEAD = "# What was executed and found clean, with its key; written by `make test-gpu-kernels`. See CONTRIBUTING.md.\n"


def read(path: Path) -> dict[str, str]:
    """The key of each clean test by its name; none if there is no table."""
    clean, file = {}, ""
    for line in path.read_text().splitlines() if path.exists() else []:
        if line.startswith("  "):
            key, name = line.split(maxsplit=1)
            clean[f"{file}::{name}"] = key
        elif not line.startswith("#"):
            file = line
    return clean


def write(path: Path, clean: dict[str, str]) -> None:
    """Replace the table by this one, whole."""
    from fastprune.checkpoint import write_atomically  # and all of torch, which reading does without

    lines = [HEAD]
    for file, names in groupby(sorted(clean), lambda nodeid: nodeid.split("::", 1)[0]):
        lines.append(f"{file}\n")
        lines += [f"  {clean[name]} {name.split('::', 1)[1]}\n" for name in names]
    write_atomically(path, ["".join(lines).encode()], "the table of clean tests")
