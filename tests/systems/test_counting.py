"""`LinearQuant` and `LogQuant`: counting, their state, and what they refuse."""

import copy
import io

import pytest
import torch

from qdq.systems import LinearQuant, LogQuant

both = pytest.mark.parametrize("kind", [LinearQuant, LogQuant])


def calibrate(kind=LinearQuant, batches=((0.3, -0.9), (2.5, 0.1))):
    quantizer = kind("conv_quant", 8, counter=len(batches))
    for batch in batches:
        quantizer(torch.tensor(batch))
    return quantizer


@both
def test_counts_forward_calls_in_training_and_evaluation(kind):
    quantizer = kind("conv_quant", 8, counter=2)
    values = torch.randn(7, 3)
    assert quantizer.train()(values) is values
    assert type(quantizer.counter) is int and quantizer.counter == 1
    assert quantizer.eval()(values) is values
    assert quantizer.counter == 0
    assert not torch.equal(quantizer(values), values)


def test_sf_is_the_smallest_of_all_batches():
    assert calibrate().sf == 8 - 1 - 2
    assert calibrate(batches=((2.5,), (0.3,))).sf == 8 - 1 - 2
    assert calibrate(batches=((0.3,), (0.1,))).sf == 8 - 1 + 1


def test_a_given_sf_takes_part():
    quantizer = LinearQuant("conv_quant", 8, sf=3, counter=1)
    quantizer(torch.tensor([0.1]))
    assert quantizer.sf == 3
    assert LinearQuant("conv_quant", 8, sf=3, counter=0)(torch.tensor([0.3])).tolist() == [0.25]


@both
def test_not_calibrated(kind):
    quantizer = kind("conv_quant", 8, counter=0)
    for call in (lambda: quantizer(torch.ones(2)), lambda: quantizer.describe(None)):
        with pytest.raises(RuntimeError, match="conv_quant is not calibrated: sf is None"):
            call()
    assert f"{kind.__name__}(sf=None, bits=8, overflow_rate=0.000, counter=0)" == repr(quantizer)


@both
def test_state_is_saved_and_loaded(kind):
    quantizer = calibrate(kind)
    file = io.BytesIO()
    torch.save(quantizer.state_dict(), file)
    file.seek(0)
    loaded = kind("conv_quant", 8)
    loaded.load_state_dict(torch.load(file, weights_only=True))
    for twin in (loaded, copy.deepcopy(quantizer)):
        assert (twin.sf, twin.counter) == (quantizer.sf, 0)
        values = torch.randn(20)
        assert torch.equal(twin(values), quantizer(values))


@both
def test_state_survives_other_types(kind):
    quantizer = calibrate(kind)
    sf = quantizer.sf
    assert quantizer.half().sf == sf and quantizer.double().sf == sf


@both
def test_on_a_device(kind, device):
    quantizer = kind("conv_quant", 8, counter=1).to(device)
    values = torch.randn(50)
    quantizer(values.to(device))
    assert {buffer.device.type for buffer in quantizer.buffers()} == {device.type}
    expected = calibrate(kind, (values.tolist(),))(values)
    torch.testing.assert_close(quantizer(values.to(device)).cpu(), expected)


@both
def test_replicas_are_refused(kind):
    quantizer = kind("conv_quant", 8, counter=1)
    replica = quantizer._replicate_for_data_parallel()
    with pytest.raises(
        RuntimeError, match=r"conv_quant calibrates in a replica of nn.DataParallel"
    ):
        replica(torch.ones(2))
    # A calibrated one counts nothing.
    quantizer(torch.ones(2))
    assert quantizer._replicate_for_data_parallel()(torch.ones(2)).tolist() == [1.0, 1.0]


@both
def test_several_processes_are_refused(kind, monkeypatch):
    monkeypatch.setattr("qdq.systems.quantizer.find_rank", lambda: (0, 2))
    with pytest.raises(RuntimeError, match="calibrates in 2 processes"):
        kind("conv_quant", 8, counter=1)(torch.ones(2))


@both
def test_gradient_passes(kind):
    quantizer = calibrate(kind)
    values = torch.tensor([0.3, 100.0], requires_grad=True)
    quantizer(values).sum().backward()
    assert values.grad.tolist() == [1.0, 1.0]


@both
def test_in_inference_mode(kind):
    quantizer = kind("conv_quant", 8, counter=1)
    with torch.inference_mode():
        quantizer(torch.ones(2))
        quantizer(torch.ones(2))
    assert quantizer.counter == 0


def test_zeros_raise_nothing_in_log():
    quantizer = LogQuant("conv_quant", 8, counter=2)
    quantizer(torch.zeros(3))
    quantizer(torch.tensor([0.0, 1e-3]))
    assert quantizer(torch.tensor([0.0, 1e-3]))[0] == 0


@pytest.mark.parametrize("bits", [2, 8, 16])
def test_grid(bits):
    quantizer = LinearQuant("conv_quant", bits, sf=4, counter=0)
    grid = quantizer.describe(None)
    assert grid.scale.item() == 2.0**-4
    assert (grid.lowest, grid.highest) == (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    assert grid.obstacle == ("16 bits" if bits == 16 else "")


def test_grid_of_one_bit():
    quantizer = LinearQuant("conv_quant", 1, sf=0, counter=0)
    grid = quantizer.describe(torch.tensor([0.5, -1.0]))
    assert (grid.scale.item(), grid.lowest, grid.highest, grid.obstacle) == (0.75, -1, 1, "")
    assert quantizer.describe(None).obstacle == "its range is recomputed for every batch"


def test_grid_of_log():
    assert "exponentials" in calibrate(LogQuant).describe(None).obstacle


@both
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0}, "bits is 0"),
        ({"sf": 0.5}, "sf is 0.5"),
        ({"overflow_rate": 1.0}, "overflow_rate is 1.0"),
        ({"counter": -1}, "counter is -1"),
        ({"counter": 1.5}, "counter is 1.5"),
    ],
)
def test_settings_that_are_refused(kind, settings, message):
    with pytest.raises(ValueError, match=f"conv_quant: {message}"):
        kind("conv_quant", **({"bits": 8} | settings))


@both
def test_values_that_are_refused(kind):
    quantizer = kind("conv_quant", 8)
    quantizer.path = "features.0_linear_quant"
    with pytest.raises(ValueError, match=r"features.0_linear_quant: 1 of 2 values are not finite"):
        quantizer(torch.tensor([1.0, float("nan")]))
    with pytest.raises(TypeError, match=r"features.0_linear_quant: .*torch.int64"):
        quantizer(torch.tensor([1]))
    assert (quantizer.counter, quantizer.sf) == (10, None)


def test_sf_can_be_set():
    quantizer = LinearQuant("conv_quant", 8, counter=0)
    quantizer.sf = 2
    assert quantizer(torch.tensor([0.3])).tolist() == [0.25]
    assert int(quantizer.state_dict()["_sf"]) == 2
    quantizer.sf = None
    with pytest.raises(RuntimeError, match="not calibrated"):
        quantizer(torch.tensor([0.3]))
    for sf in (0.5, "a"):
        with pytest.raises(ValueError, match="conv_quant: sf is"):
            quantizer.sf = sf
