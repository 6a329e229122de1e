"""Block reconstruction against brute force on small networks."""

import copy
import itertools
import logging
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import qdq
from qdq import (
    ArgumentError,
    DataError,
    calibrate_model,
    correct_bias,
    disable_quantization,
    reconstruct_blocks,
    restore_modules,
    rewire_operations,
    round_weights,
    swap_modules,
)
from qdq.accuracy import blocks
from qdq.corrections import list_passes
from qdq.nn import QuantMixin
from qdq.quantize import quantize_codes
from qdq.quantizer import named_quantizers


class Residual(nn.Module):
    """A function in place on its input, and a shortcut."""

    def __init__(self, channels):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x):
        x.clamp_(-2, 2)
        return F.relu(self.second(F.relu(self.first(x), inplace=True)) + x, inplace=True)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.blocks = nn.Sequential(Residual(8), Residual(8))
        self.head = nn.Linear(8, 6)

    def forward(self, x):
        return self.head(self.blocks(F.relu6(self.stem(x))).mean((2, 3)))


class Attention(nn.Module):
    """A mask as a keyword, and two outputs in a dictionary, one a hundred times the other."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.out = nn.Linear(16, 16)

    def forward(self, states, *, mask, scale=4.0):
        query, key, value = self.qkv(states).chunk(3, -1)
        scores = query @ key.transpose(1, 2) / scale
        states = states + self.out((scores + mask).softmax(-1) @ value)
        return {"states": 100 * states, "pooled": states.mean(1), "scale": scale}


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, states, mask):
        for layer in self.layers:
            outputs = layer(states, mask=mask)
            states = outputs["states"] / 100
        return outputs["states"], outputs["pooled"]


def quantize(model, batch, bits=4):
    """Few bits for the weights, so that a small network has an error that rounding can lower."""
    swap_modules(model.eval(), batch, include=["*"])
    rewire_operations(model, batch)
    for module in model.modules():
        if isinstance(module, QuantMixin):
            module.weight_quantizer._num_bits = bits
    calibrate_model(model, [batch], method="max")
    return model


@pytest.fixture
def images():
    return torch.randn(64, 3, 7, 7).cumsum(-1)


@pytest.fixture
def net(images):
    return quantize(Net(), images)


@pytest.fixture
def encoder():
    states = {"states": torch.randn(160, 5, 16).cumsum(-1) / 4, "mask": torch.zeros(160, 5, 5)}
    states["mask"][::2, :, -1] = -1e4
    return quantize(Encoder(), states), states


def list_state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(actual, expected):
    torch.testing.assert_close(dict(actual), dict(expected), rtol=0, atol=0)


def error(model, expected, batch, name):
    """Relative error of a block on the last quarter, in a plain forward of the model."""
    taken = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda *args: taken.append(args[2].clone())
    )
    with torch.no_grad():
        model(batch)
    handle.remove()
    residual = taken[0].double() - expected
    held_out = len(expected) - len(expected) // 4
    return float(residual[held_out:].square().mean() / expected.var(correction=0))


def test_no_block_is_worse_on_the_held_out_samples(net, images):
    expected = {}
    handles = []
    names = ["blocks.0", "blocks.1", "head"]
    for name in names:
        module = net.get_submodule(name)
        hook = lambda *args, name=name: expected.__setitem__(name, args[2].double())  # noqa: E731
        handles.append(module.register_forward_hook(hook))
    with disable_quantization(net), torch.no_grad():
        net(images)
    for handle in handles:
        handle.remove()
    report = reconstruct_blocks(net, [images[:20], images[20:]], steps=60)
    assert [block.block for block in report.blocks] == ["stem", *names]
    assert report.blocks[1].layers == ("blocks.0.first", "blocks.0.second")
    assert all(block.after <= block.before for block in report.blocks)
    assert sum(block.after < block.before for block in report.blocks) >= 2
    assert report.after_db > report.before_db + 0.5
    for block in report.blocks[1:]:
        assert error(net, expected[block.block], images, block.block) == pytest.approx(
            block.after, rel=1e-3
        )
    assert "blocks reconstructed" in report.format_table()


def test_nearest_rounding_of_the_stored_weights_gives_codes_beside_the_nearest(net, images):
    before = copy.deepcopy(net)
    reconstruct_blocks(net, [images], steps=60)
    num_changed = 0
    for name in ("stem", "blocks.0.first", "blocks.0.second", "head"):
        layer, former = net.get_submodule(name), before.get_submodule(name)
        scale = layer.weight_quantizer.scale.flatten()
        weight = layer.weight.detach()
        codes = quantize_codes(weight, scale, layer.weight_quantizer.format, 0)
        nearest = quantize_codes(former.weight.detach(), scale, layer.weight_quantizer.format, 0)
        values = codes * scale.reshape(-1, *[1] * (codes.dim() - 1))
        assert torch.equal(layer.weight_quantizer.amax, former.weight_quantizer.amax)
        assert (codes - nearest).abs().max() <= 1
        if not torch.equal(codes, nearest):
            num_changed += 1
            torch.testing.assert_close(weight, values)
    assert num_changed >= 2
    for _, quantizer in named_quantizers(net):
        assert not quantizer._forward_hooks
        assert not list(quantizer.parameters())
    assert all("bias" not in vars(module) for module in net.modules())


@pytest.mark.parametrize("first", [None, round_weights, correct_bias])
def test_the_float_model_comes_back_exactly(images, first):
    model = Net().eval()
    before = list_state(model)
    quantize(model, images)
    with disable_quantization(model), torch.no_grad():
        expected = model(images)
    if first:
        first(model, [images])
    reconstruct_blocks(model, [images], steps=5)
    with disable_quantization(model), torch.no_grad():
        assert torch.equal(model(images), expected)
    restore_modules(model)
    assert_equal(model.state_dict(), before)


def test_ranges_come_back_before_a_new_calibration(net, images):
    before = list_state(net)
    reconstruct_blocks(net, [images], steps=10)
    learned = list_state(net)
    assert not torch.equal(
        learned["blocks.0.first._input_quantizer._amax"],
        before["blocks.0.first._input_quantizer._amax"],
    )
    copied = copy.deepcopy(net)
    calibrate_model(copied, [images], method="max")  # the same ranges, so the same reconstruction
    assert_equal(copied.state_dict(), learned)
    with pytest.raises(ArgumentError):
        round_weights(net, [images], outputs={"a": "absent"})
    assert_equal(net.state_dict(), learned)
    assert [entry.name for entry in list_passes(net)] == ["reconstruct_blocks"]
    net.head._input_quantizer.disable()
    net.head._weight_quantizer.disable()
    with pytest.raises(ArgumentError):
        reconstruct_blocks(net, [images], outputs={"a": "absent"})
    assert_equal(net.state_dict(), learned)


def test_the_order_of_the_passes_does_not_matter(net, images):
    steps = {
        "round": lambda model: round_weights(model, [images]),
        "blocks": lambda model: reconstruct_blocks(model, [images], steps=5),
        "bias": lambda model: correct_bias(model, [images]),
    }
    states = []
    for order in (
        ["round", "blocks", "bias"],
        ["bias", "blocks", "round"],
        ["blocks", "bias", "round"],
    ):
        model = copy.deepcopy(net)
        for name in order:
            steps[name](model)
        states.append(model.state_dict())
    for state in states[1:]:
        assert_equal(state, states[0])


def test_rounding_starts_from_the_codes_of_adaround(net, images, monkeypatch):
    round_weights(net, [images])
    rounded = list_state(net)
    firsts = []
    monkeypatch.setattr(
        blocks._Search,
        "run",
        lambda self, *_: firsts.extend(
            (name, layer.codes.harden() * layer._scale) for name, layer in self._layers.items()
        ),
    )
    reconstruct_blocks(net, [images])
    assert len(firsts) == 6
    for name, weight in firsts:
        torch.testing.assert_close(weight, rounded[f"{name}.weight"])


class Pair(nn.Module):
    """Two weights that are added up: their errors meet in the output only."""

    def __init__(self):
        super().__init__()
        self.down = nn.Linear(2, 2, bias=False)
        self.up = nn.Linear(2, 1, bias=False)

    def forward(self, x):
        return self.up(self.down(x))


def test_rounding_together_finds_the_best_codes():
    model = nn.Sequential(Pair())
    pair = model[0]
    with torch.no_grad():
        pair.down.weight.copy_(torch.tensor([[3.0, 1.45], [3.0, 1.3]]))
        pair.up.weight.copy_(torch.tensor([[3.0, 3.0]]))
    x = torch.randn(64, 2)
    x[:, 1] -= (
        x[:, 0] * (x[:, 0] @ x[:, 1]) / x[:, 0].square().sum()
    )  # no help from the first input
    quantize(model, x, bits=3)  # codes -3 to 3, steps of 1
    for layer in (pair.down, pair.up):
        layer._input_quantizer.disable_quant()
    expected = x.double() @ torch.tensor([[18.0], [8.25]], dtype=torch.float64)

    def measure(output):
        residual = output.double() - expected
        return float((residual - residual.mean(0)).square().mean())

    errors = {}
    for codes in itertools.product([1.0, 2.0], [1.0, 2.0]):
        errors[codes] = measure(x.double() @ torch.tensor([[18.0], [3 * sum(codes)]]).double())
    with torch.no_grad():
        assert measure(model(x)) == pytest.approx(errors[1.0, 1.0])
        alone = copy.deepcopy(model)
        round_weights(alone, [x])
        assert measure(alone(x)) == pytest.approx(errors[1.0, 1.0])
        reconstruct_blocks(model, [x])
        assert measure(model(x)) == pytest.approx(min(errors.values()))
    assert errors[1.0, 1.0] > 5 * min(errors.values())


def test_keywords_dictionaries_and_several_outputs(encoder):
    model, states = encoder
    report = reconstruct_blocks(model, [states], steps=100)
    assert [block.block for block in report.blocks] == ["layers.0", "layers.1"]
    assert [block.layers for block in report.blocks] == [
        (f"layers.{index}.qkv", f"layers.{index}.out") for index in range(2)
    ]
    assert all(block.after < block.before for block in report.blocks)
    assert set(report.outputs) == {"output_0", "output_1"}
    assert all(after > before for before, after in report.outputs.values())


def test_the_same_seed_gives_the_same_model_and_leaves_random_numbers_alone(net, images):
    twin = copy.deepcopy(net)
    state = torch.get_rng_state()
    reconstruct_blocks(net, [images], steps=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    reconstruct_blocks(twin, [images], steps=5)
    assert_equal(net.state_dict(), twin.state_dict())
    other = copy.deepcopy(twin)
    reconstruct_blocks(other, [images], steps=5, seed=1)
    assert not torch.equal(other.blocks[0].first.weight, twin.blocks[0].first.weight)


class Fan(nn.Module):
    """Two blocks that read one tensor, which has one range."""

    def __init__(self):
        super().__init__()
        self.branches = nn.ModuleList(
            [nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)) for _ in range(2)]
        )

    def forward(self, x):
        return self.branches[0](x) + self.branches[1](x)


def test_a_range_that_two_blocks_share_stays():
    x = torch.randn(512, 8)
    model = quantize(Fan(), x)
    shared = model.branches[1][0]._input_quantizer
    assert shared.leader is model.branches[0][0]._input_quantizer.leader
    before = list_state(model)
    report = reconstruct_blocks(model, [x], steps=100)
    assert [block.block for block in report.blocks] == ["branches.0", "branches.1"]
    changed = {name for name, tensor in list_state(model).items() if (tensor != before[name]).any()}
    assert "branches.0.0._input_quantizer._amax" in before
    assert "branches.0.0._input_quantizer._amax" not in changed
    assert "branches.0.2._input_quantizer._amax" in changed


def test_interrupt_keeps_what_is_done(net, images, monkeypatch, caplog):
    logging.getLogger("qdq").setLevel(logging.WARNING)
    finished = copy.deepcopy(net)
    reconstruct_blocks(finished, [images], steps=5)
    store, calls = blocks._Search.store, []

    def interrupted(self):
        store(self)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    before = list_state(net)
    monkeypatch.setattr(blocks._Search, "store", interrupted)
    with pytest.raises(KeyboardInterrupt):
        reconstruct_blocks(net, [images], steps=5)
    assert "2 of 4 blocks are reconstructed" in caplog.text
    done, expected = list_state(net), list_state(finished)
    for name, tensor in done.items():
        source = expected if name.startswith(("stem", "blocks.0")) else before
        assert torch.equal(tensor, source[name])
    monkeypatch.undo()
    assert all(not module._forward_pre_hooks for module in net.modules())
    calibrate_model(net, [images], method="max")
    assert_equal(net.state_dict(), expected)


class Repeated(nn.Module):
    """A block that runs twice with other layers, one with the samples second, and a layer that runs twice."""

    def __init__(self):
        super().__init__()
        self.parts = nn.ModuleList([nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])])
        self.turned = nn.ModuleList([nn.Sequential(nn.Linear(8, 8), nn.ReLU())])
        self.twice = nn.Linear(8, 8)

    def forward(self, x):
        x = self.parts[0][1](self.parts[0][0](x).relu())
        x = self.turned[0](x.transpose(0, 1)).transpose(0, 1)
        return self.twice(self.twice(x).relu())


def test_layers_without_a_block_are_learned_by_themselves():
    x = torch.randn(16, 3, 8)
    model = quantize(Repeated(), x)
    rows = reconstruct_blocks(model, [x], steps=20).blocks
    notes = {row.block: row.reason for row in rows}
    assert notes.pop("twice") == "it runs 2 times in one forward"
    assert math.isnan(rows[-1].before)
    assert list(notes) == ["parts.0.0", "parts.0.1", "turned.0.0"]
    assert "parts.0 runs 0 times" in notes["parts.0.0"]
    assert "its inputs or outputs" not in notes["parts.0.1"]


def test_errors_that_a_clamp_hides_count_little():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())
    x = torch.randn(64, 8)
    quantize(model, x)
    with disable_quantization(model):
        expected = model[0](x).detach().double()
    actual = model[0](x).detach().double()
    weight = ((expected > 0) | (actual > 0)).double().clamp_min(0.01)[48:]
    squares = (actual - expected).square()[48:]
    by_hand = float((weight * squares).sum() / weight.sum() / expected.var(correction=0))
    (row,) = reconstruct_blocks(model, [x], steps=1).blocks
    assert row.before == pytest.approx(by_hand, rel=1e-4)


def test_wrong_arguments(net, images):
    with pytest.raises(DataError, match="4 or more"):
        reconstruct_blocks(net, [images[:3]])
    for options in ({"steps": 0}, {"batch_size": 1.5}, {"drop": 1.5}):
        with pytest.raises(ArgumentError, match=next(iter(options))):
            reconstruct_blocks(net, [images], **options)
    with pytest.raises(ArgumentError, match="no module stem"):
        reconstruct_blocks(net, [images], reference=nn.Identity())
    with torch.inference_mode(), pytest.raises(qdq.StateError, match="inference_mode"):
        reconstruct_blocks(net, [images])


def test_the_gpu_learns_too(net, images, gpu):
    report = reconstruct_blocks(net.to(gpu), [images], steps=5)
    assert report.after_db > report.before_db - 0.5
    assert all(tensor.device.type == gpu.type for tensor in net.state_dict().values())


def test_a_hook_of_a_single_layer_runs_once():
    """`smooth_inputs` multiplies in a hook: the search must see the input before it, and not multiply again."""
    layer = nn.Linear(12, 6)
    images = torch.randn(64, 12)
    plain = quantize(nn.Sequential(layer), images)
    hooked = copy.deepcopy(plain)
    weight = hooked[0].weight
    with torch.no_grad():
        weight.div_(2)
    for quantizer in hooked[0].quantizers().values():
        factor = 2 if quantizer is hooked[0].input_quantizer else 0.5
        quantizer.amax = quantizer.amax * factor
    hooked[0].register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    rows = [reconstruct_blocks(model, [images], steps=2).blocks[0] for model in (plain, hooked)]
    assert rows[1].before == pytest.approx(rows[0].before, rel=1e-3)
