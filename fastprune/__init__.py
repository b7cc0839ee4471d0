"""fastprune: dynamic filter pruning with decorrelation regularisation."""

from . import distributed, metapruning, ops, optim
from .accelerate import accelerate
from .compact import compact
from .cost import cost
from .decorrelation import Decorrelation
from .network_file import NetworkFileError, load, save
from .nn import MaskedConv2d
from .ops import backends, set_backend
from .pruner import FilterPruner, WeightPruner

__version__ = "0.1.0"
__all__ = [
    "Decorrelation",
    "FilterPruner",
    "MaskedConv2d",
    "NetworkFileError",
    "WeightPruner",
    "__version__",
    "accelerate",
    "backends",
    "compact",
    "cost",
    "distributed",
    "load",
    "metapruning",
    "ops",
    "optim",
    "save",
    "set_backend",
]
