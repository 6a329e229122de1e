"""What one forward is said to have done, on modules small enough to know it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qdq.batch import floats_of, tensors_of
from qdq.errors import DataError
from qdq.forward import call_model, evaluating, trace_forward


def test_chain():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1))
    trace = trace_forward(model, torch.randn(1, 3, 4, 4))
    assert trace.calls == {"": 1, "0": 1, "1": 1, "2": 1, "3": 1}
    assert [(c.module, c.function) for c in trace.contractions] == [
        ("0", "conv2d"),
        ("3", "conv2d"),
    ]
    assert trace.only_reader == {"0": "1", "1": "2", "2": "3"}


def test_contraction_knows_its_weight():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    first, second = trace_forward(model, torch.randn(1, 3)).contractions
    assert model[0].weight.untyped_storage().data_ptr() in first.storages
    assert model[1].weight.untyped_storage().data_ptr() in second.storages
    assert model[1].weight.untyped_storage().data_ptr() not in first.storages


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.second = nn.Linear(3, 3)


class Shortcut(Pair):
    def forward(self, x):
        y = self.first(x)
        return self.second(y) + y


def test_output_with_two_readers_has_no_only_reader():
    assert trace_forward(Shortcut(), torch.randn(1, 3)).only_reader == {}


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.layer(self.layer(x)))


def test_module_that_runs_twice():
    trace = trace_forward(Twice(), torch.randn(2, 3))
    assert trace.calls["layer"] == 2
    assert "layer" not in trace.only_reader


class Returned(Pair):
    def forward(self, x):
        y = self.first(x)
        return {"features": y, "logits": self.second(y)}


def test_output_that_is_returned_too_has_no_only_reader():
    assert trace_forward(Returned(), torch.randn(1, 3)).only_reader == {}


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.unused = nn.Linear(1, 1)

    def forward(self, x):
        y = F.linear(x, self.weight)
        return torch.softmax(y @ y.T, -1)


def test_plain_functions_are_contractions_of_the_module_around():
    trace = trace_forward(nn.Sequential(Functional()), torch.randn(2, 3))
    assert [c.module for c in trace.contractions] == ["0", "0"]
    assert trace.contractions[0].function == "linear"
    assert "matmul" in trace.contractions[1].function
    assert trace.calls["0.unused"] == 0


def test_reading_the_shape_is_no_reading_of_values():
    class Flattened(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(3, 3)
            self.second = nn.Linear(3, 3)

        def forward(self, x):
            y = self.first(x)
            assert y.shape[0] == 2
            assert y.dim() == 2
            return self.second(y)

    assert trace_forward(Flattened(), torch.randn(2, 3)).only_reader == {"first": "second"}


def test_leaves_model_and_hooks_as_they_were():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5)).train()
    model[1].eval()
    mean = model[0].running_mean.clone()
    trace_forward(model, torch.randn(4, 3))
    assert (model.training, model[0].training, model[1].training) == (True, True, False)
    assert torch.equal(model[0].running_mean, mean)

    class Broken(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        trace_forward(Broken(), torch.zeros(1))
    assert not nn.modules.module._global_forward_hooks
    assert not nn.modules.module._global_forward_pre_hooks
    assert not nn.modules.module._global_forward_hooks_with_kwargs


def test_call_model_takes_what_loaders_yield():
    class Model(nn.Module):
        def forward(self, x, factor=1):
            return x * factor

    x = torch.ones(2)
    assert torch.equal(call_model(Model(), x), x)
    assert torch.equal(call_model(Model(), (x, "labels")), x)
    assert torch.equal(call_model(Model(), [x, "labels"]), x)
    assert torch.equal(call_model(Model(), {"x": x, "factor": 3}), 3 * x)


class Hidden:
    """An object that qdq does not look into."""

    def __init__(self, images):
        self.images = images


class Opening(nn.Module):
    """Reads a tensor in an object."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, hidden):
        return self.layer(hidden.images)


class Constant(nn.Module):
    """Makes a constant on the CPU."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, images):
        return self.layer(images) + torch.ones(5)


@pytest.mark.parametrize(
    "layer", [nn.Linear(5, 5), nn.Conv2d(3, 4, 1), nn.LSTM(5, 5), nn.BatchNorm2d(3)]
)
@pytest.mark.parametrize("swapped", [False, True])
def test_tensors_of_two_devices_are_an_error_with_a_fix(layer, swapped, gpu):
    images = torch.randn(2, 3, 5, 5)[:, :, 0 if isinstance(layer, nn.LSTM) else slice(None)]
    places = (torch.device("cpu"), gpu) if swapped else (gpu, torch.device("cpu"))
    model = Opening(layer).to(places[0]).eval()
    with pytest.raises(
        DataError, match=f"the model is on {places[0]}, and a function in it"
    ) as caught:
        call_model(model, Hidden(images.to(places[1])))
    assert "lists, tuples and dictionaries" in caught.value.fix


def test_a_constant_of_the_cpu_is_an_error_with_a_fix(gpu):
    with pytest.raises(DataError, match="gets tensors of another device") as caught:
        call_model(Constant(nn.Linear(5, 5)).to(gpu), torch.randn(2, 5))
    assert "keep constants of the model in buffers" in caught.value.fix


def test_other_errors_of_a_model_stay(device):
    with pytest.raises(RuntimeError, match="should be the same"):
        call_model(nn.Conv2d(3, 4, 1).to(device), torch.randn(2, 3, 5, 5, dtype=torch.float64))


def test_a_model_without_values_cannot_run():
    model = nn.Linear(3, 2, device="meta")
    with pytest.raises(DataError, match="its parameters have no values"):
        call_model(model, torch.ones(1, 3))
    assert call_model(model, torch.ones(1, 3, device="meta")).is_meta


def test_evaluating_puts_the_flags_back_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Dropout().eval())
    block = evaluating(model)
    block.__enter__()
    assert not model[0].training
    assert not torch.is_grad_enabled()
    assert not block.__exit__(ValueError, ValueError("inside"), None)
    assert (model[0].training, model[1].training) == (True, False)
    assert torch.is_grad_enabled()


def test_tensors_of_a_tree_in_order():
    integers, half, number = (
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.float16),
        torch.zeros(()),
    )
    tree = {"a": [integers, (half, "text", None)], "b": 1.0, "c": number}
    assert [id(tensor) for tensor in tensors_of(tree)] == [id(integers), id(half), id(number)]
    assert [id(tensor) for tensor in floats_of(tree)] == [id(half), id(number)]
    assert tensors_of(None) == floats_of(integers) == []
