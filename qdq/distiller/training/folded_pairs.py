"""Which layers have their BatchNorm folded in training, and their end as one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from qdq.distiller.training.folding import (
    FREEZE_BN_DELAY_DEFAULT,
    SimulatedFoldedBatchNorm,
    fits_batchnorm,
)
from qdq.forward import trace_forward


def find_folded_pairs(model: nn.Module, dummy_input: Any) -> dict[str, str]:
    """Layer -> the BatchNorm that alone reads its output.

    Args:
        model: A float model.
        dummy_input: A batch, as the model is called with.
    """
    trace = trace_forward(model, dummy_input)
    modules: dict[str, Any] = dict(model.named_modules())
    pairs = {}
    for name, reader in trace.only_reader.items():
        bn = modules[reader]
        fits = fits_batchnorm(modules[name], bn) and bn.running_var is not None
        if fits and trace.calls[name] == trace.calls[reader] == 1:
            pairs[name] = reader
    return pairs


def simulate_folding(
    model: nn.Module,
    pairs: Mapping[str, str],
    freeze_bn_delay: int = FREEZE_BN_DELAY_DEFAULT,
) -> None:
    """Fold BatchNorms into layers while both are trained, in place.

    Args:
        model: The model; its layers may be quantized.
        pairs: From `find_folded_pairs`.
        freeze_bn_delay: As for `SimulatedFoldedBatchNorm`.
    """
    for name, reader in pairs.items():
        layer, bn = model.get_submodule(name), model.get_submodule(reader)
        folded = SimulatedFoldedBatchNorm(layer, bn, freeze_bn_delay).train(bn.training)
        model.set_submodule(name, folded)
        model.set_submodule(reader, nn.Identity())


def fold_simulated_batchnorm(model: nn.Module) -> list[str]:
    """Make one layer of each `SimulatedFoldedBatchNorm`, in place, which computes the same in evaluation.

    Args:
        model: A model after training.

    Returns:
        The names of the layers.
    """
    folded = []
    for name, module in list(model.named_modules()):
        if isinstance(module, SimulatedFoldedBatchNorm):
            model.set_submodule(name, module.fold())
            folded.append(name)
    return folded
