"""One forward in which the product of each quantized layer may be measured, or changed before the next layer sees it.

What corrects one layer after another (`correct_bias`, `round_weights`) needs, for every layer, the input that it gets
from the layers corrected so far. Run batch by batch that is a forward a layer. Here all batches are joined into one,
and one forward does: each layer is corrected at the moment it runs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from qdq.dataflow import Dataflow
from qdq.errors import ArgumentError, DataError, QdqError, StateError
from qdq.forward import (
    call_model,
    evaluating,
    floats_of,
    name_function,
    trace_forward,
)
from qdq.functions import WEIGHTED
from qdq.metrics import Array
from qdq.nn import QuantMixin
from qdq.quantize import own_tensor
from qdq.quantizer import disable_quantization
from qdq.samples import count_samples, is_by_sample
from qdq.swap import quantized_layers

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_HIDDEN = (
    1e-2  # weight of an output that a clamp hides, so that a channel that is always hidden has some
)


@dataclass(frozen=True)
class Product:
    """A convolution or linear function that a layer called with its own weight.

    Args:
        function: `F.conv2d`, `F.linear` ...
        arguments: Its arguments by name; `weight` is the quantized one.
    """

    function: Callable[..., Any]
    arguments: dict[str, Any]

    @property
    def groups(self) -> int:
        """Its groups; 1 for a linear function."""
        return int(self.arguments.get("groups", 1))

    def require_samples(self, layer: str) -> None:
        """Refuse an input without an axis of samples.

        Raises:
            DataError: It has none; torch takes `[C, H, W]` and `[C]` too.
        """
        dims, weight = self.arguments["input"].dim(), self.arguments["weight"]
        if dims < weight.dim():
            raise DataError(
                f"{layer} is given {dims} dimensions, {weight.dim()} or more are needed: the first is the samples.",
                "give the model batches, for instance tensor[None].",
            )

    def compute(self, **changed: Any) -> torch.Tensor:
        """The result, with some arguments exchanged."""
        output: torch.Tensor = self.function(**{**self.arguments, **changed})
        return output

    def rows_of(self, output: torch.Tensor) -> torch.Tensor:
        """An output as `[positions, Cout]`; a position is a pixel of one sample."""
        return (output if self.function is F.linear else output.movedim(1, -1)).flatten(0, -2)

    def patches_at(self, positions: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """What the weight is multiplied with at some positions of the output.

        Args:
            positions: Row numbers in `rows_of(output)`, `[N]`.
            shape: Shape of the output.

        Returns:
            `[groups, N, K]`, K in the order of the elements of one filter.
        """
        inputs: torch.Tensor = self.arguments["input"]
        if self.function is F.linear:
            return inputs.flatten(0, -2)[positions][None]
        kernel = self.arguments["weight"].shape[2:]
        stride, dilation = (
            _for_each(self.arguments.get(name, 1), len(kernel)) for name in ("stride", "dilation")
        )
        windows = F.pad(inputs, _padding(self.arguments.get("padding", 0), kernel, dilation))
        for axis, (size, step, spread) in enumerate(
            zip(kernel, stride, dilation, strict=True), start=2
        ):
            windows = windows.unfold(axis, spread * (size - 1) + 1, step)[..., ::spread]
        pixels = windows.movedim(1, 1 + len(kernel))  # [B, out ..., Cin, kernel ...], a view
        patches = pixels[torch.unravel_index(positions, (shape[0], *shape[2:]))]
        return patches.reshape(len(positions), self.groups, -1).transpose(0, 1)


Visit = Callable[[str, nn.Module, Product], torch.Tensor]


def visit_products(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any, visit: Visit
) -> Any:
    """Run a model once without gradients; the products of some layers are what `visit` returns.

    Args:
        model: The model, in any state of its quantizers.
        layers: The layers by name.
        inputs: As for `trace.call_model`.
        visit: Called with name, layer and product; returns the output that the layer is to have.

    Returns:
        What the model returns.
    """
    mode = _Visitor(visit)
    with ExitStack() as hooks:
        for name, layer in layers.items():
            enter = layer.register_forward_pre_hook(partial(mode.enter, name))
            hooks.callback(enter.remove)
            hooks.callback(layer.register_forward_hook(mode.leave).remove)
        with evaluating(model), mode:
            return call_model(model, inputs)


class _Visitor(TorchFunctionMode):
    def __init__(self, visit: Visit) -> None:
        super().__init__()
        self._visit = visit
        self._running: list[tuple[str, Any]] = []

    def enter(self, name: str, layer: nn.Module, _: Any) -> None:
        self._running.append((name, layer))

    def leave(self, *_: Any) -> None:
        self._running.pop()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if self._running and name_function(func) in WEIGHTED:
            name, layer = self._running[-1]
            arguments = {**dict(zip(_ARGUMENTS, args, strict=False)), **(kwargs or {})}
            if arguments["weight"] is getattr(
                layer, "weight", None
            ):  # in its forward the quantized one, see QuantMixin
                function = getattr(F, name_function(func))
                return self._visit(name, layer, Product(function, arguments))
        return func(*args, **(kwargs or {}))


@dataclass(frozen=True)
class LayerPlan:
    """What can be corrected layer by layer.

    Args:
        layers: Quantized layers in the order in which they run.
        intervals: Layer -> the values of its output that the function behind it passes on: 0..6 before a ReLU6.
        left: Quantized layers that are left alone -> why.
    """

    layers: dict[str, QuantMixin]
    intervals: dict[str, tuple[float, float]]
    left: dict[str, str]


def plan_layers(model: nn.Module, inputs: Any) -> LayerPlan:
    """Find the quantized layers that run once, as a convolution or linear function of their weight.

    Args:
        model: A calibrated model.
        inputs: The model runs on two samples of them.

    Raises:
        DataError: The model does not run on them, or they have no axis of samples.
        StateError: There is no quantized layer, or one has no range.
    """
    found = {
        name: layer
        for name, layer in quantized_layers(model).items()
        if isinstance(layer, QuantMixin)
    }
    if not found:
        raise StateError(
            "no layer of the model is quantized.", "call swap_modules and calibrate_model first."
        )
    active = {
        n: layer
        for n, layer in found.items()
        if all(quantizer.is_enabled for quantizer in layer.quantizers().values())
    }
    for name, layer in active.items():
        for attribute, quantizer in layer.quantizers().items():
            if quantizer.amax is None:
                raise StateError(f"{name}.{attribute} has no amax.", "call calibrate_model first.")
    calls: Counter[str] = Counter()

    def count(name: str, _: nn.Module, product: Product) -> torch.Tensor:
        calls[name] += 1
        product.require_samples(name)
        return product.compute()

    size = count_samples(inputs)
    few = tree_map(lambda leaf: leaf[:2] if is_by_sample(leaf, size) else leaf, inputs)
    with disable_quantization(model), _explaining():
        visit_products(model, active, few, count)
        flow = Dataflow(trace_forward(model, few))
    layers = {name: active[name] for name, number in calls.items() if number == 1}
    left = {
        name: _reason_against(name in active, calls[name]) for name in found if name not in layers
    }
    behind = {
        op.module: flow.passing_interval(op.outputs[0])
        for op in flow.operations
        if op.function in WEIGHTED
    }
    return LayerPlan(layers, {name: behind[name] for name in layers}, left)


def _reason_against(is_active: bool, calls: int) -> str:
    if not is_active:
        return "it is in float"
    if calls == 0:
        return "it does not run on the data as a convolution or linear function of its weight"
    return f"it runs {calls} times in one forward"


@dataclass(frozen=True)
class Sample:
    """Outputs of a layer of the float model at some positions.

    Args:
        positions: Rows of `Product.rows_of`, `[N]`.
        rows: The outputs there, float32 `[N, Cout]`.
        interval: What the function behind the layer passes on.
    """

    positions: torch.Tensor
    rows: torch.Tensor
    interval: tuple[float, float]

    def weigh(self, rows: torch.Tensor) -> torch.Tensor:
        """How much each output counts: little where a clamp behind it hides it in both models.

        Args:
            rows: The outputs of the quantized model at the same positions.

        Returns:
            `[N, Cout]`, the sum of each column is 1.
        """
        low, high = self.interval
        passes = [(values > low) & (values < high) for values in (self.rows, rows)]
        weight = (passes[0] | passes[1]).float().clamp_min(_HIDDEN)
        return weight / weight.sum(0)


def sample_outputs(
    model: nn.Module, plan: LayerPlan, inputs: Any, *, positions: int = 4096, seed: int = 0
) -> tuple[dict[str, Sample], Array]:
    """Run the float model and keep the outputs of its layers at random positions.

    Args:
        model: The quantized model, which runs with its quantizers off, or a float one of the same names.
        plan: The layers.
        inputs: As for `trace.call_model`.
        positions: At most so many for a layer.
        seed: Of the choice.

    Returns:
        A sample for each layer, and the outputs of the model as `flatten_outputs` gives them.
    """
    samples: dict[str, Sample] = {}
    generator = torch.Generator().manual_seed(seed)

    def record(name: str, _: nn.Module, product: Product) -> torch.Tensor:
        output = product.compute()
        rows = product.rows_of(output)
        chosen = torch.randperm(len(rows), generator=generator)[:positions].to(rows.device)
        samples[name] = Sample(chosen, rows[chosen].float(), plan.intervals[name])
        return output

    modules = dict(model.named_modules())
    if missing := [name for name in plan.layers if name not in modules]:
        raise ArgumentError(
            f"the reference has no module {missing[0]}.", "give a copy of the model itself."
        )
    with disable_quantization(model):
        outputs = flatten_outputs(
            visit_products(model, {n: modules[n] for n in plan.layers}, inputs, record)
        )
    return samples, outputs


@contextmanager
def _explaining() -> Iterator[None]:
    """Say what joined batches need where a model does not run on them; it may raise anything."""
    try:
        yield
    except QdqError:
        raise
    except Exception as error:
        raise DataError(
            f"the model does not run on the batches joined into one, or on two samples of it: {error}",
            "call model(batch) to see that it runs; give every tensor the samples as its first axis, in batches that "
            "differ in it only; give fewer samples where memory is short.",
        ) from error


def run_flat(model: nn.Module, inputs: Any) -> Array:
    """`flatten_outputs` of one forward."""
    with evaluating(model), _explaining():
        return flatten_outputs(call_model(model, inputs))


def flatten_outputs(outputs: Any) -> Array:
    """All floating-point outputs as one flat array.

    Raises:
        StateError: They hold NaN or Inf, or no floating-point tensor at all.
    """
    leaves = floats_of(outputs)
    if not leaves:
        raise StateError(
            "the model returns no floating-point tensor.",
            "have it return what stands before argmax or the like.",
        )
    flat = np.concatenate([leaf.detach().float().cpu().numpy().ravel() for leaf in leaves])
    if not np.isfinite(flat).all():
        raise StateError(
            "the outputs of the model hold NaN or Inf.",
            "check the float model on the same batches.",
        )
    return flat


def add_to_bias(layer: Any, shift: torch.Tensor) -> None:
    """Add to the bias of a layer, which gets one if it has none.

    Args:
        layer: A convolution or linear layer.
        shift: `[Cout]`.
    """
    weight = layer._parameters["weight"]
    if layer.bias is None:
        zeros = own_tensor(torch.zeros_like(weight.detach().flatten(1)[:, 0]))
        layer.bias = nn.Parameter(zeros, weight.requires_grad)
    with torch.no_grad():
        layer.bias.copy_(layer.bias.double() + shift)


def _for_each(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * dims if len(values) == 1 else values


def _padding(padding: Any, kernel: torch.Size, dilation: tuple[int, ...]) -> list[int]:
    """The argument of `F.pad`: last axis first, both sides."""
    if padding == "same":
        totals = [spread * (size - 1) for size, spread in zip(kernel, dilation, strict=True)]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [
            (size, size) for size in _for_each(0 if padding == "valid" else padding, len(kernel))
        ]
    return [size for side in reversed(sides) for size in side]
