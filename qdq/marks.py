"""The operator that stands for a quantizer while torch captures a model.

The arithmetic of a quantizer is about ten operators of torch and twenty of ONNX, most of which compute a constant.
torch traces each of them several times and its optimizer folds them away again, which made the export of small layers
several times as slow. The operator here is one node all the way; `graph.expand_marks` writes Q and DQ in its place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import torch
from onnx.defs import OpSchema
from onnxscript.values import Op, Opset
from torch import nn

from qdq.graph.expand_marks import DOMAIN, MARK_OP
from qdq.quantize import resolve_axis
from qdq.quantizer import TensorQuantizer, named_quantizers

_MARK_UNIT = (
    2.0**60
)  # no real tensor has such a scale; its product with a 24-bit number is exact in float32
_DEFAULT_AXIS = 1  # of QuantizeLinear; it has no meaning for one range

_library = torch.library.Library(DOMAIN, "DEF")  # type: ignore[no-untyped-call]
_SIGNATURE = (
    "fake_quantize(Tensor inputs, float mark, int axis, int num_ranges, int code_type) -> Tensor"
)
_library.define(_SIGNATURE)  # type: ignore[no-untyped-call]


def _copy(
    inputs: torch.Tensor, mark: float, axis: int, num_ranges: int, code_type: int
) -> torch.Tensor:
    return inputs.clone()


_library.impl("fake_quantize", _copy, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]

_NODE = Op(
    Opset(DOMAIN, 1),
    MARK_OP,
    OpSchema(
        MARK_OP,
        DOMAIN,
        1,
        inputs=[OpSchema.FormalParameter("inputs", "T")],
        outputs=[OpSchema.FormalParameter("outputs", "T")],
        type_constraints=[("T", ["tensor(float)"], "")],
        attributes=[
            OpSchema.Attribute("mark", OpSchema.AttrType.FLOAT),
            OpSchema.Attribute("axis", OpSchema.AttrType.INT),
            OpSchema.Attribute("num_ranges", OpSchema.AttrType.INT),
            OpSchema.Attribute("code_type", OpSchema.AttrType.INT),
        ],
    ),
)


def _write_node(inputs: Any, mark: float, axis: int, num_ranges: int, code_type: int) -> Any:
    return _NODE(inputs, mark=mark, axis=axis, num_ranges=num_ranges, code_type=code_type)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.qdq.fake_quantize.default: _write_node
}
"""How `torch.onnx.export` writes the operator: its `custom_translation_table`."""


class Mark:
    """A scale that identifies a quantizer; it replaces `TensorQuantizer._quantize` while a model is captured.

    Args:
        name: Dotted name of the quantizer.
        quantizer: The quantizer.
        number: From 1, unique in the model.

    Attributes:
        scale: The scale.
        has_run: Whether the quantizer has quantized a tensor.
    """

    def __init__(self, name: str, quantizer: TensorQuantizer, number: int) -> None:
        self.name = name
        self.quantizer = quantizer
        self.scale = number * _MARK_UNIT
        self.has_run = False

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        self.has_run = True
        amax = self.quantizer.amax
        axis = None if amax is None else resolve_axis(inputs, amax, self.quantizer.axis)
        if amax is None or axis is None:
            axis, num_ranges = _DEFAULT_AXIS, 0
        else:
            num_ranges = amax.numel()
        is_float32 = inputs.dtype == torch.float32  # a cast that does nothing would be a node, too
        values = inputs if is_float32 else inputs.float()
        is_fp8 = self.quantizer.format.is_float
        code_type = ir.DataType.FLOAT8E4M3FN if is_fp8 else ir.DataType.INT8
        result: torch.Tensor = torch.ops.qdq.fake_quantize(
            values, self.scale, axis, num_ranges, int(code_type)
        )
        return result if is_float32 else result.to(inputs.dtype)


@contextmanager
def marked(model: nn.Module) -> Iterator[list[Mark]]:
    """Have each enabled quantizer of a model write its mark."""
    marks: list[Mark] = []
    for name, quantizer in named_quantizers(model):
        if quantizer.is_enabled:
            marks.append(Mark(name, quantizer, number=len(marks) + 1))
    try:
        for mark in marks:
            vars(mark.quantizer)["_quantize"] = mark
        yield marks
    finally:
        for mark in marks:
            vars(mark.quantizer).pop("_quantize", None)
