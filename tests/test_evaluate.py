"""Predictions, the tie floor and the table, against figures computed by hand."""

import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper
from pretended_device import list_waits, watch
from torch import nn

from qdq import (
    ArgumentError,
    CheckError,
    DataError,
    calibrate_model,
    evaluate_outputs,
    export_onnx,
    measure_tie_floor,
    predict,
    swap_modules,
)
from qdq.check import measure_parity
from qdq.device import move_batch
from qdq.metrics import sqnr_db


class Doubled(nn.Module):
    """Gives its outputs as a detector would."""

    def __init__(self, wrap):
        super().__init__()
        self.wrap = wrap

    def forward(self, x):
        assert not self.training
        return self.wrap(2 * x)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: y,
        lambda y: (y, None),
        lambda y: {"logits": y, "other": None},
        lambda y: [{"a": [y]}],
    ],
)
@pytest.mark.parametrize("pack", [lambda x: x, lambda x: (x, torch.zeros(2)), lambda x: {"x": x}])
def test_predict_takes_what_loaders_and_models_give(wrap, pack):
    batches = [torch.randn(2, 3), torch.randn(1, 3)]
    model = Doubled(wrap).train()
    outputs = predict(model, map(pack, batches))
    np.testing.assert_array_equal(outputs, 2 * torch.cat(batches).numpy())
    assert model.training


class Huge(nn.Module):
    """64 TiB of values, which no allocator gives."""

    def forward(self, x):
        return torch.ones(2**22, 2**22) * x


def test_a_batch_that_memory_does_not_hold(tmp_path, monkeypatch):
    with pytest.raises(
        DataError, match=r"there is not enough memory to run the model on a batch of \[1\]"
    ) as caught:
        predict(Huge(), [torch.ones(1)])
    assert "smaller batches" in caught.value.fix
    value = helper.make_tensor_value_info
    sizes = helper.make_tensor("sizes", onnx.TensorProto.INT64, [2], [2**22, 2**22])
    nodes = [helper.make_node("Expand", ["x", "sizes"], ["y"])]
    graph = helper.make_graph(nodes, "huge", [value("x", 1, [1])], [value("y", 1, None)], [sizes])
    opset = [helper.make_opsetid("", 18)]
    onnx.save(
        helper.make_model(graph, opset_imports=opset, ir_version=10), file := tmp_path / "huge.onnx"
    )
    with pytest.raises(
        CheckError, match=r"not enough memory to run .*huge.onnx on \[1\] float32"
    ) as caught:
        predict(file, [torch.ones(1)])
    assert "smaller batches" in caught.value.fix

    def refuse(*args, **kwargs):
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(CheckError, match="not enough memory to load") as caught:
        predict(file, [torch.ones(1)])
    assert "export" not in caught.value.fix


def test_other_errors_of_a_module_are_its_own():
    with pytest.raises(RuntimeError, match="shape"):
        predict(nn.Linear(3, 2), [torch.zeros(1, 4)])


def test_predict_is_float32_whatever_the_model_computes_in():
    assert (
        predict(nn.Linear(3, 2).bfloat16(), [torch.zeros(1, 3, dtype=torch.bfloat16)]).dtype
        == np.float32
    )


def test_predict_of_nothing():
    with pytest.raises(DataError, match="no batch"):
        predict(nn.Identity(), [])


@pytest.fixture
def exported_file(quantized, images, exported_once):
    """The file of `quantized`, which no test changes."""
    path = exported_once / "model.onnx"
    if not path.exists():
        export_onnx(quantized, images, path)
    return path


@pytest.fixture(scope="module")
def exported_once(tmp_path_factory):
    return tmp_path_factory.mktemp("exported_once")


def test_predict_file_and_module_alike(quantized, images, exported_file):
    batches = [(images, None), (images[:1], None)]
    from_file, from_torch = predict(exported_file, batches), predict(quantized, batches)
    assert from_file.shape == from_torch.shape == (5, 16)
    assert sqnr_db(from_torch, from_file) > 30
    with pytest.raises(CheckError, match=r"given \[4, 3, 12\] float32"):
        predict(str(exported_file), [images[..., 0]])


@pytest.mark.parametrize("batch_is_on_gpu", [False, True])
@pytest.mark.parametrize(
    "pack", [lambda x: x, lambda x: (x, torch.zeros(2)), lambda x: {"images": x}]
)
def test_batches_may_be_on_any_device(quantized, images, exported_file, gpu, batch_is_on_gpu, pack):
    expected = predict(quantized, [images, images[:1]])
    batches = [pack(images), pack(images[:1])]
    if batch_is_on_gpu:
        batches = [move_batch(batch, gpu) for batch in batches]
    quantized.to(gpu)
    predict(quantized, batches)  # moves the ranges
    with watch(gpu) as events:
        outputs = predict(quantized, batches)
    assert sqnr_db(expected, outputs) > 90
    assert len(list_waits(events)) <= len(batches)
    from_file = predict(exported_file, batches)
    np.testing.assert_array_equal(from_file, predict(exported_file, [images, images[:1]]))
    assert sqnr_db(outputs, from_file) > 30


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_file_takes_what_its_type_can_hold(images, exported_file, device, dtype):
    batch = images.to(dtype)
    expected = predict(exported_file, [batch.float()])
    outputs = predict(exported_file, [batch.to(device).requires_grad_()])
    np.testing.assert_array_equal(outputs, expected)
    with pytest.raises(CheckError, match="float64, its inputs are"):
        predict(exported_file, [images.double().to(device)])


def test_tf32_of_the_gpu_does_not_reach_the_figures(tmp_path, gpu):
    convolutions = [nn.Conv2d(16, 16, 3, padding=1) for _ in range(4)]
    model = nn.Sequential(nn.Conv2d(3, 16, 3), *convolutions).eval()
    batches = [torch.randn(16, 3, 12, 12) for _ in range(2)]
    swap_modules(model, batches[0], include=["*"])
    calibrate_model(model, batches, method="max")
    path = export_onnx(model, batches[0], tmp_path / "model.onnx").path
    floor, outputs = measure_tie_floor(model, batches), predict(model, batches)
    from_file = predict(path, batches)
    model.to(gpu)
    outputs_of_gpu = predict(model, batches)
    assert math.isfinite(floor)
    assert measure_tie_floor(model, batches) == pytest.approx(floor, abs=0.1)
    assert measure_parity(outputs, from_file).sqnr_db > 90
    assert measure_parity(outputs_of_gpu, from_file).sqnr_db > 90


def test_tie_floor_of_a_float_model_is_float_rounding(residual, images):
    assert measure_tie_floor(residual, [images]) == math.inf  # no quantizer, so nothing is nudged


@pytest.mark.parametrize(("distance", "is_tie"), [(1e-7, True), (1e-6, False)])
def test_a_small_input_of_fp8_is_nudged_like_a_sum_of_large_terms(distance, is_tie):
    model = nn.Sequential(nn.Linear(32, 32)).eval()
    x = torch.ones(2, 32)  # a code, and far from a tie
    swap_modules(model, x, formats=("fp8",))
    calibrate_model(model, [x], method="max")
    model[0].input_quantizer.amax = 448.0
    x[0, 0] = 2**-6 + 2**-10 - distance  # halfway between two codes
    assert math.isfinite(measure_tie_floor(model, [x])) == is_tie


def test_tie_floor_sees_ties_and_leaves_no_hook(quantized, images):
    with torch.no_grad():
        scale = quantized.stem.input_quantizer.scale
        # The nudge takes half of them over.
        on_ties = (torch.floor(images / scale) + 0.5) * scale * (1 - 2**-24)
    expected = predict(quantized, [images])
    assert measure_tie_floor(quantized, [on_ties]) < measure_tie_floor(
        quantized, [torch.zeros_like(images)]
    )
    np.testing.assert_array_equal(predict(quantized, [images]), expected)
    with pytest.raises(DataError):
        measure_tie_floor(quantized, [])


class TestTable:
    reference = np.array([[3.0, 1, 2, 0, 0, 0], [0.0, 1, 5, 2, 3, 4], [9.0, 1, 2, 3, 4, 5]])

    def test_figures(self):
        quantized = self.reference.copy()
        quantized[0] = [1, 3, 2, 0, 0, 0]
        evaluation = evaluate_outputs({"float": self.reference, "int8": quantized}, [0, 0, 1])
        first, second = evaluation.candidates
        assert evaluation.images == 3
        assert (first.top1, first.agreement, first.sqnr_db) == (pytest.approx(1 / 3), 1, math.inf)
        assert first.top5 == pytest.approx(1 / 3)  # the label of the other two is their smallest
        assert (second.top1, second.agreement) == (0, pytest.approx(2 / 3))
        signal, noise = (self.reference**2).sum(), 2 * 2**2
        assert second.sqnr_db == pytest.approx(10 * math.log10(signal / noise))

    def test_an_output_that_does_not_depend_on_the_sample(self):
        constant = np.tile(self.reference[0], (3, 1)) * [[1], [1 + 1e-7], [1 - 1e-7]]
        evaluation = evaluate_outputs({"float": {"scores": self.reference, "anchors": constant}})
        assert evaluation.constant_outputs == ("anchors",)
        assert "anchors is the same for all 3 samples" in evaluation.format_table()
        varied = constant.copy()
        varied[1, 2] += 1e-3
        for outputs in (varied, constant[:1], [constant[:1], constant[:1, :2]]):
            assert evaluate_outputs({"float": outputs}).constant_outputs == ()

    def test_without_labels(self):
        (only,) = evaluate_outputs({"float": self.reference}).candidates
        assert (only.top1, only.top5, only.megabytes) == (None, None, None)

    def test_sizes(self, tmp_path):
        (tmp_path / "file").write_bytes(b"x" * 1500)
        module = nn.Linear(1000, 250)  # with its bias 250250 float32 values
        outputs = {"float": self.reference, "file": self.reference, "none": self.reference}
        evaluation = evaluate_outputs(outputs, files={"float": module, "file": tmp_path / "file"})
        assert [c.megabytes for c in evaluation.candidates] == [
            pytest.approx(1.001),
            pytest.approx(0.0015),
            None,
        ]

    def test_size_counts_the_weights_beside_a_file(self, tmp_path):
        weight = helper.make_tensor("w", 1, [1000], np.ones(1000, np.float32).tobytes(), raw=True)
        vectors = [helper.make_tensor_value_info(name, 1, [1000]) for name in "xy"]
        graph = helper.make_graph(
            [helper.make_node("Add", ["x", "w"], ["y"])], "g", vectors[:1], vectors[1:], [weight]
        )
        path = tmp_path / "model.onnx"
        onnx.save(
            helper.make_model(graph),
            path,
            save_as_external_data=True,
            location="weights",
            size_threshold=0,
        )
        (candidate,) = evaluate_outputs({"file": self.reference}, files={"file": path}).candidates
        assert candidate.megabytes == pytest.approx((path.stat().st_size + 4000) / 1e6)
        (same,) = evaluate_outputs({"file": self.reference}, files={"file": str(path)}).candidates
        assert same.megabytes == candidate.megabytes

    def test_text(self):
        text = evaluate_outputs(
            {"float": self.reference, "int8": self.reference * 1.1}, [0, 2, 0]
        ).format_table()
        head, first, second = text.splitlines()
        assert head.split() == [
            "on",
            "3",
            "samples",
            "top-1",
            "top-5",
            "agreement",
            "SQNR",
            "dB",
            "MB",
        ]
        assert first.split() == ["float", "100.0%", "100.0%", "100.0%", "-", "-"]
        assert second.split() == ["int8", "100.0%", "100.0%", "100.0%", "20.00", "-"]
        assert len({len(line) for line in (head, first, second)}) == 1

    def test_metrics_of_the_task_are_the_last_columns(self):
        outputs = {"float": self.reference, "int8": self.reference * 1.1}
        scores = {
            "float": {"mAP": 0.5, "recall at 100": 1},
            "int8": {"mAP": 0.41, "recall at 100": 0.9},
        }
        evaluation = evaluate_outputs(outputs, scores=scores, num_samples=7)
        assert evaluation.metrics == ["mAP", "recall at 100"]
        head, first, second = evaluation.format_table().splitlines()
        assert head.startswith("on 7 samples")
        assert head.endswith("       MB      mAP  recall at 100")
        assert first.endswith("   0.5000         1.0000")
        assert second.endswith("   0.4100         0.9000")
        assert len({len(line) for line in (head, first, second)}) == 1
        with pytest.raises(ArgumentError, match="int8 has the metrics"):
            evaluate_outputs(outputs, scores={"float": {"mAP": 0.5}})
        assert evaluate_outputs(outputs, scores={"float": {}, "int8": {}}).metrics == []

    def test_nothing_and_different_shapes(self):
        with pytest.raises(ArgumentError, match="no outputs"):
            evaluate_outputs({})
        with pytest.raises(ArgumentError, match="different shapes"):
            evaluate_outputs({"a": self.reference, "b": self.reference[:2]})
