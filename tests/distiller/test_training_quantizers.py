"""The quantizers of training against golden values, formulas in numpy, and what TensorRT takes of them."""

import math

import numpy as np
import pytest
import torch
from golden import read_golden
from torch import nn

from qdq.distiller import (
    ClippedLinearQuantization,
    DorefaWeight,
    FakeLinearQuantization,
    LearnedClippedLinearQuantization,
    LinearQuantMode,
    RangeLinearParameter,
    WRPNWeight,
    solve_weight,
)
from qdq.errors import ArgumentError, StateError
from qdq.systems.moving_range import moving_ranges
from qdq.systems.verdict import judge_tensor

GOLDEN = read_golden("distiller_training_schemes")
WEIGHT = torch.tensor(GOLDEN["weight"])
ACTIVATION = torch.tensor(GOLDEN["activation"])
SYMMETRIC = LinearQuantMode.SYMMETRIC


def cases_of(*schemes):
    return [case for case in GOLDEN["cases"] if case["scheme"] in schemes]


@pytest.mark.parametrize("case", cases_of("dorefa_weight"))
def test_golden_dorefa(case):
    result = DorefaWeight(case["num_bits"])(WEIGHT)
    torch.testing.assert_close(result, torch.tensor(case["expected"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", cases_of("clipped_activation"))
def test_golden_clipped_activation(case):
    result = ClippedLinearQuantization(case["num_bits"], case["clip_val"])(ACTIVATION)
    torch.testing.assert_close(result, torch.tensor(case["expected"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", cases_of("pact_activation"))
def test_golden_pact(case):
    quantizer = LearnedClippedLinearQuantization(case["num_bits"], case["clip_val"])
    values = ACTIVATION.clone().requires_grad_()
    result = quantizer(values)
    result.sum().backward()
    torch.testing.assert_close(result, torch.tensor(case["expected"]), rtol=1e-4, atol=1e-5)
    assert quantizer.clip_val.grad.tolist() == case["grad_clip_val"]
    assert values.grad.tolist() == case["grad_input"]


@pytest.mark.parametrize("case", cases_of("wrpn_weight"))
def test_wrpn_has_the_levels_of_its_paper_where_the_golden_values_do_not(case):
    assert "fault" in case
    num_steps = 2 ** (case["num_bits"] - 1) - 1
    expected = np.rint(num_steps * WEIGHT.double().clamp(-1, 1).numpy()) / num_steps
    result = WRPNWeight(case["num_bits"])(WEIGHT)
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-6)
    golden = torch.tensor(case["expected"])
    assert result.abs().max() == 1
    assert golden.abs().max() > 1
    # Within half a step of each other where the weight is not clipped.
    is_inside = WEIGHT.abs() < 1
    assert (result - golden)[is_inside].abs().max() < 1 / num_steps


@pytest.mark.parametrize("case", read_golden("distiller_ema_activation")["cases"])
def test_golden_moving_ranges(case):
    mode = LinearQuantMode[case["mode"]]
    quantizer = FakeLinearQuantization(case["num_bits"], mode, case["ema_decay"])
    num_beyond = 0
    for step in case["steps"]:
        quantizer.train(not step.get("eval", False))
        result, golden = quantizer(torch.tensor(step["input"])), torch.tensor(step["output"])
        grid = quantizer.describe(None)
        codes, golden_codes = (x / grid.scale + grid.zero_point for x in (result, golden))
        is_beyond = golden_codes > grid.highest + 0.5  # one code too many, which int8 lacks
        torch.testing.assert_close(result[~is_beyond], golden[~is_beyond], rtol=1e-4, atol=1e-5)
        assert ((codes - golden_codes).abs() < 1.01).all()
        assert (codes < grid.highest + 0.01).all()
        num_beyond += int(is_beyond.sum())
    assert (num_beyond > 0) == (mode is SYMMETRIC)
    low, high = quantizer.find_range()
    last = case["steps"][-2]  # the golden averages of all steps are those of the last one
    assert float(low) == pytest.approx(last["tracked_min"][0], rel=1e-5)
    assert float(high) == pytest.approx(last["tracked_max"][0], rel=1e-5)
    grid = quantizer.describe(None)
    assert float(1 / grid.scale) == pytest.approx(last["scale"][0], rel=1e-5)
    assert float(-grid.zero_point) == last["zero_point"][0]


def test_the_lower_end_of_a_symmetric_range_is_the_tie_of_exact_arithmetic():
    """-sat * 127.5 / sat is -127.5 for every sat, and the even neighbour is -128."""
    for end in torch.linspace(0.1, 9, 200):
        quantizer = FakeLinearQuantization(8, SYMMETRIC, ema_decay=0.0).train()
        codes = quantizer(torch.stack([-end, end])) * 127.5 / end
        torch.testing.assert_close(codes, torch.tensor([-128.0, 127.0]), rtol=0, atol=1e-3)


@pytest.mark.parametrize("num_bits", [2, 3, 4, 7, 8])
def test_dorefa_is_its_formula(num_bits):
    weight = torch.randn(50, 20, generator=torch.Generator().manual_seed(0)) / 4
    wide = weight.double().numpy()
    num_steps = 2**num_bits - 1
    share = np.tanh(wide) / np.abs(np.tanh(wide)).max()
    expected = 2 * np.rint((share / 2 + 0.5) * num_steps) / num_steps - 1
    result = DorefaWeight(num_bits)(weight)
    # A weight near a tie may go the other way in float32.
    is_other = np.abs(result.numpy() - expected) > 1e-5
    assert is_other.sum() <= 2
    codes = result * num_steps
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    assert (codes.round() % 2 == 1).all()


def test_the_gradient_of_dorefa_is_that_of_tanh_and_its_scale():
    weight = torch.tensor([0.5, -1.0, 0.2], requires_grad=True)
    DorefaWeight(3)(weight)[0].backward()
    values = weight.detach().double().numpy()
    largest = math.tanh(1.0)
    expected = [
        (1 - math.tanh(values[0]) ** 2) / largest,
        math.tanh(values[0]) / largest**2 * (1 - largest**2),
        0.0,
    ]
    np.testing.assert_allclose(weight.grad.numpy(), expected, rtol=1e-5)


@pytest.mark.parametrize("num_bits", [1, 2, 8])
def test_weights_that_are_all_0(num_bits):
    weight = torch.zeros(3, requires_grad=True)
    result = DorefaWeight(num_bits)(weight)
    result.sum().backward()
    assert result.tolist() == [0, 0, 0]
    assert torch.isfinite(weight.grad).all()


def test_wrpn_with_one_bit_is_a_sign():
    assert WRPNWeight(1)(torch.tensor([-0.3, 0.0, 7.0])).tolist() == [-1, 1, 1]


def test_the_gradient_of_wrpn_passes_inside():
    weight = torch.tensor([-1.5, -1.0, 0.3, 2.0], requires_grad=True)
    WRPNWeight(4)(weight).sum().backward()
    assert weight.grad.tolist() == [0, 1, 1, 0]


def test_the_upper_end_of_pact_stays_above_0():
    quantizer = LearnedClippedLinearQuantization(4, 0.1)
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=10.0)
    quantizer(torch.ones(3)).sum().backward()
    optimizer.step()
    assert quantizer.clip_val < 0
    values = torch.ones(3, requires_grad=True)
    result = quantizer(values)
    result.sum().backward()  # the end was moved after the former graph was made
    assert quantizer.clip_val > 0
    assert torch.isfinite(result).all()
    assert quantizer.describe(None).scale > 0
    assert quantizer.clip_val.grad.item() == 6


@pytest.mark.parametrize("start", [0.0, -1.0, float("nan"), float("inf")])
def test_pact_starts_above_0(start):
    with pytest.raises(ArgumentError, match=r"^relu: act_clip_init_val is"):
        LearnedClippedLinearQuantization(4, start, "relu")


@pytest.mark.parametrize("shape", [(), (4, 1, 1)])
@pytest.mark.parametrize("mode", LinearQuantMode)
def test_range_linear_weights_keep_their_gradient_and_their_scales(mode, shape):
    weight = torch.randn(4, 3, 5, requires_grad=True)
    quantizer = RangeLinearParameter("weight", 4, mode, shape)
    result = quantizer(weight)
    result.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))
    state = quantizer.state_dict()
    scale, zero_point = state["weight_scale"], state["weight_zero_point"]
    assert scale.shape == shape
    codes = result.detach() * scale - zero_point
    torch.testing.assert_close(codes, codes.round(), atol=1e-4, rtol=0)
    axis = 0 if shape else None
    torch.testing.assert_close(
        result, solve_weight(weight, 4, mode, axis=axis).fake_quantize(weight)
    )


def test_a_bias_of_32_bits_is_nearly_float():
    bias = torch.randn(100)
    quantizer = RangeLinearParameter("bias", 32, SYMMETRIC)
    torch.testing.assert_close(quantizer(bias), bias)
    assert set(quantizer.state_dict()) == {"bias_scale", "bias_zero_point"}


def test_the_gradient_of_a_moving_range_passes_inside_with_its_ends():
    quantizer = FakeLinearQuantization(8, LinearQuantMode.ASYMMETRIC_UNSIGNED).train()
    quantizer(torch.tensor([-1.0, 2.0]))
    quantizer.eval()
    values = torch.tensor([-1.5, -1.0, 0.3, 2.0, 2.5], requires_grad=True)
    result = quantizer(values)
    result.sum().backward()
    assert values.grad.tolist() == [0, 1, 1, 1, 0]
    assert result[0] == result[1]


def test_a_range_above_0_begins_at_0():
    """What the exported file computes: there is no clamp at the smallest value."""
    quantizer = FakeLinearQuantization(8, LinearQuantMode.ASYMMETRIC_UNSIGNED).train()
    quantizer(torch.tensor([1.0, 2.0]))
    assert quantizer.eval()(torch.tensor([0.0, 0.2])).tolist() == pytest.approx([0, 0.2], abs=4e-3)


def test_a_range_moves_in_training_alone():
    quantizer = FakeLinearQuantization().train()
    quantizer(torch.tensor([-1.0, 1.0]))
    quantizer.eval()(torch.tensor([-5.0, 5.0]))
    assert float(quantizer.find_range()[1]) == pytest.approx(1)


def test_a_range_moves_with_the_steps_of_finetune():
    model = nn.Sequential(FakeLinearQuantization(), nn.Linear(2, 2)).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    values = torch.tensor([[-1.0, 2.0]])
    with moving_ranges(model):
        with torch.no_grad():
            assert torch.equal(model[0](values), values)  # a measurement before the first step
        model(values).sum().backward()
        assert model[0].num_steps == 0
        optimizer.step()
        assert model[0].num_steps == 1


def test_an_activation_without_a_batch_is_refused():
    with pytest.raises(StateError, match=r"^relu: .* has seen 0 batches"):
        FakeLinearQuantization(name="relu").eval()(torch.zeros(3))
    with pytest.raises(StateError, match=r"^relu: .* has seen 0 batches"):
        FakeLinearQuantization(name="relu").describe(None)


QUANTIZERS = [
    lambda: DorefaWeight(4, "conv1"),
    lambda: WRPNWeight(4, "conv1"),
    lambda: ClippedLinearQuantization(4, name="conv1"),
    lambda: LearnedClippedLinearQuantization(4, name="conv1"),
    lambda: RangeLinearParameter("weight", 4, SYMMETRIC, name="conv1"),
    lambda: FakeLinearQuantization(4, name="conv1").train(),
]


@pytest.mark.parametrize("make", QUANTIZERS)
def test_shape_type_and_input_stay(make):
    values = (torch.randn(3, 4) * 100).half()
    before = values.clone()
    result = make()(values)
    assert (result.shape, result.dtype) == (values.shape, values.dtype)
    assert torch.isfinite(result).all()
    assert torch.equal(values, before)


@pytest.mark.parametrize("make", QUANTIZERS)
@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (torch.zeros(0), "is empty"),
        (torch.tensor([1.0, float("nan")]), "not finite"),
        (torch.tensor([1, 2]), "only float tensors"),
    ],
)
def test_bad_values_are_refused_with_the_layer(make, values, reason):
    with pytest.raises((ValueError, TypeError), match=rf"^conv1: .*{reason}"):
        make()(values)


@pytest.mark.parametrize("make", [DorefaWeight, WRPNWeight, ClippedLinearQuantization])
@pytest.mark.parametrize("num_bits", [0, -1])
def test_other_widths_are_refused(make, num_bits):
    with pytest.raises(ArgumentError, match=f"bits is {num_bits}"):
        make(num_bits)


VERDICTS = [
    (DorefaWeight, 1, "exact"),
    (DorefaWeight, 2, "exact"),
    (DorefaWeight, 7, "exact"),
    (DorefaWeight, 8, "convert"),
    (DorefaWeight, 9, "refuse"),
    (WRPNWeight, 1, "exact"),
    (WRPNWeight, 8, "exact"),
    (WRPNWeight, 9, "refuse"),
    (ClippedLinearQuantization, 1, "exact"),
    (ClippedLinearQuantization, 7, "exact"),
    (ClippedLinearQuantization, 8, "convert"),
    (LearnedClippedLinearQuantization, 7, "exact"),
    (LearnedClippedLinearQuantization, 8, "convert"),
]


@pytest.mark.parametrize(("kind", "num_bits", "verdict"), VERDICTS)
def test_what_tensorrt_takes(kind, num_bits, verdict):
    values = torch.randn(200) if "Weight" in kind.__name__ else torch.randn(200) * 3
    quantizer = kind(num_bits)
    grid = quantizer.describe(values)
    assert judge_tensor("values", grid).verdict == verdict
    codes = quantizer(values).detach() / grid.scale
    torch.testing.assert_close(codes, codes.round(), atol=1e-3, rtol=0)
    assert grid.lowest <= codes.min()
    assert codes.max() <= grid.highest * (1 + 1e-6)


@pytest.mark.parametrize(
    ("mode", "num_bits", "verdict"),
    [
        (SYMMETRIC, 8, "exact"),
        (SYMMETRIC, 4, "exact"),
        (LinearQuantMode.SYMMETRIC_RESTRICTED, 8, "exact"),
        (LinearQuantMode.ASYMMETRIC_UNSIGNED, 8, "convert"),
        (LinearQuantMode.ASYMMETRIC_SIGNED, 8, "convert"),
        (SYMMETRIC, 9, "refuse"),
    ],
)
def test_what_tensorrt_takes_of_range_linear(mode, num_bits, verdict):
    values = torch.rand(200) * 3 - 1
    weight = RangeLinearParameter("weight", num_bits, mode).describe(values)
    activation = FakeLinearQuantization(num_bits, mode).train()
    activation(values)
    assert judge_tensor("values", weight).verdict == verdict
    assert judge_tensor("values", activation.describe(None)).verdict == verdict
