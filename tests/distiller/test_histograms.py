"""Histograms of layers against numpy, their file and their images."""

import importlib.util
import re

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from qdq.distiller.statistics.histogram_images import save_histogram_images
from qdq.distiller.statistics.histograms import (
    NUM_BINS,
    Histogram,
    collect_histograms,
    save_histograms,
)
from qdq.distiller.statistics.records import LayerStatistics, TensorRecord
from qdq.distiller.statistics.two_passes import collect_quant_stats
from qdq.distiller.statistics.watch_layers import Slot
from qdq.errors import QdqError


def make_histograms(device="cpu"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 40), nn.ReLU(inplace=True)).to(device)
    batches = [torch.randn(50, 3, device=device) for _ in range(3)]
    statistics = collect_quant_stats(model, batches)
    return model, batches, statistics, collect_histograms(model, batches, statistics)


def assert_counts(histogram, values, record):
    """As numpy, but for values within one float32 rounding of an edge."""
    expected, edges = np.histogram(values.astype(np.float64), NUM_BINS, (record.min, record.max))
    counts = histogram.hist.numpy()
    assert counts.sum() == expected.sum() == values.size
    assert np.abs(counts.cumsum() - expected.cumsum()).max() <= 1
    np.testing.assert_allclose(histogram.bin_centroids, (edges[1:] + edges[:-1]) / 2, rtol=1e-9)


def test_counts_against_numpy():
    model, batches, statistics, histograms = make_histograms()
    assert list(histograms) == [Slot("0", 0), Slot("0", None), Slot("1", 0), Slot("1", None)]
    inputs = torch.cat(batches)
    with torch.no_grad():
        outputs = model[0](inputs)
    assert_counts(histograms[Slot("0", 0)], inputs.numpy(), statistics["0"].inputs[0])
    assert_counts(histograms[Slot("0", None)], outputs.numpy(), statistics["0"].output)
    assert_counts(histograms[Slot("1", None)], outputs.relu().numpy(), statistics["1"].output)


@pytest.mark.gpu
def test_counts_on_a_gpu(gpu):
    on_gpu = make_histograms(gpu)
    inputs = torch.cat(on_gpu[1]).cpu().numpy()
    histogram = on_gpu[3][Slot("0", 0)]
    assert histogram.hist.device.type == "cpu"
    assert_counts(histogram, inputs, on_gpu[2]["0"].inputs[0])


def test_values_outside_and_a_range_without_width():
    outside = LayerStatistics({}, TensorRecord(0.0, 1.0, 0.0, 1.0, 0.5))
    flat = LayerStatistics({}, TensorRecord(2.0, 2.0, 2.0, 2.0, 2.0))
    model = nn.Sequential(nn.Identity(), nn.Identity())
    values = torch.tensor([[-5.0, 0.5, 1.0, 7.0]])
    histograms = collect_histograms(model, [values], {"0": outside, "1": flat})
    counts = histograms[Slot("0", None)].hist
    assert (counts[0], counts[NUM_BINS // 2], counts[-1]) == (1, 1, 2)
    assert histograms[Slot("1", None)].hist[0] == 4
    assert set(histograms[Slot("1", None)].bin_centroids.tolist()) == {2.0}


def test_the_file(tmp_path):
    histograms = make_histograms()[3]
    tensors = load_file(save_histograms(tmp_path / "acts_histograms.safetensors", histograms))
    assert sorted(tensors) == [
        f"{place}/{kind}"
        for place in ("0/inputs/0", "0/output", "1/inputs/0", "1/output")
        for kind in ("bin_centroids", "hist")
    ]
    assert torch.equal(tensors["1/output/hist"], histograms[Slot("1", None)].hist)


def test_statistics_of_another_model_are_refused():
    with pytest.raises(QdqError, match="no layer with statistics ran"):
        collect_histograms(nn.Sequential(nn.ReLU()), [torch.ones(1, 2)], {})


def test_images(tmp_path):
    pytest.importorskip("matplotlib", reason="draws the images; qdq runs without it")
    hist, centroids = torch.ones(NUM_BINS, dtype=torch.int64), torch.linspace(0, 1, NUM_BINS)
    histograms = {Slot("a/../b\x1b", None): Histogram(hist, centroids)}
    for ext, start in ((".png", b"\x89PNG"), (".svg", b"<?xml")):
        (path,) = save_histogram_images(tmp_path, histograms, ext)
        assert path == tmp_path / "histogram_imgs" / f"000-a_.._b_-output{ext}"
        assert path.read_bytes().startswith(start)


@pytest.mark.skipif(
    importlib.util.find_spec("matplotlib") is not None, reason="matplotlib is there"
)
def test_images_without_matplotlib(tmp_path):
    with pytest.raises(ImportError, match=re.escape("pip install matplotlib")):
        save_histogram_images(tmp_path, make_histograms()[3])
    assert not list(tmp_path.iterdir())


def test_a_format_that_no_image_has(tmp_path):
    with pytest.raises(QdqError, match=r"expected \.png, \.svg, \.pdf"):
        save_histogram_images(tmp_path, {}, "png")
