"""The kernels that TensorRT is expected to make of a graph: which nodes are fused, what each kernel reads and writes.

A model of the builder, not a copy: it has the fusions that decide about time (R-ACT, R-ADD-1, R-MHA-1, R-CAT-1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Literal

import onnx_ir as ir

from qdq.graph.coverage import find_promise, reason_for_float
from qdq.graph.pairs import QDQ_OPS, constant_of, input_of, is_op, parameters_of, producer_of
from qdq.graph.work import has_work

KernelKind = Literal["product", "attention", "reduction", "pointwise", "convert"]
"""What a kernel does; "convert" is nothing but Q, DQ and changes of type."""

# Kernels read and write through these; they cost nothing.
_VIEWS = (
    "Concat",
    "Dropout",
    "Flatten",
    "Identity",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Unsqueeze",
)
_REDUCTIONS = frozenset(
    {
        "ArgMax",
        "AveragePool",
        "CumSum",
        "GlobalAveragePool",
        "GlobalMaxPool",
        "GroupNormalization",
        "InstanceNormalization",
        "LayerNormalization",
        "LogSoftmax",
        "LpNormalization",
        "MaxPool",
        "NonMaxSuppression",
        "RMSNormalization",
        "ReduceL2",
        "ReduceMax",
        "ReduceMean",
        "ReduceSum",
        "Softmax",
        "TopK",
    }
)
_MOVING_OPS = ("MaxPool", "Transpose", "Resize", "DepthToSpace", "SpaceToDepth")
"""What computes int8 from int8."""
# Their outputs are sizes, which the host computes.
_SIZE_OPS = ("Shape", "Size")
_CONVERSIONS = (*QDQ_OPS, "Cast")
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(eq=False)
class ExpectedKernel:
    """One kernel that is expected in the engine.

    Args:
        kind: What it does.
        nodes: Its nodes, in graph order.
        reads: Tensors that it reads from memory, without constants.
        writes: Tensors that it writes to memory.
    """

    kind: KernelKind
    nodes: list[ir.Node]
    reads: list[ir.Value] = field(default_factory=list)
    writes: list[ir.Value] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of its first product; without one, of its first node that is no Q, DQ or Cast.

        A kernel that changes a tensor before a product is named after the product, "input of conv1/Conv".
        """
        if self.kind == "convert" and not is_op(self.nodes[0], *_CONVERSIONS):
            return f"input of {self.nodes[0].name}"
        for node in self.nodes:
            if has_work(node):
                return node.name or ""
        for node in self.nodes:
            if not is_op(node, *_CONVERSIONS):
                return node.name or ""
        return self.nodes[0].name or ""

    @property
    def products(self) -> list[ir.Node]:
        """Its nodes that multiply: one, or the two of an attention."""
        return [node for node in self.nodes if has_work(node)]


class Fusion:
    """The kernels of a graph.

    Args:
        model: A graph with shapes; not changed.
        with_pairs: Whether its Q/DQ are there. Without them the kernels are those of the float network.
        is_half: Whether its float32 tensors are float16: what a build with `--fp16`, or an export in that precision,
            makes of them. Attention is one kernel in 16 bit only.
    """

    def __init__(self, model: ir.Model, *, with_pairs: bool, is_half: bool) -> None:
        self._with_pairs = with_pairs
        self._is_half = is_half
        self._computed = _find_computed(model)
        self._kernel_of: dict[ir.Node, ExpectedKernel] = {}
        self._position: dict[ExpectedKernel, int] = {}
        for node in model.graph:
            if self._is_kernel_node(node):
                self._place(node)
        self._split_products()
        self.kernels = list(dict.fromkeys(self._kernel_of.values()))
        self._add_conversions()
        for kernel in self.kernels:
            self._connect(kernel)

    def item_bytes(self, value: ir.Value) -> int | None:
        """Bytes of one element of a tensor in memory; None if its type is not known."""
        if self._with_pairs and self._is_stored_quantized(value):
            return 1
        dtype = value.dtype
        if dtype is None:
            return None
        if self._is_half and dtype == ir.DataType.FLOAT:
            return 2
        return math.ceil(dtype.itemsize)

    def count_bytes(self, kernel: ExpectedKernel) -> int | None:
        """What a kernel reads and writes, the constants of products included; None if a size is not known.

        Inputs of the graph are in their own type for all kernels but products, which read them converted.
        """
        sizes: list[tuple[int | None, int | None]] = []
        for value in kernel.reads:
            if value.is_graph_input() and kernel.kind != "product" and value.dtype is not None:
                sizes.append((count_elements(value), math.ceil(value.dtype.itemsize)))
            else:
                sizes.append((count_elements(value), self.item_bytes(value)))
        sizes += [(count_elements(value), self.item_bytes(value)) for value in kernel.writes]
        if kernel.kind == "product":
            for operand in kernel.products[0].inputs:
                if operand is not None and operand not in self._computed:
                    item_bytes = (
                        1 if self._is_stored_constant(operand) else self.item_bytes(operand)
                    )
                    sizes.append((count_elements(operand), item_bytes))
        total = 0
        for elements, item_bytes in sizes:
            if elements is None or item_bytes is None:
                return None
            total += elements * item_bytes
        return total

    def _is_stored_constant(self, value: ir.Value) -> bool:
        """Whether a constant operand is stored as codes of 8 bit."""
        node = producer_of(value)
        while node is not None:
            if is_op(node, *QDQ_OPS):
                return self._with_pairs
            node = producer_of(input_of(node, 0))
        return False

    def is_computed(self, value: ir.Value | None) -> bool:
        """Whether a value depends on the inputs of the graph, and is not a size."""
        return value in self._computed

    def find_low_type(self, product: ir.Node) -> str:
        """The type below 16 bit in which a product runs, by TensorRT's name such as "FP8"; empty if in float."""
        if not self._with_pairs or reason_for_float(product):
            return ""
        return find_promise(product)

    def is_half(self, value: ir.Value) -> bool:
        """Whether a float tensor is computed in 16 bit."""
        return self._is_half or value.dtype in _HALVES

    # --- which nodes are in which kernel ------------------------------------------------------------------------

    def _is_kernel_node(self, node: ir.Node) -> bool:
        """Whether a node computes something: no view, no constant, and no DQ, which its readers do."""
        if not node.outputs or node.outputs[0] not in self._computed:
            return False
        if is_op(node, *QDQ_OPS):
            if not self._with_pairs or self._is_pulled(node):
                return False
            return is_op(node, "QuantizeLinear")
        return not _is_view(node)

    def _place(self, node: ir.Node) -> None:
        """Put a node into the kernel of an operand, or into a new one."""
        kernel = self._find_host(node)
        if kernel is None:
            kernel = ExpectedKernel(_kind_of(node), [])
            self._position[kernel] = len(self._position)
        elif is_op(node, "Softmax") and kernel.kind == "product":
            kernel.kind = "attention"
        elif kernel.kind == "convert" and not is_op(node, *_CONVERSIONS):
            kernel.kind = _kind_of(node)
        elif kernel.kind == "pointwise" and _kind_of(node) == "reduction":
            kernel.kind = "reduction"
        kernel.nodes.append(node)
        self._kernel_of[node] = kernel

    def _find_host(self, node: ir.Node) -> ExpectedKernel | None:
        """The kernel that a node is fused into; None if it begins a new one."""
        if has_work(node):
            return self._find_attention(node)
        producers = self._list_producers(node)
        if not producers:
            return None
        producer = max(producers, key=self._find_position)  # all that is before it has run
        kernel = self._kernel_of[producer]
        if _kind_of(node) != "reduction":
            has_one_size = count_elements(node.outputs[0]) == count_elements(producer.outputs[0])
            return kernel if has_one_size else None
        if kernel.kind in ("pointwise", "convert") or self._begins_attention(node, kernel):
            return kernel
        return None

    def _list_producers(self, node: ir.Node) -> list[ir.Node]:
        """The nodes of kernels that compute the operands of a node.

        A pair on the way is in the kernel if no operand comes without one: it rounds a value that stays in registers.
        Without Q/DQ the same operand is taken, so that both networks have the same kernels where they can.
        """
        for through_pairs in (False, True):
            producers = []
            for value in node.inputs:
                producer = self._find_producer(value, through_pairs=through_pairs)
                if producer is not None:
                    producers.append(producer)
            if producers:
                return producers
        return []

    def _find_position(self, node: ir.Node) -> tuple[int, int]:
        """The position of the kernel of a node, and of the node in it."""
        kernel = self._kernel_of[node]
        return self._position[kernel], kernel.nodes.index(node)

    def _begins_attention(self, node: ir.Node, scores: ExpectedKernel) -> bool:
        """Whether a softmax follows the product of two activations in 16 bit."""
        if not is_op(node, "Softmax") or scores.kind != "product":
            return False
        product = scores.products[0]
        are_computed = all(self.is_computed(value) for value in product.inputs[:2])
        return is_op(product, "MatMul") and are_computed and self.is_half(product.outputs[0])

    def _find_attention(self, node: ir.Node) -> ExpectedKernel | None:
        """The kernel of the softmax whose output a product multiplies with the values of the attention."""
        if not is_op(node, "MatMul"):
            return None
        producer = self._find_producer(node.inputs[0], through_pairs=not self._with_pairs)
        if producer is None:
            return None
        kernel = self._kernel_of[producer]
        is_open = kernel.kind == "attention" and len(kernel.products) == 1
        return kernel if is_open else None

    def _find_producer(self, value: ir.Value | None, *, through_pairs: bool) -> ir.Node | None:
        """The node of a kernel that computes a value, through views of one tensor.

        Args:
            value: The value.
            through_pairs: Whether also through a pair whose codes nothing else reads; without Q/DQ through all.

        Returns:
            None if the value comes from an input, a constant, a Concat, or int8 codes in memory.
        """
        while value is not None and value in self._computed:
            node = value.producer()
            if node is None or node in self._kernel_of:
                return node
            if is_op(node, *QDQ_OPS):
                is_skipped = through_pairs and not self._is_in_memory(node)
            else:
                is_skipped = _is_view(node) and not is_op(node, "Concat")
            if not is_skipped:
                return None
            value = input_of(node, 0)
        return None

    def _is_in_memory(self, node: ir.Node) -> bool:
        """Whether the codes of a Q or DQ are written to memory: more than one node reads them, or a product."""
        if not self._with_pairs:
            return False
        if is_op(node, "QuantizeLinear"):  # its DQ was skipped
            return False
        readers = _readers(node.outputs[0])
        if len(readers) != 1 or has_work(readers[0]):
            return True
        quantize = producer_of(input_of(node, 0))
        return quantize is None or len(_readers(quantize.outputs[0])) != 1

    def _is_pulled(self, quantize: ir.Node) -> bool:
        """Whether the kernels before a Q write its codes: all that reads their tensors is a Q of the same scale.

        So is a Q after a Concat, or several Q after a Split (R-CAT-1).
        """
        value = input_of(quantize, 0)
        if is_op(_skip_views(value), "DequantizeLinear"):  # a change of scale
            return False
        sources = self._sources(value)
        return bool(sources) and all(self._is_written_by(source, quantize) for source in sources)

    def _is_written_by(self, source: ir.Value, quantize: ir.Node) -> bool:
        """Whether all readers of a tensor are Q with the parameters of one."""
        if source.is_graph_input():
            return False
        parameters = parameters_of(quantize)
        if parameters is None:
            return False
        return all(parameters_of(reader) == parameters for reader in _list_readers(source))

    def _split_products(self) -> None:
        """Cut the epilogue of a product after the first tensor that another kernel needs: it writes one tensor."""
        for kernel in list(dict.fromkeys(self._kernel_of.values())):
            if kernel.kind != "product":
                continue
            for position, node in enumerate(kernel.nodes[:-1]):
                if self._is_read_elsewhere(node, kernel):
                    rest = kernel.nodes[position + 1 :]
                    del kernel.nodes[position + 1 :]
                    self._move(rest)
                    break

    def _move(self, nodes: list[ir.Node]) -> None:
        """Give nodes a kernel of their own."""
        are_conversions = all(is_op(node, *_CONVERSIONS) for node in nodes)
        kernel = ExpectedKernel("convert" if are_conversions else "pointwise", nodes)
        for node in nodes:
            self._kernel_of[node] = kernel

    def _is_read_elsewhere(self, node: ir.Node, kernel: ExpectedKernel) -> bool:
        """Whether an output of a node leaves its kernel."""
        for value in node.outputs:
            if value.is_graph_output():
                return True
            for reader in self._reading_nodes(value):
                if self._kernel_of.get(reader) is not kernel:
                    return True
        return False

    def _reading_nodes(self, value: ir.Value) -> Iterable[ir.Node]:
        """The nodes that read a tensor, through views and DQ; a view that the graph returns counts itself."""
        waiting = [value]
        while waiting:
            for reader in _readers(waiting.pop()):
                if reader in self._kernel_of:
                    yield reader
                    continue
                for output in reader.outputs:
                    if output.is_graph_output():
                        yield reader
                    waiting.append(output)

    # --- what is left of Q/DQ -----------------------------------------------------------------------------------

    def _add_conversions(self) -> None:
        """Add the kernels that change a tensor before a product can read it.

        An input of the graph gets another memory format, and a quantized tensor becomes float before a float product.
        """
        added: dict[ir.Value, ExpectedKernel] = {}
        for kernel in self.kernels:
            for product in kernel.products:
                is_float = not self.find_low_type(product)
                for value in product.inputs:
                    sources = self._sources(value)
                    if value is not None and is_float and self._is_quantized(value):
                        added[value] = ExpectedKernel("convert", [product], sources, [value])
                    for source in sources:
                        if source.is_graph_input():
                            added[source] = ExpectedKernel("convert", [product], [source], [source])
        self.kernels += added.values()

    # --- memory -------------------------------------------------------------------------------------------------

    def _connect(self, kernel: ExpectedKernel) -> None:
        """Find what a kernel reads and writes."""
        if kernel.reads:  # a conversion of an input
            return
        reads: dict[ir.Value, None] = {}
        for node in kernel.nodes:
            for value in node.inputs:
                for source in self._sources(value):
                    producer = source.producer()
                    if producer is None or self._kernel_of.get(producer) is not kernel:
                        reads[source] = None
        kernel.reads = list(reads)
        for node in kernel.nodes:
            if self._is_read_elsewhere(node, kernel):
                kernel.writes.append(node.outputs[0])

    def _sources(self, value: ir.Value | None) -> list[ir.Value]:
        """The tensors in memory that a value is a view of."""
        sources = []
        waiting = [value]
        while waiting:
            value = waiting.pop()
            if value is None or value not in self._computed:
                continue
            node = value.producer()
            if node is None or node in self._kernel_of:
                sources.append(value)
            elif is_op(node, "Concat"):
                waiting += node.inputs
            else:
                waiting.append(input_of(node, 0))
        return sources

    def _is_stored_quantized(self, value: ir.Value) -> bool:
        """Whether a tensor is in memory as int8: a Q, or what only moves int8 tensors or is read by pulled Q alone."""
        node = value.producer()
        if node is None:
            return False
        if is_op(node, "QuantizeLinear"):
            return True
        if is_op(node, *_MOVING_OPS) and self._is_quantized(input_of(node, 0)):
            return True
        readers = list(_list_readers(value))
        are_pulled = [
            is_op(reader, "QuantizeLinear") and reader not in self._kernel_of for reader in readers
        ]
        return bool(readers) and all(are_pulled)

    def _is_quantized(self, value: ir.Value | None) -> bool:
        """Whether a value comes from a DQ; false if Q/DQ are left out."""
        if not self._with_pairs:
            return False
        return is_op(_skip_views(value), "DequantizeLinear")


def count_elements(value: ir.Value) -> int | None:
    """Number of elements of a tensor; None if its shape is not known."""
    if value.shape is None:
        return None
    sizes = []
    for size in value.shape:
        if not isinstance(size, int):
            return None
        sizes.append(size)
    return math.prod(sizes)


def _kind_of(node: ir.Node) -> KernelKind:
    if has_work(node):
        return "product"
    if node.op_type in _REDUCTIONS:
        return "reduction"
    if is_op(node, *_CONVERSIONS):
        return "convert"
    return "pointwise"


def _is_view(node: ir.Node) -> bool:
    """Whether a node only gives another name to values in memory: also one entry of a tensor."""
    if is_op(node, "Gather"):
        index = constant_of(input_of(node, 1))
        return index is not None and index.ndim == 0
    return is_op(node, *_VIEWS)


def _skip_views(value: ir.Value | None) -> ir.Node | None:
    """The node before a value that is not a view of one tensor."""
    node = producer_of(value)
    while node is not None and _is_view(node) and not is_op(node, "Concat"):
        node = producer_of(input_of(node, 0))
    return node


def _list_readers(value: ir.Value) -> Iterator[ir.Node]:
    """The nodes that read a tensor, through views. A view that the graph returns counts itself."""
    waiting = [value]
    while waiting:
        current = waiting.pop()
        for reader in _readers(current):
            if not _is_view(reader):
                yield reader
                continue
            if any(output.is_graph_output() for output in reader.outputs):
                yield reader
            waiting += reader.outputs


def _readers(value: ir.Value | None) -> list[ir.Node]:
    """The nodes that read a value."""
    if value is None:
        return []
    return list(dict.fromkeys(node for node, _ in value.uses()))


def _find_computed(model: ir.Model) -> set[ir.Value]:
    """Values that depend on inputs of the graph and are not sizes."""
    computed: set[ir.Value] = set()
    for value in model.graph.inputs:
        if value.const_value is None:
            computed.add(value)
    for node in model.graph:
        if not is_op(node, *_SIZE_OPS) and not computed.isdisjoint(node.inputs):
            computed.update(node.outputs)
    return computed
