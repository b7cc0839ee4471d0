"""Workers of Ray give the scores of this process; the encoding of a lost one is evaluated again, and none twice."""

import dataclasses
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from fastprune import data
from fastprune.metapruning import Encoding
from fastprune.metapruning.evaluation import evaluator
from fastprune.metapruning.fitness import split
from fastprune.metapruning.parallel import RayEvaluator, ray_evaluator
from fastprune.metapruning.settings import RECIPES
from fastprune.metapruning.training import PruningTrainer

ray = pytest.importorskip("ray", reason="Ray is an extra: pip install 'fastprune[search]'")
pytestmark = pytest.mark.slow  # starting a cluster takes a while

CONFIG = dataclasses.replace(
    RECIPES["quick"], batch_size=8, recalibration=16, evaluation_batch=8, workers=2, precision="fp32", device="cpu"
)
ENCODINGS: list[Encoding] = [(i, *(3 * j % 31 for j in range(11))) for i in range(8)]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """Two workers' worth of processors on this machine."""
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def trainer() -> PruningTrainer:
    torch.set_num_threads(1)
    images = split(data.embedded(train=40, test=10).resize(8), 0.4)
    return PruningTrainer(CONFIG, images)


@pytest.mark.usefixtures("cluster")
def test_two_workers_give_the_scores_of_one_process(trainer: PruningTrainer) -> None:
    here = {encoding: trainer.fitness()(encoding) for encoding in ENCODINGS}
    with evaluator(trainer) as evaluate:
        assert isinstance(evaluate, RayEvaluator)
        found = list(evaluate(ENCODINGS))
    assert len(found) == len(ENCODINGS)
    for encoding, score in found:
        assert score.top1 == here[encoding].top1
        assert score.loss == pytest.approx(here[encoding].loss, rel=1e-5)


@pytest.mark.usefixtures("cluster")
def test_a_lost_workers_encoding_is_evaluated_again_and_nothing_twice(
    trainer: PruningTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    with ray_evaluator(trainer) as evaluate:
        doomed = evaluate.idle[-1]  # the one that is given work first
        os.kill(ray.get(doomed.process.remote()), signal.SIGKILL)
        found = list(evaluate(ENCODINGS))
    assert sorted(encoding for encoding, _ in found) == sorted(ENCODINGS)
    assert evaluate.lost == 1
    assert "evaluated again" in capsys.readouterr().err


class Cursed:
    """A worker that dies of one encoding."""

    def evaluate(self, encoding: Encoding) -> Any:
        if encoding == ENCODINGS[3]:
            os.kill(os.getpid(), signal.SIGKILL)
        return encoding


@pytest.mark.usefixtures("cluster")
def test_an_encoding_that_kills_its_workers_ends_the_search() -> None:
    remote = ray.remote(num_cpus=1)(Cursed)
    evaluate = RayEvaluator(remote.remote, 2, 8)
    with pytest.raises(RuntimeError, match="3 workers were lost over encoding"):
        list(evaluate(ENCODINGS))
