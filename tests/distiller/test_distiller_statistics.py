"""Statistics in two passes against Distiller's cases, as they should be, and against numpy in float64."""

import json
import logging
from pathlib import Path

import numpy as np
import pretended_device
import pytest
import torch
from torch import nn

from qdq.distiller import PostTrainLinearQuantizer
from qdq.distiller.statistics.collector import StatisticsCollector
from qdq.distiller.statistics.statistics_file import plain_layer
from qdq.distiller.statistics.two_passes import collect_quant_stats
from qdq.errors import QdqError, StateError

GOLDEN = Path(__file__).parents[1] / "data" / "golden"
CASES = json.loads((GOLDEN / "distiller_statistics.json").read_text())["cases"]


def measure(batches):
    """The record of a tensor, from all its values at once."""
    arrays = [np.asarray(batch, np.float64) for batch in batches]
    samples = np.concatenate(arrays)
    flat = samples.reshape(len(samples), -1)
    if flat.shape[1] == 1:
        sizes = [len(array) for array in arrays]
        avg_min = np.average([array.min() for array in arrays], weights=sizes)
        avg_max = np.average([array.max() for array in arrays], weights=sizes)
    else:
        avg_min, avg_max = flat.min(1).mean(), flat.max(1).mean()
    return {
        "min": flat.min(),
        "max": flat.max(),
        "avg_min": avg_min,
        "avg_max": avg_max,
        "mean": flat.mean(),
        "std": flat.std(),
        "b": np.abs(flat - flat.mean()).mean(),
        "shape": str(arrays[0].shape),
        "total_numel": flat.size,
    }


def assert_record(record, batches, rel=1e-6):
    expected = measure(batches)
    assert record.shape == expected["shape"]
    for key, value in expected.items():
        if key != "shape":
            assert getattr(record, key) == pytest.approx(value, rel=rel, abs=rel), key


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_records_of_the_published_cases(case):
    model = nn.Sequential()
    model.add_module("a", nn.ReLU())
    batches = [torch.tensor(batch) for batch in case["batches"]]
    layer = collect_quant_stats(model, batches)["a"]
    content = plain_layer(layer)
    reference = case["reference"]["a"]
    assert list(content["output"]) == list(reference["output"])
    assert list(content["inputs"]) == [0]
    for key, value in case["truth"].items():
        assert content["inputs"][0][key] == pytest.approx(value, rel=1e-4, abs=1e-5), key
    # The source is right in all but the two means of extremes.
    for key in content["output"].keys() - {"avg_min", "avg_max"}:
        for record, expected in [
            (content["output"], reference["output"]),
            (content["inputs"][0], reference["inputs"]["0"]),
        ]:
            approximate = key != "shape"
            value = pytest.approx(expected[key], rel=1e-4) if approximate else expected[key]
            assert record[key] == value, key
    assert_record(layer.output, [batch.relu() for batch in batches])


class Residual(nn.Module):
    """Layers with several inputs, inputs that are no floats, in-place layers and one that is used twice."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 6)
        self.first = nn.Linear(6, 6)
        self.relu = nn.ReLU(inplace=True)
        self.drop = nn.Dropout(inplace=True)
        self.same = nn.Identity()
        self.join = nn.Bilinear(6, 6, 3)
        self.unused = nn.Linear(6, 6)

    def forward(self, codes):
        embedded = self.embed(codes)
        hidden = self.drop(self.relu(self.first(embedded)))
        hidden = self.same(self.relu(hidden - 0.25))
        return self.join(hidden, embedded)


def run_residual(model, batches):
    """Every tensor of the layers of `Residual`, computed in float64 without in-place layers."""
    model = model.double()
    tensors = {name: [] for name in ("embedded", "first", "relu", "second", "hidden", "output")}
    for codes in batches:
        embedded = model.embed(codes)
        first = model.first(embedded)
        relu = first.relu()
        second = relu - 0.25
        hidden = second.relu()
        for name, tensor in {
            "embedded": embedded,
            "first": first,
            "relu": relu,
            "second": second,
            "hidden": hidden,
            "output": model.join(hidden, embedded),
        }.items():
            tensors[name].append(tensor.detach().numpy())
    return tensors


def make_residual():
    torch.manual_seed(0)
    batches = [torch.randint(0, 9, (size, 5)) for size in (4, 4, 2)]
    return Residual(), batches


def assert_residual(statistics, tensors):
    assert list(statistics) == ["embed", "first", "relu", "drop", "same", "join"]
    assert statistics["embed"].inputs == {}
    assert_record(statistics["embed"].output, tensors["embedded"])
    assert_record(statistics["first"].inputs[0], tensors["embedded"])
    assert_record(statistics["first"].output, tensors["first"])
    calls = [
        part for pair in zip(tensors["first"], tensors["second"], strict=True) for part in pair
    ]
    assert_record(statistics["relu"].inputs[0], calls)
    assert_record(statistics["drop"].output, tensors["relu"])
    assert_record(statistics["join"].inputs[0], tensors["hidden"])
    assert_record(statistics["join"].inputs[1], tensors["embedded"])
    assert_record(statistics["join"].output, tensors["output"])


def test_all_layers_of_a_model_against_numpy():
    model, batches = make_residual()
    model.train()
    statistics = collect_quant_stats(model, batches)
    assert model.training
    assert model.relu.inplace
    assert model.drop.inplace
    assert not model.first._forward_hooks
    assert_residual(statistics, run_residual(model, batches))


def test_samples_count_alike_in_a_smaller_last_batch():
    batches = [torch.zeros(3, 2), torch.ones(1, 2)]
    record = collect_quant_stats(nn.Sequential(nn.ReLU()), batches)["0"].output
    assert (record.avg_min, record.avg_max) == (0.25, 0.25)
    scalars = collect_quant_stats(nn.Sequential(nn.ReLU()), [batch[:, :1] for batch in batches])
    assert (scalars["0"].output.avg_min, scalars["0"].output.avg_max) == (0.25, 0.25)


def test_large_offsets_keep_their_deviation():
    torch.manual_seed(1)
    batches = [1000 + torch.randn(4, 50_000) for _ in range(3)]
    record = collect_quant_stats(nn.Sequential(nn.Identity()), batches)["0"].output
    expected = measure(batches)
    for key in ("mean", "std", "b"):
        assert getattr(record, key) == pytest.approx(expected[key], rel=1e-5), key


def test_half_types_are_measured_in_float32():
    values = torch.full((2, 60_000), 4.0, dtype=torch.float16)
    record = collect_quant_stats(nn.Sequential(nn.ReLU()), [values])["0"].output
    assert (record.mean, record.std) == (4.0, 0.0)  # the sum is infinite in float16


def test_many_batches_and_reused_memory():
    shared = torch.empty(2, 3)
    view = shared.numpy()

    class Reused:
        def __iter__(self):
            for number in range(150):
                view[:] = number  # numpy does not tell torch
                yield shared

    record = collect_quant_stats(nn.Sequential(nn.ReLU()), Reused())["0"].output
    assert (record.min, record.max, record.mean) == (0, 149, 74.5)
    assert record.std == pytest.approx(np.arange(150).std())


def test_the_user_may_run_the_passes(caplog):
    model, batches = make_residual()
    collector = StatisticsCollector(model)
    with pytest.raises(RuntimeError, match="needs the means of the first") as caught:
        collector.second_pass().__enter__()
    assert isinstance(caught.value, QdqError)
    for collecting in (collector.first_pass, collector.second_pass):
        with pytest.raises(RuntimeError, match="have not had their second pass"):
            collector.statistics()
        with collecting():
            for batch in batches:
                model(batch)
    assert_residual(collector.statistics(), run_residual(model, batches))


def test_both_passes_are_logged(caplog):
    with caplog.at_level(logging.INFO, "qdq"):
        collect_quant_stats(nn.Sequential(nn.ReLU()), [torch.ones(1, 2)] * 3, num_batches=2)
    assert caplog.messages == [
        "Pass 1: Collecting min, max, avg_min, avg_max, mean",
        "Pass 2: Collecting b, std parameters",
    ]


class AddsInPlace(nn.Module):
    def forward(self, values):
        return values.add_(1)


class ReturnsInput(nn.Module):
    def forward(self, values):
        return values


def test_a_layer_that_works_in_place_is_refused():
    model = nn.Sequential(nn.ReLU(), AddsInPlace())
    with pytest.raises(RuntimeError, match="1, a AddsInPlace, changes its input in place"):
        collect_quant_stats(model, [torch.ones(1, 2)])
    assert not model[0]._forward_hooks
    with torch.inference_mode():
        inputs = torch.ones(1, 2)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="in place"):
        collect_quant_stats(nn.Sequential(AddsInPlace()), [inputs])


def test_a_layer_that_passes_its_input_on_is_none():
    statistics = collect_quant_stats(nn.Sequential(ReturnsInput()), [torch.ones(1, 2)])
    assert statistics["0"].output == statistics["0"].inputs[0]


def test_replicas_are_refused():
    model = nn.Sequential(nn.DataParallel(nn.ReLU()))
    with pytest.raises(NotImplementedError, match="each replica sees a part"):
        collect_quant_stats(model, [torch.ones(1, 2)])


def test_the_prefix_of_another_wrapper_is_left_out():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.Sequential(nn.ReLU())

        def forward(self, values):
            return self.module(values)

    assert list(collect_quant_stats(Wrapper(), [torch.ones(1, 2)])) == ["0"]


@pytest.mark.parametrize(
    ("batches", "error", "text"),
    [
        (iter([torch.ones(1, 2)]), TypeError, "can be read once"),
        (torch.ones(1, 2), TypeError, r"pass \[batch\]"),
        ([], ValueError, "no layer of the model ran"),
        ([torch.ones(1, 2), torch.tensor([[1.0, float("nan")]])], ValueError, "in call 2 of 2"),
        ([torch.full((1, 2), float("inf"))], ValueError, "input 0 of 0: there is NaN or Inf"),
    ],
)
def test_data_without_statistics(batches, error, text):
    with pytest.raises(error, match=text) as caught:
        collect_quant_stats(nn.Sequential(nn.ReLU()), batches)
    assert isinstance(caught.value, QdqError)


def test_other_data_in_the_second_pass_is_refused():
    class Shrinking:
        size = 3

        def __iter__(self):
            self.size -= 1
            yield torch.ones(self.size, 2)

    with pytest.raises(ValueError, match="has 2 values in pass 2; it had 4 in pass 1"):
        collect_quant_stats(nn.Sequential(nn.ReLU()), Shrinking())


@pytest.mark.parametrize("num_batches", [0, -1])
def test_the_number_of_batches_is_checked(num_batches):
    with pytest.raises(ValueError, match=f"num_batches is {num_batches}"):
        collect_quant_stats(nn.Sequential(nn.ReLU()), [torch.ones(1, 2)], num_batches=num_batches)


@pytest.mark.gpu
def test_a_gpu_is_waited_for_once_a_pass(gpu):
    model, batches = make_residual()
    expected = run_residual(model, batches)
    model.float().to(gpu)
    on_gpu = [batch.to(gpu) for batch in batches]
    with pretended_device.watch(gpu) as events:
        statistics = collect_quant_stats(model, on_gpu)
    waits = [event for event in events if event.waits]
    assert len(waits) == 2, waits
    assert_residual(statistics, expected)


def test_a_quantized_model_is_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    batch = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    statistics = collect_quant_stats(model, [batch])
    PostTrainLinearQuantizer(model, model_activation_stats=statistics).prepare_model(batch)
    with pytest.raises(StateError, match="the model is quantized: 0 is a RangeLinearQuantParam"):
        collect_quant_stats(model, [batch])
