"""Statistics against numpy in float64, and against themselves in another order or in parts."""

import math
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pretended_device import list_waits, watch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from qdq import ArgumentError, ArgumentTypeError, CalibrationError
from qdq.formats import Format
from qdq.observers import collector as collector_module
from qdq.observers import on_device, summarize
from qdq.observers.collector import TensorCollector, TensorReader
from qdq.observers.tensor_statistics import (
    LEAST_EXPONENT,
    NUM_BINS,
    RECORD,
    TensorStatistics,
    coarsen,
    exponent_of,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def collect(batches, numbers=None, **options):
    collector = TensorCollector(**options)
    for number, batch in zip(numbers or range(len(batches)), batches, strict=True):
        collector.batch = number
        collector.collect(batch)
    return collector.statistics()


def reference_counts(values):
    """The histogram by its definition, in float64."""
    magnitudes = np.abs(values.astype(np.float32).astype(np.float64))
    exponent = LEAST_EXPONENT
    while magnitudes.max() >= NUM_BINS * 2.0**exponent:
        exponent += 1
    bins = np.floor(magnitudes / 2.0**exponent).astype(int)
    rows = [np.bincount(bins[where], minlength=NUM_BINS) for where in (values >= 0, values < 0)]
    return np.stack(rows), exponent


def assert_same(first, second):
    assert first.exponent == second.exponent
    assert np.array_equal(first.counts, second.counts)
    assert np.array_equal(first.numbers, second.numbers)
    assert np.array_equal(first.records, second.records)
    assert (first.channel_absmax is None) == (second.channel_absmax is None)
    assert first.channel_absmax is None or np.array_equal(
        first.channel_absmax, second.channel_absmax
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape",
    [
        (),
        (1,),
        (7,),
        (3, 5),
        (2, 3, 4),
        (2, 3, 5, 5),
        (2, 8, 130, 131),
        (3, 40000),
        (2, 3, 2, 2, 2),
    ],
    ids=str,
)
@pytest.mark.parametrize("relu", [False, True])
def test_equals_numpy(shape, dtype, relu):
    data = (torch.randn(shape, dtype=torch.float64) * 3).to(dtype)
    data = data.relu() if relu else data
    statistics = collect([data])
    values = data.float().double().numpy().ravel()
    counts, exponent = reference_counts(values)
    assert statistics.exponent == exponent
    assert np.array_equal(statistics.counts, counts)
    assert (statistics.low, statistics.high, statistics.absmax) == (
        values.min(),
        values.max(),
        np.abs(values).max(),
    )
    assert (statistics.count, statistics.zeros) == (values.size, int((values == 0).sum()))
    assert statistics.mean == pytest.approx(values.mean(), abs=1e-7 * np.abs(values).mean())
    assert statistics.std == pytest.approx(values.std(), rel=1e-6, abs=1e-7 * np.abs(values).max())
    nonzero = values[values != 0]
    assert statistics.laplace_b == pytest.approx(
        np.abs(nonzero).mean() if nonzero.size else 0, rel=1e-6
    )
    assert statistics.gauss_sigma == pytest.approx(
        np.sqrt((nonzero**2).mean()) if nonzero.size else 0, rel=1e-6
    )


@pytest.mark.parametrize("axis", [None, 0, 1, 2, 3, -1])
@pytest.mark.parametrize(
    "layout", ["rows", "channels last", "transposed", "every second", "expanded"]
)
def test_channels_in_any_layout(layout, axis):
    data = torch.randn(3, 6, 7, 5)
    data = {
        "rows": lambda: data,
        "channels last": lambda: data.to(memory_format=torch.channels_last),
        "transposed": lambda: data.transpose(1, 3),
        "every second": lambda: data[:, ::2, 1:],
        "expanded": lambda: data[:1].expand(3, -1, -1, -1),
    }[layout]()
    statistics = collect([data], channel_axis=axis)
    kept_axis = 1 if axis is None else axis % 4
    expected = data.abs().amax([dim for dim in range(4) if dim != kept_axis], keepdim=True)
    np.testing.assert_array_equal(statistics.channel_absmax, expected.numpy())
    assert np.array_equal(statistics.counts, collect([data.contiguous()]).counts)
    assert np.array_equal(reference_counts(data.numpy().ravel())[0], statistics.counts)


@pytest.mark.parametrize(
    ("shape", "kept_axis"), [((4, 9), 1), ((2, 4, 9), 2), ((2, 3, 4, 5), 1), ((2, 3, 4, 5, 2), 1)]
)
def test_channels_by_default(shape, kept_axis):
    data = torch.randn(shape)
    expected = data.abs().amax([dim for dim in range(len(shape)) if dim != kept_axis], keepdim=True)
    np.testing.assert_array_equal(collect([data]).channel_absmax, expected.numpy())


def test_channels_of_changing_number_are_given_up():
    parts = [torch.ones(2, 3), torch.ones(2, 4), torch.ones(2, 3)]
    assert collect(parts).channel_absmax is None
    first, second, third = (collect([part], [number]) for number, part in enumerate(parts))
    assert first.merge(second).merge(third).channel_absmax is None
    assert first.merge(third).merge(second).channel_absmax is None
    assert first.merge(third).channel_absmax.tolist() == [[1, 1, 1]]


EXTREMES = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    65504.0,
    -65504.0,
    1e30,
    -1e30,
    1e-40,
    -1e-45,
    5e-20,
    3.4e38,
    -3.4e38,
    2.0**-64,
    4096.0,
    1e-7,
]
BATCHES = st.lists(
    st.lists(
        st.one_of(
            st.sampled_from(EXTREMES),
            st.floats(-1e3, 1e3, width=32),
            st.floats(width=32, allow_nan=False),
        ),
        max_size=12,
    ).map(lambda values: [value for value in values if math.isfinite(value)]),
    min_size=1,
    max_size=6,
)


@settings(max_examples=150, deadline=None)
@given(BATCHES, st.integers(0, 6), st.randoms(use_true_random=False))
def test_parts_in_any_order_are_one_pass(batches, cut, random):
    tensors = [torch.tensor(batch, dtype=torch.float32) for batch in batches]
    expected = collect(tensors)
    halves = [
        collect(part, list(range(start, start + len(part))))
        for start, part in ((0, tensors[:cut]), (cut, tensors[cut:]))
    ]
    assert_same(halves[0].merge(halves[1]), expected)
    assert_same(halves[1].merge(halves[0]), expected)
    order = list(range(len(tensors)))
    random.shuffle(order)
    assert_same(collect([tensors[i] for i in order], order), expected)
    assert_same(TensorStatistics.from_arrays(expected.to_arrays()), expected)
    values = np.array([value for batch in batches for value in batch], np.float32)
    if values.size:
        counts, exponent = reference_counts(values)
        assert expected.exponent == exponent
        assert np.array_equal(expected.counts, counts)
        assert expected.absmax == np.abs(values).max()
        assert expected.zeros == (values == 0).sum()
    else:
        assert expected.num_batches == 0


LAYOUTS = {
    "rows": lambda data: data,
    "channels last": lambda data: data.to(memory_format=torch.channels_last),
    "every second": lambda data: data[:, ::2, 1:],
    "after ReLU": torch.relu,
    "zeros": torch.zeros_like,
}


def assert_same_but_rounding(statistics, expected):
    """The sums are added in another order on a GPU."""
    assert statistics.exponent == expected.exponent
    assert np.array_equal(statistics.counts, expected.counts)
    assert np.array_equal(statistics.channel_absmax, expected.channel_absmax)
    names = list(RECORD)
    exact = [names.index(name) for name in ("low", "high", "count", "nonzero")]
    assert np.array_equal(statistics.records[:, exact], expected.records[:, exact])
    sums_of_magnitudes = expected.records[:, names.index("sum_abs")]
    np.testing.assert_allclose(
        statistics.records, expected.records, rtol=1e-6, atol=1e-6 * sums_of_magnitudes.max()
    )


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gpu(dtype, layout, gpu, deterministic):
    powers = (0, 3, -3, 1, 2, 0, 0, -1, 1, 4)  # more batches than are added at once
    batches = [LAYOUTS[layout](torch.randn(2, 4, 20, 21) * 10**i).to(dtype) for i in powers]
    expected, collector = collect(batches), TensorCollector()
    moved = [batch.to(gpu) for batch in batches]
    with watch(gpu) as events:
        for batch in moved:
            collector.collect(batch)
    assert list_waits(events) == []
    with watch(gpu) as events:
        statistics = collector.statistics()
    assert len(list_waits(events)) == 1, list_waits(events)
    assert_same_but_rounding(statistics, expected)
    assert_same(collector.statistics(), statistics)


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (2, 3, 5, 5), (3, 0)], ids=str)
def test_gpu_any_shape(shape, gpu):
    batches = [torch.randn(shape), torch.randn(shape) * 5]
    moved = collect([batch.to(gpu) for batch in batches])
    if batches[0].numel():
        assert_same_but_rounding(moved, collect(batches))
    else:
        assert moved.num_batches == 0


def test_gpu_reads_large_tensors_in_pieces(gpu, monkeypatch):
    monkeypatch.setattr(on_device, "_PIECE", on_device._ROW)
    batches = [torch.randn(5, 2000), torch.randn(3, 4096).relu()]
    expected = collect(batches)
    assert_same_but_rounding(collect([batch.to(gpu) for batch in batches]), expected)
    for place in (0, 5000, 9999):
        broken = batches[0].clone().view(-1)
        broken[place:] = -math.inf
        with pytest.raises(
            CalibrationError, match=f"{10000 - place} of 10000 .* flat index {place};"
        ):
            collect([broken.to(gpu)])


def test_gpu_at_the_edges_of_bins(gpu):
    steps = torch.arange(-NUM_BINS + 1, NUM_BINS).float()
    for power in (-149, -120, -75, -40, 0, 60, 115):
        edges = steps * 2.0**power
        inside = torch.nextafter(edges, torch.zeros(()))
        beyond = torch.nextafter(edges[1:-1], edges[1:-1] * 2)
        batches = [edges, inside, beyond]
        assert_same_but_rounding(collect([batch.to(gpu) for batch in batches]), collect(batches))


@pytest.mark.gpu
@settings(max_examples=40, deadline=None)
@given(BATCHES)
def test_gpu_extreme_values(gpu_of_module, batches):
    tensors = [torch.tensor(batch, dtype=torch.float32) for batch in batches]
    expected, moved = collect(tensors), collect([tensor.to(gpu_of_module) for tensor in tensors])
    if expected.num_batches:
        assert_same_but_rounding(moved, expected)


@pytest.fixture(scope="module")
def gpu_of_module(gpu):
    return gpu


def test_gpu_takes_little_memory(gpu):
    """At most 9 bytes for a value of float32, and 13 for one of another type, beyond the values themselves."""
    for dtype, most in ((torch.float32, 9), (torch.bfloat16, 13)):
        batch = torch.randn(4, 16, 128, 128, device=gpu).to(dtype)
        TensorCollector().collect(batch)  # the edges are made once
        with Allocations(gpu) as allocations:
            TensorCollector().collect(batch)
        assert allocations.peak <= most * batch.numel()


class Allocations(TorchDispatchMode):
    """The most memory at once that the operators of the block take, in bytes."""

    def __init__(self, device):
        super().__init__()
        self._device = device
        self._sizes = weakref.WeakKeyDictionary()
        self.peak = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.device == self._device:
                self._note(tensor)
        return result

    def _note(self, tensor):
        storage = tensor.untyped_storage()
        known = {entry.data_ptr() for entry in self._sizes}
        if storage.data_ptr() not in known:
            self._sizes[storage] = storage.nbytes()
        self.peak = max(self.peak, sum(self._sizes.values()))


@pytest.mark.parametrize("layout", ["rows", "channels last", "every second"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_gpu_reports_defects_at_the_end(gpu, bad, layout):
    collector = TensorCollector()
    data = LAYOUTS[layout](torch.randn(2, 4, 6, 5))
    places = [(1, 1, 2, 3), (1, 1, 2, 2)]
    first = int(np.ravel_multi_index(places[1], data.shape))
    for number in range(3):
        collector.batch = number
        batch = data.clone()
        if number == 1:
            for place in places:
                batch[place] = bad
        with watch(gpu) as events:
            collector.collect(batch.to(gpu, non_blocking=True))
        assert list_waits(events) == []
    with pytest.raises(
        CalibrationError,
        match=f"batch 1: 2 of {data.numel()} values are NaN or Inf, the first at flat index {first};",
    ):
        collector.statistics()


def test_one_collector_for_two_devices(gpu):
    batches = [torch.randn(2, 3, 4, 4) * 2**i for i in range(4)]
    expected = collect([torch.cat(batches[:2]), torch.cat(batches[2:])])
    for first, second in ((gpu, "cpu"), ("cpu", gpu)):
        moved = [batch.to((first, second)[i % 2]) for i, batch in enumerate(batches)]
        assert_same_but_rounding(collect(moved, [0, 0, 1, 1]), expected)


def test_gpu_several_calls_are_one_batch(gpu):
    parts = [torch.randn(3, 5) * i for i in range(1, 21)]
    numbers = [i // 10 for i in range(20)]
    moved = collect([part.to(gpu) for part in parts], numbers)
    assert moved.num_batches == 2
    assert_same_but_rounding(moved, collect(parts, numbers))


def test_gpu_gives_up_channels_of_changing_number(gpu):
    shapes = [(2, 3), (2, 4)] + [(2, 3)] * 20
    assert collect([torch.ones(shape, device=gpu) for shape in shapes]).channel_absmax is None


def test_a_tensor_is_read_again_once_it_has_changed(monkeypatch):
    read = []
    monkeypatch.setattr(
        collector_module,
        "summarize",
        lambda *arguments: read.append(1) or summarize.summarize(*arguments),
    )
    reader, data = TensorReader(), torch.randn(2, 3, 4, 4)
    first, second = TensorCollector(reader=reader), TensorCollector(reader=reader)
    first.collect(data)
    second.collect(data)
    assert len(read) == 1
    assert_same(first.statistics(), second.statistics())
    second.collect(data.relu_())
    TensorCollector(channel_axis=0, reader=reader).collect(data)
    assert len(read) == 3
    assert second.statistics().low < 0
    assert second.statistics().records[1, 0] == 0
    reader.forget()
    second.collect(data)
    assert len(read) == 4
    with torch.inference_mode():
        frozen = torch.randn(3)
        first.collect(frozen)
        first.collect(frozen.neg_())
    assert first.statistics().records[2, 0] == -first.statistics().records[1, 1]


def test_memory_that_is_filled_again_is_read_again():
    memory, collector = np.ones((2, 3), np.float32), TensorCollector()
    data = torch.from_numpy(memory)
    for value in (1, 10, 100):
        memory[:] = value
        collector.collect(data)
    assert collector.statistics().batch_maxima().tolist() == [1, 10, 100]


def test_does_not_depend_on_the_number_of_threads():
    data = [torch.randn(4, 16, 90, 90), torch.randn(4, 16, 90, 90) * 100]
    num_threads = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(collect(data))
    finally:
        torch.set_num_threads(num_threads)
    assert_same(results[0], results[1])
    assert_same(results[0], results[2])


def test_bins_in_use():
    for absmax in (1e-3, 1.0, 2.0, 3.999999, 4.0, 65504.0, 3e38):
        exponent = exponent_of(absmax)
        assert NUM_BINS / 2 <= absmax / 2.0**exponent < NUM_BINS
    assert exponent_of(0.0) == exponent_of(1e-30) == LEAST_EXPONENT


def test_calls_with_one_number_are_one_batch():
    first, second = torch.randn(3, 5), torch.randn(2, 5) * 4
    statistics = collect([first, second], [7, 7])
    assert statistics.num_batches == 1
    assert statistics.batch_maxima().tolist() == [torch.cat([first, second]).abs().max()]
    assert statistics.mean == pytest.approx(torch.cat([first, second]).double().mean().item())


def test_without_numbers_every_call_is_a_batch():
    collector = TensorCollector()
    for value in (1.0, 3.0, 2.0):
        collector.collect(torch.full((4,), value))
    assert collector.statistics().batch_maxima().tolist() == [1, 3, 2]
    collector.reset()
    assert collector.num_batches == 0
    assert collector.statistics().count == 0


def test_the_tensor_is_left_as_it_is_in_any_mode(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for make in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with make():
            data = torch.randn(2, 3, 200, 200, requires_grad=True)
            former = data.detach().clone()
            statistics = collect([data, data * 2])
        assert torch.equal(data.detach(), former)
        assert statistics.count == 2 * data.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_not_finite_is_counted_and_located(bad, dtype):
    data = torch.randn(2, 3, 150, 150).to(dtype)
    data[1, 2, 3, 4] = data[1, 2, 3, 9] = bad
    first = np.ravel_multi_index((1, 2, 3, 4), data.shape)
    for layout in (data, data.to(memory_format=torch.channels_last)):
        collector = TensorCollector()
        collector.collect(torch.ones(1, 3, 2, 2))
        former = collector.statistics()
        with pytest.raises(
            CalibrationError,
            match=f"2 of 135000 values are NaN or Inf, the first at flat index {first};",
        ):
            collector.collect(layout)
        assert_same(former, collector.statistics())


def test_beyond_float32():
    with pytest.raises(CalibrationError, match="1 of 2 values"):
        collect([torch.tensor([1.0, 1e300], dtype=torch.float64)])


def test_no_tensor():
    with pytest.raises(ArgumentTypeError, match="not a tensor"):
        collect([[1.0]])


def test_same_batches_twice_are_no_merge():
    statistics = collect([torch.ones(3)])
    with pytest.raises(ArgumentError, match="overlap"):
        statistics.merge(statistics)
    assert statistics.merge(statistics.shifted(1)).count == 6


def test_arrays_and_back():
    statistics = collect([torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)])
    assert_same(TensorStatistics.from_arrays(statistics.to_arrays()), statistics)
    assert_same(
        TensorStatistics.from_arrays(TensorStatistics.empty().to_arrays()), TensorStatistics.empty()
    )
    for name, wrong in [
        ("counts", np.zeros((2, 5), np.int64)),
        ("counts", statistics.counts * 2),
        ("counts", -statistics.counts),
        ("exponent", np.zeros(1)),
        ("numbers", np.zeros(9, np.int64)),
        ("records", statistics.records * math.nan),
        ("channel_absmax", np.zeros((2, 2))),
    ]:
        with pytest.raises(ArgumentError, match="not statistics"):
            TensorStatistics.from_arrays(statistics.to_arrays() | {name: wrong})
    with pytest.raises(ArgumentError, match="records is missing"):
        TensorStatistics.from_arrays(
            {name: a for name, a in statistics.to_arrays().items() if name != "records"}
        )


def test_coarsen():
    counts = np.arange(2 * NUM_BINS, dtype=np.int64).reshape(2, -1)
    assert coarsen(counts, 0) is counts
    assert coarsen(counts, 1)[0, 3] == 6 + 7
    assert coarsen(counts, 50)[1].tolist() == [counts[1].sum()] + [0] * (NUM_BINS - 1)


@pytest.mark.parametrize("columns", [1, 7, 64, 5000])
def test_histogram_of_a_few_columns(columns):
    data = torch.cat([torch.randn(5000) * 3, torch.zeros(700)])
    statistics = collect([data])
    counts, end = statistics.histogram(columns)
    assert counts.size <= columns
    assert end >= statistics.absmax
    assert counts.sum() == 5000
    edges = np.arange(counts.size + 1) * (end / counts.size)
    expected, _ = np.histogram(data[data != 0].abs().numpy(), edges)
    assert counts.tolist() == expected.tolist()


def test_histogram_before_data():
    counts, _ = TensorStatistics.empty().histogram(64)
    assert counts.sum() == 0


@pytest.mark.parametrize(
    "fmt", [Format(), Format(4), Format(8, unsigned=True), Format(8, narrow_range=True)], ids=str
)
@pytest.mark.parametrize("share", [0.2, 0.7, 1.0])
def test_error_of_rounding_from_the_histogram(fmt, share):
    data = torch.cat([torch.randn(20_000), torch.zeros(5_000)]).double()
    data = data.abs() if fmt.unsigned else data
    statistics, amax = collect([data]), share * float(data.abs().max())
    scale = amax / fmt.qmax
    rounded = (data / scale).round().clamp(fmt.qmin, fmt.qmax) * scale
    expected = 10 * math.log10(float((data**2).sum() / ((data - rounded) ** 2).sum()))
    assert statistics.rounding_sqnr_db(amax, fmt) == pytest.approx(expected, abs=0.05)


def test_zeros_lose_nothing():
    assert collect([torch.zeros(9)]).rounding_sqnr_db(1.0, Format()) == math.inf
    assert TensorStatistics.empty().rounding_sqnr_db(1.0, Format()) == math.inf
