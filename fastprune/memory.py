"""Errors that say that memory ran out, which each part of PyTorch says in its own way."""

import torch

__all__ = ["is_out_of_memory", "shortage"]

_SAID = ("out of memory", "can't allocate memory", "not enough memory")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return any(part in str(error).lower() for part in _SAID)


def shortage(error: BaseException) -> str:
    """Return what an error says of it, in a line."""
    said = str(error).splitlines()
    return f"memory ran out ({said[0]})" if said else "memory ran out"
