"""The time of a kernel, against figures computed by hand."""

from pathlib import Path

import pytest

from qdq import ArgumentError
from qdq.roofline import (
    GPUS,
    KERNEL_MICROSECONDS,
    TARGETS,
    Gpu,
    choose_sm,
    estimate_kernel,
    find_gpu,
)

# 100 int8, 50 fp16 and 25 fp32 operations a picosecond, 1000 GB/s, ten processors
ROUND = Gpu(100, 50, 25, 1000, 10, 89)
FULL = 10 * 64 * 64  # outputs that keep all ten busy


def test_a_kernel_without_products_takes_its_traffic_and_a_launch():
    time = estimate_kernel(ROUND, number_type="fp16", num_bytes=5_000_000)
    assert time == pytest.approx(5 + KERNEL_MICROSECONDS)  # 5 MB at 1 TB/s


@pytest.mark.parametrize(("number_type", "expected"), [("int8", 10), ("fp16", 20), ("fp32", 40)])
def test_arithmetic_takes_the_rate_of_its_type(number_type, expected):
    time = estimate_kernel(
        ROUND, number_type=number_type, num_bytes=1000, macs=500_000_000, outputs=FULL
    )
    assert time == pytest.approx(expected + KERNEL_MICROSECONDS)  # 10^9 operations


def test_the_longer_of_arithmetic_and_traffic_counts():
    work = {"number_type": "int8", "macs": 500_000_000, "outputs": FULL}
    bound_by_memory = estimate_kernel(ROUND, num_bytes=30_000_000, **work)
    assert bound_by_memory == pytest.approx(30 + KERNEL_MICROSECONDS)


def test_few_outputs_leave_processors_idle():
    work = {"number_type": "int8", "num_bytes": 0, "macs": 500_000_000}
    one_tile = estimate_kernel(ROUND, outputs=64 * 64, **work)
    assert one_tile == pytest.approx(10 * 10 + KERNEL_MICROSECONDS)
    assert estimate_kernel(ROUND, outputs=100 * FULL, **work) == pytest.approx(
        10 + KERNEL_MICROSECONDS
    )


@pytest.mark.parametrize(
    ("channels", "int8", "fp16"),
    [(1, 16, 8), (3, 16 / 3, 8 / 3), (16, 1, 1), (24, 32 / 24, 1)],
)
def test_channels_fill_vectors_of_16_bytes(channels, int8, fp16):
    """A depthwise convolution gains nothing by int8: it multiplies twice as many zeros at twice the rate."""
    for number_type, factor, full in (("int8", int8, 10), ("fp16", fp16, 20)):
        time = estimate_kernel(
            ROUND,
            number_type=number_type,
            num_bytes=0,
            macs=500_000_000,
            outputs=FULL,
            channels=channels,
        )
        assert time == pytest.approx(full * factor + KERNEL_MICROSECONDS)


def test_rates_of_every_gpu_are_ordered():
    for name, gpu in GPUS.items():
        assert gpu.int8 >= 2 * gpu.fp16 * 0.99, name
        assert gpu.fp16 > gpu.fp32 > 0, name
        assert find_gpu(name) is gpu


def test_an_unknown_gpu():
    with pytest.raises(ArgumentError, match=r"gpu is 'v100'; expected one of a10, .*t4"):
        find_gpu("v100")


@pytest.mark.parametrize(
    ("file", "count"), [("qdq/cli/check.py", 1), ("qdq/cli/analyze.py", 1), ("docs/cli.md", 2)]
)
def test_the_help_lists_every_gpu(file, count):
    text = (Path(__file__).parents[1] / file).read_text().replace("`", "")
    *names, last = GPUS
    assert " ".join(text.split()).count(f": {', '.join(names)} or {last}") == count


def test_the_compute_capability_is_that_of_the_gpu():
    assert choose_sm("l4", None) == choose_sm("l4", 89) == TARGETS["l4"] == TARGETS["rtx40"] == 89
    assert (choose_sm(None, 86), choose_sm(None, None)) == (86, None)
    with pytest.raises(ArgumentError, match="'t4', which has SM 75, and sm is 89"):
        choose_sm("t4", 89)


def test_fp8_has_the_rate_of_int8():
    times = [
        estimate_kernel(ROUND, number_type=kind, num_bytes=1, macs=10**9, outputs=10**6)
        for kind in ("int8", "fp8")
    ]
    assert times[0] == times[1]
