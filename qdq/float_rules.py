"""Every reason why a layer or a function call stays in float by default: int8 would be missing, slow or inaccurate.

`swap` asks `ModuleRules` about modules, `rewire` asks `CallRules` about function calls. Patterns in `include` override
these rules. See `tensorrt-qdq-rules.md` for their ids.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import Linear
from torch.nn.modules.pooling import _AdaptiveAvgPoolNd, _AvgPoolNd
from torch.nn.parameter import UninitializedParameter

from qdq.dataflow import Dataflow
from qdq.forward import Contraction, Operation
from qdq.functions import (
    ADDITIONS,
    ATTENTION,
    AVERAGE_POOLINGS,
    CONTRACTIONS,
    CONVOLUTIONS,
    FUNCTIONS,
    LINEAR,
    MATRIX_PRODUCTS,
    MEANS,
    MULTIPLICATIONS,
    RECURRENT,
    RESIZES,
    WEIGHTED,
)
from qdq.graph.code_types import LARGEST_FP8_KERNEL
from qdq.nn import QuantInputMixin

MIN_CHANNELS = 16  # R-CONV-3
MIN_MATMUL_SIZE = 16  # R-MM-3

_NORMALIZATIONS = (_NormBase, nn.LayerNorm, nn.GroupNorm)
_NEVER_INT8 = (*_NORMALIZATIONS, nn.Embedding, nn.EmbeddingBag, nn.PReLU)
_PRODUCTS = MATRIX_PRODUCTS | ATTENTION

_LAST_CONVOLUTION = "last convolution: it writes an output of the network (R-OUT)"
_EXPECTATION = "expectation over a softmax: it decodes an output (R-OUT)"
ONLY_PRODUCTS = "TensorRT computes products in FP8, and nothing else (R-FP8)"
_ATTENTION = "product of attention: int8 Q/DQ would break the fused attention kernel (R-MHA-2)"
_PRODUCT_OF_ACTIVATIONS = (
    "product of two activations: in int8 only if rewire_operations includes it (R-MM-4)"
)
_RECURRENT = "recurrent: TensorRT has no int8 path for it (R-RNN)"


def reason_against_type(module: nn.Module) -> str:
    """Why a module stays in float because of its class; "" if it does not (R-LN, R-SM, R-RNN).

    Args:
        module: A module with parameters.
    """
    if isinstance(module, _NEVER_INT8):
        return "normalisation, embedding or activation: no int8 counterpart (R-LN, R-SM)"
    if isinstance(module, nn.RNNBase | nn.RNNCellBase):
        return _RECURRENT
    return ""


def reason_against_convolution(weight: Sequence[int], groups: int, is_first: bool) -> str:
    """Why a convolution stays in float; "" if it does not (R-CONV-3, R-CONV-4, R-CONV-7).

    Args:
        weight: Shape `[Cout, Cin / groups, kernel ...]`.
        groups: Number of groups.
        is_first: Whether it is the first convolution of the network, which has few input channels by nature.
    """
    outputs, per_group, *kernel = weight
    inputs = per_group * groups
    if len(kernel) == 3:
        return "3-D convolution: int8 is fragile (R-CONV-7)"
    if 1 < groups < inputs:
        return "grouped convolution: TensorRT splits it into one kernel per group (R-CONV-4)"
    if outputs >= MIN_CHANNELS and per_group >= MIN_CHANNELS:
        return ""

    if groups == 1:
        is_aligned = outputs % 8 == 0 or inputs % 8 == 0
        is_wide = is_first or max(outputs, inputs) >= MIN_CHANNELS
        fits = is_aligned and is_wide and len(set(kernel)) == 1
    else:
        fits = outputs % 8 == 0 and min(kernel) >= 3
    if fits:
        return ""
    return f"{inputs} to {outputs} channels, kernel {kernel}: no efficient int8 kernel (R-CONV-3)"


def reason_against_fp8(module: nn.Module) -> str:
    """Why a layer that int8 could quantize stays in float for FP8; "" if it does not (R-FP8, R-CONV-8).

    Args:
        module: A layer of a mapped type.
    """
    weight = getattr(module, "weight", None)
    if weight is None and not isinstance(module, nn.MultiheadAttention):
        return ONLY_PRODUCTS
    return _reason_against_fp8_kernel(module.kernel_size) if isinstance(module, _ConvNd) else ""


def reason_against_fp8_call(operation: Operation, flow: Dataflow) -> str:
    """The same for a call of a function with a weight (R-CONV-8).

    Args:
        operation: The call; the weight of a convolution is `[outputs, inputs, kernel ...]`.
        flow: One forward that contains it.
    """
    if operation.function not in CONVOLUTIONS & WEIGHTED:
        return ""
    return _reason_against_fp8_kernel(flow.shapes[operation.inputs[1]][2:])


def _reason_against_fp8_kernel(kernel: Sequence[int]) -> str:
    if math.prod(kernel) <= LARGEST_FP8_KERNEL:
        return ""
    sizes = " x ".join(map(str, kernel))
    return f"kernel {sizes}: above {LARGEST_FP8_KERNEL} positions TensorRT-RTX has no FP8 kernel (R-CONV-8)"


def reason_against_linear(weight: Sequence[int]) -> str:
    """Why a matrix product stays in float; "" if it does not (R-MM-3).

    Args:
        weight: Shape `[outputs, inputs]`.
    """
    outputs, inputs = weight
    if min(outputs, inputs) >= MIN_MATMUL_SIZE:
        return ""
    return f"{inputs} to {outputs} features: a product this small is slower in int8 (R-MM-3)"


class ModuleRules:
    """The rules that leave a module in float although it has a quantized counterpart.

    Args:
        modules: The modules of the model that is planned, by dotted name.
        flow: One forward of it, if it has run; without one, only the shapes of the weights count.
    """

    def __init__(self, modules: Mapping[str, nn.Module], flow: Dataflow | None) -> None:
        self._modules = modules
        self._flow = flow
        self._first = _find_first_convolution(modules, flow)
        self._weights = _list_weights(modules.values())
        self._writes_output: set[str] = set()
        self._decodes: set[str] = set()  # modules of which every product is an expectation
        self._attends: set[str] = set()
        self._results: dict[str, list[int]] = {}  # module -> tensors that its functions return
        if flow is None:
            return
        for operation in flow.operations:
            self._results.setdefault(operation.module, []).extend(operation.outputs)
        for operation in flow.output_convolutions():
            self._writes_output.add(operation.module)
        self._decodes = _list_decoders(flow)
        for operation in flow.attention_products():
            self._attends.add(operation.module)

    def reason_against(self, name: str, module: nn.Module) -> str:
        """Why a module stays in float.

        Args:
            name: Dotted name.
            module: The module, of a mapped type.

        Returns:
            The reason with the id of the rule; "" if no rule applies.
        """
        if isinstance(module, _ConvTransposeNd):
            return "transposed convolution: int8 kernels are missing, wrong or slow (R-CT-3)"
        if name in self._writes_output:
            return _LAST_CONVOLUTION
        if name in self._decodes:
            return _EXPECTATION
        if isinstance(module, _ConvNd):
            is_first = name == self._first
            return reason_against_convolution(module.weight.shape, module.groups, is_first)
        if isinstance(module, Linear):
            return reason_against_linear(module.weight.shape)
        if isinstance(module, nn.MultiheadAttention):
            return reason_against_linear((module.embed_dim, min(module.kdim, module.vdim)))
        return self._against_pooling(name, module)

    def _against_pooling(self, name: str, module: nn.Module) -> str:
        """R-GAP and R-AP; "" for a module that is not an average pooling."""
        if isinstance(module, _AdaptiveAvgPoolNd) and _is_global(module.output_size):
            return "global average pooling: a tiny tensor that stays float (R-GAP)"
        if isinstance(module, _AvgPoolNd | _AdaptiveAvgPoolNd) and not self._feeds_product(name):
            return "average pooling that no int8 layer reads (R-AP)"
        return ""

    def _feeds_product(self, name: str) -> bool:
        """Whether a product that no rule leaves in float reads the result of a module.

        Args:
            name: Dotted name of the module. Without a forward its readers are assumed to run in int8.
        """
        if self._flow is None:
            return True
        readers: set[str] = set()
        for reader in self._flow.readers_behind(self._results.get(name, ())):
            if reader.function in CONVOLUTIONS | LINEAR:
                readers.add(reader.module)
        return any(not self.reason_against(reader, self._modules[reader]) for reader in readers)

    def reason_against_products(self, calls: Iterable[Contraction]) -> str:
        """Why the products that a forward calls as functions stay in float (R-MHA-2, R-RNN).

        Args:
            calls: The products that one module calls.

        Returns:
            The reason; "" if one of them reads a parameter or is neither a matrix product nor attention.
        """
        calls = list(calls)
        if all(call.function in RECURRENT for call in calls):
            return _RECURRENT
        if all(call.module in self._decodes for call in calls):
            return _EXPECTATION
        for call in calls:
            if call.function not in _PRODUCTS or call.storages & self._weights:
                return ""
        if any(call.function in ATTENTION or call.module in self._attends for call in calls):
            return _ATTENTION
        return _PRODUCT_OF_ACTIVATIONS


def _list_decoders(flow: Dataflow) -> set[str]:
    """The modules that multiply only to compute expectations over a softmax."""
    expectations = {operation.name for operation in flow.expectations()}
    decoders: set[str] = set()
    multipliers: set[str] = set()
    for operation in flow.operations:
        if operation.name in expectations:
            decoders.add(operation.module)
        elif operation.function in CONTRACTIONS:
            multipliers.add(operation.module)
    return decoders - multipliers


def _find_first_convolution(modules: Mapping[str, nn.Module], flow: Dataflow | None) -> str | None:
    """The module of the convolution that runs first.

    Args:
        modules: The modules of the model, by dotted name.
        flow: One forward. Without one, the first convolution among the modules counts.
    """
    first = None if flow is None else flow.first_convolution()
    if first is not None:
        return first.module
    for name, module in modules.items():
        if isinstance(module, _ConvNd):
            return name
    return None


def _list_weights(modules: Iterable[nn.Module]) -> set[int]:
    """Addresses of the memory of all parameters; views of a parameter have the same address."""
    addresses: set[int] = set()
    for module in modules:
        for parameter in module.parameters(recurse=False):
            if not isinstance(parameter, UninitializedParameter):
                addresses.add(parameter.untyped_storage().data_ptr())
    return addresses


def _is_global(output_size: object) -> bool:
    """Whether an adaptive pooling leaves one pixel.

    Args:
        output_size: A size for all dimensions, or one for each.
    """
    sizes = output_size if isinstance(output_size, Iterable) else (output_size,)
    return set(sizes) == {1}


class CallRules:
    """The rules that leave a function call in float.

    Args:
        modules: The modules of the model, by dotted name.
        flow: One forward of it.
        is_quantized: Whether a product runs in int8, as a layer or as a call.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        flow: Dataflow,
        is_quantized: Callable[[Operation], bool],
    ) -> None:
        self._modules = modules
        self._flow = flow
        self._is_quantized = is_quantized
        self._first = flow.first_convolution()
        self._writes_output = {operation.name for operation in flow.output_convolutions()}
        self._decodes = {operation.name for operation in flow.expectations()}
        self._attends = {operation.name for operation in flow.attention_products()}

    def reason_against(self, operation: Operation) -> str:
        """Why a function call stays in float.

        Args:
            operation: The call.

        Returns:
            The reason with the id of the rule; "" if no rule applies.
        """
        function = operation.function
        if operation.name in self._decodes:
            return _EXPECTATION
        if function in ADDITIONS:
            return self._against_addition(operation)
        if function in WEIGHTED:
            return self._against_weighted(operation)
        if function in RESIZES:
            return self._against_resize(operation)
        if function in AVERAGE_POOLINGS and not self._feeds_quantized(operation):
            return "nothing quantized reads it (R-AP)"
        if function in _PRODUCTS:
            return self._against_product(operation)
        if function in MEANS:
            return "global average: a tiny tensor that stays float (R-GAP)"
        if function in MULTIPLICATIONS:
            return "a product of activations gets no Q/DQ, so that SiLU and gates stay fused (R-SILU, R-MUL)"
        return ""

    def _against_addition(self, operation: Operation) -> str:
        """R-ADD-2 and R-ADD-4: a residual add has a shortcut, or int8 layers before and after it.

        Args:
            operation: The add of two computed tensors.
        """
        first, second = operation.inputs[:2]
        if self._flow.shapes[first] != self._flow.shapes[second]:
            return "its operands differ in shape: not a residual add (R-ADD-2)"
        if first in self._flow.inputs or second in self._flow.inputs:
            return "an operand is the input of the network (R-ADD-2)"
        convolutions = _drop_none(self._backbones_of(operation))
        if convolutions and not any(map(self._is_quantized, convolutions)):
            names = {convolution.module for convolution in convolutions}
            return f"its convolution {' and '.join(sorted(names))} is in float"
        if self.find_shortcut(operation) is not None:
            return ""
        if convolutions:
            return "it branches off directly after a convolution: not a residual add (R-ADD-2)"

        behind_activations = _drop_none(self._backbones_of(operation, through_activations=True))
        if not any(map(self._is_quantized, behind_activations)):
            return "no operand comes from an int8 convolution (R-ADD-4)"
        if not self._feeds_quantized(operation):
            return "nothing quantized reads the sum (R-ADD-4)"
        return ""

    def find_shortcut(self, operation: Operation) -> int | None:
        """Which operand of an add is the shortcut of a residual block (R-ADD-2).

        It is the operand that does not come from an int8 convolution. If both do, it is the operand that is nearer to
        the tensor where their paths split.

        Args:
            operation: The add of two computed tensors.

        Returns:
            Position of the operand; None if neither comes from an int8 convolution, or if their paths split directly
            after one.
        """
        first, second = operation.inputs[:2]
        convolutions = self._backbones_of(operation)
        fork = self._flow.find_fork(first, second)
        if fork is not None:
            fork_backbone = self._flow.backbone_of(fork.value)
            if fork_backbone is not None and fork_backbone in convolutions:
                return None

        is_backbone = [
            convolution is not None and self._is_quantized(convolution)
            for convolution in convolutions
        ]
        if not any(is_backbone):
            return None
        if not all(is_backbone):
            return is_backbone.index(False)
        if convolutions[0] is convolutions[1]:
            return None
        if fork is not None and fork.to_first < fork.to_second:
            return 0
        return 1

    def _backbones_of(
        self, operation: Operation, *, through_activations: bool = False
    ) -> list[Operation | None]:
        """The convolution that each of the two operands of an add comes from."""
        return [
            self._flow.backbone_of(value, through_activations=through_activations)
            for value in operation.inputs[:2]
        ]

    def _against_weighted(self, operation: Operation) -> str:
        """The rules for layers, applied to `F.linear` and `F.conv2d`.

        Args:
            operation: The call; its weight is `[outputs, inputs, kernel ...]`.
        """
        weight = self._flow.shapes[operation.inputs[1]]
        if operation.function in LINEAR:
            return reason_against_linear(weight)
        if operation.name in self._writes_output:
            return _LAST_CONVOLUTION
        groups = self._flow.shapes[operation.inputs[0]][1] // weight[1]
        return reason_against_convolution(weight, groups, is_first=operation is self._first)

    def _against_resize(self, operation: Operation) -> str:
        """R-RSZ: a resize that copies is worth a quantizer if an int8 layer reads it."""
        if not self._flow.is_copy(operation):
            return "interpolates: its output is not a copy of its input"
        if not self._feeds_quantized(operation):
            return "nothing quantized reads it"
        return ""

    def _against_product(self, operation: Operation) -> str:
        """The rule for linear layers, applied to a product with a weight; R-MHA-2 for one of two activations."""
        weight = find_weight(operation, self._flow)
        if weight is not None:
            inputs, outputs = self._flow.shapes[operation.inputs[weight.position]]
            if weight.axis == 0:
                inputs, outputs = outputs, inputs
            return reason_against_linear((outputs, inputs))
        if operation.function in MATRIX_PRODUCTS:
            positions = list_factors(operation)
            factors = [operation.inputs[position] for position in positions]
            if not all(map(self._flow.is_computed, factors)):
                return (
                    f"product with a weight by {operation.function} that is no matrix with the inputs first: "
                    "call F.linear, or include it"
                )
            if operation.name not in self._attends:
                return _PRODUCT_OF_ACTIVATIONS
        return _ATTENTION

    def _feeds_quantized(self, operation: Operation) -> bool:
        """Whether something quantized reads the result of a call, directly or through activations and copies."""
        for reader in self._flow.readers_behind(operation.outputs):
            is_layer = isinstance(self._modules[reader.module], QuantInputMixin)
            if is_layer or self._is_quantized(reader):
                return True
        return False


def list_factors(operation: Operation) -> tuple[int, ...]:
    """Positions of the tensors that a product multiplies, among all its tensors.

    Args:
        operation: The call of a product.
    """
    return FUNCTIONS[operation.function].factors or tuple(range(len(operation.inputs)))


class Weight(NamedTuple):
    """The weight of a product.

    Args:
        position: Its position among all tensors of the call.
        axis: Its axis of the outputs, each of which has a range (R-AXIS).
    """

    position: int
    axis: int


def find_weight(operation: Operation, flow: Dataflow) -> Weight | None:
    """The weight of a call that computes what a linear layer or a convolution does.

    Args:
        operation: Any call.
        flow: One forward that contains it.

    Returns:
        None for a product of computed tensors, of more than two tensors, or of a weight that is no matrix.
    """
    if operation.function in WEIGHTED:
        return Weight(1, 0)
    if operation.function not in MATRIX_PRODUCTS:
        return None
    factors = list_factors(operation)
    if len(factors) != 2 or flow.is_computed(operation.inputs[factors[1]]):
        return None
    first, second = (flow.shapes[operation.inputs[position]] for position in factors)
    if len(second) != 2 or not flow.is_computed(operation.inputs[factors[0]]):
        return None
    axis = FUNCTIONS[operation.function].output_axis
    if operation.function == "einsum":
        axis = _find_output_label(str(operation.arguments.get("0", "")), len(first))
    return None if axis is None else Weight(factors[1], axis)


def _find_output_label(equation: str, rank: int) -> int | None:
    """The axis of the outputs in the second factor of an einsum, if it is a matrix as in a linear layer.

    Args:
        equation: As for `torch.einsum`.
        rank: Number of dimensions of the first factor.

    Returns:
        None for another equation.
    """
    operands, _, result = equation.replace(" ", "").replace("...", "").partition("->")
    first, _, second = operands.partition(",")
    if len(second) != 2 or len(set(first)) != len(first) or len(first) > rank:
        return None
    summed = [label for label in second if label in first and label not in result]
    outputs = [label for label in second if label not in first and label in result]
    if len(summed) != 1 or len(outputs) != 1:
        return None
    return second.index(outputs[0])


def _drop_none(operations: Iterable[Operation | None]) -> list[Operation]:
    """The operations in a list that may contain None."""
    return [operation for operation in operations if operation is not None]
