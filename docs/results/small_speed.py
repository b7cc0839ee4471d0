"""How fast a run's small network is, beside the network it was made of: both measured by turns, in every engine.

    python docs/results/small_speed.py RUN

RUN is the folder of a run with ``--compact-when-frozen``, which leaves the small network in ``model.safetensors``.
"""

import argparse
import json
from pathlib import Path

import torch

import fastprune
from fastprune import models
from fastprune.latency import latency


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--seconds", type=float, default=4.0, help="for each timing")
    options = parser.parse_args()
    name = json.loads((options.run / "config.json").read_text(encoding="utf-8"))["model"]
    images = torch.zeros(1, 3, 32, 32)
    networks = {name: models.create(name).eval(), "small": fastprune.load(options.run / "model.safetensors")}
    macs = {label: fastprune.cost(network, images).macs for label, network in networks.items()}
    print(" · ".join(f"{label} {count:,} MACs" for label, count in macs.items()))
    print(latency(networks, images, seconds=options.seconds))


if __name__ == "__main__":
    main()
