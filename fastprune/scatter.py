"""The layer that adds a branch of few channels to a residual stream of more."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Scatter"]


class Scatter(nn.Module):
    """Adds the channels of a branch to some channels of a stream, and a constant to each of the stream's.

    ``stream + constant``, and in its channels ``index`` the branch: what ``stream + full`` is, where ``full`` has the
    branch in the channels ``index`` and constants in the others. Made by :func:`fastprune.compact`.

    Attributes:
        index: int64 ``[kept]``, a buffer: the stream's channel that each of the branch is added to; none occurs twice.
        constant: ``[channels, 1, 1]``, a buffer: what the channels that the branch has no longer were.

    Args:
        channels: of the stream.
        kept: of the branch; 0 for one that is constant, and gone.
    """

    index: Tensor
    constant: Tensor

    def __init__(self, channels: int, kept: int) -> None:
        super().__init__()
        self.channels, self.kept = channels, kept
        self.register_buffer("index", torch.arange(kept))
        self.register_buffer("constant", torch.zeros(channels, 1, 1))

    def forward(self, stream: Tensor, branch: Tensor | None = None) -> Tensor:
        """Return the sum, ``[N, channels, H, W]``, of ``stream`` of that shape and ``branch`` ``[N, kept, H, W]``."""
        if branch is not None and torch.onnx.is_in_onnx_export():
            # ONNX Runtime has no fast way to add to some channels, but one for a convolution that does the same.
            rows = functional.one_hot(self.index, self.channels).T[:, :, None, None]
            return stream + functional.conv2d(branch, rows.to(branch.dtype), self.constant.flatten().to(branch.dtype))
        total = stream + self.constant.to(stream.dtype)
        # In place, on what nobody else has yet: a copy of the stream less.
        return total if branch is None else total.index_add_(1, self.index, branch.to(total.dtype))

    def allows(self, index: Tensor) -> bool:
        """Whether it is a possible ``index``: channels of the stream, each once."""
        values = index.tolist()
        return len(set(values)) == len(values) and all(0 <= value < self.channels for value in values)

    def extra_repr(self) -> str:
        """What ``repr`` says of it."""
        return f"{self.channels}, kept={self.kept}"
