import math

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from qdq.bundle.floor import HALF_NUDGE, measure_floor
from qdq.pairs import Pair

SCALE = 0.5


def read(text):
    return ir.from_proto(onnx.parser.parse_model(text))


QUANTIZER = read(
    f"""<ir_version: 9, opset_import: ["": 17]>
    g (float[1,N] x) => (float[1,N] y) <float s = {{{SCALE}}}, int8 z = {{0}}> {{
        q = QuantizeLinear (x, s, z)
        y = DequantizeLinear (q, s, z)
    }}"""
)


def round_half(x):
    """What the graph computes."""
    return SCALE * np.clip(np.rint(np.float64(x) / SCALE), -128, 127)


def test_the_floor_is_that_of_moved_inputs_and_outputs():
    """20000 values, some of which are so close to a tie that 2^-11 of themselves moves them."""
    x = np.random.default_rng(0).uniform(-60, 60, (1, 20000)).astype(np.float32)
    reference = round_half(x).astype(np.float32)
    floor = measure_floor(QUANTIZER, [Pair({"x": x}, {"y": reference}, {})])["y"]
    worst, mean_square = math.inf, 0.0
    for factor in (1 + HALF_NUDGE, 1 - HALF_NUDGE):
        noise = (np.float64(reference) - factor * round_half(factor * np.float64(x))) ** 2
        worst = min(worst, 10 * np.log10((np.float64(reference) ** 2).sum() / noise.sum()))
        mean_square = max(mean_square, noise.mean())
    assert floor.sqnr_db == pytest.approx(worst, abs=0.05)  # float32 rounds a few ties otherwise
    assert floor.mean_square == pytest.approx(mean_square, rel=0.01)
    assert floor.required_sqnr_db == floor.sqnr_db - 3
    assert floor.most_mean_square == pytest.approx(floor.mean_square * 10**0.3)


def test_all_pairs_count_together():
    x = np.float32([[10.0, 20.0]])
    pairs = [Pair({"x": x}, {"y": x}, {}), Pair({"x": 0 * x}, {"y": 0 * x}, {})]
    floor = measure_floor(QUANTIZER, pairs)["y"]
    # only the output moves, by 2^-11: 20 log10(2^11)
    assert floor.sqnr_db == pytest.approx(66.2266, abs=1e-3)
    assert floor.mean_square == pytest.approx(250 * HALF_NUDGE**2)


def test_integers_that_do_not_move_must_be_exact():
    model = read(
        """<ir_version: 9, opset_import: ["": 17]>
        g (float[1,4] x) => (int64[1] y) <float s = {0.5}, int8 z = {0}> {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            y = ArgMax <axis = 1, keepdims = 0> (d)
        }"""
    )
    pair = Pair({"x": np.float32([[1, 9, 2, 3]])}, {"y": np.array([1])}, {})
    floor = measure_floor(model, [pair])["y"]
    assert floor.required_sqnr_db is None
    assert floor.required_cosine == 1
    assert 0 < floor.most_mean_square < 1e-30


def test_the_cosine_is_the_lowest_of_its_sqnr():
    """The worst error of a relative size turns a vector by asin of it: here drawn and measured."""
    floor = measure_floor(
        QUANTIZER, [Pair({"x": np.float32([[3]])}, {"y": np.float32([[3]])}, {})]
    )["y"]
    relative = 10 ** (-floor.required_sqnr_db / 20)
    lowest = 1.0
    for angle in np.linspace(0, np.pi, 100001):
        output = np.array([1 + relative * np.cos(angle), relative * np.sin(angle)])
        lowest = min(lowest, output[0] / np.linalg.norm(output))
    assert floor.required_cosine == pytest.approx(lowest, abs=1e-9)
