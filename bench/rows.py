"""Which rows a test has: each rival, in each way a device can make a call, ours once for each implementation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from device import Device

from fastprune import ops

OURS = "fastprune"


@dataclass(frozen=True)
class Row:
    """One row of the table, and one test."""

    rival: str  # as the test knows it
    label: str  # as the table shows it
    mode: str = "eager"
    backend: str | None = None  # to be chosen for it; None leaves what is chosen

    def __str__(self) -> str:
        return self.label if self.mode == "eager" else f"{self.label} {self.mode}"


def rows(
    device: Device, *rivals: str, ops: Sequence[str] = (), gpu: Sequence[str] = (), host: Sequence[str] = ()
) -> Iterator[Row]:
    """The rows of a test of the `ops` on a device.

    Rivals in `gpu` are for devices other than the CPU; those in `host` leave the device, so no graph can hold them.
    """
    if device.modes == ("eager",):
        yield from (Row(rival, rival) for rival in (*rivals, *host))
        return
    for rival in (*rivals, *gpu, *host):
        ours = implementations(device, ops) if rival.split()[0] == OURS else {}
        for mode in device.modes[:1] if rival in host else device.modes:
            if not ours:
                yield Row(rival, rival, mode)
            for implementation, backend in ours.items():
                yield Row(rival, rival.replace(OURS, f"{OURS} {implementation}"), mode, backend)


def implementations(device: Device, names: Sequence[str]) -> dict[str, str]:
    """What can serve the ops on a device: by implementation, the backend that chooses it."""
    found: dict[str, str] = {}
    for backend in ("auto", "triton"):
        try:
            with chosen(backend):
                table = ops.backends()
        except RuntimeError:  # there is no Triton
            continue
        serving = {entry.op: entry.implementation for entry in table if entry.device == device.name.type}
        found.setdefault("+".join(dict.fromkeys(serving[name] for name in names)), backend)
    return found


@contextmanager
def chosen(backend: str | None) -> Iterator[None]:
    """Within, that backend."""
    before = ops.get_backend()
    if backend is not None:
        ops.set_backend(backend)
    try:
        yield
    finally:
        ops.set_backend(before)
