"""Checks many networks; see the package."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import torch
from tqdm import tqdm

from .checks import Finding
from .coverage import table
from .draw import draw
from .shrink import shrunk
from .worker import checked


def _tell(seed: int, finding: Finding, small: bool) -> None:
    program = draw(seed)
    if small:
        program = shrunk(program, finding)
    text = f"\n--seed {seed} --networks 1: {finding}\n{program.pruning}, inputs {program.inputs}\n{program.source()}"
    tqdm.write(text)


def main() -> int:
    """Check the networks that were asked for; 1 if something was found."""
    parser = argparse.ArgumentParser(prog="python -m tests.random_networks", description=__doc__)
    parser.add_argument("--networks", type=int, default=1000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="the first one's number")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--most", type=int, default=10, help="findings of one kind that are told")
    parser.add_argument("--no-shrink", action="store_true", help="tell whole networks")
    parser.add_argument("--coverage", action="store_true", help="tell in how many networks each kind and argument is")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    counts: Counter[str] = Counter()
    covered: Counter[str] = Counter()
    found: Counter[Finding] = Counter()
    refusals: Counter[str] = Counter()
    seeds = range(options.seed, options.seed + options.networks)
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        results = pool.map(checked, seeds, chunksize=8) if options.jobs > 1 else map(checked, seeds)
        for seed, result, used in tqdm(results, total=len(seeds), unit="network", dynamic_ncols=True):
            counts += result.counts
            covered.update(used)
            counts["refused"] += bool(result.refusals)
            refusals.update(text.partition(":")[2].strip()[:100] for text in result.refusals[:1])
            counts["with a finding"] += bool(result.findings)
            for finding in dict.fromkeys(result.findings):
                found[finding] += 1
                if found[finding] <= options.most:
                    _tell(seed, finding, not options.no_shrink)
    if options.coverage:
        print(table(covered, len(seeds)))
    print(
        f"{len(seeds):,} networks in {time.perf_counter() - start:,.0f} s: "
        + ", ".join(f"{k} {v:,}" for k, v in counts.items())
    )
    for text, count in refusals.most_common(8):
        print(f"refused {count:5,}: {text}")
    for finding, count in found.most_common():
        print(f"found {count:5,}: {finding.stage} {finding.kind}")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
