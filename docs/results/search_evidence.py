"""The evidence for ``fastprune.search``: what a search is worth, and what recalibration is worth, on real images.

    python docs/results/search_evidence.py --data DATA --out runs/search-evidence

1. A PruningNet for ResNet-20, and an evolution within 45 to 50 % of its multiply-accumulates.
2. The best encoding, and the uniform network nearest to its multiply-accumulates, each trained from scratch with the
   same recipe and seeds: the difference, with its standard deviation.
3. Kendall's τ between the fitness of encodings and their test accuracy after training, with recalibration and without.
4. The time for a candidate, beside the original way's: a network built to count FLOPs, and whole weight tensors
   generated in every forward pass to be sliced.

Stop it whenever you like: the same command goes on. What is finished is not done again. Results are printed, and
written to ``OUT/evidence.json``, part by part.
"""

import argparse
import dataclasses
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from fastprune import checkpoint, data, search, train
from fastprune.metapruning import Encoding, PlainNetwork
from fastprune.metapruning.encoding import as_text
from fastprune.metapruning.evolution import random_encodings
from fastprune.metapruning.final import final_config
from fastprune.metapruning.fitness import Fitness, split
from fastprune.metapruning.hyper import HyperConv2d
from fastprune.metapruning.ranking import kendall_tau
from fastprune.metapruning.settings import SearchConfig, read_config
from fastprune.metapruning.space import Space
from fastprune.metapruning.stage import checkpoint_of
from fastprune.metapruning.training import PruningTrainer
from fastprune.runlog import write_json


def configuration(options: argparse.Namespace) -> SearchConfig:
    """The search: as in the paper, shorter."""
    return SearchConfig(
        recipe="quick",
        out=options.out / "search",
        network="resnet20",
        data=options.data,
        epochs=options.epochs,
        batch_size=128,
        lr=options.lr,
        schedule="one-cycle",
        population=50,
        iterations=options.iterations,
        recalibration=2048,
        evaluation_batch=256,
        validation=0.05,
        min_macs="45%",
        max_macs="50%",
        final_epochs=options.final_epochs,
        final_batch_size=128,
        final_lr=0.2,
    )


def accuracy(config: SearchConfig, encoding: Encoding, seed: int, out: Path) -> float:
    """Test top-1 of an encoding's network after training from scratch; trained once."""
    run = out / f"{as_text(encoding)}-seed{seed}"
    summary = run / "summary.json"
    if not summary.exists():
        train.run(final_config(dataclasses.replace(config, seed=seed), encoding, run))
    return float(json.loads(summary.read_text(encoding="utf-8"))["last"]["test"]["top1"])


def train_all(config: SearchConfig, wanted: Sequence[tuple[Encoding, int]], out: Path, workers: int) -> list[float]:
    """The accuracies of encodings and seeds, trained by several processes with a thread each.

    Two such processes train small networks more than twice as fast as one with two threads does.
    """
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), torch.set_num_threads, (1,))
    with pool:
        futures = [pool.submit(accuracy, config, encoding, seed, out) for encoding, seed in wanted]
        return [future.result() for future in futures]


def trained(config: SearchConfig) -> PruningTrainer:
    """The PruningNet, loaded."""
    images = data.load(config.data, root=config.data_root, image_size=config.image_size, seed=config.seed)
    trainer = PruningTrainer(config, split(images, config.validation, config.seed))
    trainer.load_state_dict(checkpoint.load(checkpoint_of(config.out), str(trainer.device)))
    return trainer


def compare(config: SearchConfig, space: Space, best: Encoding, seeds: int, out: Path, workers: int) -> dict[str, Any]:
    """The best encoding and the uniform one, over the seeds."""
    uniform = space.uniform("macs", space.costs_of(best)["macs"])
    wanted = [(encoding, seed) for encoding in (best, uniform) for seed in range(seeds)]
    accuracies = train_all(config, wanted, out, workers)
    found: dict[str, Any] = {}
    for name, encoding, top1 in (("best", best, accuracies[:seeds]), ("uniform", uniform, accuracies[seeds:])):
        found[name] = {
            "encoding": list(encoding),
            "macs": space.costs_of(encoding)["macs"],
            "top1": top1,
            "mean": statistics.fmean(top1),
            "sd": statistics.stdev(top1) if seeds > 1 else None,
        }
    differences = [one - other for one, other in zip(found["best"]["top1"], found["uniform"]["top1"])]
    found["difference"] = statistics.fmean(differences)
    found["difference_sd"] = statistics.stdev(differences) if seeds > 1 else None
    return found


def rank(trainer: PruningTrainer, among: Space, count: int, out: Path, workers: int) -> dict[str, Any]:
    """Kendall's τ of fitness and accuracy over random encodings."""
    encodings = random_encodings(np.random.default_rng(7), among, count, ())
    after = train_all(trainer.config, [(encoding, 0) for encoding in encodings], out, workers)
    fitness = {
        "recalibrated": [trainer.fitness()(encoding).top1 for encoding in encodings],
        "not recalibrated": [trainer.fitness(recalibration=0)(encoding).top1 for encoding in encodings],
    }
    taus = {way: kendall_tau(values, after) for way, values in fitness.items()}
    return {
        "encodings": [list(encoding) for encoding in encodings],
        "top1_after_training": after,
        "fitness": fitness,
        "kendall_tau": {way: None if tau != tau else tau for way, tau in taus.items()},
    }


@torch.no_grad()
def evaluate_the_original_way(trainer: PruningTrainer, fitness: Fitness, encoding: Encoding) -> None:
    """Build the network to count its FLOPs in a forward pass; generate all weights in every pass, and slice them."""
    side = trainer.images.train_images.shape[-1]
    counted = PlainNetwork(trainer.network.description, encoding, len(trainer.images.classes)).to(trainer.device).eval()
    flops = 0

    def count(_: Any, __: Any, output: torch.Tensor) -> None:
        nonlocal flops
        flops += output.numel()

    for module in counted.modules():
        module.register_forward_hook(count)
    counted(torch.rand(1, 3, side, side, device=trainer.device))
    network = trainer.network
    with torch.autocast(trainer.device.type, fitness.dtype, enabled=fitness.dtype != torch.float32):
        network.train()
        for images in trainer.images.train_images[: fitness.recalibration].split(fitness.batch_size):
            network(fitness._normalized(images), encoding)
        network.eval()
        for images in trainer.images.test_images.split(fitness.batch_size):
            network(fitness._normalized(images), encoding)


def generate_everything(hyper: HyperConv2d, dtype: torch.dtype, memory_format: torch.memory_format) -> torch.Tensor:
    """The weight, of which all is generated."""
    hidden = functional.relu(hyper.fc1(hyper.table[hyper.positions]))
    whole = hyper.fc2(hidden).view(hyper.shape).to(dtype)
    inputs = 1 if hyper.conv.depthwise else hyper.conv.inputs.channels(hyper.encoding)
    return whole[: hyper.conv.outputs.channels(hyper.encoding), :inputs].contiguous(memory_format=memory_format)


def times(trainer: PruningTrainer, space: Space, count: int) -> dict[str, float]:
    """Seconds for a candidate, both ways, taken in turns."""
    fitness = trainer.fitness()
    ours, original = [], []
    for encoding in random_encodings(np.random.default_rng(1), space, count + 1, ()):
        started = time.perf_counter()
        space.within(np.array([encoding]))
        fitness(encoding)
        ours.append(time.perf_counter() - started)
        generate, HyperConv2d.generate = HyperConv2d.generate, generate_everything  # type: ignore[method-assign]
        try:
            started = time.perf_counter()
            evaluate_the_original_way(trainer, fitness, encoding)
            original.append(time.perf_counter() - started)
        finally:
            HyperConv2d.generate = generate  # type: ignore[method-assign]
    return {  # without the first, which warms up
        "seconds_per_candidate": statistics.median(ours[1:]),
        "seconds_per_candidate_original_way": statistics.median(original[1:]),
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="cifar10")
    parser.add_argument("--out", type=Path, default=Path("runs/search-evidence"))
    parser.add_argument("--epochs", type=int, default=20, help="of the PruningNet")
    parser.add_argument("--lr", type=float, default=0.1, help="of the PruningNet")
    parser.add_argument("--iterations", type=int, default=20, help="generations of 50")
    parser.add_argument("--final-epochs", type=int, default=5, help="of each network trained from scratch")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--encodings", type=int, default=8, help="of each rank correlation")
    parser.add_argument("--workers", type=int, default=2, help="processes that train networks from scratch")
    parser.add_argument("--timed", type=int, default=20, help="candidates to time")
    return parser.parse_args()


def main() -> None:
    """Do all of it, or go on with it."""
    options = parse()
    config = configuration(options)
    if (config.out / "config.json").exists():
        config = dataclasses.replace(config, resume=config.out, precision=read_config(config.out).precision)
    search.run(dataclasses.replace(config, stage="train"))
    config = dataclasses.replace(config, precision=read_config(config.out).precision)  # which the first run decided
    summary = search.run(dataclasses.replace(config, stage="evolve", resume=config.out))
    trainer = trained(config)
    space = search.make_space(config, trainer.images)
    everything = Space(space.description, space.resolution, space.num_classes)
    best = tuple(summary["search"]["best"])
    folder, workers = options.out / "trained", options.workers
    parts: dict[str, Callable[[], Any]] = {
        "times": lambda: times(trainer, space, options.timed),
        "comparison": lambda: compare(config, space, best, options.seeds, folder, workers),
        "rank, any cost": lambda: rank(trainer, everything, options.encodings, folder, workers),
        "rank, within the budget": lambda: rank(trainer, space, options.encodings, folder, workers),
    }
    result = options.out / "evidence.json"
    evidence = json.loads(result.read_text(encoding="utf-8")) if result.exists() else {}
    evidence |= {"search": summary["search"], "final_epochs": config.final_epochs}
    for name, part in parts.items():
        if name not in evidence:
            evidence[name] = part()
            write_json(result, evidence, "the evidence")
        shown = {key: value for key, value in evidence[name].items() if key not in ("fitness", "encodings")}
        print(name, json.dumps(shown, indent=2), flush=True)


if __name__ == "__main__":
    main()
