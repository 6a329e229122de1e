"""Rules about files: damage is named, what is only unusual is read; ONNX Runtime and TensorRT-RTX are the judges."""

import json
import logging
import os

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from qdq import build_engine, check_onnx
from qdq.check.fix import fix_onnx
from qdq.check.rules import FILE_RULES
from qdq.child import ChildCrashError
from qdq.errors import BuildError, CheckError
from qdq.files import to_jsonable
from qdq.graph import coverage, shapes
from qdq.graph.validate import CheckerVerdict

CASES = {}


def case(*rules):
    """Register a change to the sound model and the rules that it breaks, beside those of onnx and ONNX Runtime."""

    def register(change):
        CASES[change.__name__] = (change, set(rules))
        return change

    return register


def sound_model():
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"], name="conv"),
        helper.make_node("Softmax", ["a"], ["y"], name="softmax", axis=1),
    ]
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 2, 2])],
        [numpy_helper.from_array(np.ones((4, 4, 1, 1), np.float32), "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def move_outside(model, **fields):
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": "w.bin", "offset": "0", "length": "64", **fields}.items():
        tensor.external_data.add(key=key, value=value)


def call_doubling_functions(model, count):
    """F0 calls F1 on the value that F1 gives, and so on: the last one is called 2^(count - 1) times."""
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("mine", 1)]
    for index in range(count - 1):
        nodes = [
            helper.make_node(f"F{index + 1}", [x], [y], domain="mine") for x, y in ("pa", "aq")
        ]
        model.functions.append(
            helper.make_function("mine", f"F{index}", ["p"], ["q"], nodes, opsets)
        )
    last = helper.make_node("Relu", ["p"], ["q"])
    model.functions.append(
        helper.make_function("mine", f"F{count - 1}", ["p"], ["q"], [last], opsets)
    )
    model.opset_import.append(opsets[1])
    model.graph.node[1].CopyFrom(helper.make_node("F0", ["a"], ["y"], name="call", domain="mine"))


@case("QDQ204")
def node_names_twice(model):
    model.graph.node[1].name = "conv"


@case("QDQ205")
def raw_data_too_short(model):
    model.graph.initializer[0].raw_data = bytes(60)


@case("QDQ205")
def raw_data_too_long(model):
    model.graph.initializer[0].raw_data = bytes(68)


@case("QDQ205")
def numbers_too_few(model):
    model.graph.initializer[0].CopyFrom(
        TensorProto(name="w", data_type=1, dims=[4, 4, 1, 1], float_data=[1] * 15)
    )


@case("QDQ205")
def negative_offset(model):
    move_outside(model, offset="-4")


@case("QDQ205")
def length_beyond_the_file(model):
    move_outside(model, length="99999999999999999999")


@case("QDQ205")
def offset_that_is_no_number(model):
    move_outside(model, offset="zz")


@case("QDQ205")
def data_that_are_missing(model):
    move_outside(model, location="none.bin")


@case("QDQ205")
def data_outside_the_folder(model):
    move_outside(model, location="../w.bin")


@case("QDQ205")
def data_at_an_absolute_path(model):
    move_outside(model, location="/etc/hostname")


@case("QDQ205")
def data_behind_a_loop_of_links(model):
    move_outside(model, location="loop.bin")


@case("QDQ205")
def data_below_a_loop_of_links(model):
    move_outside(model, location="loop.bin/w.bin")


@case("QDQ205")
def data_at_a_location_of_5000_characters(model):
    move_outside(model, location="w" * 5000)


@case("QDQ205")
def data_at_a_location_with_a_nul_byte(model):
    move_outside(model, location="w\0.bin")


@case("QDQ205")
def data_in_a_folder(model):
    move_outside(model, location="folder")


@case("QDQ205")
def data_below_a_file(model):
    move_outside(model, location="w.bin/w.bin")


@case("QDQ205")
def data_in_a_pipe(model):
    move_outside(model, location="pipe.bin")


@case("QDQ205")
def data_in_a_device(model):
    move_outside(model, location="zero.bin")


@case("QDQ205")
def constant_node_with_data_behind_a_loop_of_links(model):
    move_outside(model, location="loop.bin")
    model.graph.node.insert(
        0, helper.make_node("Constant", [], ["w"], name="const", value=model.graph.initializer[0])
    )
    del model.graph.initializer[:]


@case("QDQ206")
def operator_with_a_typo(model):
    model.graph.node[1].op_type = "Softmaxx"


@case("QDQ206")
def plugin_of_a_domain_that_is_not_imported(model):
    model.graph.node[1].op_type, model.graph.node[1].domain = "Mine", "mine"


@case("QDQ207")
def newer_opset(model):
    model.opset_import[0].version = 999


@case("QDQ207")
def newer_ir_version(model):
    model.ir_version = 99


@case("QDQ207")
def no_opset(model):
    del model.opset_import[:]


@case("QDQ208")
def no_outputs(model):
    del model.graph.output[:]


@case("QDQ208")
def cycle(model):
    model.graph.node[0].input[0] = "y"


@case("QDQ208")
def constant_that_is_missing(model):
    del model.graph.initializer[:]


@case("QDQ208")
def functions_that_call_each_other(model):
    opsets = [helper.make_opsetid("", 19), helper.make_opsetid("mine", 1)]
    for name, called in ("FG", "GF"):
        node = helper.make_node(called, ["p"], ["q"], domain="mine")
        model.functions.append(helper.make_function("mine", name, ["p"], ["q"], [node], opsets))
    model.opset_import.append(opsets[1])
    model.graph.node[1].op_type, model.graph.node[1].domain = "F", "mine"
    del model.graph.node[1].attribute[:]


@case("QDQ210")
def group_below_one(model):
    model.graph.node[0].attribute.append(helper.make_attribute("group", -3))


@case("QDQ210")
def attribute_of_another_type(model):
    model.graph.node[1].attribute[0].CopyFrom(helper.make_attribute("axis", "one"))


@case("QDQ210")
def attribute_that_the_operator_has_not(model):
    model.graph.node[1].attribute.append(helper.make_attribute("speed", 3))


@case("QDQ210")
def too_many_inputs(model):
    model.graph.node[1].input.extend(["x", "x"])


def save(model, folder):
    folder.mkdir(exist_ok=True)
    (folder / "w.bin").write_bytes(bytes(64))
    (folder.parent / "w.bin").write_bytes(bytes(64))
    path = folder / "m.onnx"
    if not path.exists():
        (folder / "loop.bin").symlink_to("loop.bin")
        (folder / "zero.bin").symlink_to("/dev/zero")
        (folder / "folder").mkdir()
        os.mkfifo(folder / "pipe.bin")
    path.write_bytes(model.SerializeToString())
    return path


def loads(path):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


def test_a_sound_file_is_valid_and_says_who_says_so(tmp_path):
    report = check_onnx(save(sound_model(), tmp_path / "m"))
    assert report.validity.is_valid
    assert not {finding.rule for finding in report.findings} & FILE_RULES
    first, second = report.format_table().splitlines()[:2]
    assert "valid ONNX, opset 19" in first
    assert f"onnx {onnx.__version__} accepts it" in second
    assert f"ONNX Runtime {onnxruntime.__version__} loads it" in second
    assert json.loads(json.dumps(to_jsonable(report)))["validity"]["is_valid"] is True


@pytest.mark.parametrize("name", CASES)
def test_damage_is_a_finding_and_never_called_valid(tmp_path, name, caplog, capfd):
    change, rules = CASES[name]
    model = sound_model()
    change(model)
    path = save(model, tmp_path / "m")
    with caplog.at_level(logging.WARNING):
        report = check_onnx(path)
    named = {finding.rule for finding in report.problems}
    assert rules <= named
    assert named - rules <= {"QDQ201", "QDQ202", "QDQ203"}
    assert not report.validity.is_valid
    assert "valid ONNX" not in report.format_table()
    assert (report.validity.runtime_refusal is None) == loads(path)
    assert caplog.text == ""
    capfd.readouterr()  # what ONNX Runtime prints in this test


@pytest.mark.parametrize(
    "name", sorted(name for name, (_, rules) in CASES.items() if "QDQ205" in rules)
)
def test_damaged_constants_are_neither_fixed_nor_built(tmp_path, name):
    model = sound_model()
    CASES[name][0](model)
    path = save(model, tmp_path / "m")
    with pytest.raises(CheckError, match="QDQ205"):
        fix_onnx(path, tmp_path / "fixed.onnx")
    with pytest.raises(BuildError, match="QDQ205"):
        build_engine(path)
    assert not (tmp_path / "fixed.onnx").exists()


@pytest.mark.parametrize(
    "count", [24, 2000]
)  # 2^1999 has more digits than Python converts to a float
@pytest.mark.parametrize("has_nodes", [True, False])
def test_functions_that_double_are_refused_at_once(tmp_path, count, has_nodes):
    """Neither onnx, ONNX Runtime nor TensorRT is asked: each would write all calls out."""
    model = sound_model()
    call_doubling_functions(model, count)
    if not has_nodes:
        del model.functions[-1].node[:]
        model.functions[-1].output[:] = ["p"]
    path = save(model, tmp_path / "m")
    report = check_onnx(path)
    assert {finding.rule for finding in report.problems} == {"QDQ208"}
    assert "more than 1,000,000 nodes" in report.format_table()
    assert not report.validity.is_valid
    with pytest.raises(BuildError, match=r"QDQ208.*more than 1,000,000 nodes"):
        build_engine(path)
    with pytest.raises(CheckError, match="QDQ208"):
        fix_onnx(path, tmp_path / "fixed.onnx")


def test_functions_that_double_a_few_times_are_valid(tmp_path):
    model = sound_model()
    call_doubling_functions(model, 6)
    path = save(model, tmp_path / "m")
    assert loads(path)
    assert check_onnx(path).validity.is_valid


@pytest.mark.parametrize("verdict", [{"limit": "it took longer than 60 s"}, {"has_crashed": True}])
def test_what_onnx_does_not_come_to_an_end_with_is_not_built(tmp_path, monkeypatch, verdict):
    path = save(sound_model(), tmp_path / "m")
    answer = CheckerVerdict(onnx.__version__, None, None, **verdict)
    monkeypatch.setattr("qdq.check.inspection.check_model", lambda *_: answer)
    with pytest.raises(
        BuildError, match="onnx's checker crashed on it or did not finish"
    ) as caught:
        build_engine(path)
    assert f"qdq check {path}" in caught.value.fix


def refer(node, name, type_):
    """Let an attribute refer to one of a function."""
    for attribute in [attribute for attribute in node.attribute if attribute.name == name]:
        node.attribute.remove(attribute)
    node.attribute.add(name=name, type=type_, ref_attr_name="of_a_function")


@pytest.mark.parametrize(
    ("node", "name", "type_"),
    [
        ("conv", "group", onnx.AttributeProto.INT),
        ("conv", "strides", onnx.AttributeProto.INTS),
        ("conv", "auto_pad", onnx.AttributeProto.STRING),
        ("quantize", "axis", onnx.AttributeProto.INT),
        ("dequantize", "axis", onnx.AttributeProto.INT),
        ("transpose", "perm", onnx.AttributeProto.INTS),
        ("cast", "to", onnx.AttributeProto.INT),
    ],
)
def test_a_reference_outside_of_functions_is_not_known(tmp_path, node, name, type_):
    model = sound_model()
    nodes = [
        helper.make_node("QuantizeLinear", ["w", "s"], ["wq"], name="quantize", axis=0),
        helper.make_node("DequantizeLinear", ["wq", "s"], ["wd"], name="dequantize", axis=0),
        helper.make_node("Transpose", ["wd"], ["wt"], name="transpose", perm=[0, 1, 2, 3]),
        helper.make_node("Cast", ["wt"], ["wc"], name="cast", to=TensorProto.FLOAT),
        *model.graph.node,
    ]
    nodes[4].input[1] = "wc"
    refer(next(item for item in nodes if item.name == node), name, type_)
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.append(numpy_helper.from_array(np.full(4, 0.1, np.float32), "s"))
    report = check_onnx(save(model, tmp_path / "m"))
    assert not [finding for finding in report.findings if "cannot be applied" in finding.message]
    assert not {finding.rule for finding in report.problems} & {"QDQ208", "QDQ210"}


def drop_shapes(model):
    # Of a convolution TensorRT wants the number of dimensions.
    del (
        model.graph.node[0],
        model.graph.initializer[:],
    )
    model.graph.node[0].CopyFrom(helper.make_node("Relu", ["x"], ["y"], name="relu"))
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.ClearField("shape")


def drop_name(model):
    model.graph.name = ""


def raise_ir_version(model):
    model.ir_version = 99


def turn_nodes_around(model):
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))


def write_latin_1(model):
    return model.SerializeToString().replace(b"graph", b"gr\xe4ph")


@pytest.mark.trt
@pytest.mark.parametrize(
    "change", [drop_shapes, drop_name, raise_ir_version, turn_nodes_around, write_latin_1]
)
def test_what_tensorrt_builds_is_read(tmp_path, change):
    """Unusual files get a report with the unusual in it."""
    trt = pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    model = sound_model()
    content = change(model)
    path = save(model, tmp_path / "m")
    if content is not None:
        path.write_bytes(content)
    log = trt.Logger(trt.Logger.INTERNAL_ERROR)
    network = trt.Builder(log).create_network(0)
    assert trt.OnnxParser(network, log).parse_from_file(str(path))
    report = check_onnx(path)
    expected = {"QDQ207", "QDQ201"} if change is raise_ir_version else {"QDQ209"}
    assert {finding.rule for finding in report.findings} & FILE_RULES == expected


@pytest.mark.parametrize(("name", "severity"), [("BatchedNMS_TRT", "info"), ("Mine", "warning")])
def test_a_plugin_without_domain_is_read(tmp_path, name, severity):
    model = sound_model()
    model.graph.node.append(helper.make_node(name, ["y"], ["z"], name="plugin", speed=3))
    model.graph.output[0].name = "z"
    report = check_onnx(save(model, tmp_path / "m"))
    found = {(finding.rule, finding.node, finding.severity) for finding in report.findings}
    assert found & {("QDQ206", "plugin", "info"), ("QDQ206", "plugin", "warning")} == {
        ("QDQ206", "plugin", severity)
    }
    assert "QDQ202" not in {finding.rule for finding in report.findings}
    assert not report.validity.is_valid


def test_a_relative_path_in_another_folder(tmp_path, monkeypatch):
    """The helper process was started elsewhere."""
    save(sound_model(), tmp_path / "m")
    for folder in (tmp_path, tmp_path / "m"):
        monkeypatch.chdir(folder)
        assert check_onnx("m.onnx" if folder.name == "m" else "m/m.onnx").validity.is_valid


def test_the_size_counts_data_beside_the_file(tmp_path):
    model = sound_model()
    move_outside(model)
    path = save(model, tmp_path / "m")
    assert check_onnx(path).file_bytes == path.stat().st_size + 64


def test_what_takes_too_long_is_not_judged(tmp_path, monkeypatch):
    """Neither valid nor broken: nothing is said of the file, and nothing is called a crash."""
    path = save(sound_model(), tmp_path / "m")

    def expire(*_args, **_kwargs):  # as after the limit, whose test is in test_child.py
        raise ChildCrashError("it took longer than 0 s of processor time", is_timeout=True)

    monkeypatch.setattr("qdq.child.Child.call", expire)
    report = check_onnx(path)
    assert not report.validity.is_valid
    assert report.validity.onnx_refusal is None
    assert "took longer than 0 s of processor time" in report.validity.onnx_limit
    findings = [
        finding for finding in report.findings if finding.rule in ("QDQ201", "QDQ202", "QDQ203")
    ]
    assert {finding.severity for finding in findings} == {"info"}
    text = report.format_table()
    assert "valid ONNX" not in text
    assert "crash" not in text
    assert "gave no verdict" in text


def test_a_rule_that_fails_is_a_finding(tmp_path):
    from qdq import register_rule
    from qdq.check.rules import RULES

    @register_rule("FAILING101", "error", "Fails.", "It does.", "this test")
    def fail(view):
        raise ZeroDivisionError("as it should")

    try:
        (finding,) = check_onnx(save(sound_model(), tmp_path / "m"), select=["FAILING101"]).findings
    finally:
        del RULES["FAILING101"]
    assert finding.severity == "warning"
    assert "cannot be applied to the graph (ZeroDivisionError: as it should)" in finding.message


def stack_concats(model):
    """40 of them double the number of paths each time: whoever follows every path never comes to an end."""
    del model.graph.node[:]
    model.graph.node.append(helper.make_node("QuantizeLinear", ["x", "s"], ["q"]))
    model.graph.node.append(helper.make_node("DequantizeLinear", ["q", "s"], ["c0"]))
    for index in range(40):
        name = f"c{index}"
        model.graph.node.append(helper.make_node("Concat", [name, name], [f"c{index + 1}"], axis=0))
    model.graph.node.append(helper.make_node("Conv", ["c40", "w"], ["y"], name="conv"))
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.1), "s"))
    model.graph.output[0].type.tensor_type.shape.dim[0].Clear()


def stack_constants(model):
    """The same with a constant, whose values onnx would follow: it has 2^40 of them."""
    stack_concats(model)
    model.graph.initializer.append(numpy_helper.from_array(np.ones(1, np.int64), "one"))
    model.graph.node[2].input[:] = ["one", "one"]
    model.graph.node[-1].input[0] = "x"


def chain_identities(model):
    """More in a row than Python may call itself."""
    for index in range(1500):
        name = f"i{index - 1}" if index else "w"
        model.graph.node.insert(index, helper.make_node("Identity", [name], [f"i{index}"]))
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    conv.input[1] = "i1499"


def test_shapes_are_inferred_once(tmp_path, monkeypatch):
    """Where the check could complete them, the coverage has nothing to ask."""
    model = sound_model()
    calls = []
    infer = shapes.infer_shapes
    for module in (shapes, coverage):
        monkeypatch.setattr(
            module, "infer_shapes", lambda *args, **options: calls.append(infer(*args, **options))
        )
    report = check_onnx(save(model, tmp_path / "m"))
    assert len(calls) == 1
    assert report.coverage.macs == 4 * 2 * 2 * 4


@pytest.mark.parametrize("change", [stack_concats, stack_constants, chain_identities])
def test_deep_graphs_come_to_an_end(tmp_path, change):
    model = sound_model()
    change(model)
    report = check_onnx(save(model, tmp_path / "m"))
    assert not [finding for finding in report.findings if "cannot be applied" in finding.message]
