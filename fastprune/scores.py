"""Loss and accuracy over the batches of all processes."""

import torch
from torch import Tensor

from . import distributed


class Scores:
    """Sums of loss, top-1 and top-5 hits, kept on the device until they are read.

    Attributes:
        sums: float64 ``[4]``: loss, top-1 hits, top-5 hits and images of this process.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(4, dtype=torch.float64, device=device)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Count a batch: its mean loss, its ``[B, classes]`` logits and ``[B]`` labels."""
        with torch.no_grad():
            best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
            batch = torch.stack(
                [loss.double() * len(labels), best[:, :1].sum(), best.sum(), loss.new_full((), len(labels))]
            )
            self.sums += batch

    def total(self) -> Tensor:
        """The sums over all processes, as ``sums``."""
        return distributed.total(self.sums)

    def set(self, total: Tensor) -> None:
        """Go on from what ``total()`` gave, whatever the number of processes then."""
        self.sums.copy_(total if distributed.is_first() else torch.zeros_like(total))

    def read(self) -> dict[str, float]:
        """Mean loss, and top-1 and top-5 in percent, of all processes."""
        loss, top1, top5, images = self.total().tolist()
        return {"loss": loss / images, "top1": 100 * top1 / images, "top5": 100 * top5 / images}
