"""What a run tells: a bar or lines while it goes, and the files of its folder."""

import importlib.util
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from . import distributed
from .checkpoint import write_atomically
from .report import LAYER_FIELDS


def write_json(path: Path, value: Any, what: str) -> None:
    """Write ``value`` as readable JSON, atomically."""
    write_atomically(path, [(json.dumps(value, indent=2, allow_nan=False) + "\n").encode()], what=what)


def duration(seconds: float) -> str:
    """Seconds for people: ``42 s``, ``7 min``, ``3 h 05 min``."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


class Progress:
    """A bar on a terminal; elsewhere a line now and then, and an estimate of the whole run after its first steps.

    Args:
        epochs, steps_per_epoch: of the whole run.
        step: where the run starts or goes on.
        limit: the step at which it will stop.
    """

    _SECONDS_BETWEEN_LINES = 30.0
    _WARM_UP, _SAMPLE = 3, 8  # the first steps are slow; the next ones are timed for the estimate

    def __init__(self, epochs: int, steps_per_epoch: int, step: int, limit: int) -> None:
        self.epochs, self.steps_per_epoch, self.first, self.limit = epochs, steps_per_epoch, step, limit
        self.bar: tqdm | None = None
        self.terminal = sys.stderr.isatty() and distributed.is_first()
        self.last_line = time.monotonic()
        self.started = 0.0

    def start_epoch(self, epoch: int, done: int) -> None:
        """Begin epoch ``epoch`` (0-based), of which ``done`` steps are behind."""
        if self.terminal:
            label = f"epoch {epoch + 1}/{self.epochs}"
            self.bar = tqdm(total=self.steps_per_epoch, initial=done, desc=label, unit="step", leave=False)

    def step(self, step: int, loss: float | None) -> None:
        """Count step ``step`` (from 1, over the whole run); ``loss`` is the running mean, where it is known."""
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update()
            if loss is not None:
                self.bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
        elif now - self.last_line > self._SECONDS_BETWEEN_LINES and loss is not None:
            self.last_line = now
            epoch, done = divmod(step - 1, self.steps_per_epoch)
            self.say(f"epoch {epoch + 1}/{self.epochs}  step {done + 1}/{self.steps_per_epoch}  loss {loss:.3f}")
        behind = step - self.first
        if behind == self._WARM_UP:
            self.started = now
        elif behind == self._WARM_UP + self._SAMPLE:
            seconds = (now - self.started) / self._SAMPLE * (self.limit - step)
            self.say(f"about {duration(seconds)} of training left (tests not counted)")

    def end_epoch(self) -> None:
        """Take the bar away."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if self.bar is not None:
            self.bar.write(line)
        else:
            print(line, flush=True)


class RunLog:
    """The files of a run folder: ``config.json``, ``metrics.jsonl`` and, if TensorBoard is installed, its events.

    Of several processes the first one writes them, the others only keep the records.

    Args:
        folder: made if missing.
        described: written to ``config.json``.
        records: of the epochs before, where a run goes on.

    Attributes:
        records: of the epochs so far.

    Raises:
        OSError: where a file cannot be written.
    """

    def __init__(self, folder: Path, described: Mapping[str, Any], records: Sequence[dict[str, Any]] = ()) -> None:
        self.folder = folder
        self.records = list(records)
        self.board: Any = None
        if not distributed.is_first():
            return
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / "config.json", described, "a configuration")
        self._write()
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(folder), purge_step=len(self.records) + 1)

    def add(self, record: dict[str, Any]) -> None:
        """Append an epoch's record."""
        self.records.append(record)
        if distributed.is_first():
            self._write()
        if self.board is not None:
            for split in ("train", "test"):
                for name, value in record[split].items():
                    self.board.add_scalar(f"{split}/{name}", value, record["epoch"])
            for name in ("penalty", "sparsity", "kept_filters", "lr", "images_per_s"):
                self.board.add_scalar(name, record[name], record["epoch"])
            self.board.flush()

    def _write(self) -> None:
        # The layers' names and sizes stand on the first line only; reading them back repeats them.
        later = [{k: v for k, v in record.items() if k not in LAYER_FIELDS} for record in self.records[1:]]
        lines = [(json.dumps(record, allow_nan=False) + "\n").encode() for record in [*self.records[:1], *later]]
        write_atomically(self.folder / "metrics.jsonl", lines, what="metrics")
