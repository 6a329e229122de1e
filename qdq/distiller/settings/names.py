"""Names of layers as files have them: without the `module.` of a wrapper for several devices."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.conv import _ConvNd

WEIGHTED = (_ConvNd, nn.Linear, nn.Embedding)
"""The layers whose weights have settings."""

_WRAPPED = "module"  # the only child of `nn.DataParallel` and `DistributedDataParallel`


def plain_names(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model by their names without the wrapper around the model; the model itself is left out.

    Only the wrapper's own prefix is removed: `my_module.conv` and `features.module.0` are names like any other.

    Args:
        model: The model, wrapped or not.
    """
    prefix = f"{_WRAPPED}." if is_wrapper(model) else ""
    modules = {}
    for name, module in model.named_modules():
        plain = name.removeprefix(prefix)
        if plain and name != prefix.removesuffix("."):
            modules[plain] = module
    return modules


def find_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model by their plain names: the modules that compute something themselves.

    These are the modules without children. A convolution or linear layer is one layer, also if it has children, such as
    the padding of a convolution with its own forward.

    Args:
        model: The model, wrapped or not.
    """
    layers: dict[str, nn.Module] = {}
    inside: tuple[str, ...] = ()
    for name, module in plain_names(model).items():
        if inside and name.startswith(inside):
            continue
        if is_layer(module):
            layers[name] = module
            inside = (*inside, f"{name}.")
    return layers


def is_layer(module: nn.Module) -> bool:
    """Whether a module is one layer, see `find_layers`.

    Args:
        module: Any module.
    """
    return isinstance(module, WEIGHTED) or next(module.children(), None) is None


def is_wrapper(model: nn.Module) -> bool:
    """Whether a module has one child alone, which is called `module`."""
    children = [name for name, _ in model.named_children()]
    return children == [_WRAPPED]
