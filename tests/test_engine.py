"""Engines through the predictor of modules and files.

A pretended TensorRT has the calls of its Python API, and computes with ONNX Runtime what is at the addresses that it
gets. So wrong addresses, types, shapes or an output that is read too early would show.
"""

import ctypes
import math
import sys
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

import qdq
import qdq.engine
import qdq.predictor
from qdq.check.parity import measure_parity
from qdq.cli.main import main
from qdq.engine import Engine, is_engine, load_engine
from qdq.metrics import sqnr_db

INPUT, OUTPUT = "INPUT", "OUTPUT"
WORDS = {"tensor(float)": "FLOAT", "tensor(float16)": "HALF", "tensor(int64)": "INT64"}
ARRAYS = {"FLOAT": np.float32, "HALF": np.float16, "INT64": np.int64, "BF16": ml_dtypes.bfloat16}


class PretendedContext:
    def __init__(self, engine):
        self.engine = engine
        self.shapes, self.addresses, self.launched = {}, {}, []

    def set_input_shape(self, name, shape):
        self.shapes[name] = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        batch = next(iter(self.shapes.values()))[0]
        return [batch if size < 0 else size for size in self.engine.get_tensor_shape(name)]

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        """Only remembers it, as a GPU may: the outputs are there after the stream was waited for."""
        assert stream == 7
        feeds = {}
        for name, shape in self.shapes.items():
            array = self.view(name, shape)
            is_bfloat16 = array.dtype == ARRAYS["BF16"]
            feeds[name] = array.astype(np.float32) if is_bfloat16 else array.copy()
        self.launched.append(feeds)
        return True

    def finish(self):
        for feeds in self.launched:
            outputs = self.engine.session.run(None, feeds)
            for value, array in zip(self.engine.session.get_outputs(), outputs, strict=True):
                self.view(value.name, array.shape)[...] = array
        self.launched.clear()

    def view(self, name, shape):
        """The memory at the address of a tensor as an array."""
        dtype = np.dtype(ARRAYS[self.engine.get_tensor_dtype(name).name])
        memory = (ctypes.c_byte * (math.prod(shape) * dtype.itemsize)).from_address(
            self.addresses[name]
        )
        return np.frombuffer(memory, dtype).reshape(shape)


class PretendedEngine:
    """An ONNX file with the calls of an engine; its outputs come before its inputs."""

    def __init__(self, content, largest_batch):
        self.session = onnxruntime.InferenceSession(content)
        self.largest_batch = largest_batch
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.values = {value.name: value for value in self.session.get_outputs()} | self.inputs
        self.num_io_tensors = len(self.values)

    def create_execution_context(self):
        self.context = PretendedContext(self)
        return self.context

    def get_tensor_name(self, index):
        return list(self.values)[index]

    def get_tensor_mode(self, name):
        return INPUT if name in self.inputs else OUTPUT

    def get_tensor_dtype(self, name):
        return SimpleNamespace(name=WORDS[self.values[name].type])

    def get_tensor_shape(self, name):
        return [size if isinstance(size, int) else -1 for size in self.values[name].shape]

    def get_tensor_location(self, name):
        return "DEVICE"

    def get_tensor_profile_shape(self, name, profile):
        limits = (1, 1, self.largest_batch)
        return [
            [limit if size < 0 else size for size in self.get_tensor_shape(name)]
            for limit in limits
        ]


class PretendedTensorRT:
    __name__, __version__ = "tensorrt_rtx", "1.7"
    TensorIOMode = SimpleNamespace(INPUT=INPUT)
    TensorLocation = SimpleNamespace(HOST="HOST")

    class ILogger:
        pass

    def __init__(self, largest_batch=8):
        self.largest_batch = largest_batch
        self.engines = []
        self.Runtime = self.make_runtime

    def make_runtime(self, log):
        def deserialize(content):
            if content.startswith(b"other"):
                log.log(SimpleNamespace(name="ERROR"), "version tag does not match")
                return None
            self.engines.append(PretendedEngine(content, self.largest_batch))
            return self.engines[-1]

        return SimpleNamespace(deserialize_cuda_engine=deserialize)


@pytest.fixture
def package(monkeypatch):
    """The pretended TensorRT, and a stream that finishes its work when it is waited for."""
    package = PretendedTensorRT()

    def wait():
        for engine in package.engines:
            engine.context.finish()

    stream = SimpleNamespace(cuda_stream=7, synchronize=wait)
    module = SimpleNamespace(current_stream=lambda device: stream)
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    monkeypatch.setattr(
        qdq.predictor, "load_engine", lambda path: Engine(path, package, torch.device("cpu"))
    )
    return package


class TwoInputs(nn.Module):
    """Outputs of two shapes, and an integer input."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 16, 3)
        self.table = nn.Embedding(10, 16)

    def forward(self, image, ids):
        features = self.conv(image).relu()
        return {"features": features, "sums": features.mean((2, 3)) + self.table(ids).sum(1)}


@pytest.fixture(scope="module")
def batches():
    torch.manual_seed(0)
    return [
        {"image": torch.randn(size, 3, 8, 8), "ids": torch.randint(10, (size, 4))}
        for size in (4, 4, 2)
    ]


@pytest.fixture(scope="module")
def files(batches, tmp_path_factory):
    """A quantized ONNX file, the same as an engine, and the model."""
    torch.manual_seed(0)
    model = TwoInputs().eval()
    qdq.swap_modules(model, batches[0], include="*")
    qdq.calibrate_model(model, batches, method="max")
    onnx_path = tmp_path_factory.mktemp("engine") / "model.onnx"
    qdq.export_onnx(model, batches[0], onnx_path)
    engine = onnx_path.with_suffix(".rtx.engine")
    engine.write_bytes(onnx_path.read_bytes())
    return onnx_path, engine, model


def test_an_engine_gives_what_the_file_gives(files, batches, package):
    onnx_path, engine, _ = files
    expected, outputs = qdq.predict(onnx_path, batches), qdq.predict(engine, batches)
    assert outputs.keys() == expected.keys() == {"features", "sums"}
    for name, array in expected.items():
        assert outputs[name].shape == array.shape
        assert sqnr_db(array, outputs[name]) > 60, name


def test_the_predictor_of_one_batch(files, batches, package):
    predict = qdq.make_predictor(files[1], outputs={"sums": "sums"})
    expected = qdq.make_predictor(files[0], outputs={"sums": "sums"})
    for batch in batches:
        assert sqnr_db(expected(batch), predict(batch)) > 60
    assert len(package.engines) == 1  # loaded once


def test_float16_stays_float16_on_the_device(tmp_path, package):
    text = """<ir_version: 9, opset_import: ["": 17]>
    g (float16[N,4] x) => (float16[N,4] y) { y = Relu (x) }"""
    path = tmp_path / "half.plan"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    x = torch.randn(3, 4).half()
    output = qdq.predict(path, [x])
    assert (output.dtype, output.tolist()) == (np.float32, x.relu().float().tolist())
    with pytest.raises(qdq.DataError, match=r"x is float32; .*takes tensor\(float16\)"):
        qdq.predict(path, [x.float()])


def test_an_engine_in_bfloat16_takes_float32(tmp_path, package, monkeypatch):
    monkeypatch.setitem(WORDS, "tensor(float)", "BF16")
    text = """<ir_version: 9, opset_import: ["": 17]>
    g (float[N,4] x) => (float[N,4] y) { y = Relu (x) }"""
    path = tmp_path / "bfloat16.plan"
    path.write_bytes(onnx.parser.parse_model(text).SerializeToString())
    x = torch.randn(3, 4)
    expected = x.bfloat16().relu().float().tolist()
    for batch in (x, x.bfloat16()):
        output = qdq.predict(path, [batch])
        assert (output.dtype, output.tolist()) == (np.float32, expected)


def test_batches_that_the_engine_was_not_built_for(files, batches, package):
    package.largest_batch = 3
    with pytest.raises(
        qdq.DataError, match=r"\[4, 3, 8, 8\].*\[1, 3, 8, 8\] to \[3, 3, 8, 8\]"
    ) as e:
        qdq.predict(files[1], batches)
    assert "--batch-size" in e.value.fix
    with pytest.raises(qdq.DataError, match="takes 2 inputs, and got 1"):
        qdq.predict(files[1], [torch.zeros(1, 3, 8, 8)])


def test_an_engine_of_another_version(tmp_path, package):
    path = tmp_path / "other.engine"
    path.write_bytes(b"other")
    with pytest.raises(qdq.BuildError, match=r"cannot load .*: version tag does not match") as e:
        qdq.predict(path, [torch.zeros(1, 3)])
    assert "qdq build" in e.value.fix


def test_without_a_gpu_the_line_for_the_target(files, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main(["eval", str(files[1])])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert "is an engine, and there is no GPU here that could run it" in error
    assert f"qdq eval {files[1]}" in error
    assert "sh bundle/verify.sh" in error


@pytest.mark.parametrize(
    ("name", "missing"), [("m.rtx.engine", "tensorrt_rtx"), ("m.plan", "tensorrt")]
)
def test_without_tensorrt_the_extra_that_has_it(tmp_path, monkeypatch, name, missing):
    (tmp_path / name).write_bytes(b"engine")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(qdq.DependencyError, match=f"the package {missing} cannot be imported") as e:
        load_engine(tmp_path / name)
    assert "pip install 'qdq[" in e.value.fix


def test_names_of_engines(tmp_path):
    names = ("a.engine", "a.rtx.engine", "a.plan", "A.TRT", "a.onnx", "engine")
    assert [is_engine(tmp_path / name) for name in names] == [True] * 4 + [False] * 2
    with pytest.raises(qdq.DataError, match="there is no file"):
        load_engine(tmp_path / "a.plan")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU, on which the engine runs")
def test_a_real_engine_is_as_close_as_ties_allow(files, batches, tmp_path):
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    onnx_path, _, model = files
    engine = tmp_path / "model.rtx.engine"
    sm = qdq.find_sm(torch.device("cuda"))
    qdq.build_engine(onnx_path, engine, backend="rtx", sm=sm)
    expected, outputs = qdq.predict(onnx_path, batches), qdq.predict(engine, batches)
    floors = qdq.measure_tie_floor(model, batches, expected=qdq.predict(model, batches))
    assert measure_parity(expected, outputs, floors).failures == {}
