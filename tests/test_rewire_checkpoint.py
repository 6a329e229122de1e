"""Gradient checkpoints recompute with the quantizers of the forward: gradients equal those without checkpoints."""

import copy
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import checkpoint as checkpointing
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from qdq import calibrate_model, rewire_operations, swap_modules
from qdq.nn import functions
from qdq.nn.functions import QuantFunctionsMixin

WIDTH = 16


def conv():
    return nn.Conv2d(WIDTH, WIDTH, 3, padding=1)


def run_plainly(function, *args, **options):
    return function(*args)


class Block(nn.Module):
    """As mmdet's: a method of the model's own is checkpointed, with a sum in it; so is a second one."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = conv(), conv(), conv()
        self.checkpoint, self.options = run_plainly, {}

    def forward(self, x):
        def run_first(x):
            return self.second(F.relu(self.first(x))) + x

        x = F.relu(self.checkpoint(run_first, x, **self.options))
        x = F.relu(x + self.third(x))
        return F.relu(self.checkpoint(self.run_second, x, **self.options))

    def run_second(self, x):
        x = self.first(F.relu(self.second(x))) + x
        return self.third(F.relu(x)) + x


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 20)

    def forward(self, x):
        return self.head(self.blocks(x).mean((2, 3)))


def scripted_checkpoint(function, *args, **options):
    """By the class itself, as some libraries do."""
    return checkpointing.CheckpointFunction.apply(function, True, *args)


CHECKPOINTS = {
    "reentrant": (checkpoint, {"use_reentrant": True}),
    "not reentrant": (checkpoint, {"use_reentrant": False}),
    "whole": (checkpoint, {"use_reentrant": False, "early_stop": False}),
    "by the class": (scripted_checkpoint, {}),
}


@pytest.fixture
def x():
    return torch.randn(2, WIDTH, 6, 6)


@pytest.fixture
def model(x):
    model = Model().eval()
    swap_modules(model, x, include="*")
    rewire_operations(model, x)
    calibrate_model(model, [x], method="max")
    assert len([m for m in model.modules() if isinstance(m, QuantFunctionsMixin)]) == 2
    return model.train()


def with_checkpoints(model, kind):
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.checkpoint, block.options = CHECKPOINTS[kind]
    return model


def gradients(model, x):
    x = x.clone().requires_grad_()
    model.zero_grad()
    model(x).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in model.parameters())]


def require_equal(results, expected):
    for result, value in zip(results, expected, strict=True):
        torch.testing.assert_close(result, value, rtol=0, atol=0)


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_gradients_are_those_without_checkpoints(model, x, kind):
    expected = gradients(model, x)
    checkpointed = with_checkpoints(model, kind)
    attributes = dict(vars(checkpointing))
    require_equal(gradients(checkpointed, x), expected)
    require_equal(gradients(checkpointed, x), expected)
    assert dict(vars(checkpointing)) == attributes


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_a_backward_pass_inside_a_forward(model, x, kind):
    """What is recomputed meanwhile does not count as calls of the forward around it."""

    class Penalized(Block):
        def forward(self, x):
            with torch.enable_grad():
                F.relu(super().forward(x.detach().requires_grad_())).sum().backward()
            return self.third(F.relu(x)) + x

    def build(kind):
        torch.manual_seed(1)
        block = Penalized().eval()
        swap_modules(block, x, include="*")
        plan = rewire_operations(block, x)
        calibrate_model(block, [x], method="max")
        assert plan.of("quantize")
        if kind:
            block.checkpoint, block.options = CHECKPOINTS[kind]
        return block.train()

    require_equal(gradients(build(kind), x), gradients(build(None), x))


def test_checkpoints_around_whole_blocks(model, x):
    expected = gradients(model, x)
    inner = with_checkpoints(model, "not reentrant")
    blocks = inner.blocks

    class Sequence(nn.Module):
        def forward(self, x):
            return checkpoint_sequential(list(blocks), 2, x, use_reentrant=False)

    inner.blocks = Sequence()
    inner.add_module("kept", blocks)
    results = gradients(inner, x)
    by_name = {
        name.replace("kept", "blocks"): parameter.grad
        for name, parameter in inner.named_parameters()
    }
    require_equal([results[0], *(by_name[name] for name, _ in model.named_parameters())], expected)


def test_two_threads(model, x):
    expected = gradients(model, x)
    results = {}

    def work(kind):
        results[kind] = gradients(with_checkpoints(model, kind), x)

    threads = [threading.Thread(target=work, args=(kind,)) for kind in CHECKPOINTS]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for kind in CHECKPOINTS:
        require_equal(results[kind], expected)


def test_a_checkpoint_of_another_library_is_told(model, x, caplog):
    class Foreign(torch.autograd.Function):
        @staticmethod
        def forward(ctx, function, x):
            ctx.function = function
            ctx.save_for_backward(x)
            return function(x)

        @staticmethod
        def backward(ctx, gradient):
            (x,) = ctx.saved_tensors
            x = x.detach().requires_grad_()
            with torch.enable_grad():
                result = ctx.function(x)
            result.backward(gradient)
            return None, x.grad

    for block in model.blocks:
        block.checkpoint = Foreign.apply
    gradients(model, x)
    assert caplog.text.count("checkpoint of a library other than torch") == 2
    caplog.clear()
    gradients(with_checkpoints(model, "reentrant"), x)
    assert not caplog.text


@pytest.mark.parametrize("kind", ["reentrant", "not reentrant", None])
def test_a_checkpoint_that_torch_calls_otherwise_is_told_once(model, x, caplog, monkeypatch, kind):
    monkeypatch.setattr(functions, "_CHECKPOINT_GENERATORS", ())
    functions._warn_of_torch.cache_clear()
    expected = gradients(model, x)
    assert not caplog.text
    if kind == "not reentrant":
        with pytest.raises(checkpointing.CheckpointError):
            gradients(with_checkpoints(model, kind), x)
    elif kind:
        require_equal(gradients(with_checkpoints(model, kind), x), expected)
    assert caplog.text.count("does not know the checkpoint of torch") == (kind == "not reentrant")
