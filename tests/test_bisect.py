"""`bisect_pairs`; the truth is which pair of the graph was made wrong."""

import re

import numpy as np
import onnx
import pytest

import qdq
from qdq.cli import main as cli
from qdq.errors import ArgumentError, CheckError

LAYERS = 4


def write(folder, *, wrong=(), tiny=None):
    """A chain of convolutions with a pair before each.

    Args:
        folder: Of the file.
        wrong: Numbers of the pairs with a zero point, which TensorRT refuses.
        tiny: Number of the layer that has a channel of zeros with a tiny scale, so that its bias does not fit int32.
    """
    generator = np.random.default_rng(0)
    lines, constants = [], []
    for index in range(LAYERS):
        scales = [0.01] * 16
        weight = generator.integers(-20, 21, (16, 16))
        if index == tiny:
            scales[0] = 1e-9
            weight[0] = 0
        biases = generator.normal(size=16).round(3)
        constants += [
            f"float s{index} = {{0.053}}, int8 z{index} = {{{3 if index in wrong else 0}}}",
            f"int8[16,16,1,1] w{index} = {{{','.join(map(str, weight.ravel()))}}}",
            f"float[16] ws{index} = {{{','.join(map(str, scales))}}}",
            f"float[16] b{index} = {{{','.join(map(str, biases))}}}",
        ]
        value = "x" if index == 0 else f"y{index - 1}"
        lines += [
            f"[pair{index}_q] q{index} = QuantizeLinear({value}, s{index}, z{index})",
            f"[pair{index}] d{index} = DequantizeLinear(q{index}, s{index}, z{index})",
            f"[weight{index}] v{index} = DequantizeLinear<axis=0>(w{index}, ws{index})",
            f"[layer{index}] y{index} = Conv(d{index}, v{index}, b{index})",
        ]
    text = (
        f'<ir_version: 10, opset_import: ["": 19]>\n'
        f"g (float[4,16,3,3] x) => (float[4,16,3,3] y{LAYERS - 1})\n"
        f"<{', '.join(constants)}>\n{{{chr(10).join(lines)}}}"
    )
    onnx.save(onnx.parser.parse_model(text), folder / "model.onnx")
    return folder / "model.onnx"


@pytest.mark.trt
@pytest.mark.parametrize("wrong", [(), (0, 2)])
def test_pairs_that_keep_a_file_from_building(wrong, tmp_path):
    pytest.importorskip("tensorrt_rtx")
    path = write(tmp_path, wrong=wrong)
    content = path.read_bytes()
    result = qdq.bisect_pairs(path)
    assert [culprit.name for culprit in result.culprits] == [f"pair{index}_q" for index in wrong]
    assert (result.pairs, result.reason) == (2 * LAYERS, "")
    assert path.read_bytes() == content
    for culprit in result.culprits:
        assert "cannot" in culprit.reason
        assert str(tmp_path) not in culprit.reason
    last_line = result.format_table().splitlines()[-1]
    assert last_line.endswith("builds as it is" if not wrong else f"these {len(wrong)} pairs")


def test_a_pair_that_the_default_session_computes_differently(tmp_path, capsys):
    """A layer in int8 has an int32 bias in ONNX Runtime, which clips what does not fit (QDQ140).

    It is in int8 once its output has a pair, too.
    """
    path = write(tmp_path, tiny=1)
    x = np.random.default_rng(1).normal(size=(4, 16, 3, 3)).astype(np.float32)
    np.savez(tmp_path / "x.npz", x=x)
    with pytest.raises(SystemExit) as exit:
        cli.main(["bisect", str(path), "--numbers", str(tmp_path / "x.npz")])
    printed = capsys.readouterr().out
    assert exit.value.code == 1
    assert printed.startswith("pair2_q (reads y1): output y3 has")
    assert "default session without these 1 pairs" in printed


def test_numbers_that_agree(tmp_path):
    path = write(tmp_path)
    x = np.random.default_rng(1).normal(size=(4, 16, 3, 3)).astype(np.float32)
    result = qdq.bisect_pairs(path, inputs={"x": x})
    assert (result.culprits, result.reason, result.tests) == ((), "", 2)


def test_bad_input(tmp_path):
    with pytest.raises(ArgumentError, match="the inputs given are \\['y'\\], those of the file"):
        qdq.bisect_pairs(write(tmp_path), inputs={"y": np.zeros(1, np.float32)})
    path = write(tmp_path)
    for x in (np.zeros((4, 16, 3, 2), np.float32), np.zeros((4, 16, 3, 3))):
        with pytest.raises(CheckError, match=re.escape(f"cannot run {path}: ")):
            qdq.bisect_pairs(path, inputs={"x": x})
    text = '<ir_version: 10, opset_import: ["": 19]>\ng (float[4] x) => (float[4] y) {y = Relu(x)}'
    onnx.save(onnx.parser.parse_model(text), tmp_path / "float.onnx")
    with pytest.raises(ArgumentError, match="has no Q/DQ"):
        qdq.bisect_pairs(tmp_path / "float.onnx")
