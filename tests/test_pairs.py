import numpy as np
import pytest
from safetensors import numpy as safetensors

from qdq import DataError
from qdq.pairs import Pair, load_pairs, save_pairs


def test_pairs_come_back_in_their_order(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"abc")
    pairs = []
    for number in range(11):  # 10 comes after 9, not after 1
        inputs = {"a/b": np.full((1, 2), number, np.float32), "ids": np.array([number])}
        pairs.append(Pair(inputs, {"y": np.float32([number])}, {}))
    stored = load_pairs(save_pairs(pairs, tmp_path / "r.safetensors", tmp_path / "m.onnx"))
    # SHA-256 of "abc", from FIPS 180-2
    assert stored.model_sha256.startswith("ba7816bf8f01cfea414140de5dae2223")
    assert [pair.quantized["y"].item() for pair in stored.pairs] == list(range(11))
    assert stored.pairs[10].inputs["a/b"].shape == (1, 2)
    assert stored.pairs[10].inputs["ids"].dtype == np.int64
    assert stored.pairs[0].float == {}


def test_another_file_is_refused(tmp_path):
    path = tmp_path / "r.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(DataError, match="cannot read"):
        load_pairs(path)
    path.write_bytes(safetensors.save({"x": np.zeros(1)}))
    with pytest.raises(DataError, match="not a file of references: its format is None"):
        load_pairs(path)
