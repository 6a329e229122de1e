import copy

import pytest
import torch
from pretended_device import list_waits, watch
from torch import nn

from qdq import calibrate_model, fold_batchnorm, swap_modules


def randomize(model):
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(0, 0.5)
            module.running_var.uniform_(0.3, 2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.5, 2)
                nn.init.normal_(module.bias)
    return model.eval()


def check(model, x, folded):
    """Every BatchNorm says what became of it, and the outputs are those of before."""
    model = randomize(model)
    with torch.no_grad():
        expected = model(x)
    pairs = fold_batchnorm(model, x)
    with torch.no_grad():
        folded_output = model(x)
    torch.testing.assert_close(folded_output, expected, rtol=1e-4, atol=1e-5)
    assert [pair.folded for pair in pairs] == folded, pairs
    remaining = sum(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in model.modules())
    assert remaining == len(set(map(id, [p for p in pairs if not p.folded])))
    return pairs


LAYERS = [
    (lambda: nn.Sequential(nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8)), (2, 3, 9)),
    (lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)), (2, 3, 9, 9)),
    (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.BatchNorm2d(8, affine=False)),
        (2, 4, 9, 9),
    ),
    (lambda: nn.Sequential(nn.Conv3d(3, 4, 2), nn.BatchNorm3d(4)), (2, 3, 4, 4, 4)),
    (lambda: nn.Sequential(nn.ConvTranspose2d(6, 4, 3, groups=2), nn.BatchNorm2d(4)), (2, 6, 5, 5)),
    (lambda: nn.Sequential(nn.ConvTranspose1d(3, 4, 3, bias=False), nn.BatchNorm1d(4)), (2, 3, 5)),
    (lambda: nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)), (5, 3)),
]


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_every_kind_of_layer(build, shape):
    check(build(), torch.randn(shape), [True])


def test_names_do_not_matter():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.zebra = nn.BatchNorm2d(4)  # declared before the convolution it follows
            self.apple = nn.Conv2d(3, 4, 1)

        def forward(self, x):
            return self.zebra(self.apple(x))

    (pair,) = check(Model(), torch.randn(2, 3, 4, 4), [True])
    assert (pair.batchnorm, pair.layer) == ("zebra", "apple")


def test_order_of_declaration_does_not_matter():
    class Model(nn.Module):  # looks like conv, norm; runs norm, conv
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.conv(self.norm(x))

    check(Model(), torch.randn(2, 3, 4, 4), [False])


def read_twice(self, x):
    y = self.conv(x)
    return self.norm(y) + y


def changed_between(self, x):
    return self.norm(self.conv(x).relu_())


def used_twice(self, x):
    return self.norm(self.conv(self.norm(self.conv(x))))


def returned_too(self, x):
    y = self.conv(x)
    return torch.cat([self.norm(y), y])


def never(self, x):
    return self.conv(x)


def functional_reader(self, x):
    y = self.conv(x)
    return self.norm(y) * torch.sigmoid(y).mean()


@pytest.mark.parametrize(
    "forward", [read_twice, changed_between, used_twice, returned_too, never, functional_reader]
)
def test_left_alone_where_folding_would_change_something(forward):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)

    Model.forward = forward
    (pair,) = check(Model(), torch.randn(2, 3, 4, 4), [False])
    assert pair.reason


def test_output_returned_in_a_tuple_is_seen():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return {"norm": self.norm(y), "raw": [y]}

    (pair,) = fold_batchnorm(Model().eval(), torch.randn(2, 3, 4, 4))
    assert not pair.folded


def test_weight_standardization_is_noticed(caplog):
    class StdConv(nn.Conv2d):
        def forward(self, x):
            weight = self.weight / self.weight.std((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(x, weight, self.bias)

    (pair,) = check(
        nn.Sequential(StdConv(3, 4, 3), nn.BatchNorm2d(4)), torch.randn(2, 3, 9, 9), [False]
    )
    assert "own way" in pair.reason
    assert "1 BatchNorm stay" in caplog.text


def test_linear_over_a_sequence_is_not_confused():
    # BatchNorm1d normalises dimension 1, the sequence, which happens to be as long as the features
    check(nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8)), torch.randn(2, 8, 3), [False])


def test_frozen_batchnorm_of_detectors():
    ops = pytest.importorskip("torchvision.ops", reason="needs the extra 'demo'")
    model = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), ops.FrozenBatchNorm2d(4))
    for buffer in (model[1].running_mean, model[1].bias, model[1].weight):
        buffer.normal_()
    model[1].running_var.uniform_(0.5, 2)
    x = torch.randn(2, 3, 4, 4)
    expected = model(x)
    (pair,) = fold_batchnorm(model, x)
    assert pair.folded
    assert isinstance(model[1], nn.Identity)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


class Frozen(nn.Module):
    """A frozen BatchNorm written out, which says its epsilon nowhere, as the one of DETR in transformers."""

    def __init__(self, channels, eps=1e-5):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, 0.01 * torch.rand(channels))
        self._numbers = (eps,)

    def forward(self, x):
        buffers = (self.weight, self.bias, self.running_mean, self.running_var)
        weight, bias, mean, variance = (buffer.reshape(1, -1, 1, 1) for buffer in buffers)
        return (x - mean) * weight * (variance + self._numbers[0]).rsqrt() + bias


@pytest.mark.parametrize(("eps", "folds"), [(1e-5, True), (1e-2, False)])
def test_frozen_batchnorm_that_does_not_say_its_epsilon(eps, folds):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), Frozen(8, eps)).eval()
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    (pair,) = fold_batchnorm(model, x)
    assert pair.folded == folds
    assert folds or "folding changes its output" in pair.reason
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


def test_instance_norm_is_no_batchnorm():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
    ).eval()
    assert fold_batchnorm(model, torch.randn(2, 3, 4, 4)) == []


def test_uninformative_example_does_not_hide_it():
    class StdConv(nn.Conv2d):
        def forward(self, x):
            weight = self.weight / self.weight.std((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(x, weight, self.bias)

    model = randomize(nn.Sequential(StdConv(3, 4, 3), nn.BatchNorm2d(4)))
    (pair,) = fold_batchnorm(model, torch.zeros(1, 3, 9, 9))
    assert not pair.folded


@pytest.mark.parametrize(
    "wrap", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm]
)
def test_computed_weights_stay(wrap):
    (pair,) = check(
        nn.Sequential(wrap(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)), torch.randn(2, 3, 4, 4), [False]
    )
    assert "computed" in pair.reason


def test_layer_called_by_keyword():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.conv(input=x))

    check(Model(), torch.randn(2, 3, 4, 4), [True])


@pytest.mark.parametrize(("axis", "folds"), [(0, True), (-4, True), (None, False), (1, False)])
def test_after_swapping_the_weight_must_have_a_range_for_each_output(axis, folds):
    from qdq import QuantDescriptor, swap_modules

    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16)).eval()
    swap_modules(model, weight_desc=QuantDescriptor(axis=axis))
    (pair,) = fold_batchnorm(model, torch.randn(2, 3, 4, 4))
    assert pair.folded == folds
    assert folds or "before swap_modules" in pair.reason


def test_hooks_keep_their_layer_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model[0].register_forward_hook(lambda *_: None)
    (pair,) = check(model, torch.randn(2, 3, 4, 4), [False])
    assert "hooks" in pair.reason


def test_training_flags_and_requires_grad_survive():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    fold_batchnorm(model, torch.randn(2, 3, 4, 4))
    assert model.training
    assert model[0].training
    assert not model[1].training
    assert not model[0].weight.requires_grad


def test_real_network(lite0):
    model = copy.deepcopy(lite0.module)
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        expected = model(x)
        pairs = fold_batchnorm(model, x)
        folded_output = model(x)
    assert len(pairs) == 49
    assert all(pair.folded for pair in pairs)
    assert (expected - folded_output).abs().max() <= 1e-4 * expected.abs().max()


class NormAct(nn.BatchNorm2d):
    """As timm writes it: a BatchNorm with the activation behind it."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), nn.ReLU()

    def forward(self, x):
        return self.act(self.drop(super().forward(x)))


class NormSquare(NormAct):
    def forward(self, x):
        return super().forward(x).square()


@pytest.mark.parametrize(("norm", "folded"), [(NormAct, True), (NormSquare, False)])
def test_batchnorm_with_an_activation(norm, folded):
    model, x = (
        nn.Sequential(nn.Conv2d(3, 16, 3), norm(16), nn.Conv2d(16, 16, 3)),
        torch.randn(2, 3, 8, 8),
    )
    model(10 * x + 3)
    model.eval()
    expected = model(x)
    (pair,) = fold_batchnorm(model, x)
    assert pair.folded == folded
    torch.testing.assert_close(model(x), expected)
    assert isinstance(dict(model.named_modules())["1.act"], nn.ReLU)


@pytest.mark.parametrize(("build", "shape"), LAYERS)
def test_gpu_folds_as_the_cpu_does(build, shape, gpu):
    expected, inputs = randomize(build()), torch.randn(shape)
    model = copy.deepcopy(expected).to(gpu)
    fold_batchnorm(expected, inputs)
    with watch(gpu) as events:
        (pair,) = fold_batchnorm(model, inputs)
    assert pair.folded
    assert len(list_waits(events)) <= 1, list_waits(events)
    for name, parameter in model.named_parameters():
        assert parameter.device == gpu
        torch.testing.assert_close(parameter.cpu(), expected.get_parameter(name))


def test_the_fold_is_checked_without_tf32(monkeypatch):
    class Watching(nn.Conv2d):
        def forward(self, x):
            settings.append(torch.backends.cudnn.allow_tf32)
            return super().forward(x)

    settings = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    model = nn.Sequential(Watching(3, 4, 3), nn.BatchNorm2d(4)).eval()
    (pair,) = fold_batchnorm(model, torch.randn(2, 3, 9, 9))
    assert pair.folded
    assert settings[0]  # the first forward records the pairs; its numbers do not matter
    assert not any(settings[1:])
    assert len(settings) == 4
    assert torch.backends.cudnn.allow_tf32


def test_gpu_notices_weight_standardization(gpu):
    class StdConv(nn.Conv2d):
        def forward(self, x):
            weight = self.weight / self.weight.std((1, 2, 3), keepdim=True)
            return nn.functional.conv2d(x, weight, self.bias)

    model = randomize(nn.Sequential(StdConv(3, 4, 3), nn.BatchNorm2d(4))).to(gpu)
    (pair,) = fold_batchnorm(model, torch.randn(2, 3, 9, 9))
    assert "own way" in pair.reason


def test_gpu_scales_the_ranges_of_a_quantized_layer(gpu):
    images = torch.randn(2, 3, 9, 9)
    expected = randomize(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU()))
    swap_modules(expected)
    calibrate_model(expected, [images], method="max")
    model = copy.deepcopy(expected).to(gpu)
    fold_batchnorm(expected, images)
    with watch(gpu) as events:
        fold_batchnorm(model, images)
    assert len(list_waits(events)) <= 2, list_waits(events)
    amax = model[0].weight_quantizer.amax
    assert amax.device == gpu
    torch.testing.assert_close(amax.cpu(), expected[0].weight_quantizer.amax)
