import os
import subprocess
import sys

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from graph_text import read

from qdq import ArgumentError, check_onnx
from qdq.check import OnnxModel
from qdq.graph import save
from qdq.graph.save import save_model


@pytest.fixture
def model():
    random = np.random.default_rng(0)
    model = read(
        "g (float[2,40] x, float[40,40] w, float[40,40] v) => (y) { c = MatMul (x, w) y = MatMul (c, v) }"
    )
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(
            random.normal(size=(40, 40)).astype(np.float32), name=value.name
        )
        model.graph.register_initializer(value)
    return model


@pytest.fixture
def small_limit(monkeypatch):
    monkeypatch.setattr(save, "_ONE_FILE_BYTES", 1000)


def test_one_file_below_the_limit(model, tmp_path):
    path = tmp_path / "model.onnx"
    assert save_model(model, path) == path.stat().st_size
    assert os.listdir(tmp_path) == ["model.onnx"]


def test_the_bytes_are_those_of_protobuf(model, tmp_path):
    for sizes in ({}, {"more": 300, "scale": 3}):
        for name, size in sizes.items():
            tensor = ir.tensor(np.arange(size, dtype=np.float32))
            model.graph.register_initializer(ir.val(name, const_value=tensor))
        model.metadata_props["about"] = "a model"
        model.graph.doc_string = "a graph"
        expected = ir.to_proto(model).SerializeToString(deterministic=True)
        size = save_model(model, tmp_path / "model.onnx")
        assert (tmp_path / "model.onnx").read_bytes() == expected
        assert size == len(expected)


MEASURED = """
import resource, sys
from pathlib import Path
import numpy as np
import onnx_ir as ir
from qdq.graph.save import save_model

x = ir.Value(name="x", shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.FLOAT))
values = [ir.val(f"w{i}", const_value=ir.tensor(np.full(5 * 2**18, i, np.float32))) for i in range(40)]
nodes = [ir.node("Add", [x, value]) for value in values]
graph = ir.Graph([x], [nodes[-1].outputs[0]], nodes=nodes, initializers=values, opset_imports={"": 18}, name="g")
model = ir.Model(graph, ir_version=10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
size = save_model(model, Path(sys.argv[1]))
print(size, 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes")
def test_memory_holds_a_few_tensors_and_no_second_model(tmp_path):
    """40 tensors of 5 MiB; each is there twice while it is written."""
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "model.onnx")]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    size, more = map(int, result.stdout.split())
    assert size > 200 * 2**20
    assert more < size / 4


def test_weights_beside_the_model_above_it(model, tmp_path, small_limit, monkeypatch):
    path = tmp_path / "model.onnx"
    written = save_model(model, path)
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data"]
    assert written == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert path.stat().st_size < 1000
    assert all(
        isinstance(value.const_value, ir.Tensor) for value in model.graph.initializers.values()
    )

    single_file = tmp_path / "single_file" / "model.onnx"
    monkeypatch.undo()
    save_model(model, single_file)
    x = np.random.default_rng(1).normal(size=(2, 40)).astype(np.float32)
    np.testing.assert_array_equal(OnnxModel(path)(x)[0], OnnxModel(single_file)(x)[0])
    onnx.checker.check_model(str(path), full_check=True)
    assert check_onnx(path).findings == check_onnx(single_file).findings


def test_the_same_bytes_twice_and_no_path_in_them(model, tmp_path, small_limit):
    for folder in ("a", "b"):
        save_model(model, tmp_path / folder / "model.onnx")
    for name in ("model.onnx", "model.onnx.data"):
        content = (tmp_path / "a" / name).read_bytes()
        assert content == (tmp_path / "b" / name).read_bytes()
        assert str(tmp_path).encode() not in content


@pytest.mark.parametrize("step", ["data", "replace", "model"])
def test_an_export_that_dies_leaves_no_half(model, tmp_path, small_limit, monkeypatch, step):
    path = tmp_path / "model.onnx"

    def die(*_):
        raise KeyboardInterrupt

    if step == "data":
        monkeypatch.setattr(save, "_chunks", die)
    elif step == "replace":
        monkeypatch.setattr(save.os, "replace", die)
    else:
        real = save.write_atomic
        monkeypatch.setattr(
            save, "write_atomic", lambda target, c: die() if target == path else real(target, c)
        )
    with pytest.raises(KeyboardInterrupt):
        save_model(model, path)
    assert not path.exists()
    assert set(os.listdir(tmp_path)) <= {"model.onnx.data"}


def test_never_the_data_of_another_model(model, tmp_path, small_limit, monkeypatch):
    path = tmp_path / "model.onnx"
    save_model(model, path)
    monkeypatch.setattr(save, "_chunks", lambda _: 1 / 0)
    contents = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    with pytest.raises(ZeroDivisionError):
        save_model(model, path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == contents


def test_a_folder_that_cannot_be_written(model, tmp_path, small_limit):
    (tmp_path / "file").write_text("")
    with pytest.raises(ArgumentError, match="cannot write"):
        save_model(model, tmp_path / "file" / "model.onnx")


@pytest.mark.trt
def test_tensorrt_reads_both_files(model, tmp_path, small_limit):
    pytest.importorskip("tensorrt_rtx", reason="needs the extra 'rtx'")
    from qdq import build_engine

    for number, node in enumerate(model.graph):
        node.name = f"node{number}"
    path = tmp_path / "model.onnx"
    save_model(model, path)
    assert len(build_engine(path, backend="rtx").layers) == 2
