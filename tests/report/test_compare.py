"""Runs side by side: what differs, and nothing else."""

import json

import pytest
from made_report import make_report

from qdq import ArgumentError, compare_runs
from qdq.cli.main import main
from qdq.report.compare import render_comparison
from qdq.report.load import load_report

NAMES = [f"l{number}" for number in range(20)]


@pytest.fixture
def runs(store):
    """The second run has another seed of its ranges' methods, one other range, one other precision, one more layer."""
    first = make_report(NAMES, float_layers=["l0"])
    second = make_report(
        [*NAMES, "more"], float_layers=["l0", "l3"], settings={"model": "made", "exclude": ["x"]}
    )
    second["layers"][5]["tensors"][0]["amax"] *= 1.5
    second["layers"][6]["tensors"][0]["amax"] *= 1.005  # within the tolerance
    second["summary"]["candidates"]["ONNX"]["sqnr_db"] = 24.0
    return [store(first, "first"), store(second, "second")]


def test_what_differs(runs):
    comparison = compare_runs(runs)
    assert comparison.runs == ("first", "second")
    assert {layer.name: layer.precisions for layer in comparison.layers} == {
        "l3": ("int8", "float"),
        "l5": ("int8", "int8"),
        "more": (None, "int8"),
    }
    ranges = {layer.name: layer.ranges for layer in comparison.layers}
    assert ranges["l5"] == (7.0, 10.5)
    assert ranges["more"] == (None, 22.0)
    assert {setting.name: setting.values for setting in comparison.settings} == {
        "exclude": ([], ["x"])
    }
    figures = {figure.label: figure for figure in comparison.figures}
    assert figures["SQNR of the outputs, dB"].values == (21.5, 24.0)
    assert figures["layers with weights in int8"].values == (19, 19)
    assert figures["findings"].texts == ("0", "0")


def test_each_type_has_rows(store):
    """A run without FP8 has no layers and no multiplications in it."""
    reports = [make_report(NAMES), make_report(NAMES)]
    reports[1]["layers"][2]["precision"] = "FP8"
    reports[1]["summary"]["census"] = {
        "Int8": {"expected": 18, "missing": [], "macs": 0.75},
        "FP8": {"expected": 1, "missing": ["l2"], "macs": 0.125},
    }
    comparison = compare_runs([store(report, f"{i}") for i, report in enumerate(reports)])
    figures = {figure.label: figure.values for figure in comparison.figures}
    assert figures["layers with weights in FP8"] == (0, 1)
    int8_layers = figures["layers with weights in int8"]
    assert int8_layers[0] - int8_layers[1] == 1
    assert figures["multiplications in FP8"] == (0.0, 0.125)
    assert figures["multiplications in int8"][1] == 0.75
    assert figures["quantized, but not FP8 in the engine"] == (0, 1)


def test_outputs_have_rows(store):
    reports = [make_report(NAMES), make_report(NAMES), make_report(NAMES)]
    for report, scores in zip(reports[:2], (15.5, 18.25), strict=True):
        report["summary"]["candidates"]["ONNX"]["outputs"] = [
            {"name": "boxes", "top1": None, "top5": None, "agreement": None, "sqnr_db": 40.0},
            {"name": "<b>", "top1": None, "top5": None, "agreement": None, "sqnr_db": scores},
        ]
    comparison = compare_runs([store(report, f"{i}") for i, report in enumerate(reports)])
    figures = {figure.label: figure for figure in comparison.figures}
    assert figures["SQNR of boxes, dB"].values == (40.0, 40.0, None)
    assert figures["SQNR of <b>, dB"].texts == ("15.50", "18.25", "not known")
    assert "<b>, dB" not in render_comparison(comparison)


def test_weights_methods_and_reasons_that_differ(store):
    names = ["same", "weight", "method", "reason", "rule", "figures"]
    first, second = make_report(names), make_report(names)
    second["layers"][1]["tensors"][1]["amax"] = 0.6
    second["layers"][2]["tensors"][0]["method"] = "max"
    second["layers"][3]["reason"] = "included by '*'"
    second["layers"][4]["reason"] = "Conv2d is in the map (R-CONV-3)"
    for place, report in enumerate((first, second), 5):
        report["layers"][5]["reason"] = (
            f"step {place} of 9 of the search left it in float: SQNR of the outputs 1 -> 2 dB"
        )
    runs = [store(first, "first"), store(second, "second")]
    comparison = compare_runs(runs)
    assert [layer.name for layer in comparison.layers] == names[1:5]
    assert comparison.layers[0].weights == (0.5, 0.6)
    assert comparison.layers[1].methods == ("mse", "max")
    page = render_comparison(comparison)
    assert page.count("Conv2d is in the map") == 3  # where another reason stands beside it
    assert page.count("included by &#39;*&#39;") == 1 and "0.6" in page


def test_sensitivity_of_both(runs):
    rows = compare_runs(runs).sensitivity
    assert [row.name for row in rows] == NAMES[:12]
    assert rows[0].widths == (100.0, 100.0)
    assert rows[1].widths == (50.0, 50.0)
    assert rows[3].precisions == ("int8", "float")


def test_a_run_with_itself_differs_in_nothing(runs):
    comparison = compare_runs([runs[0], runs[0], runs[0]])
    assert comparison.layers == comparison.settings == ()
    assert len(comparison.runs) == 3
    page = render_comparison(comparison)
    assert "None: settings, seed, data and versions are the same" in page
    assert 'class="up"' not in page and 'class="down"' not in page


def test_better_and_worse_are_said_in_words_too(runs):
    page = render_comparison(compare_runs(runs))
    assert '<td class="up">24.00 <span class="unseen">(better)</span></td>' in page
    page = render_comparison(compare_runs(runs[::-1]))
    assert '<td class="down">21.50 <span class="unseen">(worse)</span></td>' in page


def test_names_are_data(store):
    evil = "<script>alert(1)</script>"
    runs = [
        store(make_report([evil]), "one"),
        store(make_report([evil], float_layers=[evil], model=evil), "two"),
    ]
    page = render_comparison(compare_runs(runs))
    assert evil not in page and page.count("<script") == 1


def test_one_run_is_no_comparison(runs):
    with pytest.raises(ArgumentError, match="takes two or more"):
        compare_runs(runs[:1])


def call(capsys, *arguments):
    with pytest.raises(SystemExit) as exit:
        main([str(argument) for argument in arguments])
    return exit.value.code, *capsys.readouterr()


def test_command(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = call(capsys, "report", runs[0], "--json", tmp_path / "one.json")
    assert (code, out) == (0, f"{runs[0] / 'report.html'}\n")
    assert json.loads((tmp_path / "one.json").read_text()) == load_report(runs[0]).data
    code, out, _ = call(capsys, "report", *runs, "--json", tmp_path / "two.json")
    assert (code, out) == (0, "comparison.html\n")
    assert (tmp_path / "comparison.html").read_text() == render_comparison(compare_runs(runs))
    assert [
        layer["name"] for layer in json.loads((tmp_path / "two.json").read_text())["layers"]
    ] == [
        "l3",
        "l5",
        "more",
    ]
    code, _, errors = call(capsys, "report")
    assert code == 2 and "no run was given" in errors
    code, _, errors = call(capsys, "report", runs[0], "-o", tmp_path)
    assert code == 2 and "cannot write" in errors


@pytest.mark.trt
def test_the_page_of_a_run_is_written_again_as_it_was(finished, tmp_path, capsys):
    assert call(capsys, "report", finished[0], "-o", tmp_path / "again.html")[0] == 0
    assert (tmp_path / "again.html").read_text() == (finished[0] / "report.html").read_text()
