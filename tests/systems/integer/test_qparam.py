"""Scale, zero point and codes of a range: golden values, exact fractions, numpy loops."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
from golden import read_cases
from torch import nn

from qdq import systems
from qdq.errors import NumberTypeError, QdqError, ShapeError, StateError
from qdq.systems import FakeQuantize, QLinear, QParam, integer
from qdq.systems.affine import find_codes, solve_affine

CASES = read_cases("jermmy_qparam")


def calibrate(qparam, *ranges):
    for low, high in ranges:
        qparam.update(torch.tensor([low, high]))
    return qparam


@pytest.mark.parametrize(
    "case", CASES, ids=lambda case: f"{case['num_bits']}b {case['min']}..{case['max']}"
)
def test_golden_qparam(case):
    qparam = calibrate(QParam(case["num_bits"]), (case["min"], case["max"]))
    assert float(qparam.scale) == pytest.approx(case["scale"], rel=1e-6)
    assert float(qparam.zero_point) == case["zero_point"]
    codes = qparam.quantize_tensor(torch.tensor(case["input"]))
    assert codes.dtype == torch.int32
    assert codes.tolist() == case["codes"]
    values = qparam.dequantize_tensor(codes)
    torch.testing.assert_close(values, torch.tensor(case["values"]), rtol=1e-4, atol=1e-5)
    numbers = (float(qparam.scale), case["zero_point"], case["min"], case["max"])
    assert str(qparam) == "scale: {:.10f} zp: {:.0f} min: {:.6f} max: {:.6f}".format(*numbers)


def test_the_zero_point_is_rounded_where_a_fault_truncates_it():
    case = next(case for case in CASES if case["min"] == -0.37 and case["num_bits"] == 8)
    exact = 255 - 0.91 / ((0.91 + 0.37) / 255)
    assert int(exact) == 73
    assert float(calibrate(QParam(), (case["min"], case["max"])).zero_point) == 74


@pytest.mark.parametrize("scheme", ["unsigned", "signed", "symmetric"])
@pytest.mark.parametrize("num_bits", [2, 3, 8, 16])
def test_scale_and_zero_point_are_those_of_exact_fractions(scheme, num_bits):
    random = np.random.default_rng(num_bits)
    low = random.normal(-1, 1, 50).astype(np.float32)
    high = low + random.uniform(0, 3, 50).astype(np.float32)
    lowest, highest = find_codes(num_bits, scheme)
    is_symmetric = scheme == "symmetric"
    scale, zero_point = solve_affine(
        torch.tensor(low), torch.tensor(high), lowest, highest, is_symmetric=is_symmetric
    )
    for index in range(50):
        a, b = min(Fraction(float(low[index])), 0), max(Fraction(float(high[index])), 0)
        expected = (b - a) / (highest - lowest)
        point = min(max(round(highest - b / expected), lowest), highest)
        if is_symmetric:
            expected, point = max(-a, b) / highest, 0
        assert float(scale[index]) == pytest.approx(float(expected), rel=1e-7)
        assert float(zero_point[index]) == point


def test_the_codes_are_unsigned_signed_or_symmetric():
    values = torch.tensor([-1.0, 0.0, 3.0])
    codes = {}
    for scheme in ("unsigned", "signed", "symmetric"):
        qparam = QParam(8, scheme=scheme)
        qparam.update(values)
        codes[scheme] = qparam.quantize_tensor(values).tolist()
    assert codes == {
        "unsigned": [0, 64, 255],
        "signed": [-128, -64, 127],
        "symmetric": [-42, 0, 127],
    }


def test_the_range_runs_and_contains_zero():
    qparam = calibrate(QParam(), (1.0, 2.0))
    assert (float(qparam.min), float(qparam.max)) == (0, 2)
    calibrate(qparam, (-1.0, 1.0), (0.5, 0.6))
    assert (float(qparam.min), float(qparam.max)) == (-1, 2)


def test_zero_is_exact():
    random = np.random.default_rng(0)
    for low, high in random.normal(0, 2, (50, 2)):
        qparam = calibrate(QParam(), (min(low, high), max(low, high)))
        codes = qparam.quantize_tensor(torch.zeros(1))
        assert codes.item() == qparam.zero_point.item()
        assert qparam.dequantize_tensor(codes).item() == 0


def test_an_empty_range_has_scale_1_and_zero_point_0():
    qparam = calibrate(QParam(), (0.0, 0.0))
    assert (float(qparam.scale), float(qparam.zero_point)) == (1, 0)
    assert qparam.quantize_tensor(torch.zeros(3)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("num_bits", [1, 2, 8, 16])
@pytest.mark.parametrize("size", [1e-45, 1e-38, 1.0, 3.4e38])
def test_finite_numbers_stay_finite(num_bits, size):
    values = torch.tensor([-size, 0.0, size / 3, size])
    qparam = QParam(num_bits)
    qparam.update(values)
    assert torch.isfinite(FakeQuantize.apply(values, qparam)).all()
    assert torch.isfinite(qparam.scale) and qparam.scale > 0


def test_the_gradient_passes_and_the_input_stays():
    values = torch.randn(100, requires_grad=True)
    before = values.detach().clone()
    qparam = QParam(4)
    qparam.update(values)
    weights = torch.randn(100)
    (FakeQuantize.apply(values, qparam) * weights).sum().backward()
    assert torch.equal(values.grad, weights)
    assert torch.equal(values.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_half_types_are_computed_in_float32(dtype):
    values = torch.randn(100).to(dtype)
    qparam = QParam()
    qparam.update(values)
    result = FakeQuantize.apply(values, qparam)
    assert result.dtype == dtype
    expected = qparam.dequantize_tensor(qparam.quantize_tensor(values.float()))
    assert torch.equal(result, expected.to(dtype))
    doubled = QParam()
    doubled.update(torch.tensor([-1e300, 1e300], dtype=torch.float64))
    assert torch.isfinite(torch.stack([*doubled.buffers()])).all()
    largest = torch.tensor([-torch.finfo(torch.float16).max, torch.finfo(torch.float16).max])
    qparam.update(largest)
    assert torch.isfinite(FakeQuantize.apply(largest.half(), qparam)).all()


@pytest.mark.parametrize(("axis", "groups"), [(0, None), (0, 2), (1, None), (1, 3)])
def test_each_group_has_its_scale(axis, groups):
    weight = torch.randn(4, 6, 3, 3) * torch.rand(4, 6, 1, 1)
    qparam = QParam(8, axis=axis, groups=groups)
    qparam.update(weight)
    codes = qparam.quantize_tensor(weight)
    values = qparam.dequantize_tensor(codes)
    blocks = weight.chunk(groups or weight.shape[axis], axis)
    assert qparam.scale.numel() == len(blocks)
    expected = []
    for block in blocks:
        single = QParam(8)
        single.update(block)
        expected.append(FakeQuantize.apply(block, single))
    assert torch.equal(values, torch.cat(expected, axis))
    assert len(str(qparam).splitlines()) == len(blocks)


def test_groups_divide_the_axis():
    with pytest.raises(ValueError, match="3 groups do not divide the 4 indices of axis 0"):
        QParam(8, axis=0, groups=3).update(torch.randn(4, 6))
    with pytest.raises(ShapeError, match=r"a tensor of shape \(4,\) has no axis 1"):
        QParam(8, axis=1).update(torch.randn(4))


def test_a_range_stays_with_tensors_of_its_shape():
    qparam = QParam(8, axis=0)
    qparam.update(torch.randn(4, 6))
    with pytest.raises(ShapeError, match=r"shape \(1, 6\) has 1 ranges along axis 0, and 4 are"):
        qparam.update(torch.randn(1, 6))
    for shape in ((3, 6), (6, 6), (0, 6)):
        with pytest.raises(ShapeError, match="4 ranges along axis 0 do not fit a tensor of shape"):
            qparam.dequantize_tensor(torch.zeros(shape))
    with pytest.raises(ShapeError, match=r"do not fit a tensor of shape \(3, 6\)"):
        qparam.quantize_tensor(torch.zeros(3, 6))


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_bits": 0}, "bits is 0; it must be 1 to 16"),
        ({"num_bits": -8}, "bits is -8"),
        ({"num_bits": 17}, "bits is 17"),
        ({"num_bits": 33}, "bits is 33; it must be 1 to 16"),
        ({"num_bits": 1.5}, "bits is 1.5, a float"),
        ({"num_bits": True}, "bits is True, a bool"),
        ({"num_bits": 1, "scheme": "symmetric"}, "bits is 1; it must be 2 to 16"),
        ({"scheme": "other"}, "scheme is 'other'"),
        ({"num_bits": None, "scheme": "other"}, "scheme is 'other'"),
        ({"groups": 2}, "groups is 2, axis is None"),
        ({"groups": 0, "axis": 0}, "groups is 0"),
        ({"groups": -2, "axis": 0}, "groups is -2"),
        ({"groups": 1.5, "axis": 0}, "groups is 1.5, a float"),
        ({"axis": 2}, "axis is 2"),
        ({"axis": -1}, "axis is -1"),
        ({"axis": "0"}, "axis is '0', a str"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=f"^QParam: {text}") as caught:
        QParam(**options)
    assert isinstance(caught.value, QdqError)
    with pytest.raises(ValueError, match=rf"^QLinear of Linear\(.*: {text}"):
        QLinear(nn.Linear(4, 2), **options)


@pytest.mark.parametrize(
    ("values", "error", "text"),
    [
        (torch.empty(0), ValueError, "is empty"),
        (torch.tensor([1.0, torch.nan]), ValueError, "not finite"),
        (torch.tensor([1]), NumberTypeError, "only float tensors"),
    ],
)
def test_bad_tensors_are_refused(values, error, text):
    with pytest.raises(error, match=text):
        QParam().update(values)
    calibrated = calibrate(QParam(label="conv1, qi"), (-1.0, 1.0))
    with pytest.raises(error, match=f"^conv1, qi: .*{text}"):
        calibrated.quantize_tensor(values)
    assert (float(calibrated.min), float(calibrated.max)) == (-1, 1)


def test_calls_before_calibration_are_refused():
    qparam = QParam(label="conv1, qi")
    for call in (qparam.quantize_tensor, qparam.dequantize_tensor):
        with pytest.raises(StateError, match="conv1, qi: it has no range yet"):
            call(torch.zeros(1))
    with pytest.raises(StateError, match="without num_bits"):
        QParam(None).update(torch.zeros(1))


@pytest.mark.parametrize("axis", [None, 0])
def test_the_state_is_saved_loaded_and_copied(axis, device):
    weight = torch.randn(4, 6, device=device)
    qparam = QParam(8, axis=axis).to(device)
    qparam.update(weight)
    loaded = QParam(8, axis=axis).to(device)
    loaded.load_state_dict(qparam.state_dict())
    expected = qparam.quantize_tensor(weight)
    for other in (loaded, copy.deepcopy(qparam)):
        assert torch.equal(other.quantize_tensor(weight), expected)
    assert torch.equal(copy.deepcopy(qparam).cpu().quantize_tensor(weight.cpu()), expected.cpu())
    loaded.load_state_dict(QParam(8, axis=axis).state_dict())
    assert not loaded.is_calibrated


def test_the_grid_says_what_tensorrt_needs_to_know():
    weight = torch.randn(4, 6)
    qparam = QParam(8, scheme="symmetric", axis=0, groups=2)
    qparam.update(weight)
    grid = qparam.describe("affine", channels=4)
    assert (grid.lowest, grid.highest, grid.obstacle) == (-128, 127, "")
    assert not grid.zero_point.any()
    values = FakeQuantize.apply(weight, qparam)
    assert torch.equal(grid.scale, qparam.scale.repeat_interleave(2))
    codes = values / grid.scale[:, None]
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    qparam = QParam(8, axis=1, groups=3)
    qparam.update(weight)
    assert qparam.describe().obstacle == "3 scales along its inputs"


def test_the_names_of_users_exist():
    names = read_cases("jermmy_names")[0]["classes"]
    assert [name for name in names if not hasattr(systems, name)] == []
    assert set(names) <= set(dir(systems))


def test_the_package_has_the_names_too():
    for name in integer.__all__:
        assert getattr(systems, name) is getattr(integer, name)


def test_the_text_is_that_of_the_source():
    form = next(case["QParam_str"] for case in read_cases("jermmy_names") if "QParam_str" in case)
    qparam = QParam()
    qparam.update(torch.tensor([-1.0, 2.0]))
    numbers = torch.tensor(3 / 255).item(), 85, -1.0, 2.0
    assert str(qparam) == form % numbers
