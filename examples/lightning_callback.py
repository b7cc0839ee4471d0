"""Pruning in Lightning: one callback. Needs pip install 'fastprune[integrations]'."""

import tempfile

import lightning
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from fastprune import data, models
from fastprune.integrations.lightning import FilterPruning


class Classifier(lightning.LightningModule):
    """A ResNet-20 and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model: nn.Module = models.create("resnet20")

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        """The loss of a batch."""
        images, labels = batch
        return functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Any optimizer."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    lightning.seed_everything(0)
    images = data.embedded(0, train=256, test=10)
    inputs = data.normalize(images.train_images, images.mean, images.std)
    pruning = FilterPruning(rate=0.5, network="model", example_input=torch.zeros(1, 3, 32, 32))
    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=1, callbacks=[pruning], accelerator="cpu", default_root_dir=folder, logger=False
        )
        trainer.fit(Classifier(), DataLoader(TensorDataset(inputs, images.train_labels), batch_size=32))
    assert pruning.pruner is not None
    kept = sum(pruning.pruner.kept().values())
    print(f"{trainer.global_step} steps: {kept} filters kept, sparsity {trainer.callback_metrics['sparsity']:.1f} %")
