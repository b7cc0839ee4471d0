"""Pruning in Transformers' Trainer: one callback. Needs pip install 'fastprune[integrations]'."""

import tempfile

import torch
from torch.utils.data import Dataset
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from fastprune import data
from fastprune.integrations.transformers import FilterPruning


class Images(Dataset[dict[str, torch.Tensor]]):
    """The embedded set, as the model takes it."""

    def __init__(self, count: int) -> None:
        images = data.embedded(0, train=count, test=10)
        self.inputs = data.normalize(images.train_images, images.mean, images.std)
        self.labels = images.train_labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"pixel_values": self.inputs[index], "labels": self.labels[index]}


if __name__ == "__main__":
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic", num_labels=10)
    model = ResNetForImageClassification(config)
    # Its forward decides by values, so that no example_input tells what can be removed. Its last layer is linear.
    pruning = FilterPruning(model, rate=0.5, removable_only=False)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, num_train_epochs=1, per_device_train_batch_size=32, use_cpu=True, report_to=[], save_strategy="no"
        )
        trainer = Trainer(model, arguments, train_dataset=Images(512), callbacks=[pruning])
        trainer.train()
    recorded = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    kept = sum(pruning.pruner.kept().values())
    print(f"{trainer.state.global_step} steps: {kept} filters kept, sparsity {recorded[-1]:.1f} %")
