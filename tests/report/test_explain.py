"""`qdq explain`: all of a record in words, and names that are not there."""

import json
import os
import subprocess
import sys

import pytest
from made_report import make_report

from qdq import ArgumentError, explain_layer
from qdq.cli.main import main
from qdq.report.load import load_report


@pytest.mark.trt
def test_the_text_holds_the_record(finished):
    folder, _ = finished
    for layer in load_report(folder).layers:
        explanation = explain_layer(folder, layer.name)
        assert explanation.layer == layer
        assert explanation.text.splitlines()[0] == f"{layer.name} ({layer.kind})"
        assert layer.reason in explanation.text
        assert all(kernel in explanation.text for kernel in layer.kernels)
        for tensor in layer.tensors:
            assert tensor.quantizer in explanation.text
            for method, choice in tensor.methods.items():
                assert (
                    f"by {method}" in explanation.text and f"{choice.amax:.5g}" in explanation.text
                )
        for neighbour, precision in explanation.neighbours.items():
            assert f"{neighbour} ({precision})" in explanation.text
        assert "None" not in explanation.text and "nan" not in explanation.text
    assert "same range as" not in explain_layer(folder, "head").text.lower()
    assert (
        "No ranges: it was given no quantizers: excluded by 'head'"
        in explain_layer(folder, "head").text
    )
    assert "the input of the network" in explain_layer(folder, "stem").text
    assert "an output of the network" in explain_layer(folder, "head").text


def test_misspelt_names_get_suggestions(store):
    folder = store(make_report(["layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "fc"]))
    with pytest.raises(
        ArgumentError,
        match=r"no layer 'layer1.0.conv'.*did you mean layer1.0.conv1, layer1.0.conv2",
    ):
        explain_layer(folder, "layer1.0.conv")
    with pytest.raises(ArgumentError, match="did you mean fc"):
        explain_layer(folder, "FC")
    with pytest.raises(ArgumentError, match=r"report.html in the run folder lists all layers"):
        explain_layer(folder, "zzzzzz")
    with pytest.raises(ArgumentError, match="no layer ''"):
        explain_layer(folder, "")


def test_a_module_that_cannot_be_int8(store):
    norm = {
        "name": "norm",
        "type": "LayerNorm",
        "action": "float",
        "reason": "no int8 counterpart (R-LN)",
    }
    folder = store(make_report(["a"], swap={"modules": [norm]}))
    with pytest.raises(
        ArgumentError,
        match=r"norm is a LayerNorm that cannot be int8: no int8 counterpart \(R-LN\)",
    ):
        explain_layer(folder, "norm")


def test_names_reach_no_terminal_as_they_are(store):
    name = "a\x1b[31m\nb"
    text = explain_layer(store(make_report([name, "c"])), name).text
    assert text.startswith("a\\x1b[31m\\nb (Conv2d)\n  Runs in")
    assert "\x1b" not in text and "\n  Feeds                  c (int8)" in text


def test_neighbours_with_commas_in_their_names(store):
    names = ["a, b", "b", "c"]
    report = make_report(names, float_layers=["a, b"])
    report["layers"][1]["reads_input"] = True
    text = explain_layer(store(report), "b").text
    assert "  Reads                  the input of the network, a, b (float)\n" in text


def test_metric_cost_and_group(store):
    report = make_report(["b2.a", "b2.b", "c"])
    report["analysis"] |= {"metric_name": "kl"}
    for layer in report["layers"][:2]:
        layer["sensitivity"] |= {"unit": "group b2.*", "layers": ["b2.a", "b2.b"], "rank": 1}
        layer["sensitivity"] |= {"metric": 0.125, "cost": 3.5, "gain": 0.5}
    folder = store(report)
    lines = [" ".join(line.split()) for line in explain_layer(folder, "b2.b").text.splitlines()]
    assert (
        "Gain in float 0.5 nats (95 % interval 1.2 to 1.8); rank 1 of 3, measured, in the group b2.* of 2 layers"
        in lines
    )
    assert "Cost in float 3.5 microseconds more than in int8" in lines
    assert "Outputs in that state 0.125 nats, SQNR 38.50 dB" in lines
    assert "Cost in float" not in explain_layer(folder, "c").text
    report["layers"][2]["sensitivity"]["gain"] = None
    assert "not finite; rank 3 of 3, measured" in explain_layer(store(report, "infinite"), "c").text


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code, *capsys.readouterr()


def test_command(store, tmp_path, capsys):
    folder = store(make_report(["a", "b"]))
    code, out, _ = call(capsys, "explain", folder, "b", "--json", tmp_path / "b.json")
    assert code == 0 and out.startswith("b (Conv2d)\n")
    written = json.loads((tmp_path / "b.json").read_text())
    assert written["layer"]["name"] == "b" and written["neighbours"] == {"a": "int8"}
    code, _, errors = call(capsys, "explain", folder, "c")
    assert code == 2 and len(errors.splitlines()) == 2
    code, _, errors = call(capsys, "explain", tmp_path / "nowhere", "c")
    assert code == 2 and "there is no" in errors


@pytest.mark.skipif(sys.platform == "win32", reason="needs pipes as POSIX has them")
def test_who_reads_may_have_enough(store):
    """As `qdq explain ... | head -0`."""
    folder = store(make_report(["a"]))
    script = f"from qdq.cli.main import main; main(['explain', {str(folder)!r}, 'a'])"
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb") as closed:
        process = subprocess.run(
            [sys.executable, "-c", script], stdout=closed, stderr=subprocess.PIPE, check=False
        )
    assert (process.returncode, process.stderr) == (141, b"")


@pytest.mark.parametrize("verb", ["explain", "report"])
def test_commands_need_no_torch(store, verb):
    folder = store(make_report(["a", "b"]))
    arguments = [verb, str(folder), *(["a"] if verb == "explain" else [])]
    script = (
        "import sys\nfrom qdq.cli.main import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as exit: print('code', exit.code)\n"
        "print([name for name in ('torch', 'torchvision', 'onnx_ir', 'onnxruntime') if name in sys.modules])"
    )
    output = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert output.splitlines()[-2:] == ["code 0", "[]"]
