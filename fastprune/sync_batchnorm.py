"""Batch norm whose batch is that of all processes, so that several train as one does with all the images."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from . import distributed


class SyncBatchNorm2d(nn.BatchNorm2d):
    """``BatchNorm2d`` that takes its batch statistics over all processes while it trains, on any device.

    PyTorch's ``SyncBatchNorm`` takes tensors on GPUs only. In eval mode, and in a lone process, it is ``BatchNorm2d``.
    Made by :func:`synchronise_batchnorms`.
    """

    is_batch_norm_in_eval_mode = True  # for channel_rules, which does not wait for this module to load

    def forward(self, input: Tensor) -> Tensor:
        """``[B, C, H, W]`` to the same, ``B ≥ 1`` and not the same in every process."""
        if not self.training or distributed.size() == 1:
            return super().forward(input)
        return self._over_processes(input)

    @torch.compiler.disable  # compiled, the exchange in the middle of an autograd function gave NaN
    def _over_processes(self, input: Tensor) -> Tensor:
        output, mean, variance, count = _Normalised.apply(input, self.weight, self.bias, self.eps)
        if self.track_running_stats:
            self._track(mean, variance * (count / (count - 1)))
        return output

    @torch.no_grad()
    def _track(self, mean: Tensor, variance: Tensor) -> None:
        assert self.num_batches_tracked is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        self.num_batches_tracked.add_(1)
        momentum = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked.float()
        self.running_mean += momentum * (mean - self.running_mean)
        self.running_var += momentum * (variance - self.running_var)


class _Normalised(torch.autograd.Function):
    """``(x − mean) / √(variance + ε) · weight + bias`` with the mean and variance over all processes.

    Returns that, the mean and the biased variance (``[C]`` in the dtype of the sums), and the number of values.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        own_mean, own_variance, own_count = _statistics(x)
        every = [own_mean.new_empty(2 * x.shape[1] + 1) for _ in range(distributed.size())]
        dist.all_gather(every, torch.cat([own_mean, own_variance, own_mean.new_tensor([own_count])]))
        means, variances, counts = torch.stack(every).split([x.shape[1], x.shape[1], 1], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        # The variance within each process and that between them: no difference of large numbers.
        variance = (counts * (variances + (means - mean).square())).sum(0) / count
        ctx.save_for_backward(x, weight, mean, variance, count)
        ctx.eps = eps
        ctx.mark_non_differentiable(mean, variance, count)
        return functional.batch_norm(x, mean, variance, weight, bias, eps=eps), mean, variance, count

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, weight, mean, variance, count = ctx.saved_tensors
        gradient, one = gradients[0], torch.ones_like(mean)
        scale = (variance + ctx.eps).rsqrt()
        # With given statistics, those of the weight and bias are Σ g·(x − mean)/√(variance + ε) and Σ g.
        _, own_products, own_sums = torch.ops.aten.native_batch_norm_backward(
            gradient, x, one, mean, variance, mean, scale, False, ctx.eps, [False, True, True]
        )
        products, sums = distributed.total(torch.stack([own_products, own_sums])) / count
        # scale · (g − sums − (x − mean) · scale · products), times the weight, as g·a + x·b + c.
        a = scale if weight is None else scale * weight
        b = -a * scale * products
        c = -a * sums - b * mean
        a, b, c = (factor[:, None, None] for factor in (a, b, c))
        in_gradient = torch.addcmul(torch.addcmul(c, x, b), gradient, a).to(x.dtype)
        if weight is None:
            return in_gradient, None, None, None
        # Those of the parameters stay this process's own: DistributedDataParallel takes their mean.
        return in_gradient, own_products.to(weight.dtype), own_sums.to(weight.dtype), None


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, int]:
    """Mean and biased variance (``[C]`` in float32, or float64 of float64) of ``[B, C, H, W]``, and their count."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    mean, variance = x.new_zeros(2, x.shape[1], dtype=wide)
    torch.batch_norm_update_stats(x, mean, variance, 1.0)  # the op behind BatchNorm, here with nothing of the old
    count = x.numel() // x.shape[1]
    return mean, variance * ((count - 1) / count) if count > 1 else torch.zeros_like(variance), count


def synchronise_batchnorms(model: nn.Module) -> nn.Module:
    """Let every BatchNorm of ``model`` take its batch statistics over all processes.

    On the CPU, ``BatchNorm2d`` become :class:`SyncBatchNorm2d` in place; on GPUs PyTorch's own, faster
    ``SyncBatchNorm`` takes their places. Prune first: a pruner looks for ``BatchNorm2d`` behind convolutions.

    Returns:
        The model; its parameters keep their identity, and its ``state_dict`` its keys.
    """
    if any(parameter.is_cuda for parameter in model.parameters()):
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SyncBatchNorm2d
    return model
