"""Models inside wrappers whose forward takes `*args` and `**kwargs`, and models of function calls alone."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import distributed, nn
from torch.nn.utils.parametrizations import orthogonal, weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from torch.optim.swa_utils import AveragedModel

from qdq import (
    ArgumentError,
    ExportError,
    calibrate_model,
    export_onnx,
    rewire_operations,
    swap_modules,
)
from qdq.predictor import predict
from qdq.quantizer import named_quantizers

WIDTH = 16


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (
            nn.Conv2d(WIDTH, 32, 3, padding=1),
            nn.Conv2d(32, 32, 3, padding=1),
        )

    def forward(self, x, offset=None):
        x = self.second(torch.relu(self.first(x)))
        return x if offset is None else x + offset.mean()


class Timing(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)


class Holder(nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body, self.last = body, nn.Conv2d(32, 32, 1)

    def forward(self, x, **kwargs):
        return self.last(torch.relu(self.body(x, **kwargs)))


def compiled_in_place():
    model = Holder(Net())
    model.body.compile()
    model.compile()
    return model


@pytest.fixture
def x():
    return torch.randn(4, WIDTH, 8, 8)


@pytest.fixture
def process_group():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def prepare(model, batch):
    model.eval()
    swap_modules(model, batch, include="*")
    rewire_operations(model, batch)
    calibrate_model(model, [batch], method="max")
    return model


def require_dynamic(model, batch, smaller, path):
    """The file takes another number of samples and gives torch's numbers."""
    report = export_onnx(prepare(model, batch), batch, path)
    assert {shape[0] for shape in report.inputs.values()} == {"batch"}
    assert len(report.layers) >= 2
    expected = predict(model, [smaller])
    np.testing.assert_allclose(
        predict(path, [smaller]), expected, atol=1e-4 * np.abs(expected).max()
    )
    return report


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda: nn.DataParallel(Net()), "x"),
        (lambda: AveragedModel(Net()), "args_0"),
        (lambda: Timing(Timing(Net())), "args_0"),
        (lambda: torch.compile(Net()), "x"),
        (lambda: Holder(torch.compile(Net())), "x"),
        (compiled_in_place, "x"),
    ],
)
def test_wrappers(wrap, name, x, tmp_path):
    report = require_dynamic(wrap(), x, x[:3], tmp_path / "model.onnx")
    assert list(report.inputs) == [name]


def test_a_wrapper_for_several_processes(process_group, x, tmp_path):
    model = nn.parallel.DistributedDataParallel(Net())
    require_dynamic(model, x, x[:3], tmp_path / "model.onnx")


@pytest.mark.parametrize("wrap", [nn.DataParallel, Timing, torch.compile])
def test_keywords_through_a_wrapper(wrap, x, tmp_path):
    batch = {"x": x, "offset": torch.randn(4, 2)}
    smaller = {name: tensor[:2] for name, tensor in batch.items()}
    report = require_dynamic(wrap(Net()), batch, smaller, tmp_path / "model.onnx")
    assert list(report.inputs) == ["x", "offset"]


class Normalized(nn.Module):
    """Each weight is computed."""

    def __init__(self, normalize):
        super().__init__()
        self.first = normalize(nn.Conv2d(WIDTH, 32, 3))
        self.second = normalize(nn.Conv2d(32, 32, 3))
        self.head = normalize(nn.Linear(32, 32))

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))).mean((2, 3)))


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.kernel, self.weight = (
            nn.Parameter(torch.randn(32, WIDTH, 3, 3)),
            nn.Parameter(torch.randn(32, 32)),
        )

    def forward(self, x):
        return F.linear(torch.relu(F.conv2d(x, self.kernel)).mean((2, 3)), self.weight)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "build",
    [lambda: Normalized(weight_norm), lambda: Normalized(nn.utils.weight_norm), Functional],
    ids=["weight_norm", "old weight_norm", "functional"],
)
def test_a_model_of_function_calls_alone(build, x, tmp_path, caplog):
    model = build().eval()
    plan = swap_modules(model, x)
    assert all("rewire_operations" in module.reason for module in plan.of("missed"))
    rewired = rewire_operations(model, x)
    products = [
        operation for operation in rewired.operations if operation.function in ("conv2d", "linear")
    ]
    assert products
    assert all(operation.action == "quantize" for operation in products)
    calibrate_model(model, [x], method="max")
    report = export_onnx(model, x, tmp_path / "model.onnx")
    assert report.quantize_nodes == len(products)
    assert report.dequantize_nodes == len(list(named_quantizers(model))) == 2 * len(products)
    assert "float model" not in caplog.text
    expected = predict(model, [x])
    np.testing.assert_allclose(
        predict(report.path, [x]), expected, atol=0.01 * np.abs(expected).max()
    )


def test_a_float_file_is_told(x, tmp_path, caplog):
    export_onnx(Functional().eval(), x, tmp_path / "model.onnx")
    assert "is a float model: no quantizer is enabled" in caplog.text


def test_nothing_to_rewire(x, caplog):
    with pytest.raises(ArgumentError, match="call swap_modules first"):
        rewire_operations(Net().eval(), x)
    with pytest.raises(ArgumentError, match="no layer that swap_modules reaches"):
        rewire_operations(nn.ReLU(), x)
    model = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3), Functional()).eval()
    rewire_operations(model, x)
    assert "no layer is quantized, and swap_modules reaches 1: 0" in caplog.text


class Orthogonal(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.last = nn.Conv2d(3, 16, 3), orthogonal(nn.Linear(16, 16))

    def forward(self, x):
        return self.last(torch.relu(self.conv(x)).mean((2, 3)))


def test_a_parametrization_that_torch_cannot_write(tmp_path):
    x = torch.randn(2, 3, 8, 8)
    model = Orthogonal().eval()
    swap_modules(model, x, include=["conv"])
    calibrate_model(model, [x], method="max")
    with pytest.raises(ExportError) as error:
        export_onnx(model, x, tmp_path / "model.onnx")
    assert (
        error.value.fix.startswith("last compute") and "remove_parametrizations" in error.value.fix
    )
    remove_parametrizations(model.last, "weight")
    assert export_onnx(model, x, tmp_path / "model.onnx").layers
