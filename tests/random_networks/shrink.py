"""The smallest network that still has what was found."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from .checks import Finding, check
from .program import VARIABLE, Program


def shrunk(program: Program, finding: Finding) -> Program:
    """Leave out steps and outputs, as long as the same is found."""
    steps = tuple(replace(step, lines=(line,)) for step in program.steps for line in step.lines)
    program = replace(program, steps=steps)
    while True:
        for candidate in _candidates(program):
            if _has(candidate, finding):
                program = candidate
                break
        else:
            return program


def _has(program: Program, finding: Finding) -> bool:
    try:
        return finding in check(program).findings
    except Exception:  # it is no network
        return False


def _candidates(program: Program) -> Iterator[Program]:
    if len(program.returned) > 1:
        for place in range(len(program.returned)):
            yield replace(program, returned=(program.returned[place],))
    for place in reversed(range(len(program.steps))):
        lines = program.steps[place].lines
        made = [line.partition(" = ")[0] for line in lines if VARIABLE.fullmatch(line.partition(" = ")[0])]
        read = list(
            dict.fromkeys(
                name for line in lines for name in VARIABLE.findall(line.partition(" = ")[2]) if name not in made
            )
        )
        if not any(name in program.returned for name in made):
            yield program.shorter(place, {})
        for source in read[:3] or ["x"]:
            yield program.shorter(place, dict.fromkeys(made, source))
    if program.pruning.argument or program.pruning.round_to > 1:
        yield replace(program, pruning=replace(program.pruning, argument=0, round_to=1))
