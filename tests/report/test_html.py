"""The page as text: complete, self-contained, and nothing in it that a name could have smuggled in."""

import itertools
import json
import os
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from made_report import TUNING, make_report

from qdq.cli.main import main
from qdq.report.charts import draw_bars, draw_curve, draw_network, draw_tuning
from qdq.report.load import load_report
from qdq.report.page import render_report

EVIL = '<script>alert("1")</script>'
VOID = {"meta", "link", "input", "br"}
OPTIONAL = {"th", "td", "tr", "li", "option"}  # in tables and lists their end may be left out


class Outline(HTMLParser):
    """Tags with their attributes; refuses an end that closes nothing."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.open, self.text = [], [], []
        self.feed(page)
        assert not [tag for tag in self.open if tag not in OPTIONAL], self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        while self.open[-1] != tag:
            assert self.open.pop() in OPTIONAL, (tag, self.open)
        self.open.pop()

    def handle_data(self, data):
        self.text.append(data)

    def attribute(self, name):
        return [attributes[name] for _, attributes in self.tags if name in attributes]


@pytest.fixture
def page(store):
    def render(names, **changes):
        return render_report(load_report(store(make_report(names, **changes))))

    return render


def test_every_output_has_its_lines(page):
    report = make_report(["stem", "head"], float_layers=["head"])
    for candidate in report["evaluation"]["candidates"]:
        candidate["agreement"] = candidate["top1"] = candidate["top5"] = None
        candidate["outputs"] = [
            {"name": "boxes", "top1": None, "top5": None, "agreement": None, "sqnr_db": 41.25},
            {"name": EVIL, "top1": 0.625, "top5": 0.75, "agreement": 0.875, "sqnr_db": 15.5},
        ]
    candidates = report["evaluation"]["candidates"]
    summary = report["summary"] | {"candidates": {each["name"]: each for each in candidates}}
    analysis = report["analysis"] | {"outputs": {"boxes": 40.5, EVIL: 12.75}}
    analysis["steps"][0]["outputs"] = {"boxes": 40.625, EVIL: 18.375}
    text = page(
        ["stem", "head"],
        float_layers=["head"],
        evaluation=report["evaluation"],
        summary=summary,
        analysis=analysis,
    )
    assert EVIL not in text
    content = " ".join(Outline(text).text)
    for figure in ("41.25", "15.5", "87.5 %", "62.5 %", "75.0 %", "40.62", "12.75", "18.38"):
        assert figure in content
    assert f"the SQNR of ONNX on 100 samples is boxes 41.25 dB, {EVIL} 15.50 dB" in content
    assert "same answer as float" not in [part.strip() for part in Outline(text).text[:60]]


def test_a_folder_whose_name_is_not_utf_8(store, tmp_path, capsys):
    folder = store(make_report(["a", "b"]), os.fsdecode(b"run\xff"))
    other_folder = store(make_report(["a", "b"]), "other")
    commands = [
        ["report", folder],
        [
            "report",
            folder,
            other_folder,
            "-o",
            tmp_path / "both.html",
            "--json",
            tmp_path / "both.json",
        ],
        ["gate", folder, "--max-size", "1e9", "--junit", tmp_path / "junit.xml"],
        ["explain", folder, "a", "--json", tmp_path / "a.json"],
    ]
    for command in commands:
        with pytest.raises(SystemExit) as exit:
            main([str(word) for word in command])
        assert exit.value.code == 0, capsys.readouterr().err
    for page in (folder / "report.html", tmp_path / "both.html"):
        assert r"run\udcff" in page.read_text("utf-8")


def test_sections_stand_in_the_order_of_the_issue(page):
    outline = Outline(page(["a", "b"], float_layers=["a"]))
    sections = [attributes["id"] for tag, attributes in outline.tags if tag == "section"]
    assert sections == [
        "summary",
        "sensitivity",
        "cost",
        "layers",
        "network",
        "engine",
        "skipped",
        "environment",
    ]
    ids = outline.attribute("id")
    assert len(ids) == len(set(ids))
    inner = [target[1:] for target in outline.attribute("href") if target.startswith("#")]
    assert set(inner) <= set(ids)
    assert set(outline.attribute("aria-labelledby")) <= set(ids)


def test_fine_tuning_has_a_section_of_its_own(page):
    text = page(["a"], tuning={**TUNING, "text": EVIL})
    outline = Outline(text)
    assert [attributes["id"] for tag, attributes in outline.tags if tag == "section"][3] == "tuning"
    assert EVIL not in text and "Quantization with fine-tuning" in text
    # The metric, three steps a point of the loss, the ends of the network.
    assert text.count("<circle") == 3 + 40 + 2


def test_the_page_needs_nothing_else(page):
    text = page(["a", "b"])
    outline = Outline(text)
    assert not outline.attribute("src")
    assert all(target.startswith("#") or target == "data:," for target in outline.attribute("href"))
    assert not re.search(r"@import|url\(", text)
    policy = next(
        a["content"] for tag, a in outline.tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert (
        policy
        == "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    )


def test_every_head_of_a_table_has_a_scope(page):
    outline = Outline(page(["a", "b"]))
    assert all(
        attributes.get("scope") in ("col", "row") for tag, attributes in outline.tags if tag == "th"
    )


def test_names_are_data(page, store):
    names = [EVIL, "a&b", "'\"x", "</script><b>", "<!--", "]]>", "\u2028"]
    report = make_report(names, findings=[EVIL], command=EVIL, model=EVIL)
    report["environment"] = {EVIL: EVIL}
    text = render_report(load_report(store(report)))
    assert EVIL not in text
    outline = Outline(text)
    assert [tag for tag, _ in outline.tags].count("script") == 2
    data = json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)[1]
    )
    assert [entry["facts"][0][0] for entry in data] == ["Runs in"] * len(names)
    shown = [
        attributes["data-value"]
        for tag, attributes in outline.tags
        if tag == "th" and "data-value" in attributes
    ]
    assert shown == names


def test_numbers_that_decide_come_first(page):
    text = page([f"l{number}" for number in range(10)], float_layers=["l0", "l1"])
    figures = dict(re.findall(r'<dt>([^<]*)</dt><dd class="value">([^<]*)</dd>', text))
    assert figures["layers in int8"] == "8 of 10"
    assert figures["multiplications in int8"] == "80.0 %"
    assert figures["SQNR of the outputs"] == "21.50 dB"
    assert figures["same answer as float"] == "97.0 %"
    assert figures["top-1"] == "79.0 %"
    assert text.index("layers in int8") < text.index('id="sensitivity"')


def test_fp8_beside_int8(store):
    """Each type has its figure, its colour and its verdict; one layer of FP8 is not built as promised."""
    names = [f"l{number}" for number in range(4)]
    report = make_report(names, float_layers=["l0"])
    for name in ("l2", "l3"):
        report["layers"][names.index(name)]["precision"] = "FP8"
    for row, built in zip(report["build"]["layers"][2:], ("FP8", "Half"), strict=True):
        row |= {"expected_int8": False, "int8": False, "promised": "FP8", "built": built}
    report["summary"]["census"] = {
        "Int8": {"expected": 1, "missing": [], "macs": 0.25},
        "FP8": {"expected": 2, "missing": ["l3"], "macs": 0.25},
    }
    text = render_report(load_report(store(report)))
    figures = dict(re.findall(r'<dt>([^<]*)</dt><dd class="value[^"]*">([^<]*)</dd>', text))
    assert figures["layers in int8 and FP8"] == "3 of 4"
    assert figures["multiplications in int8"] == figures["multiplications in FP8"] == "25.0 %"
    assert figures["census"] == "2 of 3"
    assert "2 of 3 layers that have Q/DQ in the file run in the type of their Q/DQ." in text
    assert "NOT FP8, though quantized" in text
    assert "<option>int8</option><option>FP8</option><option>float</option>" in text
    assert '<span class="tag FP8">FP8</span>' in text


def test_the_formats_that_were_chosen(store):
    choices = [
        {"layers": ["l0"], "format": "int8", "reason": EVIL, "int8_db": 30.5, "fp8_db": 28.0},
        {"layers": ["l1", "l2"], "format": "fp8", "reason": "b", "int8_db": 20.0, "fp8_db": 31.25},
        {"layers": ["call"], "format": "fp8", "reason": "c", "int8_db": None, "fp8_db": None},
    ]
    formats = {"sm": 89, "choices": choices, "int8_db": 19.5, "fp8_db": 27.25, "chosen_db": 29.0}
    report = make_report(["l0", "l1", "l2"], formats=formats)
    report["layers"][1]["precision"] = "FP8"
    report["layers"][2]["precision"] = "float"  # the search came later
    text = render_report(load_report(store(report)))
    sections = [attrs["id"] for tag, attrs in Outline(text).tags if tag == "section"]
    assert sections[:2] == ["summary", "formats"]
    assert "for SM 89: 1 in int8, 3 in FP8." in text and EVIL not in text
    section = text.partition('<section id="formats"')[2].partition("</section>")[0]
    rows = re.findall(r"<tr><th scope=\"row\">(.*?)</tr>", section)
    words = [re.findall(r"[^<>]+(?=<)", row) for row in rows]
    assert words[0][:5] == ["l0", "int8", "30.50", "28.00", "-2.50"]
    assert words[1] == ["l1, l2", "FP8", "20.00", "31.25", "+11.25", "b", "FP8", " ", "float", " "]
    assert words[2] == ["call", "FP8", "–", "–", "–", "c"]
    assert "19.50 dB with int8 wherever the choice was free, 27.25 dB with FP8, 29.00 dB" in section
    assert "better one" not in section


@pytest.mark.parametrize("figures", [{}, {"int8_db": None, "fp8_db": None, "chosen_db": None}])
def test_formats_without_figures_of_the_whole_model(store, figures):
    choice = {"layers": ["l0"], "format": "int8", "reason": "a", "int8_db": None, "fp8_db": None}
    report = make_report(["l0"], formats={"sm": 75, "choices": [choice], **figures})
    text = render_report(load_report(store(report)))
    assert "for SM 75: 1 in int8." in text
    assert "SQNR of the whole network" not in text


def test_300_layers_fit(page):
    names = [
        f"features.stage{number // 30}.block{number}.expand_convolution" for number in range(300)
    ]
    text = page(names, float_layers=names[:4])
    assert len(text.encode()) <= 3_000_000
    assert text.count('<tr id="layer-') == 300
    assert text.count("<rect") >= 300


def test_no_layers_at_all(page):
    text = page([])
    assert "Nothing was ranked" in text
    Outline(text)


class TestCharts:
    @pytest.fixture
    def report(self, store):
        return load_report(
            store(make_report([f"l{number}" for number in range(30)], float_layers=["l0"]))
        )

    def test_bars(self, report):
        chart = draw_bars(report)
        assert (len(chart.bars), chart.more, chart.zero, chart.unit) == (20, 10, 0.0, "dB")
        gains = np.array([3 / (place + 1) for place in range(20)])
        assert [bar.width for bar in chart.bars] == pytest.approx(100 * gains / 3.6, abs=0.01)
        assert chart.bars[0].high == 100 and chart.bars[0].low == pytest.approx(
            100 * 2.4 / 3.6, abs=0.01
        )
        assert [bar.is_float for bar in chart.bars] == [True] + [False] * 19

    def test_a_loss_goes_to_the_left_of_zero(self, store):
        made = make_report(["a", "b"])
        for layer, gain in zip(made["layers"], (3.0, -1.0), strict=True):
            layer["sensitivity"] |= {"gain": gain, "low": gain, "high": gain}
        chart = draw_bars(load_report(store(made)))
        assert chart.zero == 25
        assert (chart.bars[1].left, chart.bars[1].width) == (0, 25)
        assert (chart.bars[0].left, chart.bars[0].width) == (25, 75)

    def test_a_run_with_fp8_is_not_named_int8(self, store):
        made = make_report(["a", "b"], float_layers=["a"])
        made["analysis"]["fp8"] = ["a"]
        curve = draw_curve(load_report(store(made)))
        assert curve.points[0].label.startswith("all quantizable layers quantized: ")

    def test_curve_over_the_work_in_float(self, store):
        names = [f"l{number}" for number in range(10)]
        curve = draw_curve(load_report(store(make_report(names, float_layers=names[:2]))))
        assert [point.label for point in curve.points] == [
            "all quantizable layers in int8: 18.00 dB at 0",
            "+ l0 in float: 20.00 dB at 10",
            "+ l1 in float: 21.00 dB at 20",
        ]
        xs, ys = [point.x for point in curve.points], [point.y for point in curve.points]
        assert np.diff(xs) == pytest.approx([np.diff(xs)[0]] * 2, abs=0.02)
        assert np.diff(ys)[0] == pytest.approx(2 * np.diff(ys)[1], abs=0.2) and np.diff(ys)[1] < 0
        assert all(0 <= tick.at <= 100 for tick in curve.x_ticks)
        assert all(0 <= tick.at <= curve.height for tick in curve.y_ticks)

    def test_curves_of_fine_tuning(self, store):
        metric, loss = draw_tuning(load_report(store(make_report(["a"], tuning=TUNING))))
        assert [point.label for point in metric.points] == [
            "step 0: 20",
            "step 60: 21",
            "step 120: 22",
        ]
        assert np.diff([point.y for point in metric.points]) == pytest.approx(
            [-94.8, -94.8], abs=0.2
        )
        losses = np.array(TUNING["losses"]).reshape(40, 3).mean(1)
        assert [point.label for point in loss.points] == [
            f"step {3 * number + 3}: {mean:.4g}" for number, mean in enumerate(losses)
        ]
        few = {**TUNING, "curve": TUNING["curve"][:1], "losses": [1.0, None]}
        assert draw_tuning(load_report(store(make_report(["a"], tuning=few), "few"))) == []

    def test_curve_of_the_pareto_front(self, store):
        points = [
            {"float_layers": [], "cost": 10.0, "sqnr_db": 18.0, "metric": None},
            {"float_layers": ["a"], "cost": 14.0, "sqnr_db": 21.0, "metric": None},
        ]
        made = make_report(["a", "b"])
        made["analysis"]["pareto"] = points
        curve = draw_curve(load_report(store(made)))
        assert [point.label for point in curve.points] == [
            "all in int8: 18.00 dB at 10",
            "1 units in float: a: 21.00 dB at 14",
        ]

    def test_curve_of_the_metric_of_the_user(self, store):
        made = make_report(["a", "b"], float_layers=["a"])
        made["analysis"] |= {"metric_name": "mAP", "metric": 0.125}
        report = load_report(store(made))
        curve = draw_curve(report)
        assert curve.y_label == "mAP"
        assert [point.label for point in curve.points] == [
            "all quantizable layers in int8: mAP 0.125, SQNR 18.00 dB at 0",
            "+ a in float: mAP 0.25, SQNR 20.00 dB at 50",
        ]
        assert [tick.label for tick in curve.y_ticks][-1] == "0.25"
        headline = "which took the quality on its 32 samples from mAP 0.125, SQNR 18.00 dB to mAP 0.25, SQNR 20.00 dB;"
        assert headline in render_report(report)
        made["analysis"]["pareto"] = [
            {"float_layers": [], "cost": 10.0, "sqnr_db": 18.0, "metric": 0.5},
            {"float_layers": ["a"], "cost": 14.0, "sqnr_db": 21.0, "metric": 0.25},
        ]
        made["analysis"]["metric_name"] = "kl"
        curve = draw_curve(load_report(store(made, "kl")))
        assert curve.y_label == "kl, in nats" and curve.points[0].y < curve.points[1].y
        assert curve.points[0].label == "all in int8: kl 0.5 nats, SQNR 18.00 dB at 10"

    def test_an_infinite_gain_is_measured(self, store):
        made = make_report(["a", "b"])
        made["layers"][0]["sensitivity"] |= {"gain": None, "low": None, "high": None}
        report = load_report(store(made))
        first, second = draw_bars(report).bars
        assert (first.label, first.width) == ("not finite", 100)
        made["layers"][0]["sensitivity"]["is_exact"] = False
        assert (
            draw_bars(load_report(store(made, "other"))).bars[0].label == "estimated: SQNR 37.00 dB"
        )
        assert second.width < 100
        assert "estimated" not in render_report(report)

    def test_no_curve_of_one_point(self, store):
        assert draw_curve(load_report(store(make_report(["a"])))) is None

    def test_network_of_a_chain(self, report):
        network = draw_network(report.layers)
        assert [node.name for node in network.nodes[1:-1]] == [
            layer.name for layer in report.layers
        ]
        assert len(network.edges) == 31
        assert all(re.fullmatch(r"M14 \d+V\d+", edge) for edge in network.edges)
        assert [node.colour for node in network.nodes[:3]] == ["end", "float", "int8"]

    def test_lines_in_one_lane_never_overlap(self, store):
        random = np.random.default_rng(0)
        names = [f"l{number}" for number in range(60)]
        made = make_report(names)
        for place, layer in enumerate(made["layers"]):
            layer["reads"] = sorted(
                {
                    names[int(number)]
                    for number in random.integers(max(place - 9, 0), max(place, 1), min(place, 3))
                }
            )
        network = draw_network(load_report(store(made)).layers)
        spans = {}
        for edge in network.edges:
            if match := re.match(r"M\d+ (\d+)H(\d+)Q.*V\d+Q\d+ (\d+)", edge):
                spans.setdefault(match[2], []).append(sorted((int(match[1]), int(match[3]))))
        assert len(spans) > 3
        for lane in spans.values():
            lane.sort()
            assert all(upper[1] <= lower[0] for upper, lower in itertools.pairwise(lane))
