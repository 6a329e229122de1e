"""Statistics as tables and as a page of plots."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest
import torch

from qdq import Format, Statistics
from qdq.observers.collector import TensorCollector
from qdq.observers.solve import SOLVERS
from qdq.statistics.show import format_ranges, format_statistics, write_plots


def collect(*batches):
    collector = TensorCollector()
    for batch in batches:
        collector.collect(torch.as_tensor(batch, dtype=torch.float32))
    return collector.statistics()


def statistics_of(**tensors):
    return Statistics(tensors, dict.fromkeys(tensors, Format()), batches=1)


def plots_of(page):
    """The <svg> elements as trees; they are XML on their own."""
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL)]  # noqa: S314


@pytest.fixture
def values():
    return np.random.default_rng(0).standard_normal(50_000).astype(np.float32)


def test_tables(values):
    statistics = statistics_of(first=collect(values), second=collect([0.0, 0.0, 4.0, -2.0]))
    figures, amax, clipped = format_statistics(statistics.summarize()).split("\n\n")[1:]
    assert figures.splitlines()[0].split() == ["values", "count", "zeros", "mean", "std", "max"]
    assert figures.splitlines()[2].split() == ["second", "4", "50.00%", "0.5", "2.179", "4"]
    for table in (amax, clipped):
        head, first, _ = (line.split() for line in table.splitlines())
        assert head[-len(SOLVERS) :] == list(SOLVERS)
        assert len(first) == len(SOLVERS) + 1
    entropy = statistics.solve("first", "entropy")
    cells = dict(zip(SOLVERS, clipped.splitlines()[1].split()[1:], strict=True))
    assert float(cells["entropy"].rstrip("%")) == pytest.approx(
        100 * np.mean(np.abs(values) > entropy), abs=0.02
    )
    assert cells["max"] == "0.000%"


def test_columns_are_aligned(values):
    lines = format_ranges(
        statistics_of(a=collect(values), a_longer_name=collect([1.0])),
        {"a": 2.0, "a_longer_name": 1},
    )
    assert len({len(line) for line in lines.splitlines()}) == 1


def test_a_pass_that_was_cut_off_is_said(values, tmp_path):
    tensor = collect(values)
    cut = Statistics({"a": tensor}, {"a": Format()}, batches=3, complete=False)
    assert "1 tensors, 3 batches; the pass was cut off" in format_statistics(cut.summarize())
    assert "cut off" in write_plots(cut, cut.summarize(), tmp_path / "cut.html").read_text()


def test_plot_has_the_histogram_and_every_range(values, tmp_path):
    statistics = statistics_of(a=collect(values))
    page = write_plots(statistics, statistics.summarize(), tmp_path / "page.html").read_text()
    (plot,) = plots_of(page)
    width = 640
    outline = next(path.get("d") for path in plot.iter("path") if path.get("class") == "h")
    tops = [int(top) for top in re.findall(r"V(\d+)", outline)][:-1]
    edges = [int(edge) for edge in re.findall(r"H(\d+)", outline)]
    end = (
        statistics.tensors["a"].width
        * -(-len(statistics.tensors["a"].magnitudes()) // len(tops))
        * len(tops)
    )
    counts, _ = np.histogram(np.abs(values), bins=len(tops), range=(0, end))
    assert np.argsort(counts, kind="stable").tolist()[0] in np.flatnonzero(
        np.array(tops) == max(tops)
    )
    assert np.corrcoef(np.log10(counts + 1), tops)[0, 1] < -0.999
    assert edges == sorted(edges) and edges[-1] == width
    lines = {
        path.find("title").text: path
        for path in plot.iter("path")
        if path.get("class").startswith("l ")
    }
    for method in SOLVERS:
        amax = statistics.solve("a", method)
        at = float(re.match(r"M([\d.]+) ", lines[f"{method} {amax:.4g}"].get("d"))[1])
        assert at == pytest.approx(amax / end * width, abs=0.06)
        assert re.search(rf"{method}<td>{amax:.4g}<td>[\d.]+%", page)


@pytest.mark.parametrize(
    "batches",
    [
        [],
        [[0.0] * 9],
        [[1.0]],
        [[1e-30]],
        [[1e30, 1.0]],
        [[65504.0, -65504.0]],
        [[-3.0, -2.0]],
        [[1e-45] * 3],
    ],
    ids=str,
)
def test_strange_tensors(batches, tmp_path):
    statistics = statistics_of(a=collect(*batches))
    summary = statistics.summarize()
    assert "nan" not in format_statistics(summary)
    page = write_plots(statistics, summary, tmp_path / "page.html").read_text()
    (plot,) = plots_of(page)
    drawn = [float(n) for path in plot.iter("path") for n in re.findall(r"[\d.]+", path.get("d"))]
    assert max(drawn) <= 641


def test_names_are_escaped_and_nothing_is_fetched(values, tmp_path):
    name = '<script>alert("1")</script>'
    statistics = Statistics({name: collect(values)}, {name: Format()})
    page = write_plots(statistics, statistics.summarize(), tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert not re.search(r"https?:|src=|href=|url\(|@import", page)
    assert "prefers-color-scheme: dark" in page


def test_300_tensors_stay_below_3_megabytes(values, tmp_path):
    tensor = collect(values, 9 * values[:100])
    statistics = Statistics(
        {f"layer{i}.block.conv._input_quantizer": tensor for i in range(300)},
        {f"layer{i}.block.conv._input_quantizer": Format() for i in range(300)},
    )
    entry = statistics.select("layer0.*").summarize()["tensors"][
        "layer0.block.conv._input_quantizer"
    ]
    summary = {"batches": 2, "complete": True, "tensors": dict.fromkeys(statistics.tensors, entry)}
    path = write_plots(statistics, summary, tmp_path / "page.html")
    assert len(plots_of(path.read_text())) == 300
    assert path.stat().st_size < 3_000_000
