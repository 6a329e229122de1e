"""Binary networks: their layers, training with clipped weights, and the weights that replace the float ones."""

import copy

import pytest
import torch
from small_task import make_batches, make_net, make_trained, measure_accuracy, train
from torch import nn

import qdq
from qdq import systems
from qdq.errors import ArgumentError
from qdq.systems.grid import find_grid


def test_the_state_dict_keeps_the_float_weights():
    net = make_net()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    selection = systems.binarize_model(net, make_batches()[0])
    assert list(selection.layers) == ["3", "6"]
    assert list(selection.float_layers) == ["0", "9"]
    state = net.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], tensor) for name, tensor in before.items())


def test_replaced_weights_are_the_binary_ones():
    net = make_net().eval()
    points = make_batches()[0][0]
    systems.binarize_model(net, points, inputs=True)
    expected = net(points)
    latent = net[3].weight.detach().clone()
    systems.replace_weights(net)
    assert torch.equal(net(points), expected)
    assert torch.equal(net[3].weight, torch.where(latent >= 0, 1.0, -1.0))
    assert find_grid(net[3], "weight").highest == 1
    with torch.no_grad():
        copied = copy.deepcopy(net)(points)
    assert torch.equal(copied, expected)


def test_weights_are_clipped_after_each_step_and_nothing_else_is():
    net = make_net()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.mul_(100).add_(3)
    systems.binarize_model(net, make_batches()[0])
    optimizer = torch.optim.SGD(net.parameters(), 1e-6)
    other = nn.Parameter(torch.tensor([5.0]))
    with systems.clipping_weights(net):
        net(make_batches()[0][0]).sum().backward()
        optimizer.step()
        other.grad = torch.ones(1)
        torch.optim.SGD([other], 1e-6).step()
    largest = {name: float(tensor.detach().abs().max()) for name, tensor in net.named_parameters()}
    assert {name for name, value in largest.items() if value <= 1} == {"3.weight", "6.weight"}
    assert float(other.detach()) > 4
    with torch.no_grad():
        net[3].weight.mul_(9)
    optimizer.step()  # outside of the block
    assert float(net[3].weight.detach().abs().max()) > 5


def test_training_reaches_nearly_the_float_accuracy():
    net = make_trained()
    before = measure_accuracy(net)
    train("binary", net, epochs=20)
    assert measure_accuracy(net) > before - 0.1
    assert float(net[3].weight.detach().abs().max()) <= 1


def test_signs_are_drawn_in_steps_of_finetune_and_not_in_its_metric():
    def tune(sampling):
        net = make_net()
        systems.binarize_model(net, make_batches()[0], sampling=sampling)
        metrics = []

        def metric(model):
            outputs = [model(make_batches()[0][0]) for _ in range(2)]
            metrics.append(bool(torch.equal(*outputs)))
            return 0.0

        with systems.clipping_weights(net):
            tuning = qdq.finetune(
                net,
                make_batches(),
                loss=qdq.cross_entropy,
                distillation=None,
                ranges="none",
                schedule=qdq.Schedule(steps=3),
                metric=metric,
            )
        assert all(metrics)
        return tuning.losses

    assert tune("hard") == tune("hard")
    assert tune("hard") != tune("")


def test_inputs_of_one_sign_are_refused_and_nothing_changes():
    net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    points = make_batches()[0]
    with pytest.raises(ArgumentError, match="all inputs of 2 have the same sign, as behind a ReLU"):
        systems.binarize_model(net, points, inputs=True)
    assert type(net[2]) is nn.Linear
    # Here the sign of 0 is -1, so that both signs occur.
    assert list(systems.binarize_model(net, points, inputs=True, zero=-1).layers) == ["2"]
    with pytest.raises(ArgumentError, match="zero is 0"):
        systems.binarize_model(net, points, zero=0)
