"""Is the file sound as ONNX: QDQ201 to QDQ210."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

import onnx
import onnx_ir as ir

from qdq.check.calls import LARGEST_EXPANSION, is_expansion_too_large, list_recursive_functions
from qdq.check.facts import FileFacts
from qdq.check.rules.registry import Flaw, Severity, register_rule
from qdq.check.rules.view import GraphView, name_of
from qdq.graph.validate import iterate_graphs

_EXPORT = "export the model again, or mend the node in the tool that wrote it."
_RUNTIME_NODE = re.compile(
    r"In Node, \(\"(.*?)\"|[Nn]ode \((.*?)\) Op|Name:'(.*?)'|node name: (.*?)\)"
)


@register_rule(
    "QDQ201",
    "error",
    "ONNX Runtime does not load the file.",
    "Nobody can say what such a file computes; TensorRT's parser may refuse it, crash on it or read it in its own way. "
    "Where ONNX Runtime lacks an operator or a kernel, or takes too long, the file is not at fault: an info.",
    "onnxruntime.InferenceSession on one thread, without constant folding and prepacking, in a process of its own",
)
def _runtime_does_not_load(view: GraphView) -> Iterator[Flaw]:
    runtime = view.file.runtime if view.file else None
    if view.file is None or runtime is None or runtime.refusal is None:
        return
    node = _node_in(view.file, runtime.refusal)
    message = f"ONNX Runtime {runtime.version} does not load the file: {runtime.refusal}"
    if runtime.kind == "invalid":
        yield Flaw(node, message, _EXPORT)
    else:
        fix = "nothing, if the target has what is missing here; numbers cannot be checked here."
        yield Flaw(node, message, fix, "info")


@register_rule(
    "QDQ202",
    "error",
    "onnx's checker refuses the file.",
    "The file is not as the ONNX standard says. What is only unusual, such as an output without shape, is left out "
    "here (QDQ209). Where the checker takes too long, nothing is known: an info.",
    "onnx.checker.check_model, in a process of its own",
)
def _checker_refuses(view: GraphView) -> Iterator[Flaw]:
    if view.file is None:
        return
    checker = view.file.checker
    if checker.limit is not None:
        message = f"onnx {checker.version} came to no verdict on the file: {checker.limit}"
        yield Flaw(
            view.file.path.name,
            message,
            "nothing, if the target builds it; a smaller file can be judged.",
            "info",
        )
    if checker.structure is None:
        return
    refusal = checker.structure
    if "topologically sorted" in refusal and not view.file.is_sorted:  # QDQ208, QDQ209
        return
    message = f"onnx {checker.version} refuses the file: {refusal}"
    yield Flaw(_node_in(view.file, refusal), message, _EXPORT)


@register_rule(
    "QDQ203",
    "error",
    "Types or shapes contradict one another.",
    "What is written down is not what the operators compute. Runtimes refuse the file, or take either of the two.",
    "onnx.shape_inference with check_type and strict_mode, in a process of its own",
)
def _types_contradict(view: GraphView) -> Iterator[Flaw]:
    if view.file is None or view.file.checker.types is None or not view.file.is_sorted:
        return
    refusal = view.file.checker.types
    if view.file.unknown and "null" in refusal:  # a type that comes from an operator of others
        return
    message = f"types or shapes contradict one another: {refusal}"
    yield Flaw(
        _node_in(view.file, refusal), message, "write the types and shapes that the operators give."
    )


def _node_in(file: FileFacts, refusal: str) -> str:
    """The node that a message names; the file's name if none."""
    match = _RUNTIME_NODE.search(refusal)
    name = next((group for group in match.groups() if group), "") if match else ""
    return name or file.path.name


@register_rule(
    "QDQ204",
    "warning",
    "Two nodes of a graph have one name.",
    "ONNX Runtime does not load such a file. TensorRT does, and then nobody can tell the layers of the engine apart.",
    "[probe] TensorRT-RTX builds it; ONNX Runtime: 'two nodes with same node name'",
)
def _names_are_not_unique(view: GraphView) -> Iterator[Flaw]:
    for graph in view.model.graphs():
        counts = Counter(node.name for node in graph if node.name)
        for name, count in counts.items():
            if count > 1:
                yield Flaw(
                    name,
                    f"{count} nodes of graph {graph.name!r} have this name",
                    "give each its own name.",
                )


@register_rule(
    "QDQ205",
    "error",
    "The data of a constant do not fit its type and shape, or the file that holds them is not there.",
    "The weight cannot be read, or other bytes would be read for it. A location outside the folder of the model can "
    "make a program read any file.",
    "the ONNX standard: raw_data, external_data; [probe] refused by ONNX Runtime and by TensorRT-RTX",
)
def _data_do_not_fit(view: GraphView) -> Iterator[Flaw]:
    for fault in view.file.tensor_faults if view.file else ():
        yield Flaw(
            fault.name,
            fault.message,
            "copy the data file beside the model, or export the model again.",
        )


@register_rule(
    "QDQ206",
    "warning",
    "An operator that neither onnx nor ONNX Runtime knows.",
    "It is a plugin of the target or a mistake in writing; nothing of it is checked here. One that is named as "
    "TensorRT's own plugins are is an info.",
    "onnx.defs and the operators of the installed ONNX Runtime; NVIDIA's plugins are named ..._TRT",
)
def _operator_is_unknown(view: GraphView) -> Iterator[Flaw]:
    if view.file is None or view.file.runtime is None:
        return
    unknown = {tuple(name.split("::", 1)) for name in view.file.runtime.unknown_operators}
    for node in view.nodes:
        if (node.domain, node.op_type) in unknown:
            severity: Severity = "info" if node.op_type.endswith("_TRT") else "warning"
            domain = f" of {node.domain}" if node.domain else ""
            message = (
                f"the operator {node.op_type}{domain} is known to neither onnx nor ONNX Runtime"
            )
            fix = "load the plugin on the target; if none is meant, mend the operator's name or domain."
            yield Flaw(name_of(node), message, fix, severity)


@register_rule(
    "QDQ207",
    "warning",
    "The opset or the IR version is none, or newer than the installed onnx knows.",
    "Operators of a newer opset may mean something else: they are read here as those of the newest known one. A newer "
    "IR version alone changes nothing of them. Without a version nobody knows what is meant: an error.",
    "[probe] TensorRT-RTX reads any IR version, and opsets from 7 on",
)
def _version_is_unknown(view: GraphView) -> Iterator[Flaw]:
    if view.file is None:
        return
    proto, name = view.file.proto, view.file.path.name
    opset, newest = view.opset, onnx.defs.onnx_opset_version()
    fix = "export at an opset that your tools know, or update onnx."
    if opset > newest:
        yield Flaw(
            name,
            f"opset {opset} is newer than {newest}, the newest that onnx {onnx.__version__} knows",
            fix,
        )
    elif opset < 1 and any(node.domain == "" for node in view.nodes):
        yield Flaw(name, f"its opset is {opset or 'missing'}", fix, "error")
    if proto.ir_version > onnx.IR_VERSION:
        message = f"IR version {proto.ir_version} is newer than {onnx.IR_VERSION}, the newest that onnx knows"
        yield Flaw(
            name,
            message,
            "write a lower ir_version; ONNX Runtime loads no newer one than it knows.",
        )
    elif proto.ir_version < 1:
        yield Flaw(
            name,
            "it has no IR version",
            "write ir_version 10, which every current tool reads.",
            "error",
        )


@register_rule(
    "QDQ208",
    "error",
    "The graph cannot be computed: a cycle, a value that nothing provides, no output, a function that calls itself, or "
    "functions that call others so often that a million nodes come of it.",
    "No runtime can run it. TensorRT crashes on a function that calls itself. It writes every call out, as others do: "
    "24 functions that call the next one twice are 16 million nodes.",
    "[probe] TensorRT-RTX 1.7.1: a segmentation fault on functions that call themselves, no end on those that double; "
    "the rest is refused",
)
def _graph_cannot_be_computed(view: GraphView) -> Iterator[Flaw]:
    graph = view.model.graph
    name = graph.name or "graph"
    if view.file is not None and view.file.has_cycle:
        yield Flaw(name, "a node reads what is computed from its own output", _EXPORT)
    if not graph.outputs:
        yield Flaw(
            name, "the graph has no output", "name the values that the model returns as outputs."
        )
    for output in graph.outputs:
        if (
            output.producer() is None
            and not output.is_graph_input()
            and not output.is_initializer()
        ):
            yield Flaw(str(output.name), "nothing computes this output", _EXPORT)
    sparse = (
        {tensor.values.name for tensor in view.file.proto.graph.sparse_initializer}
        if view.file
        else set()
    )
    for node in graph.all_nodes():
        for value in node.inputs:
            if value is not None and _is_dangling(value) and value.name not in sparse:
                yield Flaw(name_of(node), f"nothing provides its input {value.name}", _EXPORT)
    for function in list_recursive_functions(view.model):
        yield Flaw(function, "the function calls itself", "write its nodes into the graph instead.")
    if is_expansion_too_large(view.model):
        message = f"its calls of functions become more than {LARGEST_EXPANSION:,} nodes"
        yield Flaw(
            name,
            message,
            "let each function call others once, or write its nodes into the graph instead.",
        )


def _is_dangling(value: ir.Value) -> bool:
    return (
        value.producer() is None
        and not value.is_graph_input()
        and not value.is_initializer()
        and bool(value.name)
    )


@register_rule(
    "QDQ209",
    "info",
    "Unusual, though TensorRT reads it: an input or output without shape, a graph without name, nodes out of order, "
    "texts that are not UTF-8.",
    "Other tools refuse such files or read them otherwise.",
    "[probe] TensorRT-RTX builds them; onnx.checker refuses all but the last",
)
def _file_is_unusual(view: GraphView) -> Iterator[Flaw]:
    if view.file is None:
        return
    graph, name = view.file.proto.graph, view.file.path.name
    fix = "nothing, if all your tools read the file."
    for value in (*graph.input, *graph.output):
        kind = value.type.WhichOneof("value")
        if kind is None:
            yield Flaw(value.name, "this input or output has no type", "write its type.", "warning")
        elif kind == "tensor_type" and not value.type.tensor_type.HasField("shape"):
            yield Flaw(value.name, "this input or output has no shape", fix)
    if not all(body.name for body in iterate_graphs(graph)):
        yield Flaw(name, "a graph has no name", fix)
    if not view.file.is_sorted and not view.file.has_cycle:
        yield Flaw(name, "nodes stand in front of those that they read", fix)
    if not view.file.is_utf8:
        yield Flaw(name, "a text is not UTF-8", "name nodes and values in UTF-8.")


@register_rule(
    "QDQ210",
    "error",
    "A node does not have the inputs, outputs or attributes of its operator, or numbers that it cannot have.",
    "ONNX Runtime refuses the file, at the latest when it runs. TensorRT leaves unknown attributes out in silence.",
    "onnx.defs; the definition of Conv; [probe] TensorRT-RTX builds a Softmax whose axis is a text",
)
def _node_does_not_fit(view: GraphView) -> Iterator[Flaw]:
    for node, reason in view.misfits.items():
        yield Flaw(name_of(node), reason, _EXPORT)
    for node in view.select("Conv", "ConvTranspose"):
        if reason := _describe_convolution(view, node):
            yield Flaw(name_of(node), reason, _EXPORT)


def _describe_convolution(view: GraphView, node: ir.Node) -> str:
    """Why no convolution has such attributes; empty if one has."""
    group = node.attributes.get_int("group", 1)
    if group < 1:
        return f"its group is {group}, expected 1 or more"
    for name in ("strides", "dilations", "kernel_shape"):
        if any(size < 1 for size in node.attributes.get_ints(name, ())):
            return f"its {name} are {list(node.attributes.get_ints(name, ()))}, expected 1 or more"
    image, weight = view.shape(node.inputs[0]), view.shape(node.inputs[1])
    if weight is None or len(weight) < 3:
        return ""
    outputs, inputs = weight[0], weight[1]
    if node.op_type == "Conv" and outputs is not None and outputs % group:
        return f"its {outputs} output channels cannot be cut into {group} groups"
    if image is None or len(image) < 3 or image[1] is None or outputs is None or inputs is None:
        return ""
    expected = outputs if node.op_type == "ConvTranspose" else inputs * group
    return (
        ""
        if image[1] == expected
        else f"its input has {image[1]} channels, and its weight is for {expected}"
    )


FILE_RULES = frozenset(f"QDQ{number}" for number in range(201, 211))
"""Rules that say whether the file is sound, whatever its Q/DQ."""
