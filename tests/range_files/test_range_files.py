"""Ranges in and out: every format through every kind of ONNX file, against torch and numpy."""

import contextlib
import copy
import io
import json
import struct
import warnings

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

import qdq
from qdq.errors import ArgumentError, CalibrationError, StateError
from qdq.quantize import compute_scale
from qdq.quantizer import SharedQuantizer, named_quantizers
from qdq.range_files import FORMATS
from qdq.range_files.entry import amax_of_scale

ACTIVATIONS = {
    "stem._input_quantizer",
    "layers.0.conv1._input_quantizer",
    "layers.0.conv2._input_quantizer",
    "layers.1.conv1._input_quantizer",
    "layers.1.conv2._input_quantizer",
    "fc._input_quantizer",
}
# Each has the range of the conv1 beside it.
SHORTCUTS = {
    "layers.0._add_quantizer",
    "layers.1._add_quantizer",
}
ONE_OF_EACH = [
    (name, link) for name in FORMATS if name != "qdq" for link in ("dynamo", "torchscript", "qdq")
]


def _scales(model):
    return {name: q.scale.flatten() for name, q in named_quantizers(model) if q.amax is not None}


def _amax(model, name):
    return model.get_submodule(name).amax


def _truth(case):
    """What each layer is given, by torch's own forward: largest absolute value in float64."""
    amaxes = {}

    def remember(name):
        return lambda _, inputs: amaxes.__setitem__(name, inputs[0].double().abs().max().item())

    for name, module in case.float.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_pre_hook(remember(f"{name}._input_quantizer"))
    case.float(case.images)
    return amaxes


@pytest.mark.parametrize(("name", "link"), [*ONE_OF_EACH, ("aimet-0.6.1", None), ("qdq", "qdq")])
def test_round_trip_keeps_every_bit_of_the_scales(case, tmp_path, name, link):
    path, onnx_file = tmp_path / "ranges", case.files.get(link)
    written = qdq.export_ranges(case.calibrated, path, format=name, onnx=onnx_file)
    read = qdq.import_ranges(case.swapped, path, onnx=None if name == "qdq" else onnx_file)
    assert read.format == name.replace("-0.6.1", "")
    expected, scales = _scales(case.calibrated), _scales(case.swapped)
    # Weights that a file has no place for come from the weights.
    assert scales.keys() == expected.keys()
    assert all(torch.equal(scales[key], expected[key]) for key in expected)
    assert set(read.matched) >= ACTIVATIONS | SHORTCUTS
    holds_weights = name not in ("tensorrt", "onnxruntime")
    assert (read.missing == {}) == holds_weights
    assert written.written.keys() | written.left_out.keys() == expected.keys()


def test_what_was_imported_computes_as_what_was_exported(case, tmp_path):
    qdq.export_ranges(
        case.calibrated, tmp_path / "cache", format="tensorrt", onnx=case.files["torchscript"]
    )
    qdq.import_ranges(case.swapped, tmp_path / "cache", onnx=case.files["torchscript"])
    assert torch.equal(case.swapped(case.images), case.calibrated(case.images))


def test_scales_without_an_exact_amax_are_the_only_ones_that_move():
    # Any mantissa, 2^-47 to 2^23.
    bits = np.random.default_rng(0).integers(80 << 23, 150 << 23, 20000, np.int32)
    scales = bits.view(np.float32)
    computed = compute_scale(torch.from_numpy(amax_of_scale(scales, 127)), qdq.Format()).numpy()
    moved = computed != scales
    assert np.abs(computed.view(np.int32) - scales.view(np.int32)).max() <= 1
    candidates = (scales * np.float32(127)).view(np.int32)[:, None] + np.arange(
        -8, 9, dtype=np.int32
    )
    has_one = (candidates.view(np.float32) / np.float32(127) == scales[:, None]).any(1)
    assert np.array_equal(moved, ~has_one)
    assert 0 < moved.mean() < 0.01


def test_scales_of_ranges_always_come_back():
    amax = torch.rand(20000) * 2.0 ** torch.randint(-30, 20, (20000,))
    scale = compute_scale(amax, qdq.Format())
    assert torch.equal(
        compute_scale(torch.from_numpy(amax_of_scale(scale.numpy(), 127)), qdq.Format()), scale
    )


class TestTensorRT:
    def test_lines_are_hexadecimal_float32_scales(self, case, tmp_path):
        truth = _truth(case)
        report = qdq.export_ranges(
            case.calibrated, tmp_path / "cache", format="tensorrt", onnx=case.files["dynamo"]
        )
        # Not the convolutions.
        assert [report.written[name] for name in sorted(SHORTCUTS)] == [
            ("relu",),
            ("relu_2",),
        ]
        header, *lines = (tmp_path / "cache").read_text().splitlines()
        assert header.startswith("TRT-") and header.endswith("-EntropyCalibration2")
        scale_texts = dict(line.split(": ") for line in lines)
        assert set(scale_texts) == {"x", "relu", "relu_1", "relu_2", "relu_3", "mean"}
        for tensor, layer in {"x": "stem", "relu_1": "layers.0.conv2", "mean": "fc"}.items():
            scale = np.float32(truth[f"{layer}._input_quantizer"]) / np.float32(127)
            assert scale_texts[tensor] == struct.pack(">f", scale).hex()

    def test_a_cache_of_tensorrt(self, case, tmp_path):
        """Its lines: digits without leading zeros, 0 for no range, names with blanks and colons, other tensors."""
        cache = tmp_path / "calibration.cache"
        cache.write_bytes(
            b"TRT-8401-EntropyCalibration2\r\nx: 3c010a14\r\nrelu: 3d000000\r\nrelu_1: 3caa54fc\r\nrelu_2: 0\r\n"
            b"relu_3: 3f800000\r\n(Unnamed Layer* 64) [Shuffle]_output: 3caa54fc\r\nns::conv: 3caa54fc\r\n"
        )
        report = qdq.import_ranges(case.swapped, cache, onnx=case.files["dynamo"])
        assert report.matched["layers.1.conv2._input_quantizer"] == 127.0
        assert (
            report.matched["layers.0.conv1._input_quantizer"]
            == report.matched["layers.0._add_quantizer"]
            == 127 / 32
        )
        assert (
            case.swapped.stem._input_quantizer.scale
            == struct.unpack(">f", bytes.fromhex("3c010a14"))[0]
        )
        assert "scale is 0" in report.missing["layers.1.conv1._input_quantizer"]
        assert "no entry" in report.missing["fc._input_quantizer"]
        assert _amax(case.swapped, "fc._input_quantizer") is None
        assert set(report.unmatched) == {
            "relu_2",
            "(Unnamed Layer* 64) [Shuffle]_output",
            "ns::conv",
        }
        table = report.format_table()
        assert "5 quantizers have their range" in table
        assert "(Unnamed Layer* 64)" in table and "fc._input_quantizer" in table

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("relu: 3c010a14\n", "known format"),
            ("TRT-8401-EntropyCalibration2\n", "contains no range"),
            ("TRT-8401-EntropyCalibration2\nrelu 3c010a14\n", "line 2"),
            ("TRT-8401-EntropyCalibration2\nrelu: 3c01zz14\n", "line 2"),
            ("TRT-8401-EntropyCalibration2\nrelu: 3c010a1412\n", "line 2"),
            ("TRT-8401-EntropyCalibration2\nx: 3c010a14\nrelu: 3c01\n", r"relu: its scale is 2"),
            ("TRT-8401-EntropyCalibration2\nrelu: 7fc00000\n", "scale is nan"),
            ("TRT-8401-EntropyCalibration2\nrelu: 7f800000\n", "scale is inf"),
            ("TRT-8401-EntropyCalibration2\nrelu: 7f7fffff\n", "scale is inf"),  # times 127
            ("TRT-8401-EntropyCalibration2\nrelu: bc010a14\n", "scale is -0.007"),
            (
                "TRT-8401-EntropyCalibration2\nrelu: 3c010a14\nrelu: 3d010a14\n",
                "two different ranges",
            ),
            ("TRT-8401-EntropyCalibration2\nelsewhere: 3c010a14\n", "none of its 1 entries"),
            ("TRT-8401-EntropyCalibration2\nrelu: 0\n", "none of its 1 entries"),
        ],
    )
    def test_damaged_files_change_nothing(self, case, tmp_path, text, message):
        (tmp_path / "cache").write_text(text)
        with pytest.raises(CalibrationError, match=message) as caught:
            qdq.import_ranges(case.swapped, tmp_path / "cache", onnx=case.files["dynamo"])
        assert caught.value.fix and str(tmp_path / "cache") in caught.value.message
        assert _scales(case.swapped) == {}

    @pytest.mark.parametrize(
        "header",
        [
            "TRT-8XXX-EntropyCalibration2 ",
            "TRT-100300-MinMaxCalibration",
            "\ufeffTRT-8601-LegacyCalibration",
        ],
    )
    def test_headers_of_every_tool(self, case, tmp_path, header):
        (tmp_path / "cache").write_text(f"{header}\nrelu: 3f800000\n", encoding="utf-8")
        report = qdq.import_ranges(case.swapped, tmp_path / "cache", onnx=case.files["dynamo"])
        assert (
            report.format == "tensorrt"
            and report.matched["layers.0.conv1._input_quantizer"] == 127.0
        )

    @pytest.mark.parametrize("digits", ["7f800000", "ff800000", "7fc00000", "bc010a14", "2b", "0"])
    def test_damage_is_an_error_only_where_a_quantizer_stands(self, case, tmp_path, digits):
        """The mask of a transformer is -inf; nothing quantizes it."""
        (tmp_path / "cache").write_text(
            f"TRT-8401-EntropyCalibration2\nrelu: 3f800000\nmask: {digits}\n"
        )
        report = qdq.import_ranges(case.swapped, tmp_path / "cache", onnx=case.files["dynamo"])
        assert report.matched["layers.0.conv1._input_quantizer"] == 127.0
        assert "its scale is" in report.unmatched["mask"] and "mask" in report.format_table()

    def test_the_same_line_twice_is_no_contradiction(self, case, tmp_path):
        (tmp_path / "cache").write_text(
            "TRT-8401-EntropyCalibration2\nrelu: 3c010a14\nrelu: 3c010a14\n"
        )
        assert (
            len(
                qdq.import_ranges(
                    case.swapped, tmp_path / "cache", onnx=case.files["dynamo"]
                ).matched
            )
            == 2
        )


def _reader(case, name="x"):
    from onnxruntime.quantization import CalibrationDataReader

    class Reader(CalibrationDataReader):
        def __init__(self):
            self.batches = iter([{name: case.images.numpy()}])

        def get_next(self):
            return next(self.batches, None)

    return Reader()


class TestONNXRuntime:
    @pytest.fixture
    def folder(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)  # its calibrators write beside the caller
        return tmp_path

    @pytest.mark.parametrize("method", ["MinMax", "Entropy", "Percentile"])
    def test_its_calibrators(self, case, folder, method):
        from onnxruntime.quantization import CalibrationMethod, create_calibrator
        from onnxruntime.quantization.calibrate import save_tensors_data
        from onnxruntime.quantization.quant_utils import write_calibration_table

        calibrator = create_calibrator(
            case.files["dynamo"], calibrate_method=CalibrationMethod[method]
        )
        calibrator.collect_data(_reader(case))
        data = calibrator.compute_data()
        save_tensors_data(data, folder / "saved.json")
        write_calibration_table(data.data, str(folder))
        for file in ("saved.json", "calibration.json"):
            model = copy.deepcopy(case.swapped)
            report = qdq.import_ranges(model, folder / file, onnx=case.files["dynamo"])
            assert report.format == "onnxruntime" and set(report.matched) == ACTIVATIONS | SHORTCUTS
            low, high = data["relu_1"].range_value
            expected = max(abs(np.float32(low).item()), abs(np.float32(high).item()))
            assert report.matched["layers.0.conv2._input_quantizer"] == expected
            if method == "MinMax":
                truth = _truth(case)
                assert {name: report.matched[name] for name in truth} == pytest.approx(
                    truth, rel=1e-5
                )
                # Behind a ReLU.
                assert "made symmetric" in report.notes["layers.0.conv2._input_quantizer"]

    def test_its_loader_and_its_quantizer_take_ours(self, case, folder):
        from onnxruntime.quantization import (
            QuantFormat,
            QuantType,
            load_tensors_data,
            quantize_static,
        )

        qdq.export_ranges(
            case.calibrated, "ours.json", format="onnxruntime", onnx=case.files["dynamo"]
        )
        loaded = load_tensors_data(folder / "ours.json")
        relu = case.calibrated.layers[0].conv1._input_quantizer
        assert [value.item() for value in loaded["relu"].range_value] == [
            -relu.amax.item(),
            relu.amax.item(),
        ]
        quantize_static(
            case.files["dynamo"],
            "theirs.onnx",
            calibration_data_reader=None,
            calibration_cache_path="ours.json",
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QInt8,
            op_types_to_quantize=["Conv"],
            extra_options={
                "ActivationSymmetric": True,
                "OpTypesToExcludeOutputQuantization": ["Conv"],
            },
        )
        initializers = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in onnx.load("theirs.onnx").graph.initializer
        }
        assert initializers["relu_scale"] == pytest.approx(relu.scale.item(), rel=1e-6)

    @pytest.mark.parametrize("link", ["dynamo", "torchscript"])
    def test_its_symmetric_qdq_file(self, case, folder, link):
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        first = onnx.load(case.files[link]).graph.input[0].name
        quantize_static(
            case.files[link],
            "theirs.onnx",
            _reader(case, first),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QInt8,
            weight_type=QuantType.QInt8,
            op_types_to_quantize=["Conv", "Gemm"],
            extra_options={"ActivationSymmetric": True, "WeightSymmetric": True},
        )
        report = qdq.import_ranges(case.swapped, "theirs.onnx")
        assert report.format == "qdq" and not report.missing
        scales = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in onnx.load("theirs.onnx").graph.initializer
        }
        model_scales = _scales(case.swapped)
        assert np.allclose(
            model_scales["layers.1.conv1._weight_quantizer"],
            scales["layers.1.conv1.weight_scale"],
            rtol=2e-7,
        )
        assert model_scales["stem._input_quantizer"].item() == pytest.approx(
            scales[f"{first}_scale"].item(), rel=2e-7
        )
        assert {name: report.matched[name] for name in ACTIVATIONS} == pytest.approx(
            _truth(case), rel=1e-5
        )
        assert any("bias" in name for name in report.unmatched)

    def test_its_asymmetric_qdq_file_is_widened(self, case, folder):
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        quantize_static(
            case.files["dynamo"],
            "theirs.onnx",
            _reader(case),
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
        )
        report = qdq.import_ranges(case.swapped, "theirs.onnx")
        truth = _truth(case)
        assert {name: report.matched[name] for name in truth} == pytest.approx(truth, rel=0.01)
        assert "made symmetric" in report.notes["layers.0.conv2._input_quantizer"]
        assert "one range for all channels" in report.notes["stem._weight_quantizer"]
        assert tuple(case.swapped.stem._weight_quantizer.amax.shape) == (16, 1, 1, 1)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ('{"CLS": "TensorsData", "data": {"relu": {"CLS": "TensorData", "lowest": ', "cut off"),
            ('{"CLS": "TensorsData", "data": [1]}', "expected an object"),
            ('{"CLS": "TensorsData", "data": {"relu": {"lowest": NaN, "highest": 1}}}', "NaN"),
            ('{"relu": [1.0, -1.0]}', "its range is inverted"),
            ('{"relu": [-1e39, 1.0]}', "NaN or Inf"),
            ('{"relu": [-1.0, 1.0], "relu": [-2.0, 1.0]}', "'relu' has two values"),
            ('{"CLS": "TensorsData", "data": {"relu": {"lowest": "a", "highest": 1}}}', "a number"),
            (
                '{"CLS": "TensorsData", "data": {"relu": {"lowest": [1, 2], "highest": [1, 2, 3]}}}',
                "values do not match",
            ),
            ('{"relu": [0, 0]}', "zeros only"),
            (
                '{"CLS": "TensorsData", "data": {"relu": {"avg": 0, "std": 1}}}',
                "no lowest and highest",
            ),
        ],
    )
    def test_damaged_files_change_nothing(self, case, tmp_path, text, message):
        (tmp_path / "ranges.json").write_text(text)
        with pytest.raises(CalibrationError, match=message):
            qdq.import_ranges(case.swapped, tmp_path / "ranges.json", onnx=case.files["dynamo"])
        assert _scales(case.swapped) == {}

    @pytest.mark.parametrize(
        "bounds", ["-Infinity, 0.0", "NaN, 1.0", "1.0, -1.0", "-1e39, 0", "0, 0"]
    )
    def test_damage_is_an_error_only_where_a_quantizer_stands(self, case, tmp_path, bounds):
        low, high = bounds.split(", ")
        damaged = f'{{"CLS": "TensorData", "lowest": {low}, "highest": {high}}}'
        sound = '{"CLS": "TensorData", "lowest": -2.0, "highest": 1.0}'
        text = f'{{"CLS": "TensorsData", "data": {{"relu": {sound}, "mask": {damaged}}}}}'
        (tmp_path / "ranges.json").write_text(text)
        report = qdq.import_ranges(
            case.swapped, tmp_path / "ranges.json", onnx=case.files["dynamo"]
        )
        assert (
            report.matched["layers.0.conv1._input_quantizer"] == 2.0
            and "its range" in report.unmatched["mask"]
        )
        (tmp_path / "pairs.json").write_text(f'{{"relu": [-2.0, 1.0], "mask": [{bounds}]}}')
        pairs = qdq.import_ranges(case.swapped, tmp_path / "pairs.json", onnx=case.files["dynamo"])
        assert pairs.unmatched == report.unmatched

    def test_pairs_of_early_releases(self, case, tmp_path):
        (tmp_path / "calibration.json").write_text('{"relu": [-0.5, 2.0], "other": [0, 1]}')
        report = qdq.import_ranges(
            case.swapped, tmp_path / "calibration.json", onnx=case.files["dynamo"]
        )
        assert report.matched == {
            "layers.0.conv1._input_quantizer": 2.0,
            "layers.0._add_quantizer": 2.0,
        }
        assert "-0.5 to 2 made symmetric" in report.notes["layers.0._add_quantizer"]
        assert list(report.unmatched) == ["other"]


def _encoding(scale, **fields):
    return {
        "bitwidth": 8,
        "dtype": "int",
        "is_symmetric": "True",
        "offset": -128,
        "scale": scale,
        **fields,
    }


def _version_1(name, scale, **fields):
    return {
        "name": name,
        "bw": 8,
        "dtype": "INT",
        "enc_type": "PER_TENSOR",
        "is_sym": True,
        "offset": [-128.0],
        "scale": scale,
        **fields,
    }


class TestAimet:
    def _import(self, case, tmp_path, activations, params, version, link="dynamo"):
        document = {
            "version": version,
            "activation_encodings": activations,
            "param_encodings": params,
        }
        (tmp_path / "model.encodings").write_text(json.dumps(document))
        return qdq.import_ranges(
            case.swapped, tmp_path / "model.encodings", onnx=case.files.get(link)
        )

    def test_torch_encodings_name_modules(self, case, tmp_path):
        """Inputs need no graph; outputs are followed through it to the layers that read them."""
        activations = {
            "stem": {"input": {"0": _encoding(0.25)}, "output": {"0": _encoding(0.5)}},
            "layers.0.relu": {"output": {"0": _encoding(0.125, offset=0, is_symmetric="False")}},
        }
        weights = {
            "stem.weight": [_encoding(2.0**-n) for n in range(16)],
            "stem.bias": [_encoding(1.0, bitwidth=32)],
        }
        without = self._import(case, tmp_path, activations, weights, "0.6.1", link=None)
        assert without.matched["stem._input_quantizer"] == 127 * 0.25
        assert without.matched["stem._weight_quantizer"] == [127 * 2.0**-n for n in range(16)]
        assert set(without.unmatched) == {"stem.output.0", "layers.0.relu.output.0", "stem.bias"}
        report = self._import(case, tmp_path, activations, weights, "0.6.1", link="torchscript")
        # the module runs twice: once before conv2, once behind the add, read by the next block
        assert report.matched["layers.0.conv2._input_quantizer"] == 255 * 0.125
        assert report.matched["layers.1.conv1._input_quantizer"] == 255 * 0.125
        assert "made symmetric" in report.notes["layers.0.conv2._input_quantizer"]

    def test_version_1(self, case, tmp_path):
        activations = [
            _version_1("x", 0.5),
            _version_1("relu", 0.25, offset=[-127.0]),  # strictly symmetric
            _version_1("relu_1", 2.0**-10, bw=16, offset=[-32768.0]),
            _version_1("relu_2", 0.5, dtype="FLOAT"),
            _version_1("relu_3", 0.5, enc_type="LPBQ"),
        ]
        params = [_version_1("fc.weight", [0.5] * 32, offset=[-128.0] * 32, enc_type="PER_CHANNEL")]
        report = self._import(case, tmp_path, activations, params, "1.0.0")
        assert report.matched["stem._input_quantizer"] == 63.5
        assert report.matched["layers.0.conv1._input_quantizer"] == 127 / 4
        assert report.matched["layers.0.conv2._input_quantizer"] == 32767 / 1024
        assert "16 bit" in report.notes["layers.0.conv2._input_quantizer"]
        assert report.matched["fc._weight_quantizer"] == [63.5] * 32
        assert (
            "floating point" in report.unmatched["relu_2"] and "LPBQ" in report.unmatched["relu_3"]
        )
        assert "floating point" in report.missing["layers.1.conv1._input_quantizer"]

    def test_version_2(self, case, tmp_path):
        encodings = [
            {"name": "x", "y_scale": 0.5, "output_dtype": "int8"},
            {"name": "relu", "y_scale": 0.5, "y_zero_point": 128, "output_dtype": "uint8"},
            {"name": "relu_1", "y_scale": 0.5, "y_zero_point": 0, "output_dtype": "uint8"},
            {
                "name": "fc.weight",
                "y_scale": [0.5] * 32,
                "y_zero_point": [0] * 32,
                "axis": 0,
                "output_dtype": "int8",
            },
            {
                "name": "stem.weight",
                "y_scale": [[0.5]] * 16,
                "axis": 1,
                "block_size": 32,
                "output_dtype": "int8",
            },
        ]
        (tmp_path / "model.encodings").write_text(
            json.dumps({"version": "2.0.0", "encodings": encodings})
        )
        report = qdq.import_ranges(
            case.swapped, tmp_path / "model.encodings", onnx=case.files["dynamo"]
        )
        assert (
            report.matched["stem._input_quantizer"]
            == report.matched["layers.0.conv1._input_quantizer"]
            == 63.5
        )
        assert report.matched["layers.0.conv2._input_quantizer"] == 127.5
        assert report.matched["fc._weight_quantizer"] == [63.5] * 32
        assert "in blocks" in report.missing["stem._weight_quantizer"]
        assert torch.equal(
            _amax(case.swapped, "stem._weight_quantizer").flatten(),
            case.float.stem.weight.detach().abs().amax((1, 2, 3)),
        )

    @pytest.mark.parametrize(
        ("activations", "message"),
        [
            ({"relu": [{"bitwidth": 8, "offset": -128}]}, "no scale"),
            ({"relu": []}, "empty list"),
            ({"relu": [_encoding(-0.5)]}, "scale is -0.5"),
            ({"relu": [_encoding(0.5, bitwidth=True)]}, "bitwidth"),
            ({"relu": [_encoding("0.5")]}, "a number"),
            ([{"bw": 8}], "no name"),
            ([_version_1("relu", 0.5, offset=[0, 0, 0])], "numbers do not match"),
            ([_version_1("relu", 0.5), _version_1("relu", 0.25)], "two different ranges"),
            ("relu", "expected an object"),
        ],
    )
    def test_damaged_files_change_nothing(self, case, tmp_path, activations, message):
        with pytest.raises(CalibrationError, match=message):
            self._import(case, tmp_path, activations, {}, "1.0.0")
        assert _scales(case.swapped) == {}


class TestQdqOnnx:
    def test_scales_set_in_a_file_are_those_of_a_new_export(self, case, tmp_path):
        for name, quantizer in named_quantizers(case.calibrated):
            if name.endswith("_input_quantizer"):
                quantizer.amax = quantizer.amax * 0.7
        report = qdq.export_ranges(
            case.calibrated, tmp_path / "new.onnx", format="qdq", onnx=case.files["qdq"]
        )
        assert not report.left_out
        qdq.export_onnx(case.calibrated, case.images, tmp_path / "again.onnx", dynamic_batch=False)
        outputs = [
            ort.InferenceSession(tmp_path / name).run(None, {"x": case.images.numpy()})[0]
            for name in ("new.onnx", "again.onnx")
        ]
        assert np.array_equal(*outputs)
        former_outputs = ort.InferenceSession(case.files["qdq"]).run(
            None, {"x": case.images.numpy()}
        )[0]
        assert not np.array_equal(outputs[0], former_outputs)
        onnx.checker.check_model(str(tmp_path / "new.onnx"))

    @pytest.mark.parametrize("scale", [np.inf, np.nan, -1.0, 1e-42])
    def test_damage_is_an_error_only_where_a_quantizer_stands(self, case, tmp_path, scale):
        proto = onnx.load(case.files["qdq"])
        quantize = next(
            n for n in proto.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "mean"
        )
        stored = next(
            tensor for tensor in proto.graph.initializer if tensor.name == quantize.input[1]
        )
        stored.CopyFrom(onnx.numpy_helper.from_array(np.float32(scale), stored.name))
        onnx.save(proto, tmp_path / "damaged.onnx")
        with pytest.raises(CalibrationError, match=r"damaged\.onnx: .*mean: its scale is"):
            qdq.import_ranges(case.swapped, tmp_path / "damaged.onnx")
        assert _scales(case.swapped) == {}
        case.swapped.fc._input_quantizer.disable()
        assert (
            "its scale is"
            in qdq.import_ranges(case.swapped, tmp_path / "damaged.onnx").unmatched["mean"]
        )

    def test_codes_of_another_scale_are_not_touched(self, case, tmp_path):
        case.calibrated.stem._weight_quantizer.amax.mul_(2)
        report = qdq.export_ranges(
            case.calibrated, tmp_path / "new.onnx", format="qdq", onnx=case.files["qdq"]
        )
        assert list(report.left_out) == ["stem._weight_quantizer"]
        assert "export the model again" in report.format_table()

    def test_a_pair_of_several_quantizers_gets_the_largest(self, case, tmp_path):
        shortcut = case.calibrated.layers[0]._add_quantizer
        leader = case.calibrated.layers[0].conv1._input_quantizer
        vars(shortcut)["leader"] = qdq.TensorQuantizer(
            qdq.QuantDescriptor(amax=2 * leader.amax.item())
        )
        report = qdq.export_ranges(
            case.calibrated, tmp_path / "new.onnx", format="qdq", onnx=case.files["qdq"]
        )
        assert list(report.notes) == ["layers.0.conv1._input_quantizer"]
        matched = qdq.import_ranges(case.swapped, tmp_path / "new.onnx").matched
        assert matched["layers.0.conv1._input_quantizer"] == 2 * leader.amax.item()

    @pytest.mark.parametrize("is_quantized", [False, True])
    def test_nodes_without_names_are_known_by_their_weights(
        self, case, tmp_path, monkeypatch, is_quantized
    ):
        monkeypatch.chdir(tmp_path)
        from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

        proto = onnx.load(case.files["dynamo"])
        for node in proto.graph.node:
            node.ClearField("name")
            node.ClearField("metadata_props")
            node.metadata_props.add(key="another.tool", value="1")
        onnx.save(proto, "float.onnx")
        if is_quantized:
            quantize_static(
                "float.onnx",
                "theirs.onnx",
                _reader(case),
                quant_format=QuantFormat.QDQ,
                activation_type=QuantType.QInt8,
                extra_options={"ActivationSymmetric": True},
            )
            report = qdq.import_ranges(case.swapped, "theirs.onnx")
        else:
            qdq.export_ranges(
                case.calibrated, "ranges.json", format="onnxruntime", onnx="float.onnx"
            )
            report = qdq.import_ranges(case.swapped, "ranges.json", onnx="float.onnx")
        assert {name: report.matched[name] for name in ACTIVATIONS} == pytest.approx(
            _truth(case), rel=1e-5
        )

    def test_metadata_that_are_no_scopes(self, case, tmp_path):
        proto = onnx.load(case.files["torchscript"])
        for node, text in zip(proto.graph.node, ["[1", "7", "('", "[]", "{}"], strict=False):
            node.metadata_props.add(key="pkg.torch.onnx.name_scopes", value=text)
        onnx.save(proto, tmp_path / "float.onnx")
        qdq.export_ranges(
            case.calibrated, tmp_path / "cache", format="tensorrt", onnx=tmp_path / "float.onnx"
        )
        report = qdq.import_ranges(case.swapped, tmp_path / "cache", onnx=tmp_path / "float.onnx")
        assert set(report.matched) >= ACTIVATIONS

    def test_pooling_of_the_input_of_the_network(self, tmp_path):
        model = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 16, 3, padding=1))
        images = torch.randn(2, 16, 8, 8)
        qdq.swap_modules(model, include=["*"])
        fresh = copy.deepcopy(model)
        qdq.calibrate_model(model, [images], method="max")
        qdq.export_onnx(model, images, tmp_path / "model.onnx", dynamic_batch=False)
        report = qdq.import_ranges(fresh, tmp_path / "model.onnx")
        assert report.matched["0._input_quantizer"] == pytest.approx(images.abs().max().item())
        assert not report.missing

    def test_the_largest_range_of_those_that_share_it(self, case, tmp_path):
        """A file that was not made for shared scales has two for what the model has one for."""
        leader, follower = (
            case.swapped.layers[0].conv1._input_quantizer,
            case.swapped.layers[1]._add_quantizer,
        )
        assert isinstance(follower, SharedQuantizer) and follower.leader is not leader
        vars(follower)["leader"] = leader
        (tmp_path / "ranges.json").write_text('{"relu": [-1.0, 1.0], "relu_2": [-3.0, 3.0]}')
        report = qdq.import_ranges(
            case.swapped, tmp_path / "ranges.json", onnx=case.files["dynamo"]
        )
        assert (
            report.matched["layers.0.conv1._input_quantizer"]
            == report.matched["layers.1._add_quantizer"]
            == 3.0
        )
        assert "the largest range" in report.notes["layers.0.conv1._input_quantizer"]

    def test_attention_and_products_with_transposed_weights(self, tmp_path):
        model = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0).eval()
        images = torch.randn(2, 5, 32)
        qdq.swap_modules(model, example_inputs=images)
        fresh = copy.deepcopy(model)
        qdq.calibrate_model(model, [images], method="max")
        qdq.export_onnx(model, images, tmp_path / "model.onnx", dynamic_batch=False)
        report = qdq.import_ranges(fresh, tmp_path / "model.onnx")
        expected, scales = _scales(model), _scales(fresh)
        assert not report.missing and scales.keys() == expected.keys()
        assert all(torch.equal(scales[name], expected[name]) for name in scales)

    @pytest.mark.parametrize("dynamo", [True, False])
    @pytest.mark.parametrize("sources", [("x", "x", "x"), ("x", "y", "y"), ("x", "y", "z")])
    def test_attention_of_the_float_graph(self, tmp_path, dynamo, sources):
        """Against the tensors themselves: the input of each projection is an input of the network."""

        class Attend(nn.Module):
            def __init__(self):
                super().__init__()
                self.attention = nn.MultiheadAttention(32, 4, batch_first=True)

            def forward(self, x, y, z):
                feeds = {"x": x, "y": y, "z": z}
                return (
                    self.attention(*(feeds[name] for name in sources), need_weights=False)[0]
                    + y.sum()
                    + z.sum()
                )

        model, inputs = (
            Attend().eval(),
            tuple(torch.randn(2, 5, 32) * factor for factor in (1.0, 2.0, 4.0)),
        )
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                inputs,
                tmp_path / "float.onnx",
                input_names=["x", "y", "z"],
                dynamo=dynamo,
                opset_version=18,
            )
        document = {name: [-(n + 1.0), n + 1.0] for n, name in enumerate("xyz")}
        (tmp_path / "ranges.json").write_text(json.dumps(document))
        qdq.swap_modules(model, include=["*"])
        report = qdq.import_ranges(model, tmp_path / "ranges.json", onnx=tmp_path / "float.onnx")
        for attribute, source in zip(("_input", "_key", "_value"), sources, strict=True):
            assert report.matched[f"attention.{attribute}_quantizer"] == document[source][1]

    def test_ranges_along_the_wrong_axis(self, tmp_path):
        """A square weight: the number of scales fits, the axis does not."""
        model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32))
        qdq.swap_modules(model, include=["*"])
        images = torch.randn(4, 32)
        fresh = copy.deepcopy(model)
        qdq.calibrate_model(model, [images], method="max")
        qdq.export_onnx(model, images, tmp_path / "model.onnx", dynamic_batch=False)
        proto = onnx.load(tmp_path / "model.onnx")
        node = next(
            node for node in proto.graph.node if node.name == "0._weight_quantizer/DequantizeLinear"
        )
        next(attribute for attribute in node.attribute if attribute.name == "axis").i = 1
        onnx.save(proto, tmp_path / "model.onnx")
        report = qdq.import_ranges(fresh, tmp_path / "model.onnx")
        assert (
            "axis 1" in report.missing["0._weight_quantizer"]
            and "2._weight_quantizer" in report.matched
        )


def test_a_quantizer_that_cannot_take_its_range_keeps_the_others_from_theirs(case):
    # One number; the file has one a channel.
    case.swapped.fc._weight_quantizer.amax = torch.tensor(1.0)
    with pytest.raises(
        StateError, match=r"fc\._weight_quantizer has 1 ranges now, and would get 32"
    ) as caught:
        qdq.import_ranges(case.swapped, case.files["qdq"])
    assert caught.value.fix
    assert list(_scales(case.swapped)) == ["fc._weight_quantizer"]
    assert _amax(case.swapped, "fc._weight_quantizer") == 1.0


def test_disabled_quantizers_stay_as_they_are(case, tmp_path):
    case.swapped.stem._input_quantizer.disable()
    report = qdq.import_ranges(case.swapped, case.files["qdq"])
    assert "disabled" in report.missing["stem._input_quantizer"] and "x" in report.unmatched
    assert _amax(case.swapped, "stem._input_quantizer") is None


def test_what_cannot_be_written_is_listed(case, tmp_path):
    case.calibrated.stem._input_quantizer.disable()
    del case.calibrated.fc._input_quantizer._amax
    report = qdq.export_ranges(
        case.calibrated, tmp_path / "cache", format="tensorrt", onnx=case.files["dynamo"]
    )
    assert (
        "disabled" in report.left_out["stem._input_quantizer"]
        and "no amax" in report.left_out["fc._input_quantizer"]
    )
    assert report.written["layers.0.conv1._input_quantizer"] == ("relu",)
    with pytest.raises(CalibrationError, match="no amax"):
        qdq.export_ranges(
            case.swapped, tmp_path / "other", format="tensorrt", onnx=case.files["dynamo"]
        )
    assert not (tmp_path / "other").exists()


def test_a_tensor_with_two_ranges_gets_the_larger(tmp_path):
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x):
            return self.a(x) * self.b(x)

    model, images = Fork(), torch.randn(4, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (images,), tmp_path / "float.onnx", dynamo=False, input_names=["x"]
        )
    qdq.swap_modules(model, include=["*"])
    model.a._input_quantizer.amax, model.b._input_quantizer.amax = 1.0, 2.0
    report = qdq.export_ranges(
        model, tmp_path / "cache", format="tensorrt", onnx=tmp_path / "float.onnx"
    )
    assert list(report.notes) == ["a._input_quantizer"] and "larger" in report.format_table()
    assert (
        (tmp_path / "cache")
        .read_text()
        .endswith(f"x: {struct.pack('>f', np.float32(2) / np.float32(127)).hex()}\n")
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "absent"}, "cannot read"),
        ({"path": "."}, "cannot read"),
        ({"path": "dynamo", "format": "tensorr"}, "expected one of"),
        ({"path": "cache"}, "onnx= is missing"),
        ({"path": "qdq", "onnx": "dynamo"}, "do not pass onnx="),
    ],
)
def test_wrong_calls(case, tmp_path, arguments, message):
    (tmp_path / "cache").write_text("TRT-8401-EntropyCalibration2\nrelu: 3c010a14\n")
    paths = {
        **case.files,
        "absent": tmp_path / "absent",
        ".": tmp_path,
        "cache": tmp_path / "cache",
    }
    arguments = {
        key: value if key == "format" else paths[value] for key, value in arguments.items()
    }
    with pytest.raises(ArgumentError, match=message):
        qdq.import_ranges(case.swapped, **arguments)


def test_export_needs_the_names_and_a_known_format(case, tmp_path):
    for name in ("tensorrt", "onnxruntime", "aimet", "qdq"):
        with pytest.raises(ArgumentError, match="onnx= is missing"):
            qdq.export_ranges(case.calibrated, tmp_path / "file", format=name)
    with pytest.raises(ArgumentError, match="expected one of"):
        qdq.export_ranges(case.calibrated, tmp_path / "file", format="snpe")
    assert list(tmp_path.iterdir()) == []


def test_damaged_bytes_end_in_an_error_of_qdq(case, tmp_path):
    """Cut anywhere, or with any byte changed: read as something valid, or refused."""
    random = np.random.default_rng(0)
    for name in FORMATS:
        source = case.files["qdq"] if name == "qdq" else tmp_path / name
        if name != "qdq":
            qdq.export_ranges(case.calibrated, source, format=name, onnx=case.files["qdq"])
        content = source.read_bytes()
        for _ in range(25 if name != "qdq" else 5):
            damaged = bytearray(
                content[: random.integers(1, len(content))] if random.random() < 0.5 else content
            )
            damaged[random.integers(len(damaged))] = random.integers(256)
            (tmp_path / "damaged").write_bytes(damaged)
            model = copy.deepcopy(case.swapped)
            try:
                qdq.import_ranges(
                    model,
                    tmp_path / "damaged",
                    format=name,
                    onnx=None if name == "qdq" else case.files["qdq"],
                )
            except qdq.QdqError:
                assert _scales(model) == {}
            assert all(torch.isfinite(scale).all() for scale in _scales(model).values())


def test_ranges_of_a_model_on_the_gpu(gpu, tmp_path):
    """They are imported onto the device, and written as those of the CPU."""
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    qdq.swap_modules(model, torch.randn(4, 16))
    twin = copy.deepcopy(model).to(gpu)
    qdq.calibrate_model(model, [torch.randn(4, 16)])
    qdq.export_ranges(model, tmp_path / "cpu.json", format="aimet-0.6.1")
    qdq.import_ranges(twin, tmp_path / "cpu.json")
    assert {buffer.device for buffer in twin.buffers()} == {gpu}
    qdq.export_ranges(twin, tmp_path / "gpu.json", format="aimet-0.6.1")
    assert (tmp_path / "gpu.json").read_bytes() == (tmp_path / "cpu.json").read_bytes()
