"""What all functions of a tensor share: type, shape, range, and the refusal of bad input."""

import pytest
import torch

from qdq import systems

FUNCTIONS = {
    "linear_quantize": lambda values, bits: systems.linear_quantize(values, 3, bits),
    "min_max_quantize": systems.min_max_quantize,
    "log_minmax_quantize": systems.log_minmax_quantize,
    "log_linear_quantize": lambda values, bits: systems.log_linear_quantize(values, 1, bits),
    "tanh_quantize": systems.tanh_quantize,
}
every_function = pytest.mark.parametrize("name", FUNCTIONS)
SHORT = [1, 2, 3, 8]


@every_function
@pytest.mark.parametrize("bits", SHORT)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_shape_and_type_stay_and_the_input_is_untouched(name, bits, dtype):
    values = torch.randn(4, 3, 5).transpose(0, 1).to(dtype)
    copy = values.clone()
    result = FUNCTIONS[name](values, bits)
    assert (result.shape, result.dtype, result.device) == (copy.shape, dtype, copy.device)
    assert torch.equal(values, copy)
    assert result.data_ptr() != values.data_ptr()


@every_function
@pytest.mark.parametrize("bits", [*SHORT, 20, 32])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_finite_input_gives_finite_output(name, bits, dtype):
    limits = torch.finfo(dtype)
    for values in (
        [limits.max, limits.min, 0.0, 1.0],
        [limits.smallest_normal / 4, 0.0, -1.0],
        [limits.max],
        [0.0, 0.0],
        [limits.smallest_normal / 4, 0.0],
        [-5.0, -5.0],
    ):
        result = FUNCTIONS[name](torch.tensor(values, dtype=dtype), bits)
        assert bool(torch.isfinite(result).all()), (values, result)


@every_function
@pytest.mark.parametrize("bits", SHORT)
def test_no_more_values_than_codes(name, bits):
    result = FUNCTIONS[name](torch.randn(5000) * 3, bits)
    # Vector and scalar instructions of exp and atanh may differ in the last place.
    assert result.mul(10000).round().unique().numel() <= 2**bits


@every_function
def test_half_types_compute_in_float32(name):
    values = torch.randn(300).half()
    expected = FUNCTIONS[name](values.float(), 8).half()
    assert torch.equal(FUNCTIONS[name](values, 8), expected)


@every_function
@pytest.mark.parametrize(
    ("values", "message"),
    [
        (torch.zeros(0, 3), r"shape \(0, 3\) is empty"),
        (torch.tensor([1.0, float("nan")]), "1 of 2 values are not finite, the first is nan"),
        (torch.tensor([float("inf")]), "the first is inf"),
    ],
)
def test_values_that_are_refused(name, values, message):
    with pytest.raises(ValueError, match=f"{name}: .*{message}"):
        FUNCTIONS[name](values, 8)


@every_function
@pytest.mark.parametrize("values", [torch.tensor([1, 2]), torch.tensor([True]), [1.0]])
def test_only_float_tensors(name, values):
    with pytest.raises(TypeError, match=name):
        FUNCTIONS[name](values, 8)


@every_function
@pytest.mark.parametrize("bits", [0, -1, 33])
def test_bits_that_are_refused(name, bits):
    with pytest.raises(ValueError, match=f"{name}: bits is {bits}"):
        FUNCTIONS[name](torch.ones(2), bits)


@every_function
def test_on_a_device(name, device):
    values = torch.randn(500)
    expected = FUNCTIONS[name](values, 6)
    result = FUNCTIONS[name](values.to(device), 6)
    assert result.device.type == device.type
    torch.testing.assert_close(result.cpu(), expected)
