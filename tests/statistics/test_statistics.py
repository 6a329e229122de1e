"""Saved statistics: what they say of values, chosen by name, merged from files."""

import json
import logging

import numpy as np
import pytest
import torch
from small_model import make_batches, make_model

from qdq import ArgumentError, DataError, Statistics, collect_statistics, solve_ranges, swap_modules
from qdq.formats import Format
from qdq.observers.collector import TensorCollector
from qdq.observers.solve import SOLVERS
from qdq.statistics import merge_files


def collect(*batches):
    collector = TensorCollector()
    for batch in batches:
        collector.collect(torch.from_numpy(np.asarray(batch, np.float32)))
    return collector.statistics()


@pytest.fixture
def files(tmp_path):
    """Statistics of the first two batches, and of the other three."""
    batches = make_batches(5)
    return [
        collect_statistics(make_model(), part, statistics=tmp_path / f"{name}.safetensors") and path
        for name, part in (("a", batches[:2]), ("b", batches[2:]))
        if (path := tmp_path / f"{name}.safetensors")
    ]


class TestClippedShare:
    @pytest.mark.parametrize("unsigned", [False, True])
    @pytest.mark.parametrize("share", [0.001, 0.1, 0.5, 0.97])
    def test_is_that_of_the_values_but_for_one_bin(self, unsigned, share):
        values = np.random.default_rng(0).standard_normal(20_000).astype(np.float32)
        statistics = collect(values)
        amax = share * statistics.absmax
        magnitudes = np.maximum(values, 0) if unsigned else np.abs(values)
        bin_of_amax = np.floor(amax / statistics.width) * statistics.width
        in_bin = np.mean(
            (magnitudes >= bin_of_amax) & (magnitudes < bin_of_amax + statistics.width)
        )
        assert statistics.clipped_share(amax, unsigned) == pytest.approx(
            np.mean(magnitudes > amax), abs=in_bin + 1e-12
        )

    def test_at_the_edge_of_a_bin_it_is_exact(self):
        values = np.random.default_rng(1).standard_normal(5_000).astype(np.float32)
        statistics = collect(values)
        for number in (0, 1, 700, 2000):
            assert statistics.clipped_share(number * statistics.width) == np.mean(
                np.abs(values) >= number * statistics.width
            )

    def test_nothing_lies_beyond_the_maximum(self):
        statistics = collect([-5.0, 1.0, 3.0])
        assert statistics.clipped_share(5.0) == statistics.clipped_share(9.0) == 0
        assert statistics.clipped_share(3.0, unsigned=True) == 0
        assert collect().clipped_share(0.0) == 0
        assert collect([0.0, 0.0]).clipped_share(0.0) == 0


class TestSelect:
    def test_by_name_and_by_glob(self):
        statistics = collect_statistics(make_model(), make_batches(1))
        assert list(statistics.select("0._input_quantizer").tensors) == ["0._input_quantizer"]
        assert list(statistics.select("*").tensors) == list(statistics.tensors)
        assert statistics.select("[02].*").summarize()["tensors"].keys() == {
            "0._input_quantizer",
            "2._input_quantizer",
        }

    def test_of_nothing(self):
        statistics = collect_statistics(make_model(), make_batches(1))
        with pytest.raises(
            ArgumentError, match=r"no tensor matches 'layer\*'; there are 0\._input_quantizer"
        ):
            statistics.select("layer*")


def test_solve_all_is_what_the_model_gets():
    model = make_model()
    statistics = collect_statistics(model, make_batches(2))
    for method in SOLVERS:
        ranges = {
            entry.name: entry.amax
            for entry in solve_ranges(model, statistics, method=method)
            if entry.batches
        }
        assert {
            name: np.float32(amax) for name, amax in statistics.solve_all(method).items()
        } == ranges
    assert statistics.solve_all("percentile", percentile=50.0) != statistics.solve_all("percentile")


def test_a_tensor_without_integer_format_has_its_maximum():
    tensor = collect([1.0, -7.0])
    statistics = Statistics({"a": tensor, "b": tensor}, {"a": None, "b": Format()})
    assert statistics.solve_all("percentile", percentile=20.0)["a"] == 7
    assert statistics.summarize()["tensors"]["a"]["amax"] == {"max": 7}


def test_shared_ranges_are_named_in_the_file(residual, images):
    import qdq

    qdq.fold_batchnorm(residual, images)
    swap_modules(residual, images)
    qdq.rewire_operations(residual, images)
    statistics = collect_statistics(residual, [images])
    shared = {
        name: module.leader
        for name, module in residual.named_modules()
        if isinstance(module, qdq.quantizer.SharedQuantizer)
    }
    assert shared
    names = {module: name for name, module in residual.named_modules()}
    assert Statistics.from_bytes(statistics.to_bytes()).shared == {
        name: names[leader] for name, leader in shared.items()
    }


class TestMergeFiles:
    def test_is_one_pass_over_all(self, files, tmp_path):
        expected = collect_statistics(make_model(), make_batches(5))
        merged = merge_files(files, tmp_path / "both.safetensors")
        assert (
            merged.to_bytes() == expected.to_bytes() == (tmp_path / "both.safetensors").read_bytes()
        )
        assert (tmp_path / "both.json").exists()

    def test_may_replace_one_of_them(self, files):
        expected = Statistics.load(files[0]).merge(Statistics.load(files[1])).to_bytes()
        merge_files(files, files[0])
        assert files[0].read_bytes() == expected

    def test_of_passes_that_had_a_limit_is_complete(self, tmp_path):
        paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        for path, batches in zip(paths, (make_batches(4), make_batches(6)[4:]), strict=True):
            collect_statistics(make_model(), batches, num_batches=2, statistics=path)
        merged = tmp_path / "both.safetensors"
        assert merge_files(paths, merged).limit is None
        again = collect_statistics(make_model(), make_batches(4), statistics=merged)  # only read
        assert again.to_bytes() == merged.read_bytes()

    def test_of_other_models_says_which_file(self, files, residual, tmp_path):
        swap_modules(residual)
        foreign = collect_statistics(residual, [torch.randn(1, 3, 12, 12)]).save(
            tmp_path / "other.safetensors"
        )
        with pytest.raises(
            ArgumentError,
            match=r"other\.safetensors does not fit .*a\.safetensors: .*different models",
        ):
            merge_files([files[0], foreign], tmp_path / "both.safetensors")
        assert not (tmp_path / "both.safetensors").exists()

    def test_of_a_pass_that_was_cut_off(self, files, tmp_path):
        from dataclasses import replace

        cut = replace(Statistics.load(files[1]), complete=False).save(tmp_path / "cut.safetensors")
        with pytest.raises(
            ArgumentError, match=r"cut\.safetensors holds a pass that was cut off after 3 batches"
        ):
            merge_files([files[0], cut], tmp_path / "both.safetensors")

    def test_of_one(self, files, tmp_path):
        with pytest.raises(ArgumentError, match="merging takes two"):
            merge_files(files[:1], tmp_path / "both.safetensors")

    def test_of_the_same_data_warns(self, files, tmp_path, caplog):
        with caplog.at_level(logging.WARNING, logger="qdq"):
            merge_files([*files, files[1]], tmp_path / "three.safetensors")
        assert [record.message.count("b.safetensors") for record in caplog.records] == [2]


def edit_facts(content, change):
    """The content of a file with the JSON beside its arrays edited."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    (key,) = header["__metadata__"]
    header["__metadata__"][key] = change(header["__metadata__"][key])
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[8 + length :]


class TestDamage:
    @pytest.fixture
    def content(self, files):
        return files[0].read_bytes()

    def test_any_flipped_bit_is_noticed(self, content):
        random = np.random.default_rng(0)
        header = 8 + int.from_bytes(content[:8], "little")
        places = [*range(8, header), *random.integers(header, len(content), 200)]
        for place in places:
            damaged = bytearray(content)
            damaged[place] ^= 1 << random.integers(8)
            with pytest.raises(DataError):
                Statistics.from_bytes(bytes(damaged))

    def test_files_of_a_version_without_digests_are_read(self, content):
        old = edit_facts(
            content,
            lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k != "digest"}),
        )
        assert Statistics.from_bytes(old).to_bytes() == content

    @pytest.mark.parametrize(
        ("key", "value", "message"),
        [
            ("shared", None, "shared is null, expected: an object"),
            ("shared", {"x": "y"}, "'x' shares the range of 'y', which is missing"),
            ("formats", {"0._input_quantizer": {}}, "num_bits is missing"),
            ("formats", {}, "has statistics, but no format"),
            ("formats", {"a": None}, "has statistics, but no format"),
            ("batches", -1, "batches is -1, expected: greater than or equal to 0"),
            ("batches", 2.5, "batches is 2.5"),
            ("complete", 1, "complete is 1"),
            ("limit", "all", "limit is 'all'"),
            ("model", ["x"], "model is a list of 1"),
            ("more", 1, "more is unknown"),
        ],
    )
    def test_facts_are_held_against_their_types(self, content, tmp_path, key, value, message):
        def change(text):
            facts = json.loads(text) | {key: value}
            del facts["digest"]
            return json.dumps(facts)

        path = tmp_path / "damaged.safetensors"
        path.write_bytes(edit_facts(content, change))
        with pytest.raises(DataError, match=rf"damaged\.safetensors is damaged: .*{message}"):
            Statistics.load(path)

    @pytest.mark.parametrize("text", ["", "[" * 100_000, '{"batches": NaN}', "[]", "3"])
    def test_facts_that_are_none(self, content, text):
        with pytest.raises(DataError):
            Statistics.from_bytes(edit_facts(content, lambda _: text))

    @pytest.mark.parametrize(
        ("name", "change", "message"),
        [
            ("exponent", lambda array: array + 2**62, "exponent is 46"),
            ("exponent", lambda array: array - 1000, "exponent is -"),
            ("exponent", lambda array: array.astype(np.int32), r"exponent is int32\[1\]"),
            ("counts", lambda array: -array, "contradict"),
            ("counts", lambda array: array[:, :7], r"counts is int64\[2, 7\]"),
            ("counts", lambda array: np.full_like(array, 2**62), "contradict"),
            ("numbers", lambda array: array[::-1].copy(), "do not ascend"),
            ("numbers", lambda array: array + 2**62, "do not ascend"),
            ("records", lambda array: array * np.nan, "not sums of float32"),
            ("records", lambda array: np.full_like(array, 1e308), "not sums of float32"),
            (
                "records",
                lambda array: array[:, ::-1].copy(),
                "lowest value is above|impossible counts",
            ),
            ("channel_absmax", lambda array: -array - 1, "not maxima"),
        ],
    )
    def test_arrays_are_held_against_what_data_gives(self, content, name, change, message):
        statistics = Statistics.from_bytes(content).tensors["0._input_quantizer"]
        arrays = statistics.to_arrays()
        with pytest.raises(ArgumentError, match=message):
            type(statistics).from_arrays({**arrays, name: change(arrays[name])})

    def test_arrays_that_are_missing_or_unknown(self, content):
        statistics = Statistics.from_bytes(content).tensors["0._input_quantizer"]
        arrays = statistics.to_arrays()
        for name in ("counts", "exponent", "numbers", "records"):
            with pytest.raises(ArgumentError, match=f"{name} is missing"):
                type(statistics).from_arrays(
                    {key: value for key, value in arrays.items() if key != name}
                )
        with pytest.raises(ArgumentError, match="'more' is not one of its arrays"):
            type(statistics).from_arrays({**arrays, "more": arrays["counts"]})
