"""Will int8 or FP8 pay? The time of a file on a GPU and of its network in fp16, predicted from the expected kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import onnx_ir as ir

from qdq.graph.code_types import list_lacking
from qdq.graph.coverage import copy_for_one_sample
from qdq.graph.fusion import ExpectedKernel, Fusion, count_elements
from qdq.graph.pairs import input_of, is_op
from qdq.graph.work import count_macs
from qdq.product_types import list_low_types, word_of
from qdq.roofline import KERNEL_MICROSECONDS, Gpu, NumberType, estimate_kernel, find_gpu
from qdq.text import printable

WORTHWHILE_RATIO = 1.05
"""Below this int8 or FP8 does not pay: 5 % is what two measurements of one engine may differ by."""

_SHOWN_LAYERS = 5
_LARGE_FRACTION = 0.05


@dataclass(frozen=True)
class LayerTime:
    """Predicted time of a layer and of what is fused into it, in microseconds.

    Args:
        name: Name of the ONNX node that gives its kernel the name.
        float16: In the float network in fp16; 0 if it has no such kernel there.
        int8: In the file; 0 if it has no such kernel there.
        kind: What its kernel does: "product", "attention", "reduction", "pointwise" or "convert" (only Q, DQ and
            changes of type).
    """

    name: str
    float16: float
    int8: float
    kind: str


@dataclass(frozen=True)
class Loss:
    """A part of the time that the file need not take.

    Args:
        microseconds: How much.
        cause: Where it comes from.
        fix: What to do.
    """

    microseconds: float
    cause: str
    fix: str


@dataclass(frozen=True)
class Payoff:
    """Predicted times of a file on a GPU, in microseconds.

    Args:
        gpu: Name of the GPU (`qdq.roofline.GPUS`).
        inputs: Input name -> its shape, such as "1x3x224x224".
        float16: The same network without Q/DQ in fp16.
        int8: The file with the types that it has: what TensorRT 11 and TensorRT-RTX run.
        int8_half_rest: The file with its float part in fp16: what `trtexec --int8 --fp16` up to TensorRT 10 runs.
        num_kernels: Kernels that are expected of the file.
        layers: The layers that decide: the largest differences between the file and fp16.
        losses: What the file loses its time with, the largest first.
        num_unknown: Kernels that are not counted, because a size or the work is not in the file.
        types: The types below 16 bit in which products run, by TensorRT's names; int8 if there are none.
        word: They for texts, such as "int8 and FP8".
        ratio: How many times as fast as fp16 the file is.
        pays: Whether it is faster by more than two measurements may differ.
    """

    gpu: str
    inputs: dict[str, str]
    float16: float
    int8: float
    int8_half_rest: float
    num_kernels: int
    layers: tuple[LayerTime, ...]
    losses: tuple[Loss, ...]
    num_unknown: int
    types: tuple[str, ...] = ("Int8",)
    word: str = field(init=False)
    ratio: float = field(init=False)
    pays: bool = field(init=False)

    def __post_init__(self) -> None:
        """Set what follows from the times. These are fields, so that the JSON files have them."""
        object.__setattr__(self, "word", " and ".join(map(word_of, self.types)))
        object.__setattr__(self, "ratio", self.float16 / self.int8)
        object.__setattr__(self, "pays", self.ratio >= WORTHWHILE_RATIO)

    def format_table(self) -> str:
        """The times, then the layers that decide."""
        inputs = ", ".join(f"{printable(name)} {shape}" for name, shape in self.inputs.items())
        lines = [
            f"predicted on {self.gpu} for {inputs}: fp16 {_milliseconds(self.float16)}, "
            f"{self.word} {_milliseconds(self.int8)}, {self.ratio:.2f} times as fast"
        ]
        if self.int8_half_rest < self.int8:
            ratio = self.float16 / self.int8_half_rest
            lines[0] += (
                f"; with the float part in fp16 {_milliseconds(self.int8_half_rest)}, "
                f"{ratio:.2f} times as fast"
            )
        if self.num_unknown:
            lines[0] += f" ({self.num_unknown} kernels of unknown size not counted)"
        lines.append("the layers that decide, in microseconds:")
        lines.append(f"  {'fp16':>8}  {self.word:>8}  layer")
        for layer in self.layers:
            lines.append(f"  {layer.float16:8.1f}  {layer.int8:8.1f}  {printable(layer.name)}")
        return "\n".join(lines)


def predict_payoff(
    model: ir.Model, gpu: str, *, may_infer: bool = True, data_prop: bool = True
) -> Payoff | None:
    """Predict whether the Q/DQ of a file, int8 or FP8, pay on a GPU.

    The float network is the same graph without its Q/DQ, all of it in fp16. Both are cut into the kernels that TensorRT
    is expected to make (`graph.fusion`), and each kernel takes the time of `roofline.estimate_kernel`. Caches, memory
    formats and the choice of tactics are not modelled, and the rates are peaks: the ratio says more than the times.

    Args:
        model: A file with Q/DQ; not changed. A dynamic batch counts as 1.
        gpu: Name of the GPU.
        may_infer: Whether onnx may infer shapes; a damaged file can crash it.
        data_prop: Whether shape inference may follow the values of shape computations.

    Returns:
        None if no kernel has a known size, or if the GPU lacks a type of the file: TensorRT would refuse it.

    Raises:
        ArgumentError: An unknown GPU.
    """
    rates = find_gpu(gpu)
    if any(list_lacking(model.graph, rates.sm)):
        return None
    if may_infer:
        model = copy_for_one_sample(model, data_prop)
    float16 = _Schedule(Fusion(model, with_pairs=False, is_half=True), rates)
    int8 = _Schedule(Fusion(model, with_pairs=True, is_half=False), rates)
    half_rest = _Schedule(Fusion(model, with_pairs=True, is_half=True), rates)
    if not float16.times or not int8.times:
        return None
    return Payoff(
        gpu=gpu,
        inputs={str(value.name): _describe_shape(value) for value in model.graph.inputs},
        float16=float16.total,
        int8=int8.total,
        int8_half_rest=min(half_rest.total, int8.total),
        num_kernels=len(int8.times),
        layers=tuple(_choose_layers(float16, int8)),
        losses=tuple(_list_losses(float16, int8, half_rest)),
        num_unknown=int8.num_unknown,
        types=tuple(int8.list_types()),
    )


class _Schedule:
    """The kernels of a graph and their times.

    Args:
        fusion: The kernels.
        gpu: The rates.
    """

    def __init__(self, fusion: Fusion, gpu: Gpu) -> None:
        self._fusion = fusion
        self.times: dict[ExpectedKernel, float] = {}
        self.num_unknown = 0
        for kernel in fusion.kernels:
            time = _time_kernel(fusion, kernel, gpu)
            if time is None:
                self.num_unknown += 1
            else:
                self.times[kernel] = time

    @property
    def total(self) -> float:
        """All kernels, in microseconds."""
        return sum(self.times.values())

    def list_types(self) -> list[str]:
        """The types below 16 bit of the products; int8 if there are none."""
        types: list[str] = []
        for kernel in self.times:
            types += map(self._fusion.find_low_type, kernel.products)
        return list_low_types(types)

    def sum_by_name(self) -> dict[tuple[str, str], float]:
        """Kind and name of the kernels -> their time."""
        sums: dict[tuple[str, str], float] = {}
        for kernel, time in self.times.items():
            key = (kernel.kind, kernel.name)
            sums[key] = sums.get(key, 0.0) + time
        return sums

    def sum_kind(self, kind: str) -> float:
        """The time of all kernels of a kind."""
        return sum(time for kernel, time in self.times.items() if kernel.kind == kind)


def _time_kernel(fusion: Fusion, kernel: ExpectedKernel, gpu: Gpu) -> float | None:
    """Time of a kernel in microseconds; None if a size or the work of a product is not known."""
    num_bytes = fusion.count_bytes(kernel)
    if num_bytes is None:
        return None
    if kernel.kind not in ("product", "attention"):
        return estimate_kernel(gpu, number_type="fp16", num_bytes=num_bytes)
    macs = 0
    outputs = 0
    for product in kernel.products:
        product_macs = count_macs(product)
        product_outputs = count_elements(product.outputs[0])
        if product_macs is None or product_outputs is None:
            return None
        macs += product_macs
        outputs = max(outputs, product_outputs)
    return estimate_kernel(
        gpu,
        number_type=_number_type(fusion, kernel.products[0]),
        num_bytes=num_bytes,
        macs=macs,
        outputs=outputs,
        channels=_channels_of(kernel.products[0]),
    )


def _number_type(fusion: Fusion, product: ir.Node) -> NumberType:
    """The type that a product is computed in."""
    low_type = fusion.find_low_type(product)
    if low_type:
        return "int8" if low_type == "Int8" else "fp8"
    return "fp16" if fusion.is_half(product.outputs[0]) else "fp32"


def _channels_of(product: ir.Node) -> int | None:
    """Input channels of a group of a convolution; None for other products, or if they are not known."""
    weight = input_of(product, 1)
    if not is_op(product, "Conv") or weight is None or weight.shape is None:
        return None
    channels = weight.shape[1] if len(weight.shape) > 1 else None
    return channels if isinstance(channels, int) else None


def _choose_layers(float16: _Schedule, int8: _Schedule) -> Iterator[LayerTime]:
    """The layers whose times differ most."""
    float_times = float16.sum_by_name()
    int8_times = int8.sum_by_name()
    keys = dict.fromkeys([*int8_times, *float_times])

    def difference(key: tuple[str, str]) -> float:
        return abs(int8_times.get(key, 0.0) - float_times.get(key, 0.0))

    for key in sorted(keys, key=difference, reverse=True)[:_SHOWN_LAYERS]:
        kind, name = key
        yield LayerTime(name, float_times.get(key, 0.0), int8_times.get(key, 0.0), kind)


def _list_losses(float16: _Schedule, int8: _Schedule, half_rest: _Schedule) -> list[Loss]:
    """What a file loses at least 5 % of its time with, the largest first."""
    losses = [
        Loss(
            int8.total - half_rest.total,
            "the float part in fp32",
            "export with --precision fp16: the float part, such as a head, then runs in fp16.",
        ),
        Loss(
            half_rest.sum_kind("convert") - float16.sum_kind("convert"),
            "Q/DQ in kernels of their own",
            "fuse them: fix the findings QDQ110 to QDQ119, or leave the layers around them in float.",
        ),
        Loss(
            _sum_split_attention(float16, half_rest),
            "attention in several kernels",
            "remove the Q/DQ inside attention (QDQ118), so that it is one kernel again.",
        ),
        Loss(
            _sum_slower(float16, half_rest),
            "layers that Q/DQ make no faster, such as a stem of 3 channels or a depthwise convolution",
            "leave the layers that decide in float.",
        ),
        Loss(
            KERNEL_MICROSECONDS * len(half_rest.times),
            f"the launch of {len(half_rest.times)} kernels",
            "give larger batches or images; for one small sample stay in fp16.",
        ),
    ]
    large = [loss for loss in losses if loss.microseconds >= _LARGE_FRACTION * int8.total]
    return sorted(large, key=lambda loss: -loss.microseconds)


def _sum_split_attention(float16: _Schedule, half_rest: _Schedule) -> float:
    """The time that attention takes longer than in its one kernel in fp16."""
    nodes: set[ir.Node] = set()
    for kernel in float16.times:
        if kernel.kind == "attention":
            nodes.update(kernel.nodes)
    time = 0.0
    for kernel, microseconds in half_rest.times.items():
        if not nodes.isdisjoint(kernel.nodes):
            time += microseconds
    return time - float16.sum_kind("attention")


def _sum_slower(float16: _Schedule, half_rest: _Schedule) -> float:
    """The time of the products that take at least as long as in fp16."""
    float_times = float16.sum_by_name()
    losses = 0.0
    for (kind, name), time in half_rest.sum_by_name().items():
        if kind == "product" and time >= float_times.get((kind, name), time + 1):
            losses += time
    return losses


def _describe_shape(value: ir.Value) -> str:
    """A shape such as "1x3x224x224"; a size that is not known is a question mark."""
    if value.shape is None:
        return "?"
    return "x".join(str(size) if isinstance(size, int) else "?" for size in value.shape)


def _milliseconds(microseconds: float) -> str:
    return f"{microseconds / 1000:.3f} ms"
