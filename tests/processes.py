"""Two processes that train together: started once, then handed one function after another."""

import contextlib
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

SIZE = 2
_PATIENCE_S = 120


class Processes:
    """As ``torchrun`` starts them: joined through gloo, one thread each."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        pipes = [context.Pipe() for _ in range(SIZE)]
        self.ends = [ours for ours, _ in pipes]
        self.processes = [
            context.Process(target=_serve, args=(rank, theirs, str(folder / "store")), daemon=True)
            for rank, (_, theirs) in enumerate(pipes)
        ]
        for process in self.processes:
            process.start()

    def attempt(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` returned, or the exception that it raised, in each process."""
        for end in self.ends:
            end.send((function, arguments))
        answers = []
        for rank, end in enumerate(self.ends):
            if not end.poll(_PATIENCE_S):
                raise TimeoutError(f"process {rank} did not come back from {function.__name__}")
            answers.append(end.recv())
        return answers

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What ``function(*arguments)`` returned in each process, none of which may fail."""
        answers = self.attempt(function, *arguments)
        for rank, answer in enumerate(answers):
            if isinstance(answer, Exception):
                raise AssertionError(f"process {rank} failed") from answer
        return answers

    def close(self) -> None:
        for end in self.ends:
            with contextlib.suppress(OSError):
                end.send(None)
        for process in self.processes:
            process.join(10)
            process.kill()


def _serve(rank: int, end: Connection, store: str) -> None:
    torch.set_num_threads(1)
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=SIZE, timeout=timedelta(seconds=60)
    )
    while (task := end.recv()) is not None:
        function, arguments = task
        try:
            answer = function(*arguments)
        except Exception as error:
            error.args = (f"{error}\n{traceback.format_exc()}",)
            error.__cause__ = error.__context__ = None
            answer = error
        try:
            end.send(answer)
        except Exception as error:  # what cannot be sent
            end.send(RuntimeError(f"{answer!r} cannot be sent: {error}"))
    dist.destroy_process_group()
