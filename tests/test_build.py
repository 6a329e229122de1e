"""Small QDQ graphs, built by TensorRT-RTX on the CPU: what runs in int8 and what each bad input says."""

import importlib.util
import json
import logging
import subprocess
import sys
import types

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper, numpy_helper

from qdq.build import _decides_types, build_engine
from qdq.cli.build import build
from qdq.errors import ArgumentError, BuildError, DependencyError, QdqError
from qdq.graph.shapes import infer_shapes
from qdq.trt.backend import Backend, find_backend

SCALE, ZERO_POINT = np.float32(0.05), np.int8(0)


def needs_rtx(test):
    """Mark a test or class that builds engines; it needs no GPU."""
    missing = importlib.util.find_spec("tensorrt_rtx") is None
    reason = "needs tensorrt_rtx: pip install 'qdq[rtx]'"
    return pytest.mark.trt(pytest.mark.skipif(missing, reason=reason)(test))


class Graph:
    """A small ONNX graph, one call a node."""

    def __init__(self):
        self.nodes, self.constants, self.count = [], [], 0

    def constant(self, array):
        self.count += 1
        self.constants.append(numpy_helper.from_array(np.asarray(array), f"c{self.count}"))
        return f"c{self.count}"

    def op(self, op_type, *inputs, name=None, **attributes):
        self.count += 1
        output = f"v{self.count}"
        name = f"{op_type}_{self.count}" if name is None else name
        self.nodes.append(helper.make_node(op_type, inputs, [output], name=name, **attributes))
        return output

    def qdq(self, x, scale=SCALE, zero_point=ZERO_POINT, **axis):
        operands = (
            self.constant(scale) if not isinstance(scale, str) else scale,
            self.constant(zero_point),
        )
        return self.op(
            "DequantizeLinear", self.op("QuantizeLinear", x, *operands, **axis), *operands, **axis
        )

    def weight(self, *shape, axis=0, quantized=True):
        values = np.random.default_rng(0).normal(size=shape).astype(np.float32)
        if not quantized:
            return self.constant(values)
        channels = shape[axis]
        scale, zero_point = np.full(channels, 0.02, np.float32), np.zeros(channels, np.int8)
        return self.qdq(self.constant(values), scale, zero_point, axis=axis)

    def save(self, path, inputs, output):
        values = [
            helper.make_tensor_value_info(k, onnx.TensorProto.FLOAT, v) for k, v in inputs.items()
        ]
        results = [helper.make_tensor_value_info(output, onnx.TensorProto.FLOAT, None)]
        graph = helper.make_graph(self.nodes, "g", values, results, self.constants)
        onnx.save(
            helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10),
            path,
        )
        return path


@pytest.mark.parametrize(
    ("real", "codes", "decides"),
    [
        ("float", "int8", False),
        ("float", "float8e4m3fn", True),
        ("float16", "int8", True),
    ],
)
def test_types_of_the_graph_decide(real, codes, decides):
    """For FP8 too: --int8 --fp16 is no flag for it."""
    model = ir.from_onnx_text(f"""
    <ir_version: 10, opset_import: ["": 19]>
    g ({real}[4] x, {real} s, {codes} z) => ({real}[4] y)
    {{
        q = QuantizeLinear (x, s, z)
        y = DequantizeLinear (q, s, z)
    }}
    """)
    infer_shapes(model, data_prop=False)
    assert _decides_types(model) == decides


def conv_file(
    path, *, scale=SCALE, on_input=True, on_weight=True, shape=("n", 16, 8, 8), name="a/Conv"
):
    g = Graph()
    x = g.qdq("x", scale, np.zeros_like(scale, np.int8)) if on_input else "x"
    y = g.op("Conv", x, g.weight(32, 16, 3, 3, quantized=on_weight), name=name, pads=[1] * 4)
    return g.save(path, {"x": list(shape)}, y)


def _depthwise(g):
    y = g.op("Conv", g.qdq("x"), g.weight(16, 1, 3, 3), name="a/Conv", group=16, pads=[1] * 4)
    return ["n", 16, 8, 8], y


def _grouped(g):
    return ["n", 16, 8, 8], g.op("Conv", g.qdq("x"), g.weight(32, 4, 3, 3), name="a/Conv", group=4)


def _padded(g):
    x = g.op("Pad", g.qdq("x"), g.constant(np.array([0, 0, 0, 0, 0, 0, 1, 1])))
    return ["n", 16, 8, 8], g.op("Conv", x, g.weight(32, 16, 3, 3), name="a/Conv", strides=[2, 2])


def _one_dimensional(g):
    return ["n", 16, 20], g.op("Conv", g.qdq("x"), g.weight(32, 16, 3), name="a/Conv")


def _matmul(g):
    w = g.op("Transpose", g.weight(64, 32), perm=[1, 0])
    return ["n", 10, 32], g.op(
        "Add", g.op("MatMul", g.qdq("x"), w, name="a/MatMul"), g.constant(np.ones(64, "f"))
    )


def _gemm(g):
    bias = g.constant(np.ones(10, "f"))
    return ["n", 64], g.op("Gemm", g.qdq("x"), g.weight(10, 64), bias, name="a/Gemm", transB=1)


def _gemv(g):
    return [1, 64], _gemm(g)[1]


def _nameless(g):
    return ["n", 16, 8, 8], g.op("Conv", g.qdq("x"), g.weight(32, 16, 1, 1), name="")


@needs_rtx
class TestCensus:
    @pytest.mark.parametrize(
        "make", [_depthwise, _grouped, _padded, _one_dimensional, _matmul, _gemm, _gemv, _nameless]
    )
    def test_quantized_layers_run_in_int8(self, tmp_path, make):
        g = Graph()
        shape, y = make(g)
        report = build_engine(g.save(tmp_path / "m.onnx", {"x": shape}, y), backend="rtx")
        assert (report.expected_int8, report.int8, report.missing_int8) == (1, 1, [])
        assert report.format_table().splitlines()[-1] == "int8: 1 of 1 expected"

    def test_a_chain_of_layers_by_module(self, tmp_path):
        """conv1, conv10 and conv100 are three layers, and the last one is not quantized."""
        g = Graph()
        x = g.op("Relu", g.op("Conv", g.qdq("x"), g.weight(32, 16, 1, 1), name="conv1/Conv"))
        x = g.op(
            "Relu", g.op("Conv", g.qdq(x), g.weight(32, 1, 3, 3), name="conv10/Conv", group=32)
        )
        x = g.op("Conv", x, g.weight(16, 32, 1, 1, quantized=False), name="conv100/Conv")
        report = build_engine(g.save(tmp_path / "m.onnx", {"x": ["n", 16, 8, 8]}, x), backend="rtx")
        assert [(layer.module, layer.expected_int8, layer.int8) for layer in report.layers] == [
            ("conv1", True, True),
            ("conv10", True, True),
            ("conv100", False, False),
        ]
        assert report.format_table().splitlines()[0].split()[:3] == ["conv100", "Conv", "float"]
        assert "int8: 2 of 2 expected" in report.format_table()

    def test_a_scale_of_shape_1_is_caught(self, tmp_path):
        """RTX builds it without a word, in float."""
        report = build_engine(
            conv_file(tmp_path / "m.onnx", scale=np.float32([0.05])), backend="rtx"
        )
        (layer,) = report.missing_int8
        assert (layer.module, layer.expected_int8, layer.int8) == ("a", True, False)
        assert "R-SHAPE" in layer.reason
        assert "NOT INT8" in report.format_table()
        assert report.format_table().endswith("int8: 0 of 1 expected")

    @pytest.mark.parametrize(
        ("on_input", "on_weight", "reason"),
        [(False, True, "weight only"), (True, False, "input only"), (False, False, "no Q/DQ")],
    )
    def test_half_quantized(self, tmp_path, on_input, on_weight, reason):
        path = conv_file(tmp_path / "m.onnx", on_input=on_input, on_weight=on_weight)
        report = build_engine(path, backend="rtx")
        (layer,) = report.layers
        assert (layer.expected_int8, layer.int8, report.missing_int8) == (False, False, [])
        assert reason in layer.reason

    def test_conv_transpose_is_float_in_rtx(self, tmp_path):
        g = Graph()
        y = g.op(
            "ConvTranspose",
            g.qdq("x"),
            g.weight(16, 8, 2, 2, axis=1),
            name="up/ConvTranspose",
            strides=[2, 2],
        )
        report = build_engine(g.save(tmp_path / "m.onnx", {"x": ["n", 16, 8, 8]}, y), backend="rtx")
        assert "R-CT-3" in report.missing_int8[0].reason

    def test_turing_has_no_int8_convolution(self, tmp_path):
        report = build_engine(conv_file(tmp_path / "m.onnx"), backend="rtx", sm=75)
        assert report.sm == 75
        assert len(report.missing_int8) == 1


@needs_rtx
class TestReport:
    def test_engine_file_and_profile(self, tmp_path):
        report = build_engine(str(conv_file(tmp_path / "m.qdq.onnx")), backend="rtx")
        assert report.engine == tmp_path / "m.qdq.rtx.engine"
        assert report.engine.stat().st_size == report.engine_bytes > 0
        assert (report.backend, report.sm) == ("rtx", 89)
        assert report.profiles == {
            "x": {"min": (1, 16, 8, 8), "opt": (8, 16, 8, 8), "max": (16, 16, 8, 8)}
        }
        assert "--optShapes=x:8x16x8x8" in report.trtexec["tensorrt11"]
        assert sorted(p.name for p in tmp_path.iterdir()) == ["m.qdq.onnx", "m.qdq.rtx.engine"]

    def test_given_shapes_and_output(self, tmp_path):
        path = conv_file(tmp_path / "m.onnx", shape=("n", 16, "h", "w"))
        shapes = {
            kind: {"x": (size, 16, 32, 32)} for kind, size in (("min", 1), ("opt", 2), ("max", 4))
        }
        report = build_engine(
            path,
            tmp_path / "out" / "e.engine",
            backend="rtx",
            min_shapes=shapes["min"],
            opt_shapes=shapes["opt"],
            max_shapes=shapes["max"],
        )
        assert report.engine.is_file()
        assert report.profiles["x"] == {kind: shape["x"] for kind, shape in shapes.items()}

    def test_warnings_of_the_builder_are_kept_once(self, tmp_path):
        g = Graph()
        # Read as int8, with the same warning for Q and DQ.
        x = g.qdq("x", np.float32(0.05), np.uint8(0))
        y = g.op("Conv", x, g.weight(32, 16, 1, 1), name="a/Conv")
        report = build_engine(g.save(tmp_path / "m.onnx", {"x": [1, 16, 8, 8]}, y), backend="rtx")
        (warning,) = report.warnings
        assert "UINT8" in warning
        assert f"warning: {warning}" in report.format_table()

    def test_command(self, tmp_path, capsys):
        path = conv_file(tmp_path / "m.onnx")
        assert (
            build(path, output=tmp_path / "e.engine", backend="rtx", json=tmp_path / "r.json") == 0
        )
        printed = capsys.readouterr().out
        assert "int8: 1 of 1 expected" in printed
        assert "\n# on the target, TensorRT 10\ntrtexec " in printed
        assert "\n# on the target, TensorRT 11\ntrtexec " in printed
        assert json.loads((tmp_path / "r.json").read_text())["layers"][0]["int8"] is True

    def test_command_fails_when_int8_is_missing(self, tmp_path):
        assert build(conv_file(tmp_path / "m.onnx", scale=np.float32([0.05])), backend="rtx") == 1

    def test_a_constant_scale_behind_folded_operators(self, tmp_path):
        g = Graph()
        half = g.op(
            "Cast", g.op("Identity", g.constant(np.float16(0.5))), to=onnx.TensorProto.FLOAT
        )
        x = g.qdq("x", g.op("Mul", half, g.constant(np.float32(0.1))))
        y = g.op("Conv", x, g.weight(32, 16, 1, 1), name="a/Conv")
        assert (
            build_engine(g.save(tmp_path / "m.onnx", {"x": [1, 16, 8, 8]}, y), backend="rtx").int8
            == 1
        )


@needs_rtx
class TestCrash:
    """TensorRT runs in a process of its own, after a check."""

    def test_what_crashes_it_is_one_error(self, tmp_path, monkeypatch):
        """A Relu without output that nothing reads: no rule refuses it before."""
        path = conv_file(tmp_path / "m.onnx")
        model = onnx.load(path)
        model.graph.node.append(helper.make_node("Relu", ["x"], [], name="no_output"))
        onnx.save(model, path)
        with pytest.raises(
            BuildError, match=r"TensorRT crashed .*SIGSEGV, a segmentation fault"
        ) as caught:
            build_engine(path, backend="rtx")
        assert "refuses the file" in caught.value.message  # what onnx's checker says of it
        assert f"qdq check {path}" in caught.value.fix
        assert [file.name for file in tmp_path.iterdir()] == ["m.onnx"]

    def test_functions_that_call_themselves_are_refused_before(self, tmp_path):
        path = conv_file(tmp_path / "m.onnx")
        model = onnx.load(path)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("mine", 1)]
        node = helper.make_node("F", ["p"], ["q"], domain="mine")
        model.functions.append(helper.make_function("mine", "F", ["p"], ["q"], [node], opsets))
        model.opset_import.append(opsets[1])
        onnx.save(model, path)
        with pytest.raises(BuildError, match=r"QDQ208\): F: the function calls itself"):
            build_engine(path, backend="rtx")

    def test_in_a_script_without_main_guard(self, tmp_path):
        path = conv_file(tmp_path / "m.onnx")
        script = tmp_path / "script.py"
        script.write_text(
            f"import qdq\nprint(qdq.build_engine({str(path)!r}, backend='rtx').int8)\n"
        )
        (tmp_path / "json.py").write_text("raise ImportError('a module of the current folder')\n")
        process = subprocess.run(
            [sys.executable, "-P", script],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            check=False,
        )
        assert (process.returncode, process.stdout) == (0, "1\n"), process.stderr


class TestBadInput:
    """Each says one clear thing, before TensorRT is asked where that is possible."""

    @pytest.mark.parametrize("of_constant", [True, False])
    def test_a_computed_scale_is_refused(self, tmp_path, of_constant):
        g = Graph()
        source = g.constant(np.ones(4, np.float32)) if of_constant else "x"
        x = g.qdq("x", g.op("ReduceMax", source, keepdims=0))
        y = g.op("Conv", x, g.weight(32, 16, 1, 1), name="a/Conv")
        path = g.save(tmp_path / "m.onnx", {"x": [1, 16, 8, 8]}, y)
        with pytest.raises(
            BuildError, match=r"scale of QuantizeLinear 'QuantizeLinear_\d+' .*R-DYN"
        ):
            build_engine(path)

    def test_a_scale_that_is_an_input_is_refused(self, tmp_path):
        g = Graph()
        y = g.op("Conv", g.qdq("x", "s"), g.weight(32, 16, 1, 1), name="a/Conv")
        with pytest.raises(BuildError, match="R-DYN"):
            build_engine(g.save(tmp_path / "m.onnx", {"x": [1, 16, 8, 8], "s": []}, y))

    def test_files_that_are_no_onnx(self, tmp_path):
        valid = conv_file(tmp_path / "m.onnx").read_bytes()
        for name, content in (
            ("cut", valid[: len(valid) // 2]),
            ("text", b"no model\n" * 9),
            ("empty", b""),
        ):
            path = tmp_path / f"{name}.onnx"
            path.write_bytes(content)
            with pytest.raises(BuildError, match=f"{name}.onnx") as caught:
                build_engine(path)
            assert caught.value.fix
        for path in (tmp_path / "missing.onnx", tmp_path):
            with pytest.raises(ArgumentError, match="there is no file"):
                build_engine(path)

    @needs_rtx
    def test_output_that_cannot_be_meant(self, tmp_path):
        path = conv_file(tmp_path / "m.onnx")
        for output, message in (
            (tmp_path, "Is a directory"),
            (path, "is also an input of this command"),
        ):
            with pytest.raises(QdqError, match=message):
                build_engine(path, output, backend="rtx")

    def test_dynamic_sizes_without_shapes(self, tmp_path):
        path = conv_file(tmp_path / "m.onnx", shape=("n", 16, "h", 8))
        with pytest.raises(ArgumentError, match=r"input x of shape \?x16x\?x8") as caught:
            build_engine(path)
        assert "--min-shapes x:1x16x1x8" in caught.value.fix

    def test_an_unknown_backend(self, tmp_path):
        with pytest.raises(ArgumentError, match="'onnxruntime'"):
            build_engine(conv_file(tmp_path / "m.onnx"), backend="onnxruntime")

    def test_without_any_tensorrt_the_commands_are_still_told(self, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
        with pytest.raises(DependencyError, match="no TensorRT can build here") as caught:
            build_engine(conv_file(tmp_path / "m.onnx"))
        assert "qdq[rtx]" in caught.value.fix
        assert f"trtexec --onnx={tmp_path / 'm.onnx'}" in caught.value.fix
        with pytest.raises(DependencyError, match="tensorrt_rtx cannot be imported"):
            find_backend("rtx")


@needs_rtx
class TestTensorRTRefuses:
    @pytest.mark.parametrize("sm", [90, 100, 0, -1])
    def test_an_unknown_compute_capability(self, tmp_path, sm):
        with pytest.raises(ArgumentError, match=f"SM {sm}; it supports 75, 80, 86, 89") as caught:
            build_engine(conv_file(tmp_path / "m.onnx"), backend="rtx", sm=sm)
        assert "SM 90" in caught.value.fix

    def test_a_node_that_the_parser_refuses(self, tmp_path):
        path = conv_file(tmp_path / "m.onnx", scale=np.float32(0))
        with pytest.raises(
            BuildError, match=r"node 'QuantizeLinear_\d+' \(QuantizeLinear\): .*positive"
        ) as caught:
            build_engine(path, backend="rtx")
        assert f"qdq check {path}" in caught.value.fix
        assert not path.with_suffix(".rtx.engine").exists()

    def test_a_graph_that_the_builder_refuses(self, tmp_path):
        g = Graph()
        shape, y = _gemm(g)
        path = g.save(tmp_path / "m.onnx", {"x": shape}, y)
        with pytest.raises(BuildError, match="'a/Gemm' for Turing"):
            build_engine(path, backend="rtx", sm=75)
        # and the refusal leaves nothing behind in the process
        assert not build_engine(
            conv_file(tmp_path / "conv.onnx"), backend="rtx", sm=86
        ).missing_int8


def _unusable_tensorrt():
    """A `tensorrt` as on a machine without a GPU: it imports, and its builder cannot be made."""
    module = types.ModuleType("tensorrt")
    module.__version__ = "10.13.0"

    class ILogger:
        pass

    def builder(log):
        log.log(types.SimpleNamespace(name="ERROR"), "CUDA initialization failure with error: 35")
        raise TypeError("factory function returned nullptr")

    module.ILogger, module.Builder = ILogger, builder
    return module


class TestBackend:
    @pytest.mark.parametrize(
        ("name", "version", "weak"),
        [("tensorrt", "10.13.0", True), ("tensorrt", "11.1.0", False), ("rtx", "1.7.1.116", False)],
    )
    def test_strong_typing_is_asked_for_where_it_is_not_the_rule(self, name, version, weak):
        module = types.ModuleType(name)
        module.__version__ = version
        assert Backend(name, module).weakly_typed is weak

    @needs_rtx
    @pytest.mark.parametrize(
        ("sm", "gpu_sm", "expected"), [(None, None, 89), (None, 86, 86), (75, 86, 75)]
    )
    def test_the_default_is_the_gpu_of_this_machine(self, sm, gpu_sm, expected):
        assert find_backend("rtx", sm, gpu_sm=gpu_sm).sm == expected

    @needs_rtx
    def test_a_gpu_that_it_cannot_build_for_is_only_a_warning(self, caplog):
        assert find_backend("rtx", gpu_sm=90).sm == 89
        assert "cannot build for SM 90" in caplog.text
        assert "SM 89 instead" in caplog.text
        with pytest.raises(ArgumentError, match="cannot build for SM 90"):
            find_backend("rtx", 90, gpu_sm=86)

    def test_a_tensorrt_without_gpu_says_why(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "tensorrt", _unusable_tensorrt())
        with pytest.raises(DependencyError, match="CUDA initialization failure") as caught:
            find_backend("tensorrt")
        assert "'rtx'" in caught.value.fix

    @needs_rtx
    def test_auto_passes_it_over_and_says_so(self, monkeypatch, caplog):
        monkeypatch.setitem(sys.modules, "tensorrt", _unusable_tensorrt())
        with caplog.at_level(logging.WARNING, logger="qdq.trt.backend"):
            assert find_backend("auto").name == "rtx"
        assert "CUDA initialization failure" in caplog.text

    @needs_rtx
    def test_auto_says_nothing_when_there_is_no_tensorrt(self, monkeypatch, caplog):
        monkeypatch.setitem(sys.modules, "tensorrt", None)
        assert find_backend("auto").name == "rtx"
        assert caplog.text == ""
