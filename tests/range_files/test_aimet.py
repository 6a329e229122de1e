"""Encodings of AIMET, SNPE and QNN against a reading in float64 that knows nothing of the code under test."""

import json

import numpy as np
import pytest
import torch
from torch import nn

import qdq
from qdq.errors import CalibrationError
from qdq.range_files import aimet

BOUNDS = [
    (-1.0, 2.0),
    (-2.109158515930176, 2.6086959838867188),
    (0.0, 6.0),
    (-3.0, 0.0),
    (-0.126, 2.559),
    (-5.0, 0.1),
]


def read(encoding, version="0.6.1"):
    """The entry of a tensor `x`."""
    document = {"version": version, "activation_encodings": {"x": encoding}, "param_encodings": {}}
    if version == "1.0.0":
        document["activation_encodings"] = [{"name": "x", **encoding}]
    if version == "2.0.0":
        document = {"version": version, "encodings": [{"name": "x", **encoding}]}
    return aimet.read(json.dumps(document).encode())["x"]


def grid(low, high, bits=8):
    """Scale, and the bounds moved to codes so that 0 is one, as AIMET does it."""
    scale = (high - low) / (2**bits - 1)
    zero_point = round(-low / scale)
    return scale, zero_point, -zero_point * scale, (2**bits - 1 - zero_point) * scale


def symmetric_truth(low, high, scale):
    """The range that holds all values in float64; of the codes -128 to 127 it is that of the largest code."""
    return max(abs(low), abs(high)) - (scale if np.isclose(-low, high + scale) else 0.0)


CONVENTIONS = {
    "AIMET, the negative of the zero point": lambda zero_point, half: -zero_point,
    "the zero point": lambda zero_point, half: zero_point,
    "TensorFlow, one below the zero point": lambda zero_point, half: zero_point - 1,
    "QNN, signed codes": lambda zero_point, half: half - zero_point,
    "the zero point of signed codes": lambda zero_point, half: zero_point - half,
}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("bounds", [*BOUNDS, (-128.0, 127.0), (-127.0, 127.0)])
@pytest.mark.parametrize("version", ["0.6.1", "1.0.0"])
def test_bounds_with_an_offset_of_every_sign(convention, bits, bounds, version):
    scale, zero_point, low, high = grid(*bounds, bits)
    offset = CONVENTIONS[convention](zero_point, 2 ** (bits - 1))
    numbers = {"scale": scale, "offset": offset, "min": low, "max": high}
    if version == "1.0.0":
        encoding = {"bw": bits, "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": False}
        encoding |= {key: [value] for key, value in numbers.items()}
    else:
        encoding = {"bitwidth": bits, "dtype": "int", "is_symmetric": "False", **numbers}
    assert read(encoding, version).amax == pytest.approx(
        symmetric_truth(low, high, scale), rel=1e-6
    )


@pytest.mark.parametrize("bounds", BOUNDS)
@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("sign", [-1, 1])
def test_codes_without_bounds_are_enumerated(bounds, bits, sign):
    """A negative offset is added to codes from 0, a positive one can only be subtracted: else no code were 0."""
    scale, zero_point, _, _ = grid(*bounds, bits)
    values = (np.arange(2**bits, dtype=np.float64) - zero_point) * scale
    assert 0.0 in values
    version_0 = read({"bitwidth": bits, "scale": scale, "offset": sign * zero_point})
    assert version_0.amax == pytest.approx(np.abs(values).max(), rel=1e-6)
    assert ("zero point" in version_0.note) == (sign * zero_point > 0)
    version_1 = {
        "bw": bits,
        "is_sym": False,
        "scale": [scale],
        "offset": [float(sign * zero_point)],
    }
    assert read(version_1, "1.0.0").amax == version_0.amax


@pytest.mark.parametrize("bits", [4, 8, 16])
@pytest.mark.parametrize("version", ["0.6.1", "1.0.0"])
def test_symmetric_codes_with_offset_0_and_no_bounds(bits, version):
    """A weight has both signs, so that its codes are signed; an activation may have either, and is noted."""
    encoding = {"bitwidth": bits, "is_symmetric": "True", "scale": 0.01, "offset": 0}
    document = {
        "version": version,
        "activation_encodings": {"x": encoding},
        "param_encodings": {"w": [encoding] * 2},
    }
    if version == "1.0.0":
        encoding = {
            "bw": bits,
            "is_sym": True,
            "enc_type": "PER_TENSOR",
            "scale": [0.01],
            "offset": [0],
        }
        channels = {**encoding, "enc_type": "PER_CHANNEL", "scale": [0.01] * 2, "offset": [0] * 2}
        document["activation_encodings"] = [{"name": "x", **encoding}]
        document["param_encodings"] = [{"name": "w", **channels}]
    entries = aimet.read(json.dumps(document).encode())
    assert entries["w"].amax == pytest.approx([0.01 * (2 ** (bits - 1) - 1)] * 2, rel=1e-6)
    assert "unsigned" not in entries["w"].note
    assert entries["x"].amax == pytest.approx(0.01 * (2**bits - 1), rel=1e-6)
    assert "read as unsigned; if they are signed, the range is half of it" in entries["x"].note


@pytest.mark.parametrize("kind", [5, None, ["PER_TENSOR"], {}, "PER_BLOCK"])
def test_another_kind_of_encoding(kind):
    entry = read(
        {"bw": 8, "is_sym": False, "enc_type": kind, "scale": [0.01], "offset": [-3]}, "1.0.0"
    )
    assert "it is encoded" in entry.problem and str(kind)[:20] in entry.problem


def test_the_examples_of_the_specification():
    """For TensorFlow (offset 126 and 11) and for PyTorch, with the bounds that stand there."""
    examples = [
        (126, 0.0011427081098743512, -0.1451239287853241, 0.1462666392326355),
        (126, 0.0006510374592799766, -0.08268175274133682, 0.08333279937505722),
        (11, 0.0089906234367221, -0.10788747668266296, 2.184721499681473),
        (-114.0, 0.018501389771699905, -2.109158515930176, 2.6086959838867188),
        (-12.0, 0.010530316270887852, -0.12636379897594452, 2.558866932988167),
        (-127.0, 0.0004936049808748066, -0.06268782913684845, 0.06318144500255585),
    ]
    for offset, scale, low, high in examples:
        encoding = {
            "bitwidth": 8,
            "is_symmetric": "False",
            "max": high,
            "min": low,
            "offset": offset,
            "scale": scale,
        }
        assert read([encoding]).amax == pytest.approx(max(-low, high), rel=1e-6)
        bare = {key: encoding[key] for key in ("bitwidth", "offset", "scale", "is_symmetric")}
        # A step of TensorFlow's.
        assert read([bare]).amax == pytest.approx(max(-low, high), rel=0.01)


@pytest.mark.parametrize("steps", [127, 128])
def test_symmetric_codes_keep_the_scale_to_the_last_bit(steps):
    """Bounds -127 to 127 (strict) and -128 to 127, whatever the bounds were rounded to."""
    scale = np.float32(0.0123456789)
    bounds = {"min": float(np.float32(-steps * scale)), "max": float(np.float32(127 * scale))}
    entry = read(
        {"bitwidth": 8, "is_symmetric": "True", "scale": float(scale), "offset": -steps, **bounds}
    )
    assert entry.amax == np.float32(127) * scale and not entry.note
    asymmetric = {"bw": 8, "is_sym": False, "scale": [float(scale)], "offset": [-127]}
    assert read(asymmetric, "1.0.0").amax == pytest.approx(128 * float(scale), rel=1e-6)


def test_bounds_alone():
    entry = read({"bitwidth": 8, "min": -1, "max": 2})
    assert entry.amax == 2.0 and "-1 to 2 made symmetric" in entry.note
    channels = read([{"bitwidth": 8, "min": -n - 1.0, "max": 0.5} for n in range(3)])
    assert channels.amax.tolist() == [1.0, 2.0, 3.0]
    assert read({"bitwidth": 8, "min": [-1.0, -3.0], "max": [2.0, 2.0]}).amax.tolist() == [2.0, 3.0]


def test_codes_of_version_2_are_those_of_quantize_linear():
    for dtype, zero_point in (
        ("int8", 0),
        ("int8", -128),
        ("uint8", 0),
        ("uint8", 200),
        ("uint16", 3),
        ("int4", 2),
    ):
        bits, qmin = int(dtype.removeprefix("u").removeprefix("int")), 0
        if dtype.startswith("int"):
            qmin = -(2 ** (bits - 1))
        values = (np.arange(qmin, qmin + 2**bits, dtype=np.float64) - zero_point) * 0.03125
        expected = symmetric_truth(values[0], values[-1], 0.03125)
        assert (
            read(
                {"y_scale": 0.03125, "y_zero_point": zero_point, "output_dtype": dtype}, "2.0.0"
            ).amax
            == expected
        )


@pytest.mark.parametrize(
    ("version", "encoding", "reason"),
    [
        ("0.6.1", {"bitwidth": 8, "dtype": "int"}, "no numbers"),
        ("0.6.1", {"bitwidth": 8, "scale": None, "offset": None}, "no numbers"),
        ("0.6.1", {}, "no numbers"),
        ("0.6.1", {"bitwidth": 16, "dtype": "float"}, "floating point"),
        ("0.6.1", {"bitwidth": 16, "dtype": "bfloat16"}, "floating point"),
        ("1.0.0", {"bw": 16, "dtype": "FLOAT", "enc_type": "PER_TENSOR"}, "floating point"),
        (
            "1.0.0",
            {"bw": 8, "dtype": "INT", "enc_type": "PER_TENSOR", "is_sym": True},
            "no numbers",
        ),
        (
            "1.0.0",
            {"bw": 2, "scale": [1.0], "offset": [-2], "zero_point_shift": [0.5]},
            "fraction of a step",
        ),
        ("2.0.0", {"output_dtype": "float8e4m3fn", "y_scale": 0.5}, "no range"),
        ("2.0.0", {"output_dtype": "int8"}, "no numbers"),
        (
            "2.0.0",
            {"output_dtype": "int4", "block_size": 32, "per_block_int_scale": [[1]]},
            "in blocks",
        ),
        (
            "2.1.0",
            {"output_dtype": "int4", "block_size": 32, "y_scale": {"x": [[3]], "x_scale": [0.1]}},
            "in blocks",
        ),
    ],
)
def test_what_is_legal_and_has_no_range_is_listed(version, encoding, reason):
    entry = read(encoding, "2.0.0" if version == "2.1.0" else version)
    assert reason in entry.problem and not entry.is_damaged


@pytest.mark.parametrize(
    ("version", "encoding", "reason"),
    [
        (
            "0.6.1",
            {"bitwidth": 8, "scale": 0.1, "offset": -128, "min": -1.28, "max": 1.27},
            r"-1.28 to 1.27.*-12\.8",
        ),
        (
            "0.6.1",
            {"bitwidth": 8, "scale": 0.01, "offset": -128, "min": -1.28, "max": 1.40},
            "min and max",
        ),
        (
            "0.6.1",
            {"bitwidth": 8, "scale": 0.01, "offset": 0, "min": -0.3, "max": 2.25},
            "min and max",
        ),
        (
            "1.0.0",
            {
                "bw": 8,
                "scale": [0.1, 0.2],
                "offset": [-128] * 2,
                "min": [-12.8] * 2,
                "max": [12.7] * 2,
            },
            "min",
        ),
        ("0.6.1", {"bitwidth": 8, "scale": 0.01, "offset": -300}, "its offset is -300; with 8 bit"),
        ("0.6.1", {"bitwidth": 8, "scale": 0.01, "offset": 256}, "its offset is 256"),
        ("1.0.0", {"bw": 8, "scale": [0.01, 0.01], "offset": [-128, 3]}, "both signs"),
        (
            "2.0.0",
            {"y_scale": 0.01, "y_zero_point": 300, "output_dtype": "uint8"},
            "300 is not a code of uint8",
        ),
        (
            "2.0.0",
            {"y_scale": 0.01, "y_zero_point": 128, "output_dtype": "int8"},
            "128 is not a code of int8",
        ),
    ],
)
def test_contradictions_are_an_error(version, encoding, reason):
    with pytest.raises(CalibrationError, match=rf"1 encodings are contradictory: x: .*{reason}"):
        read(encoding, version)


def test_all_contradictions_are_named_at_once():
    wrong = {"bitwidth": 8, "scale": 0.01, "offset": -128, "min": -3.0, "max": 1.0}
    document = {
        "activation_encodings": {"a": wrong, "b": {"bitwidth": 8, "min": 0, "max": 1}, "c": [wrong]}
    }
    with pytest.raises(CalibrationError, match=r"2 encodings .*: a: .*; c: "):
        aimet.read(json.dumps(document).encode())


@pytest.fixture
def linear():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    qdq.swap_modules(model, include=["*"])
    return model


class TestImport:
    @pytest.fixture
    def load(self, linear, tmp_path):
        def load(activations, params=None):
            document = {
                "version": "0.6.1",
                "activation_encodings": activations,
                "param_encodings": params or {},
            }
            (tmp_path / "model.encodings").write_text(json.dumps(document))
            return qdq.import_ranges(linear, tmp_path / "model.encodings")

        return load

    def test_a_whole_file_is_not_refused_for_what_has_no_range(self, load, linear):
        useless = {"bitwidth": 8, "dtype": "int"}
        activations = {
            "0": {"input": {"0": {"bitwidth": 8, "min": -1, "max": 2}}, "output": {"0": useless}},
            "2": {"input": {"0": useless}},
        }
        report = load(activations)
        assert report.matched == {"0._input_quantizer": 2.0}
        assert (
            "no numbers" in report.unmatched["0.output.0"]
            and "no numbers" in report.missing["2._input_quantizer"]
        )
        assert linear[0]._input_quantizer.amax == 2.0

    @pytest.mark.parametrize(
        "numbers",
        [
            {"scale": float("inf"), "offset": -128},
            {"scale": float("nan"), "offset": -128},
            {"scale": -0.5, "offset": -128},
            {"scale": 0.5, "offset": float("nan")},
            {"min": float("-inf"), "max": 1.0},
            {"min": 2.0, "max": 1.0},
            {"scale": 0.5, "offset": -128, "min": float("nan"), "max": 1.0},
            {"scale": 1e39, "offset": -128},
        ],
    )
    def test_damaged_numbers_are_an_error_only_where_a_quantizer_stands(
        self, load, linear, numbers
    ):
        sound, damaged = {"bitwidth": 8, "min": -1, "max": 1}, {"bitwidth": 8, **numbers}
        report = load({"0": {"input": {"0": sound}}, "mask": [damaged]})
        assert report.matched == {"0._input_quantizer": 1.0} and list(report.unmatched) == ["mask"]
        assert "mask" in report.format_table()
        with pytest.raises(CalibrationError, match=r"2\.input\.0: its "):
            load({"0": {"input": {"0": sound}}, "2": {"input": {"0": damaged}}})
        linear[2]._input_quantizer.disable()
        assert list(
            load({"0": {"input": {"0": sound}}, "2": {"input": {"0": damaged}}}).unmatched
        ) == ["2.input.0"]

    def test_all_damage_is_named_at_once(self, load):
        damaged = {"input": {"0": {"bitwidth": 8, "min": float("nan"), "max": 1.0}}}
        with pytest.raises(CalibrationError, match=r"0\.input\.0: .*; 2\.input\.0: "):
            load({"0": damaged, "2": damaged})
