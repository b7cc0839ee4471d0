"""``python -m fastprune.search``: train a PruningNet, evolve encodings within a budget, train the best from scratch."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from . import checkpoint, data, decisions, train
from .data import ImageData
from .memory import is_out_of_memory, shortage
from .metapruning import Encoding, describe
from .metapruning.encoding import as_text
from .metapruning.evaluation import Evaluator, evaluator
from .metapruning.evolution import Evolution, lead_into_budget
from .metapruning.final import final_config
from .metapruning.fitness import split
from .metapruning.latency import TableError, open_table
from .metapruning.nsga2 import ParetoSearch
from .metapruning.plots import plot_search
from .metapruning.rates import encoding_of_run
from .metapruning.settings import SearchConfig, parse
from .metapruning.space import BudgetError, Space
from .metapruning.stage import SearchError, checkpoint_of, load_pruning_net, stopped_early, train_pruning_net
from .metapruning.state import Search, StateError
from .metapruning.summary import budget_line, format_summary, generation_line, search_summary
from .metapruning.training import PruningTrainer, with_precision
from .run_lock import held
from .runlog import write_json
from .train import Interrupted
from .trainer import TrainingError

STATE = "evolution.json"
_SECONDS_BETWEEN_SAVES = 2.0


def main(arguments: list[str] | None = None) -> int:
    """The command line; the exit status is 0, 1 for a search that failed, or 128 + the signal that stopped it."""
    config = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        run(config)
    except Interrupted as stop:
        print(f"{stop}; continue with --resume {config.out}", file=sys.stderr)
        return 128 + stop.signum
    except KeyboardInterrupt:
        print("stopped before the search began", file=sys.stderr)
        return 128 + signal.SIGINT
    except (SearchError, TrainingError, BudgetError, StateError, TableError) as error:
        print(f"fastprune.search: error: {error}", file=sys.stderr)
        return 1
    except (data.DataError, checkpoint.CheckpointError, ImportError, OSError) as error:
        print(f"fastprune.search: error: {error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        advice = f"A smaller --batch-size takes less; what was saved is whole: continue with --resume {config.out}"
        print(f"fastprune.search: error: {shortage(error)}. {advice}", file=sys.stderr)
        return 1
    return 0


def run(config: SearchConfig) -> dict[str, Any]:
    """Do the stages that ``config`` asks for, from where they stand, and return what came out so far.

    That is written to ``summary.json``, too: of each finished stage under ``pruning_net``, ``search`` and ``final``.

    Raises:
        SearchError: where a stage lacks the one before it, or the folder holds another search.
        BudgetError: if no encoding keeps within the budget; before anything is trained.
        TrainingError, StateError, DataError, CheckpointError, OSError: for what cannot be used or go on.
        Interrupted: after a signal, with everything saved.
    """
    with held(config.out):
        return _run(config)


def _run(config: SearchConfig) -> dict[str, Any]:
    if config.resume is None and (config.out / "config.json").exists():
        raise SearchError(
            f"{config.out} holds a search: continue it with --resume {config.out}, or choose another --out"
        )
    images = data.load(config.data, root=config.data_root, image_size=config.image_size, seed=config.seed)
    images = images.subset(config.limit_train, config.limit_test)
    print(images.source)
    config, fresh = with_precision(config, images)
    decided = decisions.merged(fresh, decisions.earlier(config.resume, config))
    for line in decisions.lines(decided):
        print(line)
    space = make_space(config, images)
    search = make_search(config, space)
    config.out.mkdir(parents=True, exist_ok=True)
    described = {"search": config.to_json(), "data_source": images.source, "torch": torch.__version__}
    write_json(config.out / "config.json", described | decisions.stored(decided), "a configuration")
    print(f"{config.network}: {space.genes} genes, budget {budget_line(space)}")
    if config.stage != "final":
        with train.stop_on_signals() as signals:
            trainer = PruningTrainer(config, split(images, config.validation, config.seed))
            if config.stage in ("all", "train") and config.pruning_net is None:
                train_pruning_net(trainer, signals)
            if config.stage in ("all", "evolve") and not stopped_early(trainer):
                load_pruning_net(trainer)
                evolve(trainer, search, signals)
    if config.stage in ("all", "final") and (config.stage == "final" or not stopped_early(trainer)):
        best = finished(search, config.out).best()[0]
        print(f"training {config.network}@{as_text(best)} from scratch")
        train.run(final_config(config, best, config.out / "final"))
    return report(config, space, images)


def make_space(config: SearchConfig, images: ImageData) -> Space:
    """The encodings within the budget; latencies are measured where they matter."""
    resolution, classes = images.train_images.shape[-1], len(images.classes)
    latency = None
    if config.needs_latency:
        latency = open_table(config, resolution, classes)
    return Space(describe(config.network), resolution, classes, config.budget(resolution, classes), latency)


def make_search(config: SearchConfig, space: Space) -> Search:
    """The search at its beginning.

    Raises:
        BudgetError: if nothing keeps within the budget.
        SearchError: if the numbers of the evolution do not go together.
    """
    try:
        settings = Evolution(
            config.population, config.mutations, config.crossovers, config.parents, config.mutation_probability
        )
    except ValueError as error:
        raise SearchError(str(error)) from error
    start = starting_encodings(config, space)
    if config.algorithm == "nsga2":
        return ParetoSearch(space, settings, config.iterations, config.seed, config.objective, start)
    return Search(space, settings, config.iterations, config.seed, start)


def starting_encodings(config: SearchConfig, space: Space) -> list[Encoding]:
    """What the run of ``init_from`` keeps, or near it where that is not within the budget.

    Raises:
        SearchError: if it cannot be read, or is of another network.
    """
    if config.init_from is None:
        return []
    try:
        kept = encoding_of_run(config.init_from, config.network)
    except ValueError as error:
        raise SearchError(f"--init-from: {error}") from error
    return lead_into_budget(np.random.default_rng(config.seed), space, kept)


# ---------------------------------------------------------------------------------------------- the evolution


def evolve(trainer: PruningTrainer, search: Search, signals: list[int]) -> None:
    """Evaluate generation after generation, from the saved state if there is one.

    Raises:
        Interrupted: after a signal.
        StateError: if the state is of another search.
    """
    path = trainer.config.out / STATE
    if path.exists():
        search.load(path)
        print(f"evolution: going on with generation {search.generation}, {len(search.evaluated)} encodings evaluated")
    with evaluator(trainer) as evaluate:
        evaluate.batch_size = search.batch_size or evaluate.batch_size
        while not search.done:
            _evaluate_generation(search, evaluate, path, signals)
            search.advance()
            search.save(path)
            print(generation_line(search), flush=True)


def _evaluate_generation(search: Search, evaluate: Evaluator, path: Path, signals: list[int]) -> None:
    """Evaluate what is pending, saving now and then."""
    pending, saved = search.pending(), time.monotonic()
    bar = tqdm(
        total=len(search.population),
        initial=len(search.population) - len(pending),
        desc=f"generation {search.generation + 1}/{search.iterations}",
        unit="encoding",
        leave=False,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        started = time.perf_counter()
        for encoding, score in evaluate(pending):
            search.record(encoding, score)
            search.batch_size = evaluate.batch_size
            now = time.perf_counter()
            search.seconds, started = search.seconds + now - started, now
            bar.set_postfix(top1=f"{score.top1:.2f}", refresh=False)
            bar.update()
            if signals or time.monotonic() - saved > _SECONDS_BETWEEN_SAVES:
                search.save(path)
                saved = time.monotonic()
            if signals:
                raise Interrupted(signals[0])


def finished(search: Search, run: Path) -> Search:
    """The search as it was saved in a folder.

    Raises:
        SearchError: if it is not at its end.
    """
    if not (run / STATE).exists():
        raise SearchError(f"{run} has no evolution yet: do it with --stage evolve (or all)")
    search.load(run / STATE)
    if not search.done:
        raise SearchError(
            f"the evolution in {run} has finished {search.generation} of {search.iterations} generations: "
            f"go on with --resume {run} --stage evolve"
        )
    return search


# ---------------------------------------------------------------------------------------------- what came out


def report(config: SearchConfig, space: Space, images: ImageData) -> dict[str, Any]:
    """Write, print and draw what the finished stages found."""
    summary: dict[str, Any] = {"network": config.network, "data": images.name, "budget": budget_line(space)}
    metrics = checkpoint_of(config.pruning_net or config.out).parent / "metrics.json"
    if metrics.exists():
        records = json.loads(metrics.read_text(encoding="utf-8"))
        seconds = sum(record["seconds"] for record in records)
        summary["pruning_net"] = {**records[-1], "epochs": config.epochs, "seconds": seconds}
    if (config.out / STATE).exists():
        search = make_search(config, space)
        search.load(config.out / STATE)
        if search.done:
            summary["search"] = search_summary(search)
            costs = space.costs(np.array(list(search.evaluated)))
            metric = next(iter(space.budget), "macs")
            plot_search(
                config.out, space.description, search.evaluated, search.best()[0], costs, metric, search.front()
            )
    final = config.out / "final" / "summary.json"
    if final.exists():
        summary["final"] = json.loads(final.read_text(encoding="utf-8"))
    write_json(config.out / "summary.json", summary, "a summary")
    print(format_summary(summary))
    return summary


if __name__ == "__main__":
    sys.exit(main())
