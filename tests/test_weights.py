"""Checkpoints: the state_dict that is found in one, and tensors that a layer cannot take."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from qdq.errors import ModelError
from qdq.weights import is_state_dict, read_checkpoint, require_convertible, require_plain


@pytest.fixture
def state():
    return nn.Linear(3, 2).state_dict()


def assert_same(state, expected):
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert torch.equal(tensor, expected[name])


@pytest.mark.parametrize("key", [None, "state_dict", "model", "model_state_dict", "model_ema"])
def test_a_state_dict_is_found_by_itself_or_under_a_key(state, key, tmp_path):
    torch.save(state if key is None else {key: state, "epoch": 3}, tmp_path / "weights.pt")
    read, source = read_checkpoint(tmp_path / "weights.pt")
    assert_same(read, state)
    assert "weights.pt" in source


def test_safetensors(state, tmp_path):
    save_file(state, tmp_path / "weights.safetensors")
    read, _ = read_checkpoint(tmp_path / "weights.safetensors")
    assert_same(dict(sorted(read.items())), dict(sorted(state.items())))


def test_a_pickled_module_is_refused(tmp_path):
    torch.save(nn.Linear(3, 2), tmp_path / "model.pt")
    with pytest.raises(ModelError):
        read_checkpoint(tmp_path / "model.pt")


@pytest.mark.parametrize("content", [b"", b"<html>not here</html>", b"\x00" * 64])
def test_what_is_no_checkpoint_is_refused(content, tmp_path):
    (tmp_path / "weights.pt").write_bytes(content)
    with pytest.raises(ModelError, match=r"weights\.pt"):
        read_checkpoint(tmp_path / "weights.pt")


@pytest.mark.parametrize(
    ("content", "expected"),
    [({"weight": torch.ones(1)}, True), ({}, False), ({"epoch": 3}, False), ([], False)],
)
def test_a_state_dict_maps_names_to_tensors(content, expected):
    assert is_state_dict(content) is expected


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.ones(3, device="meta"),
        torch.ones(3, dtype=torch.complex64),
    ],
    ids=["sparse", "meta", "complex"],
)
def test_tensors_that_no_layer_can_take(tensor):
    with pytest.raises(ModelError, match="bad"):
        require_plain({"good": torch.ones(2), "bad": tensor}, "the file")


def test_values_that_would_change_in_the_model_are_refused():
    model_state = {"weight": torch.zeros(2)}
    require_convertible({"weight": torch.ones(2, dtype=torch.float64)}, model_state, "the file")
    with pytest.raises(ModelError, match="weight"):
        require_convertible(
            {"weight": torch.tensor([1e300, 1.0]).double()}, model_state, "the file"
        )
