"""The BatchNorm behind each convolution of a model."""

import warnings

from torch import fx, nn

from .nn import MaskedConv2d


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, MaskedConv2d) or super().is_leaf_module(m, module_qualified_name)


def following_batchnorms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """The BatchNorm that reads each convolution's output, by the convolution's name.

    Read off the graph of the model (torch.fx). A model that cannot be traced is read in the order its modules are
    registered, with a warning: the next BatchNorm of as many channels, if no other convolution comes first.
    """
    modules = dict(model.named_modules())
    try:
        graph = _Tracer().trace(model)
    except Exception as error:  # tracing runs the user's code: anything may come
        warnings.warn(
            f"the model cannot be traced ({error}): "
            f"the BatchNorm behind each convolution is taken from the modules' order",
            stacklevel=3,
        )
        return _batchnorms_in_order(modules)
    found = {}
    for node in graph.nodes:
        if node.op == "call_module" and isinstance(modules[node.target], nn.Conv2d):
            for user in node.users:
                after = modules.get(user.target) if user.op == "call_module" else None
                if isinstance(after, nn.BatchNorm2d):
                    found[node.target] = after
    return found


def _batchnorms_in_order(modules: dict[str, nn.Module]) -> dict[str, nn.BatchNorm2d]:
    found: dict[str, nn.BatchNorm2d] = {}
    last: tuple[str, nn.Conv2d] | None = None
    for name, module in modules.items():
        if isinstance(module, nn.Conv2d):
            last = (name, module)
        elif isinstance(module, nn.BatchNorm2d) and last and module.num_features == last[1].out_channels:
            found[last[0]] = module
            last = None
    return found
