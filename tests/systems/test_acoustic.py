"""The integers of acoustic models against exact arithmetic in numpy."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from qdq.errors import ArgumentError, StateError
from qdq.systems import AcousticInput, AcousticWeight, acoustic_quantize, prepare_acoustic
from qdq.systems.ranged import MOVING_RANGE


def quantize_exactly(values, num_bits):
    """The codes, the offset and the values in float64, as section 2 of the paper has them."""
    values = values.double().numpy()
    width = values.max() - values.min()
    factor = (2**num_bits - 1) / width if width else 1.0
    offset = np.rint(factor * values.min())
    codes = np.clip(np.rint(factor * values) - offset, 0, 2**num_bits - 1)
    return codes, offset, (codes + offset) / factor


@pytest.mark.parametrize("num_bits", [8, 16])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 5.0])
def test_values_are_those_of_numpy(num_bits, shift):
    values = torch.randn(40, 30) + shift
    codes, offset, expected = quantize_exactly(values, num_bits)
    result = AcousticWeight(num_bits)(values)
    np.testing.assert_allclose(result.numpy(), expected, rtol=1e-6, atol=0)
    assert len(np.unique(codes)) > 2 ** (num_bits - 1) * 0.01
    assert (codes.min(), codes.max()) == (0, 2**num_bits - 1)
    grid = AcousticWeight(num_bits).describe(values)
    assert float(grid.zero_point) == -offset
    restored = grid.scale.double().numpy() * (codes - grid.zero_point.double().numpy())
    np.testing.assert_allclose(restored, expected, rtol=1e-6, atol=0)


def test_all_codes_are_used_where_a_fault_uses_half():
    values = torch.linspace(-1, 1, 10_000)
    num_values = len(AcousticWeight(8)(values).unique())
    assert num_values == 256  # scaled by 2^(8 - 1), there would be 129


def test_zero_is_exact_inside_the_range():
    values = torch.tensor([-0.7, 0.0, 1.3])
    assert AcousticWeight(8)(values)[1] == 0


def test_an_empty_range_has_factor_1():
    assert AcousticWeight(8)(torch.full((3,), 2.3)).tolist() == [2, 2, 2]
    assert AcousticWeight(8)(torch.zeros(3)).tolist() == [0, 0, 0]


def test_products_are_those_of_int32():
    """The emulated product is the one that sums codes in int32 and divides by both factors."""
    weight, x = torch.randn(5, 60), torch.randn(7, 60)
    weight_codes, weight_offset, _ = quantize_exactly(weight, 8)
    codes, offset, _ = quantize_exactly(x, 8)
    sums = (codes + offset).astype(np.int64) @ (weight_codes + weight_offset).astype(np.int64).T
    assert np.abs(sums).max() < 2**31
    width = (x.max() - x.min()).double() * (weight.max() - weight.min()).double()
    layer = nn.Sequential(nn.Linear(60, 5, bias=False))
    layer[0].weight.data = weight
    prepare_acoustic(layer, 8)
    np.testing.assert_allclose(
        layer(x).detach().numpy(), sums * float(width) / 255**2, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_type_input_and_gradient(dtype):
    values = torch.randn(50).to(dtype).requires_grad_()
    before = values.detach().clone()
    result = AcousticInput()(values)
    assert result.dtype == dtype
    result.sum().backward()
    assert torch.equal(values.grad, torch.ones_like(values))
    assert torch.equal(values.detach(), before)


@pytest.mark.parametrize("size", [1e-45, 1e-30, 3e38])
def test_finite_values_stay_finite(size):
    values = torch.tensor([-size, size / 2, size])
    assert torch.isfinite(AcousticWeight(16)(values)).all()
    assert torch.isfinite(AcousticWeight(8).describe(values).scale).all()


def make_model():
    return nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 2))


def test_static_ranges_are_those_of_all_batches():
    model = make_model().eval()
    float_model = copy.deepcopy(model)
    batches = [torch.randn(4, 1, 4, 4) * size for size in (1, 3, 2)]
    assert prepare_acoustic(model, 8, batches=batches) == ["0", "3"]
    values = torch.cat(batches)
    system = model[0].input_system
    assert (float(system.low), float(system.high)) == (float(values.min()), float(values.max()))
    expected = acoustic_quantize(values, values.min(), values.max(), 8)
    assert torch.equal(system(values), expected)
    assert system(10 * values).abs().max() <= values.abs().max() + 1 / 20
    grid = system.describe(None)
    assert (grid.obstacle, grid.lowest, grid.highest) == ("", 0, 255)
    assert (model(values) - float_model(values)).abs().max() < 0.2

    other = make_model()
    prepare_acoustic(other, 8, batches=batches[:1])
    other.load_state_dict(model.state_dict())
    for copied in (other.eval(), copy.deepcopy(model)):
        assert torch.equal(copied(values), model(values))
    assert torch.equal(model[0].weight, float_model[0].weight)


def test_what_no_int8_has_is_an_obstacle():
    model = make_model()
    prepare_acoustic(model, 8)
    grid = model[0].input_system.describe(None)
    assert grid.obstacle == MOVING_RANGE
    assert model[0].weight_system.describe(model[0].weight).obstacle == ""
    model = make_model()
    prepare_acoustic(model, 16, batches=[torch.randn(2, 1, 4, 4)])
    assert model[0].input_system.describe(None).obstacle == "16 bits"
    assert model[0].weight_system.describe(model[0].weight).obstacle == "16 bits"
    dynamic = AcousticInput(16).describe(None)
    assert dynamic.obstacle == f"16 bits, and {MOVING_RANGE}"


def test_bad_calls_are_refused():
    with pytest.raises(ArgumentError, match="bits is 12; it must be 8 or 16"):
        prepare_acoustic(make_model(), 12)
    with pytest.raises(ArgumentError, match="no float layer"):
        prepare_acoustic(nn.Sequential(nn.ReLU()))
    with pytest.raises(StateError, match=r"^1: its input has no range"):
        AcousticInput(is_static=True, name="1")(torch.randn(3))
    with pytest.raises(ValueError, match=r"^conv: .*not finite"):
        AcousticWeight(name="conv")(torch.tensor([torch.inf]))


class Unreached(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.unused = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        return self.used(x)


def test_a_layer_that_no_batch_reaches_is_refused():
    model = Unreached()
    message = r"^unused: no range; 1 batches did not reach 1 of 2 quantizers"
    with pytest.raises(StateError, match=message):
        prepare_acoustic(model, batches=[torch.randn(3, 2)])
    assert [type(model.used), type(model.unused)] == [nn.Linear, nn.Linear]
