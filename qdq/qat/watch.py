"""What may go wrong without a sign: oscillating weights, ranges that do not fit; and where NaN began."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from qdq.calibrate.collect import Collection
from qdq.forward import call_model, evaluating, floats_of
from qdq.quantize import quantize_codes
from qdq.quantizer import TensorQuantizer, named_quantizers

_REVERSALS = 2  # so often must a code turn back to be called oscillating
_SHARE = 0.01  # of the weights of a layer that oscillate, to be reported
_CLIPPED = 0.5  # share of the values beyond the range, to be reported
_UNUSED = 1 / 8  # of the range at most is used: 3 bits are lost


@dataclass(frozen=True)
class Oscillation:
    """Weights of a layer that went back and forth between two codes.

    Args:
        layer: Dotted name.
        share: Share of its weights, 0..1.
    """

    layer: str
    share: float


@dataclass(frozen=True)
class BadRange:
    """A range that does not fit what it quantizes.

    Args:
        quantizer: Dotted name.
        reason: What is wrong with it.
    """

    quantizer: str
    reason: str


class OscillationWatch:
    """Counts for each weight how often its code changed back (Nagel et al., ICML 2022, arXiv 2203.11086, section 3.2).

    Args:
        model: A calibrated model.
    """

    def __init__(self, model: nn.Module) -> None:
        quantizers = dict(named_quantizers(model))
        self._weights = [
            (layer, module, parameter, quantizers[name])
            for name, (layer, module, parameter) in Collection(model).weights.items()
        ]
        self._codes = list(self._quantize())
        self._direction = [torch.zeros_like(codes, dtype=torch.int8) for codes in self._codes]
        self._reversals = [torch.zeros_like(codes, dtype=torch.uint8) for codes in self._codes]

    @torch.no_grad()
    def _quantize(self) -> Iterator[torch.Tensor]:
        for _, module, parameter, quantizer in self._weights:
            weight = module._parameters[parameter]
            assert weight is not None  # noqa: S101
            scale = quantizer.scale if quantizer.axis is None else quantizer.scale.flatten()
            axis = _positive(quantizer.range_axis, weight)
            yield quantize_codes(weight.float(), scale, quantizer.format, axis).short()

    def after_step(self) -> None:
        """Compare the codes with those before the step."""
        for index, codes in enumerate(self._quantize()):
            moved = (codes - self._codes[index]).sign().to(torch.int8)
            back = (moved != 0) & (moved == -self._direction[index])
            self._reversals[index] += back & (self._reversals[index] < 255)
            self._direction[index] = torch.where(moved != 0, moved, self._direction[index])
            self._codes[index] = codes

    def pack(self) -> dict[str, torch.Tensor]:
        """What was seen, as tensors from which `unpack` goes on."""
        seen = {"codes": self._codes, "direction": self._direction, "reversals": self._reversals}
        return {
            f"{name}//{index}": tensor
            for name, tensors in seen.items()
            for index, tensor in enumerate(tensors)
        }

    def unpack(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Go on where another watch of the same model packed itself."""
        for name, own in self.pack().items():
            own.copy_(tensors[name])

    def find(self) -> tuple[Oscillation, ...]:
        """The layers in which more than 1 % of the weights oscillated, worst first."""
        shares = [float((reversals >= _REVERSALS).float().mean()) for reversals in self._reversals]
        found = [
            Oscillation(layer, share)
            for (layer, *_), share in zip(self._weights, shares, strict=True)
        ]
        return tuple(
            sorted((each for each in found if each.share > _SHARE), key=lambda each: -each.share)
        )


def _positive(axis: int | None, tensor: torch.Tensor) -> int | None:
    return None if axis is None else axis % tensor.dim()


def find_bad_ranges(model: nn.Module, batch: Any) -> tuple[BadRange, ...]:
    """The ranges that are far too small or too large: most is clipped, or most codes are unused.

    Those of inputs are judged by a batch; of weights, channels of zeros are left out.

    Args:
        model: A calibrated model.
        batch: As for `trace.call_model`.
    """
    found: list[BadRange] = []
    collection = Collection(model)
    with ExitStack() as hooks:
        for name in collection.collecting:
            quantizer = model.get_submodule(name)
            assert isinstance(quantizer, TensorQuantizer)  # noqa: S101

            def look(module: Any, inputs: tuple[torch.Tensor, ...], name: str = name) -> None:
                if reason := _judge(module, inputs[0], may_be_zero=False):
                    found.append(BadRange(name, reason))

            hooks.callback(quantizer.register_forward_pre_hook(look).remove)
        with evaluating(model):
            call_model(model, batch)
    quantizers = dict(named_quantizers(model))
    for name, (_, module, parameter) in collection.weights.items():
        weight = module._parameters[parameter]
        assert weight is not None  # noqa: S101
        if reason := _judge(quantizers[name], weight.detach(), may_be_zero=True):
            found.append(BadRange(name, reason))
    return tuple(found)


def _judge(quantizer: TensorQuantizer, values: torch.Tensor, *, may_be_zero: bool) -> str:
    """What is wrong with a range, or with some of several; "" if nothing is."""
    if quantizer.amax is None or not values.numel():
        return ""
    amax, axis = quantizer.amax.detach().flatten(), _positive(quantizer.range_axis, values)
    rows = (
        values.float().abs().reshape(1, -1)
        if axis is None
        else values.float().abs().movedim(axis, 0).flatten(1)
    )
    largest = rows.amax(1)
    used = largest / amax.clamp_min(1e-30)
    clipped = (rows > amax[:, None]).float().mean(1)
    alive = largest > 0 if may_be_zero else torch.ones_like(largest, dtype=torch.bool)
    for bad, reason in (
        (clipped > _CLIPPED, f"{float(clipped.max()):.0%} of the values are clipped"),
        (used * quantizer.format.qmax < 0.5, "every code is 0"),
        (used < _UNUSED, f"the largest value uses {float(used.min()):.1%} of the range"),
    ):
        if count := int((bad & alive).sum()):
            return reason if len(amax) == 1 else f"in {count} of {len(amax)} channels {reason}"
    return ""


def find_nonfinite(model: nn.Module, batch: Any) -> str:
    """Dotted name of the first module that makes NaN or Inf of finite inputs; "" if none does."""
    found: list[str] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():

            def look(_: nn.Module, inputs: Any, output: Any, name: str = name) -> None:
                if not found and _is_finite(inputs) and not _is_finite(output):
                    found.append(name or "the model")

            hooks.callback(module.register_forward_hook(look).remove)
        with evaluating(model):
            call_model(model, batch)
    return found[0] if found else ""


def order_modules(model: nn.Module, batch: Any) -> list[str]:
    """Dotted names of the modules in the order in which they return for a batch, of repeated calls each."""
    returned: list[str] = []
    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(
                module.register_forward_hook(lambda *_, name=name: returned.append(name)).remove
            )
        with evaluating(model):
            call_model(model, batch)
    return returned


def _is_finite(tree: Any) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in floats_of(tree))
