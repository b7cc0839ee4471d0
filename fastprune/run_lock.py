"""One process at a time works in a run's folder: a file says which one, and is locked as long as it lives.

The lock of the operating system goes with its process, however that ends. What is written in the file is for people,
for file systems without locks, and for other machines, whose processes cannot be seen from here.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from . import distributed

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["LOCK", "InUseError", "held"]

LOCK = "in_use.json"
_TEMPORARY = re.compile(r"(checkpoint|config|metrics|summary|model|compaction|evolution)\.\w+\.[0-9a-f]{12}\.tmp")


class InUseError(OSError):
    """Another process works in the folder; the message says which, and what to do."""


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, which is made if missing, while this lasts.

    Of several processes that train together the first one holds it. What was left by one that is gone is taken over.

    Raises:
        InUseError: if another one has it. PeerError in the other processes.
        OSError: where the file cannot be written.
    """
    lock = None
    made = not folder.exists()
    with distributed.together():
        if distributed.is_first():
            folder.mkdir(parents=True, exist_ok=True)
            lock = _take(folder / LOCK)
            _sweep(folder)
    try:
        yield
    finally:
        if lock is not None:
            (folder / LOCK).unlink(missing_ok=True)  # before another one can have it
            os.close(lock)
            if made:
                with suppress(OSError):  # a folder in which nothing was done goes, too
                    folder.rmdir()


def _sweep(folder: Path) -> None:
    """Remove what processes were writing when they were killed."""
    for rest in [*folder.glob("*.tmp"), *folder.glob("*/*.tmp")]:
        if _TEMPORARY.fullmatch(rest.name):
            rest.unlink(missing_ok=True)


def _take(path: Path) -> int:
    """Return the descriptor of the file, locked and with our name in it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            free = _lock(descriptor)
            holder = _read(descriptor)
            if not free or _may_live(holder):
                raise InUseError(_refusal(path, holder))
            # The one who had it may have removed this very file in between: then there is another one.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    _write(descriptor, path)
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int) -> bool:
    """Lock the file; whether no other process has. File systems without locks leave it to what is written."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _read(descriptor: int) -> dict[str, Any]:
    """Who holds it, as far as it is told."""
    try:
        holder = json.loads(os.pread(descriptor, 10_000, 0))
    except ValueError:  # empty, or cut off
        return {}
    return holder if isinstance(holder, dict) else {}


def _write(descriptor: int, path: Path) -> None:
    ours = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _start_of(os.getpid()),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
        "command": " ".join(sys.argv),
    }
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(ours).encode(), 0)
    except OSError as error:
        path.unlink()
        raise OSError(error.errno, f"could not write who is at work: {error.strerror}", str(path)) from error


def _may_live(holder: dict[str, Any]) -> bool:
    """Whether the process that wrote this is there still, as far as can be seen from here."""
    pid = holder.get("pid")
    if not isinstance(pid, int) or pid <= 0 or pid == os.getpid():
        return False
    if holder.get("host") != socket.gethostname():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # another user's
        pass
    return holder.get("started") == _start_of(pid)  # another process may have got its number


def _start_of(pid: int) -> str | None:
    """When a process began, in the kernel's terms; None where the kernel does not tell."""
    try:
        # Behind the name, which may have spaces and brackets in it, and the 19 fields after it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _refusal(path: Path, holder: dict[str, Any]) -> str:
    host, here = holder.get("host"), socket.gethostname()
    who = f"process {holder.get('pid')} on {host} ({holder.get('command')}) since {holder.get('since')}"
    if not holder:
        who = "another process, which has just begun"
    what_to_do = "wait for it or stop it, or choose another --out"
    if holder and host != here:
        what_to_do = f"if it is gone, which cannot be seen from {here}, remove {path}; else choose another --out"
    return f"{path.parent} is in use by {who}: {what_to_do}"
