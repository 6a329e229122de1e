"""Choice of a device, batches on their way there, float32 without TF32."""

import pytest
import torch
from pretended_device import list_waits, watch
from torch import nn

from qdq.device import (
    choose_device,
    copy_to_host,
    describe_device,
    find_device,
    find_sm,
    move_batch,
    on_host,
    read_numbers,
    without_tf32,
)
from qdq.errors import ArgumentError
from qdq.forward import call_model


@pytest.fixture
def four_gpus(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"Card {device.index}")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))


class TestChoose:
    def test_without_a_gpu(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert choose_device() == torch.device("cpu")
        assert describe_device(choose_device()) == "cpu"
        assert find_sm(choose_device()) is None
        with pytest.raises(ArgumentError, match="torch finds GPUs: 0"):
            choose_device("cuda")

    def test_with_gpus(self, four_gpus):
        assert choose_device() == torch.device("cuda", 0)
        assert choose_device("cpu") == torch.device("cpu")
        assert choose_device("cuda:3") == torch.device("cuda", 3)
        assert describe_device(choose_device("cuda:3")).startswith("cuda:3 (Card 3), TF32 off")
        assert find_sm(choose_device("cuda:3")) == 86
        with pytest.raises(ArgumentError, match="cuda:4; torch finds GPUs: 4"):
            choose_device("cuda:4")

    def test_the_local_rank_chooses(self, four_gpus, monkeypatch):
        monkeypatch.setenv("LOCAL_RANK", "2")
        assert choose_device() == choose_device("cuda") == torch.device("cuda", 2)
        assert choose_device("cuda:1") == torch.device("cuda", 1)

    @pytest.mark.parametrize("name", ["cuda:128", "cuda:256", "cuda:99999"])
    def test_large_numbers_are_no_other_gpu(self, four_gpus, name):
        """torch keeps the number in 8 bits."""
        with pytest.raises(ArgumentError, match=f"{name}; torch finds GPUs: 4"):
            choose_device(name)

    def test_a_process_that_sees_one_gpu_takes_it(self, four_gpus, monkeypatch):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        monkeypatch.setenv("LOCAL_RANK", "3")
        assert choose_device() == torch.device("cuda", 0)

    @pytest.mark.parametrize("rank", ["", "abc", "-1", "1.5"])
    def test_a_local_rank_that_is_no_number(self, four_gpus, monkeypatch, rank):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(ArgumentError, match="LOCAL_RANK"):
            choose_device()

    @pytest.mark.parametrize(
        "name", ["gpu", "cuda:", "cuda:-1", "cuda:x", "CUDA", "", "cpu:0", "cuda:01", "cuda:１"]
    )
    def test_other_names_are_refused(self, name):
        with pytest.raises(ArgumentError, match="expected cpu, cuda or cuda:N"):
            choose_device(name)


class TestBatches:
    def test_every_tensor_moves(self, gpu):
        batch = {"images": [torch.ones(2)], "sizes": (torch.ones(1), 3)}
        moved = move_batch(batch, gpu)
        assert moved["images"][0].device == moved["sizes"][0].device == gpu
        assert moved["sizes"][1] == 3
        assert move_batch(moved, gpu) is moved

    def test_a_model_gets_its_batch_on_its_device(self, gpu):
        model = nn.Linear(3, 2).to(gpu)
        assert find_device(model) == gpu
        assert call_model(model, (torch.ones(1, 3), "label")).device == gpu
        mixed = nn.Sequential(nn.Identity(), nn.Linear(3, 2).to(gpu))
        mixed.scale = nn.Parameter(torch.ones(()))  # the first parameter
        assert call_model(mixed, torch.ones(1, 3, device=gpu)).device == gpu
        assert call_model(nn.ReLU(), torch.ones(1, 3, device=gpu)).device == gpu
        assert call_model(model.cpu(), torch.ones(1, 3, device=gpu)).device == torch.device("cpu")

    def test_a_model_may_have_buffers_only(self, gpu):
        model = nn.BatchNorm1d(3, affine=False).to(gpu)
        assert find_device(model) == gpu
        assert find_device(nn.ReLU()) == torch.device("cpu")


def test_numbers_come_in_one_transfer(device):
    tensors = [torch.tensor(value, device=device) for value in (1, 2.5, True)]
    with watch(device) as events:
        assert read_numbers(tensors) == [1.0, 2.5, 1.0]
        assert read_numbers([]) == []
    assert len(list_waits(events)) == (device.type != "cpu")


def list_settings():
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    settings = [cudnn.conv, cudnn.rnn, matmul, torch.backends.mkldnn.matmul]
    return [setting.fp32_precision for setting in settings]


class TestTf32:
    @pytest.fixture(autouse=True)
    def _restore(self):
        yield
        torch.backends.fp32_precision = "none"
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        torch.backends.cudnn.allow_tf32 = True
        torch.set_float32_matmul_precision("highest")

    def allow_older(self):
        torch.set_float32_matmul_precision("medium")

    def allow_newer(self):
        torch.backends.cuda.matmul.fp32_precision = "tf32"

    def allow_all(self):
        torch.backends.fp32_precision = "tf32"
        torch.backends.cudnn.allow_tf32 = False

    @pytest.mark.parametrize("allow", [allow_older, allow_newer, allow_all])
    def test_is_off_in_the_block_and_back_after_it(self, allow):
        allow(self)
        before = list_settings()
        assert "tf32" in before
        with without_tf32():
            assert list_settings() == ["ieee"] * 4
            assert not torch.backends.cudnn.allow_tf32
            assert not torch.backends.cuda.matmul.allow_tf32
        assert list_settings() == before

    def test_the_defaults_are_back(self):
        torch.backends.mkldnn.matmul.fp32_precision = "none"
        before = list_settings()
        with without_tf32():
            pass
        assert list_settings() == before

    def test_convolutions_are_exact_in_the_block(self, gpu):
        conv, images = nn.Conv2d(3, 8, 3), torch.randn(2, 3, 9, 9)
        expected = conv(images)
        conv.to(gpu)
        assert not torch.allclose(conv(images.to(gpu)).cpu(), expected, rtol=0, atol=1e-5)
        with without_tf32():
            assert torch.allclose(conv(images.to(gpu)).cpu(), expected, rtol=0, atol=1e-5)


class TestOnHost:
    def test_a_model_has_copies_in_the_block(self, gpu):
        model = nn.Sequential(nn.LSTM(3, 3), nn.Linear(3, 3), nn.BatchNorm1d(3)).to(gpu)
        model.tied = model[1].weight
        model.options = {"device": gpu, "offsets": [torch.ones(3, device=gpu)], "count": 3}
        state, options = model.state_dict(keep_vars=True), model.options
        with on_host(model):
            for name, tensor in model.state_dict(keep_vars=True).items():
                assert tensor.device.type == "cpu"
                assert torch.equal(tensor, state[name].cpu())
                assert type(tensor) is type(state[name])
                assert tensor.requires_grad == state[name].requires_grad
            assert model.tied is model[1].weight
            assert model.options["device"].type == "cpu"
            assert model.options["offsets"][0].device.type == "cpu"
            model[0](torch.ones(4, 3))
        assert model.options is options
        for name, tensor in model.state_dict(keep_vars=True).items():
            assert tensor is state[name]

    def test_the_model_is_back_after_an_error(self, gpu):
        model = nn.Linear(3, 3).to(gpu)
        weight = model.weight
        with pytest.raises(ValueError, match="planted"), on_host(model):
            raise ValueError("planted")
        assert model.weight is weight

    def test_a_model_of_the_cpu_or_without_data_is_left_alone(self):
        for device in ("cpu", "meta"):
            model = nn.Linear(3, 3, device=device)
            weight = model.weight
            with on_host(model):
                assert model.weight is weight


def test_tensors_come_to_the_host_together(gpu):
    tensors = [torch.randn(3, 4), torch.arange(5), torch.tensor(True), torch.empty(0, 2)]
    tensors += [torch.randn(7).half(), torch.randn(2, 3).t(), torch.tensor(2.0, dtype=torch.double)]
    moved = [tensor.to(gpu) for tensor in tensors]
    with watch(gpu) as events:
        copies = copy_to_host([*moved, tensors[0]])
    assert len(list_waits(events)) == 1
    assert copies[-1] is tensors[0]
    for copied, tensor in zip(copies, tensors, strict=False):
        assert copied.dtype == tensor.dtype
        assert torch.equal(copied, tensor)
    assert copy_to_host([]) == []
