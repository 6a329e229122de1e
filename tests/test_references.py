import numpy as np
import onnxruntime
import pytest
import torch
from small_model import make_batches, make_model
from two_heads import TwoHeads, db

import qdq
from qdq.pairs import digest_file, load_pairs


@pytest.fixture
def exported(tmp_path):
    model = make_model()
    batches = make_batches(3)  # of 2, 3 and 4 samples
    qdq.calibrate_model(model, batches)
    return model, batches, qdq.export_onnx(model, batches[0], tmp_path / "m.onnx").path


def test_samples_in_turn_with_both_outputs(exported, tmp_path):
    model, batches, onnx = exported
    stored = load_pairs(
        qdq.save_references(model, batches, tmp_path / "r.safetensors", onnx, count=5)
    )
    assert stored.model_sha256 == digest_file(onnx)
    expected = [batches[0][0:1], batches[1][0:1], batches[2][0:1], batches[0][1:2], batches[1][1:2]]
    session = onnxruntime.InferenceSession(onnx)
    (name,) = (value.name for value in session.get_inputs())
    assert len(stored.pairs) == 5
    for pair, sample in zip(stored.pairs, expected, strict=True):
        assert np.array_equal(pair.inputs[name], sample.numpy())
        assert db(session.run(None, pair.inputs)[0], pair.quantized["output"]) > 30
    torch.manual_seed(0)
    qdq.disable_quantization(model)
    with torch.no_grad():
        outputs = model(expected[0]).numpy()
    assert np.array_equal(stored.pairs[0].float["output"], outputs)
    assert not np.array_equal(stored.pairs[0].float["output"], stored.pairs[0].quantized["output"])


def test_quantizers_are_on_again(exported, tmp_path):
    model, batches, onnx = exported
    before = qdq.predict(model, batches)
    qdq.save_references(model, batches, tmp_path / "r.safetensors", onnx)
    assert np.array_equal(qdq.predict(model, batches), before)


def test_a_fixed_batch_is_taken_whole(exported, tmp_path):
    model, batches, _ = exported
    onnx = qdq.export_onnx(model, batches[0], tmp_path / "f.onnx", dynamic_batch=False).path
    path = qdq.save_references(model, batches[:1], tmp_path / "r.safetensors", onnx)
    (pair,) = load_pairs(path).pairs
    assert pair.quantized["output"].shape == (2, 16)


def test_several_outputs_and_fewer_samples_than_asked_for(tmp_path):
    torch.manual_seed(0)
    model, batch = TwoHeads().eval(), torch.randn(2, 3, 8, 8)
    qdq.swap_modules(model, batch)
    qdq.calibrate_model(model, [batch])
    onnx = qdq.export_onnx(model, batch, tmp_path / "m.onnx").path
    path = qdq.save_references(model, [batch], tmp_path / "r.safetensors", onnx)
    pairs = load_pairs(path).pairs
    assert len(pairs) == 2
    assert [list(pair.quantized) for pair in pairs] == [["boxes", "scores"]] * 2


def test_no_sample_is_an_error(exported, tmp_path):
    model, batches, onnx = exported
    with pytest.raises(qdq.ArgumentError, match="count is 0"):
        qdq.save_references(model, batches, tmp_path / "r.safetensors", onnx, count=0)
    with pytest.raises(qdq.DataError, match="there is no batch"):
        qdq.save_references(model, [], tmp_path / "r.safetensors", onnx)
