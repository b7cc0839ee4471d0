"""fastprune: dynamic filter pruning with decorrelation regularisation."""

from . import ops
from .ops import backends, set_backend

__version__ = "0.1.0"
__all__ = ["__version__", "backends", "ops", "set_backend"]
