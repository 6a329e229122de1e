"""Function calls beside operators that ONNX takes apart: matched with the very tensor, or not at all and with a reason.

The truth is ONNX Runtime's: the largest value of the tensor whose name was written, or whose range was read.
"""

import contextlib
import io
import json
import warnings

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qdq
from qdq.quantizer import named_quantizers

BESIDE = {
    "relu": lambda x, _: F.relu(x),
    "tanh gelu": lambda x, _: F.gelu(x, approximate="tanh"),
    "gelu": lambda x, _: F.gelu(x),
    "linear": lambda x, w: F.linear(x, w[:8, :8], w[0, :8]),
    "group_norm": lambda x, w: F.group_norm(x, 4, w[0], w[1]),
    "addcmul": lambda x, _: torch.addcmul(x, x, x),
    "constant sum": lambda x, w: (
        F.gelu(x, approximate="tanh") * (w + w)[0, 0]
    ),  # one Add less, others more
}


class Net(nn.Module):
    def __init__(self, beside):
        super().__init__()
        torch.manual_seed(0)
        self.beside = BESIDE[beside]
        self.first, self.second, self.last = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(3))
        self.table = nn.Parameter(torch.randn(16, 16))

    def forward(self, x):
        x = torch.relu(self.beside(self.first(x) * 10, self.table)) * 3
        return self.last(torch.relu(self.second(x) + x))


def export_float(model, images, path, dynamo):
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        torch.onnx.export(model, (images,), path, dynamo=dynamo, opset_version=18)


def largest_values(path, images):
    """Of every tensor of a float graph."""
    proto = onnx.load(path)
    output_names = {value.name for value in proto.graph.output}
    names = [name for node in proto.graph.node for name in node.output if name not in output_names]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = ort.InferenceSession(proto.SerializeToString())
    input_name = session.get_inputs()[0].name
    values = session.run(None, {input_name: images.numpy()})
    shapes = {
        output.name: value for output, value in zip(session.get_outputs(), values, strict=True)
    }
    return {
        name: float(np.abs(value).max())
        for name, value in {**shapes, input_name: images.numpy()}.items()
        if value.size
    }


def swap(beside, images, scales="independent"):
    model = Net(beside).eval()
    qdq.swap_modules(model, images)
    qdq.rewire_operations(model, images, scales=scales)
    return model


def activations(model):
    return {
        name: float(q.amax)
        for name, q in named_quantizers(model)
        if q.axis is None and q.amax is not None
    }


@pytest.mark.parametrize("dynamo", [True, False])
@pytest.mark.parametrize("beside", BESIDE)
def test_no_quantizer_has_the_range_of_another_tensor(tmp_path, beside, dynamo):
    images = torch.randn(4, 16, 8, 8)
    export_float(Net(beside).eval(), images, tmp_path / "float.onnx", dynamo)
    truth = largest_values(tmp_path / "float.onnx", images)
    (tmp_path / "ranges.json").write_text(
        json.dumps({name: [-value, value] for name, value in truth.items()})
    )
    calibrated, fresh = swap(beside, images), swap(beside, images)
    qdq.calibrate_model(calibrated, [images], method="max")
    (call,) = (name for name in activations(calibrated) if name.startswith("_add"))

    read = qdq.import_ranges(fresh, tmp_path / "ranges.json", onnx=tmp_path / "float.onnx")
    for name, amax in activations(fresh).items():
        assert amax == pytest.approx(activations(calibrated)[name], rel=1e-4)
    # torch's exporter of today says what each node was made for
    is_certain = beside == "relu" or (dynamo and beside != "constant sum")
    assert (call in read.matched) == is_certain
    assert is_certain or "not matched" in read.missing[call]

    written = qdq.export_ranges(
        calibrated, tmp_path / "new.json", format="onnxruntime", onnx=tmp_path / "float.onnx"
    )
    for name, tensors in written.written.items():
        assert [truth[tensor] for tensor in tensors] == pytest.approx(
            [activations(calibrated)[name]], rel=1e-4
        )
    assert (call in written.written) == is_certain
    assert is_certain or "not matched" in written.left_out[call]


@pytest.mark.parametrize("beside", BESIDE)
def test_files_of_qdq(tmp_path, beside):
    """The exporter merges the pair of the sum with that of the convolution that reads the same tensor."""
    images = torch.randn(4, 16, 8, 8)
    calibrated, fresh = swap(beside, images, "shared"), swap(beside, images, "shared")
    qdq.calibrate_model(calibrated, [images], method="max")
    qdq.export_onnx(calibrated, images, tmp_path / "qdq.onnx", dynamic_batch=False)
    read = qdq.import_ranges(fresh, tmp_path / "qdq.onnx")
    assert not read.missing
    assert activations(fresh) == activations(calibrated)
    written = qdq.export_ranges(
        calibrated, tmp_path / "new.json", format="onnxruntime", onnx=tmp_path / "qdq.onnx"
    )
    tensors = {
        name: written.written.get(name)
        for name in activations(calibrated)
        if name.startswith("_add")
    }
    assert set(tensors.values()) <= {None, written.written["second._input_quantizer"]}


class Several(nn.Module):
    """Four sums in one forward, the first two of which do not need each other; it runs twice."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c, self.d = (nn.Conv2d(16, 16, 3, padding=1) for _ in range(4))

    def forward(self, x):
        x = torch.relu(x)
        first, second = self.a(x) + 3 * x, self.b(x) + 5 * x
        return self.d(torch.relu(self.c(torch.relu(first + second)) + 7 * x))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = Several(), nn.Conv2d(16, 16, 3)

    def forward(self, x):
        return self.head(self.inner(2 * self.inner(x)))


@pytest.fixture
def twice(tmp_path):
    images = torch.randn(2, 16, 8, 8)
    export_float(Twice().eval(), images, tmp_path / "float.onnx", False)
    models = [Twice().eval() for _ in range(2)]
    for model in models:
        qdq.swap_modules(model, images)
        qdq.rewire_operations(model, images, scales="independent")
    qdq.calibrate_model(models[0], [images], method="max")
    truth = largest_values(tmp_path / "float.onnx", images)
    (tmp_path / "ranges.json").write_text(
        json.dumps({name: [-value, value] for name, value in truth.items()})
    )
    return models, tmp_path


def test_several_calls_and_several_runs(twice):
    (calibrated, fresh), folder = twice
    read = qdq.import_ranges(fresh, folder / "ranges.json", onnx=folder / "float.onnx")
    calls = {name: amax for name, amax in activations(calibrated).items() if "_add" in name}
    assert len(calls) == 3
    assert {name: read.matched[name] for name in calls} == pytest.approx(calls, rel=1e-4)


def test_an_order_that_nothing_vouches_for(twice):
    """The names are gone, and another tool may have sorted the nodes."""
    (_, fresh), folder = twice
    proto = onnx.load(folder / "float.onnx")
    for number, node in enumerate(reversed(proto.graph.node)):
        node.name = f"{node.name.rpartition('/')[0]}/{node.op_type}_{number}"
    onnx.save(proto, folder / "float.onnx")
    read = qdq.import_ranges(fresh, folder / "ranges.json", onnx=folder / "float.onnx")
    missing = {name: reason for name, reason in read.missing.items() if "_add" in name}
    assert len(missing) == 3
    assert all("order" in reason for reason in missing.values())
