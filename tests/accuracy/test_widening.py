"""Wider layers: the float model stays, the width goes where rounding counts most, and costs no more than its share."""

import copy

import numpy as np
import pytest
import torch
from inverted_block import Inverted
from torch import nn

import qdq
from qdq.accuracy import widening
from qdq.metrics import sqnr_db
from qdq.nn.width import read_added


@pytest.fixture
def net():
    return Inverted(16).eval()


@pytest.fixture
def images():
    return torch.randn(24, 3, 16, 16)


def split(model, batches, extra_macs, **options):
    return qdq.split_channels(model, batches, extra_macs=extra_macs, include=["*"], **options)


def reason_of(report, layer):
    (reason,) = [path.reason for path in report.paths if path.layers[0] == layer]
    return reason


def count_macs(model, x):
    """Brute force: the weights of each layer times the positions of its output, for one sample."""
    macs = []

    def count(layer, _, output):
        macs.append(layer.weight.numel() * output[0, 0].numel())

    hooks = []
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            hooks.append(layer.register_forward_hook(count))
    model(x[:1])
    for hook in hooks:
        hook.remove()
    return sum(macs)


def quantize(model, batches):
    qdq.swap_modules(model, batches[0], include=["*"])
    qdq.calibrate_model(model, batches, method="max")
    return model


def test_a_wider_path_has_less_noise_and_the_same_float_outputs(net, images):
    fitted, held = images[:16], images[16:]
    expected = net(held).detach().numpy()
    narrow = copy.deepcopy(net)
    split(narrow, [fitted], 0.0)
    assert narrow.expand.out_channels == 16
    before = count_macs(net, images)

    report = split(net, [fitted], 1.5)
    (path, *_) = report.paths
    assert (path.channels, path.free, path.added) == (16, 0, 16)
    assert path.copied[0] == 3
    assert net.expand.out_channels == net.depthwise.groups == net.project.in_channels == 32
    assert report.extra_macs == pytest.approx(count_macs(net, images) / before - 1)
    assert "free 0, added 16" in report.format_table()
    assert f"{100 * report.extra_macs:.1f} % more MACs" in report.format_table()
    assert sqnr_db(expected, net(held).detach().numpy()) > 60

    inputs = torch.randn(8, 3, 16, 16)
    for model in (narrow, net):
        quantize(model, [fitted])
    with qdq.disable_quantization(net):
        reference = net(inputs).detach().numpy()
    gained = sqnr_db(reference, net(inputs).detach().numpy())
    assert gained > sqnr_db(reference, narrow(inputs).detach().numpy()) + 2


def test_the_file_has_the_wider_layers_and_computes_what_torch_does(net, images, tmp_path):
    split(net, [images], 1.5)
    quantize(net, [images])
    exported = qdq.export_onnx(net, images, tmp_path / "net.onnx")
    found = qdq.predict(exported.path, [images])
    assert sqnr_db(net(images).detach().numpy(), found) > 40
    qdq.restore_modules(net)
    assert type(net.expand) is nn.Conv2d and net.expand.out_channels == 32


class TwoBlocks(nn.Module):
    """Two blocks side by side; the loud one has by far more noise."""

    def __init__(self):
        super().__init__()
        self.quiet, self.loud = Inverted(16, 4.0), Inverted(16, 40.0)
        with torch.no_grad():
            self.quiet.project.weight *= 0.3

    def forward(self, x):
        return self.quiet(x) + self.loud(x)


def test_the_width_goes_where_rounding_counts_most(images):
    model = TwoBlocks().eval()
    macs_of_block = count_macs(model, images) / 2
    share = macs_of_block / count_macs(model, images)
    report = split(model, [images], 1.01 * share)  # enough for one of them
    assert model.loud.expand.out_channels == 32
    assert model.quiet.expand.out_channels == 16
    reason = reason_of(report, "quiet.expand")
    assert reason.startswith("no channel is free; 16 more would ")
    assert report.extra_macs <= 1.01 * share


def test_no_width_costs_more_than_its_share(net, images):
    former = copy.deepcopy(net)
    report = split(net, [images], 0.5)  # 16 channels more are as many again
    assert reason_of(report, "expand") == (
        "no channel is free; 16 more would take 100.0 % more MACs, and 50.0 % are left"
    )
    assert report.extra_macs == 0
    assert repr(net) == repr(former)
    for name, values in net.state_dict().items():
        assert torch.equal(values, former.state_dict()[name])


def test_widths_are_multiples_of_16(images):
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 20, 1), nn.Conv2d(20, 6, 1)
            with torch.no_grad():
                self.second.weight[:, [3, 7]] *= 20

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    model = Odd().eval()
    report = split(model, [images], 1.0)
    assert report.paths[0].added == 12
    assert model.first.out_channels == model.second.in_channels == 32


def test_noise_that_hardly_matters_gets_no_width(images):
    """Nearly all of the noise comes from an input that nothing can split."""

    class Drowned(Inverted):
        def __init__(self):
            super().__init__(16)
            self.last = nn.Conv2d(6, 6, 1)
            with torch.no_grad():
                self.project.weight[1:] *= 1e-3
                self.last.weight[:, 0] = 1e-6  # the tensor with the large range and no effect
                self.project.weight[0] *= 100

        def forward(self, x):
            return self.last(super().forward(x))

    model = Drowned().eval()
    report = split(model, [images], 5.0)
    assert reason_of(report, "expand") == (
        "no channel is free; 16 more would lower the noise of the outputs by less than 1 %"
    )


def test_a_layer_that_cannot_be_wider_keeps_its_size(images):
    class Fixed(nn.Conv2d):
        """Computes with the number of channels of its author."""

        def forward(self, x):
            return nn.functional.conv2d(x, self.weight, self.bias, padding=1, groups=16)

    model = Inverted(16).eval()
    fixed = Fixed(16, 16, 3, padding=1, groups=16)
    fixed.load_state_dict(model.depthwise.state_dict())
    model.depthwise = fixed.eval()
    former = copy.deepcopy(model.state_dict())
    report = split(model, [images], 2.0)
    assert reason_of(report, "expand").startswith("no channel is free; 16 more cannot run: ")
    assert repr(model.expand) == repr(nn.Conv2d(3, 16, 1))
    for name, values in model.state_dict().items():
        assert torch.equal(values, former[name])


def test_outputs_whose_number_varies_get_no_width(net, images):
    class Selected(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            scores = self.net(x)
            return scores[scores > 0.5]

    report = split(Selected().eval(), [images], 2.0)
    assert reason_of(report, "net.expand") == (
        "no channel is free; 16 more were not tried: with rounded inputs the number of outputs is another"
    )


@pytest.mark.parametrize("fault", ["an error", "an infinite value"])
def test_a_model_that_rounded_inputs_break_gets_no_width(net, images, fault):
    """The float model is fine, so splitting does not fail."""

    class Fragile(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net
            self.largest = float(net(images).detach().max())

        def forward(self, x):
            scores = self.net(x)
            changed = abs(float(scores.detach().max()) - self.largest) > 1e-5 * abs(self.largest)
            if changed and fault == "an error":
                raise ValueError("no detections")
            return scores / 0.0 if changed else scores

    report = split(Fragile().eval(), [images], 2.0)
    said = {
        "an error": "the model does not run: no detections",
        "an infinite value": "the outputs hold NaN or Inf",
    }
    assert reason_of(report, "net.expand") == (
        f"no channel is free; 16 more were not tried: with rounded inputs {said[fault]}"
    )
    assert net.expand.out_channels == 16


class Chain(nn.Module):
    """The layer in the middle reads one path and writes the next."""

    def __init__(self, channels=16):
        super().__init__()
        self.first, self.middle = nn.Conv2d(3, channels, 1), nn.Conv2d(channels, channels, 3)
        self.last = nn.Conv2d(channels, 4, 1)

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x)))))


@pytest.mark.parametrize("extra_macs", [0.5, 1.0, 2.5, 9.0])
def test_macs_of_a_layer_that_two_paths_widen(images, extra_macs):
    model = Chain().eval()
    before = count_macs(model, images)
    report = split(model, [images], extra_macs)
    added = count_macs(model, images) / before - 1
    assert report.extra_macs == pytest.approx(added)
    assert added <= extra_macs
    if extra_macs == 9.0:
        assert model.middle.in_channels > 16 and model.middle.out_channels > 16


def test_width_that_no_copy_uses_is_taken_back(net, images, monkeypatch):
    """20 channels and 12 added ones; then 16 more, of which 16 must go if few copies stay."""

    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 20, 1), nn.Conv2d(20, 6, 1)

        def forward(self, x):
            return self.second(torch.relu(self.first(x)))

    model = Plain().eval()
    widest = []

    def compare(*_):
        widest.append(model.first.out_channels)
        num_copies = int(model.first.weight[20:].flatten(1).any(1).sum())
        return {"output": 40.0 if num_copies <= 9 else 10.0}

    monkeypatch.setattr("qdq.accuracy.splitting.list_decibels", compare)
    monkeypatch.setattr("qdq.accuracy.widening.LEAST_FLOAT_DB", 30.0)
    monkeypatch.setattr("qdq.accuracy.splitting.LEAST_FLOAT_DB", 30.0)
    report = split(model, [images], 9.0)
    (path, *_) = report.paths
    assert max(widest) > 32
    assert path.added == 12 and 4 < len(path.copied) <= 9
    assert model.first.out_channels == 32


def test_a_width_that_cannot_be_used_is_taken_back(images):
    """A channel of zeros is 0.5 behind this clamp, which a reader without a bias cannot take back, and need not."""

    class Clamped(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 6, 1, bias=False)

        def forward(self, x):
            return self.second(self.first(x).clamp(0.5, 6))

    model = Clamped().eval()
    expected = model(images)
    report = split(model, [images], 5.0)
    (path, *_) = report.paths
    assert path.free == 0
    assert (path.added > 0) is (len(path.copied) > 0)
    assert model.first.out_channels == 16 + path.added
    assert sqnr_db(expected.detach().numpy(), model(images).detach().numpy()) > 60


def test_autograd_and_gradients_of_before(net, images):
    loss = net(images).sum()
    loss.backward()
    split(net, [images], 1.5)
    assert net.expand.out_channels == 32
    net(images).sum().backward()  # `loss` still holds its graph
    assert net.expand.weight.grad.shape == net.expand.weight.shape


def test_ctrl_c_keeps_gradients_and_parameters(net, images, monkeypatch):
    net(images).sum().backward()
    net.project.weight.requires_grad_(False)
    parameters = dict(net.named_parameters())
    monkeypatch.setattr(
        widening, "rank_copies", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    with pytest.raises(KeyboardInterrupt):
        split(net, [images], 1.5)
    assert all(parameters[name] is parameter for name, parameter in net.named_parameters())
    assert net.expand.weight.grad is not None


def test_frozen_parameters_stay_frozen(net, images):
    net.project.weight.requires_grad_(False)
    split(net, [images], 1.5)
    assert not net.project.weight.requires_grad and net.expand.weight.requires_grad


@pytest.mark.parametrize("interrupted", range(4))
def test_ctrl_c_gives_every_layer_its_size_back(net, images, monkeypatch, interrupted):
    former = copy.deepcopy(net)
    numbers = iter(range(100))
    observe = qdq.accuracy.splitting.observe

    def stop(*args, **options):
        if next(numbers) == interrupted + 1:
            raise KeyboardInterrupt
        return observe(*args, **options)

    monkeypatch.setattr("qdq.accuracy.splitting.observe", stop)
    with pytest.raises(KeyboardInterrupt):
        split(net, [images], 1.5)
    assert repr(net) == repr(former)
    for name, values in net.state_dict().items():
        assert torch.equal(values, former.state_dict()[name])


@pytest.mark.parametrize(("allowed", "added"), [(5, 16), (1, 16), (0, 0)])
def test_fewer_copies_if_more_change_the_float_model(net, images, monkeypatch, allowed, added):
    """Without copies the width goes, too."""
    former, parameters = copy.deepcopy(net), dict(net.named_parameters())

    def compare(*_):
        num_copies = int(net.expand.weight[16:].flatten(1).any(1).sum())
        return {"output": 99.0 if num_copies <= allowed else 10.0}

    monkeypatch.setattr("qdq.accuracy.splitting.list_decibels", compare)
    report = split(net, [images], 1.5)
    (path, *_) = report.paths
    assert path.added == added
    assert allowed / 2 < len(path.copied) <= allowed or not allowed
    assert net.expand.out_channels == 16 + added
    if not allowed:
        assert path.reason == "undone: it changed the float outputs, SQNR 10.0 dB"
        assert report.extra_macs == 0
        assert repr(net) == repr(former)
        for name, parameter in net.named_parameters():
            assert parameter is parameters[name]  # an optimizer may hold it


def test_extra_macs_that_are_no_number(net, images):
    for extra_macs in ("0.05", None, True):
        with pytest.raises(qdq.ArgumentTypeError, match="expected a share of the MACs"):
            split(net, [images], extra_macs)


def test_numpy_numbers_are_numbers(net, images):
    assert split(net, [images], np.float32(1.5)).paths[0].added == 16


@pytest.mark.parametrize("extra_macs", [-0.1, float("nan"), float("inf")])
def test_what_is_no_share_is_refused(net, images, extra_macs):
    with pytest.raises(qdq.ArgumentError, match="expected a share of the MACs"):
        split(net, [images], extra_macs)


def test_the_measured_noise_is_that_of_rounding_in_float64(net, images):
    expected = net(images).detach()

    def compare():
        return sqnr_db(expected.numpy(), net(images).detach().numpy())

    measured = widening._measure_noise([net.depthwise, net.project], compare)
    exact = copy.deepcopy(net).double()
    x = images.double()
    reference = exact(x).detach()
    hidden = exact.relu(exact.expand(x))
    step = hidden.abs().max() / 127
    hidden = exact.relu(exact.depthwise((hidden / step).round() * step))
    step = hidden.abs().max() / 127
    output = exact.project((hidden / step).round() * step).detach()
    noise = float((output - reference).square().sum() / reference.square().sum())
    assert measured.ratio == pytest.approx(noise, rel=1e-3)


def test_the_model_comes_back_from_its_file(net, images, tmp_path):
    fresh = copy.deepcopy(net)
    split(net, [images], 1.5)
    quantize(net, [images])
    qdq.save_tuned(net, tmp_path / "net.safetensors")
    quantize(fresh, [images])  # ranges of the former size
    qdq.load_tuned(fresh, tmp_path / "net.safetensors")
    assert read_added(fresh.expand).tolist() == [16, 0]
    assert torch.equal(fresh(images), net(images))
    assert np.isfinite(fresh(images).detach().numpy()).all()


def test_a_wider_layer_in_float_comes_back_from_its_file(net, images, tmp_path):
    fresh = copy.deepcopy(net)
    qdq.split_channels(net, [images], extra_macs=1.5, exclude=["expand"])
    assert net.expand.out_channels == 32
    for model in (net, fresh):
        qdq.swap_modules(model, images, exclude=["expand"])
    qdq.calibrate_model(net, [images], method="max")
    qdq.save_tuned(net, tmp_path / "net.safetensors")
    qdq.load_tuned(fresh, tmp_path / "net.safetensors")
    assert torch.equal(fresh(images), net(images))


def test_loading_in_inference_mode(net, images, tmp_path):
    fresh = copy.deepcopy(net)
    split(net, [images], 1.5)
    quantize(net, [images])
    qdq.save_tuned(net, tmp_path / "net.safetensors")
    qdq.swap_modules(fresh, images, include=["*"])
    with torch.inference_mode():
        qdq.load_tuned(fresh, tmp_path / "net.safetensors")
    fresh(images).sum().backward()
    assert torch.equal(fresh(images), net(images))


def test_a_file_of_another_model_leaves_every_size(net, images, tmp_path):
    other = copy.deepcopy(net)
    split(net, [images], 1.5)
    quantize(net, [images])
    qdq.save_tuned(net, tmp_path / "net.safetensors")
    other.project = nn.Conv2d(16, 7, 1)
    quantize(other, [images])
    former = copy.deepcopy(other)
    with pytest.raises(qdq.ModelError, match="is of another model"):
        qdq.load_tuned(other, tmp_path / "net.safetensors")
    assert other.expand.out_channels == 16
    assert torch.equal(other(images), former(images))
