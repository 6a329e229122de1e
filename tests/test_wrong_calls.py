"""Calls that cannot be meant are one clear error at once, and what is no Python module has a true reason."""

import inspect

import pytest
import torch
from torch import nn
from torchvision.ops import DeformConv2d

import qdq
from qdq import (
    ArgumentError,
    ArgumentTypeError,
    ExportError,
    QdqError,
    Statistics,
    calibrate_model,
    export_onnx,
    fold_batchnorm,
    plan_swap,
    predict,
    rewire_operations,
    swap_modules,
)
from qdq.check.fix import fix_onnx
from qdq.statistics.rescale import rescale_onnx

WIDTH = 16


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.BatchNorm2d(WIDTH)
        self.second = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x):
        return self.second(torch.relu(self.norm(self.first(x))))


@pytest.fixture
def x():
    return torch.randn(2, WIDTH, 6, 6)


@pytest.fixture
def quantized(x):
    model = Net().eval()
    swap_modules(model, x, include="*")
    calibrate_model(model, [x], method="max")
    return model


def calls_of(tmp_path, x):
    """Public function -> a call of it with a model."""
    judge = qdq.Judge(nn.Identity(), [x])
    return {
        "swap_modules": swap_modules,
        "plan_swap": plan_swap,
        "restore_modules": qdq.restore_modules,
        "rewire_operations": lambda model: rewire_operations(model, x),
        "fold_batchnorm": lambda model: fold_batchnorm(model, x),
        "calibrate_model": lambda model: calibrate_model(model, [x]),
        "collect_statistics": lambda model: qdq.collect_statistics(model, [x]),
        "Calibration": qdq.Calibration,
        "solve_ranges": lambda model: qdq.solve_ranges(model, Statistics("", {})),
        "choose_formats": lambda model: qdq.choose_formats(model, [x], Statistics("", {}), sm=89),
        "find_divergence": lambda model: qdq.find_divergence(model, "model.onnx", [x]),
        "analyze_layers": lambda model: qdq.analyze_layers(model, [x]),
        "finetune": lambda model: qdq.finetune(model, [x], schedule=qdq.Schedule(steps=1)),
        "correct_bias": lambda model: qdq.correct_bias(model, [x]),
        "round_weights": lambda model: qdq.round_weights(model, [x]),
        "reconstruct_blocks": lambda model: qdq.reconstruct_blocks(model, [x]),
        "tune_weights": lambda model: qdq.tune_weights(model, [x]),
        "equalize_layers": lambda model: qdq.equalize_layers(model, [x]),
        "center_inputs": lambda model: qdq.center_inputs(model, [x]),
        "split_channels": lambda model: qdq.split_channels(model, [x]),
        "smooth_inputs": lambda model: qdq.smooth_inputs(model, [x]),
        "measure_tie_floor": lambda model: qdq.measure_tie_floor(model, [x]),
        "split_detector": qdq.split_detector,
        "export_onnx": lambda model: export_onnx(model, x, tmp_path / "model.onnx"),
        "import_ranges": lambda model: qdq.import_ranges(model, tmp_path / "no.cache"),
        "export_ranges": lambda model: qdq.export_ranges(
            model, tmp_path / "no.json", format="aimet-0.6.1"
        ),
        "save_tuned": lambda model: qdq.save_tuned(model, tmp_path / "tuned.safetensors"),
        "load_tuned": lambda model: qdq.load_tuned(model, tmp_path / "tuned.safetensors"),
        "apply_plan": lambda model: qdq.apply_plan(model, qdq.Plan({}), x),
        "Judge": lambda model: qdq.Judge(model, [x]),
        "recover_accuracy": lambda model: qdq.recover_accuracy(model, [x], judge),
        "refit_passes": lambda model: qdq.refit_passes(model, [x], judge.conclude()),
        "save_references": lambda model: qdq.save_references(
            model, [x], tmp_path / "references.safetensors", tmp_path / "no.onnx"
        ),
    }


def scripted(x):
    return torch.jit.trace(Net().eval(), x)


def exported(x):
    return torch.export.export(Net().eval(), (x,))


def parallel(x):
    model = nn.DataParallel(Net().eval())
    model.device_ids = [0, 1]
    return model


NO_MODELS = {
    "None": lambda x: None,
    "class": lambda x: Net,
    "path": lambda x: "model.pt",
    "state dict": lambda x: Net().state_dict(),
    "exported program": exported,
    "TorchScript": scripted,
    "graph of operators": lambda x: exported(x).module(),
    "DataParallel over two devices": parallel,
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("kind", NO_MODELS)
def test_what_is_no_model(kind, x, tmp_path):
    model = NO_MODELS[kind](x)
    for name, call in calls_of(tmp_path, x).items():
        with pytest.raises(ArgumentTypeError) as error:
            call(model)
        assert "\n" not in str(error.value), name
        assert error.value.fix
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "batches", [5, None, "images", torch.zeros(2, WIDTH, 6, 6), {"x": 1}, nn.ReLU()]
)
def test_what_yields_no_batches(batches, quantized):
    functions = [
        calibrate_model,
        qdq.collect_statistics,
        qdq.analyze_layers,
        qdq.correct_bias,
        qdq.round_weights,
        qdq.reconstruct_blocks,
        qdq.tune_weights,
        qdq.measure_tie_floor,
        predict,
    ]
    for function in functions:
        with pytest.raises(ArgumentTypeError, match="batches is"):
            function(quantized, batches)
    with pytest.raises(ArgumentTypeError, match="batches is"):
        qdq.equalize_layers(Net().eval(), batches)
    with pytest.raises(ArgumentTypeError, match="batches is"):
        qdq.smooth_inputs(Net().eval(), batches)
    with pytest.raises(ArgumentTypeError, match="batches is"):
        qdq.center_inputs(Net().eval(), batches)
    with pytest.raises(ArgumentTypeError, match="batches is"):
        qdq.split_channels(Net().eval(), batches)
    with pytest.raises(QdqError):
        qdq.finetune(quantized, batches, schedule=qdq.Schedule(steps=1))


@pytest.mark.parametrize("inputs", [None, 5, "x", [], {}, [None]])
def test_inputs_without_a_tensor(inputs, quantized, tmp_path):
    for call in (
        lambda: fold_batchnorm(Net().eval(), inputs),
        lambda: rewire_operations(quantized, inputs),
        lambda: export_onnx(quantized, inputs, tmp_path / "model.onnx"),
    ):
        with pytest.raises(ArgumentTypeError, match="hold no tensor"):
            call()


@pytest.mark.parametrize("path", [".", "", None, 5, "file/model.onnx", b"model.onnx"])
def test_paths_that_cannot_be_written(path, quantized, x, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("a file, no folder")
    monkeypatch.setattr("qdq.export.capture_graph", None)  # it fails before any work
    with pytest.raises((ArgumentError, ArgumentTypeError)):
        export_onnx(quantized, x, path)


@pytest.mark.parametrize("path", [None, 5, b"model.onnx", ["model.onnx"]])
def test_what_is_no_path(path, quantized, tmp_path):
    calls = {
        "check_onnx": lambda: qdq.check_onnx(path),
        "build_engine": lambda: qdq.build_engine(path),
        "fix_onnx": lambda: fix_onnx(path, tmp_path / "mended.onnx"),
        "rescale_onnx": lambda: rescale_onnx(
            path, tmp_path / "new.onnx", Statistics("", {}), method="mse"
        ),
        "load_plan": lambda: qdq.load_plan(path),
        "save_plan": lambda: qdq.save_plan(qdq.Plan({}), path),
        "Statistics.load": lambda: Statistics.load(path),
        "import_ranges": lambda: qdq.import_ranges(quantized, path),
        "export_ranges": lambda: qdq.export_ranges(quantized, path, format="aimet-0.6.1"),
        "save_tuned": lambda: qdq.save_tuned(quantized, path),
        "load_tuned": lambda: qdq.load_tuned(quantized, path),
        "gate_run": lambda: qdq.gate_run(path, max_drop=1),
        "explain_layer": lambda: qdq.explain_layer(path, "first"),
        "compare_runs": lambda: qdq.compare_runs([path, path]),
        "load_model": lambda: qdq.load_model(path),
        "load_model, weights": lambda: qdq.load_model("resnet18", path),
        "start_run": lambda: qdq.start_run(path),
        "check_run_folder": lambda: qdq.check_run_folder(path),
    }
    for name, call in calls.items():
        with pytest.raises(
            ArgumentTypeError, match=r"is of type (NoneType|int|bytes|list)"
        ) as error:
            call()
        assert error.value.fix, name
    assert not list(tmp_path.iterdir())


def test_descriptors_and_statistics_of_another_kind(x):
    with pytest.raises(ArgumentTypeError, match="descriptor"):
        swap_modules(Net().eval(), x, weight_desc=8)
    with pytest.raises(ArgumentTypeError, match="statistics"):
        qdq.solve_ranges(Net().eval(), None)
    for call in (
        lambda: predict(None, [x]),
        lambda: qdq.disable_quantization(None),
        lambda: qdq.enable_quantization(5),
    ):
        with pytest.raises(ArgumentTypeError, match="model is of type"):
            call()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_scripted_part(x, tmp_path):
    model = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(), scripted(x)).eval()
    assert fold_batchnorm(model, x) == []
    plan = swap_modules(model, x, include="*")
    assert {module.reason for module in plan.of("missed")} == {
        "scripted: cannot be quantized; use the Python module"
    }
    rewire_operations(model, x)
    calibrate_model(model, [x], method="max")
    with pytest.raises(ExportError, match=r"cannot capture scripted modules \(TorchScript\): 2"):
        export_onnx(model, x, tmp_path / "model.onnx")


class Deformed(nn.Module):
    def __init__(self):
        super().__init__()
        self.offset, self.deform = (
            nn.Conv2d(WIDTH, 18, 3, padding=1),
            DeformConv2d(WIDTH, WIDTH, 3, padding=1),
        )
        self.last = nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x):
        return self.last(torch.relu(self.deform(x, self.offset(x))))


def test_a_deformable_convolution(x, tmp_path):
    model = Deformed().eval()
    (deform,) = swap_modules(model, x, include="*").of("missed")
    assert (deform.name, deform.reason) == (
        "deform",
        "DeformConv2d.forward calls deform_conv2d directly; rewire_operations does not reach it",
    )


class Scaled(nn.Module):
    """Its weight multiplies no matrix."""

    def __init__(self):
        super().__init__()
        self.weight, self.conv = nn.Parameter(torch.rand(WIDTH, 1, 1)), nn.Conv2d(WIDTH, WIDTH, 3)

    def forward(self, x):
        return self.conv(x * self.weight)


def test_the_reason_names_the_functions(x):
    (reason,) = {
        module.reason for module in plan_swap(Scaled().eval(), x).modules if module.name == ""
    }
    assert reason == "its own forward calls mul: no matrix product that runs in int8"


OPTIONS = {
    "opset": ["19", 19.5, True, None, 12],
    "weights": [[], "int4", None],
    "precision": [["fp16"], "fp8", None, {}],
    "dynamic_batch": ["yes", 1, None],
    "keep_io_types": [3, "no", None],
    "calibration": [5, "mse", [5]],
    "plan": [5, []],
    "rewired": [5, {}],
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_export_are_refused_before_any_work(option, quantized, x, tmp_path, monkeypatch):
    monkeypatch.setattr("qdq.export.capture_graph", None)
    for value in OPTIONS[option]:
        with pytest.raises((ArgumentError, ArgumentTypeError), match=rf"^{option} is ") as error:
            export_onnx(quantized, x, tmp_path / "model.onnx", **{option: value})
        assert error.value.fix
    assert not list(tmp_path.iterdir())


def test_outputs_and_labels_of_another_kind():
    for outputs in (5, None, torch.zeros(2, 3), [torch.zeros(2, 3)]):
        with pytest.raises(ArgumentTypeError, match="outputs is of type"):
            qdq.evaluate_outputs(outputs, 5)
    for labels in (5, "01"):
        with pytest.raises(ArgumentTypeError, match="labels is of type"):
            qdq.evaluate_outputs({"float": torch.zeros(2, 3).numpy()}, labels)


class Nested(nn.Module):
    """Lists and dictionaries go in; numbers and texts come out beside tensors."""

    def __init__(self, forward):
        super().__init__()
        self.net = Net()
        self.forward = forward.__get__(self)


def from_list(self, images, mode="plain", count=2):
    return self.net(images[0]) * count + self.net(images[1])


def from_dictionary(self, Images, other=None):  # noqa: N803  # torch writes small letters
    return self.net(Images["left"]) + self.net(Images["right"]["far"]) + other[0].mean()


def to_number(self, x):
    return 3, self.net(x), x.shape[0]


def to_text(self, x):
    return {"kind": "map", "map": self.net(x), "none": None}


@pytest.mark.parametrize(
    ("forward", "names"),
    [
        (from_list, ["images_0", "images_1"]),
        (from_dictionary, ["Images_left", "Images_right_far", "other_0"]),
        (to_number, ["x"]),
        (to_text, ["x"]),
    ],
)
def test_nested_inputs_and_other_outputs(forward, names, x, tmp_path, caplog):
    batch = {
        from_list: {"images": [x, 2 * x], "mode": "other", "count": 3},
        from_dictionary: {"Images": {"left": x, "right": {"far": 2 * x}}, "other": (x[:, :1],)},
    }.get(forward, x)
    model = Nested(forward).eval()
    swap_modules(model, batch, include="*")
    calibrate_model(model, [batch], method="max")
    report = export_onnx(model, batch, tmp_path / "model.onnx")
    assert list(report.inputs) == names
    assert {shape[0] for shape in report.inputs.values()} == {"batch"}
    expected = torch.from_numpy(predict(model, [batch]))
    torch.testing.assert_close(
        torch.from_numpy(predict(report.path, [batch])), expected, rtol=0, atol=1e-2
    )
    assert ("outputs that are not tensors" in caplog.text) == (forward in (to_number, to_text))


def two_cases(self, x, X):  # noqa: N803
    return self.net(x) + 2 * X


def numbered(self, a_0, a):
    return self.net(a_0) + 2 * a[0]


def from_keys(self, tensors):
    return self.net(tensors["a.b"]) + 2 * tensors["a_b"] + 3 * tensors["a_b_1"]


def from_keywords(self, **tensors):
    return self.net(tensors["if"]) + 2 * tensors["If"]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize(
    ("forward", "arguments", "names"),
    [
        (two_cases, lambda x: {"x": x, "X": x.flip(2)}, ["x", "X"]),
        (two_cases, lambda x: {"X": x.flip(2), "x": x}, ["X", "x"]),
        (numbered, lambda x: {"a_0": x, "a": [x.flip(2)]}, ["a_0", "a_0_1"]),
        (
            from_keys,
            lambda x: {"tensors": {"a.b": x, "a_b": x.flip(2), "a_b_1": x.flip(3)}},
            ["tensors_a_b", "tensors_a_b_2", "tensors_a_b_1"],
        ),
        (from_keywords, lambda x: {"if": x, "If": x.flip(2)}, ["_if", "If"]),
    ],
)
def test_inputs_with_names_that_are_nearly_alike(forward, arguments, names, precision, x, tmp_path):
    batch = arguments(x)
    model = Nested(forward).eval()
    swap_modules(model, batch, include="*")
    calibrate_model(model, [batch], method="max")
    report = export_onnx(model, batch, tmp_path / "model.onnx", precision=precision)
    assert list(report.inputs) == names
    expected = torch.from_numpy(predict(model, [batch]))
    torch.testing.assert_close(
        torch.from_numpy(predict(report.path, [batch])), expected, rtol=0, atol=0.05
    )
    if report.precision:
        assert report.precision.parity.sqnr_db > 20  # inputs that are exchanged give about 0


def scaled(self, x, k):
    return self.net(x) * k


@pytest.mark.parametrize("dynamic_batch", [True, False])
def test_an_input_without_dimensions(dynamic_batch, x, tmp_path):
    batch = {"x": x, "k": torch.tensor(2.0)}
    model = Nested(scaled).eval()
    swap_modules(model, batch, include="*")
    calibrate_model(model, [batch], method="max")
    report = export_onnx(model, batch, tmp_path / "model.onnx", dynamic_batch=dynamic_batch)
    assert report.inputs == {"x": ["batch" if dynamic_batch else 2, WIDTH, 6, 6], "k": []}
    expected = torch.from_numpy(predict(model, [batch]))
    torch.testing.assert_close(
        torch.from_numpy(predict(report.path, [batch])), expected, rtol=0, atol=1e-2
    )


def test_a_model_without_tensors_to_return(quantized, x, tmp_path):
    quantized.forward = lambda x: "done"
    with pytest.raises(ExportError, match=r"the model returns no tensor: output \(str\)"):
        export_onnx(quantized, x, tmp_path / "model.onnx")


def test_an_argument_that_is_no_constant(quantized, x, tmp_path):
    former = quantized.forward
    quantized.forward = lambda x, other: former(x)
    with pytest.raises(ExportError, match="the argument other is a object"):
        export_onnx(quantized, {"x": x, "other": object()}, tmp_path / "model.onnx")


def test_the_calls_cover_what_takes_a_model(x, tmp_path):
    covered = {
        *calls_of(tmp_path, x),
        "predict",
        "make_predictor",
        "disable_quantization",
        "enable_quantization",
    }
    public = {name: getattr(qdq, name) for name in qdq.__all__}
    takers = {
        name
        for name, value in public.items()
        if callable(value) and next(iter(inspect.signature(value).parameters), "") == "model"
    }
    assert takers <= covered | {"load_model", "WorkloadOptions"}  # the name of one
