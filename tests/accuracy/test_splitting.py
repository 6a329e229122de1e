"""Split channels: the float model stays the same, and the rounding of the copied channels counts less."""

import copy

import numpy as np
import pytest
import torch
from inverted_block import Inverted
from torch import nn

import qdq
from qdq.metrics import sqnr_db


def make_block():
    """Channels 5 and 6 carry nothing."""
    block = Inverted(8).eval()
    with torch.no_grad():
        block.depthwise.weight[[5, 6]] = 0.0
        block.depthwise.bias[6] = -1.0
    return block


@pytest.fixture
def net():
    return make_block()


@pytest.fixture
def images():
    return torch.randn(24, 3, 16, 16)


def split(model, batches):
    return qdq.split_channels(model, batches, include=["*"])


def reasons_of(report):
    return {path.layers[0]: path.reason for path in report.paths}


def is_equal(state, former):
    return all(torch.equal(values, former[name]) for name, values in state.items())


def error_with_rounded_inputs(model, images, *names):
    """Mean squared error of the output in float64 if only the inputs of some layers are rounded to int8."""
    model = copy.deepcopy(model).double()
    images = images.double()
    expected = model(images)

    def round_input(_, arguments):
        step = arguments[0].abs().max() / 127
        return ((arguments[0] / step).round() * step,)

    for name in names:
        model.get_submodule(name).register_forward_pre_hook(round_input)
    return float((model(images) - expected).square().mean().detach())


def test_the_loudest_channel_gets_the_free_ones(net, images):
    fitted, held = images[:16], images[16:]
    expected = net(held)
    before = error_with_rounded_inputs(net, held, "depthwise", "project")
    report = split(net, [fitted[:8], fitted[8:]])
    path = report.paths[0]
    assert path.layers == ("expand", "depthwise", "project")
    assert (path.channels, path.free, path.copied) == (8, 2, (3, 3))
    assert report.float_db > 60
    assert sqnr_db(expected.detach().numpy(), net(held).detach().numpy()) > 60
    after = error_with_rounded_inputs(net, held, "depthwise", "project")
    gain_db = 10 * np.log10(before / after)
    assert gain_db > 3
    assert gain_db == pytest.approx(path.predicted_db, abs=1)


@pytest.mark.parametrize("number", [1, 2, 3])
def test_n_copies_round_to_a_step_n_times_as_fine(number):
    """Without padding and clamps, the mean of the copies is what one channel with a finer step would be."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1)).eval()
    free = list(range(1, number))
    with torch.no_grad():
        model[0].weight[1:] *= 1e-2
        model[0].bias[1:] = 0.0
        model[1].weight[:, 1:] *= 1e-2
        model[1].weight[:, free] = 0.0
    images = torch.randn(16, 3, 32, 32)
    before = error_with_rounded_inputs(model, images, "1")
    report = split(model, [images])
    if number == 1:
        assert report.paths[0].reason == "no channel is free"
        return
    assert report.paths[0].copied == (0,) * (number - 1)
    assert before / error_with_rounded_inputs(model, images, "1") == pytest.approx(
        number**2, rel=0.1
    )


def test_int8_gains_and_the_float_model_comes_back(net, images):
    fitted, held = images[:16], images[16:]
    expected = qdq.predict(net, [held])
    plain = copy.deepcopy(net)
    split(net, [fitted])
    decibels = []
    for model in (plain, net):
        qdq.swap_modules(model, fitted[:2], include=["*"])
        qdq.calibrate_model(model, [fitted])
        qdq.round_weights(model, [fitted])
        decibels.append(sqnr_db(expected, qdq.predict(model, [held])))
    assert decibels[1] > decibels[0] + 1
    qdq.restore_modules(net)
    assert sqnr_db(expected, qdq.predict(net, [held])) > 60


def test_the_file_computes_what_torch_does(net, images, tmp_path):
    split(net, [images])
    qdq.swap_modules(net, images[:2], include=["*"])
    qdq.calibrate_model(net, [images])
    exported = qdq.export_onnx(net, images[:2], tmp_path / "net.onnx")
    expected = qdq.predict(net, [images])
    floor_db = qdq.measure_tie_floor(net, [images], expected=expected)
    assert sqnr_db(expected, qdq.predict(exported.path, [images])) > min(floor_db - 3, 60)


def test_a_constant_channel_goes_to_the_last_bias(images):
    """Channel 1 is 2 whatever the input is, so the reader has 2 times its column in the bias."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1)).double().eval()
    with torch.no_grad():
        model[0].weight[1] = 0.0
        model[0].bias[1] = 2.0
    bias = model[2].bias.detach().clone()
    column = model[2].weight[:, 1, 0, 0].detach().clone()
    report = split(model, [images.double()])
    assert report.paths[0].free == 1 and len(report.paths[0].copied) == 1
    torch.testing.assert_close(model[2].bias.detach(), bias + 2 * column)


def test_padding_around_a_constant_keeps_the_channel(images):
    """A padded reader sees 0 at the edge and 2 inside: the channel is not constant for it."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 3, padding=1)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0.0
        model[0].bias[1] = 2.0
    former = copy.deepcopy(model.state_dict())
    assert reasons_of(split(model, [images]))["0"] == "no channel is free"
    assert is_equal(model.state_dict(), former)
    with torch.no_grad():
        model[0].bias[1] = -2.0  # 0 behind the ReLU, as at the edge
    assert split(model, [images]).paths[0].free == 1


def test_a_reader_without_a_bias_takes_no_constant(images):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight[1] = 0.0
        model[0].bias[1] = 2.0
    assert reasons_of(split(model, [images]))["0"] == "no channel is free"


def test_linear_layers_of_tokens():
    model = nn.Sequential(nn.Linear(6, 8), nn.Dropout(), nn.ReLU(), nn.Linear(8, 4)).eval()
    with torch.no_grad():
        model[0].weight[2] = 0.0
    tokens = torch.randn(8, 5, 6)
    expected = model(tokens)
    report = split(model, [tokens])
    assert len(report.paths[0].copied) == 1
    # Half a step of int8 is 1/254 of the largest value, and the shifts cancel but at the ReLU.
    assert sqnr_db(expected.detach().numpy(), model(tokens).detach().numpy()) > 60


class Branches(nn.Module):
    """One path for each reason."""

    def __init__(self):
        super().__init__()
        self.silu = nn.Conv2d(3, 4, 1)
        self.twice = nn.Conv2d(4, 4, 1)
        self.grouped = nn.Conv2d(4, 4, 1, groups=2)
        self.unbiased = nn.Conv2d(4, 4, 1, bias=False)
        self.shared = nn.Conv2d(4, 4, 1)
        self.flat = nn.Conv2d(4, 8, 1)
        self.last = nn.Linear(8, 8)

    def forward(self, x):
        x = nn.functional.silu(self.silu(x))
        x = self.twice(x)
        x = self.grouped(x + x.sigmoid())
        x = self.unbiased(x)
        x = self.shared(self.shared(x))
        return self.last(self.flat(x)) + 1


def test_what_is_left_alone_is_said(images):
    model = Branches().eval()
    former = copy.deepcopy(model.state_dict())
    report = split(model, [images[..., :8]])
    assert reasons_of(report) == {
        "silu": "silu lies between it and the next layer",
        "twice": "2 functions read it",
        "grouped": "grouped has groups, and not one filter for each channel",
        "unbiased": "unbiased has no bias; fold_batchnorm gives it one",
        "shared": "shared runs several times in one forward",
        "flat": "its layers have different channel axes",
        "last": "add lies between it and the next layer",
    }
    assert report.float_db == float("inf")
    assert is_equal(model.state_dict(), former)
    table = report.format_table()
    assert table.startswith("0 of 8 paths have channels split")
    assert "silu lies between it and the next layer" in table


def test_layers_that_stay_float_have_no_rounding(net, images):
    report = qdq.split_channels(net, [images], include=["expand"])
    assert reasons_of(report)["expand"] == "no copy lowers the noise enough"


def test_a_smoothed_input_is_left_alone(net, images):
    qdq.smooth_inputs(net, [images], include=["project"], least_db=-100)
    reason = reasons_of(split(net, [images]))["expand"]
    assert reason == "mul lies between it and the next layer"


@pytest.mark.parametrize("number", [2, 3])
def test_a_centered_input_has_half_of_the_step(number):
    """The copies of a centered channel are a fraction of the step apart that centering leaves."""
    free = list(range(1, number))
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU6(), nn.Conv2d(4, 5, 1)).eval()
    with torch.no_grad():
        model[0].bias[:] = 3.0
        model[0].weight[free] = 0.0
        model[0].weight[3] *= 0.1
        model[2].weight[:, 1:] *= 1e-2
    images = torch.randn(16, 3, 32, 32)
    expected = qdq.predict(model, [images])
    qdq.center_inputs(model, [images], include=["*"])
    before = error_with_rounded_inputs(model, images, "2")
    report = split(model, [images])
    assert report.paths[0].copied == (0,) * (number - 1)
    assert sqnr_db(expected, qdq.predict(model, [images])) > 60
    after = error_with_rounded_inputs(model, images, "2")
    assert before / after == pytest.approx(number**2, rel=0.2)


def test_a_change_of_the_float_model_is_undone(net, images, monkeypatch):
    from qdq.accuracy import splitting

    monkeypatch.setattr(splitting, "LEAST_FLOAT_DB", 1000.0)
    former = copy.deepcopy(net.state_dict())
    report = split(net, [images])
    assert report.paths[0].reason.startswith("undone: it changed the float outputs")
    assert report.float_db == float("inf")
    assert is_equal(net.state_dict(), former)


class TwoPaths(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = make_block(), make_block()
        self.between = nn.Conv2d(6, 3, 1)

    def forward(self, x):
        return self.second(self.between(self.first(x)))


@pytest.fixture
def two_paths():
    return TwoPaths().eval()


def give_decibels(monkeypatch, decibels):
    """Let the comparisons of the float outputs give these figures, and raise what is an exception."""
    from qdq.accuracy import splitting

    figures = iter(decibels)

    def give(*_):
        figure = next(figures)
        if isinstance(figure, float):
            return {"output": figure}
        raise figure

    monkeypatch.setattr(splitting, "list_decibels", give)


def test_a_path_that_changes_too_much_is_undone_and_others_stay(two_paths, images, monkeypatch):
    expected = copy.deepcopy(two_paths)
    give_decibels(monkeypatch, [99.0])
    split(expected, [images])
    former = copy.deepcopy(two_paths.state_dict())
    give_decibels(monkeypatch, [10.0, 11.0, 12.0, 70.0])  # all; two copies, one; the second path
    report = split(two_paths, [images])
    reasons = reasons_of(report)
    assert reasons["first.expand"] == "undone: it changed the float outputs, SQNR 12.0 dB"
    assert reasons["second.expand"] == ""
    assert report.float_db == 70
    assert is_equal(two_paths.first.state_dict(prefix="first."), former)
    second = two_paths.second.state_dict()
    assert is_equal(second, expected.second.state_dict())
    assert not is_equal(second, two_paths.first.state_dict())


@pytest.mark.parametrize("decibels", [[], [10.0], [10.0, 70.0], [10.0, 10.0, 10.0]])
def test_ctrl_c_leaves_the_model_as_it_was(two_paths, images, monkeypatch, decibels):
    give_decibels(monkeypatch, [*decibels, KeyboardInterrupt()])
    former = copy.deepcopy(two_paths.state_dict())
    with pytest.raises(KeyboardInterrupt):
        split(two_paths, [images])
    assert is_equal(two_paths.state_dict(), former)


def test_outputs_that_do_not_count_may_change(net, images):
    class Ranked(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            scores = self.net(x)
            return {"scores": scores, "masked": scores.masked_fill(scores < 0, float("-inf"))}

    model = Ranked().eval()
    with pytest.raises(qdq.StateError):
        split(model, [images])
    report = qdq.split_channels(model, [images], include=["*"], outputs={"scores": "scores"})
    assert report.paths[0].copied == (3, 3)


def test_a_tensor_without_values(net):
    assert split(net, [torch.randn(0, 3, 16, 16), torch.randn(2, 3, 16, 16)]).paths[0].free == 2

    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.other = net, nn.Conv2d(3, 2, 1)

        def forward(self, x):
            self.net(x[:0])
            return self.other(x)

    report = split(Empty().eval(), [torch.randn(2, 3, 16, 16)])
    assert reasons_of(report)["net.expand"] == "its tensors are empty in the batches"


@pytest.mark.parametrize("padding", [(0, 0, 0, 0, 0, 2), (0, 0, 0, 0, 1, 1)])
def test_padding_of_channels_is_no_path(padding, images):
    class Wider(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 4, 1), nn.Conv2d(6, 4, 1)

        def forward(self, x):
            return self.second(nn.functional.pad(self.first(x).relu(), padding))

    reason = reasons_of(split(Wider().eval(), [images]))["first"]
    assert reason == "pad lies between it and the next layer"


def test_an_input_that_calibration_does_not_show_keeps_its_channel():
    """Feature 3 has values of 1e7, and only channel 2 reads it, with a weight of 1e-7."""
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)).eval()
    with torch.no_grad():
        model[0].weight[:, 3] = 0.0
        model[0].weight[2] = torch.tensor([0.0, 0.0, 0.0, 1e-7])
    rows = torch.cat([torch.randn(64, 3), torch.zeros(64, 1)], 1)
    former = copy.deepcopy(model.state_dict())
    assert reasons_of(split(model, [rows]))["0"] == "no channel is free"
    assert is_equal(model.state_dict(), former)


def test_one_loud_channel_does_not_make_the_others_free(images):
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU6(), nn.Conv2d(6, 4, 1)).eval()
    with torch.no_grad():
        model[0].weight[0] *= 3e6
    assert reasons_of(split(model, [images]))["0"] == "no channel is free"


def test_weights_that_cannot_be_written(net, images):
    net.project.bias = nn.Parameter(torch.zeros(1).expand(6))
    assert "project is expanded" in reasons_of(split(net, [images]))["expand"]
    with torch.inference_mode():
        model = make_block()
    assert "inference_mode" in reasons_of(split(model, [images]))["expand"]


def test_a_kernel_that_is_transposed_in_memory(net, images):
    transposed = net.project.weight.detach().permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3)
    net.project.weight = nn.Parameter(transposed)
    assert split(net, [images]).paths[0].copied == (3, 3)


def test_refusals(net, images):
    with pytest.raises(qdq.ArgumentTypeError):
        split(net, images)
    with pytest.raises(qdq.DataError):
        split(net, [])
    with torch.no_grad():
        net.project.bias[0] = float("nan")
    with pytest.raises(qdq.StateError):
        split(net, [images])
    qdq.swap_modules(net, images[:2], include=["*"])
    with pytest.raises(qdq.StateError, match="call split_channels before swap_modules"):
        split(net, [images])


def test_half_precision(images):
    """float16 has the shifts to 60 dB; bfloat16 does not, so the path is undone."""
    model = make_block().half()
    report = split(model, [images.half()])
    assert report.paths[0].copied == (3, 3)
    assert report.float_db > 60
    model = make_block().bfloat16()
    former = copy.deepcopy(model.state_dict())
    reason = reasons_of(split(model, [images.bfloat16()]))["expand"]
    assert reason.startswith("undone: it changed the float outputs")
    assert is_equal(model.state_dict(), former)


def test_a_real_network_gains_on_photographs_that_it_did_not_see():
    """EfficientNet-Lite0: one channel of the first depthwise convolution has most of the noise of its tensor."""
    loaded = qdq.load_model("efficientnet_lite0", image_size=96)
    calibration, evaluation = qdq.load_images(None, loaded, 16, 32, 16, 0)
    model = loaded.module
    qdq.fold_batchnorm(model, calibration.images[:2])
    plain = copy.deepcopy(model)
    expected = qdq.predict(model, evaluation)
    report = qdq.split_channels(model, calibration)
    first = report.paths[0]
    assert first.layers == ("_conv_stem", "_blocks.0._depthwise_conv", "_blocks.0._project_conv")
    assert first.free == 4 and 4 in first.copied
    assert sqnr_db(expected, qdq.predict(model, evaluation)) > 60
    decibels = []
    for net in (plain, model):
        # The input of the first depthwise convolution in int8, and nothing else.
        qdq.swap_modules(net, calibration.images[:2], include=["_blocks.0._depthwise_conv"])
        qdq.calibrate_model(net, calibration)
        net.get_submodule("_blocks.0._depthwise_conv").weight_quantizer.disable()
        decibels.append(sqnr_db(expected, qdq.predict(net, evaluation)))
    assert decibels[1] > decibels[0] + 3
