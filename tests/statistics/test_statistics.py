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
        found = collect(values)
        amax = share * found.absmax
        magnitudes = np.maximum(values, 0) if unsigned else np.abs(values)
        bin_of_amax = np.floor(amax / found.width) * found.width
        in_bin = np.mean((magnitudes >= bin_of_amax) & (magnitudes < bin_of_amax + found.width))
        assert found.clipped_share(amax, unsigned) == pytest.approx(
            np.mean(magnitudes > amax), abs=in_bin + 1e-12
        )

    def test_at_the_edge_of_a_bin_it_is_exact(self):
        values = np.random.default_rng(1).standard_normal(5_000).astype(np.float32)
        found = collect(values)
        for number in (0, 1, 700, 2000):
            assert found.clipped_share(number * found.width) == np.mean(
                np.abs(values) >= number * found.width
            )

    def test_nothing_lies_beyond_the_maximum(self):
        found = collect([-5.0, 1.0, 3.0])
        assert found.clipped_share(5.0) == found.clipped_share(9.0) == 0
        assert found.clipped_share(3.0, unsigned=True) == 0
        assert collect().clipped_share(0.0) == 0
        assert collect([0.0, 0.0]).clipped_share(0.0) == 0


class TestSelect:
    def test_by_name_and_by_glob(self):
        found = collect_statistics(make_model(), make_batches(1))
        assert list(found.select("0._input_quantizer").tensors) == ["0._input_quantizer"]
        assert list(found.select("*").tensors) == list(found.tensors)
        assert found.select("[02].*").summarize()["tensors"].keys() == {
            "0._input_quantizer",
            "2._input_quantizer",
        }

    def test_of_nothing(self):
        found = collect_statistics(make_model(), make_batches(1))
        with pytest.raises(
            ArgumentError, match=r"no tensor fits 'layer\*'; there are 0\._input_quantizer"
        ):
            found.select("layer*")


def test_solve_all_is_what_the_model_gets():
    model = make_model()
    found = collect_statistics(model, make_batches(2))
    for method in SOLVERS:
        ranges = {
            entry.name: entry.amax
            for entry in solve_ranges(model, found, method=method)
            if entry.batches
        }
        assert {name: np.float32(amax) for name, amax in found.solve_all(method).items()} == ranges
    assert found.solve_all("percentile", percentile=50.0) != found.solve_all("percentile")


def test_a_tensor_without_integer_format_has_its_maximum():
    tensor = collect([1.0, -7.0])
    found = Statistics({"a": tensor, "b": tensor}, {"a": None, "b": Format()})
    assert found.solve_all("percentile", percentile=20.0)["a"] == 7
    assert found.summarize()["tensors"]["a"]["amax"] == {"max": 7}


def test_shared_ranges_are_named_in_the_file(residual, images):
    import qdq

    qdq.fold_batchnorm(residual, images)
    swap_modules(residual, images)
    qdq.rewire_operations(residual, images)
    found = collect_statistics(residual, [images])
    shared = {
        name: module.leader
        for name, module in residual.named_modules()
        if isinstance(module, qdq.quantizer.SharedQuantizer)
    }
    assert shared
    names = {module: name for name, module in residual.named_modules()}
    assert Statistics.from_bytes(found.to_bytes()).shared == {
        name: names[leader] for name, leader in shared.items()
    }


class TestMergeFiles:
    def test_is_one_pass_over_all(self, files, tmp_path):
        whole = collect_statistics(make_model(), make_batches(5))
        merged = merge_files(files, tmp_path / "both.safetensors")
        assert merged.to_bytes() == whole.to_bytes() == (tmp_path / "both.safetensors").read_bytes()
        assert (tmp_path / "both.json").exists()

    def test_may_replace_one_of_them(self, files):
        expected = Statistics.load(files[0]).merge(Statistics.load(files[1])).to_bytes()
        merge_files(files, files[0])
        assert files[0].read_bytes() == expected

    def test_of_passes_that_had_a_limit_is_complete(self, tmp_path):
        paths = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
        for path, batches in zip(paths, (make_batches(4), make_batches(6)[4:]), strict=True):
            collect_statistics(make_model(), batches, num_batches=2, statistics=path)
        both = tmp_path / "both.safetensors"
        assert merge_files(paths, both).limit is None
        again = collect_statistics(make_model(), make_batches(4), statistics=both)  # only read
        assert again.to_bytes() == both.read_bytes()

    def test_of_other_models_says_which_file(self, files, residual, tmp_path):
        swap_modules(residual)
        other = collect_statistics(residual, [torch.randn(1, 3, 12, 12)]).save(
            tmp_path / "other.safetensors"
        )
        with pytest.raises(
            ArgumentError,
            match=r"other\.safetensors does not fit .*a\.safetensors: .*different models",
        ):
            merge_files([files[0], other], tmp_path / "both.safetensors")
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
            ("shared", {"x": "y"}, "'x' shares the range of 'y', which is not there"),
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
            ("records", lambda array: array * np.nan, "no sums of float32"),
            ("records", lambda array: np.full_like(array, 1e308), "no sums of float32"),
            ("records", lambda array: array[:, ::-1].copy(), "lowest value lies above|count what"),
            ("channel_absmax", lambda array: -array - 1, "no maximum"),
        ],
    )
    def test_arrays_are_held_against_what_data_gives(self, content, name, change, message):
        found = Statistics.from_bytes(content).tensors["0._input_quantizer"]
        arrays = found.to_arrays()
        with pytest.raises(ArgumentError, match=message):
            type(found).from_arrays({**arrays, name: change(arrays[name])})

    def test_arrays_that_are_missing_or_unknown(self, content):
        found = Statistics.from_bytes(content).tensors["0._input_quantizer"]
        arrays = found.to_arrays()
        for name in ("counts", "exponent", "numbers", "records"):
            with pytest.raises(ArgumentError, match=f"{name} is missing"):
                type(found).from_arrays(
                    {key: value for key, value in arrays.items() if key != name}
                )
        with pytest.raises(ArgumentError, match="'more' is none of its arrays"):
            type(found).from_arrays({**arrays, "more": arrays["counts"]})
