"""The callbacks inside the real trainers: masks by optimizer steps, checkpoints and how they go on."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset, TensorDataset
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from fastprune import FilterPruner
from fastprune.integrations.lightning import FilterPruning
from fastprune.integrations.transformers import FilterPruning as TransformersFilterPruning
from fastprune.nn import MaskedConv2d

EVERY = 3
DDP = Path(__file__).with_name("integrations_ddp.py")


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

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        self.log("loss", functional.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def loader() -> DataLoader[tuple[Tensor, ...]]:
    return DataLoader(TensorDataset(*batches()), batch_size=4)


def lightning_trainer(folder: Path, *callbacks: lightning.Callback, **options: Any) -> lightning.Trainer:
    return lightning.Trainer(
        callbacks=list(callbacks), accelerator="cpu", default_root_dir=folder, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **options,
    )  # fmt: skip


def fit(folder: Path, epochs: int, ckpt_path: Path | None = None, **options: Any) -> tuple[Module, FilterPruning, Any]:
    module, pruning = Module(), FilterPruning(0.5, network="net", every=EVERY)
    trainer = lightning_trainer(folder, pruning, max_epochs=epochs, **options)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
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


def test_lightning_keeps_masks_frozen(tmp_path: Path) -> None:
    _, pruning, trainer = fit(tmp_path, 1)
    assert pruning.pruner is not None
    pruning.pruner.freeze()
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    masks = pruning.pruner.export_masks()
    _, resumed, _ = fit(tmp_path, 3, tmp_path / "one.ckpt")
    assert resumed.pruner is not None
    assert resumed.pruner.frozen
    for name, mask in resumed.pruner.masks().items():
        assert torch.equal(mask, masks[name]), name


def test_lightning_tests_a_new_module_from_a_checkpoint(tmp_path: Path) -> None:
    module, _, trainer = fit(tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    expected = trainer.test(module, loader(), verbose=False)
    new, pruning = Module(), FilterPruning(0.5, network="net", every=EVERY)
    assert lightning_trainer(tmp_path, pruning).test(new, loader(), tmp_path / "one.ckpt", verbose=False) == expected
    assert pruning.pruner is None  # nothing trains
    assert not all(conv.mask.all() for conv in new.modules() if isinstance(conv, MaskedConv2d))


class Segmenting(Module):
    """Its last convolution writes the output."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(*self.net[:4], nn.AdaptiveAvgPool2d(1), nn.Flatten())


@pytest.mark.parametrize(
    "options", [{}, {"example_input": torch.zeros(1, 3, 8, 8)}, {"removable_only": False}], ids=str
)
def test_lightning_converts_for_a_checkpoint_what_was_converted_to_fit(tmp_path: Path, options: dict[str, Any]) -> None:
    module, pruning = Segmenting(), FilterPruning(0.5, network="net", every=EVERY, **options)
    trainer = lightning_trainer(tmp_path, pruning, max_epochs=1)
    trainer.fit(module, loader())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    assert isinstance(module.net[3], MaskedConv2d) == ("removable_only" in options)
    expected = trainer.test(module, loader(), verbose=False)
    new = lightning_trainer(tmp_path, FilterPruning(0.5, network="net", every=EVERY, **options))
    assert new.test(Segmenting(), loader(), tmp_path / "one.ckpt", verbose=False) == expected


def test_lightning_tests_a_pruned_module_as_it_is(tmp_path: Path) -> None:
    module, _, trainer = fit(tmp_path, 1)
    expected = trainer.test(module, loader(), verbose=False)
    another = lightning_trainer(tmp_path, FilterPruning(0.5, network="net", every=EVERY))
    assert another.test(module, loader(), verbose=False) == expected


def test_lightning_converts_each_module_that_it_fits(tmp_path: Path) -> None:
    first, pruning, _ = fit(tmp_path, 1)
    second = Module()
    lightning_trainer(tmp_path, pruning, max_epochs=1).fit(second, loader())
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_lightning_checkpoint_loads_without_a_trainer(tmp_path: Path) -> None:
    module, _, trainer = fit(tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    new = Module()
    FilterPruner(new.net, 0.5)
    new.load_state_dict(torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"])
    images = batches()[0]
    assert torch.equal(new.eval().net(images), module.eval().net(images))


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
    folder: Path, epochs: int, resume: Path | None = None, *callbacks: TrainerCallback, freeze: bool = False, **own: Any
) -> tuple[Classifier, FilterPruner, Trainer]:
    model = Classifier()
    pruning = TransformersFilterPruning(model, 0.5, every=EVERY)
    if freeze:
        pruning.pruner.update()
        pruning.pruner.freeze()
    settings = {
        "num_train_epochs": epochs, "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [],
        "save_strategy": "epoch", "disable_tqdm": True, "learning_rate": 0.01, "lr_scheduler_type": "constant", **own,
    }  # fmt: skip
    arguments = TrainingArguments(str(folder), **settings)
    trainer = Trainer(model, arguments, train_dataset=Images(), eval_dataset=Images(), callbacks=[*callbacks, pruning])
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return model, pruning.pruner, trainer


def test_transformers_counts_steps_of_the_optimizer(tmp_path: Path, counted: list[int]) -> None:
    _, pruner, trainer = train(tmp_path, 2, gradient_accumulation_steps=2)
    assert trainer.state.global_step == 6
    assert pruner.steps == 6
    assert counted == [2, 5]


def test_transformers_logs_the_sparsity(tmp_path: Path) -> None:
    _, pruner, trainer = train(tmp_path, 1, logging_steps=2)
    recorded = {entry["step"]: entry["sparsity"] for entry in trainer.state.log_history}
    assert list(recorded) == [2, 4, 6]
    assert recorded[2] > 0  # the first masks are made before iteration 2
    assert recorded[6] == pruner.sparsity() > 0
    assert trainer.evaluate()["sparsity"] == pruner.sparsity()


@pytest.mark.parametrize("restore", [False, True])
def test_transformers_goes_on_from_a_checkpoint(tmp_path: Path, restore: bool) -> None:
    whole, _, _ = train(tmp_path / "whole", 3)
    train(tmp_path / "parts", 1)
    checkpoint = tmp_path / "parts" / "checkpoint-6"
    resumed, pruner, _ = train(tmp_path / "parts", 3, checkpoint, restore_callback_states_from_checkpoint=restore)
    assert pruner.steps == 18
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, msg=name)


def test_transformers_keeps_masks_frozen(tmp_path: Path) -> None:
    _, first, _ = train(tmp_path, 1, freeze=True)
    _, resumed, _ = train(tmp_path, 3, tmp_path / "checkpoint-6")
    assert resumed.frozen
    for name, mask in resumed.masks().items():
        assert torch.equal(mask, first.masks()[name]), name


# ---- both ----


@pytest.mark.slow
def test_two_processes_have_the_same_masks(tmp_path: Path) -> None:
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", DDP, tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launch], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"run"')]
    for name in ("with_lightning", "with_transformers"):
        first, second = (line for line in lines if line["run"] == name)
        assert first["processes"] == 2
        assert first["steps"] == 6  # 24 images, 4 in each of 2 processes, twice
        assert first["masks"] == second["masks"]
        assert 0 < sum(first["masks"]) < len(first["masks"])
        assert "process 1 differs from process 0" in first["said"]
        assert first["said"] == second["said"]


@pytest.mark.parametrize("library", ["lightning", "transformers"])
def test_without_the_library_the_error_names_the_extra(library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name == library or name.startswith(f"{library}.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, f"fastprune.integrations.{library}")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastprune\[integrations\]'"):
        __import__(f"fastprune.integrations.{library}")
