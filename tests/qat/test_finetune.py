"""Fine-tuning as a user calls it."""

import copy
import math
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

import qdq
from qdq.errors import ArgumentError, ArgumentTypeError, DataError, StateError
from qdq.metrics import sqnr_db
from qdq.qat import Distillation, Schedule, cross_entropy, finetune
from qdq.qat.losses import _find_layers
from qdq.qat.watch import OscillationWatch, find_bad_ranges
from qdq.quantizer import named_quantizers


def make_batches(count=6, size=8, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 12, 12, generator=generator) for _ in range(count)]


FAST = Schedule(steps=30, lr=1e-3)


class Endless(torch.utils.data.IterableDataset):
    """Data without a length."""

    def __iter__(self):
        yield from make_batches(1)[0]


def state_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.fixture
def four_bits(residual, images):
    """The small network with 4-bit weights and inputs."""
    qdq.fold_batchnorm(residual, images)
    narrow = {"input_desc": qdq.QuantDescriptor(4), "weight_desc": qdq.QuantDescriptor(4, axis=0)}
    qdq.swap_modules(residual, images, **narrow)
    qdq.calibrate_model(residual, make_batches(4, seed=3))
    return residual


def test_distillation_brings_the_outputs_nearer_to_the_float_model(four_bits):
    quantized = four_bits
    reference = copy.deepcopy(quantized)
    qdq.restore_modules(reference)
    held = make_batches(2, seed=2)
    expected, before = qdq.predict(reference, held), qdq.predict(quantized, held)
    tuning = finetune(quantized, make_batches(), schedule=Schedule(steps=60, lr=3e-3), held=held)
    after = qdq.predict(quantized, held)
    assert sqnr_db(expected, after) > sqnr_db(expected, before) + 2
    assert tuning.curve[0].metric == pytest.approx(sqnr_db(expected, before))
    assert max(m.metric for m in tuning.curve) == pytest.approx(sqnr_db(expected, after))
    assert len(tuning.losses) == 60
    assert "60 steps" in tuning.format_table()


def test_the_model_is_left_as_it_was_but_for_the_weights(quantized):
    quantized.train()
    quantized.pool.eval()
    quantized.head.weight.requires_grad_(False)
    modes = {name: module.training for name, module in quantized.named_modules()}
    state = torch.get_rng_state()
    ranges = {name: q.amax.clone() for name, q in named_quantizers(quantized)}
    before = state_of(quantized)
    finetune(quantized, make_batches(2), schedule=FAST)
    assert {name: module.training for name, module in quantized.named_modules()} == modes
    assert not quantized.head.weight.requires_grad
    assert quantized.stem.weight.requires_grad
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(q.amax, ranges[name]) for name, q in named_quantizers(quantized))
    assert state_of(quantized).keys() == before.keys()
    assert not torch.equal(quantized.stem.weight, before["stem.weight"])


def test_the_same_seed_gives_the_same_losses(quantized):
    other = copy.deepcopy(quantized)
    data = torch.utils.data.DataLoader(torch.cat(make_batches()), batch_size=8, shuffle=True)
    first, second = (finetune(model, data, schedule=FAST).losses for model in (quantized, other))
    assert first == second
    assert len(set(first)) == len(first)


@pytest.mark.parametrize("method", ["lsq", "pact", "ema"])
def test_ranges_change_where_that_is_asked_for(quantized, method):
    before = {name: q.amax.clone() for name, q in named_quantizers(quantized)}
    schedule = Schedule(steps=20, lr=1e-3, range_lr=1e-2)
    finetune(quantized, [3 * batch for batch in make_batches()], schedule=schedule, ranges=method)
    for name, quantizer in named_quantizers(quantized):
        assert isinstance(quantizer._buffers["_amax"], torch.Tensor)
        assert not list(quantizer.parameters())
        assert quantizer.amax.shape == before[name].shape
        assert (quantizer.amax > 0).all()
        is_weight = name.endswith("_weight_quantizer")
        assert torch.equal(quantizer.amax, before[name]) == (method == "pact" and is_weight), name


def test_training_only_ranges_keeps_the_weights(quantized):
    before = state_of(quantized)
    finetune(
        quantized,
        make_batches(),
        schedule=Schedule(steps=10, range_lr=1e-2),
        ranges="lsq",
        train="ranges",
    )
    changed = {
        name
        for name, tensor in state_of(quantized).items()
        if not torch.equal(tensor, before[name])
    }
    assert changed
    assert all(name.endswith("_amax") for name in changed)


def test_training_named_layers_keeps_the_others(quantized):
    before = state_of(quantized)
    finetune(quantized, make_batches(), schedule=FAST, layers=["head", "stem"])
    changed = {
        name
        for name, tensor in state_of(quantized).items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {"stem.weight", "stem.bias", "head.weight", "head.bias"}


def test_training_only_batchnorm_changes_its_statistics(residual, images):
    qdq.swap_modules(residual, images)
    qdq.calibrate_model(residual, [images])
    before = state_of(residual)
    finetune(residual, make_batches(), schedule=Schedule(steps=4), train="batchnorm")
    changed = {
        name for name, tensor in state_of(residual).items() if not torch.equal(tensor, before[name])
    }
    assert changed == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


def changed_by(model, **options):
    before = state_of(model)
    finetune(
        model,
        [3 * batch for batch in make_batches()],
        schedule=Schedule(steps=4, lr=1e-3),
        **options,
    )
    return {
        name for name, tensor in state_of(model).items() if not torch.equal(tensor, before[name])
    }


@pytest.mark.parametrize("method", ["lsq", "pact", "ema"])
def test_what_is_trained_does_not_change_the_rest(residual, images, method):
    qdq.swap_modules(residual, images)
    qdq.calibrate_model(residual, [images])
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    assert changed_by(copy.deepcopy(residual), ranges=method, train="batchnorm") == statistics
    assert all(
        name.startswith("head.")
        for name in changed_by(copy.deepcopy(residual), ranges=method, layers=["head"])
    )
    if method != "ema":
        changed = changed_by(copy.deepcopy(residual), ranges=method, train="ranges")
        assert changed
        assert all(name.endswith("_amax") for name in changed)


def test_a_parameter_that_is_frozen_stays(quantized):
    quantized.stem.weight.requires_grad_(False)
    changed = changed_by(quantized)
    assert "stem.weight" not in changed
    assert {"stem.bias", "conv.weight"} < changed


def test_live_batchnorm_keeps_its_statistics_after_its_share(residual, images):
    qdq.swap_modules(residual, images)
    qdq.calibrate_model(residual, [images])
    before = int(residual.norm.num_batches_tracked)
    finetune(residual, make_batches(), schedule=Schedule(steps=10, tune_batchnorm=0.3))
    assert int(residual.norm.num_batches_tracked) == before + 3


def test_quantization_grows_layer_by_layer(quantized):
    on = []
    layers = {"stem": quantized.stem, "conv": quantized.conv, "head": quantized.head}

    def look(*_):
        if torch.is_grad_enabled():
            on.append(
                [name for name, layer in layers.items() if not layer._weight_quantizer._disabled]
            )

    quantized.register_forward_pre_hook(look)
    finetune(quantized, make_batches(), schedule=Schedule(steps=8, grow=0.5))
    assert on[0] == ["stem"]
    assert on[-5:] == [["stem", "conv", "head"]] * 5
    assert [len(names) for names in on] == sorted(len(names) for names in on)


def test_quantization_grows_in_the_order_in_which_layers_run():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.middle, self.first = (nn.Linear(32, 32) for _ in range(3))

        def forward(self, x):
            return self.last(self.middle(self.first(x)).relu())

    model, inputs, on = Backwards(), torch.randn(6, 32), []
    qdq.swap_modules(model)
    qdq.calibrate_model(model, [inputs])

    def look(*_):
        if torch.is_grad_enabled():
            on.append(
                {
                    name
                    for name, layer in model.named_children()
                    if not layer._weight_quantizer._disabled
                }
            )

    model.register_forward_pre_hook(look)
    finetune(model, [inputs], schedule=Schedule(steps=3, grow=1.0))
    assert on == [{"first"}, {"first", "middle"}, {"first", "middle", "last"}]


def test_features_are_compared_where_that_is_asked_for(four_bits):
    teacher = copy.deepcopy(four_bits)
    qdq.restore_modules(teacher)
    batches, before = make_batches(), state_of(four_bits)
    with torch.no_grad():
        found, expected = (
            model.stem(batches[0]).double().flatten(1) for model in (four_bits, teacher)
        )
    error = ((found - expected).square().sum(1) / expected.square().sum(1)).mean()
    distillation = Distillation(mse=0, kl=0, features=2, layers=["st*"])
    tuning = finetune(four_bits, batches, distillation=distillation, teacher=teacher, schedule=FAST)
    assert tuning.losses[0] == pytest.approx(2 * float(error), rel=1e-5)
    changed = {
        name
        for name, tensor in state_of(four_bits).items()
        if not torch.equal(tensor, before[name])
    }
    assert changed == {"stem.weight", "stem.bias"}
    with pytest.raises(ArgumentError, match="no module matches the layers"):
        finetune(
            four_bits, make_batches(1), distillation=Distillation(features=1, layers=["nothing"])
        )
    lists = nn.ModuleDict(
        {
            "a": nn.ModuleList([nn.Conv2d(16, 16, 1)]),
            "b": nn.Sequential(nn.Linear(16, 16), nn.ReLU()),
        }
    )
    qdq.swap_modules(lists)
    assert _find_layers(lists, []) == ["a.0", "b.0"]
    blocks = nn.ModuleDict(
        {
            "stage": nn.ModuleList(
                [nn.ModuleList([nn.Conv2d(16, 16, 1)]), nn.Sequential(nn.Conv2d(16, 16, 1))]
            )
        }
    )
    qdq.swap_modules(blocks)
    assert _find_layers(blocks, []) == ["stage.0.0", "stage.1"]
    with pytest.raises(ArgumentError, match="layers have no effect"):
        Distillation(features=0, layers=["stem"])
    with pytest.raises(ArgumentError, match="all weights"):
        Distillation(mse=0, kl=0, features=0)


def test_labels(quantized):
    batches = [(images, torch.arange(8)) for images in make_batches(1)]
    tuning = finetune(
        quantized,
        batches,
        loss=cross_entropy,
        distillation=None,
        schedule=Schedule(steps=60, lr=1e-2),
    )
    assert tuning.losses[-1] < tuning.losses[0] - 0.5


def test_with_labels_the_best_is_what_has_the_smallest_loss(quantized):
    batches = [(images, torch.arange(8)) for images in make_batches(1)]
    held = [
        (images, torch.arange(len(images)))
        for images in (make_batches(1)[0], make_batches(1, 3, seed=2)[0])
    ]
    options = {"loss": cross_entropy, "distillation": None, "schedule": Schedule(steps=60, lr=1e-2)}
    tuning = finetune(quantized, batches, held=held, **options)
    with torch.no_grad():
        losses = [
            float(nn.functional.cross_entropy(quantized(images), labels)) for images, labels in held
        ]
    assert tuning.curve[-1].metric > tuning.curve[0].metric
    assert max(m.metric for m in tuning.curve) == pytest.approx(
        -(8 * losses[0] + 3 * losses[1]) / 11, rel=1e-5
    )
    assert tuning.best_step > 0


def test_early_stop_keeps_the_best(quantized):
    values = iter([1.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    kept = []

    def metric(model):
        kept.append(model.stem.weight.detach().clone())
        return next(values)

    schedule = Schedule(steps=100, lr=1e-3, patience=3)
    tuning = finetune(quantized, make_batches(), metric=metric, measure_every=2, schedule=schedule)
    assert [m.metric for m in tuning.curve] == [1, 5, 4, 3, 2]
    assert tuning.best_step == 2
    assert "3 measurements" in tuning.stopped
    assert torch.equal(quantized.stem.weight, kept[1])


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt])
def test_a_metric_that_fails_leaves_the_best(quantized, kind):
    before, values = state_of(quantized), iter([5.0, 4.0])

    def metric(_):
        if (value := next(values, None)) is None:
            raise kind("not today")
        return value

    with pytest.raises(kind, match="not today"):
        finetune(quantized, make_batches(), metric=metric, measure_every=1, schedule=FAST)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(quantized).items())


def test_nan_stops_with_the_layer_and_keeps_good_weights(quantized):
    batches = make_batches(3)
    calls = []

    class Breaks(nn.Module):
        def forward(self, x):
            calls.append(1)
            return x * math.nan if len(calls) > 8 else x

    quantized.pool = nn.Sequential(quantized.pool, Breaks())
    with pytest.raises(StateError, match=r"loss is nan in step \d; it begins in pool.1") as error:
        finetune(
            quantized,
            batches,
            schedule=FAST,
            distillation=Distillation(),
            teacher=copy.deepcopy(quantized),
        )
    assert "learning rate" in error.value.fix
    assert all(torch.isfinite(p).all() for p in quantized.parameters())


@pytest.mark.parametrize("amp", [False, True])
def test_amp(quantized, amp):
    types = []
    quantized.conv.register_forward_hook(lambda _, __, outputs: types.append(outputs.dtype))
    tuning = finetune(quantized, make_batches(), schedule=Schedule(steps=3), amp=amp)
    assert set(types[:3]) == {torch.bfloat16 if amp else torch.float32}
    assert np.isfinite(tuning.losses).all()
    assert quantized.stem.weight.dtype == torch.float32


def test_weights_in_float16_are_refused(quantized):
    quantized.half()
    with pytest.raises(ArgumentError, match="float16, and Adam would divide by 0"):
        finetune(quantized, [batch.half() for batch in make_batches(1)], schedule=FAST)
    assert all(torch.isfinite(tensor).all() for tensor in quantized.state_dict().values())


@pytest.mark.parametrize("number", [np.float32(1e-3), np.float64(1e-3)])
def test_numbers_of_numpy_are_numbers(quantized, number):
    schedule, distillation = Schedule(steps=2, lr=number), Distillation(mse=number)
    assert (
        len(
            finetune(
                quantized, make_batches(1), schedule=schedule, distillation=distillation
            ).losses
        )
        == 2
    )


def test_each_kind_of_parameter_has_its_own_rate(quantized):
    """The first step of Adam moves each number by its rate, whatever its gradient."""
    before = state_of(quantized)
    amax = quantized.stem.input_quantizer.amax.clone()
    schedule = Schedule(steps=1, lr=1e-4, bias_lr=1e-3, range_lr=1e-2, warm_up=0)
    loss = {"loss": lambda outputs, _: 0.1 * outputs.square().mean(), "distillation": None}
    finetune(quantized, make_batches(1), schedule=schedule, ranges="lsq", **loss)
    for name, rate in (("head.weight", 1e-4), ("head.bias", 1e-3)):
        moved = (quantized.get_parameter(name).detach() - before[name]).abs()
        assert float(moved.max()) == pytest.approx(rate, rel=1e-2)
    assert float((quantized.stem.input_quantizer.amax / amax).log2().abs()) == pytest.approx(
        1e-2, rel=1e-2
    )


@pytest.mark.parametrize("max_norm", [1e-3, 1e9])
def test_the_gradient_is_clipped(quantized, max_norm, monkeypatch):
    norms, step = [], torch.optim.Adam.step

    def look(optimizer, *arguments):
        grads = [
            p.grad
            for group in optimizer.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        norms.append(float(torch.cat([grad.flatten() for grad in grads]).norm()))
        return step(optimizer, *arguments)

    monkeypatch.setattr(torch.optim.Adam, "step", look)
    loss = {"loss": lambda outputs, _: outputs.square().mean(), "distillation": None}
    finetune(quantized, make_batches(1), schedule=Schedule(steps=2, max_norm=max_norm), **loss)
    assert all(
        norm == pytest.approx(1e-3, rel=1e-3) if max_norm < 1 else norm > 1e-2 for norm in norms
    )


def test_ranges_that_quantization_has_not_reached_yet_wait(quantized):
    schedule = Schedule(steps=4, grow=1.0, range_lr=1e-2, tune_ranges=1.0)
    before = quantized.head.input_quantizer.amax.clone()
    options = {"ranges": "lsq", "train": "ranges", "layers": ["head"]}
    assert len(finetune(quantized, make_batches(1), schedule=schedule, **options).losses) == 4
    assert not torch.equal(quantized.head.input_quantizer.amax, before)


def test_a_transformer_with_padding():
    """Its float layers hand on nested tensors in evaluation mode, unless they are told not to."""

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), 2
            )

        def forward(self, x, padding=None):
            return self.layers(x, src_key_padding_mask=padding)

    model, padding = Encoder().eval(), torch.zeros(4, 7, dtype=torch.bool)
    padding[1:, 5:] = True
    batches = [{"x": torch.randn(4, 7, 32), "padding": padding}]
    qdq.swap_modules(model, batches[0])
    qdq.calibrate_model(model, batches)
    assert np.isfinite(finetune(model, batches, schedule=Schedule(steps=2)).losses).all()
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"ranges": "lqs"}, ArgumentError, "unknown range method 'lqs'"),
        ({"train": "scales"}, ArgumentError, "train is 'scales'"),
        ({"train": "ranges"}, ArgumentError, "nothing to train"),
        ({"train": "batchnorm"}, ArgumentError, "nothing to train"),
        ({"layers": ["nothing"]}, ArgumentError, "nothing to train"),
        ({"distillation": None}, ArgumentError, "no loss"),
        ({"seed": -1}, ArgumentError, "seed is -1"),
        ({"seed": "0"}, ArgumentTypeError, "seed is '0'"),
        ({"measure_every": 0}, ArgumentError, "measure_every is 0"),
        ({"measure_every": 1.5}, ArgumentTypeError, "measure_every is 1.5"),
        ({"measure_every": 1}, ArgumentError, "measure_every is given, but there is no metric"),
        ({"loss": "hinge"}, ArgumentError, "loss is 'hinge'"),
        (
            {"loss": cross_entropy, "distillation": None, "teacher": nn.Identity()},
            ArgumentError,
            "no distillation",
        ),
        (
            {"loss": lambda outputs, _: outputs.detach().mean(), "distillation": None},
            ArgumentError,
            "depends on nothing",
        ),
        ({"held": []}, DataError, "no batch to measure on"),
        ({"held": torch.ones(2, 3, 12, 12)}, ArgumentTypeError, "one Tensor"),
        ({"tensorboard": True}, ArgumentError, "needs a folder"),
        ({"loss": lambda outputs, batch: outputs}, ArgumentError, "expected a scalar"),
        ({"batches": torch.ones(2, 3, 12, 12)}, ArgumentTypeError, "one Tensor"),
        ({"batches": []}, ArgumentError, "no batch"),
        ({"batches": iter([]), "schedule": Schedule(steps=2)}, DataError, "no batch"),
        ({"batches": iter([])}, ArgumentError, "no length"),
        ({"batches": torch.utils.data.DataLoader(Endless())}, ArgumentError, "no length"),
    ],
)
def test_bad_input_teaches_and_changes_nothing(quantized, options, error, message):
    before = state_of(quantized)
    with pytest.raises(error, match=message):
        finetune(quantized, **{"batches": make_batches(1), **options})
    after = state_of(quantized)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert quantized.stem.weight.requires_grad


@pytest.mark.parametrize(
    "options",
    [{"steps": 0}, {"epochs": 0}, {"lr": 0.0}, {"lr": math.nan}, {"warm_up": 1.5}, {"patience": 0}],
)
def test_a_schedule_refuses_what_cannot_be_meant(options):
    with pytest.raises(ArgumentError, match=next(iter(options))):
        Schedule(**options)


@pytest.mark.parametrize(
    "options", [{"steps": "3"}, {"steps": 2.5}, {"epochs": True}, {"lr": "1"}, {"grow": None}]
)
def test_a_schedule_takes_numbers(options):
    with pytest.raises(ArgumentTypeError, match=next(iter(options))):
        Schedule(**options)


def test_an_uncalibrated_model_is_refused(residual, images):
    qdq.swap_modules(residual, images)
    with pytest.raises(StateError, match="have no range"):
        finetune(residual, [images])


def test_oscillating_weights_and_bad_ranges_are_reported(quantized):
    quantized.head.input_quantizer.amax = 1e-4
    quantized.conv.input_quantizer.amax = 1e4
    tuning = finetune(quantized, make_batches(), schedule=Schedule(steps=40, lr=3e-2, warm_up=0))
    assert tuning.oscillating
    assert (
        f"{tuning.oscillating[0].layer}: {tuning.oscillating[0].share:.1%} of its weights"
        in tuning.format_table()
    )
    reasons = {each.quantizer: each.reason for each in tuning.bad_ranges}
    assert "are clipped" in reasons["head._input_quantizer"]
    assert reasons["conv._input_quantizer"] == "every code is 0"
    assert "stem._input_quantizer" not in reasons
    assert "head._input_quantizer: " in tuning.format_table()


@pytest.mark.parametrize(("amax", "is_bad"), [(2.99, False), (2.98, True)])
def test_values_less_than_half_a_step_behind_the_end_are_not_clipped(amax, is_bad):
    """Most values of a centered ReLU6 are -3."""
    model = nn.Sequential(nn.Linear(4, 4))
    images = torch.tensor([[-3.0, -3.0, -3.0, 2.0]])
    qdq.swap_modules(model, images, include=["*"])
    qdq.calibrate_model(model, [images])
    model[0].input_quantizer.amax = torch.tensor(amax)
    reasons = [entry.reason for entry in find_bad_ranges(model, images)]
    assert reasons == (["75% of the values are clipped"] if is_bad else [])


def test_ranges_of_weights_are_judged_by_channel(quantized):
    amax = quantized.conv.weight_quantizer.amax
    amax[0] *= 1000
    amax[1] /= 1000
    amax[2:4] *= 20
    with torch.no_grad():
        quantized.stem.weight[5] = 0  # pruned: nothing is lost
    reasons = {
        each.quantizer: each.reason for each in find_bad_ranges(quantized, make_batches(1)[0])
    }
    assert reasons == {
        "conv._weight_quantizer": f"in 1 of {len(amax)} channels 100% of the values are clipped"
    }
    amax[1] *= 1000
    (found,) = find_bad_ranges(quantized, make_batches(1)[0])
    assert found.reason == f"in 1 of {len(amax)} channels every code is 0"
    amax[0] /= 1000
    (found,) = find_bad_ranges(quantized, make_batches(1)[0])
    assert found.reason == f"in 2 of {len(amax)} channels the largest value uses 5.0% of the range"


def test_the_watch_counts_codes_that_turn_back(quantized):
    weight, step = quantized.head.weight, quantized.head.weight_quantizer.scale.flatten()[:, None]
    with torch.no_grad():
        codes = (weight / step).round().clamp(-100, 100)
        weight.copy_(codes * step)
        watch = OscillationWatch(quantized)
        # codes of three filters in turn: the first turns back twice, the second once, the third never
        for offsets in ([1, 1, 1], [0, 2, 2], [1, 1, 3]):
            moved = codes.clone()
            moved[:3] += torch.tensor(offsets)[:, None]
            weight.copy_(moved * step)
            watch.after_step()
    (found,) = watch.find()
    assert found.layer == "head"
    assert found.share == pytest.approx(1 / 16)


class Detector(nn.Module):
    """Gives boxes, and in training mode losses, as torchvision's detectors do."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.drop = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5)
        self.head = nn.Linear(8, 4)

    def forward(self, images, targets=None):
        boxes = self.head(self.drop(self.norm(self.conv(torch.stack(images)))).mean((2, 3)))
        if not self.training:
            return [{"boxes": row} for row in boxes]
        wanted = torch.stack([target["box"] for target in targets])
        return {
            "box": (boxes - wanted).square().mean(),
            "size": boxes.abs().mean(),
            "count": torch.tensor(3),
        }


def make_scenes(count=4):
    images = [list(batch) for batch in make_batches(count, size=3)]
    return [
        (batch, [{"box": image.mean((1, 2)).repeat(2)[:4]} for image in batch]) for batch in images
    ]


def test_a_model_that_gives_its_own_loss():
    torch.manual_seed(0)
    model, scenes = Detector().eval(), make_scenes()
    qdq.swap_modules(model)
    qdq.calibrate_model(model, scenes)
    images, targets = scenes[0]
    with torch.no_grad():
        # Without Dropout, BatchNorm as it is.
        boxes = torch.stack([row["boxes"] for row in model(images)])
    wanted = torch.stack([target["box"] for target in targets])
    first = float((boxes - wanted).square().mean() + boxes.abs().mean())
    schedule = Schedule(steps=40, lr=1e-3, bias_lr=1e-2, tune_batchnorm=0)
    features = Distillation(mse=0, kl=0, layers=["conv"])
    tuning = finetune(
        model, scenes, loss="own", distillation=features, schedule=schedule, held=scenes[:1]
    )
    assert tuning.curve[0].metric == pytest.approx(-first, rel=1e-5)
    assert tuning.losses[0] >= first
    assert tuning.curve[-1].metric > 0.7 * tuning.curve[0].metric
    assert not any(module.training for module in model.modules())
    assert int(model.norm.num_batches_tracked) == 0
    with pytest.raises(ArgumentError, match="returns no outputs to compare"):
        finetune(model, scenes, loss="own", schedule=schedule)


def test_a_detector_of_torchvision_learns_by_its_own_loss():
    detection = pytest.importorskip("torchvision").models.detection
    torch.manual_seed(0)
    model = detection.ssdlite320_mobilenet_v3_large(
        weights=None, weights_backbone=None, num_classes=3
    ).eval()
    target = {
        "boxes": torch.tensor([[8.0, 8, 50, 60], [20, 30, 90, 80]]),
        "labels": torch.tensor([1, 2]),
    }
    batch = [torch.rand(3, 96, 96), torch.rand(3, 96, 80)], [target, target]
    qdq.fold_batchnorm(model, batch)
    qdq.swap_modules(model, batch)
    qdq.calibrate_model(model, [batch])
    schedule = Schedule(steps=4, lr=1e-3, bias_lr=1e-3, warm_up=0)
    tuning = finetune(model, [batch], loss="own", distillation=None, schedule=schedule)
    assert tuning.losses[-1] < tuning.losses[0]
    assert [sorted(boxes) for boxes in model(batch[0])] == [["boxes", "labels", "scores"]] * 2


def test_patience_without_a_metric_is_refused(quantized):
    with pytest.raises(ArgumentError, match="patience waits for a better metric"):
        finetune(quantized, make_batches(1), schedule=Schedule(patience=2))


def test_a_gradient_that_is_nan_names_the_parameter_and_restores_the_best(quantized):
    before = state_of(quantized)
    calls = []

    def breaks(outputs, _):
        calls.append(1)
        return (outputs * 0).sum().sqrt() if len(calls) > 5 else -outputs.square().mean()

    with pytest.raises(StateError, match=r"the gradient of head.weight is NaN or Inf in step 6"):
        finetune(
            quantized,
            make_batches(),
            loss=breaks,
            distillation=None,
            schedule=FAST,
            metric=lambda _: 1.0 - len(calls),
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(quantized).items())


@pytest.mark.parametrize("name", ["stem.bias", "conv.weight", "head.bias"])
def test_the_only_gradient_that_is_inf_is_named(quantized, name):
    parameter = quantized.get_parameter(name)

    def breaks(outputs, _):
        return outputs.mean() + (parameter * 0).sqrt().sum()

    with pytest.raises(StateError, match=f"the gradient of {name} is NaN or Inf in step 1"):
        finetune(quantized, make_batches(1), loss=breaks, distillation=None, schedule=FAST)


@pytest.mark.parametrize("train", ["all", "batchnorm"])
def test_a_batch_with_nan_leaves_the_statistics_of_batchnorm(residual, images, train):
    qdq.swap_modules(residual, images)
    qdq.calibrate_model(residual, [images])
    before = state_of(residual)
    with pytest.raises(
        StateError, match="the loss is nan in step 1; no layer returns it for finite inputs"
    ):
        finetune(residual, [images * math.nan], schedule=FAST, train=train)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(residual).items())


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        (
            [make_batches(1)[0] * math.inf],
            {"ranges": "ema"},
            StateError,
            "stem._input_quantizer received NaN or Inf",
        ),
        (iter(make_batches(2)), {}, DataError, "the batches ran out"),
    ],
)
def test_what_ends_early_leaves_the_best_weights(quantized, batches, options, error, message):
    before = state_of(quantized)

    def loss(outputs, _):  # finite even so
        return (
            sum(p.square().sum() for p in quantized.parameters())
            + 0 * outputs.nan_to_num(0, 0, 0).sum()
        )

    values = iter(range(100, 0, -1))
    with pytest.raises(error, match=message):
        finetune(
            quantized,
            batches,
            loss=loss,
            distillation=None,
            schedule=FAST,
            metric=lambda _: next(values),
            **options,
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(quantized).items())


def test_one_sample_is_too_few_for_live_batchnorm():
    model = nn.Sequential(
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 16)
    ).eval()
    qdq.swap_modules(model)
    qdq.calibrate_model(model, [torch.randn(8, 16)])
    with pytest.raises(DataError, match="step 2: live BatchNorm needs more than one sample"):
        finetune(model, [torch.randn(8, 16), torch.randn(1, 16)], schedule=Schedule(steps=4))


def test_another_teacher_must_have_the_same_modules_and_outputs(quantized):
    other = nn.Sequential(nn.Flatten(), nn.Linear(432, 16))
    with pytest.raises(ArgumentError, match="the teacher has no"):
        finetune(quantized, make_batches(1), teacher=other, schedule=FAST)
    with pytest.raises(
        ArgumentError, match=r"the model gives \[\[8, \d+\]\], but \[\[8, 17\]\] in the teacher"
    ):
        finetune(
            quantized,
            make_batches(1),
            teacher=nn.Sequential(nn.Flatten(), nn.Linear(432, 17)),
            schedule=FAST,
            distillation=Distillation(features=0),
        )


def test_distillation_that_applies_to_nothing_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 16, 3)).eval()
    qdq.swap_modules(model)
    qdq.calibrate_model(model, make_batches(1))
    with pytest.raises(ArgumentError, match="the distillation is 0"):
        finetune(
            model, make_batches(1), distillation=Distillation(mse=0, features=0), schedule=FAST
        )


def test_inference_mode(quantized):
    with torch.inference_mode():
        batches = [batch + 0 for batch in make_batches(1)]
        with pytest.raises(StateError, match="inference_mode"):
            finetune(quantized, batches, schedule=FAST)
    for method in ("frozen", "lsq"):
        assert np.isfinite(
            finetune(quantized, batches, ranges=method, schedule=Schedule(steps=2)).losses
        ).all()


def test_images_without_labels_have_no_cross_entropy(quantized):
    with pytest.raises(DataError, match="no labels"):
        finetune(
            quantized,
            [(make_batches(1)[0], None)],
            loss=cross_entropy,
            distillation=None,
            schedule=FAST,
        )


def test_interrupted_it_leaves_a_whole_model(quantized, tmp_path):
    before = state_of(quantized)
    steps = []

    def interrupt(*_):
        steps.append(torch.is_grad_enabled())
        if sum(steps) > 3:
            raise KeyboardInterrupt

    hook = quantized.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune(quantized, make_batches(), ranges="lsq", schedule=FAST, folder=tmp_path)
    hook.remove()
    assert state_of(quantized).keys() == before.keys()
    assert all(parameter.requires_grad for parameter in quantized.parameters())
    assert not any(quantizer._forward_pre_hooks for _, quantizer in named_quantizers(quantized))
    quantized.load_state_dict(before)
    assert (
        len(
            finetune(quantized, make_batches(), ranges="lsq", schedule=FAST, folder=tmp_path).losses
        )
        == 30
    )


def test_a_model_without_ranges_is_trained_on_request(residual):
    labelled = [(images, torch.arange(8)) for images in make_batches()]
    options = {"loss": cross_entropy, "distillation": None, "schedule": FAST}
    before = state_of(residual)
    with pytest.raises(ArgumentError, match="no enabled quantizer"):
        finetune(residual, labelled, **options)
    tuning = finetune(residual, labelled, ranges="none", **options)
    assert tuning.losses[-1] < tuning.losses[0]
    assert (tuning.oscillating, tuning.bad_ranges) == ((), ())
    assert any(not torch.equal(state_of(residual)[name], before[name]) for name in before)


def test_another_optimizer_takes_the_steps_of_its_formula():
    """SGD with momentum and decay, v = m v + g + d w and w = w - r v, in float64."""
    torch.manual_seed(0)
    layer, inputs = nn.Linear(4, 2, bias=False), torch.randn(8, 4)
    weight = layer.weight.detach().double()
    images = inputs.double()
    finetune(
        layer,
        [inputs],
        loss=lambda outputs, _: outputs.square().mean(),
        distillation=None,
        ranges="none",
        schedule=Schedule(steps=5, lr=0.1, warm_up=0, max_norm=1e9),
        optimizer=partial(torch.optim.SGD, momentum=0.9, weight_decay=0.01),
    )
    velocity = torch.zeros_like(weight)
    for step in range(5):
        gradient = (images @ weight.T).T @ images * 2 / 16
        velocity = 0.9 * velocity + gradient + 0.01 * weight
        weight = weight - 0.1 * (1 + math.cos(math.pi * step / 5)) / 2 * velocity
    torch.testing.assert_close(layer.weight.detach().double(), weight, rtol=1e-5, atol=1e-6)


def test_a_run_with_another_optimizer_resumes_with_its_momentum(tmp_path, monkeypatch):
    monkeypatch.setattr("qdq.qat.record._SAVE_SECONDS", -1.0)
    calls = []

    def fail_in_step_4(outputs, _):
        calls.append(outputs)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return outputs.square().mean()

    def run(folder, momentum=0.9):
        torch.manual_seed(0)
        return finetune(
            nn.Linear(4, 2),
            [torch.randn(8, 4)],
            loss=fail_in_step_4,
            distillation=None,
            ranges="none",
            schedule=Schedule(steps=6, lr=0.1),
            optimizer=partial(torch.optim.SGD, momentum=momentum),
            folder=folder,
        ).losses

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "stopped")
    assert run(tmp_path / "stopped") == run(tmp_path / "whole")
    with pytest.raises(ArgumentError, match="other settings: optimizer"):
        run(tmp_path / "whole", momentum=0.5)
