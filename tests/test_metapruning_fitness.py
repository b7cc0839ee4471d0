"""Fitness is accuracy after recalibration, the same each time, and survives a lack of memory."""

import pytest
import torch
from test_metapruning_pruning_net import TINY
from torch import Tensor, nn

from fastprune import data
from fastprune.data import ImageData
from fastprune.metapruning import DescribedNetwork, PruningNet
from fastprune.metapruning.fitness import Fitness, Score, split

ENCODING = (20, 11, 25)


def images(train: int = 40, test: int = 12, side: int = 12) -> ImageData:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(train + test) % 5
    pixels = torch.randint(0, 200, (train + test, 3, side, side), generator=generator)
    pixels = (pixels + 10 * labels[:, None, None, None]).to(torch.uint8)
    return ImageData(
        "tiny", tuple("abcde"), pixels[:train], labels[:train], pixels[train:], labels[train:], "made for the test"
    )


def pruning_net() -> PruningNet:
    torch.manual_seed(0)
    return PruningNet(TINY)


def test_validation_images_are_of_the_training_set_and_never_of_the_test_set() -> None:
    whole = images()
    parted = split(whole, 0.25, seed=3)
    assert (len(parted.train_labels), len(parted.test_labels)) == (30, 10)

    def rows(tensor: Tensor) -> list[bytes]:
        return [row.numpy().tobytes() for row in tensor]

    kept, held = rows(parted.train_images), rows(parted.test_images)
    assert sorted(kept + held) == sorted(rows(whole.train_images))
    assert not set(kept + held) & set(rows(whole.test_images))
    by_image = dict(zip(rows(whole.train_images), whole.train_labels.tolist()))
    assert [by_image[image] for image in held] == parted.test_labels.tolist()
    assert rows(split(whole, 0.25, seed=3).test_images) == held
    assert rows(split(whole, 0.25, seed=4).test_images) != held
    assert "10 are held out" in parted.source
    for share in (0.0, 1.0):
        with pytest.raises(ValueError, match="above 0 and below 1"):
            split(whole, share)


def expected(network: PruningNet, given: ImageData, recalibration: int, batch: int) -> Score:
    """By hand: one forward in training mode for each batch, the mean of their statistics, then the images."""
    candidate = network.candidate(ENCODING)
    pixels = [data.normalize(x, given.mean, given.std) for x in given.train_images[:recalibration].split(batch)]
    with torch.no_grad():
        for x in pixels:
            candidate.train()(x)
        logits = candidate.eval()(data.normalize(given.test_images, given.mean, given.std))
        loss = nn.functional.cross_entropy(logits.double(), given.test_labels)
    return Score(100 * (logits.argmax(1) == given.test_labels).double().mean().item(), loss.item())


def test_fitness_is_accuracy_after_recalibration() -> None:
    network, given = pruning_net(), images()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    fitness = Fitness(network, given, recalibration=20, batch_size=10)
    score = fitness(ENCODING)
    by_hand = expected(network, given, 20, 10)
    assert score.top1 == pytest.approx(by_hand.top1)
    assert score.loss == pytest.approx(by_hand.loss, rel=1e-5)
    fitness((3, 3, 3))
    assert fitness(ENCODING) == score
    assert all(torch.equal(network.state_dict()[name], tensor) for name, tensor in before.items())
    assert not any(parameter.grad is not None for parameter in network.parameters())


def test_without_recalibration_the_statistics_of_training_count() -> None:
    network, given = pruning_net(), images()
    for _ in range(60):
        network.train()(data.normalize(given.train_images, given.mean, given.std), ENCODING)
    trained = Fitness(network, given, recalibration=0, batch_size=40)(ENCODING)
    recalibrated = Fitness(network, given, recalibration=40, batch_size=40)(ENCODING)
    assert trained.loss == pytest.approx(recalibrated.loss, rel=1e-2)  # both of the same images
    untrained = Fitness(pruning_net(), given, recalibration=0)(ENCODING)
    assert abs(untrained.loss - recalibrated.loss) > 0.02


class OutOfMemory:
    """A network's forward that has memory for so many images only."""

    def __init__(self, limit: int, error: Exception) -> None:
        self.limit, self.error, self.batches = limit, error, list[int]()

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.batches.append(len(inputs[0]))
        if len(inputs[0]) > self.limit:
            raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_halves_the_batch_and_goes_on(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    network, given, said = pruning_net(), images(), list[str]()
    memory = OutOfMemory(10, error)
    made = PruningNet.candidate

    def candidate(*arguments: object, **options: object) -> DescribedNetwork:
        model = made(*arguments, **options)  # type: ignore[arg-type]
        model.register_forward_pre_hook(memory)
        return model

    monkeypatch.setattr(PruningNet, "candidate", candidate)
    fitness = Fitness(network, given, recalibration=40, batch_size=40, tell=said.append)
    score = fitness(ENCODING)
    assert fitness.batch_size == 10
    assert said == ["out of memory: going on in batches of 20", "out of memory: going on in batches of 10"]
    assert memory.batches == [40, 20, 10, 10, 10, 10, 10, 2]
    monkeypatch.undo()
    assert score == Fitness(network, given, recalibration=40, batch_size=10)(ENCODING)


def test_other_errors_and_a_lack_of_memory_for_one_image_are_raised() -> None:
    network, given = pruning_net(), images()
    fitness = Fitness(network, given, recalibration=4, batch_size=1, tell=lambda _: None)
    with pytest.raises(ValueError, match="tiny has 3 genes"):
        fitness((1, 2))
    handle = nn.modules.module.register_module_forward_pre_hook(OutOfMemory(0, MemoryError()))
    try:
        with pytest.raises(MemoryError):
            fitness(ENCODING)
    finally:
        handle.remove()
    with pytest.raises(ValueError, match="batch_size must be at least 1, recalibration 0; got 0 and 5"):
        Fitness(network, given, recalibration=5, batch_size=0)


def test_computing_in_bfloat16_gives_nearly_the_same() -> None:
    network, given = pruning_net(), images()
    options = {"recalibration": 40, "batch_size": 20}
    wide = Fitness(network, given, **options)(ENCODING)
    narrow = Fitness(network, given, **options, dtype=torch.bfloat16, memory_format=torch.channels_last)(ENCODING)
    assert narrow.loss == pytest.approx(wide.loss, rel=0.05)
    assert narrow != wide
