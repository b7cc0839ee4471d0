"""What the bench prints: one table of all ops, and the ratios that are promised."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from layers import Work
from peaks import Peaks
from rows import OURS, Row

from fastprune.precision import NOISE

# (op, network, rival, how many times as fast at least), by the instruction set of the CPU's ops. Of every other op,
# plain PyTorch must not be faster on ResNet-56, at any instruction set.
EXPECTED: dict[str, list[tuple[str, str, str, float]]] = {
    "avx512": [
        ("update_filter_masks_", "resnet50", "original", 30.0),
        ("update_filter_masks_", "resnet50", "pytorch", 3.0),
        ("covariance fwd+bwd", "resnet56", "pytorch", 2.0),
        ("covariance fwd+bwd", "resnet50", "pytorch", 2.0),
    ],
    "avx2": [
        ("update_filter_masks_", "resnet50", "original", 10.0),
        ("update_filter_masks_", "resnet50", "pytorch", 2.0),
        ("covariance fwd+bwd", "resnet56", "pytorch", 2.0),
        ("covariance fwd+bwd", "resnet50", "pytorch", 1.5),
    ],
}


@dataclass(frozen=True)
class Result:
    """One timed rival."""

    op: str
    network: str
    row: Row
    seconds: float  # median
    work: Work

    def rates(self, peaks: Peaks | None) -> dict[str, float]:
        """Its rates, and the shares that they are of the peaks, in percent."""
        bytes_per_s, flop_per_s = self.work.bytes / self.seconds, self.work.flops / self.seconds
        rates = {"gb_per_s": bytes_per_s / 1e9, "gflop_per_s": flop_per_s / 1e9}
        if peaks:
            rates["copy_percent"] = 100 * bytes_per_s / peaks.bytes_per_s
            rates["tf32_percent"] = 100 * flop_per_s / peaks.tf32_flop_per_s
            rates["bf16_percent"] = 100 * flop_per_s / peaks.bf16_flop_per_s
        return rates


def table(results: list[Result], peaks: Peaks | None) -> Iterator[str]:
    """A line for each result; with peaks, its shares of them."""
    width = max(22, *(len(str(result.row)) + 2 for result in results))
    shares = f"{'% copy':>8}{'% TF32':>8}{'% BF16':>8}" if peaks else ""
    yield f"{'op':<28}{'network':<10}{'rival':<{width}}{'median ms':>10}{'GB/s':>8}{'GFLOP/s':>9}{'× ours':>8}{shares}"
    for result in results:
        ours = fastest(results, result.op, result.network, OURS, result.row.mode)
        rates = list(result.rates(peaks).values())
        yield (
            f"{result.op:<28}{result.network:<10}{result.row!s:<{width}}{result.seconds * 1e3:>10.3f}"
            f"{rates[0]:>8.1f}{rates[1]:>9.1f}{result.seconds / ours if ours else float('nan'):>8.2f}"
            + "".join(f"{share:>8.1f}" for share in rates[2:])
        )


def fastest(results: list[Result], op: str, network: str, rival: str, mode: str = "eager") -> float | None:
    """The seconds of the fastest of the rivals, by the beginning of their names."""
    times = [
        r.seconds
        for r in results
        if (r.op, r.network, r.row.mode) == (op, network, mode) and r.row.label.startswith(rival)
    ]
    return min(times, default=None)


def verdicts(results: list[Result], isa: str) -> Iterator[str]:
    """PASS or FAIL for each ratio this project promises on the CPU, of what was timed in this run.

    Args:
        results: what was timed.
        isa: the instruction set that it was timed at.
    """
    expected = EXPECTED.get(isa, [])
    ops_timed = dict.fromkeys(result.op for result in results)
    promised = {op for op, network, rival, _ in expected if (network, rival) == ("resnet56", "pytorch")}
    others = [(op, "resnet56", "pytorch", 1.0) for op in ops_timed if op not in promised]
    for op, network, rival, at_least in [*expected, *others]:
        ours, theirs = fastest(results, op, network, OURS), fastest(results, op, network, rival)
        if ours is None or theirs is None:
            continue  # not part of this run (-k)
        ratio = theirs / ours
        verdict = "PASS" if ratio >= at_least else "FAIL"
        yield f"{verdict}  {op:<28}{network:<10}{ratio:>7.2f}× {rival} (expected ≥ {at_least:g}×)"


def verify_precision(chosen: str, seconds: dict[str, float]) -> None:
    """Fail where another precision than the chosen one is faster by more than noise."""
    for other, theirs in seconds.items():
        slower = seconds[chosen] / theirs
        assert slower <= NOISE, f"auto chose {chosen}, in which a step takes {slower:.2f} times as long as in {other}"
