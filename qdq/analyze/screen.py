"""An estimate of what every unit costs, from one forward and one backward.

Each unit makes an error e where it stands: the output of its layer in int8 less that in float, on the same input. To
first order its share of the error of the outputs is J e, with J the derivative of the outputs by that place. A
backward pass gives J^T v for one v, and with it the product v . J e = (J^T v) . e, without J.

- "one-at-a-time": the model is in float and v is random with variance 1. Then the mean of (v . J e)^2 is the energy of
  J e. With errors of different channels taken to be independent (each has weights of its own), it is the sum of the
  energies of the channels: a mean over many squares where v is drawn once.
- "leave-one-out": the model is in int8 and v = E, the error of its outputs. Without a unit E becomes E - J e, and its
  energy falls by 2 E . J e less that of J e. E is the sum of the errors of all units; as far as they are independent
  either of these energies is E . J e, and so is the difference.

Half of the batches are enough for either.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from qdq.analyze.sensitivity import ErrorSums
from qdq.forward import call_model, evaluating, floats_of
from qdq.nn import QuantInputMixin
from qdq.nn.functions import run_again
from qdq.quantizer import TensorQuantizer, disable_quantization, named_quantizers, toggling
from qdq.samples import count_samples
from qdq.units import Unit


def screen_units(
    model: nn.Module,
    batches: Sequence[Any],
    references: Sequence[Any],
    units: Sequence[Unit],
    mode: str,
    is_over: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """Energy of the error of the outputs that each unit adds ("one-at-a-time") or takes away ("leave-one-out").

    Args:
        model: The model, all units quantized.
        batches: See `trace.call_model`.
        references: The outputs of the float model on them.
        units: What is ranked.
        mode: See above.
        is_over: Asked before each batch but the first: whether the rest is left out.

    Returns:
        Unit -> energy, in the squared unit of the outputs, summed over all samples.
    """
    random = torch.Generator().manual_seed(0)
    totals = dict.fromkeys((unit.name for unit in units), 0.0)
    used: list[Any] = []
    for batch, reference in list(zip(batches, references, strict=True))[: -(-len(batches) // 2)]:
        if used and is_over():
            break
        used.append(batch)
        for name, energy in _screen_batch(model, batch, reference, units, mode, random).items():
            totals[name] += energy
    scale = sum(map(count_samples, batches)) / sum(map(count_samples, used))
    return {name: scale * energy for name, energy in totals.items()}


def _screen_batch(
    model: nn.Module,
    batch: Any,
    reference: Any,
    units: Sequence[Unit],
    mode: str,
    random: torch.Generator,
) -> dict[str, float]:
    is_alone = mode == "one-at-a-time"
    taps = _Taps(power=2 if is_alone else 1)
    with evaluating(model), torch.enable_grad(), _frozen(model), taps.attached(model, units):
        with disable_quantization(model) if is_alone else _straight_through(model):
            outputs = floats_of(call_model(model, batch))
        if is_alone:
            vectors = [
                torch.randn(out.shape, generator=random).to(out.device, out.dtype)
                for out in outputs
            ]
        else:
            pairs = zip(outputs, floats_of(reference), strict=True)
            vectors = [(out - expected).detach() for out, expected in pairs]
        wanted = [
            (out, vector) for out, vector in zip(outputs, vectors, strict=True) if out.requires_grad
        ]
        if wanted:
            torch.autograd.backward([out for out, _ in wanted], [vector for _, vector in wanted])
    return taps.shares


class _Taps:
    """Hooks that measure errors in the forward and multiply them with the gradient in the backward.

    Args:
        power: Of the products, one for each sample and channel, that are added up.
    """

    def __init__(self, power: int) -> None:
        self._power = power
        self.shares: dict[str, float] = {}
        """The sum for each unit that ran."""

    @contextmanager
    def attached(self, model: nn.Module, units: Sequence[Unit]) -> Iterator[None]:
        """Watch every layer of the units, and every quantizer of theirs that stands at a call."""
        modules = dict(model.named_modules())
        with ExitStack() as undo:
            for unit in units:
                layers = [
                    modules[name]
                    for name in unit.layers
                    if isinstance(modules.get(name), QuantInputMixin)
                ]
                own = {id(quantizer) for layer in layers for quantizer in layer.modules()}
                for layer in layers:
                    quantizers = [
                        each
                        for each in unit.quantizers
                        if any(each is inner for inner in layer.modules())
                    ]
                    hook = self._make_hook(unit.name, quantizers)
                    undo.callback(layer.register_forward_hook(hook, with_kwargs=True).remove)
                for quantizer in unit.quantizers:
                    if id(quantizer) not in own:
                        hook = self._make_hook(unit.name, [quantizer])
                        undo.callback(
                            quantizer.register_forward_hook(hook, with_kwargs=True).remove
                        )
            yield

    def _make_hook(self, name: str, quantizers: Sequence[TensorQuantizer]) -> Callable[..., Any]:
        def hook(
            module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
        ) -> Any:
            found = floats_of(output)
            if (
                not found or not torch.is_grad_enabled()
            ):  # a layer inside one that is run again, or without gradients
                return None
            were_off = all(not quantizer.is_enabled for quantizer in quantizers)
            with torch.no_grad(), toggling(quantizers):
                other = floats_of(run_again(module, args, kwargs))[0]
            here = found[0]
            error = (other - here.detach()) if were_off else (here.detach() - other)
            if not isinstance(output, torch.Tensor) and not here.requires_grad:
                return None
            # Not a view: where the model changes one in place, its hook is lost. A quantizer that is off gives what it
            # was given, and others read that too.
            is_own = here.requires_grad and all(
                here is not leaf for leaf in tree_leaves((args, kwargs))
            )
            tapped = (
                here
                if is_own
                else here.clone()
                if here.requires_grad
                else here.clone().requires_grad_().clone()
            )
            tapped.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: self._add(name, gradient, error)
            )
            return tapped if isinstance(output, torch.Tensor) else None

        return hook

    def _add(self, name: str, gradient: torch.Tensor, error: torch.Tensor) -> None:
        """One call's share. Channels are the last dimension, of `[B, C, H, W]` the second."""
        products = gradient * error
        if products.dim() > 2:
            products = products.flatten(2).sum(2) if products.dim() > 3 else products.sum(1)
        self.shares[name] = self.shares.get(name, 0.0) + float(
            products.double().pow(self._power).sum()
        )


class _StraightThrough(torch.autograd.Function):
    """A quantizer whose gradient is 1; torch's own operators write a mask as well, and cost several times as much."""

    @staticmethod
    def forward(ctx: Any, inputs: torch.Tensor, quantizer: TensorQuantizer) -> torch.Tensor:
        result = type(quantizer).forward(quantizer, inputs)
        return result.view_as(result) if result is inputs else result

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0], None


@contextmanager
def _straight_through(model: nn.Module) -> Iterator[None]:
    """Every quantizer of the model with a gradient of 1."""
    quantizers = [quantizer for _, quantizer in named_quantizers(model)]
    try:
        for quantizer in quantizers:
            vars(quantizer)["forward"] = lambda inputs, quantizer=quantizer: _StraightThrough.apply(
                inputs, quantizer
            )
        yield
    finally:
        for quantizer in quantizers:
            vars(quantizer).pop("forward", None)


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for parameters: only those of activations are asked for."""
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in learned:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in learned:
            parameter.requires_grad_(True)


def estimate_sqnr(mode: str, statistics: ErrorSums, energy: float) -> float:
    """SQNR in dB of a unit by itself, or without it, from its energy and the statistics of the model in int8."""
    signal, noise = statistics[:, 0].sum(), statistics[:, 1].sum()
    rest = energy if mode == "one-at-a-time" else max(noise - energy, noise * 1e-3)
    with np.errstate(divide="ignore"):
        return float(10 * np.log10(signal / rest)) if rest else float("inf")
