"""The table of a run for several targets: its figures are those of the reports, and readers of one report say so."""

import json
import re
from urllib.parse import unquote

import pytest
from made_report import make_report

from qdq import ArgumentError
from qdq.cli.main import main
from qdq.report.load import load_report
from qdq.report.target_runs import TARGETS_FORMAT, load_target_runs

NAMES = ["l0", "l1", "l2", "l3"]


def make_target(name, sm, *, built_sm=89, fp8=(), **changes):
    report = make_report(NAMES, float_layers=["l0"], target={"name": name, "sm": sm}, **changes)
    report["build"]["sm"] = built_sm
    for layer in report["layers"]:
        if layer["name"] in fp8:
            layer["precision"] = "FP8"
    return report


@pytest.fixture
def run(store):
    """Two targets: FP8 and a predicted time for one, another engine and a finding for the other."""
    l4 = make_target("l4", 89, fp8=["l2", "l3"])
    l4["summary"]["census"] = {
        "Int8": {"expected": 1, "missing": [], "macs": 0.25},
        "FP8": {"expected": 2, "missing": ["l3"], "macs": 0.5},
    }
    l4["check"]["payoff"] = {
        "gpu": "l4",
        "inputs": {"x": "1x3x8x8"},
        "float16": 300.0,
        "int8": 150.0,
        "int8_half_rest": 150.0,
        "num_unknown": 0,
        "word": "int8 and FP8",
        "ratio": 2.0,
        "pays": True,
        "layers": [],
    }
    orin = make_target("orin", 87, findings=["QDQ150 <graph>: it is slower"])
    orin["evaluation"]["candidates"][1]["sqnr_db"] = 12.25
    orin["summary"]["candidates"]["ONNX"]["sqnr_db"] = 12.25
    folder = store({}, "several")
    (folder / "run.json").write_text(json.dumps({"targets": ["l4", "orin"]}))
    for name, report in (("l4", l4), ("orin", orin)):
        (folder / name).mkdir()
        (folder / name / "report.json").write_text(json.dumps(report))
    return folder


def test_figures(run):
    l4, orin = load_target_runs(run).targets
    assert (l4.target, l4.sm, l4.layers) == ("l4", 89, {"int8": 1, "FP8": 2, "float": 1})
    assert (orin.target, orin.sm, orin.layers) == ("orin", 87, {"int8": 3, "FP8": 0, "float": 1})
    assert (l4.sqnr_db, orin.sqnr_db) == (21.5, 12.25)
    assert (l4.agreement, l4.top1, l4.scores) == (0.97, 0.79, {})
    assert (l4.low_macs, orin.low_macs) == (0.75, 0.75)
    assert (l4.missing, orin.missing) == (1, 0)
    assert (l4.predicted_ms, l4.predicted_ratio) == (0.15, 2.0)
    assert orin.predicted_ms is orin.predicted_ratio is None
    assert (l4.num_findings, orin.num_findings) == (0, 1)
    assert l4.engine_note == ""
    assert "cannot build for SM 87, and built for SM 89 instead" in orin.engine_note


def test_a_line_for_each_target(run):
    *lines, note = load_target_runs(run).format_table().splitlines()
    assert [" ".join(line.split()) for line in lines] == [
        "target SM int8 FP8 float SQNR dB agreement top-1 8-bit MACs engine predicted findings",
        "l4 89 1 2 1 21.50 97.0 % 79.0 % 75.0 % 12.0 MB, 1 not in 8 bit 0.150 ms, 2.00x fp16 0",
        "orin 87 3 0 1 12.25 97.0 % 79.0 % 75.0 % 12.0 MB * not predicted 1",
    ]
    assert len({len(line) for line in lines}) == 1  # columns
    assert note.startswith("* orin: rtx 1.7 cannot build for SM 87")


def change_candidates(path, **changes):
    report = json.loads(path.read_text())
    for candidate in report["summary"]["candidates"].values():
        candidate |= changes
    path.write_text(json.dumps(report))


def test_metrics_of_the_task_are_columns(run):
    for name in ("l4", "orin"):
        change_candidates(run / name / "report.json", scores={"mAP": 0.43215}, top1=None)
    runs = load_target_runs(run)
    assert (runs.targets[1].agreement, runs.targets[1].top1) == (0.97, None)
    titles, _, orin, _ = runs.format_table().splitlines()
    assert titles.split()[5:9] == ["SQNR", "dB", "agreement", "mAP"]
    assert orin.split()[5:9] == ["12.25", "97.0", "%", "0.4321"]


def test_a_metric_with_the_name_of_another_column(run):
    """Neither column replaces the other, and the metric is no fraction."""
    scores = {"top-1": 76.1, "findings": 3.0, "SM": 5.0}
    for name in ("l4", "orin"):
        change_candidates(run / name / "report.json", scores=scores)
    runs = load_target_runs(run)
    for target in runs.targets:
        titles = [title for title, _ in target.cells]
        assert titles.index("SM") == 1 and titles[-1] == "findings"
        texts = [text for title, text in target.cells if title in scores]
        assert texts[1:5] == ["79.0 %", "76.1000", "3.0000", "5.0000"]
        assert (texts[0], texts[5]) == (str(target.sm), str(target.num_findings))
    assert runs.render(run / "report.html").count('class="bad-text">1<') == 1  # the finding of orin


def test_an_engine_of_tensorrt_is_for_this_machine(run):
    path = run / "l4" / "report.json"
    report = json.loads(path.read_text())
    report["build"] |= {"sm": None, "backend": "tensorrt"}
    path.write_text(json.dumps(report))
    l4, _ = load_target_runs(run).targets
    assert "builds for the GPU of this machine" in l4.engine_note


def write_page(*arguments):
    with pytest.raises(SystemExit) as end:
        main(["report", *map(str, arguments)])
    assert end.value.code == 0


def test_the_page_is_written_again(run, tmp_path, capsys):
    write_page(run, "--json", tmp_path / "targets.json")
    page = (run / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert '<section id="targets"' in page
    assert "0.150 ms, 2.00x fp16" in page and "not predicted" in page
    assert "2 targets side by side" in page
    facts = json.loads((tmp_path / "targets.json").read_text())
    assert facts["format"] == TARGETS_FORMAT
    assert [target["sqnr_db"] for target in facts["targets"]] == [21.5, 12.25]


def list_links(page):
    """The files that a page links to, and the texts of the links."""
    links = re.findall('<a href="([^#"]*)">(.*?)</a>', page.read_text())
    return [((page.parent / unquote(link)).resolve(), text) for link, text in links]


def test_links_lead_from_the_place_of_the_page(run, tmp_path, monkeypatch):
    moved = tmp_path / "of: 50%" / "several"
    moved.parent.mkdir()
    run = run.rename(moved)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    for output in ((), ("-o", "elsewhere/page.html")):
        write_page(run / "orin", *output)
        page = tmp_path / output[1] if output else run / "orin" / "report.html"
        assert "for orin (SM 87); <a " in page.read_text()
        assert list_links(page) == [(run / "report.html", "all targets of this run")]
    for output in ((), ("-o", "elsewhere/page.html")):
        write_page(run, *output)
        page = tmp_path / output[1] if output else run / "report.html"
        assert list_links(page) == [(run / "orin" / "report.html", "orin")]  # l4 has no page yet


def test_the_page_of_a_target_that_was_copied_elsewhere_has_no_link(run, tmp_path):
    (run / "orin").rename(tmp_path / "orin")
    write_page(tmp_path / "orin")
    assert "for orin (SM 87). " in (tmp_path / "orin" / "report.html").read_text()
    assert list_links(tmp_path / "orin" / "report.html") == []


READERS = (
    "explain RUN l0",
    "gate RUN --max-drop 1",
    "bundle RUN --output bundle",
    "diverge RUN",
    "report RUN --target result.json",
    "report RUN RUN/l4 --output page.html",
)


@pytest.mark.parametrize("command", READERS)
def test_what_reads_one_target_asks_for_it(run, tmp_path, monkeypatch, capsys, command):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main([word.replace("RUN", str(run)) for word in command.split()])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "is a run for several targets: l4, orin" in error
    assert f"give the folder of one of them, such as {run / 'l4'}" in error


def test_a_target_without_a_report(run):
    (run / "orin" / "report.json").unlink()
    (run / "orin" / "run.json").write_text(json.dumps({"stage": "build"}))
    with pytest.raises(ArgumentError, match="got as far as 'build'"):
        load_target_runs(run)
    load_report(run / "l4")
