"""Layers of number systems: they are always called, never replicated, and what cannot become one is said."""

import copy
import pickle

import pytest
import torch
from pretended_device import list_waits, watch
from torch import nn
from torch.nn.utils import parametrize, prune

from qdq import systems
from qdq.errors import StateError
from qdq.swap import switch_fast_paths
from qdq.systems.layer import SystemLayer, convert_layer, restore_layer

WORDS = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))
PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


def make_layer():
    return nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True).eval()


def make_encoder():
    return nn.TransformerEncoder(make_layer(), 2).eval()


def prepare_uint8(model):
    systems.prepare_uint8_training(model, WORDS)
    model.train()(WORDS)
    model.eval()


def binarize(model):
    systems.binarize_model(model, WORDS, float_layers=())


PREPARE = {
    "acoustic": lambda model: systems.prepare_acoustic(model, batches=[WORDS]),
    "UINT8 training": prepare_uint8,
    "binary": binarize,
}


def run_slowly(model, *args, **options):
    """The outputs without the fused kernel of torch."""
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return model(*args, **options)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("prepare", PREPARE.values(), ids=PREPARE)
@pytest.mark.parametrize("make", [make_layer, make_encoder])
@torch.no_grad()
def test_the_fused_kernel_of_transformers_does_not_skip_quantized_layers(prepare, make):
    model = make()
    float_outputs = model(WORDS)
    prepare(model)
    outputs = model(WORDS)
    assert (outputs - float_outputs).abs().max() > 1e-4
    torch.testing.assert_close(outputs, run_slowly(model, WORDS), rtol=0, atol=1e-5)


@torch.no_grad()
def test_padding_makes_no_nested_tensors():
    model = make_encoder()
    PREPARE["acoustic"](model)
    outputs = model(WORDS, src_key_padding_mask=PADDING)
    assert torch.equal(outputs, run_slowly(model, WORDS, src_key_padding_mask=PADDING))


@torch.no_grad()
def test_one_layer_that_is_converted_is_called_and_a_restored_one_is_float_again():
    model = make_layer()
    expected = model(WORDS)
    convert_layer(model.linear1, systems.BinaryWeight("linear1"))
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        assert (twin(WORDS) - expected).abs().max() > 1e-2
        torch.testing.assert_close(twin(WORDS), run_slowly(twin, WORDS), rtol=0, atol=1e-5)
        restore_layer(twin.linear1)
        assert type(twin.linear1) is nn.Linear
        assert not twin.linear1._forward_pre_hooks
        assert torch.equal(twin(WORDS), expected)


@torch.no_grad()
def test_without_quantizers_the_fused_kernel_is_back():
    model = make_encoder()
    settings = [layer.activation_relu_or_gelu for layer in model.layers]
    PREPARE["binary"](model)
    assert not model.use_nested_tensor
    assert not any(layer.activation_relu_or_gelu for layer in model.layers)
    for module in list(model.modules()):
        if isinstance(module, SystemLayer):
            restore_layer(module)
    switch_fast_paths(model)
    assert model.use_nested_tensor
    assert [layer.activation_relu_or_gelu for layer in model.layers] == settings


@pytest.mark.parametrize(
    "layer",
    [
        convert_layer(nn.Linear(4, 4), systems.BinaryWeight("fc")),
        convert_layer(nn.Linear(4, 4), None, systems.BinaryInput("fc")),
        convert_layer(nn.Linear(4, 4), systems.UInt8Weight("fc"), systems.UInt8Activation("fc")),
        systems.UInt8Activation("fc"),
        systems.LinearQuant("fc", 8),
        systems.LogQuant("fc", 8),
    ],
)
def test_replicas_of_data_parallel_are_refused(layer):
    replica = layer._replicate_for_data_parallel()
    with pytest.raises(RuntimeError, match=r"^fc .* in a replica of nn.DataParallel") as refused:
        replica(torch.ones(2, 4))
    assert isinstance(refused.value, StateError)


@pytest.mark.parametrize(
    "quantizer",
    [
        systems.NormalQuant("fc", 8, systems.min_max_quantize),
        systems.AcousticInput(name="fc"),
    ],
)
def test_replicas_record_no_range(quantizer):
    quantizer.is_collecting = True
    with pytest.raises(StateError, match=r"^fc calibrates in a replica of nn.DataParallel"):
        quantizer._replicate_for_data_parallel()(torch.ones(2, 4))
    assert not quantizer.has_range


def test_a_weight_that_is_computed_is_refused_and_never_stays_in_float():
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    with pytest.raises(NotImplementedError, match="no system has a ParametrizedLinear"):
        convert_layer(layer, systems.BinaryWeight("fc"))
    layer = prune.identity(nn.Linear(4, 4), "weight")
    with pytest.raises(NotImplementedError, match="its weight is computed"):
        convert_layer(layer, systems.BinaryWeight("fc"))
    layer = convert_layer(nn.Linear(4, 4), systems.BinaryWeight("fc"))
    parametrize.register_parametrization(layer, "weight", nn.Tanh())
    with pytest.raises(StateError, match="fc: its weight is computed"):
        layer(torch.ones(2, 4))


class Mixed(nn.Module):
    """One layer that all systems have, and some that none has."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.up = nn.ConvTranspose2d(2, 2, 1)
        self.up2 = nn.ConvTranspose2d(2, 2, 1)
        self.deep = nn.ConvTranspose3d(1, 1, 1)
        self.attention = nn.MultiheadAttention(4, 2)
        self.normed = parametrize.register_parametrization(nn.Linear(4, 4), "weight", nn.Tanh())
        self.fc = nn.Linear(4, 4)

    def forward(self, x):
        x = self.deep(self.up2(self.up(self.conv(x)))[:, None])[:, 0, 0]
        return self.fc(self.normed(self.attention(x, x, x)[0]))


LEFT = {
    "up": "no system has a ConvTranspose2d",
    "up2": "no system has a ConvTranspose2d",
    "deep": "no system has a ConvTranspose3d",
    "attention": "no system has a MultiheadAttention",
    "normed": "no system has a ParametrizedLinear",
}


@pytest.mark.parametrize(
    "prepare",
    [
        lambda model, images: systems.prepare_acoustic(model),
        systems.prepare_uint8_training,
    ],
)
def test_layers_that_no_system_has_are_said(prepare, caplog):
    assert prepare(Mixed(), torch.randn(2, 1, 4, 4)) == ["conv", "fc"]
    assert "2 layers stay in float (up, up2): no system has a ConvTranspose2d" in caplog.text
    for name, reason in LEFT.items():
        assert any(name in text and reason in text for text in caplog.messages), name


def test_layers_that_no_system_has_are_in_a_selection():
    selection = systems.select_layers(Mixed(), torch.randn(2, 1, 4, 4), ())
    assert list(selection.layers) == ["conv", "fc"]
    reasons = dict(selection.float_layers)
    assert reasons.pop("attention.out_proj") == "it does not run"
    assert reasons == LEFT


def test_a_model_that_needs_no_words_gets_none(caplog):
    systems.prepare_acoustic(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.PReLU()))
    assert caplog.text == ""


def calibrate(quantizer, values):
    quantizer(values)
    return quantizer.eval()


def record(quantizer, values):
    systems.calibrate_inputs(nn.Sequential(quantizer), [values])
    return quantizer


CALIBRATED = {
    "LinearQuant": lambda x: calibrate(systems.LinearQuant("x", 8, counter=1), x),
    "LinearQuant, 1 bit": lambda x: calibrate(systems.LinearQuant("x", 1, counter=1), x),
    "LogQuant": lambda x: calibrate(systems.LogQuant("x", 8, counter=1), x),
    "NormalQuant": lambda x: record(systems.NormalQuant("x", 8, systems.min_max_quantize), x),
    "AcousticInput": lambda x: record(systems.AcousticInput(name="x"), x),
    "AcousticInput, moving": lambda x: systems.AcousticInput(name="x"),
    "UInt8Activation": lambda x: calibrate(systems.UInt8Activation("x"), x),
    "UInt8Activation, in training": lambda x: calibrate(systems.UInt8Activation("x"), x).train(),
    "BinaryInput": lambda x: systems.BinaryInput("x"),
    "AcousticWeight": lambda x: systems.AcousticWeight(name="x"),
    "UInt8Weight": lambda x: systems.UInt8Weight("x"),
    "BinaryWeight": lambda x: systems.BinaryWeight("x"),
}


@pytest.mark.parametrize("make", CALIBRATED.values(), ids=CALIBRATED)
def test_a_calibrated_quantizer_does_not_wait_for_a_gpu(make, gpu):
    values = torch.randn(4, 50)
    expected = make(values)
    quantizer = copy.deepcopy(expected).to(gpu)
    moved = values.to(gpu)
    quantizer(moved)  # reads what has moved
    with watch(gpu) as events:
        outputs = [quantizer(moved) for _ in range(3)]
    assert list_waits(events) == []
    for _ in range(4):
        result = expected(values)
    torch.testing.assert_close(outputs[-1].cpu(), result)


@pytest.mark.parametrize("make", CALIBRATED.values(), ids=CALIBRATED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_on_a_gpu_nothing_that_is_not_finite_becomes_a_code(make, bad, gpu):
    values = torch.randn(4, 50)
    quantizer = make(values).to(gpu)
    values[1, 3] = bad
    assert torch.isnan(quantizer(values.to(gpu))[1, 3])


def test_a_number_that_changes_is_read_again(gpu):
    """However the buffer changes: in place, by loading, by moving, in a copy."""
    quantizer = systems.LinearQuant("x", 8, sf=3, counter=0).to(gpu)
    values = torch.tensor([0.3], device=gpu)
    assert quantizer(values).item() == 0.25
    with torch.no_grad():
        quantizer._sf.fill_(1)
    assert (quantizer.sf, quantizer(values).item()) == (1, 0.5)
    quantizer.load_state_dict(systems.LinearQuant("x", 8, sf=2, counter=0).state_dict())
    assert (quantizer.sf, quantizer(values).item()) == (2, 0.25)
    twin = copy.deepcopy(quantizer)
    twin._sf.fill_(0)
    assert (twin.sf, quantizer.sf) == (0, 2)
    assert quantizer.cpu().sf == 2


def test_a_quantizer_that_was_made_in_inference_mode_counts_outside():
    with torch.inference_mode():
        quantizer = systems.LinearQuant("x", 8, counter=2)
        quantizer(torch.ones(2))
    quantizer(torch.ones(2))
    assert quantizer.counter == 0
