"""An estimate of the error of every unit, from one forward and one backward.

Each unit makes an error e at one point of the model: the output of its layer in int8 minus that in float, on the same
input. To first order it adds J e to the error of the outputs, with J the derivative of the outputs with respect to that
point. A backward pass gives J^T v for one v, and with it the product v . J e = (J^T v) . e, without J.

- "one-at-a-time": the model is in float and v is random with variance 1. Then the mean of (v . J e)^2 is the energy of
  J e. If errors of different channels are independent (each channel has its own weights), this energy is the sum of
  the energies of the channels. So a single draw of v is enough: the sum is a mean over many squares.
- "leave-one-out": the model is in int8 and v = E, the error of its outputs. Without a unit E becomes E - J e, and its
  energy falls by 2 E . J e minus the energy of J e. E is the sum of the errors of all units. If these are independent,
  the energy of J e is E . J e, and so the energy falls by E . J e.

Half of the batches are enough for either mode.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map

from qdq.analyze.gradients import recording_recurrence
from qdq.analyze.sensitivity import ErrorSums
from qdq.batch import count_samples, floats_of
from qdq.device import read_numbers
from qdq.forward import call_model, evaluating
from qdq.nn import QuantInputMixin
from qdq.nn.functions import run_again
from qdq.outputs import ALL_OUTPUTS, OutputView, clear_padding
from qdq.quantizer import TensorQuantizer, disable_quantization, named_quantizers, toggling
from qdq.units import Unit
from qdq.work import freezing_parameters

_Energies = dict[str, torch.Tensor]  # float64, on the devices of the units until all are known
_LEAST_NOISE = 1e-3  # smallest fraction of the noise that remains when a unit is removed


def screen_units(
    model: nn.Module,
    batches: Sequence[Any],
    references: Sequence[Any],
    units: Sequence[Unit],
    mode: str,
    is_over: Callable[[], bool] = lambda: False,
    view: OutputView = ALL_OUTPUTS,
    factors: Sequence[float] | None = None,
) -> dict[str, float]:
    """Energy of the output error that each unit adds ("one-at-a-time") or removes ("leave-one-out").

    Args:
        model: The model, all units quantized.
        batches: See `forward.call_model`.
        references: The outputs of the float model on them.
        units: The units to rank.
        mode: See the module.
        is_over: Called before each batch but the first; if it returns True, the remaining batches are skipped.
        view: The outputs that count, and where.
        factors: What the energy of each output is multiplied with (`sensitivity.share_noise`), so that those of other
            scales can be added. None: 1.

    Returns:
        Unit -> energy, in the squared unit of the first output, summed over all samples.
    """
    random = torch.Generator().manual_seed(0)
    totals: _Energies = {}
    screened: list[Any] = []
    half = (len(batches) + 1) // 2
    for batch, reference in zip(batches[:half], references[:half], strict=True):
        if screened and is_over():
            break
        screened.append(batch)
        if mode == "one-at-a-time":
            energies = _screen_alone(model, batch, units, random, view, factors)
        else:
            energies = _screen_without(model, batch, reference, units, view, factors)
        for name, energy in energies.items():
            totals[name] = totals.get(name, 0.0) + energy
    scale = sum(map(count_samples, batches)) / sum(map(count_samples, screened))
    numbers = dict(zip(totals, read_numbers(list(totals.values())), strict=True))
    return {unit.name: scale * numbers.get(unit.name, 0.0) for unit in units}


def _screen_alone(
    model: nn.Module,
    batch: Any,
    units: Sequence[Unit],
    random: torch.Generator,
    view: OutputView,
    factors: Sequence[float] | None,
) -> _Energies:
    """Energies that the units add to the error of the float model on one batch."""
    taps = _Taps(power=2)
    with (
        evaluating(model),
        torch.enable_grad(),
        freezing_parameters(model),
        recording_recurrence(model),
        taps.attached(model, units),
    ):
        with disable_quantization(model):
            outputs = list(view.select_floats(call_model(model, batch)).values())
        vectors = []
        for output in outputs:
            vector = torch.randn(output.shape, generator=random)
            is_copied = output.device.type != "cpu"
            vectors.append(vector.to(output.device, output.dtype, non_blocking=is_copied))
        roots = None if factors is None else [math.sqrt(factor) for factor in factors]
        _backpropagate(outputs, _weigh(vectors, roots, view.find_mask(batch)))
    return taps.sums


def _screen_without(
    model: nn.Module,
    batch: Any,
    reference: Any,
    units: Sequence[Unit],
    view: OutputView,
    factors: Sequence[float] | None,
) -> _Energies:
    """Decrease of the energy of the int8 model's error without each unit, on one batch."""
    taps = _Taps(power=1)
    with (
        evaluating(model),
        torch.enable_grad(),
        freezing_parameters(model),
        recording_recurrence(model),
        taps.attached(model, units),
    ):
        with _straight_through(model):
            outputs = list(view.select_floats(call_model(model, batch)).values())
        errors = []
        targets = view.select_floats(reference).values()
        for output, expected in zip(outputs, targets, strict=True):
            errors.append((output - expected.to(output.device)).detach())
        _backpropagate(outputs, _weigh(errors, factors, view.find_mask(batch)))
    return taps.sums


def _weigh(
    vectors: list[torch.Tensor], factors: Sequence[float] | None, mask: torch.Tensor | None
) -> list[torch.Tensor]:
    """The vector of each output times its factor, and 0 at padding."""
    scales = factors or [1.0] * len(vectors)
    return [
        clear_padding(vector * scale, mask) for vector, scale in zip(vectors, scales, strict=True)
    ]


def _backpropagate(outputs: list[torch.Tensor], vectors: list[torch.Tensor]) -> None:
    """Run the backward pass from the outputs that have one."""
    roots, gradients = [], []
    for output, vector in zip(outputs, vectors, strict=True):
        if output.requires_grad:
            roots.append(output)
            gradients.append(vector)
    if roots:
        torch.autograd.backward(roots, gradients)


class _Taps:
    """Hooks that measure errors in the forward and multiply them with the gradient in the backward.

    Args:
        power: Exponent of the products, one for each sample and channel, before they are summed.
    """

    def __init__(self, power: int) -> None:
        self._power = power
        self.sums: _Energies = {}
        """The sum for each unit that ran."""

    @contextmanager
    def attached(self, model: nn.Module, units: Sequence[Unit]) -> Iterator[None]:
        """Watch every layer of the units, and every one of their quantizers that belongs to a call."""
        modules = dict(model.named_modules())
        with ExitStack() as undo:
            for unit in units:
                self._attach(modules, unit, undo)
            yield

    def _attach(self, modules: dict[str, nn.Module], unit: Unit, undo: ExitStack) -> None:
        """Watch the layers and calls of one unit until `undo` is closed.

        Args:
            modules: All modules of the model, by name.
            unit: The unit.
            undo: Removes the hooks.
        """
        inside_layers: set[int] = set()
        for name in unit.layers:
            layer = modules.get(name)
            if not isinstance(layer, QuantInputMixin):
                continue
            members = set(map(id, layer.modules()))
            inside_layers |= members
            quantizers = [quantizer for quantizer in unit.quantizers if id(quantizer) in members]
            self._watch(layer, unit.name, quantizers, undo)

        for quantizer in unit.quantizers:
            if id(quantizer) not in inside_layers:
                self._watch(quantizer, unit.name, [quantizer], undo)

    def _watch(
        self, module: nn.Module, name: str, quantizers: list[TensorQuantizer], undo: ExitStack
    ) -> None:
        """Measure the error that some quantizers make in the output of a module."""

        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            leaves = floats_of(output)
            # A layer inside another one that is run again has no gradient to multiply with.
            if not leaves or not torch.is_grad_enabled():
                return None
            result = leaves[0]
            error = _measure_error(module, args, kwargs, result, quantizers)
            tapped = _tap(result, (args, kwargs))
            tapped.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._add(name, gradient, error)
            )
            return tree_map(lambda leaf: tapped if leaf is result else leaf, output)

        handle = module.register_forward_hook(hook, with_kwargs=True)
        undo.callback(handle.remove)

    def _add(self, name: str, gradient: torch.Tensor, error: torch.Tensor) -> None:
        """Add the sum of one call. Channels are the last dimension, or the second one of `[B, C, H, W]`."""
        products = gradient * error
        if products.dim() > 3:
            products = products.flatten(2).sum(2)
        elif products.dim() == 3:
            products = products.sum(1)
        energy = products.double().pow(self._power).sum()
        self.sums[name] = self.sums.get(name, 0.0) + energy


def _measure_error(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    result: torch.Tensor,
    quantizers: list[TensorQuantizer],
) -> torch.Tensor:
    """Output of a module with some quantizers on, minus the output with them off; one of the two is `result`."""
    are_off = all(not quantizer.is_enabled for quantizer in quantizers)
    with torch.no_grad(), toggling(quantizers):
        toggled = floats_of(run_again(module, args, kwargs))[0]
    if are_off:
        return toggled - result.detach()
    return result.detach() - toggled


def _tap(result: torch.Tensor, inputs: Any) -> torch.Tensor:
    """A tensor with the values of a result whose gradient can be watched.

    It is not a view: the hook of a view is lost when the model changes it in place. A linear layer and an attention may
    return views. A quantizer that is off returns its input, which other operations read too, so then the result is
    copied.
    """
    if not result.requires_grad:
        return result.clone().requires_grad_().clone()
    is_input = any(result is leaf for leaf in tree_leaves(inputs))
    return result.clone() if is_input or result._is_view() else result


class _StraightThrough(torch.autograd.Function):
    """A quantizer whose gradient is 1; torch's own operators also write a mask, which costs several times as much."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
        result = type(quantizer).forward(quantizer, inputs)
        return result.view_as(result) if result is inputs else result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


@contextmanager
def _straight_through(model: nn.Module) -> Iterator[None]:
    """Give every quantizer of the model a gradient of 1."""

    def pass_through(quantizer: TensorQuantizer, inputs: torch.Tensor) -> Any:
        return _StraightThrough.apply(inputs, quantizer)

    quantizers = [quantizer for _, quantizer in named_quantizers(model)]
    try:
        for quantizer in quantizers:
            vars(quantizer)["forward"] = partial(pass_through, quantizer)
        yield
    finally:
        for quantizer in quantizers:
            vars(quantizer).pop("forward", None)


def estimate_sqnr(
    mode: str, int8_sums: ErrorSums, energy: float, factors: Sequence[float] | None = None
) -> float:
    """SQNR in dB of a unit alone, or of the model without it.

    Of several outputs it is that of their noise relative to their signal, added up: at most that of the worst.

    Args:
        mode: See the module.
        int8_sums: Energies of signal and noise of each output of the model in int8, `[outputs, 2]`.
        energy: Energy of the unit, from `screen_units`.
        factors: As for `screen_units`.
    """
    scales = np.ones(len(int8_sums)) if factors is None else np.asarray(factors)
    signals = int8_sums[:, 0]
    signal = signals[signals > 0][:1].sum()  # the unit of the factors
    noise = (int8_sums[:, 1] * scales).sum()
    if mode == "leave-one-out":
        energy = max(noise - energy, noise * _LEAST_NOISE)
    if not energy:
        return float("inf")
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(signal / energy))
