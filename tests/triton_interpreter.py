"""Triton's interpreter, made to round as GPUs do: it cuts float32 off where they round to the nearest bfloat16."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def repair() -> None:
    """Give the interpreter PyTorch's conversions between bfloat16 and float32; once is enough."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    own = InterpreterBuilder.cast_impl
    if own.__name__ == "cast_exactly":
        return

    def cast_exactly(self: Any, src: Any, dst_type: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        data = np.ascontiguousarray(src.data)
        if (source, target) == (tl.float32, tl.bfloat16):
            made = torch.from_numpy(data).to(torch.bfloat16).view(torch.uint16).numpy()
        elif (source, target) == (tl.bfloat16, tl.float32):
            made = (data.astype(np.uint32) << 16).view(np.float32)
        else:
            return own(self, src, dst_type)
        return TensorHandle(made.reshape(src.data.shape), target)

    InterpreterBuilder.cast_impl = cast_exactly
