"""Simulated folding of BatchNorm: against BatchNorm itself, and one layer at the end."""

import copy

import pytest
import torch
from golden import read_cases
from torch import nn

import qdq
from qdq.distiller import (
    QuantAwareTrainRangeLinearQuantizer,
    SimulatedFoldedBatchNorm,
    find_folded_pairs,
    fold_simulated_batchnorm,
    simulate_folding,
)
from qdq.errors import ArgumentError, ExportError
from qdq.systems import to_tensorrt
from qdq.systems.layer import SystemLayer

PAIRS = [
    (nn.Linear(6, 4), nn.BatchNorm1d(4), (16, 6)),
    (nn.Conv1d(3, 4, 3, bias=False), nn.BatchNorm1d(4), (8, 3, 9)),
    (nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), nn.BatchNorm2d(4), (4, 3, 6, 6)),
    (nn.Conv3d(3, 4, 2, bias=False), nn.BatchNorm3d(4, affine=False), (2, 3, 4, 4, 4)),
]


def make_pair(pair):
    """A layer and a BatchNorm with statistics that are not those of the data."""
    layer, bn, shape = copy.deepcopy(pair)
    generator = torch.Generator().manual_seed(0)
    bn.running_mean.normal_(generator=generator)
    bn.running_var.uniform_(0.5, 2, generator=generator)
    if bn.affine:
        nn.init.uniform_(bn.weight, 0.5, 2)
        nn.init.normal_(bn.bias)
    return layer, bn, torch.randn(shape, generator=generator) + 0.3


@pytest.mark.parametrize("pair", PAIRS)
def test_without_a_quantizer_it_is_batchnorm(pair):
    """Outputs, gradients and statistics, in training and in evaluation."""
    layer, bn, values = make_pair(pair)
    folded = SimulatedFoldedBatchNorm(copy.deepcopy(layer), copy.deepcopy(bn))
    for _ in range(3):
        expected, result = bn(layer(values)), folded(values)
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
        layer.zero_grad()
        folded.zero_grad()
        weights = torch.linspace(-1, 1, expected.numel()).reshape(expected.shape)
        (expected * weights).sum().backward()
        (result * weights).sum().backward()
        torch.testing.assert_close(
            folded.param_module.weight.grad, layer.weight.grad, rtol=1e-3, atol=1e-4
        )
        torch.testing.assert_close(folded.bn.running_mean, bn.running_mean)
        torch.testing.assert_close(folded.bn.running_var, bn.running_var)
    expected, result = bn.eval()(layer(values)), folded.eval()(values)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_one_layer_computes_the_same(pair):
    layer, bn, values = make_pair(pair)
    model = nn.Sequential(layer, bn).eval()
    pairs = find_folded_pairs(model, values)
    assert pairs == {"0": "1"}
    simulate_folding(model, pairs)
    expected = model(values)
    assert fold_simulated_batchnorm(model) == ["0"]
    assert type(model[0]) is type(layer)
    assert type(model[1]) is nn.Identity
    torch.testing.assert_close(model(values), expected, rtol=1e-5, atol=1e-5)


def test_statistics_stay_after_the_delay():
    layer, bn, values = make_pair(PAIRS[0])
    bn.num_batches_tracked.fill_(1000)  # of the training before
    folded = SimulatedFoldedBatchNorm(layer, bn, freeze_bn_delay=2).train()
    means = []
    for _ in range(4):
        output = folded(values)
        means.append(bn.running_mean.clone())
    assert not torch.equal(means[0], means[1])
    assert torch.equal(means[1], means[3])
    assert folded.is_frozen
    assert torch.equal(output, folded.eval()(values))
    output.sum().backward()
    assert layer.weight.grad.abs().max() > 0


def test_codes_do_not_follow_the_batch():
    """The weight is quantized with the running deviation; the output has that of the batch."""
    quantizer = make_quantizer(4)
    folded = quantizer.model[0].train()
    system = folded.param_module.weight_system
    weights = []
    system.register_forward_hook(lambda _, inputs, output: weights.append(output.detach()))
    for scale in (0.1, 1.0, 10.0):
        folded.bn.running_var.fill_(1.0)
        folded.bn.momentum = 1e-9
        folded(torch.randn(16, 3, 6, 6) * scale)
    torch.testing.assert_close(weights[0], weights[1])
    torch.testing.assert_close(weights[0], weights[2])


def make_quantizer(num_bits=8, delay=1000):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    )
    quantizer = QuantAwareTrainRangeLinearQuantizer(
        net,
        torch.optim.SGD(net.parameters(), lr=0.05),
        bits_activations=num_bits,
        bits_weights=num_bits,
        per_channel_wts=True,
        freeze_bn_delay=delay,
    )
    quantizer.prepare_model(torch.randn(2, 3, 8, 8))
    return quantizer


def test_training_with_folding_and_its_export(tmp_path):
    quantizer = make_quantizer(delay=3)
    net = quantizer.model.train()
    images = torch.randn(8, 3, 8, 8)
    for _ in range(5):
        quantizer.optimizer.zero_grad()
        (net(images) - 0.5).square().mean().backward()
        quantizer.optimizer.step()
    net.eval()
    with torch.no_grad():
        expected = net(images)
        with pytest.raises(ExportError, match=r"fold_simulated_batchnorm\(model\) is called"):
            to_tensorrt(net)
        assert fold_simulated_batchnorm(net) == ["0", "3"]
        assert isinstance(net[0], SystemLayer)
        torch.testing.assert_close(net(images), expected, rtol=1e-5, atol=1e-5)
        transfer = to_tensorrt(net)
        verdicts = {tensor.verdict for layer in transfer.layers for tensor in layer.tensors}
        assert verdicts == {"exact"}
        assert qdq.metrics.sqnr_db(expected.numpy(), net(images).numpy()) > 40


def test_finetune_moves_the_statistics():
    quantizer = make_quantizer()
    net = quantizer.model
    before = net[0].bn.running_mean.clone()
    from qdq.systems import moving_ranges

    with moving_ranges(net):
        qdq.finetune(
            net,
            [torch.randn(8, 3, 8, 8)],
            loss=lambda outputs, _: outputs.square().mean(),
            distillation=None,
            ranges="none",
            schedule=qdq.Schedule(steps=4, tune_batchnorm=0.5),
        )
    assert not torch.equal(net[0].bn.running_mean, before)
    assert net[0].bn.num_batches_tracked == 2


def test_folding_needs_a_batch():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    quantizer = QuantAwareTrainRangeLinearQuantizer(
        net, torch.optim.SGD(net.parameters()), 8, 8, freeze_bn_delay=5
    )
    with pytest.raises(ArgumentError, match="no dummy_input"):
        quantizer.prepare_model()
    assert type(net[0]) is nn.Conv2d


MISFITS = [
    (nn.ReLU(), nn.BatchNorm1d(4)),
    (nn.Conv1d(3, 4, 1), nn.ReLU()),
    (nn.Conv1d(3, 4, 1), nn.BatchNorm2d(4)),
    (nn.Conv2d(3, 4, 1), nn.BatchNorm3d(4)),
    (nn.Conv3d(3, 4, 1), nn.BatchNorm2d(4)),
    (nn.Linear(3, 4), nn.BatchNorm2d(4)),
]


@pytest.mark.parametrize(("layer", "bn"), MISFITS)
def test_golden_pairs_that_do_not_fit(layer, bn):
    golden = {case["when"]: case["error"] for case in read_cases("distiller_errors")}
    situation = next(text for text in golden if text.startswith("SimulatedFoldedBatchNorm"))
    assert golden[situation] == "TypeError"
    with pytest.raises(TypeError, match="cannot be folded; expected Linear"):
        SimulatedFoldedBatchNorm(layer, bn)


@pytest.mark.parametrize(
    ("bn", "reason"),
    [
        (nn.BatchNorm2d(5), "has 5 channels, the layer before it 4"),
        (nn.BatchNorm2d(4, track_running_stats=False), "no running statistics"),
    ],
)
def test_other_batchnorms_are_refused(bn, reason):
    with pytest.raises(ArgumentError, match=reason):
        SimulatedFoldedBatchNorm(nn.Conv2d(3, 4, 1), bn)
