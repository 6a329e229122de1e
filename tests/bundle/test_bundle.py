import io
import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from small_bundle import TwoHeads

import qdq
from qdq.bundle import make_bundle
from qdq.bundle.archive import write_archive
from qdq.cli.arrays import load_arrays
from qdq.cli.main import main
from qdq.pairs import load_pairs, save_pairs
from qdq.text import make_printable

REFERENCES = "references.safetensors"


def read_expected(folder):
    return json.loads((folder / "expected.json").read_text())


def contents(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def db(reference, outputs):
    """SQNR by numpy."""
    noise = ((np.float64(reference) - outputs) ** 2).sum()
    return 10 * np.log10((np.float64(reference) ** 2).sum() / noise)


class TestContents:
    def test_files_and_their_digests(self, made, run_folder):
        expected = read_expected(made.folder)
        names = {path.as_posix() for path in contents(made.folder)}
        assert names == {*expected["files"], "expected.json"}
        assert {
            *("model.onnx", "model.fp16.onnx", "float.onnx", "float.fp16.onnx", "README.txt"),
            *("verify.sh", "verify.py", "commands.sh", "inputs/1.0.x.bin", "inputs/1.0.x.npy"),
            *("references/1.1.b.bin", "references/float/0.0.a.npy"),
        } <= names
        assert expected["format"] == "qdq bundle 1"
        assert expected["model_sha256"] == load_pairs(run_folder / REFERENCES).model_sha256
        assert made.files.keys() == names

    def test_raw_values_are_those_of_the_arrays(self, made):
        for pair in read_expected(made.folder)["pairs"]:
            for file in (*pair["inputs"].values(), *pair["references"].values()):
                array = np.load((made.folder / file).with_suffix(".npy"))
                raw = (made.folder / file).read_bytes()
                assert np.array_equal(np.frombuffer(raw, array.dtype).reshape(array.shape), array)

    def test_references_are_those_of_torch(self, made, run_folder):
        """The bundle's inputs through the quantized model, made again here."""
        torch.manual_seed(0)
        model, batch = TwoHeads().eval(), 2 * torch.randn(4, 3, 8, 8)
        for name, pair in enumerate(read_expected(made.folder)["pairs"]):
            x = np.load((made.folder / pair["inputs"]["x"]).with_suffix(".npy"))
            assert np.array_equal(x, batch[name : name + 1].numpy())
        with torch.no_grad():
            expected = model(batch[:1])["a"].numpy()
        assert np.load(made.folder / "references/float/0.0.a.npy") == pytest.approx(expected)
        quantized = np.load(made.folder / "references/0.0.a.npy")
        assert 15 < db(expected, quantized) < 60

    def test_every_model_of_the_bundle_computes_the_references(self, made):
        for name, floor in (("model", 60), ("model.fp16", 45), ("float", 25), ("float.fp16", 25)):
            session = onnxruntime.InferenceSession(made.folder / f"{name}.onnx")
            for pair in read_expected(made.folder)["pairs"]:
                x = np.load((made.folder / pair["inputs"]["x"]).with_suffix(".npy"))
                reference = np.load((made.folder / pair["references"]["b"]).with_suffix(".npy"))
                assert db(reference, session.run(["b"], {"x": x})[0]) > floor

    def test_opsets_and_types_for_each_tensorrt(self, made):
        opsets, halves, quantized = {}, {}, {}
        for name in ("model", "model.fp16", "float", "float.fp16"):
            model = onnx.load(made.folder / f"{name}.onnx")
            opsets[name] = model.opset_import[0].version
            halves[name] = any(tensor.data_type == 10 for tensor in model.graph.initializer)
            quantized[name] = any("Quantize" in node.op_type for node in model.graph.node)
        assert opsets == {"model": 17, "model.fp16": 19, "float": 17, "float.fp16": 19}
        assert [name for name in halves if halves[name]] == ["model.fp16", "float.fp16"]
        assert [name for name in quantized if quantized[name]] == ["model", "model.fp16"]

    def test_products_with_their_work(self, made):
        products = read_expected(made.folder)["products"]
        # multiplications of a sample: 8x8 places, 3x3 taps
        assert [(product["node"], product["macs"]) for product in products] == [
            ("stem/Conv", 64 * 9 * 3 * 16),
            ("middle/Conv", 64 * 9 * 16 * 16),
            ("a/Gemm", 128),
            ("b/Gemm", 128),
        ]
        assert {product["type"] for product in products} == {"Int8"}

    def test_the_tolerance_says_where_it_comes_from(self, made):
        expected = read_expected(made.folder)
        assert "tie floor" in expected["tolerance"]
        for output in expected["outputs"]:
            assert output["min_sqnr_db"] == pytest.approx(output["tie_floor_db"] - 3)
            noise = 10 ** (-output["min_sqnr_db"] / 10)
            assert output["min_cosine"] == pytest.approx(np.sqrt(1 - noise))

    def test_no_path_of_this_machine(self, made, run_folder):
        for path, content in contents(made.folder).items():
            assert str(run_folder).encode() not in content, path
            if path.suffix in (".sh", ".json", ".txt"):
                assert not re.search(rb"/(home|root|tmp|work)/", content), path


class TestDeterminism:
    def test_made_twice_it_has_the_same_bytes(self, made, run_folder, tmp_path):
        again = make_bundle(run_folder, tmp_path / "bundle", count=2, with_float=True, archive=True)
        assert contents(again.folder) == contents(made.folder)
        assert again.archive.read_bytes() == made.archive.read_bytes()

    def test_the_archive_holds_the_folder(self, made):
        with tarfile.open(fileobj=io.BytesIO(made.archive.read_bytes())) as archive:
            entries = {entry.name: entry for entry in archive.getmembers()}
            assert entries.keys() == {f"bundle/{name}" for name in made.files}
            assert {entry.mtime for entry in entries.values()} == {0}
            text = archive.extractfile("bundle/verify.sh").read()
        assert text == (made.folder / "verify.sh").read_bytes()

    def test_a_long_name_in_the_archive(self, tmp_path):
        """The oldest format of tar takes 100 characters."""
        name = "long" * 40
        (tmp_path / name).write_bytes(b"x")
        archives = [write_archive(tmp_path, [name], tmp_path / file).read_bytes() for file in "ab"]
        assert archives[0] == archives[1]
        with tarfile.open(fileobj=io.BytesIO(archives[0])) as archive:
            assert archive.getnames() == [f"{tmp_path.name}/{name}"]


class TestPlaces:
    def test_the_current_folder(self, run_folder, tmp_path, monkeypatch):
        folder = tmp_path / "he\nre"
        folder.mkdir()
        monkeypatch.chdir(folder)
        assert make_bundle(run_folder, ".", count=1).archive is None
        report = make_bundle(run_folder, ".", count=1, archive=True)
        assert report.archive == tmp_path / "he\nre.tar.gz"
        assert "he\\nre.tar.gz: 0.0 MB" in make_printable(report).format_table()
        with tarfile.open(report.archive) as archive:
            assert "he\nre/verify.sh" in archive.getnames()

    def test_a_source_or_inputs_in_the_folder_are_refused(self, made, tmp_path, capsys):
        folder = shutil.copytree(made.folder, tmp_path / "bundle")
        before = contents(folder)
        inputs = {"x": np.zeros((1, 3, 8, 8), np.float32)}
        for source in (folder, folder / "model.onnx"):
            with pytest.raises(qdq.ArgumentError, match="the folder that is written"):
                make_bundle(source, folder, inputs=inputs)
        shutil.copy(folder / "model.onnx", tmp_path)
        np.savez(folder / "inputs" / "x.npz", **inputs)
        flags = ["-o", str(folder), "--inputs", str(folder / "inputs" / "x.npz")]
        with pytest.raises(SystemExit):
            main(["bundle", str(tmp_path / "model.onnx"), *flags])
        assert "x.npz is in" in capsys.readouterr().err
        (folder / "inputs" / "x.npz").unlink()
        assert contents(folder) == before

    def test_an_earlier_bundle_is_replaced_and_other_files_stay(self, made, run_folder, tmp_path):
        folder = shutil.copytree(made.folder, tmp_path / "bundle")
        (folder / "results").mkdir()
        (folder / "result.json").write_text("{}")
        (folder / "notes.md").write_text("mine")
        make_bundle(run_folder, folder, count=1)
        assert not (folder / "float.onnx").exists()
        assert not (folder / "result.json").exists()
        assert not (folder / "results").exists()
        assert not (folder / "inputs/1.0.x.bin").exists()
        assert (folder / "notes.md").read_text() == "mine"

    @pytest.mark.parametrize("moved", [0, 3])
    def test_after_an_interruption_it_is_replaced_again(
        self, made, run_folder, tmp_path, monkeypatch, moved
    ):
        """The process ends after some files of the new bundle are there and those of the old are not."""
        folder = shutil.copytree(made.folder, tmp_path / "bundle")
        rename, renamed = Path.replace, []

        def stop(path, target):
            if folder in Path(target).parents and Path(target).name != "expected.json":
                renamed.append(target)
                if len(renamed) > moved:
                    raise KeyboardInterrupt
            return rename(path, target)

        monkeypatch.setattr(Path, "replace", stop)
        with pytest.raises(KeyboardInterrupt):
            make_bundle(run_folder, folder, count=1)
        monkeypatch.undo()
        listed = read_expected(folder)["files"]
        assert {path.as_posix() for path in contents(folder)} <= {*listed, "expected.json"}
        again = make_bundle(run_folder, folder, count=1)
        assert {path.as_posix() for path in contents(folder)} == again.files.keys()
        assert "pairs" in read_expected(folder)

    def test_a_folder_with_other_files_is_refused(self, run_folder, tmp_path):
        (tmp_path / "notes.md").write_text("mine")
        with pytest.raises(qdq.ArgumentError, match="holds files and is not a bundle"):
            make_bundle(run_folder, tmp_path)

    def test_a_fault_leaves_nothing(self, run_folder, tmp_path):
        with pytest.raises(qdq.ArgumentError, match="the inputs given are y"):
            make_bundle(run_folder, tmp_path / "new", inputs={"y": np.zeros((1, 3, 8, 8))})
        assert list(tmp_path.iterdir()) == []


class TestSources:
    @pytest.mark.parametrize("kind", ["empty", "cut off", "one array"])
    def test_a_damaged_file_of_inputs(self, tmp_path, kind):
        path = tmp_path / "x.npz"
        np.savez(path, x=np.zeros(1000))
        if kind == "one array":
            np.save(tmp_path / "x.npy", np.zeros(3))
            path = tmp_path / "x.npy"
        else:
            path.write_bytes(path.read_bytes()[: 500 if kind == "cut off" else 0])
        with pytest.raises(qdq.DataError, match=r"cannot read .* as \.npz") as e:
            load_arrays(path)
        assert "numpy.savez" in e.value.fix

    def test_an_onnx_file_with_inputs(self, run_folder, tmp_path, capsys):
        x = np.random.default_rng(0).normal(size=(3, 3, 8, 8)).astype(np.float32)
        np.savez(tmp_path / "x.npz", x=x)
        shutil.copy(run_folder / "model.onnx", tmp_path / "m.onnx")
        folder = tmp_path / "bundle"
        flags = ["--inputs", str(tmp_path / "x.npz"), "--pairs", "2", "--json", str(tmp_path / "j")]
        with pytest.raises(SystemExit) as exit:
            main(["bundle", str(tmp_path / "m.onnx"), "-o", str(folder), *flags])
        assert exit.value.code == 0
        assert "2 pairs of inputs and references (ONNX Runtime" in capsys.readouterr().out
        assert json.loads((tmp_path / "j").read_text())["pairs"] == 2
        session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
        expected = session.run(["a"], {"x": x[1:2]})[0]
        assert db(expected, np.load(folder / "references/1.0.a.npy")) > 40
        assert not (folder / "references/float").exists()

    def test_inputs_of_other_types(self, tmp_path):
        text = """<ir_version: 9, opset_import: ["": 17]>
        g (int64[N,5] ids, float[N,5,4] bias) => (float[N,5,4] y)
        <float[3,4] e = {1, -2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}, float s = {0.1}, int8 z = {0},
         int8[4,4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}, float ws = {0.1}>
        {
            h = Gather (e, ids)
            q = QuantizeLinear (h, s, z)
            d = DequantizeLinear (q, s, z)
            wd = DequantizeLinear (w, ws, z)
            m = MatMul (d, wd)
            y = Add (m, bias)
        }"""
        onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
        ids = np.arange(10).reshape(2, 5) % 3
        bias = np.random.default_rng(0).normal(size=(2, 5, 4)).astype(np.float32)
        folder = tmp_path / "bundle"
        make_bundle(tmp_path / "m.onnx", folder, inputs={"ids": ids, "bias": bias})
        assert np.fromfile(folder / "inputs/1.0.ids.bin", np.int64).tolist() == ids[1].tolist()
        assert np.array_equal(np.load(folder / "inputs/1.1.bias.npy"), bias[1:])
        commands = (folder / "commands.sh").read_text()
        assert "--loadInputs=ids:inputs/0.0.ids.bin,bias:inputs/0.1.bias.bin" in commands
        assert "TensorRT 8.6 takes int64 inputs as int32" in commands
        (product,) = read_expected(folder)["products"]
        assert product["node"] == "node_of_m"  # as TensorRT's parser names a node without a name

    def test_a_file_with_a_fixed_batch(self, run_folder, tmp_path):
        model = onnx.load(run_folder / "model.onnx")
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.shape.dim[0].dim_value = 2
        del model.graph.value_info[:]
        onnx.save(model, tmp_path / "m.onnx")
        x = np.random.default_rng(0).normal(size=(6, 3, 8, 8)).astype(np.float32)
        folder = make_bundle(tmp_path / "m.onnx", tmp_path / "b", inputs={"x": x}).folder
        assert len(read_expected(folder)["pairs"]) == 3
        assert np.array_equal(np.load(folder / "inputs/1.0.x.npy"), x[2:4])
        reference = np.load(folder / "references/1.0.a.npy")
        expected = onnxruntime.InferenceSession(run_folder / "model.onnx").run(["a"], {"x": x})[0]
        assert np.abs(expected[2:4] - reference).max() < 0.01 * np.abs(expected).max()
        with pytest.raises(
            qdq.ArgumentError, match="has 5 samples, and the file takes 2 at a time"
        ):
            make_bundle(tmp_path / "m.onnx", tmp_path / "c", inputs={"x": x[:5]})

    def test_a_scalar_input_is_the_same_in_all_pairs(self, tmp_path):
        text = """<ir_version: 9, opset_import: ["": 17]>
        g (float[N,4] x, float factor) => (float[N,4] y)
        <float s = {0.1}, int8 z = {0},
         int8[4,4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7}, float ws = {0.1}>
        {
            q = QuantizeLinear (x, s, z)
            d = DequantizeLinear (q, s, z)
            wd = DequantizeLinear (w, ws, z)
            m = MatMul (d, wd)
            y = Mul (m, factor)
        }"""
        onnx.save(onnx.parser.parse_model(text), tmp_path / "m.onnx")
        x = np.random.default_rng(0).normal(size=(2, 4)).astype(np.float32)
        inputs = {"x": x, "factor": np.array(3, np.float32)}
        folder = make_bundle(tmp_path / "m.onnx", tmp_path / "bundle", inputs=inputs).folder
        for number in (0, 1):
            stored = np.load(folder / f"inputs/{number}.1.factor.npy")
            assert (stored.shape, float(stored)) == ((), 3.0)
            assert np.fromfile(folder / f"inputs/{number}.1.factor.bin", np.float32) == [3]
        codes = np.clip(np.rint(x / np.float32(0.1)), -128, 127) * 0.1
        weights = np.array([*range(1, 10), *range(1, 8)]).reshape(4, 4) * 0.1
        assert np.load(folder / "references/1.0.y.npy") == pytest.approx(
            3 * codes[1:] @ weights, rel=1e-5
        )

    def test_an_onnx_file_without_inputs(self, run_folder, tmp_path):
        shutil.copy(run_folder / "model.onnx", tmp_path / "m.onnx")
        with pytest.raises(qdq.ArgumentError, match="there are no inputs for it"):
            make_bundle(tmp_path / "m.onnx", tmp_path / "bundle")

    def test_a_file_without_qdq(self, made, tmp_path):
        with pytest.raises(qdq.ArgumentError, match="has no Q/DQ"):
            make_bundle(made.folder / "float.onnx", tmp_path / "bundle", inputs={})

    def test_a_file_with_bfloat16(self, tmp_path):
        text = """<ir_version: 9, opset_import: ["": 19]>
        g (float[1,4] x) => (float[1,4] y) <bfloat16 s = {1}, int8 z = {0}>
        {
            h = Cast <to = 16> (x)
            q = QuantizeLinear (h, s, z)
            d = DequantizeLinear (q, s, z)
            y = Cast <to = 1> (d)
        }"""
        model = onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text))
        onnx.save(model, tmp_path / "m.onnx")
        with pytest.raises(qdq.ArgumentError, match="has bfloat16 tensors"):
            make_bundle(tmp_path / "m.onnx", tmp_path / "bundle", inputs={})

    def test_letters_beyond_ascii_in_a_name(self, run_folder, tmp_path):
        """JSON escapes them, and verify.sh would not find their files."""
        model = onnx.load(run_folder / "model.onnx")
        model.graph.input[0].name = "größe"
        for node in model.graph.node:
            node.input[:] = ["größe" if name == "x" else name for name in node.input]
        onnx.save(model, tmp_path / "m.onnx")
        inputs = {"größe": np.zeros((1, 3, 8, 8), np.float32)}
        with pytest.raises(qdq.ArgumentError, match="trtexec cannot take the names größe"):
            make_bundle(tmp_path / "m.onnx", tmp_path / "bundle", inputs=inputs)

    def test_a_run_of_an_earlier_version(self, run_folder, tmp_path):
        shutil.copy(run_folder / "model.onnx", tmp_path / "model.onnx")
        with pytest.raises(qdq.ArgumentError, match=r"has no references\.safetensors"):
            make_bundle(tmp_path, tmp_path / "bundle")

    def test_references_of_another_file(self, run_folder, made, tmp_path):
        shutil.copy(run_folder / "references.safetensors", tmp_path)
        shutil.copy(made.folder / "model.onnx", tmp_path / "model.onnx")
        with pytest.raises(qdq.DataError, match="made for another"):
            make_bundle(tmp_path, tmp_path / "bundle")

    def test_a_float16_run_has_no_file_for_8_6(self, run_folder, tmp_path):
        x = np.random.default_rng(0).normal(size=(2, 3, 8, 8)).astype(np.float32)
        source = tmp_path / "half.onnx"
        shutil.copy(
            make_bundle(run_folder, tmp_path / "b", count=1).folder / "model.fp16.onnx", source
        )
        report = make_bundle(source, tmp_path / "half", inputs={"x": x}, with_float=True)
        assert "model.onnx is left out" in report.notes[0]
        assert {"model.fp16.onnx", "float.fp16.onnx"} <= report.files.keys()
        assert not {"model.onnx", "float.onnx"} & report.files.keys()
        commands = (tmp_path / "half" / "commands.sh").read_text()
        assert "8.6) echo 'TensorRT 8.6 has no float16 scales" in commands
        assert "'8.6 int8'" not in commands

    def test_a_wrong_file_is_not_bundled(self, run_folder, tmp_path):
        """A model whose references are of another bias, although the digest fits."""
        folder = shutil.copytree(run_folder, tmp_path / "run")
        model = onnx.load(folder / "model.onnx")
        for tensor in model.graph.initializer:
            if tensor.name == "middle.bias":
                array = onnx.numpy_helper.to_array(tensor)
                tensor.CopyFrom(onnx.numpy_helper.from_array(array + 1, tensor.name))
        onnx.save(model, folder / "model.onnx")
        path = folder / "references.safetensors"
        save_pairs(load_pairs(path).pairs, path, folder / "model.onnx")
        with pytest.raises(qdq.CheckError, match="a correct file has at least"):
            make_bundle(folder, tmp_path / "bundle")
