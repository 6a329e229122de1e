"""The analysis of a model whose outputs differ in scale: no sum over them decides."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from two_heads import TwoHeads, db

from qdq import (
    ArgumentError,
    DataError,
    StateError,
    analyze_layers,
    calibrate_model,
    predict,
    swap_modules,
)
from qdq.analyze.sensitivity import METRICS, collect, count_columns, reduce_rows
from qdq.outputs import OutputView
from qdq.quantizer import disable_quantization
from qdq.swap import restore_modules

LAYERS = {"stem", "middle", "boxes", "scores"}


@pytest.fixture
def batches():
    return [torch.randn(4, 3, 8, 8), torch.randn(4, 3, 8, 8)]


@pytest.fixture
def heads(batches):
    """The boxes have no large error; the scores have, in the layer that computes them."""
    model = TwoHeads().eval()
    with torch.no_grad():
        model.scores.weight[:, 0] = 20.0
        model.middle.bias[0] = -10.0  # never on, so only the scale of the scores' weight suffers
    swap_modules(model, batches[0], include=["*"])
    calibrate_model(model, batches, method="max")
    return model


def measure(model, batches):
    """SQNR of each output of a model in its current state, by numpy."""
    with disable_quantization(model):
        expected = predict(model, batches)
    outputs = predict(model, batches)
    return {name: db(expected[name], outputs[name]) for name in expected}


@pytest.mark.parametrize("mode", ["one-at-a-time", "leave-one-out"])
def test_the_worst_output_is_the_figure_of_every_unit(heads, batches, mode):
    analysis = analyze_layers(heads, batches, mode=mode)
    assert analysis.outputs == pytest.approx(measure(heads, batches))
    assert analysis.sqnr_db == min(analysis.outputs.values()) == analysis.outputs["scores"]
    with disable_quantization(heads):
        floats = predict(heads, batches)
    for layer in analysis.layers:
        twin = copy.deepcopy(heads)
        switched = LAYERS - {layer.name} if mode == "one-at-a-time" else {layer.name}
        for name in switched:
            restore_modules(twin.get_submodule(name))
        outputs = predict(twin, batches)
        expected = {name: db(floats[name], outputs[name]) for name in floats}
        assert layer.outputs == pytest.approx(expected)
        assert layer.sqnr_db == pytest.approx(min(expected.values()))


@pytest.mark.parametrize("mode", ["one-at-a-time", "leave-one-out"])
@pytest.mark.parametrize("confirm", [None, 1])
def test_the_worst_output_drives_the_choice(heads, batches, mode, confirm):
    """A sum of squares sees the boxes only, which are a thousand times as large."""
    analysis = analyze_layers(heads, batches, mode=mode, confirm=confirm, max_float_layers=1)
    assert analysis.layers[0].name == "scores"
    assert [step.layer for step in analysis.steps] == ["scores"]
    (step,) = analysis.steps
    assert step.outputs == pytest.approx(measure(heads, batches))
    assert step.outputs["scores"] > analysis.outputs["scores"] + 5


def test_weights_drive_the_choice(heads, batches):
    analysis = analyze_layers(heads, batches, weights={"boxes": 1.0}, max_float_layers=1)
    assert analysis.sqnr_db == pytest.approx(analysis.outputs["boxes"])
    assert analysis.layers[-1].name == "scores"  # it does not touch the boxes
    assert analysis.steps[0].layer != "scores"


def test_weights_of_all(heads, batches):
    analysis = analyze_layers(heads, batches, weights={"boxes": 3, "scores": 1})
    ratios = {name: 10 ** (-decibels / 10) for name, decibels in analysis.outputs.items()}
    expected = -10 * np.log10((3 * ratios["boxes"] + ratios["scores"]) / 4)
    assert analysis.sqnr_db == pytest.approx(expected)


def test_gain_is_the_rise_of_the_worst(heads, batches):
    analysis = analyze_layers(heads, batches)
    gains = {layer.name: layer.gain for layer in analysis.layers}
    assert gains["boxes"] == pytest.approx(0, abs=1e-9)  # the scores are worst with or without it
    assert gains["scores"] > 5
    for layer in analysis.layers:
        assert layer.gain_low <= layer.gain_high


def test_the_estimate_is_of_relative_noise(heads, batches):
    analysis = analyze_layers(heads, batches, confirm=0)
    exact = analyze_layers(heads, batches)
    estimated = {layer.name: layer.sqnr_db for layer in analysis.layers}
    for layer in exact.layers:
        if layer.name in ("scores", "boxes"):  # one output each
            assert estimated[layer.name] == pytest.approx(layer.sqnr_db, abs=4)


def test_parts(heads, batches):
    parts = {
        "x": lambda outputs: outputs["boxes"][:, :2],
        "all scores": "scores",
    }
    analysis = analyze_layers(heads, batches, outputs=parts)
    assert list(analysis.outputs) == ["x", "all scores"]
    only = analyze_layers(heads, batches, outputs={"boxes": "boxes"})
    assert only.outputs == {}
    assert only.sqnr_db == pytest.approx(measure(heads, batches)["boxes"])
    hits = analyze_layers(heads, batches, outputs={"scores": "scores"}, metric="kl")
    assert hits.layers[0].name == "scores"


def test_metrics_of_several_outputs(heads, batches):
    analysis = analyze_layers(heads, batches, metric="cosine")
    with disable_quantization(heads):
        expected = predict(heads, batches)
    outputs = predict(heads, batches)
    cosines = []
    for name in expected:
        first, second = np.float64(expected[name]).ravel(), np.float64(outputs[name]).ravel()
        cosines.append(first @ second / np.linalg.norm(first) / np.linalg.norm(second))
    assert analysis.metric == pytest.approx(min(cosines))


def test_table_has_the_outputs(heads, batches):
    lines = analyze_layers(heads, batches, max_float_layers=1).format_table().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("SQNR dB of each output"))
    assert lines[start].split()[-2:] == ["boxes", "scores"]
    table = lines[start + 1 :]
    assert table[0].split()[0] == "scores"
    assert table[4].startswith("all layers in int8")
    assert table[5].startswith("+ scores in float")


def test_a_journal_is_for_its_outputs(heads, batches, tmp_path):
    path = tmp_path / "journal.jsonl"
    first = analyze_layers(heads, batches, path=path)
    size = path.stat().st_size
    assert analyze_layers(heads, batches, path=path) == first
    assert path.stat().st_size == size
    boxes = analyze_layers(heads, batches, path=path, outputs={"boxes": "boxes"})
    assert boxes.sqnr_db == pytest.approx(first.outputs["boxes"])


def test_names_that_do_not_exist(heads, batches):
    with pytest.raises(ArgumentError, match="weights names logits; the outputs are boxes, scores"):
        analyze_layers(heads, batches, weights={"logits": 1})
    with pytest.raises(ArgumentError, match="outputs names logits"):
        analyze_layers(heads, batches, outputs={"logits": "logits"})
    with pytest.raises(StateError, match="no floating-point tensor"):
        analyze_layers(
            heads, batches, outputs={"best": lambda outputs: outputs["scores"].argmax(1)}
        )


def test_batches_with_other_outputs_are_refused(heads, batches):
    model = TwoHeads(lambda boxes, scores: {"a": scores} if len(scores) > 1 else {"b": scores})
    swap_modules(model.eval(), batches[0], include=["*"])
    calibrate_model(model, batches, method="max")
    with pytest.raises(DataError, match=r"returns \['b'\] for a batch, and \['a'\]"):
        analyze_layers(model, [batches[0], batches[1][:1]])


class Tagger(nn.Module):
    """Token scores, which are garbage at padding."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, states, attention_mask):
        scores = self.head(self.layer(states).relu())
        return scores.masked_fill(attention_mask[..., None] == 0, float("nan"))


def test_padding_is_in_no_figure():
    lengths = torch.tensor([6, 2, 1])
    mask = (torch.arange(6) < lengths[:, None]).long()
    batch = {"states": torch.randn(3, 6, 8), "attention_mask": mask}
    model = Tagger().eval()
    swap_modules(model, batch, include=["*"])
    calibrate_model(model, [batch], method="max")
    with pytest.raises(StateError, match="NaN"):
        analyze_layers(model, [batch])
    for metric in (None, "cosine", "kl"):
        analysis = analyze_layers(model, [batch], metric=metric, mask="attention_mask")
        with disable_quantization(model):
            expected = np.float64(predict(model, [batch], mask="attention_mask"))
        outputs = np.float64(predict(model, [batch], mask="attention_mask"))
        assert analysis.sqnr_db == pytest.approx(db(expected, outputs))
        if metric == "kl":
            logs = [x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (expected, outputs)]
            divergence = (np.exp(logs[0]) * (logs[0] - logs[1])).sum(1).mean()
            assert analysis.metric == pytest.approx(divergence)
    screened = analyze_layers(model, [batch], confirm=1, mask="attention_mask")
    assert all(np.isfinite(layer.sqnr_db) for layer in screened.layers)


@pytest.mark.parametrize("name", METRICS)
def test_columns_of_two_outputs(name):
    reference = {"boxes": 1000 * torch.randn(6, 4), "scores": torch.randn(6, 5)}
    outputs = {key: value + 0.1 for key, value in reference.items()}
    batch = (torch.zeros(6, 3), torch.arange(6) % 4)
    rows = collect(METRICS[name], batch, reference, outputs)
    assert rows.shape == (6, count_columns(METRICS[name], 2))
    sqnr, _ = reduce_rows(METRICS[name], rows)
    assert sqnr == pytest.approx(db(reference["scores"], outputs["scores"]))


def test_an_output_that_is_always_zero_does_not_decide(batches):
    reference = {"zeros": torch.zeros(6, 4), "scores": torch.randn(6, 5)}
    outputs = {key: value + 0.1 for key, value in reference.items()}
    rows = collect(METRICS["sqnr"], torch.zeros(6, 3), reference, outputs, OutputView())
    expected = db(reference["scores"], outputs["scores"])
    assert reduce_rows(METRICS["sqnr"], rows)[0] == pytest.approx(expected)
