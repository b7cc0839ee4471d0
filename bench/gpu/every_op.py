"""Calls every op once in each implementation and layout, for compute-sanitizer to watch; results are checked, too."""

from __future__ import annotations

import argparse
import sys

import cases
import rows
import test_gpu
import torch
from device import CudaDevice


def main() -> int:
    """The exit status is 1 if a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fake", action="store_true", help="on the fake device, where there is no GPU")
    fake = parser.parse_args().fake
    if not fake and not torch.cuda.is_available():
        parser.error(f"torch {torch.__version__} sees no GPU")
    device, wrong = test_gpu.DEVICES[0], 0
    for name, (served, _) in test_gpu.CALLS.items():
        for implementation, backend in rows.implementations(device, served).items():
            for layout in cases.LAYOUTS:
                with rows.chosen(backend):
                    verdict = called(name, layout, device)
                print(f"{name} {implementation} {layout}: {verdict}", flush=True)
                wrong += verdict != "ok"
                if verdict != "ok" and not answers(device):
                    return 1
    return 1 if wrong else 0


def called(name: str, layout: str, device: CudaDevice) -> str:
    """Call it and compare; `ok`, or what is wrong."""
    seed = test_gpu.seed_of(name)
    try:
        test_gpu.assert_right(test_gpu.CALLS[name][1](arranged(name, layout, device)), name, seed, device)
    except AssertionError as error:
        return f"WRONG: {error}"
    except Exception as error:  # whatever it is: the other ops are to be tried, too
        return f"FAILED: {type(error).__name__}: {error}"
    return "ok"


def answers(device: CudaDevice) -> bool:
    """Whether the device still does: after some errors it takes no more launches of this process."""
    try:
        device.synchronize()
    except RuntimeError as error:
        print(f"the others were not called: {error}", flush=True)
        return False
    return True


def arranged(name: str, layout: str, device: CudaDevice) -> test_gpu.Inputs:
    """The op's inputs on the device in that layout, each in an allocation of its own."""
    there = test_gpu.inputs(test_gpu.seed_of(name)).to(device.name)
    for field in ("weights", "upstream", "params", "momenta", "masked"):
        tensors = getattr(there, field)
        tensors[:] = [cases.arranged(tensor, layout) for tensor in tensors]
    return there


if __name__ == "__main__":
    sys.exit(main())
