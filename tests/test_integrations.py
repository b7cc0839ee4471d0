"""The callbacks inside the real trainers: masks by optimizer steps, checkpoints and how they go on."""

import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from fastprune import FilterPruner
from fastprune.integrations.lightning import FilterPruning
from fastprune.integrations.transformers import FilterPruning as TransformersFilterPruning

EVERY = 3


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 6, 3), nn.Flatten(), nn.Linear(96, 4)
    )


def batches() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(24, 3, 8, 8, generator=generator), torch.randint(0, 4, (24,), generator=generator)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps at which pruners made new masks."""
    steps: list[int] = []
    own = FilterPruner.update

    def update(self: FilterPruner) -> None:
        steps.append(self.steps)
        own(self)

    monkeypatch.setattr(FilterPruner, "update", update)
    return steps


# ---- Lightning ----


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = network()

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def fit(folder: Path, epochs: int, ckpt_path: Path | None = None, **options: Any) -> tuple[Module, FilterPruning, Any]:
    module, pruning = Module(), FilterPruning(0.5, network="net", every=EVERY)
    trainer = lightning.Trainer(
        max_epochs=epochs, callbacks=[pruning], accelerator="cpu", default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip
    trainer.fit(module, DataLoader(TensorDataset(*batches()), batch_size=4), ckpt_path=ckpt_path)
    return module, pruning, trainer


def test_lightning_counts_steps_of_the_optimizer(tmp_path: Path, counted: list[int]) -> None:
    _, pruning, trainer = fit(tmp_path, 2, accumulate_grad_batches=2)
    assert trainer.global_step == 6  # of 12 batches
    assert pruning.pruner is not None
    assert pruning.pruner.steps == 6
    assert counted == [2, 5]  # before every third iteration
    assert float(trainer.callback_metrics["sparsity"]) == pytest.approx(pruning.pruner.sparsity())
    assert pruning.pruner.sparsity() > 0


def test_lightning_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole, _, _ = fit(tmp_path, 3)
    _, _, trainer = fit(tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed, pruning, _ = fit(tmp_path, 3, tmp_path / "one.ckpt")
    assert pruning.pruner is not None
    assert pruning.pruner.steps == 18
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


# ---- Transformers ----


class Classifier(PreTrainedModel):
    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        torch.manual_seed(0)
        self.net = network()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Leave torch's own."""

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(images)
        return {"loss": functional.cross_entropy(logits, labels), "logits": logits}


class Images(Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        images, labels = batches()
        return {"images": images[index], "labels": labels[index]}


def train(
    folder: Path, epochs: int, resume: str | None = None, **options: Any
) -> tuple[Classifier, FilterPruner, Trainer]:
    model = Classifier()
    pruning = TransformersFilterPruning(model, 0.5, every=EVERY)
    arguments = TrainingArguments(
        str(folder), num_train_epochs=epochs, per_device_train_batch_size=4, use_cpu=True, report_to=[],
        save_strategy="epoch", disable_tqdm=True, learning_rate=0.01, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Images(), callbacks=[pruning])
    trainer.train(resume_from_checkpoint=resume)
    return model, pruning.pruner, trainer


def test_transformers_counts_steps_of_the_optimizer(tmp_path: Path, counted: list[int]) -> None:
    _, pruner, trainer = train(tmp_path, 2, gradient_accumulation_steps=2)
    assert trainer.state.global_step == 6
    assert pruner.steps == 6
    assert counted == [2, 5]
    recorded = [entry["sparsity"] for entry in trainer.state.log_history if "sparsity" in entry]
    assert len(recorded) == 2
    assert recorded[-1] == pruner.sparsity() > 0


def test_transformers_goes_on_from_a_checkpoint(tmp_path: Path) -> None:
    whole, _, _ = train(tmp_path / "whole", 3)
    train(tmp_path / "parts", 1)
    resumed, pruner, _ = train(tmp_path / "parts", 3, str(tmp_path / "parts" / "checkpoint-6"))
    assert pruner.steps == 18
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


# ---- both ----


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_without_the_library_the_error_names_the_extra(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == library or name.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"fastprune.integrations.{library}")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastprune\[integrations\]'"):
        __import__(f"fastprune.integrations.{library}")
