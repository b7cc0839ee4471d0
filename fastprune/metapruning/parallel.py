"""Encodings evaluated in several processes, on as many GPUs or machines, by Ray."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ..data import ImageData
from .encoding import Encoding
from .fitness import Fitness, Score
from .pruning_net import PruningNet
from .training import PruningTrainer

_LOSSES_ALLOWED = 3  # of workers, over one encoding


class Worker:
    """What runs in a worker: a PruningNet and the images."""

    def __init__(self, network: str, weights: Mapping[str, Any], images: Mapping[str, Any], options: Mapping[str, Any]):
        settings = dict(options)
        torch.set_num_threads(settings.pop("threads"))
        device = settings.pop("device")
        model = PruningNet(network, len(images["classes"]))
        model.load_state_dict(weights)
        settings["tell"] = lambda line: print(line, file=sys.stderr)
        self.fitness = Fitness(model.to(device), ImageData(**images).to(device), **settings)

    def evaluate(self, encoding: Encoding) -> Score:
        """The score of an encoding."""
        return self.fitness(encoding)

    def process(self) -> int:
        """The worker's process."""
        return os.getpid()


class RayEvaluator:
    """Hands encodings to workers, one at a time each, and gives their scores as they come.

    A worker that is lost is replaced, and its encoding evaluated again. No score is given twice.

    Args:
        make_worker: starts a worker, and returns its handle.
        workers: how many.
        batch_size: images at a time; each worker halves its own.

    Attributes:
        lost: workers lost so far.
    """

    def __init__(self, make_worker: Any, workers: int, batch_size: int) -> None:
        self.make_worker = make_worker
        self.batch_size = batch_size
        self.idle = [make_worker() for _ in range(workers)]
        self.lost = 0

    def __call__(self, encodings: Sequence[Encoding]) -> Iterator[tuple[Encoding, Score]]:
        """Give each encoding's score once, as it comes.

        Raises:
            RuntimeError: if an encoding loses several workers, or its evaluation fails.
        """
        import ray

        waiting, losses = list(reversed(encodings)), Counter[Encoding]()
        running: dict[Any, tuple[Any, Encoding]] = {}
        while waiting or running:
            while waiting and self.idle:
                worker, encoding = self.idle.pop(), waiting.pop()
                running[worker.evaluate.remote(encoding)] = worker, encoding
            (ready,), _ = ray.wait(list(running), num_returns=1)
            worker, encoding = running.pop(ready)
            try:
                score = ray.get(ready)
            except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
                self.lost += 1
                losses[encoding] += 1
                if losses[encoding] == _LOSSES_ALLOWED:
                    raise RuntimeError(f"{_LOSSES_ALLOWED} workers were lost over encoding {encoding}") from error
                print(f"a worker was lost: its encoding is evaluated again ({error})", file=sys.stderr)
                self.idle.append(self.make_worker())
                waiting.append(encoding)
            else:
                self.idle.append(worker)
                yield encoding, score


@contextmanager
def ray_evaluator(trainer: PruningTrainer) -> Iterator[RayEvaluator]:
    """Workers for the trained network, on the cluster of ``RAY_ADDRESS``, else on this machine; they go when this ends.

    Raises:
        ImportError: without Ray, saying how to get it.
    """
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ImportError("--workers needs Ray: pip install 'fastprune[search]', or pip install ray") from error
    workers, device = trainer.config.workers, trainer.device.type
    started = not ray.is_initialized()
    if started:
        here = None if os.environ.get("RAY_ADDRESS") else workers
        ray.init(num_cpus=here, include_dashboard=False, log_to_driver=False)
    try:
        fitness = trainer.fitness()
        options = {
            "recalibration": fitness.recalibration,
            "batch_size": fitness.batch_size,
            "mean": fitness.mean,
            "std": fitness.std,
            "dtype": fitness.dtype,
            "memory_format": fitness.memory_format,
            "threads": max(1, torch.get_num_threads() // workers),
            "device": device,
        }
        images = {name: value for name, value in vars(trainer.images.to("cpu")).items() if not name.startswith("_")}
        weights = {name: tensor.cpu() for name, tensor in trainer.network.state_dict().items()}
        # One copy on each machine, whatever the number of workers there.
        shared = [ray.put(value) for value in (weights, images)]
        remote = ray.remote(num_cpus=1, num_gpus=int(device == "cuda"))(Worker)
        yield RayEvaluator(lambda: remote.remote(trainer.config.network, *shared, options), workers, fitness.batch_size)
    finally:
        if started:
            ray.shutdown()
