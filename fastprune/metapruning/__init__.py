"""MetaPruning: one network that generates weights for any width, and what searches the widths.

Encodings and their costs by arithmetic, the networks' descriptions, PruningNets, evolution. The command is
``python -m fastprune.search``.
"""

from .cost import Cost, Costs, cost, costs
from .description import Block, Conv, Description
from .encoding import CHOICES, SCALES, Encoding, Width
from .network import DescribedNetwork, PlainNetwork
from .networks import NAMES, describe
from .pruning_net import PruningNet

__all__ = [
    "CHOICES",
    "NAMES",
    "SCALES",
    "Block",
    "Conv",
    "Cost",
    "Costs",
    "DescribedNetwork",
    "Description",
    "Encoding",
    "PlainNetwork",
    "PruningNet",
    "Width",
    "cost",
    "costs",
    "describe",
]
