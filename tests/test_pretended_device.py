"""The device on which the tests of GPUs run without one keeps the rules of CUDA, and catches planted faults."""

import copy

import pretended_device
import pytest
import torch
from pretended_device import list_waits, watch
from torch import nn

from qdq.observers import collector


@pytest.fixture
def pretended(gpu):
    if gpu.type != pretended_device.NAME:
        pytest.skip("this machine has a GPU; nothing is pretended")
    return gpu


def test_tensors_of_two_devices_do_not_meet(gpu):
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device=gpu) + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        torch.nn.functional.conv2d(torch.ones(1, 1, 3, 3, device=gpu), torch.ones(1, 1, 1, 1))


def test_copies_and_waits_are_told(gpu):
    values = torch.ones(3, device=gpu)
    with watch(gpu) as events:
        total = values.sum()
    assert list_waits(events) == []
    with watch(gpu) as events:
        total.item()
        values.cpu()
        torch.tensor([1.0, 2.0], device=gpu)
        values[values > 0]
    assert len(list_waits(events)) >= 4


def test_division_by_a_number_multiplies_by_the_reciprocal(pretended):
    values = torch.rand(1000)
    moved = values.to(pretended)
    product = values * torch.tensor(127.0).reciprocal()
    assert not torch.equal(product, values / 127)
    assert torch.equal((moved / 127).cpu(), product)
    assert torch.equal(moved.div_(127).cpu(), product)
    by_tensor = values.to(pretended) / torch.full_like(moved, 127)
    assert torch.equal(by_tensor.cpu(), values / 127)


@pytest.mark.parametrize("is_allowed", [True, False])
def test_convolutions_round_to_tf32_if_cudnn_may(pretended, is_allowed, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", is_allowed)
    conv = nn.Conv2d(3, 8, 3)
    images = torch.randn(2, 3, 9, 9)
    exact = conv(images)
    error = (conv.to(pretended)(images.to(pretended)).cpu() - exact).abs().max()
    assert (error > 1e-5) == is_allowed
    assert error < 1e-2


def test_a_histogram_of_floats_is_not_deterministic(gpu):
    torch.use_deterministic_algorithms(True)
    try:
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.histc(torch.rand(100, device=gpu), 10, 0, 1)
        counts = torch.histc(torch.arange(100, device=gpu).int(), 10, 0, 100)
    finally:
        torch.use_deterministic_algorithms(False)
    assert counts.tolist() == [10] * 10


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_a_recurrent_layer_equals_the_one_of_the_cpu(gpu, kind):
    layer = kind(4, 5, batch_first=True).eval()
    sequence = torch.randn(2, 6, 4)
    with torch.no_grad():
        expected, _ = layer(sequence)
        outputs, _ = layer.to(gpu)(sequence.to(gpu))
    torch.testing.assert_close(outputs.cpu(), expected, atol=1e-4, rtol=1e-4)


def test_a_recurrent_layer_has_the_gradients_of_the_one_of_the_cpu(gpu):
    gradients = []
    for device in (torch.device("cpu"), gpu):
        torch.manual_seed(0)
        layer = nn.LSTM(4, 5, num_layers=2, batch_first=True).to(device)
        outputs, (_, cell) = layer(torch.randn(2, 6, 4).to(device))
        (outputs.square().sum() + cell.sum()).backward()
        gradients.append([parameter.grad.cpu() for parameter in layer.parameters()])
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_a_wait_in_the_collector_is_told_with_its_line(gpu, monkeypatch):
    summarize = collector.summarize

    def summarize_and_wait(*args):
        summary = summarize(*args)
        summary.sums.max().item()
        return summary

    monkeypatch.setattr(collector, "summarize", summarize_and_wait)
    planted = collector.TensorCollector()
    batch = torch.rand(8, device=gpu)
    with watch(gpu) as events:
        planted.collect(batch)
    assert any("qdq/observers/collector.py" in line for line in list_waits(events))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_recurrent_layers_have_the_gradients_of_the_cpu(pretended, kind, bias):
    layer, steps = kind(3, 4, bias=bias), torch.randn(5, 2, 3, requires_grad=True)
    twin, moved = copy.deepcopy(layer).to(pretended), steps.detach().to(pretended).requires_grad_()
    weights = torch.randn(5, 2, 4)
    (layer(steps)[0] * weights).sum().backward()
    (twin(moved)[0] * weights.to(pretended)).sum().backward()
    torch.testing.assert_close(moved.grad.cpu(), steps.grad)
    for parameter, moved_parameter in zip(layer.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(moved_parameter.grad.cpu(), parameter.grad)
