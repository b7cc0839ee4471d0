"""Which sources a pack is made of."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

# What fastprune's wheel is made of: these folders' files of these kinds, and setup.py.
FOLDERS = ("csrc", "fastprune", "kernels")
KINDS = frozenset({".py", ".cpp", ".cu", ".cuh", ".h", ".inl"})


def digest(root: Path) -> str:
    """SHA-256 over the sources' names and contents."""
    found = [path for folder in FOLDERS for path in (root / folder).rglob("*") if path.suffix in KINDS]
    total = hashlib.sha256()
    for path in sorted([*found, root / "setup.py"]):
        content = path.read_bytes()
        total.update(f"{path.relative_to(root).as_posix()} {len(content)}\n".encode() + content)
    return total.hexdigest()


def commit(root: Path) -> str:
    """The commit, with `-dirty` where files were changed since; `unknown` outside a git repository."""
    command = ["git", "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
