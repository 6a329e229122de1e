"""Damaged ONNX files from a seed: flipped bytes, changed fields, broken graphs, tricks with data in other files."""

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper
from test_fix import BODY, CONSTANTS, HEAD

# --fix fixes its scale of shape [1]
TEXT = (HEAD + CONSTANTS + BODY).replace("float xs", "float[1] xs").replace("int8 xz", "int8[1] xz")


@dataclass(frozen=True)
class Mutant:
    """One file.

    Args:
        name: How it was made.
        content: Its bytes.
    """

    name: str
    content: bytes


def sound_model():
    """Q, DQ, Conv and Relu with a flaw that `--fix` fixes."""
    return ir.to_proto(ir.from_onnx_text(TEXT))


def write_data(folder: Path) -> None:
    """What the mutants with data in another file refer to."""
    (folder / "w.bin").write_bytes(bytes(range(6)))
    (folder.parent / "secret.bin").write_bytes(bytes(6))


# --- one change to a field --------------------------------------------------------------------------------------------


def flip_bytes(model, rng):
    content = bytearray(model.SerializeToString())
    for _ in range(rng.randint(1, 4)):
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    return bytes(content)


def cut(model, rng):
    content = model.SerializeToString()
    return content[: rng.randrange(len(content))]


def splice(model, rng):
    content = model.SerializeToString()
    start, length = rng.randrange(len(content)), rng.randint(1, 40)
    return content[:start] + content[start + length :] + content[start : start + length]


def _messages(message):
    yield message
    for field, value in message.ListFields():
        if field.type == field.TYPE_MESSAGE:
            for item in [value] if hasattr(value, "ListFields") else value:
                yield from _messages(item)


_NUMBERS = [0, -1, 1, 3, 7, 99, -3, 2**31 - 1, 2**31, 2**62, -(2**63)]
_TEXTS = [
    "",
    "x",
    "y",
    "a",
    "nobody",
    "Relu",
    "Conv",
    "a\x1b[31m\nb",
    "n" * 5000,
    "mine",
    "ai.onnx",
    "../secret.bin",
]


def change_field(model, rng):
    """Any scalar of any message becomes another one of its type."""
    targets = [
        (message, field)
        for message in _messages(model)
        for field, _ in message.ListFields()
        if field.type != field.TYPE_MESSAGE
    ]
    message, field = rng.choice(targets)
    value = getattr(message, field.name)
    try:
        if isinstance(value, str):
            setattr(message, field.name, rng.choice(_TEXTS))
        elif isinstance(value, (int, float)):
            setattr(message, field.name, type(value)(rng.choice(_NUMBERS)))
        elif isinstance(value, bytes):
            setattr(
                message,
                field.name,
                value[: rng.randrange(len(value) + 1)] + rng.randbytes(rng.randrange(4)),
            )
        else:
            choices = _TEXTS if isinstance(value[0], str) else _NUMBERS
            value[rng.randrange(len(value))] = type(value[0])(rng.choice(choices))
    except (TypeError, ValueError):  # a number that the field cannot hold
        message.ClearField(field.name)


def drop_field(model, rng):
    message = rng.choice([message for message in _messages(model) if message.ListFields()])
    message.ClearField(rng.choice(message.ListFields())[0].name)


def double_field(model, rng):
    """A repeated field gets one of its items twice."""
    targets = [
        value
        for message in _messages(model)
        for field, value in message.ListFields()
        if not isinstance(value, (str, bytes, int, float))
        and not hasattr(value, "ListFields")
        and len(value)
    ]
    value = rng.choice(targets)
    item = value[rng.randrange(len(value))]
    value.append(item)


# --- one change to the graph ------------------------------------------------------------------------------------------


def close_cycle(model, rng):
    node = rng.choice(model.graph.node)
    node.input[0] = rng.choice(model.graph.node[-1].output)


def repeat_names(model, rng):
    for node in model.graph.node:
        node.name = rng.choice(["same", node.name])
    model.graph.node[0].name = model.graph.node[1].name = "same"


def rename_value(model, rng):
    node = rng.choice(model.graph.node)
    node.output[0] = rng.choice(["x", "y", "xs", "nobody", model.graph.node[0].output[0]])


def rename_operator(model, rng):
    node = rng.choice(model.graph.node)
    names = ["", "Reluu", "EfficientNMS_TRT", "Softmax", "If", "Loop", "Concat", "LSTM"]
    node.op_type = rng.choice(names)


def shuffle_nodes(model, rng):
    nodes = list(model.graph.node)
    rng.shuffle(nodes)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def drop_constant(model, rng):
    del model.graph.initializer[rng.randrange(len(model.graph.initializer))]


def change_constant(model, rng):
    """Another type or shape, with or without the data for it."""
    tensor = rng.choice(model.graph.initializer)
    dtype = rng.choice(
        [np.float32, np.float64, np.int32, np.int64, np.uint8, np.float16, np.bool_, np.complex64]
    )
    shape = rng.choice(
        [(), (1,), (2,), (3,), (0,), (3, 2, 1, 1), (2, 3, 1, 1), (1, 1, 1, 1, 1, 1), (128,)]
    )
    if rng.random() < 0.7:
        tensor.CopyFrom(numpy_helper.from_array(np.ones(shape, dtype), tensor.name))
    else:
        tensor.data_type = rng.choice(range(30))


def make_strings(model, rng):
    tensor = rng.choice(model.graph.initializer)
    tensor.CopyFrom(helper.make_tensor(tensor.name, TensorProto.STRING, [1], [b"a\xff"]))


def enlarge(model, rng):
    tensor = rng.choice(model.graph.initializer)
    tensor.dims[:] = rng.choice(
        [[2**62], [2**31, 2**31], [-1], [2**20, 2**20], [0], [2**63 - 1, 0]]
    )


def change_group(model, rng):
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    name, value = rng.choice(
        [
            ("group", -3),
            ("group", 0),
            ("group", 7),
            ("strides", [-1, 1]),
            ("dilations", [0, 0]),
            ("pads", [-9] * 4),
            ("axis", -99),
            ("kernel_shape", [2**40, 1]),
            ("auto_pad", "WRONG"),
            ("group", "three"),
        ]
    )
    conv.attribute.append(helper.make_attribute(name, value))


def change_axis(model, rng):
    for node in model.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            del node.attribute[:]
            node.attribute.append(
                helper.make_attribute("axis", rng.choice([-99, -1, 0, 1, 4, 2**40]))
            )


def change_versions(model, rng):
    model.ir_version = rng.choice([0, 1, 3, 10, 99, 2**40, -1])
    if rng.random() < 0.5:
        model.opset_import[0].version = rng.choice([-3, 0, 1, 5, 13, 21, 28, 29, 999, 2**40])


def drop_outputs(model, rng):
    del model.graph.output[:]


def spoil_text(model, rng):
    content = model.SerializeToString()
    text = rng.choice([b"Relu", b"Conv", b"Linear", b"xs", b"ws", b"y", b"xd"])
    return content.replace(text, b"\xff" + text[1:])


def lead_outside(model, rng):
    """The data of a weight in another file, in every way that is wrong, and in the one that is right."""
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name == "w")
    tensor.ClearField("int32_data")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    location = rng.choice(
        ["w.bin"] * 6 + ["../secret.bin", "/etc/passwd", "none.bin", "", ".", "w.bin\0"]
    )
    offset = rng.choice(["0", "0", "0", "-4", "4", "99999999999999999999", "zz", "4096", ""])
    length = rng.choice(["6", "6", "-6", "5", "99999999999999999999", "zz", ""])
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        tensor.external_data.add(key=key, value=value)


def call_itself(model, rng):
    names = rng.choice([["F"], ["F", "G"], ["F", "G", "H"]])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("mine", 1)]
    for name, called in zip(names, [*names[1:], names[0]], strict=True):
        node = helper.make_node(called, ["p"], ["q"], domain="mine")
        model.functions.append(helper.make_function("mine", name, ["p"], ["q"], [node], opsets))
    model.opset_import.append(opsets[1])
    model.graph.node[-1].op_type, model.graph.node[-1].domain = "F", "mine"


def nest(model, rng):
    """Bodies in bodies; onnx's own helper cannot make more than protobuf reads."""
    value = "x"
    graph = helper.make_graph(
        [helper.make_node("Identity", [value], ["o0"])], "b0", [], [_untyped("o0")]
    )
    for depth in range(1, rng.choice([3, 12, 24, 30])):
        node = helper.make_node(
            "If", ["condition"], [f"o{depth}"], then_branch=graph, else_branch=graph
        )
        node.attribute[1].g.CopyFrom(
            helper.make_graph(
                [helper.make_node("Identity", [value], [f"e{depth}"])],
                "e",
                [],
                [_untyped(f"e{depth}")],
            )
        )
        graph = helper.make_graph([node], f"b{depth}", [], [_untyped(f"o{depth}")])
    model.graph.node.extend(graph.node)
    model.graph.input.append(helper.make_tensor_value_info("condition", TensorProto.BOOL, []))


def _untyped(name):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, None)


def stack(model, rng):
    """So many operators in a row that whoever follows every path, or calls itself for each, comes to no end."""
    operators = [
        ("Concat", 2),
        ("Identity", 1),
        ("Relu", 1),
        ("Mul", 2),
        ("Transpose", 1),
        ("Add", 2),
    ]
    op_type, inputs = rng.choice(operators)
    value, attributes = rng.choice(["x", "xd", "xs"]), {"axis": 0} if op_type == "Concat" else {}
    nodes = []
    for index in range(rng.choice([40, 40, 40, 1200])):
        nodes.append(helper.make_node(op_type, [value] * inputs, [f"s{index}"], **attributes))
        value = f"s{index}"
    target = rng.choice(
        [node for node in model.graph.node if node.op_type in ("Conv", "QuantizeLinear", "Relu")]
    )
    target.input[min(rng.randrange(2), len(target.input) - 1)] = value
    model.graph.node.extend(nodes)  # out of order, too


def add_sparse(model, rng):
    """What onnx-ir has no place for."""
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.array([2]), "sparse_indices")
    if rng.random() < 0.5:
        model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    else:
        model.training_info.add().algorithm.name = "train"


CHANGES = (
    flip_bytes,
    flip_bytes,
    flip_bytes,
    cut,
    splice,
    change_field,
    change_field,
    change_field,
    drop_field,
    double_field,
    close_cycle,
    repeat_names,
    rename_value,
    rename_operator,
    shuffle_nodes,
    drop_constant,
    change_constant,
    make_strings,
    enlarge,
    change_group,
    change_axis,
    change_versions,
    drop_outputs,
    spoil_text,
    lead_outside,
    lead_outside,
    call_itself,
    nest,
    stack,
    stack,
    add_sparse,
)


def make_mutants(count: int, seed: int) -> list[Mutant]:
    """As many mutants, each kind of change in turn, and some with a second change."""
    rng = random.Random(seed)  # noqa: S311  # the same files every time
    mutants = []
    for index in range(count):
        change = CHANGES[index % len(CHANGES)]
        model = sound_model()
        name = f"{index}: {change.__name__}"
        if rng.random() < 0.3:
            second = rng.choice([change_field, drop_field, change_constant, change_versions])
            second(model, rng)
            name += f" and {second.__name__}"
        try:
            changed = change(model, rng)
            content = changed if isinstance(changed, bytes) else model.SerializeToString()
        except (
            IndexError,
            StopIteration,
            ValueError,
        ):
            # The first change has left nothing to change.
            content = model.SerializeToString()
        mutants.append(Mutant(name, content))
    return mutants
