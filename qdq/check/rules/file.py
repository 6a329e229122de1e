"""Rules that check whether the file is valid ONNX: QDQ201 to QDQ210."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import onnx
import onnx_ir as ir

from qdq.check.calls import LARGEST_EXPANSION, is_expansion_too_large, list_recursive_functions
from qdq.check.facts import FileFacts
from qdq.check.rules.registry import Find, Flaw, register_rule
from qdq.check.rules.view import GraphView, name_of
from qdq.graph.code_types import is_trt_quantizer, name_kernel_type
from qdq.graph.validate import iterate_graphs

_EXPORT = "export the model again, or fix the node in the tool that wrote it."
_NODE_IN_MESSAGE = re.compile(
    r"In Node, \(\"(.*?)\"|[Nn]ode \((.*?)\) Op|Name:'(.*?)'|node name: (.*?)\)"
)
_POSITIVE_ATTRIBUTES = ("strides", "dilations", "kernel_shape")


def _about_file(find: Callable[[GraphView, FileFacts], Iterable[Flaw]]) -> Find:
    """Make a rule of a function that needs facts about the file.

    Args:
        find: Yields the flaws of a graph, given the facts about its file.

    Returns:
        The function of the rule; it finds nothing in a model in memory.
    """

    def find_with_facts(view: GraphView) -> Iterable[Flaw]:
        if view.file is None:
            return ()
        return find(view, view.file)

    return find_with_facts


@register_rule(
    "QDQ201",
    "error",
    "ONNX Runtime does not load the file.",
    "The result of such a file is undefined: TensorRT's parser may refuse it, crash on it or read it differently. If "
    "ONNX Runtime lacks an operator or a kernel, or takes too long, the file is not at fault, and the finding is an "
    "info.",
    "onnxruntime.InferenceSession on one thread, without constant folding and prepacking, in a separate process",
)
@_about_file
def _runtime_does_not_load(view: GraphView, file: FileFacts) -> Iterator[Flaw]:
    """Name the node that ONNX Runtime blames, otherwise the file."""
    runtime = file.runtime
    if runtime is None or runtime.refusal is None:
        return

    node = _node_in(file, runtime.refusal)
    message = f"ONNX Runtime {runtime.version} does not load the file: {runtime.refusal}"
    if runtime.kind == "invalid":
        yield Flaw(
            node=node,
            message=message,
            fix=_EXPORT,
        )
    else:
        yield Flaw(
            node=node,
            message=message,
            fix="nothing, if the target supports what is missing here; numbers cannot be checked here.",
            severity="info",
        )


@register_rule(
    "QDQ202",
    "error",
    "onnx's checker refuses the file.",
    "The file violates the ONNX standard. Merely unusual parts, such as an output without shape, are not reported "
    "here (QDQ209). If the checker takes too long there is no verdict, only an info.",
    "onnx.checker.check_model, in a separate process",
)
@_about_file
def _checker_refuses(view: GraphView, file: FileFacts) -> Iterator[Flaw]:
    """Name the node that onnx blames, otherwise the file.

    The order of the nodes is left to QDQ208 and QDQ209.
    """
    checker = file.checker
    if checker.limit is not None:
        yield Flaw(
            node=file.path.name,
            message=f"onnx {checker.version} gave no verdict on the file: {checker.limit}",
            fix="nothing, if the target builds it; a smaller file can be checked.",
            severity="info",
        )
    if checker.structure is None:
        return
    if "topologically sorted" in checker.structure and not file.is_sorted:  # QDQ208, QDQ209
        return
    yield Flaw(
        node=_node_in(file, checker.structure),
        message=f"onnx {checker.version} refuses the file: {checker.structure}",
        fix=_EXPORT,
    )


@register_rule(
    "QDQ203",
    "error",
    "Types or shapes contradict one another.",
    "The declared types or shapes are not those that the operators compute. Runtimes refuse the file, or use either of "
    "the two.",
    "onnx.shape_inference with check_type and strict_mode, in a separate process",
)
@_about_file
def _types_contradict(view: GraphView, file: FileFacts) -> Iterator[Flaw]:
    """Name the node that onnx blames, otherwise the file.

    Nothing is reported if the order of the nodes or an unknown operator explains the refusal.
    """
    refusal = file.checker.types
    if refusal is None or not file.is_sorted:
        return
    if file.unknown and "null" in refusal:  # a type that comes from an operator unknown to onnx
        return
    yield Flaw(
        node=_node_in(file, refusal),
        message=f"types or shapes contradict one another: {refusal}",
        fix="write the types and shapes that the operators produce.",
    )


def _node_in(file: FileFacts, refusal: str) -> str:
    """The node that a message names.

    Args:
        file: The facts about the file.
        refusal: A message of onnx or ONNX Runtime.

    Returns:
        The name of the node; that of the file if the message names none.
    """
    match = _NODE_IN_MESSAGE.search(refusal)
    if match is None or match.lastindex is None:
        return file.path.name
    name = match[match.lastindex]  # one alternative of the pattern has matched, with its group
    return name if name else file.path.name


@register_rule(
    "QDQ204",
    "warning",
    "Two nodes of a graph have the same name.",
    "ONNX Runtime does not load such a file. TensorRT does, and then the layers of the engine cannot be told apart.",
    "[probe] TensorRT-RTX builds it; ONNX Runtime: 'two nodes with same node name'",
)
def _names_are_not_unique(view: GraphView) -> Iterator[Flaw]:
    """Name each such name once; nodes without name are not compared."""
    for graph in view.model.graphs():
        counts = Counter(node.name for node in graph)
        for name, count in counts.items():
            if not name or count == 1:
                continue
            yield Flaw(
                node=name,
                message=f"{count} nodes of graph {graph.name!r} have this name",
                fix="give each node a unique name.",
            )


@register_rule(
    "QDQ205",
    "error",
    "The data of a constant do not fit its type and shape, or the file that holds them is missing.",
    "The weight cannot be read, or wrong bytes would be read. A location outside the folder of the model can make a "
    "program read any file.",
    "the ONNX standard: raw_data, external_data; [probe] refused by ONNX Runtime and by TensorRT-RTX",
)
@_about_file
def _data_do_not_fit(view: GraphView, file: FileFacts) -> Iterator[Flaw]:
    """Name the constant, or its node if it has no name."""
    for fault in file.tensor_faults:
        yield Flaw(
            node=fault.name,
            message=fault.message,
            fix="copy the data file into the folder of the model, or export the model again.",
        )


@register_rule(
    "QDQ206",
    "warning",
    "An operator that neither onnx nor ONNX Runtime knows.",
    "It is a plugin of the target or a typo; it is not checked. An operator with a name like those of TensorRT's own "
    "plugins is only an info, and so are TensorRT's own Q and DQ of FP8, MXFP8 and FP4, which ModelOpt writes: they "
    "count in the coverage, but the rules about scales and placement are not applied to them.",
    "onnx.defs and the operators of the installed ONNX Runtime; NVIDIA's plugins are named ..._TRT",
)
@_about_file
def _operator_is_unknown(view: GraphView, file: FileFacts) -> Iterator[Flaw]:
    """Name each node with such an operator, also in bodies and functions."""
    if file.runtime is None:
        return

    for node in view.nodes:
        if f"{node.domain}::{node.op_type}" not in file.runtime.unknown_operators:
            continue
        if is_trt_quantizer(node):
            yield Flaw(
                node=name_of(node),
                message=f"{node.op_type} is TensorRT's own {name_kernel_type(node)} quantizer: the rules about scales "
                "and placement are not applied to it",
                fix="nothing, if TensorRT is the target; other runtimes do not load the file.",
                severity="info",
            )
            continue
        is_named_as_plugin = node.op_type.endswith("_TRT")
        yield Flaw(
            node=name_of(node),
            message=f"the operator {_operator_name(node)} is known to neither onnx nor ONNX Runtime",
            fix="load the plugin on the target; if it is not a plugin, fix the operator's name or domain.",
            severity="info" if is_named_as_plugin else "warning",
        )


def _operator_name(node: ir.Node) -> str:
    if node.domain:
        return f"{node.op_type} of {node.domain}"
    return node.op_type


@register_rule(
    "QDQ207",
    "warning",
    "The opset or the IR version is missing, or newer than the installed onnx knows.",
    "Operators of a newer opset may mean something else: they are read here as those of the newest known one. A newer "
    "IR version alone does not change operators. Without a version the meaning of the operators is undefined: an "
    "error.",
    "[probe] TensorRT-RTX reads any IR version, and opsets from 7 on",
)
@_about_file
def _version_is_unknown(view: GraphView, file: FileFacts) -> Iterator[Flaw]:
    """Name the file; an opset is needed only if a node is of ONNX itself."""
    yield from _check_opset(view, file)
    yield from _check_ir_version(file)


def _check_opset(view: GraphView, file: FileFacts) -> Iterator[Flaw]:
    newest = onnx.defs.onnx_opset_version()
    fix = "export at an opset that your tools support, or update onnx."
    if view.opset > newest:
        yield Flaw(
            node=file.path.name,
            message=f"opset {view.opset} is newer than {newest}, the newest that onnx {onnx.__version__} knows",
            fix=fix,
        )
    domains = {node.domain for node in view.nodes}
    if view.opset < 1 and "" in domains:
        yield Flaw(
            node=file.path.name,
            message=f"its opset is {view.opset or 'missing'}",
            fix=fix,
            severity="error",
        )


def _check_ir_version(file: FileFacts) -> Iterator[Flaw]:
    version = file.proto.ir_version
    if version > onnx.IR_VERSION:
        yield Flaw(
            node=file.path.name,
            message=f"IR version {version} is newer than {onnx.IR_VERSION}, the newest that onnx knows",
            fix="write a lower ir_version; ONNX Runtime does not load a version that it does not know.",
        )
    elif version < 1:
        yield Flaw(
            node=file.path.name,
            message="it has no IR version",
            fix="write ir_version 10, which every current tool reads.",
            severity="error",
        )


@register_rule(
    "QDQ208",
    "error",
    "The graph cannot be computed: a cycle, a value that nothing provides, no output, a function that calls itself, or "
    "functions that expand to more than a million nodes.",
    "No runtime can run it. TensorRT crashes on a function that calls itself. It expands every call, as other tools "
    "do: 24 functions that call the next one twice become 16 million nodes.",
    "[probe] TensorRT-RTX 1.7.1: a segmentation fault on functions that call themselves, an endless build on those "
    "that double; the others are refused",
)
def _graph_cannot_be_computed(view: GraphView) -> Iterator[Flaw]:
    """Name the graph, the output, the node or the function that cannot be computed."""
    yield from _check_outputs(view)
    yield from _check_inputs(view)
    yield from _check_functions(view)


def _check_outputs(view: GraphView) -> Iterator[Flaw]:
    """A cycle, a graph without output, and outputs without source."""
    graph = view.model.graph
    if view.file is not None and view.file.has_cycle:
        yield Flaw(
            node=_graph_name(view),
            message="a node reads a value that is computed from its own output",
            fix=_EXPORT,
        )
    if not graph.outputs:
        yield Flaw(
            node=_graph_name(view),
            message="the graph has no output",
            fix="declare the values that the model returns as outputs.",
        )
    for output in graph.outputs:
        if not _has_source(output):
            yield Flaw(
                node=str(output.name),
                message="nothing computes this output",
                fix=_EXPORT,
            )


def _check_inputs(view: GraphView) -> Iterator[Flaw]:
    """Inputs of nodes without source."""
    sparse = _list_sparse(view.file)
    for node in view.model.graph.all_nodes():
        for value in node.inputs:
            if value is None or _is_provided(value, sparse):
                continue
            yield Flaw(
                node=name_of(node),
                message=f"nothing provides its input {value.name}",
                fix=_EXPORT,
            )


def _is_provided(value: ir.Value, sparse: set[str]) -> bool:
    """Whether an input of a node has a source, or is left out by an empty name.

    Args:
        value: The input.
        sparse: Names of the sparse constants.
    """
    if not value.name:
        return True
    if value.name in sparse:
        return True
    return _has_source(value)


def _check_functions(view: GraphView) -> Iterator[Flaw]:
    """Functions that call themselves, or that expand to too many nodes."""
    for function in list_recursive_functions(view.model):
        yield Flaw(
            node=function,
            message="the function calls itself",
            fix="write its nodes into the graph instead.",
        )
    if is_expansion_too_large(view.model):
        yield Flaw(
            node=_graph_name(view),
            message=f"its calls of functions become more than {LARGEST_EXPANSION:,} nodes",
            fix="let each function call others once, or write its nodes into the graph instead.",
        )


def _graph_name(view: GraphView) -> str:
    return view.model.graph.name or "graph"


def _has_source(value: ir.Value) -> bool:
    """Whether a node, an input of the graph or a constant provides a value."""
    if value.producer() is not None:
        return True
    return value.is_graph_input() or value.is_initializer()


def _list_sparse(file: FileFacts | None) -> set[str]:
    """Names of the sparse constants, which the graph of onnx-ir does not have."""
    names: set[str] = set()
    if file is None:
        return names
    for tensor in file.proto.graph.sparse_initializer:
        names.add(tensor.values.name)
    return names


@register_rule(
    "QDQ209",
    "info",
    "Unusual, though TensorRT reads it: an input or output without shape, a graph without name, nodes out of order, "
    "texts that are not UTF-8.",
    "Other tools refuse such files or read them differently.",
    "[probe] TensorRT-RTX builds them; onnx.checker refuses all but the last",
)
@_about_file
def _file_is_unusual(view: GraphView, file: FileFacts) -> Iterator[Flaw]:
    """Name the input or output, or the file."""
    fix = "nothing, if all your tools read the file."
    yield from _check_declarations(file.proto.graph, fix)
    names = [graph.name for graph in iterate_graphs(file.proto.graph)]
    if "" in names:
        yield Flaw(
            node=file.path.name,
            message="a graph has no name",
            fix=fix,
        )
    if not file.is_sorted and not file.has_cycle:
        yield Flaw(
            node=file.path.name,
            message="nodes come before nodes whose outputs they read",
            fix=fix,
        )
    if not file.is_utf8:
        yield Flaw(
            node=file.path.name,
            message="a text is not UTF-8",
            fix="name nodes and values in UTF-8.",
        )


def _check_declarations(graph: onnx.GraphProto, fix: str) -> Iterator[Flaw]:
    """Inputs and outputs without type or shape."""
    for value in (*graph.input, *graph.output):
        kind = value.type.WhichOneof("value")
        if kind is None:
            yield Flaw(
                node=value.name,
                message="this input or output has no type",
                fix="write its type.",
                severity="warning",
            )
        elif kind == "tensor_type" and not value.type.tensor_type.HasField("shape"):
            yield Flaw(
                node=value.name,
                message="this input or output has no shape",
                fix=fix,
            )


@register_rule(
    "QDQ210",
    "error",
    "A node does not have the inputs, outputs or attributes of its operator, or has invalid numbers.",
    "ONNX Runtime refuses the file, at the latest when it runs. TensorRT silently ignores unknown attributes.",
    "onnx.defs; the definition of Conv; [probe] TensorRT-RTX builds a Softmax whose axis is a string",
)
def _node_does_not_fit(view: GraphView) -> Iterator[Flaw]:
    """Name the node; numbers are checked for convolutions only."""
    for node, reason in view.misfits.items():
        yield Flaw(
            node=name_of(node),
            message=reason,
            fix=_EXPORT,
        )
    for node in view.select("Conv", "ConvTranspose"):
        reason = _describe_convolution(view, node)
        if reason:
            yield Flaw(
                node=name_of(node),
                message=reason,
                fix=_EXPORT,
            )


def _describe_convolution(view: GraphView, convolution: ir.Node) -> str:
    """Why no convolution can have these attributes and channels.

    Returns:
        A text; empty if a convolution can have them, or if shapes are not known.
    """
    group = convolution.attributes.get_int("group", 1)
    if group < 1:
        return f"its group is {group}, expected 1 or more"
    for name in _POSITIVE_ATTRIBUTES:
        sizes = list(convolution.attributes.get_ints(name, ()))
        if min(sizes, default=1) < 1:
            return f"its {name} are {sizes}, expected 1 or more"

    weight = view.shape(convolution.inputs[1])
    if weight is None or len(weight) < 3:
        return ""
    if convolution.op_type == "Conv":
        return _describe_conv_channels(view, convolution, group, weight)
    return _describe_input_channels(view, convolution, weight[0])


def _describe_conv_channels(
    view: GraphView, conv: ir.Node, group: int, weight: tuple[int | None, ...]
) -> str:
    """How the channels of a Conv do not fit.

    Args:
        view: The graph.
        conv: A Conv.
        group: Its number of groups, 1 or more.
        weight: Shape of its weight: outputs, inputs / group, kernel.
    """
    outputs, inputs_of_group = weight[:2]
    if outputs is None:
        return ""
    if outputs % group:
        return f"its {outputs} output channels cannot be cut into {group} groups"
    if inputs_of_group is None:
        return ""
    return _describe_input_channels(view, conv, inputs_of_group * group)


def _describe_input_channels(view: GraphView, convolution: ir.Node, expected: int | None) -> str:
    """How the channels of the input of a convolution do not fit its weight.

    Args:
        view: The graph.
        convolution: A Conv or ConvTranspose.
        expected: Input channels that the weight is for; None if they are not known.
    """
    image = view.shape(convolution.inputs[0])
    if image is None or len(image) < 3:
        return ""
    channels = image[1]
    if None in (channels, expected):
        return ""
    if channels != expected:
        return f"its input has {channels} channels, and its weight is for {expected}"
    return ""


FILE_RULES = frozenset(f"QDQ{number}" for number in range(201, 211))
"""Rules that show whether the file is valid, whatever its Q/DQ."""
