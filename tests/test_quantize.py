"""The arithmetic of quantization and its gradients, against float64 and against the operators of torch."""

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import list_waits, watch
from quantize_reference import FORMATS, edge_values, reference, same_bits

from qdq import ArgumentError
from qdq.formats import AMAX_FLOOR, FP8, Format
from qdq.quantize import (
    compute_scale,
    fake_quantize,
    fake_quantize_in_pieces,
    fake_quantize_with_operator,
    find_range_axis,
    from_log2,
    own_tensor,
    quantize_codes,
)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("amax", [0.0, 1e-30, 2.0**-24, 1e-3, 0.3, 1.0, 6.0, 127.0, 1e4, 1e20])
def test_arithmetic_equals_float64_reference(fmt, amax):
    x = torch.from_numpy(edge_values(amax, fmt).astype(np.float32))
    result = fake_quantize(x, torch.tensor(amax), fmt)
    same_bits(result, reference(x, amax, fmt))
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("amax", [0.0, 1e-3, 0.3, 1.0, 6.0, 1e4])
def test_torch_operator_gives_the_same_bits(fmt, amax):
    x = torch.from_numpy(edge_values(amax, fmt).astype(np.float32))
    scale = compute_scale(torch.tensor(amax), fmt)
    same_bits(
        fake_quantize_with_operator(x, scale, fmt, None),
        fake_quantize_in_pieces(x, scale, fmt, None),
    )


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=40),
    st.floats(0, 1e6, width=32),
    st.sampled_from(FORMATS),
)
def test_any_numbers(values, amax, fmt):
    x = torch.tensor(values)
    expected = reference(x, amax, fmt)
    same_bits(fake_quantize(x, torch.tensor(amax), fmt), expected)
    same_bits(
        fake_quantize_with_operator(x, compute_scale(torch.tensor(amax), fmt), fmt, None), expected
    )


@pytest.mark.parametrize("axis", [0, 1, -1, 3])
@pytest.mark.parametrize(
    "fmt", [Format(), Format(4), Format(8, narrow_range=True), Format(8, unsigned=True)], ids=str
)
def test_per_channel(axis, fmt):
    x = torch.randn(5, 4, 3, 6) * 3
    amax = torch.rand(x.shape[axis]) * 3
    amax[0] = 0
    expected = reference(x, amax, fmt, axis % 4)
    same_bits(fake_quantize(x, amax, fmt, axis), expected)
    same_bits(fake_quantize(x.clone().requires_grad_(), amax, fmt, axis).detach(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("amax", [1e-4, 0.5, 6.0, 1000.0])
def test_other_types_are_rounded_once(dtype, amax):
    x = (torch.randn(2000) * amax).to(dtype)
    expected = torch.from_numpy(reference(x.float(), amax, Format())).to(dtype)
    for inputs in (x, x.clone().requires_grad_()):
        result = fake_quantize(inputs, torch.tensor(amax))
        assert result.dtype == dtype
        same_bits(result.detach().float(), expected.float())


def test_per_channel_operator_saturates_on_the_right_side():
    x = torch.tensor([[1e30, -1e30, 5.0]], requires_grad=True)
    result = fake_quantize_with_operator(
        x, compute_scale(torch.tensor([1e-12]), Format()), Format(), 0
    )
    same_bits(result.detach(), reference(x.detach(), [1e-12], Format(), 0))
    result.sum().backward()
    assert x.grad.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_tensors_in_pieces(layout):
    """The numbers of torch's own operator, whichever way the memory is walked."""
    x = (3 * torch.randn(2, 16, 96, 97)).to(memory_format=layout)
    result = fake_quantize(x, torch.tensor(4.0))
    expected = torch.fake_quantize_per_tensor_affine(x, 4 / 127, 0, -128, 127)
    assert result.is_contiguous(memory_format=layout)
    assert torch.equal(result, expected)


def test_largest_halves_stay_finite():
    x = torch.tensor([-65504.0, 65504.0], dtype=torch.float16)
    assert torch.isfinite(fake_quantize(x, torch.tensor(65196.0))).all()


def test_per_channel_operator_at_the_end_of_float32():
    x = torch.tensor([[float("inf"), float("-inf"), 3e38]], requires_grad=True)
    same_bits(
        fake_quantize(x, torch.tensor([3e38]), axis=0).detach(),
        reference(x.detach(), [3e38], Format(), 0),
    )


def test_rounds_half_to_even():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5])
    assert fake_quantize(x, torch.tensor(127.0)).tolist() == [0, 2, 2, 0, -2, -2]


def test_specification_example():
    x = torch.tensor([0.9817, 0.4611, 0.0832])
    result = fake_quantize(x, torch.tensor(0.9921))
    assert torch.allclose(result, torch.tensor([0.9843, 0.4609, 0.0859]), atol=1e-4)


@pytest.mark.parametrize("axis", [None, 0])
def test_gradient_passes_inside_the_range_only(axis):
    x = torch.tensor([[-2.0, -1.0, -0.5, 0.0, 0.3, 1.0, 1.5]], requires_grad=True)
    amax = torch.tensor(1.0) if axis is None else torch.ones(1)
    fake_quantize(x, amax, Format(narrow_range=True), axis).sum().backward()
    assert x.grad.tolist() == [[0, 1, 1, 1, 1, 1, 0]]


def test_nan_stays_nan():
    assert torch.isnan(fake_quantize(torch.tensor([float("nan")]), torch.tensor(1.0))).all()


def test_wrong_axis_and_size_teach():
    with pytest.raises(ArgumentError, match=r"axis 4 .*shape \(2, 3\)"):
        fake_quantize(torch.ones(2, 3), torch.ones(3), axis=4)
    with pytest.raises(ArgumentError, match="axis 1 with 2 ranges"):
        fake_quantize(torch.ones(2, 3), torch.ones(2), axis=1)


def learned_by_torch(values, amax, fmt, axis):
    """Value, gradient of the input and of the range by autograd, in float64, as LSQ writes them."""
    x, a = values.double().requires_grad_(), amax.double().requires_grad_()
    scale = a / fmt.qmax
    along = (
        scale if axis is None else scale.reshape([-1 if d == axis else 1 for d in range(x.dim())])
    )
    # A value inside its code's half step is not clipped.
    steps = (x / along).clamp(fmt.qmin - 0.5, fmt.qmax + 0.5)
    codes = (x / along).round().clamp(fmt.qmin, fmt.qmax)
    result = (steps + (codes - steps).detach()) * along
    weights = torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape).sin()
    (result * weights).sum().backward()
    return result.detach(), x.grad, a.grad, weights


@pytest.mark.parametrize("fmt", [Format(), Format(4), Format(8, unsigned=True)], ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 4, 3), None), ((5, 4, 3), 0), ((5, 4, 3), 1), ((50,), 0)]
)
@pytest.mark.parametrize("piece", [1 << 17, 7])
def test_the_gradient_of_a_learned_range_is_that_of_lsq(shape, axis, fmt, piece, monkeypatch):
    # In one piece, and in several of which the last is smaller.
    monkeypatch.setattr("qdq.quantize._PIECE", piece)
    x = torch.randn(shape)
    amax = torch.tensor(1.3) if axis is None else torch.rand(x.shape[axis]) + 0.7
    expected, of_inputs, of_range, weights = learned_by_torch(x, amax, fmt, axis)
    inputs, learned = x.clone().requires_grad_(), amax.clone().requires_grad_()
    result = fake_quantize(inputs, learned, fmt, axis)
    (result * weights).sum().backward()
    assert torch.allclose(result.double(), expected, atol=1e-6)
    assert torch.allclose(inputs.grad.double(), of_inputs, atol=1e-6)
    count = x.numel() / amax.numel()
    assert torch.allclose(learned.grad.double() * (count * fmt.qmax) ** 0.5, of_range, atol=1e-4)


@pytest.mark.parametrize("axis", [None, 0])
def test_no_values_have_a_gradient_too(axis):
    amax = torch.ones(()) if axis is None else torch.ones(3)
    inputs = torch.zeros(3, 0).requires_grad_()
    fake_quantize(inputs, amax.requires_grad_(), axis=axis).sum().backward()
    assert not amax.grad.any()


def test_the_gradient_of_pact_is_that_of_what_is_clipped():
    x, amax = torch.tensor([-3.0, -0.31, 0.2, 1.5, 2.0]), torch.tensor(1.0, requires_grad=True)
    (
        fake_quantize(x, amax, Format(8, narrow_range=True), range_rule="pact") * torch.arange(1, 6)
    ).sum().backward()
    assert amax.grad.item() * (5 * 127) ** 0.5 == pytest.approx(-1 + 4 + 5)


@pytest.mark.parametrize("axis", [None, 1])
def test_the_gradient_of_the_input_is_that_of_torchs_operators(axis):
    x = (3 * torch.randn(6, 5, 7, 7)).requires_grad_()
    twin, weights = x.detach().clone().requires_grad_(), torch.randn(6, 5, 7, 7)
    amax = torch.tensor(2.0) if axis is None else torch.rand(5) + 1
    (fake_quantize(x, amax, axis=axis) * weights).sum().backward()
    (
        fake_quantize_with_operator(twin, compute_scale(amax, Format()), Format(), axis) * weights
    ).sum().backward()
    assert torch.equal(x.grad, twin.grad)
    assert 0.01 < (x.grad == 0).float().mean() < 0.9


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("axis", [None, 0, 1])
def test_codes_times_scale_are_the_values(fmt, axis):
    x = torch.randn(4, 5)
    amax = torch.tensor(1.2) if axis is None else torch.rand(x.shape[axis]) + 0.5
    scale = compute_scale(amax, fmt)
    codes = quantize_codes(x, scale, fmt, axis)
    assert codes.min() >= fmt.qmin
    assert codes.max() <= fmt.qmax
    assert torch.equal(codes, codes.round())
    column = scale if axis is None else scale.reshape((-1, 1) if axis == 0 else (1, -1))
    same_bits(codes * column, fake_quantize(x, amax, fmt, axis))


@pytest.mark.parametrize(
    ("shape", "axis", "expected"),
    [
        ((1, 3, 1, 1), 0, 1),
        ((3, 1), 1, 0),
        ((1, 1), 1, 1),  # one range: the shape does not tell
        ((2, 3), 0, 0),
        ((3,), 0, 0),
        ((1, 3), None, None),
    ],
)
def test_axis_of_ranges(shape, axis, expected):
    assert find_range_axis(torch.ones(shape), axis) == expected
    assert find_range_axis(None, axis) == axis


def test_a_learned_range_is_not_below_the_floor():
    result = from_log2(torch.tensor([-1000.0, -64.0, 0.0, 3.0]))
    assert result.tolist() == [2.0**-64, 2.0**-64, 1.0, 8.0]


def test_a_copy_made_in_inference_mode_can_be_trained():
    with torch.inference_mode():
        twin = own_tensor(torch.ones(3))
    assert not twin.is_inference()
    twin.requires_grad_().sum().backward()
    assert twin.grad.tolist() == [1, 1, 1]


def run_and_differentiate(device, amax, axis, rule):
    """Result and gradients of more values than one piece holds, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    inputs = 3 * torch.randn(20, 4, 60, 60, generator=generator)
    weights = torch.randn(inputs.shape, generator=generator)
    inputs = inputs.to(device).requires_grad_()
    amax = amax.clone().to(device).requires_grad_()
    result = fake_quantize(inputs, amax, axis=axis, range_rule=rule)
    (result * weights.to(device)).sum().backward()
    return result.detach().cpu(), inputs.grad.cpu(), amax.grad.cpu()


RANGES = [
    pytest.param(torch.tensor(2.0), None, id="tensor"),
    pytest.param(torch.linspace(0.5, 2, 20), 0, id="axis 0"),
    pytest.param(torch.linspace(0.5, 2, 4), 1, id="axis 1"),
]


@pytest.mark.parametrize(("amax", "axis"), RANGES)
@pytest.mark.parametrize("rule", ["lsq", "pact"])
def test_one_piece_on_a_gpu_gives_what_many_give_on_the_cpu(gpu, amax, axis, rule):
    expected = run_and_differentiate("cpu", amax, axis, rule)
    result, grad_inputs, grad_amax = run_and_differentiate(gpu, amax, axis, rule)
    assert torch.allclose(result, expected[0], rtol=1e-6)
    assert torch.equal(grad_inputs, expected[1])
    assert torch.allclose(grad_amax, expected[2], rtol=1e-4, atol=1e-5)


class TestOnTheGpu:
    """The device gives the bits of the CPU."""

    @pytest.mark.parametrize("fmt", FORMATS, ids=str)
    def test_scales(self, fmt, gpu):
        """CUDA multiplies a tensor by the reciprocal of a number that divides it."""
        ranges = np.random.default_rng(0).lognormal(0, 20, 2000).clip(1e-30, 1e30)
        amax = torch.from_numpy(ranges.astype(np.float32))
        scales = compute_scale(amax, fmt)
        assert torch.equal(compute_scale(amax.to(gpu), fmt).cpu(), scales)
        assert torch.equal(compute_scale(amax[0].to(gpu), fmt).cpu(), scales[0])
        assert torch.equal(
            compute_scale(amax.half().to(gpu), fmt).cpu(), compute_scale(amax.half(), fmt)
        )

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("axis", [None, 0, 1])
    def test_values_and_gradients(self, axis, dtype, gpu):
        for fmt in FORMATS:
            values = (2 * torch.randn(6, 5)).to(dtype)
            amax = torch.tensor(1.3) if axis is None else torch.rand(values.shape[axis]) + 0.5
            moved_amax = amax.to(gpu)
            expected = fake_quantize(values, amax, fmt, axis)
            same_bits(
                fake_quantize(values.to(gpu), moved_amax, fmt, axis).float().cpu(), expected.float()
            )
            values.requires_grad_()
            moved = values.detach().to(gpu).requires_grad_()
            weights = torch.randn(6, 5)
            fake_quantize(values, amax, fmt, axis).mul(weights).sum().backward()
            result = fake_quantize(moved, moved_amax, fmt, axis)
            same_bits(result.detach().float().cpu(), expected.float())
            result.mul(weights.to(gpu)).sum().backward()
            assert torch.equal(moved.grad.cpu(), values.grad)

    @pytest.mark.parametrize("rule", ["lsq", "pact"])
    @pytest.mark.parametrize("axis", [None, 0, 1])
    def test_learned_ranges(self, axis, rule, gpu):
        values, weights = 2 * torch.randn(40, 5), torch.randn(40, 5)
        shape = () if axis is None else (values.shape[axis],)
        amax = torch.full(shape, 1.3).requires_grad_()
        moved, moved_amax = values.to(gpu), amax.detach().to(gpu).requires_grad_()
        expected = fake_quantize(values, amax, axis=axis, range_rule=rule)
        result = fake_quantize(moved, moved_amax, axis=axis, range_rule=rule)
        same_bits(result.detach().cpu(), expected.detach())
        expected.mul(weights).sum().backward()
        result.mul(weights.to(gpu)).sum().backward()
        torch.testing.assert_close(moved_amax.grad.cpu(), amax.grad)

    def test_codes(self, gpu):
        values, amax = torch.randn(4, 5), torch.rand(4) + 0.5
        scale = compute_scale(amax, Format())
        codes = quantize_codes(values.to(gpu), scale.to(gpu), Format(), 0)
        assert torch.equal(codes.cpu(), quantize_codes(values, scale, Format(), 0))

    @pytest.mark.parametrize("axis", [None, 0])
    @pytest.mark.parametrize("rule", [None, "lsq", "pact"])
    def test_nothing_waits(self, axis, rule, gpu):
        values = torch.randn(4, 5, device=gpu, requires_grad=True)
        shape = () if axis is None else (4,)
        amax = torch.ones(shape, device=gpu, requires_grad=rule is not None)
        with watch(gpu) as events:
            fake_quantize(values, amax, axis=axis, range_rule=rule or "lsq").sum().backward()
        assert list_waits(events) == []


def e4m3(ratio):
    """The values of a cast by ml_dtypes, which saturates here because the values are clipped first."""
    clipped = np.clip(np.asarray(ratio, np.float32), -448, 448)
    return clipped.astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def fp8_values(scale):
    """Codes, ties and their neighbours, values beyond the range, signed zeros, and 60,000 random numbers."""
    codes = np.array([*FP8.list_magnitudes(), 464, 480, 1e4])
    edges = np.concatenate([codes, (codes[1:] + codes[:-1]) / 2]) * np.float64(scale)
    edges = edges.astype(np.float32)
    edges = np.concatenate(
        [edges, *(np.nextafter(edges, np.float32(side)) for side in (-np.inf, np.inf))]
    )
    random = np.random.default_rng(0).normal(size=60_000) * 2.0 ** np.linspace(-12, 9, 60_000)
    values = np.concatenate([edges, -edges, random * scale, [0.0, -0.0, np.inf, -np.inf]])
    return torch.from_numpy(values.astype(np.float32))


class TestFP8:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    @pytest.mark.parametrize("amax", [0.0, 1e-3, 3.3, 448.0])
    def test_equals_the_casts_of_torch_and_numpy(self, amax, dtype):
        scale = np.float32(max(amax, AMAX_FLOOR)) / np.float32(448)
        values = fp8_values(scale).to(dtype)
        ratio = values.float() / float(scale)
        by_numpy = torch.from_numpy(e4m3(ratio) * scale).to(dtype)
        by_torch = (ratio.clamp(-448, 448).to(torch.float8_e4m3fn).float() * float(scale)).to(dtype)
        for inputs in (values, values.clone().requires_grad_()):
            result = fake_quantize(inputs, torch.tensor(amax), FP8).detach()
            assert torch.equal(result.view(torch.uint8), by_numpy.view(torch.uint8))
            assert torch.equal(result.view(torch.uint8), by_torch.view(torch.uint8))

    def test_nan_stays_nan(self):
        inputs = torch.tensor([float("nan"), 1.0])
        assert fake_quantize(inputs, torch.tensor(1.0), FP8).isnan().tolist() == [True, False]

    @pytest.mark.parametrize("axis", [0, 1])
    def test_per_channel(self, axis):
        x = 3 * torch.randn(5, 4, 6)
        amax = torch.rand(x.shape[axis]) + 0.1
        scale = (amax / 448).reshape([-1 if dim == axis else 1 for dim in range(3)])
        expected = torch.from_numpy(e4m3(x / scale)) * scale
        assert torch.equal(fake_quantize(x, amax, FP8, axis), expected)
        assert torch.equal(quantize_codes(x, amax / 448, FP8, axis) * scale, expected)

    def test_gradient_passes_up_to_halfway_past_the_largest_code(self):
        inputs = torch.tensor([-465.0, -463.0, 0.001, 448.0, 463.0, 465.0], requires_grad=True)
        fake_quantize(inputs, torch.tensor(448.0), FP8).sum().backward()
        assert inputs.grad.tolist() == [0, 1, 1, 1, 1, 0]

    @pytest.mark.parametrize("axis", [None, 0])
    def test_a_learned_range_has_the_gradient_of_lsq(self, axis):
        x = 2 * torch.randn(6, 50)
        amax = torch.tensor(1.5) if axis is None else torch.rand(6) + 0.7
        learned = amax.clone().requires_grad_()
        fake_quantize(x, learned, FP8, axis).sum().backward()
        scale = (amax / 448).double().reshape(() if axis is None else (-1, 1))
        ratio = x.double() / scale
        codes = torch.from_numpy(e4m3(ratio.float())).double()
        of_scale = torch.where(ratio.abs() < 464, codes - ratio, codes)
        expected = (of_scale.sum() if axis is None else of_scale.sum(1)) / 448
        count = x.numel() / amax.numel()
        assert torch.allclose(learned.grad.double() * (count * 448) ** 0.5, expected, atol=1e-4)

    def test_compiled_it_gives_the_same_values_and_gradients(self):
        x = fp8_values(3.3 / 448)
        compiled = torch.compile(
            lambda values: fake_quantize(values, torch.tensor(3.3), FP8), backend="aot_eager"
        )
        inputs, reference = x.clone().requires_grad_(), x.clone().requires_grad_()
        result, expected = compiled(inputs), fake_quantize(reference, torch.tensor(3.3), FP8)
        assert torch.equal(result, expected)
        result.sum().backward()
        expected.sum().backward()
        assert torch.equal(inputs.grad, reference.grad)
