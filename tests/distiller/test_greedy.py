"""Greedy search: against trials made by hand, and what its files give back."""

import copy
import json
import signal
from collections import OrderedDict

import pytest
import search_task
import torch
import yaml
from search_task import Net, make_batches, make_net, make_quantizer, run_greedy
from torch import nn

from qdq.analyze.journal import Journal
from qdq.distiller.files.config import read_post_training
from qdq.distiller.search.greedy import ptq_greedy_search
from qdq.distiller.statistics.statistics_file import read_statistics
from qdq.distiller.statistics.two_passes import collect_quant_stats
from qdq.errors import StateError

LAYERS = ["conv1", "conv2", "add", "fc"]
CLIPS = ["NONE", "AVG", "GAUSS", "LAPLACE"]
FLOAT = {"bits_activations": None, "bits_weights": None}


def measure(model):
    """The loss of all samples at once, as torch computes it."""
    images, labels = (torch.cat(parts) for parts in zip(*make_batches(), strict=True))
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(images), labels))


def quantize(clips, statistics):
    """The network with some layers in a clip mode and the others in float."""
    overrides = OrderedDict()
    for name in LAYERS:
        overrides[name] = {"clip_acts": clips[name]} if name in clips else FLOAT
    for relu, layer in {"relu1": "conv1", "relu2": "add"}.items():
        if layer not in clips:
            overrides[relu] = FLOAT
    quantizer = make_quantizer(overrides=overrides, model_activation_stats=statistics)
    quantizer.prepare_model(make_batches()[0])
    return quantizer.model


def test_every_choice_is_the_best_of_all_trials(tmp_path):
    """Layer by layer with the statistics of the result, which those of earlier trials equal up to their layer."""
    result = run_greedy(tmp_path)
    assert list(result.choices) == LAYERS
    statistics = read_statistics(result.statistics)
    decided = {}
    for name in LAYERS:
        losses = {clip: measure(quantize({**decided, name: clip}, statistics)) for clip in CLIPS}
        assert losses[result.choices[name]] == pytest.approx(min(losses.values()), abs=1e-6)
        decided[name] = result.choices[name]
    assert len(set(result.choices.values())) > 1
    assert result.loss == pytest.approx(losses[result.choices["fc"]], abs=1e-6)
    nothing_clipped = dict.fromkeys(LAYERS, "NONE")
    assert result.loss < measure(
        quantize(nothing_clipped, collect_quant_stats(make_net(), make_batches()))
    )


def test_statistics_are_those_behind_the_quantized_layers(tmp_path):
    result = run_greedy(tmp_path)
    statistics = read_statistics(result.statistics)
    of_float = collect_quant_stats(make_net(), make_batches())
    assert statistics["conv1"] == of_float["conv1"]

    first_quantized = quantize({"conv1": result.choices["conv1"]}, of_float)
    outputs = []
    first_quantized.conv2.register_forward_hook(lambda *call: outputs.append(call[-1]))
    measure(first_quantized)
    record = statistics["conv2"].output
    assert record.max == pytest.approx(float(outputs[0].max()), rel=1e-6)
    assert record.std == pytest.approx(float(outputs[0].std(correction=0)), rel=1e-4)
    assert record.max != of_float["conv2"].output.max


def test_the_files_give_the_same_loss_again(tmp_path):
    overrides = OrderedDict({"fc": {"bits_weights": 8}, "conv.": {"bits_activations": 4}})
    net = make_net()
    quantizer = make_quantizer(net, mode="ASYMMETRIC_UNSIGNED", overrides=overrides)
    result = run_greedy(tmp_path, quantizer)
    assert measure(net) == pytest.approx(result.loss, abs=1e-6)
    section = yaml.safe_load(result.config.read_text())["quantizers"]["post_train_quantizer"]
    assert section["overrides"]["fc"] == {"bits_weights": 8, "clip_acts": result.choices["fc"]}
    assert section["overrides"]["conv2"]["bits_activations"] == 4

    again = read_post_training(result.config).build(make_net())
    again.prepare_model(make_batches()[0])
    assert measure(again.model) == measure(net)
    for name, value in quantizer.linear_quant_params.items():
        assert torch.equal(again.linear_quant_params[name], value)


class Saturating(Net):
    """A Tanh and a Softmax behind the first convolution."""

    def __init__(self):
        super().__init__()
        self.tanh = nn.Tanh()
        self.softmax = nn.Softmax(1)

    def forward(self, images):
        x = self.tanh(self.relu1(self.bn1(self.conv1(images))))
        return self.fc(self.softmax(x).mean((2, 3)))


def test_tanh_may_run_in_half_precision_and_softmax_stays_float(tmp_path):
    torch.manual_seed(0)
    net = Saturating().eval()
    result = run_greedy(tmp_path, make_quantizer(copy.deepcopy(net)))
    assert list(result.choices) == ["conv1", "tanh", "softmax", "fc"]
    assert result.choices["softmax"] == "float"
    keys = [json.loads(line)["key"] for line in (tmp_path / "greedy_journal.jsonl").open()]
    tried = [key[2] for key in keys if key[:2] == ["loss", "tanh"]]
    assert tried == [*CLIPS, "fp16"]
    again = read_post_training(result.config).build(net)
    again.prepare_model(make_batches()[0])
    assert measure(again.model) == pytest.approx(result.loss, abs=1e-6)


def test_a_killed_search_goes_on_to_the_same_files(tmp_path, processes):
    folders = [tmp_path / name for name in ("killed", "uninterrupted")]
    process = processes.start(search_task.__file__, "greedy", folders[0], 8)
    assert process.wait() == -signal.SIGKILL
    results = [run_greedy(folder) for folder in folders]
    assert results[0].loss == results[1].loss
    assert results[0].choices == results[1].choices
    assert results[0].statistics.read_bytes() == results[1].statistics.read_bytes()
    texts = [result.config.read_text() for result in results]
    assert texts[0].replace(str(folders[0]), str(folders[1])) == texts[1]


def test_nothing_is_measured_twice(tmp_path, monkeypatch):
    first = run_greedy(tmp_path)

    def refuse(*_):
        raise AssertionError("measured again")

    monkeypatch.setattr(Journal, "add", refuse)
    assert run_greedy(tmp_path) == first
    with pytest.raises(AssertionError, match="measured again"):
        run_greedy(tmp_path, make_quantizer(bits=5))


def test_what_cannot_be_searched_is_refused(tmp_path):
    with pytest.raises(StateError, match="quantizes no layer"):
        run_greedy(tmp_path, make_quantizer(bits=None))
    quantizer = make_quantizer()
    run_greedy(tmp_path, quantizer)
    batches = make_batches()
    with pytest.raises(StateError, match="quantized already"):
        ptq_greedy_search(quantizer, batches[0], batches, tmp_path)
