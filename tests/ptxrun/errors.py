"""Exceptions and findings of ptxrun."""

from __future__ import annotations
from dataclasses import dataclass


class PtxError(Exception):
    """Base class of everything ptxrun raises on purpose."""


class PtxParseError(PtxError):
    pass


class PtxUnsupported(PtxError, NotImplementedError):
    """An instruction (or form of one) that ptxrun does not execute; names it and its line."""


class LaunchError(PtxError):
    """Wrong arguments, too much shared memory, unknown kernel ..."""


class DeadlockError(PtxError):
    """Lanes wait for each other (barrier or warp-level sync) and nothing can run."""


class StepLimit(PtxError):
    """The launch executed more basic blocks than `max_steps`."""


class TrapError(PtxError):
    """trap / failed device assert."""


@dataclass
class Finding:
    """One thing that a check found. `kind` is one of: oob, misaligned, uninit_global,
    uninit_shared, uninit_local, readonly, async_not_waited, race_shared, race_global."""

    kind: str
    message: str
    line: int = 0
    text: str = ""
    src: str = ""
    block: tuple = ()
    thread: tuple = ()
    address: int = 0
    count: int = 1

    def __str__(self):
        loc = f"PTX line {self.line}" + (f" ({self.src})" if self.src else "")
        return (
            f"{self.kind}: {self.message} at {loc}: `{self.text}` block {self.block} "
            f"thread {self.thread} address {self.address:#x}" + (f" [{self.count} lanes]" if self.count > 1 else "")
        )


class CheckError(PtxError):
    """A check with policy 'raise' found something. `.finding` holds it."""

    def __init__(self, finding: Finding):
        super().__init__(str(finding))
        self.finding = finding
