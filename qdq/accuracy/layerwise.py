"""One forward in which the product of each quantized layer can be measured, or changed before the next layer reads it.

A pass that corrects one layer after another (`correct_bias`, `round_weights`) needs, for every layer, the input from
the layers corrected so far. Batch by batch, that takes one forward per layer. Here all batches are joined into one, and
a single forward is enough: each layer is corrected when it runs.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from qdq.batch import count_samples, is_by_sample, map_leaves
from qdq.dataflow import Dataflow
from qdq.errors import ArgumentError, DataError, QdqError, StateError
from qdq.forward import call_model, evaluating, name_function, trace_forward
from qdq.functions import LINEAR, WEIGHTED
from qdq.metrics import Array, decide_db, sqnr_db
from qdq.nn import QuantMixin
from qdq.outputs import ALL_OUTPUTS, OutputView, expand_mask
from qdq.quantize import own_tensor
from qdq.quantizer import disable_quantization
from qdq.swap import quantized_layers
from qdq.text import printable

FlatArrays = dict[str, Array]
"""Name of an output -> all its values."""

HELD_OUT = 4
"""A pass that learns and judges holds out one of so many samples: the last quarter."""

_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
# Weight of an output that a clamp hides, so that a channel that is always hidden has a mean.
_HIDDEN = 1e-2
_PENDING_BYTES = 2**28  # of outputs on a GPU


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
        """Number of groups; 1 for a linear function."""
        return int(self.arguments.get("groups", 1))

    def require_samples(self, layer: str) -> None:
        """Refuse an input without an axis of samples.

        Raises:
            DataError: The input has no such axis; torch accepts `[C, H, W]` and `[C]`, too.
        """
        dims = self.arguments["input"].dim()
        expected = self.arguments["weight"].dim()
        if dims < expected:
            raise DataError(
                f"the input of {layer} has {dims} dimensions; expected {expected} or more, the first for the samples.",
                "give the model batches, for instance tensor[None].",
            )

    def compute(self, **changed: Any) -> torch.Tensor:
        """The result, with some arguments replaced."""
        output: torch.Tensor = self.function(**{**self.arguments, **changed})
        return output

    def rows_of(self, output: torch.Tensor) -> torch.Tensor:
        """An output as `[positions, Cout]`; a position is a pixel of one sample."""
        if self.function is not F.linear:
            output = output.movedim(1, -1)
        return output.flatten(0, -2)

    def list_positions(self, output: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """The rows of an output that are not padding.

        Args:
            output: Output of the product.
            mask: bool, False at padding; it applies if the output has its sizes first, without the channels. None for
                no padding.

        Returns:
            Row numbers in `rows_of(output)`, `[N]`.
        """
        by_position = output if self.function is F.linear else output.movedim(1, -1)
        sizes = by_position.shape[:-1]
        if mask is None or sizes[: mask.dim()] != mask.shape:
            return torch.arange(math.prod(sizes), device=output.device)
        counts = expand_mask(mask, by_position[..., 0]).expand(sizes)
        return counts.flatten().nonzero().flatten()

    def patches_at(self, positions: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """The inputs that the weight multiplies at some positions of the output.

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
        strides = _for_each_axis(self.arguments.get("stride", 1), len(kernel))
        dilations = _for_each_axis(self.arguments.get("dilation", 1), len(kernel))
        padding = self.arguments.get("padding", 0)

        windows = F.pad(inputs, _pad_widths(padding, kernel, dilations))
        for axis, size in enumerate(kernel):
            span = dilations[axis] * (size - 1) + 1
            windows = windows.unfold(axis + 2, span, strides[axis])[..., :: dilations[axis]]
        pixels = windows.movedim(1, 1 + len(kernel))  # [B, out ..., Cin, kernel ...], a view
        patches = pixels[_unravel(positions, (shape[0], *shape[2:]))]
        return patches.reshape(len(positions), self.groups, -1).transpose(0, 1)


Visit = Callable[[str, nn.Module, Product], torch.Tensor]


def visit_products(
    model: nn.Module, layers: Mapping[str, nn.Module], inputs: Any, visit: Visit
) -> Any:
    """Run a model once without gradients, with the products of some layers replaced by the results of `visit`.

    Args:
        model: The model, in any state of its quantizers.
        layers: The layers by name.
        inputs: As for `forward.call_model`.
        visit: Called with name, layer and product; returns the output of the product.

    Returns:
        The outputs of the model.
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
    """Calls `visit` for the product of each layer while the layer runs.

    Args:
        visit: As for `visit_products`.
    """

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
        kwargs = kwargs or {}
        if self._running and name_function(func) in WEIGHTED:
            name, layer = self._running[-1]
            arguments = {**dict(zip(_ARGUMENTS, args, strict=False)), **kwargs}
            # During its forward the weight of a layer is the quantized one, see QuantMixin.
            if arguments["weight"] is getattr(layer, "weight", None):
                function = getattr(F, name_function(func))
                return self._visit(name, layer, Product(function, arguments))
        return func(*args, **kwargs)


@dataclass(frozen=True)
class LayerPlan:
    """The layers that can be corrected one after another.

    Args:
        layers: Quantized layers in the order in which they run.
        intervals: Layer -> the values of its output that the function after it passes on: 0..6 before a ReLU6.
        normalizations: Layer -> the `nn.LayerNorm` that divides each row of its output by a deviation, after residual
            adds, if there is one.
        skipped: Quantized layers that cannot be corrected -> the reason.
    """

    layers: dict[str, QuantMixin]
    intervals: dict[str, tuple[float, float]]
    normalizations: dict[str, str]
    skipped: dict[str, str]


def plan_layers(model: nn.Module, inputs: Any) -> LayerPlan:
    """Find the quantized layers that run once, as a convolution or linear function of their weight.

    Args:
        model: A calibrated model.
        inputs: Joined batches; the model runs on two samples of them.

    Raises:
        DataError: The model does not run on the inputs, or they have no axis of samples.
        StateError: There is no quantized layer, or one has no range.
    """
    quantized: dict[str, QuantMixin] = {}
    for name, layer in quantized_layers(model).items():
        if isinstance(layer, QuantMixin):
            quantized[name] = layer
    if not quantized:
        raise StateError(
            "no layer of the model is quantized.", "call swap_modules and calibrate_model first."
        )
    active = _select_active(quantized)
    calls: Counter[str] = Counter()

    def count(name: str, _: nn.Module, product: Product) -> torch.Tensor:
        calls[name] += 1
        product.require_samples(name)
        return product.compute()

    pair = take_pair(inputs)
    with disable_quantization(model), explaining_joined():
        visit_products(model, active, pair, count)
        flow = Dataflow(trace_forward(model, pair))

    layers = {name: active[name] for name, number in calls.items() if number == 1}
    skipped = {}
    for name in quantized:
        if name not in layers:
            skipped[name] = _reason_to_skip(name in active, calls[name])
    return _describe_layers(model, flow, layers, skipped)


def _describe_layers(
    model: nn.Module, flow: Dataflow, layers: dict[str, QuantMixin], skipped: dict[str, str]
) -> LayerPlan:
    """The plan, with what the functions behind each layer do to its output."""
    intervals = {}
    normalizations = {}
    for operation in flow.operations:
        if operation.function not in WEIGHTED or operation.module not in layers:
            continue
        intervals[operation.module] = flow.passing_interval(operation.outputs[0])
        if operation.function not in LINEAR:
            continue  # the channels of a convolution are not the last axis, over which a LayerNorm divides
        normalization = flow.normalization_behind(operation.outputs[0])
        if normalization is not None and _runs_once(model, flow, normalization.module):
            normalizations[operation.module] = normalization.module
    return LayerPlan(layers, intervals, normalizations, skipped)


def _runs_once(model: nn.Module, flow: Dataflow, name: str) -> bool:
    """Whether a module is an `nn.LayerNorm` over the last axis that runs once."""
    module = model.get_submodule(name)
    is_plain = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1
    return is_plain and sum(run.module == name for run in flow.runs) == 1


def _select_active(quantized: Mapping[str, QuantMixin]) -> dict[str, QuantMixin]:
    """The layers that are in int8, which must have ranges."""
    active = {}
    for name, layer in quantized.items():
        if _is_active(layer):
            _require_ranges(name, layer)
            active[name] = layer
    return active


def _is_active(layer: QuantMixin) -> bool:
    """Whether all quantizers of a layer are on."""
    return all(quantizer.is_enabled for quantizer in layer.quantizers().values())


def _require_ranges(name: str, layer: QuantMixin) -> None:
    for attribute, quantizer in layer.quantizers().items():
        if quantizer.amax is None:
            raise StateError(f"{name}.{attribute} has no amax.", "call calibrate_model first.")


def take_pair(inputs: Any) -> Any:
    """The first two samples of joined batches."""
    size = count_samples(inputs)

    def take(leaf: Any) -> Any:
        return leaf[:2] if is_by_sample(leaf, size) else leaf

    return map_leaves(take, inputs)


def _reason_to_skip(is_active: bool, calls: int) -> str:
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
        interval: The values that the function after the layer passes on.
        importance: Weight of each row, float32 `[N]`. A LayerNorm divides the errors of a row by the deviation of the
            row; then it is the reciprocal of the variance, so that errors in a token of huge values count little.
    """

    positions: torch.Tensor
    rows: torch.Tensor
    interval: tuple[float, float]
    importance: torch.Tensor

    def weigh(self, rows: torch.Tensor) -> torch.Tensor:
        """Weight of each output in a mean: small if a clamp or a LayerNorm after it hides it in both models.

        Args:
            rows: The outputs of the quantized model at the same positions.

        Returns:
            `[N, Cout]`, the sum of each column is 1.
        """
        weight = weigh_passing(self.rows, rows, self.interval)
        weight = weight * self.importance[:, None]
        return weight / weight.sum(0)


def weigh_passing(
    expected: torch.Tensor, actual: torch.Tensor, interval: tuple[float, float]
) -> torch.Tensor:
    """Weight of each output: 1, or little if a clamp after it hides it in both models.

    Args:
        expected: Outputs of the float model.
        actual: Those of the quantized model, of the same shape.
        interval: The values that the clamp passes on.
    """
    low, high = interval
    passes_in_float = (expected > low) & (expected < high)
    passes_in_int8 = (actual > low) & (actual < high)
    return (passes_in_float | passes_in_int8).float().clamp_min(_HIDDEN)


def sample_outputs(
    model: nn.Module,
    plan: LayerPlan,
    inputs: Any,
    view: OutputView,
    *,
    positions: int = 4096,
    seed: int = 0,
) -> tuple[dict[str, Sample], FlatArrays]:
    """Run the float model and store the outputs of its layers at random positions that are not padding.

    Args:
        model: The quantized model, which runs with its quantizers off, or a float model with the same names.
        plan: The layers.
        inputs: As for `forward.call_model`.
        view: Which outputs count, and where.
        positions: Upper limit on the positions of a layer.
        seed: Seed of the random positions.

    Returns:
        A sample for each layer, and the outputs of the model as `flatten_outputs` gives them.

    Raises:
        ArgumentError: The model lacks one of the layers.
    """
    samples: dict[str, Sample] = {}
    generator = torch.Generator().manual_seed(seed)
    mask = view.find_mask(inputs)

    def record(name: str, _: nn.Module, product: Product) -> torch.Tensor:
        output = product.compute()
        rows = product.rows_of(output)
        counted = product.list_positions(output, mask)
        drawn = torch.randperm(len(counted), generator=generator)[:positions]
        chosen = counted[drawn.to(rows.device, non_blocking=True)]
        importance = torch.ones(len(chosen), device=rows.device)
        samples[name] = Sample(chosen, rows[chosen].float(), plan.intervals[name], importance)
        return output

    require_modules(model, plan.layers)
    modules = dict(model.named_modules())
    layers = {name: modules[name] for name in plan.layers}
    with disable_quantization(model), _measuring_variances(modules, plan) as variances:
        outputs = visit_products(model, layers, inputs, record)
    for name, normalization in plan.normalizations.items():
        variance = variances[normalization][samples[name].positions]
        samples[name] = replace(samples[name], importance=variance.mean() / variance)
    return samples, flatten_outputs(outputs, inputs, view)


def require_modules(reference: nn.Module, names: Iterable[str]) -> None:
    """Refuse a reference that is another model.

    Args:
        reference: The float model.
        names: The modules that it must have, by dotted name.

    Raises:
        ArgumentError: It lacks one of them.
    """
    modules = dict(reference.named_modules())
    for name in names:
        if name not in modules:
            raise ArgumentError(
                f"the reference has no module {name}.", "give a copy of the model itself."
            )


@contextmanager
def _measuring_variances(
    modules: Mapping[str, nn.Module], plan: LayerPlan
) -> Iterator[dict[str, torch.Tensor]]:
    """Yield a dictionary that gets the variances by which each LayerNorm divides, one for each row of its input."""
    variances: dict[str, torch.Tensor] = {}

    def measure(name: str, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rows = next(iter((*args, *kwargs.values()))).flatten(0, -2)
        variances[name] = rows.float().var(1, correction=0) + layer.eps

    with ExitStack() as hooks:
        for name in set(plan.normalizations.values()):
            layer = modules[name]
            handle = layer.register_forward_pre_hook(partial(measure, name), with_kwargs=True)
            hooks.callback(handle.remove)
        yield variances


@contextmanager
def explaining_joined() -> Iterator[None]:
    """Explain the requirements of joined batches if a model does not run on them; it may raise any error."""
    try:
        yield
    except QdqError:
        raise
    except Exception as error:
        raise DataError(
            f"the model does not run on the batches joined into one, or on two samples of it: {error}",
            "check that model(batch) runs; give every tensor the samples as its first axis, in batches that differ in "
            "it only; give fewer samples if there is not enough memory.",
        ) from error


def run_flat(model: nn.Module, inputs: Any, view: OutputView) -> FlatArrays:
    """`flatten_outputs` of one forward."""
    with evaluating(model), explaining_joined():
        outputs = call_model(model, inputs)
    return flatten_outputs(outputs, inputs, view)


class FlatOutputs:
    """The floating-point outputs of several forwards, each as one flat array.

    Outputs on a GPU stay there until they are many, or until the arrays are asked for: each copy waits for the GPU.

    Args:
        view: Which outputs count, and where.
    """

    def __init__(self, view: OutputView = ALL_OUTPUTS) -> None:
        self._view = view
        self._arrays: defaultdict[str, list[Array]] = defaultdict(list)
        self._pending: defaultdict[str, list[torch.Tensor]] = defaultdict(list)
        self._pending_bytes = 0

    def add(self, outputs: Any, batch: Any) -> None:
        """Add the outputs of a forward.

        Args:
            outputs: What the model returned.
            batch: Its inputs, for the mask.

        Raises:
            DataError: The mask fits no output.
            StateError: They hold no floating-point tensor.
        """
        selected = self._view.select_rows(outputs, batch)
        floats = {name: part for name, part in selected.items() if part.is_floating_point()}
        if not floats:
            raise StateError(
                "the model returns no floating-point tensor.",
                "have it return the scores before argmax or a similar function.",
            )
        device = next(iter(floats.values())).device
        for name, part in floats.items():
            values = part.detach().float().flatten()
            self._pending[name].append(values.to(device))
            self._pending_bytes += values.nbytes
        if self._pending_bytes > _PENDING_BYTES or device.type == "cpu":
            self._copy_pending()

    def join(self) -> FlatArrays:
        """All outputs by name.

        Raises:
            StateError: They hold NaN or Inf.
        """
        self._copy_pending()
        flat = {name: np.concatenate(arrays) for name, arrays in self._arrays.items()}
        if not all(np.isfinite(array).all() for array in flat.values()):
            raise StateError(
                "the outputs of the model hold NaN or Inf.",
                "check the float model on the same batches.",
            )
        return flat

    def _copy_pending(self) -> None:
        """Copy the pending outputs to the CPU."""
        for name, tensors in self._pending.items():
            self._arrays[name].append(torch.cat(tensors).cpu().numpy())
        self._pending.clear()
        self._pending_bytes = 0


def flatten_outputs(outputs: Any, inputs: Any, view: OutputView) -> FlatArrays:
    """All floating-point outputs of one forward, each as one flat array.

    Args:
        outputs: What the model returned.
        inputs: Its inputs, for the mask.
        view: Which outputs count, and where.

    Raises:
        DataError: The mask fits no output.
        StateError: They hold NaN or Inf, or there is no floating-point tensor.
    """
    flat = FlatOutputs(view)
    flat.add(outputs, inputs)
    return flat.join()


def list_decibels(expected: FlatArrays, actual: FlatArrays) -> dict[str, float]:
    """SQNR of each output in dB; minus infinity for one that is missing or has another number of values."""
    decibels = {}
    for name, reference in expected.items():
        output = actual.get(name)
        is_same = output is not None and output.shape == reference.shape
        decibels[name] = sqnr_db(reference, output) if is_same and output is not None else -math.inf
    return decibels


@dataclass(frozen=True)
class Change:
    """What a pass did to the outputs.

    Args:
        before_db: SQNR before it in dB, of the worst output.
        after_db: The same after it.
        outputs: Name -> SQNR before and after, if there are several outputs.
    """

    before_db: float
    after_db: float
    outputs: dict[str, tuple[float, float]]


def measure_change(expected: FlatArrays, before: FlatArrays, after: FlatArrays) -> Change:
    """The SQNR of the outputs before and after a pass.

    Args:
        expected: Outputs of the float model.
        before: Outputs before the pass.
        after: Outputs after it.
    """
    decibels_before = list_decibels(expected, before)
    decibels_after = list_decibels(expected, after)
    outputs = {}
    if len(expected) > 1:
        outputs = {name: (decibels_before[name], decibels_after[name]) for name in expected}
    return Change(decide_db(decibels_before), decide_db(decibels_after), outputs)


def require_counts(**counts: int) -> None:
    """Refuse an option that counts something and is no whole number of 1 or more.

    Args:
        counts: Name of each option, and its value.

    Raises:
        ArgumentError: One of them is another number, or no number.
    """
    for name, value in counts.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ArgumentError(
                f"{name} is {value!r}; expected a whole number of 1 or more.",
                f"leave {name} out for the default.",
            )


def format_change(outputs: Mapping[str, tuple[float, float]]) -> list[str]:
    """A line for each of several outputs."""
    lines = []
    for name, (before_db, after_db) in outputs.items():
        lines.append(f"  output {printable(name)}: SQNR {before_db:.2f} to {after_db:.2f} dB")
    return lines


def add_to_bias(layer: Any, shift: torch.Tensor) -> None:
    """Add to the bias of a layer, which is created if it does not exist.

    Args:
        layer: A convolution or linear layer.
        shift: `[Cout]`.
    """
    weight = layer._parameters["weight"]
    if layer._parameters["bias"] is None:
        zeros = own_tensor(torch.zeros_like(weight.detach().flatten(1)[:, 0]))
        layer.bias = nn.Parameter(zeros, weight.requires_grad)
    bias = layer._parameters[
        "bias"
    ]  # during a forward, `layer.bias` may be another one, see QuantMixin
    with torch.no_grad():
        bias.copy_(bias.double() + shift)


def _unravel(positions: torch.Tensor, shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    """`torch.unravel_index`, which copies the shape to the device and waits for it."""
    coordinates: list[torch.Tensor] = []
    for size in reversed(shape):
        coordinates.insert(0, positions % size)
        positions = positions // size
    return tuple(coordinates)


def _for_each_axis(value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """For each axis, an argument that torch also accepts as one number for all axes."""
    if isinstance(value, int):
        return (value,) * dims
    if len(value) == 1:
        return tuple(value) * dims
    return tuple(value)


def _pad_widths(padding: Any, kernel: torch.Size, dilations: tuple[int, ...]) -> list[int]:
    """The padding of a convolution as the argument of `F.pad`: last axis first, both sides."""
    widths: list[int] = []
    if padding == "same":
        for size, dilation in zip(reversed(kernel), reversed(dilations), strict=True):
            total = dilation * (size - 1)
            widths += [total // 2, total - total // 2]
        return widths
    if padding == "valid":
        padding = 0
    for width in reversed(_for_each_axis(padding, len(kernel))):
        widths += [width, width]
    return widths
