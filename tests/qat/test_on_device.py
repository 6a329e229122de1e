"""Fine-tuning on a GPU: the losses of the CPU, one wait a step, and files that either device reads."""

import copy
import math

import pytest
import torch
from pretended_device import list_waits, watch
from torch import nn
from torch.utils._pytree import tree_map_only

import qdq
from qdq.errors import DataError, StateError
from qdq.qat import Distillation, Schedule, cross_entropy, finetune, load_tuned
from qdq.qat.checkpoint import pack_random, unpack_random
from qdq.qat.losses import Objective
from qdq.qat.ranges import describe_ranges
from qdq.qat.trainer import Trainer, copy_float
from qdq.qat.watch import OscillationWatch, find_bad_ranges
from qdq.quantizer import named_quantizers

CPU = torch.device("cpu")
LABELS = {"loss": cross_entropy, "distillation": None}
FAST = Schedule(steps=5, lr=1e-3)


@pytest.fixture
def exact(monkeypatch):
    """Training without TF32, so that the losses of the devices can be compared."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def make_batches(count=3, seed=1):
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        images = torch.randn(4, 3, 12, 12, generator=generator)
        batches.append((images, torch.arange(4)))
    return batches


def tune(model, device, **options):
    """The losses of a copy of the model on a device, and the copy."""
    options = {"schedule": FAST} | options
    tuned = copy.deepcopy(model).to(device)
    return finetune(tuned, make_batches(), **options), tuned


def assert_all_on(model, device):
    ranges = [quantizer.amax for _, quantizer in named_quantizers(model)]
    tensors = [*model.state_dict().values(), *[amax for amax in ranges if amax is not None]]
    assert {tensor.device for tensor in tensors} == {device}


@pytest.mark.parametrize(
    ("ranges", "task"),
    [("frozen", {}), ("lsq", LABELS), ("lsq", {}), ("pact", LABELS), ("ema", LABELS)],
)
def test_the_losses_are_those_of_the_cpu(quantized, gpu, exact, ranges, task):
    expected, on_cpu = tune(quantized, CPU, ranges=ranges, **task)
    tuning, tuned = tune(quantized, gpu, ranges=ranges, **task)
    again, _ = tune(quantized, gpu, ranges=ranges, **task)
    assert tuning.losses == again.losses
    assert tuning.losses == pytest.approx(expected.losses, rel=1e-3)
    assert_all_on(tuned, gpu)
    for name, tensor in on_cpu.state_dict().items():
        assert torch.allclose(tuned.state_dict()[name].cpu(), tensor, rtol=1e-2, atol=1e-3), name


def test_bfloat16_where_torch_uses_it(quantized, gpu):
    expected, _ = tune(quantized, CPU, amp=True, ranges="lsq")
    tuning, tuned = tune(quantized, gpu, amp=True, ranges="lsq")
    assert tuning.losses == pytest.approx(expected.losses, rel=0.1)
    assert tuned.stem.weight.dtype == torch.float32


@pytest.mark.parametrize("train", ["all", "batchnorm"])
def test_live_batchnorm(residual, images, gpu, exact, train):
    qdq.swap_modules(residual, images)
    qdq.calibrate_model(residual, [images])
    expected, on_cpu = tune(residual, CPU, train=train)
    tuning, tuned = tune(residual, gpu, train=train)
    assert tuning.losses == pytest.approx(expected.losses, rel=1e-3)
    mean = tuned.norm.running_mean.cpu()
    assert torch.allclose(mean, on_cpu.norm.running_mean, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(mean, residual.norm.running_mean)


class Stopping:
    """Batches that end with Ctrl-C."""

    def __init__(self, number):
        self.number = number

    def __iter__(self):
        for number, batch in enumerate(make_batches()):
            if number == self.number:
                raise KeyboardInterrupt
            yield batch


@pytest.mark.parametrize("begins_on_gpu", [True, False])
def test_a_run_resumes_on_the_other_device(quantized, gpu, exact, tmp_path, begins_on_gpu):
    first, second = (gpu, CPU) if begins_on_gpu else (CPU, gpu)
    options = {"ranges": "lsq", "held": make_batches(1, seed=2), "schedule": FAST}
    whole, _ = tune(quantized, second, **options)
    begun = copy.deepcopy(quantized).to(first)
    with pytest.raises(KeyboardInterrupt):
        finetune(begun, Stopping(2), folder=tmp_path, **options)
    state = {"folder": tmp_path, **options}
    resumed, tuned = tune(quantized, second, **state)
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-3)
    assert len(resumed.curve) == len(whole.curve)
    assert_all_on(tuned, second)
    read, _ = tune(quantized, first, **state)
    assert read.losses == resumed.losses

    loaded = copy.deepcopy(quantized).to(gpu)
    load_tuned(loaded, tmp_path / "last.safetensors")
    assert_all_on(loaded, gpu)
    load_tuned(loaded, tmp_path / "best.safetensors")
    images = make_batches(1)[0][0]
    expected = qdq.predict(tuned, [images])
    assert qdq.predict(loaded, [images]) == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_model_of_a_gpu_resumes_there_with_the_same_losses(quantized, gpu, tmp_path):
    whole, _ = tune(quantized, gpu, ranges="lsq")
    begun = copy.deepcopy(quantized).to(gpu)
    with pytest.raises(KeyboardInterrupt):
        finetune(begun, Stopping(2), ranges="lsq", schedule=FAST, folder=tmp_path)
    resumed, _ = tune(quantized, gpu, ranges="lsq", folder=tmp_path)
    assert resumed.losses == whole.losses


def test_held_out_batches_are_measured_without_tf32(quantized, gpu):
    held = make_batches(1, seed=2)
    for task in (LABELS, {}):
        expected, _ = tune(quantized, CPU, held=held, **task)
        tuning, _ = tune(quantized, gpu, held=held, **task)
        assert tuning.curve[0].metric == pytest.approx(expected.curve[0].metric, rel=1e-4)

    is_allowed = []

    def loss(outputs, batch):
        is_allowed.append(torch.backends.cudnn.allow_tf32)
        return cross_entropy(outputs, batch)

    tune(quantized, gpu, loss=loss, held=held, measure_every=5)
    assert is_allowed == [False, *[True] * 5, False]


class TwoInputs(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, images, shift):
        return self.layer(images + shift)


STEPS = {
    "frozen": {},
    "lsq": {"ranges": "lsq"},
    "pact": {"ranges": "pact"},
    "ema": {"ranges": "ema"},
    "distillation": {"distillation": Distillation()},
    "amp": {"ranges": "lsq", "amp": True, "distillation": Distillation()},
    "clip": {"schedule": Schedule(max_norm=1e-3)},
    "grow": {"schedule": Schedule(grow=0.9), "distillation": Distillation()},
    "batchnorm": {"train": "batchnorm"},
    "several inputs": {"distillation": Distillation(), "loss": None},
}


@pytest.mark.parametrize("case", STEPS)
def test_a_step_waits_once(residual, images, gpu, case):
    """The host reads loss, gradient norm and the largest values together, to refuse NaN; it waits for nothing else."""
    qdq.swap_modules(residual, images)
    qdq.calibrate_model(residual, [images])
    options = dict(STEPS[case])
    model = residual.to(gpu)
    batches = make_batches()
    if case == "several inputs":
        model = TwoInputs(model)
        batches = [({"images": images, "shift": torch.ones(1)}, 0) for images, _ in batches]
    distillation = options.pop("distillation", None)
    teacher = copy_float(model) if distillation else None
    objective = Objective(model, teacher, options.pop("loss", cross_entropy), distillation)
    schedule = options.pop("schedule", Schedule())
    trainer = Trainer(model, objective, schedule, 8, **options)
    waits = []
    for number in range(8):  # in the last two the weights are watched
        with watch(gpu) as events:
            trainer.run_step(batches[number % 3])
        waits.append(list_waits(events))
    trainer.finish()
    assert [len(lines) <= 1 for lines in waits] == [True] * 8, waits


def test_the_findings_wait_once(quantized, gpu):
    watched = OscillationWatch(quantized)
    on_gpu = copy.deepcopy(quantized).to(gpu)
    watched_on_gpu = OscillationWatch(on_gpu)
    for factor in (1.1, 1 / 1.1, 1.1):
        for model, watching in ((quantized, watched), (on_gpu, watched_on_gpu)):
            with torch.no_grad():
                model.stem.weight.mul_(factor)
            watching.after_step()
    with watch(gpu) as events:
        oscillations = watched_on_gpu.find()
    assert len(list_waits(events)) == 1, list_waits(events)
    assert oscillations == watched.find() != ()

    quantized.stem._input_quantizer.amax.fill_(1e-3)
    quantized.head._weight_quantizer.amax.fill_(1e3)
    images = make_batches(1)[0][0]
    expected = find_bad_ranges(quantized, images)
    on_gpu = copy.deepcopy(quantized).to(gpu)
    images = images.to(gpu)
    with watch(gpu) as events:
        bad_ranges = find_bad_ranges(on_gpu, images)
    assert len(list_waits(events)) == 1, list_waits(events)
    assert [bad_range.quantizer for bad_range in bad_ranges] == [
        bad_range.quantizer for bad_range in expected
    ]
    assert len(expected) == 2

    with watch(gpu) as events:
        ranges = describe_ranges(on_gpu)
    assert len(list_waits(events)) == 1
    assert ranges == describe_ranges(quantized)


@pytest.mark.parametrize("ranges", ["frozen", "ema"])
def test_nan_ends_the_run(quantized, gpu, ranges):
    batches = make_batches()
    batches[1][0][0] = math.nan
    model = copy.deepcopy(quantized).to(gpu)

    def loss(outputs, batch):
        broken = batch[0].flatten(1).sum(1)  # the operators of a GPU clip NaN in the inputs
        return cross_entropy(outputs + broken[:, None] * 0, batch)

    with pytest.raises(StateError, match="the loss is nan in step 2"):
        finetune(model, batches, loss=loss, distillation=None, ranges=ranges, schedule=FAST)


def test_a_loss_with_a_constant_of_the_cpu(quantized, gpu):
    weights = torch.ones(16)

    def loss(outputs, _):
        return (outputs * weights).mean()

    with pytest.raises(
        DataError, match="the loss function gets tensors of another device"
    ) as error:
        tune(quantized, gpu, loss=loss, distillation=None)
    assert "device=outputs.device" in error.value.fix


def test_nan_in_a_value_that_a_range_follows(quantized, gpu):
    batches = make_batches()
    batches[1][0][0] = math.nan
    model = copy.deepcopy(quantized).to(gpu)
    before = quantized.stem._input_quantizer.amax.clone()

    def loss(outputs, _):
        return outputs.nan_to_num().square().mean()

    with pytest.raises(StateError, match=r"stem\._input_quantizer received NaN or Inf"):
        finetune(model, batches, loss=loss, distillation=None, ranges="ema", schedule=FAST)
    after = model.stem._input_quantizer.amax.cpu()
    assert torch.isfinite(after).all()
    assert not torch.equal(after, before)


def test_inference_tensors_are_copied(quantized, gpu):
    model = copy.deepcopy(quantized).to(gpu)
    with torch.inference_mode():
        batches = make_batches()
        batches += tree_map_only(torch.Tensor, lambda tensor: tensor.to(gpu), batches)
    assert len(finetune(model, batches, schedule=FAST, **LABELS).losses) == 5


class Generators:
    """The random state of several GPUs, as in `torch.cuda`."""

    def __init__(self, monkeypatch):
        self.states = {index: torch.tensor([index]) for index in range(2)}
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_rng_state", self.get)
        monkeypatch.setattr(torch.cuda, "set_rng_state", self.set)

    def get(self, device="cuda"):
        return self.states[torch.device(device).index].clone()

    def set(self, state, device="cuda"):
        self.states[torch.device(device).index] = state


def test_random_numbers_are_those_of_the_device_of_the_model(monkeypatch):
    generators = Generators(monkeypatch)
    packed = pack_random(torch.device("cuda", 1))
    generators.states = {0: torch.tensor([7]), 1: torch.tensor([8])}
    unpack_random(packed, torch.device("cuda", 1))
    assert generators.states == {0: torch.tensor([7]), 1: torch.tensor([1])}
    unpack_random(packed, CPU)  # resumed on the CPU
    unpack_random(pack_random(CPU), torch.device("cuda", 1))  # and the other way round
    assert generators.states == {0: torch.tensor([7]), 1: torch.tensor([1])}


def test_a_run_on_the_cpu_touches_no_gpu(quantized, monkeypatch, tmp_path):
    def refuse(*_, **__):
        raise AssertionError("a GPU was used")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rng_state", "set_rng_state", "current_device", "_lazy_init"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    tune(quantized, CPU, held=make_batches(1), folder=tmp_path)
