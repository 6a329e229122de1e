"""Will int8 pay: times of small graphs against the roofline, computed by hand; and the rule QDQ150."""

import json

import format_files
import onnx_ir as ir
import pytest
from small_graphs import floats, graph, ints, load, op, pair

from qdq import ArgumentError, check_onnx
from qdq.check.payoff import predict_payoff
from qdq.check.rules import find_violations, get_rule
from qdq.cli.main import main
from qdq.roofline import KERNEL_MICROSECONDS

SIZE = 512
LARGE = {"x": f"float16[1,{SIZE},64,64]", "y": f"float16[1,{SIZE},64,64]"}
WEIGHTS = f"""
int8[{SIZE},{SIZE},1,1] v = {{{ints(SIZE * SIZE)}}}, float16[{SIZE}] vs = {{{floats(SIZE)}}},
int8[{SIZE}] vz = {{{floats(SIZE, 0)}}}"""
HALF_RELU = op("r", "Relu(x)") + pair("xd", "r")


def convs(count, before=HALF_RELU, last="y"):
    """Convolutions of 512 channels at 64 x 64 in a row, each with its pair."""
    lines, value = [before], "xd"
    for number in range(count):
        lines.append(f"\n    [c{number}_w] c{number}_w = DequantizeLinear<axis=0>(v, vs, vz)")
        name = last if number == count - 1 else f"c{number}"
        lines.append(op(name, f"Conv({value}, c{number}_w)"))
        if number < count - 1:
            lines.append(pair(f"d{number}", f"c{number}"))
            value = f"d{number}"
    return lines


@pytest.fixture(scope="module")
def paying():
    """Four large convolutions."""
    return load(graph(*convs(4), constants=WEIGHTS, **LARGE))


def find(model, gpu):
    payoff = predict_payoff(model, gpu)
    findings = find_violations(model, [get_rule("QDQ150")], payoff=payoff)
    return payoff, findings


def test_fp8_is_timed_as_fp8_and_called_so(tmp_path):
    path = tmp_path / "fp8.onnx"
    format_files.fp8_conv(path)
    payoff = check_onnx(path, gpu="l4").payoff
    assert payoff.types == ("FP8",)
    first, *_ = payoff.format_table().splitlines()
    assert ", FP8 0." in first
    assert "int8" not in payoff.format_table()
    report = check_onnx(path, gpu="t4")  # has no FP8: nothing can be built there
    assert report.payoff is None
    assert "QDQ134" in {finding.rule for finding in report.findings}
    with pytest.raises(ArgumentError, match="has SM 75, and sm is 89"):
        check_onnx(path, gpu="t4", sm=89)


def test_times_are_those_of_the_roofline(paying):
    """On a T4: 4 x 2 x 64 x 64 x 512 x 512 operations at 65 or 130 x 10^12 a second, and 320 GB/s."""
    payoff = predict_payoff(paying, "t4")
    values, weights = 64 * 64 * SIZE, SIZE * SIZE
    arithmetic = 2 * values * SIZE / 130e6
    last = max(arithmetic, (3 * values + weights) / 320e3)  # writes float16
    expected = 3 * arithmetic + last + 3 * values / 320e3 + 5 * KERNEL_MICROSECONDS  # Relu and Q
    assert payoff.int8 == pytest.approx(expected, rel=1e-3)
    relu = 4 * values / 320e3
    assert payoff.float16 == pytest.approx(
        4 * 2 * arithmetic + relu + 5 * KERNEL_MICROSECONDS, rel=1e-3
    )
    assert payoff.int8_half_rest == payoff.int8  # the file is float16


def test_it_pays_where_products_are_large(paying):
    payoff, findings = find(paying, "t4")
    assert payoff.ratio > 1.3
    assert findings == []
    products = {layer.name for layer in payoff.layers if layer.float16 > layer.int8}
    assert products >= {"c0", "c1", "c2", "y"}


def test_launches_decide_where_products_are_small():
    small = graph(
        pair("xd", "x"), *convs(2)[1:], x=f"float16[1,{SIZE},1,1]", y=f"float16[1,{SIZE},1,1]",
        constants=WEIGHTS,
    )  # fmt: skip
    payoff, (finding,) = find(load(small), "h100")
    assert payoff.ratio < 1.05
    assert (finding.rule, finding.severity) == ("QDQ150", "warning")
    assert "on h100 it is expected to be" in finding.message
    assert "the launch of 3 kernels" in finding.message
    assert "stay in fp16" in finding.fix


def test_a_float_part_in_fp32_is_named():
    """The same graph in float32 around its Q/DQ: on a T4, which has no TF32, one float product decides."""
    kernel = f"float[16,{SIZE},3,3] f = {{{','.join(['0.1'] * (16 * SIZE * 9))}}}"
    lines = [op("r", "Relu(x)"), pair("xd", "r"), *convs(2, before="", last="c")]
    text = graph(*lines, op("y", "Conv(c, f)"), constants=f"{WEIGHTS}, {kernel}", **LARGE)
    text = text.replace("float16", "float")
    model = load(text.replace(f"(float[1,{SIZE},64,64] y)", "(float[1,16,62,62] y)"))
    payoff, (finding,) = find(model, "t4")
    assert payoff.int8_half_rest < payoff.int8 / 1.5
    assert "the float part in fp32" in finding.message
    assert "--precision fp16" in finding.fix
    assert "with the float part in fp16" in payoff.format_table()


def test_left_over_pairs_are_named(paying):
    """A product whose output is read in two scales and in float: it writes float, and a kernel converts it."""
    lines = convs(2, last="c")[:-1]  # up to the pair after the first product
    lines.append(pair("e", "c0", "t"))
    for name, value in (("left", "d0"), ("right", "e")):
        lines.append(f"\n    [{name}_w] {name}_w = DequantizeLinear<axis=0>(v, vs, vz)")
        lines.append(op(name, f"Conv({value}, {name}_w)"))
    text = graph(*lines, op("y", "Sum(left, right, c0)"), constants=WEIGHTS, **LARGE)
    payoff = predict_payoff(load(text), "t4")
    assert payoff.ratio < predict_payoff(paying, "t4").ratio
    (loss,) = (loss for loss in payoff.losses if "kernels of their own" in loss.cause)
    assert loss.microseconds == pytest.approx(4 * 64 * 64 * SIZE / 320e3 + KERNEL_MICROSECONDS)
    assert "QDQ110 to QDQ119" in loss.fix


def test_attention_in_several_kernels_is_named():
    """Scores of 1024 x 1024 in 16 heads: with Q/DQ inside they are written to memory and read again."""
    text = graph(
        op("k2", "Transpose<perm=[0,1,3,2]>(k)"),
        op("s0", "MatMul(q, k2)"),
        op("p", "Softmax(s0)"),
        pair("pd", "p"),
        op("y", "MatMul(pd, v)"),
        x="float16[1,16,1024,64] q, float16[1,16,1024,64] k, float16[1,16,1024,64] v, float16[1]",
        y="float16[1,16,1024,64]",
    )
    payoff, (finding,) = find(load(text), "l4")
    scores = 16 * 1024 * 1024
    (loss,) = (loss for loss in payoff.losses if "attention" in loss.cause)
    assert loss.microseconds > 2 * (2 * scores / 300e3)  # once written and read in float16
    assert "attention in several kernels" in finding.message
    assert "QDQ118" in finding.fix


def run(*arguments):
    """The exit code of a command."""
    with pytest.raises(SystemExit) as ended:
        main(list(map(str, arguments)))
    return ended.value.code


def test_the_command(tmp_path, paying, capsys):
    path = tmp_path / "model.onnx"
    ir.save(paying, path)
    assert run("check", path, "--gpu", "t4", "--json", tmp_path / "c.json") == 0
    text = capsys.readouterr().out
    assert "predicted on t4 for x 1x512x64x64: fp16 " in text
    assert "the layers that decide" in text
    stored = json.loads((tmp_path / "c.json").read_text())["payoff"]
    assert stored["gpu"] == "t4"
    assert len(stored["layers"]) == 5
    assert stored["ratio"] == pytest.approx(stored["float16"] / stored["int8"])
    assert (stored["word"], stored["pays"]) == ("int8", True)
    assert check_onnx(path).payoff is None
    assert run("check", path, "--gpu", "v100") == 2
    with pytest.raises(ArgumentError, match="expected one of"):
        check_onnx(path, gpu="v100")


def test_nothing_is_predicted_of_unknown_sizes(tmp_path, capsys):
    text = graph(pair("xd", "x"), op("y", "Relu(xd)"), x="float16[N,M]", y="float16[N,M]")
    model = load(text)
    assert predict_payoff(model, "t4") is None
    ir.save(model, tmp_path / "m.onnx")
    run("check", tmp_path / "m.onnx", "--gpu", "t4")
    assert "no times are predicted for t4" in capsys.readouterr().out
