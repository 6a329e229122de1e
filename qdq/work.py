"""Work of a model in torch: the multiply-accumulate operations (MACs) of each module and call in one float forward.

A function counts if it sums products, as in `graph.work` for ONNX: convolutions, matrix products, attention, recurrent
layers, transforms, interpolations. The work of an operator that is not torch's own is unknown, with few exceptions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from qdq.forward import ForwardTrace, trace_forward
from qdq.graph.work import count_fourier

Shape = Sequence[int]


def _count_attention(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _count_recurrent_layer(
    inputs: Shape, input_weight: Shape, hidden_weight: Shape, *_: Any, **__: Any
) -> int:
    return 2 * math.prod(inputs[:-1]) * (math.prod(input_weight) + math.prod(hidden_weight))


def _count_cudnn_layers(inputs: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    matrices = [math.prod(weight) for weight in weights if len(weight) == 2]
    return 2 * math.prod(inputs[:-1]) * sum(matrices)


def _count_batched_sum(_: Shape, first: Shape, second: Shape, **__: Any) -> int:
    return 2 * math.prod(first) * second[-1]


def _count_all_values(first: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(first)


def _count_bilinear(first: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * math.prod(first[:-1]) * math.prod(weight)


def _count_time_convolution(_: Shape, weight: Shape, *__: Any, out_shape: Shape, **___: Any) -> int:
    """`[T, N, Cin]` by a weight `[kernel, Cin, Cout]`."""
    return 2 * math.prod(out_shape) * math.prod(weight[:-1])


def _count_deformable(_: Shape, weight: Shape, *__: Any, out_shape: Shape, **___: Any) -> int:
    """Like a convolution with the weight `[Cout, Cin / groups, height, width]`."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


def _count_roi_align(_: Shape, __: Shape, *args: Any, out_shape: Shape, **___: Any) -> int:
    """Each bin sums `ratio` squared samples of four pixels; 0, unknown, if the ratio depends on the boxes."""
    ratio = args[3] if len(args) > 3 else 0
    return 2 * math.prod(out_shape) * 4 * int(max(ratio, 0) ** 2)


def _count_interpolation(taps: int, *, is_smoothed: bool = False) -> Callable[..., int]:
    """A formula of interpolations that read a number of pixels along each dimension whose size changes."""

    def count(inputs: Shape, *_: Any, out_shape: Shape, **__: Any) -> int:
        total = math.prod(out_shape)
        for before, after in zip(inputs, out_shape, strict=True):
            if before == after:
                continue
            widening = max(1.0, before / after) if is_smoothed else 1.0
            total *= math.ceil(taps * widening)
        return 2 * total

    return count


def _count_sampling(
    _: Shape, __: Shape, mode: int = 0, *___: Any, out_shape: Shape, **____: Any
) -> int:
    """Mode 0 is linear, 1 nearest and 2 cubic."""
    taps = {0: 2, 1: 0, 2: 4}[mode]
    return 2 * math.prod(out_shape) * int(taps ** (len(out_shape) - 2))


def _count_real_fourier(
    inputs: Shape, dimensions: Sequence[int], *_: Any, out_shape: Shape, **__: Any
) -> int:
    # The values of the longer side; the other has the half spectrum.
    longer = inputs if math.prod(inputs) >= math.prod(out_shape) else out_shape
    return _count_transforms(longer, dimensions, is_complex=False)


def _count_complex_fourier(inputs: Shape, dimensions: Sequence[int], *_: Any, **__: Any) -> int:
    return _count_transforms(inputs, dimensions, is_complex=True)


def _count_transforms(shape: Shape, dimensions: Sequence[int], *, is_complex: bool) -> int:
    """A transform along each dimension in turn."""
    total = 0
    for dimension in dimensions:
        length = max(shape[dimension], 1)
        total += math.prod(shape) // length * count_fourier(length, is_complex=is_complex)
    return 2 * total


# Floating point operations of the kernels that the counter of torch does not know, from the shapes of their arguments.
_aten = torch.ops.aten
_FLOP_FORMULAS: dict[Any, Callable[..., int]] = {
    _aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
    _aten.mkldnn_rnn_layer: _count_recurrent_layer,
    _aten._cudnn_rnn: _count_cudnn_layers,
    _aten.addbmm: _count_batched_sum,
    _aten.mv: _count_all_values,
    _aten.dot: _count_all_values,
    _aten.vdot: _count_all_values,
    _aten._trilinear: _count_bilinear,
    _aten.conv_tbc: _count_time_convolution,
    _aten.upsample_linear1d: _count_interpolation(2),
    _aten.upsample_bilinear2d: _count_interpolation(2),
    _aten.upsample_trilinear3d: _count_interpolation(2),
    _aten.upsample_bicubic2d: _count_interpolation(4),
    _aten._upsample_bilinear2d_aa: _count_interpolation(2, is_smoothed=True),
    _aten._upsample_bicubic2d_aa: _count_interpolation(4, is_smoothed=True),
    _aten.grid_sampler_2d: _count_sampling,
    _aten.grid_sampler_3d: _count_sampling,
    _aten._fft_r2c: _count_real_fourier,
    _aten._fft_c2r: _count_real_fourier,
    _aten._fft_c2c: _count_complex_fourier,
}
# Likewise for operators of torchvision, which may not be installed.
_FOREIGN_FORMULAS: dict[str, Callable[..., int]] = {
    "deform_conv2d": _count_deformable,
    "roi_align": _count_roi_align,
}


@dataclass(frozen=True)
class Work:
    """The work of one float forward.

    Args:
        macs: Dotted name of a module or call -> its MACs, for everything that has some; "" is the whole model.
        unknown: Calls of operators whose work is not known, by dotted name.
    """

    macs: Mapping[str, int]
    unknown: tuple[str, ...]

    @property
    def total(self) -> int:
        """All known MACs."""
        return self.macs.get("", 0)

    def share_of(self, names: Iterable[str]) -> float:
        """The fraction of all known MACs that some modules or calls have, 0 to 1.

        Args:
            names: Dotted names, none of them inside another.
        """
        return sum(self.macs.get(name, 0) for name in names) / max(self.total, 1)


def trace_work(model: nn.Module, batch: Any) -> tuple[ForwardTrace, Work]:
    """Run a model once, as `trace_forward` does, and count what each module and call multiplies.

    Args:
        model: Any module; quantizers should be off.
        batch: As for `forward.call_model`.
    """
    formulas = {**_FLOP_FORMULAS, **_list_foreign_formulas()}
    counter = FlopCounterMode(display=False, custom_mapping=formulas)
    # The counter reads the gradients of parameters by calling functions on them, which would appear in the trace.
    with freezing_parameters(model), counter:
        trace = trace_forward(model, batch, counter.get_total_flops)

    macs: Counter[str] = Counter()
    for operation in trace.operations:
        if not operation.metered:
            continue
        for name in {operation.name, *self_and_parents(operation.module)}:
            macs[name] += operation.metered // 2
    return trace, Work(macs, list_unknown_work(trace))


def list_unknown_work(trace: ForwardTrace) -> tuple[str, ...]:
    """The calls of operators whose work is not known, by dotted name.

    Args:
        trace: From `trace_work`.
    """
    names = [call.name for call in trace.operations if call.is_foreign and not call.metered]
    return tuple(dict.fromkeys(names))


def _list_foreign_formulas() -> dict[Any, Callable[..., int]]:
    """The formulas of the operators that are loaded."""
    formulas: dict[Any, Callable[..., int]] = {}
    for name, formula in _FOREIGN_FORMULAS.items():
        operator = getattr(torch.ops.torchvision, name, None)
        if operator is not None:
            formulas[operator] = formula
    return formulas


def self_and_parents(name: str) -> set[str]:
    """A dotted name, and those of all modules around it, "" among them."""
    parts = name.split(".")
    return {".".join(parts[:end]) for end in range(len(parts) + 1)}


@contextmanager
def freezing_parameters(model: nn.Module) -> Iterator[None]:
    """Compute no gradients for parameters in the block.

    Parameters created in `torch.inference_mode` never have gradients, and their flag cannot be restored.
    """
    parameters = []
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.is_inference():
            parameters.append(parameter)

    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)
