import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qdq import ArgumentError, ArgumentTypeError, CalibrationError, StateError
from qdq.formats import AMAX_FLOOR, Format
from qdq.nn import QuantConv2d
from qdq.quantize import _by_arithmetic, _by_operator, compute_scale, fake_quantize
from qdq.quantizer import (
    QuantDescriptor,
    SharedQuantizer,
    TensorQuantizer,
    disable_quantization,
    enable_quantization,
)

FORMATS = [
    Format(bits, unsigned, narrow)
    for bits, unsigned, narrow in itertools.product(
        (2, 3, 4, 8, 12, 16), (False, True), (False, True)
    )
]


def reference(x, amax, fmt, axis=None):
    """The definition in float64, rounded to float32 where float32 arithmetic rounds: exact products, no tie lost."""
    values = np.asarray(x, np.float64)
    shape = [-1 if dim == axis else 1 for dim in range(values.ndim)] if axis is not None else ()
    ranges = np.maximum(np.asarray(amax, np.float32).astype(np.float64).reshape(shape), AMAX_FLOOR)
    scale = (ranges / fmt.qmax).astype(np.float32).astype(np.float64)
    inverse = (1.0 / scale).astype(np.float32).astype(np.float64)
    with np.errstate(over="ignore"):
        product = (values.astype(np.float32).astype(np.float64) * inverse).astype(np.float32)
    codes = np.clip(np.rint(product.astype(np.float64)), fmt.qmin, fmt.qmax)
    return (codes * scale).astype(np.float32)


def same_bits(found, expected):
    """Equal to the last bit, the sign of zero aside (codes have none)."""
    found, expected = np.asarray(found) + 0.0, np.asarray(expected) + 0.0
    np.testing.assert_array_equal(found, expected)


def edge_values(amax, fmt):
    scale = np.float32(max(amax, AMAX_FLOOR)) / np.float32(fmt.qmax)
    ties = (
        np.arange(-fmt.qmax - 3, fmt.qmax + 3, max(1, fmt.qmax // 64), dtype=np.float64) + 0.5
    ) * scale
    neighbours = [
        np.nextafter(ties.astype(np.float32), side)
        for side in (np.float32("-inf"), np.float32("inf"))
    ]
    extremes = [
        0.0,
        -0.0,
        amax,
        -amax,
        1e-45,
        -1e-45,
        1.1e-38,
        1e30,
        -1e30,
        3.4e38,
        np.inf,
        -np.inf,
    ]
    return np.concatenate(
        [ties, *neighbours, extremes, np.random.default_rng(0).normal(0, amax or 1, 500)]
    )


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("amax", [0.0, 1e-30, 2.0**-24, 1e-3, 0.3, 1.0, 6.0, 127.0, 1e4, 1e20])
def test_arithmetic_equals_float64_reference(fmt, amax):
    x = torch.from_numpy(edge_values(amax, fmt).astype(np.float32))
    found = fake_quantize(x, torch.tensor(amax), fmt)
    same_bits(found, reference(x, amax, fmt))
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
@pytest.mark.parametrize("amax", [0.0, 1e-3, 0.3, 1.0, 6.0, 1e4])
def test_torch_operator_gives_the_same_bits(fmt, amax):
    x = torch.from_numpy(edge_values(amax, fmt).astype(np.float32))
    scale = compute_scale(torch.tensor(amax), fmt)
    same_bits(_by_operator(x, scale, fmt, None), _by_arithmetic(x, scale, fmt, None))


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
    same_bits(_by_operator(x, compute_scale(torch.tensor(amax), fmt), fmt, None), expected)


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
        found = fake_quantize(inputs, torch.tensor(amax))
        assert found.dtype == dtype
        same_bits(found.detach().float(), expected.float())


def test_per_channel_operator_saturates_on_the_right_side():
    x = torch.tensor([[1e30, -1e30, 5.0]], requires_grad=True)
    found = _by_operator(x, compute_scale(torch.tensor([1e-12]), Format()), Format(), 0)
    same_bits(found.detach(), reference(x.detach(), [1e-12], Format(), 0))
    found.sum().backward()
    assert x.grad.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_large_tensors_in_pieces(layout):
    """The numbers of torch's own operator, whichever way the memory is walked."""
    x = (3 * torch.randn(2, 16, 96, 97)).to(memory_format=layout)
    found = fake_quantize(x, torch.tensor(4.0))
    expected = torch.fake_quantize_per_tensor_affine(x, 4 / 127, 0, -128, 127)
    assert found.is_contiguous(memory_format=layout)
    assert torch.equal(found, expected)


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
    found = fake_quantize(x, torch.tensor(0.9921))
    assert torch.allclose(found, torch.tensor([0.9843, 0.4609, 0.0859]), atol=1e-4)


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


@pytest.mark.parametrize("bits", [1, 0, 17, -3])
def test_format_refuses_widths(bits):
    with pytest.raises(ArgumentError, match="2 to 16"):
        QuantDescriptor(num_bits=bits)


@pytest.mark.parametrize(
    "field", [{"num_bits": 8.0}, {"num_bits": True}, {"axis": "0"}, {"name": 3}]
)
def test_descriptor_refuses_kinds(field):
    with pytest.raises(ArgumentTypeError, match=next(iter(field))):
        QuantDescriptor(**field)


def test_descriptor_names_the_nearest_method():
    with pytest.raises(ArgumentError, match="did you mean 'histogram'"):
        QuantDescriptor(calib_method="histgoram")


def test_descriptor_is_a_value():
    a, b = (
        QuantDescriptor(4, axis=0, amax=[1.0, 2.0]),
        QuantDescriptor(4, axis=0, amax=np.array([1.0, 2.0])),
    )
    assert a == b
    assert hash(a) == hash(b)


class TestTensorQuantizer:
    def test_states(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
        x = torch.randn(10)
        assert not torch.equal(quantizer(x), x)
        quantizer.disable()
        assert quantizer(x) is x
        quantizer.enable()
        quantizer.disable_quant()
        quantizer.enable_calib()
        assert quantizer(x) is x
        quantizer.load_calib_amax()
        assert quantizer.amax == x.abs().max()

    def test_dynamic_before_calibration(self):
        x = torch.randn(3, 7)
        same_bits(TensorQuantizer()(x), reference(x, x.abs().max(), Format()))
        found = TensorQuantizer(QuantDescriptor(axis=0))(x)
        same_bits(found, reference(x, x.abs().amax(1), Format(), 0))

    @pytest.mark.parametrize("amax", [1.5, [0.5, 1.5, 2.5]])
    def test_amax_round_trips_through_the_state_dict(self, amax):
        desc = QuantDescriptor(axis=0 if isinstance(amax, list) else None)
        source, target = TensorQuantizer(desc), TensorQuantizer(desc)
        assert source.state_dict() == {}
        source.amax = amax
        target.load_state_dict(source.state_dict())
        assert torch.equal(target.amax, source.amax)
        assert target.amax.data_ptr() != source.amax.data_ptr()

    def test_loading_nan_is_refused(self):
        with pytest.raises(ArgumentError, match="NaN"):
            TensorQuantizer().load_state_dict({"_amax": torch.tensor(float("nan"))})

    def test_one_element_shapes_are_the_same(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
        quantizer.load_state_dict({"_amax": torch.tensor([[3.0]])})
        assert quantizer.amax.shape == ()
        assert quantizer.amax == 3

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
    def test_bad_amax_is_refused(self, bad):
        with pytest.raises(ArgumentError, match="amax"):
            TensorQuantizer().amax = bad

    def test_shape_cannot_change(self):
        quantizer = TensorQuantizer(QuantDescriptor(axis=0, amax=[1.0, 2.0]))
        with pytest.raises(StateError, match="Changing shape"):
            quantizer.amax = [1.0, 2.0, 3.0]

    def test_edits_in_place_take_effect(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
        quantizer._amax.fill_(10.0)
        assert quantizer(torch.tensor([5.0])).item() == pytest.approx(5.0, abs=0.05)

    def test_scale_without_amax_teaches(self):
        with pytest.raises(StateError, match="calibrate"):
            _ = TensorQuantizer().scale

    def test_load_without_data_teaches(self):
        with pytest.raises(StateError, match="saw no data"):
            TensorQuantizer().load_calib_amax()

    def test_nan_while_calibrating_names_the_quantizer(self):
        quantizer = TensorQuantizer(
            QuantDescriptor(name="conv1._input_quantizer"), if_calib=True, if_quant=False
        )
        with pytest.raises(CalibrationError, match=r"conv1\._input_quantizer: 1 of 2 values"):
            quantizer(torch.tensor([1.0, float("inf")]))

    def test_repr_says_what_it_does(self):
        assert repr(TensorQuantizer()) == "TensorQuantizer(8bit per-tensor amax=dynamic quant)"

    def test_survives_deepcopy(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
        twin = copy.deepcopy(quantizer)
        twin.amax = 2.0
        assert quantizer.amax == 1

    def test_range_stays_float32_in_a_model_of_halves(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=70000.0)).half()
        assert quantizer.amax.dtype == torch.float32
        assert quantizer.amax == 70000
        assert torch.isfinite(quantizer(torch.tensor([60000.0], dtype=torch.float16))).all()

    def test_meta_device(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=1.0)).to("meta")
        assert "meta" in repr(quantizer)

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_same_bits_on_the_gpu(self):
        for fmt in FORMATS:
            x = torch.from_numpy(edge_values(1.3, fmt).astype(np.float32))
            same_bits(
                fake_quantize(x.cuda(), torch.tensor(1.3).cuda(), fmt).cpu(), reference(x, 1.3, fmt)
            )
        quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
        quantizer(torch.ones(3).cuda())
        assert quantizer.amax.is_cuda


class TestSwitch:
    def model(self):
        return nn.Sequential(
            QuantConv2d(3, 8, 3), nn.Sequential(QuantConv2d(8, 8, 3), QuantConv2d(8, 8, 3))
        )

    def flags(self, model):
        return [m._disabled for m in model.modules() if isinstance(m, TensorQuantizer)]

    def test_as_a_call_it_lasts(self):
        model = self.model()
        disable_quantization(model[1])
        assert self.flags(model) == [False] * 2 + [True] * 4
        enable_quantization(model)
        assert not any(self.flags(model))

    def test_as_a_block_it_puts_back_what_was_there(self):
        model = self.model()
        model[1][0].input_quantizer.disable()
        before = self.flags(model)
        with disable_quantization(model):
            assert all(self.flags(model))
            with enable_quantization(model[0]):
                assert self.flags(model)[:2] == [False, False]
            assert all(self.flags(model))
        assert self.flags(model) == before

    def test_puts_back_after_an_exception(self):
        model = self.model()
        with pytest.raises(RuntimeError, match="inside"), disable_quantization(model):
            raise RuntimeError("inside")
        assert not any(self.flags(model))


def learned_by_torch(values, amax, fmt, axis):
    """Value, gradient of the input and of the range by autograd, in float64, as LSQ writes them."""
    x, a = values.double().requires_grad_(), amax.double().requires_grad_()
    scale = a / fmt.qmax
    along = (
        scale if axis is None else scale.reshape([-1 if d == axis else 1 for d in range(x.dim())])
    )
    steps = (x / along).clamp(
        fmt.qmin - 0.5, fmt.qmax + 0.5
    )  # a value inside its code's half step is not clipped
    codes = (x / along).round().clamp(fmt.qmin, fmt.qmax)
    found = (steps + (codes - steps).detach()) * along
    weights = torch.arange(x.numel(), dtype=torch.float64).reshape(x.shape).sin()
    (found * weights).sum().backward()
    return found.detach(), x.grad, a.grad, weights


@pytest.mark.parametrize("fmt", [Format(), Format(4), Format(8, unsigned=True)], ids=str)
@pytest.mark.parametrize(
    ("shape", "axis"), [((5, 4, 3), None), ((5, 4, 3), 0), ((5, 4, 3), 1), ((50,), 0)]
)
@pytest.mark.parametrize("piece", [1 << 17, 7])
def test_the_gradient_of_a_learned_range_is_that_of_lsq(shape, axis, fmt, piece, monkeypatch):
    monkeypatch.setattr(
        "qdq.quantize._PIECE", piece
    )  # in one piece, and in several of which the last is smaller
    x = torch.randn(shape)
    amax = torch.tensor(1.3) if axis is None else torch.rand(x.shape[axis]) + 0.7
    expected, of_inputs, of_range, weights = learned_by_torch(x, amax, fmt, axis)
    inputs, learned = x.clone().requires_grad_(), amax.clone().requires_grad_()
    found = fake_quantize(inputs, learned, fmt, axis)
    (found * weights).sum().backward()
    assert torch.allclose(found.double(), expected, atol=1e-6)
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
    other, weights = x.detach().clone().requires_grad_(), torch.randn(6, 5, 7, 7)
    amax = torch.tensor(2.0) if axis is None else torch.rand(5) + 1
    (fake_quantize(x, amax, axis=axis) * weights).sum().backward()
    (_by_operator(other, compute_scale(amax, Format()), Format(), axis) * weights).sum().backward()
    assert torch.equal(x.grad, other.grad)
    assert 0.01 < (x.grad == 0).float().mean() < 0.9


class TestLearnedRange:
    def test_there_and_back(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=[1.0, 0.0, 3.0], axis=0))
        parameter = quantizer.learn_range()
        assert list(quantizer.parameters()) == [parameter]
        assert "_amax" not in quantizer.state_dict()
        quantizer.keep_range()
        assert quantizer.state_dict().keys() == {"_amax"}
        assert torch.allclose(quantizer.amax, torch.tensor([1.0, 2.0**-64, 3.0]))
        quantizer.keep_range()

    def test_no_step_makes_it_negative(self):
        quantizer = TensorQuantizer(QuantDescriptor(amax=1.0))
        optimizer = torch.optim.SGD([quantizer.learn_range("pact")], lr=1e5)
        for _ in range(5):
            optimizer.zero_grad()
            quantizer(torch.tensor([5.0, 6.0])).sum().backward()
            optimizer.step()
        assert quantizer.amax.item() == AMAX_FLOOR

    def test_who_shares_a_range_learns_the_same(self):
        leader = TensorQuantizer(QuantDescriptor(amax=1.0))
        parameter = leader.learn_range()
        SharedQuantizer(leader)(torch.tensor([5.0])).sum().backward()
        assert parameter.grad.item() > 0

    def test_misuse_teaches(self):
        quantizer = TensorQuantizer()
        with pytest.raises(StateError, match="no amax to start from"):
            quantizer.learn_range()
        quantizer.amax = 1.0
        with pytest.raises(ArgumentError, match=r"rule is 'lsqq'.*did you mean 'lsq'"):
            quantizer.learn_range("lsqq")
        quantizer.learn_range()
        with pytest.raises(StateError, match="being learned"):
            quantizer.amax = 2.0


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (4, 4, 3, 3)])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_shape_of_ranges_says_their_axis(shape, axis):
    """Ranges of a checkpoint may lie on another axis than the quantizer has; a square weight fits both."""
    weight = torch.randn(shape)
    amax = weight.abs().amax([dim for dim in range(4) if dim != axis], keepdim=True)
    expected = reference(weight, amax.flatten(), Format(), axis)
    quantizer = TensorQuantizer(QuantDescriptor(axis=1 - axis))
    quantizer.amax = amax
    assert (quantizer.axis, quantizer.range_axis) == (1 - axis, axis)
    same_bits(quantizer(weight), expected)
    calibrated = TensorQuantizer(QuantDescriptor(axis=1 - axis))
    calibrated.amax = weight.abs().amax(
        [dim for dim in range(4) if dim == axis or dim > 1], keepdim=True
    )
    with pytest.raises(StateError, match="Changing shape"):
        calibrated.amax = amax
    for loaded in (TensorQuantizer(QuantDescriptor(axis=1 - axis)), calibrated):
        loaded.load_state_dict(quantizer.state_dict())
        same_bits(loaded(weight), expected)
        same_bits(loaded(weight.clone().requires_grad_()).detach(), expected)
    own = weight.abs().amax([dim for dim in range(4) if dim == axis or dim > 1], keepdim=True)
    loaded.amax = own  # calibrated again, on the axis of the quantizer
    same_bits(loaded(weight), reference(weight, own.flatten(), Format(), 1 - axis))
