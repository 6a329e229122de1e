"""verify.py on files that were written here, and against the census of `qdq build`."""

import ast
import importlib.util
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import stand_in_trtexec as stand_in
from small_bundle import FAULTS

from qdq.trt.census import take_census
from qdq.trt.kernels import parse_layer_json

SOURCE = Path(__file__).parents[2] / "qdq" / "bundle" / "target" / "verify.py"


spec = importlib.util.spec_from_file_location("verify_py", SOURCE)
verify_py = importlib.util.module_from_spec(spec)
spec.loader.exec_module(verify_py)


@pytest.fixture
def results(bundle, monkeypatch):
    """The folder of results of a sound engine, whose outputs are the references; the bundle is the current folder."""
    monkeypatch.chdir(bundle)
    monkeypatch.setattr(stand_in, "FAULT", "")
    folder = bundle / "results"
    folder.mkdir()
    expected = json.loads((bundle / "expected.json").read_text())
    layers = [
        (product["node"], "CaskConvolution", product["type"], 0.01)
        for product in expected["products"]
    ]
    options = {
        "--exportTimes": folder / "int8.times.json",
        "--exportProfile": folder / "int8.profile.json",
        "--exportLayerInfo": folder / "int8.layers.json",
    }
    stand_in.write_reports(options, [*layers, ("reformat", "Reformat", "Half", 0.03)], False, False)
    for number, pair in enumerate(expected["pairs"]):
        outputs = {}
        for name, file in pair["references"].items():
            outputs[name] = np.load(Path(file).with_suffix(".npy"))
        stand_in.write_outputs(outputs, folder / f"outputs.{number}.json")
    return folder


def run(capsys):
    """The records that it prints: name -> status, text and figures."""
    verify_py.main("int8")
    records = {}
    for line in capsys.readouterr().out.splitlines():
        status, name, text, figures = line.split("\t")
        records[name] = (status, text, json.loads(figures))
    return records


def change_outputs(results, monkeypatch, fault):
    """Write the outputs again with a fault of the stand-in."""
    monkeypatch.setattr(stand_in, "FAULT", fault)
    for path in results.glob("outputs.*.json"):
        outputs = {}
        for entry in json.loads(path.read_text()):
            shape = [int(size) for size in entry["dimensions"].split("x")]
            outputs[entry["name"]] = np.float32(entry["values"]).reshape(shape)
        outputs = stand_in.spoil(outputs, {"--loadEngine": results / "int8.plan"})
        stand_in.write_outputs(outputs, path)


def test_a_sound_result(results, capsys):
    records = run(capsys)
    assert records.keys() == {"numbers a", "numbers b", "census", "profile"}
    assert {record[0] for record in records.values()} == {"passed"}
    assert records["numbers a"][2]["sqnr_db"] is None  # infinite: JSON has no word for it
    assert records["profile"][2]["total_ms"] == pytest.approx(0.07)
    text = (results / "costs.txt").read_text()
    assert text == "not in int8 and slowest: reformat 0.03 ms, 43 % (Reformat Half)"


@pytest.mark.parametrize(
    "fault",
    [
        "swapped_outputs",
        "wrong_shape",
        "truncated_output",
        "cut_file",
        "nan",
        "infinite",
        "missing_output",
        "stuck_outputs",
    ],
)
def test_wrong_outputs_are_named(results, capsys, monkeypatch, fault):
    change_outputs(results, monkeypatch, fault)
    expected = FAULTS[fault]
    records = run(capsys)
    failed = {name: text for name, (status, text, _) in records.items() if status == "failed"}
    assert any(
        name.startswith(expected.check) and expected.text in text for name, text in failed.items()
    ), failed
    assert records["census"][0] == "passed"


def test_the_limit_is_that_of_expected_json(results, bundle, capsys):
    """Noise a little below and a little above the SQNR that is asked for, which is that of all pairs together."""
    expected = json.loads((bundle / "expected.json").read_text())["outputs"][0]
    random = np.random.default_rng(0)
    references = [np.load(bundle / f"references/{number}.0.a.npy") for number in range(2)]
    noise = random.normal(size=(2, 1, 8))
    for margin, status in ((0.2, "passed"), (-0.2, "failed")):
        decibels = expected["min_sqnr_db"] + margin
        power = sum((np.float64(reference) ** 2).sum() for reference in references)
        scaled = noise * np.sqrt(power / (noise**2).sum() / 10 ** (decibels / 10))
        for number, reference in enumerate(references):
            path = results / f"outputs.{number}.json"
            entries = json.loads(path.read_text())
            entries[0]["values"] = (reference + scaled[number]).ravel().tolist()
            path.write_text(json.dumps(entries))
        record = run(capsys)["numbers a"]
        assert record[0] == status
        assert record[2]["sqnr_db"] == pytest.approx(decibels)


@dataclass
class Node:
    name: str
    module: str = ""
    op_type: str = "Conv"
    input_codes: str = "Int8"
    weight_codes: str = "Int8"
    promised: str = "Int8"
    reason: str = ""


KERNELS = [
    ("conv0", "CaskConvolution", "FP8"),
    ("conv1", "CaskConvolution", "Int8"),
    ("conv2", "CaskConvolution", "Half"),
    ("fc", "CaskGemmMatrixMultiply", "Int8"),
    ("__myl_CastMulCastFcAdd_myl0_1", "kgen", "Int8"),
    ("__myl_MulFcAdd_myl0_2", "kgen", "Int8"),
    ("conv5 + relu5", "Convolution", "Float"),
]


@pytest.mark.parametrize("promised", ["Int8", "FP8"])
@pytest.mark.parametrize("is_new_dialect", [False, True])
def test_census_is_that_of_qdq_build(tmp_path, is_new_dialect, promised):
    layers = []
    for name, layer_type, kind in KERNELS:
        layer = stand_in.describe_layer((name, layer_type, kind, 1.0), is_new_dialect)
        if "+" in name:
            del layer["Metadata"]  # the nodes are in its name
        layers.append(layer)
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({"Layers": layers}))
    nodes = [*(name for name, _, _ in KERNELS[:-1]), "conv5", "relu5", "absent"]
    census = take_census(
        [Node(name, promised=promised) for name in nodes], parse_layer_json(path.read_text())
    )
    expected = {layer.node for layer in census if layer.built == promised}
    assert 0 < len(expected) < len(nodes)
    passing = set()
    read = verify_py.read_layers(str(path))
    for name in nodes:
        record = verify_py.check_census([{"node": name, "type": promised, "macs": 1}], read)
        if record[0] == "passed":
            passing.add(name)
        elif name == "absent":
            assert record[0] == "not checked"
            assert "in no layer by their names: absent" in record[2]
        else:
            assert record[0] == "failed"
            assert name in record[2]
    assert passing == expected


@pytest.mark.parametrize("is_new_dialect", [False, True])
@pytest.mark.parametrize(("built", "status"), [("FP8", "passed"), ("Half", "failed")])
def test_a_fused_attention_has_three_operands_in_fp8(tmp_path, is_new_dialect, built, status):
    """Its kernel has no weights, and its name is no product's; the census of the build knows it as well."""
    tensors = []
    for kind in (built, built, built, "Half"):  # query, key, value, mask
        tensors.append(stand_in.describe_tensor(kind, is_new_dialect))
    metadata = "[ONNX Layer: scores]\x1f[ONNX Layer: values]"
    layer = {"Name": "_gemm_mha_v2_myl0_3", "LayerType": "kgen", "Inputs": tensors}
    path = tmp_path / "layers.json"
    path.write_text(json.dumps({"Layers": [{**layer, "Outputs": [], "Metadata": metadata}]}))
    products = [{"node": name, "type": "FP8", "macs": 1} for name in ("scores", "values")]
    record = verify_py.check_census(products, verify_py.read_layers(str(path)))
    assert record[0] == status, record
    nodes = [Node(name, promised="FP8") for name in ("scores", "values")]
    census = take_census(nodes, parse_layer_json(path.read_text()))
    assert {layer.built for layer in census} == {built}


def test_the_census_counts_each_type():
    layers = []
    for name, kind in (("a", "Int8"), ("b", "FP8"), ("c", "Int8"), ("d", "Half")):
        described = stand_in.describe_layer((name, "CaskConvolution", kind, 1.0), True)
        layers.append(verify_py.read_layer(described))
    types = {"a": "Int8", "b": "FP8", "c": "FP8", "d": None}
    products = [{"node": name, "type": kind, "macs": 2} for name, kind in types.items()]
    record = verify_py.check_census(products, layers)
    text = "1 of 1 products in int8, 1 of 2 products in FP8; in another type than that of their Q/DQ: c (Int8 x Int8)"
    assert (record[0], record[2]) == ("failed", text)
    assert record[3] == {
        **{"expected_int8": 1, "int8": 1, "expected_fp8": 2, "fp8": 1},
        **{"macs_expected": 6, "macs_all": 8},
    }
    del products[2]
    assert verify_py.check_census(products, layers)[0] == "passed"


def test_nothing_below_16_bit_is_not_passed():
    record = verify_py.check_census([{"node": "a", "type": None, "macs": 1}], [])
    assert record[:3] == ("not checked", "census", "no product has Q/DQ on both operands")


def test_it_needs_python_3_8_and_numpy_only():
    tree = ast.parse(SOURCE.read_text(), feature_version=(3, 8))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert imported == {"__future__", "json", "os", "re", "sys", "typing", "numpy"}
    vermin = pytest.importorskip("vermin", reason="needs the extra 'dev'")
    _, least_python_3 = vermin.detect(SOURCE.read_text())
    assert least_python_3 <= (3, 8)


def test_a_crash_is_a_failed_check(bundle, tmp_path):
    """Without results it says what is missing; with a damaged expected.json it ends with an error."""
    process = subprocess.run(
        [sys.executable, "verify.py", "int8"],
        cwd=bundle,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0
    assert "failed\tnumbers a\ttrtexec wrote no results/outputs.0.json" in process.stdout
    shutil.copy(bundle / "verify.sh", bundle / "expected.json")
    process = subprocess.run(
        [sys.executable, "verify.py", "int8"],
        cwd=bundle,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode != 0
