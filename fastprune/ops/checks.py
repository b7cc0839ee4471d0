"""What every op asks of its inputs: used by the references and the fakes; ``csrc/check.h`` says the same in C++."""

from collections.abc import Sequence

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def dense_run(shape: Sequence[int], strides: Sequence[int]) -> int | None:
    """The number of elements, if they are one dense run in memory in whatever order; else None."""
    expected = 1
    for stride, size in sorted((stride, size) for size, stride in zip(shape, strides) if size > 1):
        if stride != expected:
            return None
        expected *= size
    return expected


def is_filter_major(weight: Tensor) -> bool:
    """Whether each filter ``weight[f]`` is one dense run of K elements (contiguous and channels_last both are)."""
    size = dense_run(weight.shape[1:], weight.stride()[1:])
    return size is not None and (weight.shape[0] <= 1 or weight.stride(0) == size)


def is_dense(tensor: Tensor) -> bool:
    """Whether the elements are one dense run in memory, in whatever order."""
    return tensor.numel() == 0 or dense_run(tensor.shape, tensor.stride()) is not None


def same_layout(tensor: Tensor, other: Tensor) -> bool:
    """Whether shapes and strides are equal, where a stride matters."""
    return tensor.shape == other.shape and all(
        a == b or n <= 1 for a, b, n in zip(tensor.stride(), other.stride(), tensor.shape)
    )


def check_dtype_and_device(op: str, name: str, tensors: Sequence[Tensor]) -> None:
    """Raise unless all tensors are on one device and of one supported dtype."""
    for i, tensor in enumerate(tensors):
        if tensor.dtype not in DTYPES or tensor.dtype != tensors[0].dtype:
            raise RuntimeError(
                f"{op}: {name} must share one dtype of float32, float64, bfloat16, float16; "
                f"{name}[{i}] has {str(tensor.dtype).removeprefix('torch.')}"
            )
        if tensor.device != tensors[0].device:
            raise RuntimeError(f"{op}: {name} must be on one device; {name}[{i}] is on {tensor.device}")


def check_weights(op: str, weights: Sequence[Tensor], name: str = "weights") -> None:
    """Raise unless all weights are non-empty, filter-major, on one device and of one supported dtype."""
    check_dtype_and_device(op, name, weights)
    for i, weight in enumerate(weights):
        if weight.dim() < 2 or weight.numel() == 0:
            raise RuntimeError(
                f"{op}: {name}[{i}] must be [filters, ...] with at least one filter and element, "
                f"got {list(weight.shape)}"
            )
        if not is_filter_major(weight):
            raise RuntimeError(
                f"{op}: {name}[{i}] must be contiguous or channels_last (each filter one dense run), "
                f"got strides {list(weight.stride())}"
            )


def count_filters(weights: Sequence[Tensor]) -> int:
    """N, the number of filters of all layers."""
    return sum(weight.shape[0] for weight in weights)


def check_filter_vector(op: str, name: str, vector: Tensor, weights: Sequence[Tensor], dtype: torch.dtype) -> None:
    """Raise unless ``vector`` is a contiguous [N] tensor of ``dtype`` for the filters of ``weights``."""
    n = count_filters(weights)
    if vector.dtype != dtype or vector.shape != (n,) or not vector.is_contiguous():
        raise RuntimeError(
            f"{op}: {name} must be a contiguous {str(dtype).removeprefix('torch.')} tensor of shape [{n}] "
            f"(one entry per filter), got {str(vector.dtype).removeprefix('torch.')} {list(vector.shape)}"
        )


def channels_of(weight: Tensor) -> tuple[int, int, int]:
    """R, C and I, such that a filter-major weight lies in memory as [R, C, I], where C are its input channels.

    R counts the filters, and the kernel positions that are farther apart in memory than the channels are; I the others:
    of a contiguous weight I is kh·kw, channels_last it is 1.
    """
    channels = weight.shape[1]
    inner = weight.stride(1) if channels > 1 else weight.numel() // weight.shape[0]
    return weight.numel() // (channels * inner), channels, inner


def count_channels(weights: Sequence[Tensor]) -> int:
    """M, the number of input channels of all layers: the sizes of dimension 1."""
    return sum(weight.shape[1] for weight in weights)


def check_channel_vector(op: str, name: str, vector: Tensor, weights: Sequence[Tensor]) -> None:
    """Raise unless ``vector`` is a contiguous [M] float32 tensor for the input channels of ``weights``."""
    m = count_channels(weights)
    if vector.dtype != torch.float32 or vector.shape != (m,) or not vector.is_contiguous():
        raise RuntimeError(
            f"{op}: {name} must be a contiguous float32 tensor of shape [{m}] (one entry per input channel), "
            f"got {str(vector.dtype).removeprefix('torch.')} {list(vector.shape)}"
        )


def check_rate(op: str, rate: float) -> None:
    """Raise unless ``0 <= rate < 1``."""
    if not 0 <= rate < 1:
        raise RuntimeError(f"{op}: rate must be in [0, 1), got {rate:g}")


def check_ord(op: str, ord: int) -> None:
    """Raise unless ``ord`` is 1 or 2."""
    if ord not in (1, 2):
        raise RuntimeError(f"{op}: ord must be 1 (mean |w|) or 2 (mean w^2), got {ord}")


def check_scores(op: str, scores: Tensor, k: int) -> None:
    """Raise unless ``scores`` is a contiguous float32 vector that has a ``k``-th value."""
    if scores.dim() != 1 or scores.dtype != torch.float32 or not scores.is_contiguous():
        raise RuntimeError(
            f"{op}: scores must be a contiguous float32 vector, "
            f"got {str(scores.dtype).removeprefix('torch.')} {list(scores.shape)}"
        )
    if not 0 <= k < scores.numel():
        raise RuntimeError(f"{op}: k must be in [0, {scores.numel()}), got {k}")
