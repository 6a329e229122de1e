"""New scales in an exported file, against a new export of the model with ranges from the same statistics."""

import json

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

import qdq
from qdq import (
    ArgumentError,
    CheckError,
    Format,
    Statistics,
    check_onnx,
    collect_statistics,
    export_onnx,
    solve_ranges,
)
from qdq.observers.methods import METHODS
from qdq.observers.solve import SOLVERS
from qdq.observers.tensor_statistics import TensorStatistics
from qdq.quantize import compute_scale
from qdq.statistics.rescale import rescale_onnx, scale_of


def initializers(path):
    model = ir.load(path)
    return {name: value.const_value.numpy() for name, value in model.graph.initializers.items()}


def assert_same_numbers(first, second):
    first, second = initializers(first), initializers(second)
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        np.testing.assert_array_equal(first[name], second[name], err_msg=name)


@pytest.fixture
def prepared(residual, images):
    """The small network with a shortcut that shares a range, and its statistics."""
    qdq.fold_batchnorm(residual, images)
    qdq.swap_modules(residual, images)
    qdq.rewire_operations(residual, images)
    return residual, collect_statistics(residual, [images, 3 * torch.randn(4, 3, 12, 12)])


def export(model, statistics, images, path, method, **options):
    ranges = solve_ranges(model, statistics, method=method)
    export_onnx(model, images, path, calibration=ranges, **options)
    return path


def test_scale_is_that_of_the_quantizer_to_the_last_bit():
    amax = np.float32(10) ** np.random.default_rng(0).uniform(-30, 30, 20_000).astype(np.float32)
    for fmt in (Format(), Format(4), Format(8, unsigned=True), Format(16)):
        np.testing.assert_array_equal(
            scale_of(amax, fmt), compute_scale(torch.from_numpy(amax), fmt).numpy()
        )
        assert scale_of(0.0, fmt) == compute_scale(torch.tensor(0.0), fmt).item() > 0


@pytest.mark.parametrize("method", ["max", "entropy"])
def test_is_a_new_export(prepared, images, tmp_path, method):
    model, statistics = prepared
    old = export(model, statistics, images, tmp_path / "old.onnx", "mse")
    fresh = export(model, statistics, images, tmp_path / "fresh.onnx", method)
    rescaling = rescale_onnx(old, tmp_path / "new.onnx", statistics, method=method)
    assert_same_numbers(tmp_path / "new.onnx", fresh)
    assert rescaling.is_whole and not rescaling.missing
    assert rescaling.changed
    for name, (former, now) in rescaling.changed.items():
        assert former == initializers(old)[f"{name}.scale"]
        assert now == initializers(fresh)[f"{name}.scale"]
        assert f"{name} " in rescaling.format_table()
    metadata = [dict(ir.load(path).metadata_props) for path in (tmp_path / "new.onnx", fresh)]
    assert "qdq.ranges_sha256" not in metadata[0]
    del metadata[1]["qdq.ranges_sha256"]
    assert metadata[0] == metadata[1]
    assert not [
        finding
        for finding in check_onnx(tmp_path / "new.onnx").findings
        if finding.severity == "error"
    ]


def test_a_quantizer_that_shares_a_range_gets_it(tmp_path):
    """A part of a concat and the concat are two tensors with one range, so with two scales in the file."""

    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (
                nn.Conv2d(16, 16, 3),
                nn.Conv2d(16, 16, 3, padding=1),
                nn.Conv2d(32, 32, 3),
            )

        def forward(self, x):
            x = torch.relu(self.a(x))
            return self.c(torch.cat([x, torch.relu(self.b(x))], 1)).mean((2, 3))

    model, images = Branches().eval(), torch.randn(2, 16, 12, 12)
    qdq.swap_modules(model, images)
    qdq.rewire_operations(model, images)
    statistics = collect_statistics(model, [images])
    old = export(model, statistics, images, tmp_path / "old.onnx", "max")
    assert any(f"{name}.scale" in initializers(old) for name in statistics.shared), (
        "the case that is to be tested"
    )
    fresh = export(model, statistics, images, tmp_path / "fresh.onnx", "gauss")
    rescaling = rescale_onnx(old, tmp_path / "new.onnx", statistics, method="gauss")
    assert rescaling.is_whole
    assert_same_numbers(tmp_path / "new.onnx", fresh)


@pytest.mark.parametrize("method", ["gauss"])
def test_halves(prepared, images, tmp_path, method):
    model, statistics = prepared
    old = export(model, statistics, images, tmp_path / "old.onnx", "mse", precision="fp16")
    assert any(name.endswith(".scale.fp16") for name in initializers(old)), (
        "the case that is to be tested"
    )
    fresh = export(model, statistics, images, tmp_path / "fresh.onnx", method, precision="fp16")
    assert rescale_onnx(old, tmp_path / "new.onnx", statistics, method=method).is_whole
    assert_same_numbers(tmp_path / "new.onnx", fresh)


def test_range_that_halves_cannot_hold_is_refused(prepared, images, tmp_path):
    model, statistics = prepared
    old = export(model, statistics, images, tmp_path / "old.onnx", "mse", precision="fp16")
    huge = Statistics(
        {name: scaled(tensor, 1e9) for name, tensor in statistics.tensors.items()},
        statistics.formats,
        shared=statistics.shared,
    )
    rescaling = rescale_onnx(old, tmp_path / "new.onnx", huge, method="max")
    assert not rescaling.is_whole
    assert all("does not fit float16" in reason for reason in rescaling.refused.values())
    for name in rescaling.refused:
        for scale in (f"{name}.scale", f"{name}.scale.fp16"):
            assert initializers(tmp_path / "new.onnx").get(scale) == initializers(old).get(scale)


def scaled(tensor, factor):
    records = tensor.records.copy()
    records[:, :2] *= factor  # low and high
    return TensorStatistics(
        tensor.counts, tensor.exponent, tensor.channel_absmax, tensor.numbers, records
    )


def test_what_does_not_match_is_named(prepared, images, tmp_path):
    model, statistics = prepared
    old = export(model, statistics, images, tmp_path / "old.onnx", "mse")
    first, second, *_ = statistics.tensors
    part = statistics.select(first)
    moved = Statistics(
        {first: part.tensors[first], "elsewhere": statistics.tensors[second]},
        {first: Format(), "elsewhere": Format()},
    )
    rescaling = rescale_onnx(old, tmp_path / "new.onnx", moved, method="max")
    assert set(rescaling.changed) == {first}
    assert rescaling.missing == ("elsewhere",)
    assert second in rescaling.unknown
    table = rescaling.format_table()
    assert f"not changed: {second}: the statistics do not have it" in table
    assert "not in the file: elsewhere" in table
    facts = json.loads(ir.load(tmp_path / "new.onnx").metadata_props["qdq.calibration"])
    assert facts["methods"] == ["max", "mse"]


def test_tensor_of_zeros_keeps_its_scale(prepared, images, tmp_path):
    model, statistics = prepared
    old = export(model, statistics, images, tmp_path / "old.onnx", "mse")
    nothing = {name: TensorStatistics.empty() for name in statistics.tensors}
    rescaling = rescale_onnx(
        old, tmp_path / "new.onnx", Statistics(nothing, statistics.formats), method="mse"
    )
    assert set(rescaling.refused.values()) == {"the statistics saw no value above 0 there"}
    assert_same_numbers(tmp_path / "new.onnx", old)


def test_other_model_or_no_model(prepared, images, tmp_path):
    model, statistics = prepared
    old = export(model, statistics, images, tmp_path / "old.onnx", "mse")
    former = old.read_bytes()
    tensors = {f"other.{name}": tensor for name, tensor in statistics.tensors.items()}
    foreign = Statistics(tensors, dict.fromkeys(tensors, Format()))
    with pytest.raises(ArgumentError, match=r"none of the \d scales of activations"):
        rescale_onnx(old, old, foreign)
    with pytest.raises(ArgumentError, match="unknown calibration method 'kl'"):
        rescale_onnx(old, old, statistics, method="kl")
    (tmp_path / "text.onnx").write_text("text")
    with pytest.raises(CheckError, match="not a valid ONNX"):
        rescale_onnx(tmp_path / "text.onnx", old, statistics)
    assert old.read_bytes() == former


def test_what_would_be_lost_is_refused(prepared, images, tmp_path):
    model, statistics = prepared
    old = export(model, statistics, images, tmp_path / "old.onnx", "mse")
    proto = onnx.load(old)
    proto.training_info.add().algorithm.name = "train"
    onnx.save(proto, old)
    former = old.read_bytes()
    with pytest.raises(CheckError, match="training_info"):
        rescale_onnx(old, old, statistics)
    assert old.read_bytes() == former


def test_in_place(prepared, images, tmp_path):
    model, statistics = prepared
    path = export(model, statistics, images, tmp_path / "model.onnx", "mse")
    fresh = export(model, statistics, images, tmp_path / "fresh.onnx", "max")
    rescale_onnx(path, path, statistics, method="max")
    assert_same_numbers(path, fresh)
    again = rescale_onnx(path, path, statistics, method="max")
    assert not again.changed and len(again.unchanged) > 1


def test_every_method_of_the_command_line_exists():
    from typing import get_args

    from qdq.calibrate import CALIB_METHODS
    from qdq.cli.calibrate import CalibMethod

    assert tuple(SOLVERS) == METHODS
    assert get_args(CalibMethod) == CALIB_METHODS


def test_a_bias_fits_the_new_scale_of_its_input(tmp_path):
    """With tiny ranges a bias would not fit int32, in which ONNX Runtime's default session adds it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Conv2d(4, 4, 1) for _ in range(3))).eval()
    images = torch.randn(2, 4, 8, 8)
    qdq.swap_modules(model, include="*")
    with torch.no_grad():
        model[0].bias.zero_()
        model[1].bias.fill_(0.7)
    statistics = collect_statistics(model, [images * 1e-9])
    solve_ranges(model, statistics)
    model[1]._input_quantizer.amax = 1.0
    path = export_onnx(model, images, tmp_path / "old.onnx").path
    rescale_onnx(path, tmp_path / "new.onnx", statistics, method="max")
    assert not [
        finding
        for finding in check_onnx(tmp_path / "new.onnx").findings
        if finding.rule == "QDQ140"
    ]
    plain, default = (
        qdq.predict(tmp_path / "new.onnx", [images], session=name) for name in ("plain", "default")
    )
    np.testing.assert_allclose(default, plain, atol=0.01)
