"""Values against numpy in float64, gradients against finite differences and closed forms."""

import copy
import pickle

import numpy as np
import pytest
import torch

from qdq.compat.nn.functional import ClipFunction, clip
from qdq.compat.nn.modules.clip import Clip
from qdq.errors import QdqError

X = torch.linspace(-2, 2, 41)


def expected(x, low, high):
    return np.maximum(np.minimum(x.double().numpy(), np.asarray(high)), np.asarray(low))


@pytest.mark.parametrize(("low", "high"), [(-0.5, 1.25), (-1, 1), (0.75, -0.75), (-np.inf, 0.5)])
def test_numbers_and_tensors_as_bounds(low, high):
    result = clip(X, low, high)
    assert result.dtype == torch.float32
    assert np.array_equal(result.double().numpy(), expected(X, low, high))
    assert torch.equal(clip(X, torch.tensor(float(low)), np.float32(high)), result)
    assert torch.equal(ClipFunction.apply(X, low, high), result)
    assert torch.equal(Clip(low, torch.tensor(float(high)))(X), result)


def test_bounds_broadcast_both_ways():
    low, high = torch.tensor([[-1.0], [0.0], [0.5]]), torch.rand(41)
    assert np.array_equal(clip(X, low, high).numpy(), expected(X, low, high).astype(np.float32))
    x = X.clone().requires_grad_()
    clip(x, low, 0.8).sum().backward()
    assert np.array_equal(x.grad.numpy(), ((X.numpy() > low.numpy()) & (X.numpy() < 0.8)).sum(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_types_are_kept(dtype):
    x = X.to(dtype)
    for bounds in [(-0.5, 1e6), (torch.tensor([-0.5]), torch.full((41,), 1e6))]:
        result = clip(x, *bounds)
        assert result.dtype == dtype
        assert np.array_equal(result.double().numpy(), expected(x, -0.5, 1e6))


def test_float64_sees_all_digits_of_a_number():
    assert clip(torch.ones((), dtype=torch.float64), 0.0, 0.1).item() == 0.1


def test_integers_take_the_type_of_the_bounds():
    assert clip(torch.tensor([-3, 3]), -1, 2).tolist() == [-1, 2]
    assert clip(torch.tensor([-3, 3]), -0.5, 2.5).tolist() == [-0.5, 2.5]


def test_strides_zero_elements_and_nan():
    x = torch.randn(4, 6).t()[::2]
    assert np.array_equal(
        clip(x, -0.3, 0.3).numpy(), np.clip(x.numpy(), np.float32(-0.3), np.float32(0.3))
    )
    assert clip(torch.empty(0, 3), -1, 1).shape == (0, 3)
    assert clip(torch.tensor([float("nan"), 5]), -1, 1).isnan().tolist() == [True, False]


def test_gradients_against_finite_differences():
    # No value on a bound.
    x = (torch.arange(-20, 20, dtype=torch.float64) / 10 + 0.05).requires_grad_()
    low, high = (torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (-0.7, [1.1]))
    assert torch.autograd.gradcheck(clip, (x, low, high))
    assert torch.autograd.gradgradcheck(clip, (x, low, high))


def test_values_on_a_bound_belong_to_the_bound():
    x = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], requires_grad=True)
    op = Clip(-1.0, np.array([1.0], dtype=np.float32), learn_min=True, learn_max=True)
    incoming = torch.tensor([1.0, 10.0, 100.0, 1000.0, 10000.0])
    op(x).backward(incoming)
    assert x.grad.tolist() == [0, 0, 100, 0, 0]
    assert op.clip_value_min.grad.item() == 11
    assert op.clip_value_max.grad.tolist() == [11000]


def test_bound_gradient_in_half_precision_does_not_overflow():
    op = Clip(-1.0, 1.0, learn_max=True)
    op(torch.full((1000,), 2.0, dtype=torch.float16)).backward(
        torch.full((1000,), 100.0, dtype=torch.float16)
    )
    assert op.clip_value_max.grad.item() == 100_000
    assert op.clip_value_max.grad.dtype == torch.float32


def test_an_infinite_gradient_outside_stays_outside():
    x = torch.tensor([0.0, 5.0], requires_grad=True)
    clip(x, -1, 1).backward(torch.tensor([1.0, float("inf")]))
    assert x.grad.tolist() == [1, 0]


def test_only_learnable_bounds_are_parameters():
    op = Clip(-2.0, 3.0, learn_max=True)
    assert op.clip_value_min == -2.0
    assert list(op.state_dict()) == ["clip_value_max"]
    assert op.clip_value_max.dim() == 0 and op.clip_value_max.dtype == torch.float32
    assert list(Clip(-2.0, torch.tensor(3.0)).state_dict()) == []
    for copied in (copy.deepcopy(op), pickle.loads(pickle.dumps(op))):  # noqa: S301
        assert torch.equal(copied(X), op(X))


@pytest.mark.parametrize(
    "value", [np.array(1.5), np.array([[1.5]]), np.float32(1.5), np.float64(1.5), torch.tensor(1.5)]
)
def test_one_element_of_any_kind_can_be_learned(value):
    op = Clip(-value, value, learn_min=True, learn_max=True)
    assert [op.clip_value_min.item(), op.clip_value_max.item()] == [-1.5, 1.5]
    assert op.clip_value_max.shape == np.shape(value)
    assert np.array_equal(
        op(X).detach().numpy().reshape(-1), expected(X, -1.5, 1.5).astype(np.float32)
    )


def test_learned_parameter_is_not_the_array_it_came_from():
    start = np.array([1.0], dtype=np.float32)
    op = Clip(-1.0, start, learn_max=True)
    start[0] = 7
    assert op.clip_value_max.item() == 1


@pytest.mark.parametrize("value", [np.ones(2), torch.ones(3), [1.0, 2.0], "1.0", None, 1])
def test_other_bounds_cannot_be_learned(value):
    with pytest.raises(ValueError, match=r"clip_value_max is .*must be scalar") as error:
        Clip(-1.0, value, learn_max=True)
    assert isinstance(error.value, QdqError)
    with pytest.raises(ValueError, match=r"clip_value_min is .*must be scalar"):
        Clip(value, 1.0, learn_min=True)


@pytest.mark.parametrize("value", ["1", None, [0.0]])
def test_bounds_of_a_wrong_kind(value):
    for call in (lambda: clip(X, value, 1), lambda: Clip(value, 1)):
        with pytest.raises(
            TypeError, match=r"clip_value_min is .*expected a number or a tensor"
        ) as error:
            call()
        assert isinstance(error.value, QdqError)


def test_input_of_a_wrong_kind():
    with pytest.raises(TypeError, match="input of clip is a list") as error:
        clip([1.0], -1, 1)
    assert isinstance(error.value, QdqError)


@pytest.mark.parametrize("which", [1, 2])
def test_learnable_bound_per_channel_is_refused_in_backward(which):
    arguments = [X, -torch.ones(41), torch.ones(41)]
    arguments[which].requires_grad_()
    result = clip(*arguments).sum()
    with pytest.raises(ValueError, match="can only be scalar") as error:
        result.backward()
    assert isinstance(error.value, QdqError)


@pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning")
def test_it_can_be_captured():
    op = torch.nn.Sequential(
        Clip(-0.5, 0.5, learn_min=True, learn_max=True), Clip(-0.25, torch.tensor(0.3))
    )
    program = torch.export.export(op, (X,))
    assert torch.equal(program.module()(X), op(X))
    with torch.no_grad():
        traced = torch.jit.trace(op, (X,))
        assert torch.equal(traced(2 * X), op(2 * X))
