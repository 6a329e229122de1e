"""LAPQ on a small network: where it starts, what it leaves, what it prints, and that it can be stopped."""

import json
import logging
import re
import signal
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import search_task
import torch
from search_task import make_batches, make_net, make_quantizer, run_lapq
from torch import nn

from qdq.analyze.journal import Journal
from qdq.distiller.search.lapq import ptq_coordinate_search
from qdq.distiller.search.search_options import LapqOptions
from qdq.distiller.statistics.two_passes import collect_quant_stats
from qdq.errors import ArgumentError, StateError

GOLDEN = Path(__file__).parents[1] / "data" / "golden" / "distiller_logs_files.json"


def measure(model):
    """The loss of all samples at once, as torch computes it."""
    images, labels = (torch.cat(parts) for parts in zip(*make_batches(), strict=True))
    with torch.no_grad():
        return float(nn.functional.cross_entropy(model(images), labels))


def start_params(quantizer, **options):
    """The parameters where the search starts: its first evaluation is there."""
    return run_lapq(quantizer, maxfev=1, **options).parameters


def solved_params(clip, **arguments):
    """The parameters of the quantizer itself, with a clip mode for outputs and weights."""
    net, batches = make_net(), make_batches()
    quantizer = make_quantizer(
        net,
        clip_acts=clip,
        also_clip_weights=True,
        save_fp_weights=True,
        model_activation_stats=collect_quant_stats(net, batches),
        **arguments,
    )
    quantizer.prepare_model(batches[0])
    return quantizer.linear_quant_params


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"init_mode": "L1"},
        {"search_clipping": True, "method": "COBYLA"},
        {"basinhopping": True, "basinhopping_niter": 2, "maxfev": 150},
    ],
)
def test_the_loss_falls_and_the_model_is_left_at_the_best_point(options):
    quantizer = make_quantizer(per_channel_wts="search_clipping" in options)
    result = run_lapq(quantizer, **options)
    assert result.loss < result.start_loss
    assert measure(quantizer.model) == pytest.approx(result.loss, rel=1e-5)
    for name, value in quantizer.linear_quant_params.items():
        assert torch.equal(value, result.parameters[name])
        assert not name.endswith("_scale") or bool((value > 0).all())


@pytest.mark.parametrize("mode", ["NONE", "AVG", "LAPLACE", "GAUSS"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_clip_mode_is_the_start_whatever_the_user_has_set(mode, per_channel):
    overrides = OrderedDict({"conv.*": {"clip_acts": "N_STD", "clip_n_stds": 1.0}})
    quantizer = make_quantizer(clip_acts="AVG", overrides=overrides, per_channel_wts=per_channel)
    params = start_params(quantizer, init_mode=mode)
    expected = solved_params(mode, per_channel_wts=per_channel)
    assert params.keys() == expected.keys()
    for name, value in params.items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize(("mode", "power"), [("L1", 1), ("L2", 2), ("L3", 3)])
def test_the_error_of_a_layer_is_as_small_as_brute_force_finds_it(mode, power):
    """A sum has one scale: all of them are tried here, in numpy."""
    params = start_params(make_quantizer(), init_mode=mode)
    net = make_net()
    sums = []
    net.add.register_forward_hook(lambda *call: sums.append(call[-1]))
    with torch.no_grad():
        net(make_batches()[0][0])
    exact = sums[0].relu().double().numpy()

    def error(scale):
        rounded = np.clip(np.rint(exact * scale), -4, 3) / scale
        return np.mean(np.abs(exact - rounded) ** power)

    start = float(solved_params("NONE")["add.output_scale"])
    best = min(map(error, start * np.geomspace(0.25, 8, 2000)))
    reached = error(float(params["add.output_scale"]))
    assert reached <= 1.02 * best
    assert reached < 0.9 * error(start)


def test_layers_with_weights_start_with_less_error():
    """Output and weight of a convolution together, against those that cover the whole ranges."""
    images = make_batches()[0][0]
    outputs = []
    net = make_net()
    net.bn1.register_forward_hook(lambda *call: outputs.append(call[-1].relu()))
    with torch.no_grad():
        net(images)
    factor = net.bn1.weight.detach() / (net.bn1.running_var + net.bn1.eps).sqrt()
    weight = net.conv1.weight.detach() * factor[:, None, None, None]
    bias = net.bn1.bias.detach() - net.bn1.running_mean * factor

    def error(params):
        scale = params["conv1.w_scale"]
        rounded_weight = (weight * scale).round().clamp(-4, 3) / scale
        output = nn.functional.conv2d(images, rounded_weight, bias, padding=1).relu()
        scale = params["conv1.output_scale"]
        return float(((output * scale).round().clamp(-4, 3) / scale - outputs[0]).pow(2).mean())

    assert error(start_params(make_quantizer(), init_mode="L2")) < 0.8 * error(
        solved_params("NONE")
    )


@pytest.mark.parametrize(
    ("mode", "text"),
    [
        (
            {"activations": "ASYMMETRIC_UNSIGNED", "weights": "SYMMETRIC"},
            r"in the output of conv2 \(ASYMMETRIC_UNSIGNED\), output of fc \(",
        ),
        (
            {"activations": "SYMMETRIC", "weights": "ASYMMETRIC_SIGNED"},
            r"weight of conv1 \(ASYMMETRIC_SIGNED\), weight of conv2",
        ),
    ],
)
def test_moving_zero_points_need_ranges(mode, text):
    with pytest.raises(ArgumentError, match=text) as caught:
        run_lapq(make_quantizer(mode=mode))
    assert isinstance(caught.value, ValueError)
    quantizer = make_quantizer(mode=mode)
    result = run_lapq(quantizer, search_clipping=True)
    assert result.loss < result.start_loss
    if mode["activations"] != "SYMMETRIC":
        assert result.parameters["conv1.output_zero_point"] == 0  # behind a ReLU the lower end is 0


def test_statistics_of_the_user_are_used():
    net = make_net()
    statistics = collect_quant_stats(net, [make_batches()[0][0] / 4])
    given = start_params(make_quantizer(net, model_activation_stats=statistics))
    collected = start_params(make_quantizer())
    assert given["conv1.output_scale"] > collected["conv1.output_scale"]
    assert given["conv1.w_scale"] == collected["conv1.w_scale"]


def test_a_quantized_model_and_one_without_codes_are_refused():
    quantizer = make_quantizer()
    run_lapq(quantizer, maxfev=1)
    with pytest.raises(StateError, match="quantized already"):
        run_lapq(quantizer)
    with pytest.raises(ArgumentError, match="no layer has a scale"):
        run_lapq(make_quantizer(bits=None))


def test_a_killed_search_goes_on_to_the_same_bits(tmp_path, processes):
    process = processes.start(search_task.__file__, "lapq", tmp_path, 30)
    assert process.wait() == -signal.SIGKILL
    path = tmp_path / "lapq.jsonl"
    assert len(path.read_text().splitlines()) == 29
    resumed = run_lapq(path=path, init_mode="L2")
    uninterrupted = run_lapq(init_mode="L2")
    assert resumed.loss == uninterrupted.loss
    assert resumed.evaluations == uninterrupted.evaluations
    for name, value in uninterrupted.parameters.items():
        assert torch.equal(resumed.parameters[name], value)


def test_ctrl_c_leaves_the_best_point_in_the_model_and_in_the_journal(tmp_path, monkeypatch):
    path = tmp_path / "lapq.jsonl"
    losses = {}
    add = Journal.add

    def stop(journal, key, value):
        add(journal, key, value)
        losses[tuple(key)] = value
        if len(losses) == 40:
            raise KeyboardInterrupt

    monkeypatch.setattr(Journal, "add", stop)
    quantizer = make_quantizer()
    with pytest.raises(KeyboardInterrupt):
        run_lapq(quantizer, path=path)
    best = min(losses.values())
    assert list(losses.values()).index(best) < 39
    assert measure(quantizer.model) == pytest.approx(best, rel=1e-5)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert min(line["value"] for line in lines) == best


def is_of_search(record):
    return record.name in ("qdq.distiller.search.lapq", "qdq.distiller.search.search_log")


def make_pattern(text):
    """The regular expression of a format in the list."""
    text = (
        text.replace("\\t", "\t").replace('\\"', '"').replace("<name> = {:.3f}, ...", "<results>")
    )
    pattern = re.escape(text)
    for field, expression in (
        ("%d", r"\d+"),
        (re.escape("%.3f"), r"-?\d+\.\d{3}"),
        ("%s", r"\w+"),
        (re.escape("{}"), ".+"),
        (re.escape("<results>"), r"\w+ = \d+\.\d{3}(, \w+ = \d+\.\d{3})*"),
    ):
        pattern = pattern.replace(field, expression)
    return pattern


def test_the_lines_are_those_of_distiller(caplog):
    """Each line has a format of the list, in the order of a run."""
    cases = json.loads(GOLDEN.read_text())["cases"]
    formats = [case["format"] for case in cases if case["kind"] == "lapq"]
    quantizer = make_quantizer()
    batches = make_batches()
    with caplog.at_level(logging.INFO, "qdq.distiller"):
        result = ptq_coordinate_search(
            quantizer,
            batches[0],
            batches,
            LapqOptions(maxiter=1),
            test=lambda model: {"Top1": 12.3456, "Loss": measure(model)},
        )
    lines = [record.getMessage() for record in caplog.records if is_of_search(record)]
    patterns = [make_pattern(text) for text in formats]
    for line in lines:
        assert any(re.fullmatch(pattern, line) for pattern in patterns), line
    for pattern in patterns:
        assert any(re.fullmatch(pattern, line) for line in lines), pattern
    assert lines[:6] == [
        "Initializing quantizer...",
        "Initializing quantization parameters...",
        "Evaluating initial quantization score...",
        f"Evaluation set loss after initialization {result.start_loss:.3f}",
        "Evaluating on full test set...",
        f"Test: Top1 = 12.346, Loss = {result.start_loss:.3f}",
    ]
    assert lines[6] == 'Using "Powell" minimization algorithm.'
    assert lines[7].startswith("20 evaluations: loss=")
    assert lines[8].startswith("40 evaluations: loss=")
    iteration = lines.index(f"Iteration 1: \t Score={result.loss:.3f}")
    assert lines[iteration + 1] == "Saving current best quantization parameters."
    assert lines[-5:-3] == ["Optimization done", f"Best score: {result.loss}"]
    assert lines[-3].startswith("Best Configuration: {'conv1.output_scale': ")
    assert lines[-2:] == [
        "Evaluating on full test set...",
        f"Test: Top1 = 12.346, Loss = {result.loss:.3f}",
    ]


def test_a_gpu_finds_the_same(gpu):
    """The pretended device computes as the CPU does, a real one nearly so."""
    on_cpu = run_lapq(maxfev=30, init_mode="L2")
    on_gpu = run_lapq(make_quantizer(make_net().to(gpu)), maxfev=30, init_mode="L2")
    assert on_gpu.parameters["conv1.w_scale"].device == gpu
    assert on_gpu.start_loss == pytest.approx(on_cpu.start_loss, rel=0.02)
    assert on_gpu.loss < on_gpu.start_loss
