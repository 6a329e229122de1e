"""`--fix`: the file is clean afterwards, and ONNX Runtime computes the same numbers to the bit."""

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from qdq import check_onnx
from qdq.check import fix
from qdq.check.fix import fix_onnx
from qdq.errors import CheckError

HEAD = '<ir_version: 9, opset_import: ["": 21]>\ng (float[N,2,4,4] x) => (float[N,3,4,4] y)\n'
BODY = """{
    [xq] a = QuantizeLinear(x, xs, xz)
    [xd] b = DequantizeLinear(a, xs, xz)
    [w] c = DequantizeLinear<axis=0>(w, ws, wz)
    d = Conv(b, c)
    y = Relu(d)
}"""
CONSTANTS = (
    "<float xs = {0.03}, int8 xz = {0}, int8[3,2,1,1] w = {1,-2,3,-4,5,127}, float[3] ws = {0.1,0.2,0.3}, "
    "int8[3] wz = {0,0,0}>\n"
)
SOUND = HEAD + CONSTANTS + BODY


def replace(*replacements):
    text = SOUND
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    return text


DEAD_CHANNEL = replace(
    ("w = {1,-2,3,-4,5,127}", "w = {1,-2,0,0,5,127}"),
    ("ws = {0.1,0.2,0.3}", "ws = {0.1,4e-22,0.3}, float[3] bias = {0.1,0.7,0.2}"),
    ("Conv(b, c)", "Conv(b, c, bias)"),
)
CASES = {
    "bias of a channel of zeros": (DEAD_CHANNEL, {"QDQ140": 1}),
    "scale of shape [1]": (
        replace(("float xs", "float[1] xs"), ("int8 xz", "int8[1] xz")),
        {"QDQ103": 2},
    ),
    "uint8 with zero point 128": (
        replace(
            ("int8 xz = {0}", "uint8 xz = {128}"),
            ("int8[3,2,1,1] w = {1,-2,3,-4,5,127}", "uint8[3,2,1,1] w = {0,1,128,129,254,255}"),
            ("int8[3] wz = {0,0,0}", "uint8[3] wz = {128,128,128}"),
        ),
        {"QDQ129": 2},
    ),
    "no zero point on the weight": (replace(("(w, ws, wz)", "(w, ws)")), {"QDQ102": 1}),
    "axis 1 not written": (
        replace(
            ("<axis=0>(w, ws, wz)", "(w, ws, wz)"),
            ("<float xs", "<float[2] vs = {0.1,0.2}, int8[2] vz = {0,0}, float xs"),
            ("DequantizeLinear(w, ws, wz)", "DequantizeLinear(w, vs, vz)"),
        ),
        {"QDQ105": 1},
    ),
    "duplicate pairs": (
        replace(
            (
                "d = Conv(b, c)",
                "[pq] p = QuantizeLinear(x, xs, xz)\n[pd] q = DequantizeLinear(p, xs, xz)\n"
                "e = Conv(b, c)\nf = Conv(q, c)\nd = Add(e, f)",
            )
        ),
        {"QDQ120": 2},
    ),
    "pairs in a row": (
        replace(
            (
                "d = Conv(b, c)",
                "[pq] p = QuantizeLinear(b, xs, xz)\n[pd] q = DequantizeLinear(p, xs, xz)\n"
                "d = Conv(q, c)",
            )
        ),
        {"QDQ120": 2},
    ),
}


def run(path):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    # Some beyond the range.
    x = np.random.default_rng(0).normal(scale=3, size=(5, 2, 4, 4)).astype(np.float32)
    return session.run(None, {"x": x})[0]


@pytest.mark.parametrize("case", CASES)
def test_same_numbers_and_no_finding_of_the_rule(tmp_path, case):
    text, expected = CASES[case]
    before, after = tmp_path / "before.onnx", tmp_path / "new" / "after.onnx"
    ir.save(ir.from_onnx_text(text), before)
    (rule,) = expected
    assert rule in {finding.rule for finding in check_onnx(before).findings}
    assert fix_onnx(before, after) == expected
    findings = check_onnx(after).findings
    # Written down, it is seen to be the wrong one, which only a new export fixes.
    if case != "axis 1 not written":
        assert rule not in {finding.rule for finding in findings}
    np.testing.assert_array_equal(run(after), run(before))
    assert fix_onnx(after, after) == {}


def test_sound_file_stays(tmp_path):
    path = tmp_path / "m.onnx"
    ir.save(ir.from_onnx_text(SOUND), path)
    before = run(path)
    assert fix_onnx(path, path) == {}
    np.testing.assert_array_equal(run(path), before)


@pytest.mark.parametrize(
    "text",
    [
        replace(("int8 xz = {0}", "uint8 xz = {0}")),  # codes above 127 have no place in int8
        replace(("int8 xz = {0}", "uint8 xz = {100}")),
        replace(("(x, xs, xz)", "(x, xs)"), ("(a, xs, xz)", "(a, xs)")),
    ],
)
def test_what_would_change_numbers_stays(tmp_path, text):
    path = tmp_path / "m.onnx"
    ir.save(ir.from_onnx_text(text), path)
    assert fix_onnx(path, tmp_path / "out.onnx") == {}
    assert any(
        finding.severity == "error" for finding in check_onnx(tmp_path / "out.onnx").findings
    )


def test_square_weight_without_axis_stays(tmp_path):
    text = replace(
        ("int8[3,2,1,1] w = {1,-2,3,-4,5,127}", "int8[3,3,1,1] w = {1,2,3,4,5,6,7,8,9}"),
        ("[N,2,4,4]", "[N,3,4,4]"),
        ("<axis=0>(w", "(w"),
    )
    ir.save(ir.from_onnx_text(text), tmp_path / "m.onnx")
    assert fix_onnx(tmp_path / "m.onnx", tmp_path / "out.onnx") == {}


def test_other_readers_of_a_constant_keep_it(tmp_path):
    text = replace(
        ("float xs", "float[1] xs"),
        ("int8 xz", "int8[1] xz"),
        ("y = Relu(d)", "e = Mul(d, xs)\ny = Relu(e)"),
    )
    ir.save(ir.from_onnx_text(text), tmp_path / "m.onnx")
    fix_onnx(tmp_path / "m.onnx", tmp_path / "out.onnx")
    np.testing.assert_array_equal(run(tmp_path / "out.onnx"), run(tmp_path / "m.onnx"))


def test_weights_beside_the_file_come_along(tmp_path):
    ir.save(
        ir.from_onnx_text(SOUND),
        tmp_path / "m.onnx",
        external_data="m.data",
        size_threshold_bytes=0,
    )
    fix_onnx(tmp_path / "m.onnx", tmp_path / "new" / "m.onnx")
    before = run(tmp_path / "m.onnx")
    (tmp_path / "m.data").unlink()
    np.testing.assert_array_equal(run(tmp_path / "new" / "m.onnx"), before)


def write(folder, text, change=None):
    model = ir.to_proto(ir.from_onnx_text(text))
    if change is not None:
        change(model)
    folder.mkdir(exist_ok=True)
    path = folder / "m.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def add_sparse(model):
    """A sparse weight that the graph adds: without it the file does not load."""
    values = numpy_helper.from_array(np.float32([2]), "sparse")
    indices = numpy_helper.from_array(np.array([1]), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))
    model.graph.node[-1].output[0] = "before"
    model.graph.node.append(helper.make_node("Add", ["before", "sparse"], ["y"]))


def add_training(model):
    model.training_info.add().algorithm.name = "train"


SCALE_1 = replace(("float xs", "float[1] xs"), ("int8 xz", "int8[1] xz"))


@pytest.mark.parametrize(
    ("change", "lost"), [(add_sparse, "sparse_initializer"), (add_training, "training_info")]
)
@pytest.mark.parametrize("in_place", [True, False])
def test_what_would_be_lost_is_refused(tmp_path, change, lost, in_place):
    path = write(tmp_path / "a", SCALE_1, change)
    content, expected = path.read_bytes(), run(path)
    output = path if in_place else tmp_path / "out.onnx"
    with pytest.raises(CheckError, match=lost):
        fix_onnx(path, output)
    assert path.read_bytes() == content
    assert sorted(file.name for file in tmp_path.rglob("*.onnx")) == ["m.onnx"]
    np.testing.assert_array_equal(run(path), expected)


@pytest.mark.parametrize("change", [None, add_sparse, add_training])
def test_nothing_to_fix_copies_every_byte(tmp_path, change):
    path = write(tmp_path / "a", SOUND, change)
    modified = path.stat().st_mtime_ns
    assert fix_onnx(path, tmp_path / "out.onnx") == {}
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()
    assert fix_onnx(path, path) == {}
    assert path.stat().st_mtime_ns == modified


def test_a_fixed_model_that_would_not_load_is_not_written(tmp_path, monkeypatch):
    """A repair that goes wrong: the file stays."""

    class Break(ir.passes.InPlacePass):
        changed = ("xq",)

        def call(self, model):
            model.graph[0].op_type = "Nothing"
            return ir.passes.PassResult(model, modified=True)

    monkeypatch.setattr(fix, "_REPAIRS", (("QDQ103", Break),))
    path = write(tmp_path / "a", SOUND)
    content = path.read_bytes()
    for output in (path, tmp_path / "out.onnx"):
        with pytest.raises(CheckError, match="the fixed file would be refused"):
            fix_onnx(path, output)
    assert path.read_bytes() == content
    assert not (tmp_path / "out.onnx").exists()


def test_data_that_are_missing_are_refused(tmp_path):
    ir.save(
        ir.from_onnx_text(SCALE_1),
        tmp_path / "m.onnx",
        external_data="m.data",
        size_threshold_bytes=0,
    )
    content = (tmp_path / "m.onnx").read_bytes()
    (tmp_path / "m.data").unlink()
    for output in (tmp_path / "m.onnx", tmp_path / "out.onnx"):
        with pytest.raises(CheckError, match="damaged"):
            fix_onnx(tmp_path / "m.onnx", output)
    assert (tmp_path / "m.onnx").read_bytes() == content
    assert not (tmp_path / "out.onnx").exists()


def test_no_onnx_leaves_no_file(tmp_path):
    (tmp_path / "m.onnx").write_text("text")
    with pytest.raises(CheckError):
        fix_onnx(tmp_path / "m.onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
