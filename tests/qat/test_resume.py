"""Runs that are killed, shared among processes, or read by another one."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import Linear
from tuned_run import Noisy, make_images, make_model, run

import qdq
import qdq.qat.record
from qdq.errors import ArgumentError, DataError, ModelError, StateError
from qdq.quantizer import SharedQuantizer, named_quantizers

SCRIPT = Path(__file__).with_name("tuned_run.py")


def test_killed_anywhere_and_resumed_gives_the_same_losses_and_weights(tmp_path, processes):
    whole = run(tmp_path / "whole")
    assert any(share for _, share in whole["oscillating"])
    # in the first epoch, at its end, and after the ranges are no longer learned (16 of 20 steps)
    for die_at in (3, 2, 12):
        process = processes.start(SCRIPT, tmp_path / "killed", tmp_path / "none", die_at)
        assert process.wait() == -signal.SIGKILL
    resumed = run(tmp_path / "killed")
    assert resumed == whole
    assert json.loads((tmp_path / "killed" / "tuning.json").read_text())["losses"] == list(
        whole["losses"]
    )
    again = run(tmp_path / "killed")  # finished: read, not run
    assert again == whole


def test_two_processes_give_what_one_gives(tmp_path, processes):
    alone = run(None, bits=8)
    pair = processes.start_pair([[SCRIPT, "-", tmp_path / "shared.json"]] * 2, tmp_path / "store")
    assert [process.wait() for process in pair] == [0, 0]
    shared = json.loads((tmp_path / "shared.json").read_text())
    assert shared["losses"] == pytest.approx(alone["losses"], abs=1e-4)
    start_weights = make_model(8).state_dict()
    assert (
        max(
            float((torch.tensor(w) - start_weights[n]).abs().max())
            for n, w in alone["weights"].items()
        )
        > 1e-3
    )
    for name, weight in alone["weights"].items():
        assert torch.allclose(
            torch.tensor(shared["weights"][name]), torch.tensor(weight), atol=1e-4, rtol=1e-3
        ), name


def test_another_process_reads_the_model_with_its_float_layers(tmp_path):
    model = make_model()
    model[2]._input_quantizer.disable()
    model[2]._weight_quantizer.disable()
    qdq.finetune(
        model, [make_images(8, 6)], schedule=qdq.Schedule(steps=3, lr=1e-3), folder=tmp_path
    )
    fresh = make_model()
    for _, quantizer in named_quantizers(fresh):
        quantizer._buffers.pop("_amax")  # it need not be calibrated
    facts = qdq.load_tuned(fresh, tmp_path / "last.safetensors")
    assert facts == {"step": 3}
    images = make_images(4, 9)
    assert torch.equal(fresh(images), model(images))
    assert [q._disabled for _, q in named_quantizers(fresh)] == [
        q._disabled for _, q in named_quantizers(model)
    ]


def test_a_folder_of_another_run_is_refused(tmp_path):
    qdq.finetune(make_model(), [make_images(8, 6)], schedule=qdq.Schedule(steps=2), folder=tmp_path)
    with pytest.raises(ArgumentError, match="other settings: schedule, steps"):
        qdq.finetune(
            make_model(), [make_images(8, 6)], schedule=qdq.Schedule(steps=3), folder=tmp_path
        )
    with pytest.raises(ArgumentError, match="other settings: layers"):
        qdq.finetune(
            make_model(),
            [make_images(8, 6)],
            schedule=qdq.Schedule(steps=2),
            folder=tmp_path,
            layers=["0"],
        )
    with pytest.raises(ArgumentError, match="other settings: data"):
        qdq.finetune(
            make_model(), [make_images(8, 8)], schedule=qdq.Schedule(steps=2), folder=tmp_path
        )
    other = make_model()
    with torch.no_grad():
        other[0].weight.mul_(2)
    with pytest.raises(ArgumentError, match="other settings: weights"):
        qdq.finetune(other, [make_images(8, 6)], schedule=qdq.Schedule(steps=2), folder=tmp_path)


def test_a_folder_of_a_run_that_trained_other_batchnorms_is_refused(tmp_path):
    def tune(layers):
        torch.manual_seed(0)
        layer, norm = torch.nn.Conv2d, torch.nn.BatchNorm2d
        model = torch.nn.Sequential(layer(3, 16, 3), norm(16), layer(16, 16, 3), norm(16)).eval()
        qdq.swap_modules(model)
        qdq.calibrate_model(model, [make_images(8, 5)])
        options = {"schedule": qdq.Schedule(steps=2), "folder": tmp_path}
        qdq.finetune(model, [make_images(8, 6)], train="batchnorm", layers=layers, **options)

    tune(["1"])
    tune(["1"])
    with pytest.raises(ArgumentError, match=r"other settings: layers[.]"):
        tune(["3"])


def mean_square(outputs, _):
    return outputs.square().mean()


def minus_mean_square(outputs, _):
    return -outputs.square().mean()


def test_a_folder_of_a_run_with_other_ranges_teacher_loss_or_metric_is_refused(tmp_path):
    def tune(model=None, **options):
        model, options = model or make_model(), {"loss": mean_square, **options}
        return qdq.finetune(
            model, [make_images(8, 6)], schedule=qdq.Schedule(steps=2), folder=tmp_path, **options
        ).losses

    first = tune(distillation=qdq.Distillation(layers=[lambda name, _: name == "2"]))
    again = tune(distillation=qdq.Distillation(layers=[lambda name, _: name == "2"]))
    assert again == first
    recalibrated, teacher = make_model(), make_model()
    recalibrated[0].input_quantizer.amax *= 0.5
    distillation = qdq.Distillation(layers=[lambda name, _: name == "2"])
    for changed, options in {
        "weights": {"model": recalibrated},
        "teacher": {"teacher": teacher},
        "loss": {"loss": minus_mean_square},
        "metric": {"metric": lambda _: 1.0},
        "distillation": {"distillation": qdq.Distillation(layers=["2"])},
    }.items():
        with pytest.raises(ArgumentError, match=f"other settings: {changed}[.]"):
            tune(**{"distillation": distillation, **options})


def test_a_folder_of_a_run_with_other_labels_or_held_batches_is_refused(tmp_path):
    labelled = [(make_images(8, 6), torch.arange(8))]

    def tune(batches=labelled, seed=0, **options):
        options = {"loss": qdq.cross_entropy, "held": labelled, **options}
        qdq.finetune(
            make_model(),
            batches,
            schedule=qdq.Schedule(steps=2),
            folder=tmp_path,
            seed=seed,
            **options,
        )

    tune()
    for changed, options in {
        "data": {"batches": [(labelled[0][0], labelled[0][1].flip(0))]},
        "held": {"held": [(labelled[0][0], labelled[0][1].flip(0))]},
        "measure_every": {"measure_every": 2},
    }.items():
        with pytest.raises(ArgumentError, match=f"other settings: {changed}[.]"):
            tune(**options)
    with pytest.raises(ArgumentError, match=r"other settings: .*held[.]"):
        tune(held=None)


def test_held_batches_that_are_drawn_at_random_are_those_of_the_seed():
    def tune(state):
        model, held = make_model(), torch.utils.data.DataLoader(Noisy(), batch_size=8, shuffle=True)
        torch.manual_seed(state)
        return qdq.finetune(
            model, [make_images(8, 6)], schedule=qdq.Schedule(steps=2), held=held
        ).curve

    assert tune(1) == tune(2)


@pytest.mark.parametrize("replaced_by", [None, torch.nn.Linear(16, 16)])
def test_a_best_model_that_is_gone_or_of_another_run_changes_nothing(tmp_path, replaced_by):
    options = {
        "batches": [make_images(8, 6)],
        "schedule": qdq.Schedule(steps=2, lr=1e-3),
        "folder": tmp_path,
    }
    qdq.finetune(make_model(), held=[make_images(8, 7)], **options)
    (tmp_path / "best.safetensors").unlink()
    if replaced_by is not None:
        other = build(replaced_by)
        qdq.calibrate_model(other, [torch.randn(4, 16)])
        qdq.save_tuned(other, tmp_path / "best.safetensors")
    model, before = make_model(), make_model().state_dict()
    with pytest.raises(
        DataError if replaced_by is None else ModelError, match=r"best\.safetensors"
    ):
        qdq.finetune(model, held=[make_images(8, 7)], **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_full_disk_leaves_the_best_model(tmp_path, monkeypatch):
    def full(*_):
        raise ArgumentError("cannot write: No space left on device.", "make room.")

    model, before, values = make_model(), make_model().state_dict(), iter([5.0, 4.0, 3.0, 2.0])

    def metric(_):
        if (value := next(values)) == 3:
            monkeypatch.setattr(qdq.qat.record, "save_tensors", full)
            monkeypatch.setattr(qdq.qat.record, "_SAVE_SECONDS", -1.0)
        return value

    with pytest.raises(ArgumentError, match="No space left"):
        qdq.finetune(
            model,
            [make_images(8, 6)],
            schedule=qdq.Schedule(steps=9, lr=1e-3),
            metric=metric,
            measure_every=1,
            folder=tmp_path,
        )
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("content", [b"", b"no tensors", b"\x00" * 100])
def test_damaged_files_teach(tmp_path, content):
    (tmp_path / "state.safetensors").write_bytes(content)
    with pytest.raises(DataError, match="cannot read") as error:
        qdq.finetune(
            make_model(), [make_images(8, 6)], schedule=qdq.Schedule(steps=2), folder=tmp_path
        )
    assert "remove the file to start again" in error.value.fix
    with pytest.raises(DataError, match="cannot read"):
        qdq.load_tuned(make_model(), tmp_path / "state.safetensors")


def test_any_flipped_bit_of_a_checkpoint_is_noticed(tmp_path):
    path = qdq.save_tuned(
        make_model(), tmp_path / "model.safetensors", {"step": 3, "metric": float("nan")}
    )
    content, model = path.read_bytes(), make_model()
    random = np.random.default_rng(0)
    for place in random.choice(len(content), 60, replace=False):
        damaged = bytearray(content)
        damaged[place] ^= 1 << random.integers(8)
        path.write_bytes(damaged)
        with pytest.raises(DataError):
            qdq.load_tuned(model, path)
    path.write_bytes(content)
    assert qdq.load_tuned(model, path)["step"] == 3


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    path = qdq.save_tuned(make_model(), tmp_path / "model.safetensors")
    other = torch.nn.Sequential(*list(make_model())[:-1])
    with pytest.raises(
        ModelError, match=r"another model: 5\.bias is \[10\] there, absent here"
    ) as error:
        qdq.load_tuned(other, path)
    assert "swap" in error.value.fix
    qdq.finetune(
        make_model(), [make_images(8, 6)], schedule=qdq.Schedule(steps=2), folder=tmp_path / "run"
    )
    with pytest.raises(DataError, match="not a 'qdq fine-tuned model 2' file"):
        qdq.load_tuned(make_model(), tmp_path / "run" / "state.safetensors")


def interrupt_at(model, step):
    """Ctrl-C in the forward of a step, counted from 1."""
    steps = []

    def interrupt(*_):
        steps.append(torch.is_grad_enabled())
        if sum(steps) == step:
            raise KeyboardInterrupt

    return model.register_forward_pre_hook(interrupt)


def test_ranges_that_follow_go_on_following_after_a_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(qdq.qat.record, "_SAVE_SECONDS", -1.0)
    batches = [(1.0 + seed) * make_images(8, seed) for seed in range(3)]
    options = {"ranges": "ema", "schedule": qdq.Schedule(steps=9, lr=1e-3)}
    whole, resumed = make_model(8), make_model(8)
    expected = qdq.finetune(whole, batches, **options).losses
    interrupt_at(resumed, 4)
    with pytest.raises(KeyboardInterrupt):
        qdq.finetune(resumed, batches, folder=tmp_path, **options)
    resumed = make_model(8)
    assert qdq.finetune(resumed, batches, folder=tmp_path, **options).losses == expected
    for (name, found), (_, truth) in zip(
        named_quantizers(resumed), named_quantizers(whole), strict=True
    ):
        assert torch.equal(found.amax, truth.amax), name


def build(layer, **options):
    model = torch.nn.Sequential(layer).eval()
    qdq.swap_modules(model, **options)
    return model


@pytest.mark.parametrize(
    ("layer", "options", "message"),
    [
        (
            Linear(16, 32, bias=False),
            {"weight_desc": qdq.QuantDescriptor(4, axis=0)},
            "is .8, False, False, 0.",
        ),
        (
            Linear(16, 32, bias=False),
            {"weight_desc": qdq.QuantDescriptor(8)},
            "0, .* there, .8, False, False, None",
        ),
        (Linear(32, 16, bias=False), {}, r"0.weight is \[32, 16\] there, \[16, 32\] here"),
        (Linear(16, 32), {}, "0.bias is absent there"),
        (torch.nn.Identity(), {}, "0._input_quantizer is .* there, absent here"),
    ],
)
def test_a_checkpoint_with_other_formats_or_shapes_changes_nothing(
    tmp_path, layer, options, message
):
    source = build(Linear(16, 32, bias=False))
    qdq.calibrate_model(source, [torch.randn(4, 16)])
    path = qdq.save_tuned(source, tmp_path / "model.safetensors")
    model = build(layer, **options)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ModelError, match=message):
        qdq.load_tuned(model, path)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("ranges", ["frozen", "lsq"])
@pytest.mark.parametrize("measured", [True, False])
def test_ctrl_c_loses_no_step(tmp_path, ranges, measured):
    loader = torch.utils.data.DataLoader(Noisy(), batch_size=8, shuffle=True)
    held = [make_images(4, 9)] if measured else None
    options = {"ranges": ranges, "schedule": qdq.Schedule(steps=9, lr=1e-3), "held": held}
    whole = make_model()
    expected = qdq.finetune(whole, loader, **options)
    interrupted = make_model()
    interrupt_at(interrupted, 7)
    with pytest.raises(KeyboardInterrupt):
        qdq.finetune(interrupted, loader, folder=tmp_path, **options)
    last = make_model()
    assert qdq.load_tuned(last, tmp_path / "last.safetensors") == {"step": 6}
    resumed, batches = make_model(), []
    resumed.register_forward_pre_hook(lambda *_: batches.append(torch.is_grad_enabled()))
    found = qdq.finetune(resumed, loader, folder=tmp_path, **options)
    assert sum(batches) == 3
    assert (found.losses, found.curve) == (expected.losses, expected.curve)
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in resumed.state_dict().items())


def test_a_loss_that_is_nan_leaves_the_last_good_model_in_the_folder(tmp_path):
    model, calls = make_model(), []

    def breaks(outputs, _):
        calls.append(1)
        return outputs.square().mean() * (float("nan") if len(calls) > 4 else 1)

    options = {"loss": breaks, "distillation": None, "schedule": qdq.Schedule(steps=9, lr=1e-3)}
    with pytest.raises(StateError, match="in step 5"):
        qdq.finetune(model, [make_images(8, 6)], folder=tmp_path, **options)
    loaded = make_model()
    assert qdq.load_tuned(loaded, tmp_path / "last.safetensors") == {"step": 4}
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in loaded.state_dict().items())
    assert (tmp_path / "state.safetensors").is_file()


def test_measuring_draws_no_random_number_and_no_gradient_stays():
    def tune(metric, held):
        torch.manual_seed(3)
        model, loader = (
            make_model(),
            torch.utils.data.DataLoader(Noisy(), batch_size=8, shuffle=True),
        )
        before = torch.get_rng_state()
        losses = qdq.finetune(
            model, loader, schedule=qdq.Schedule(steps=7), metric=metric, held=held
        ).losses
        assert torch.equal(torch.get_rng_state(), before)
        assert all(parameter.grad is None for parameter in model.parameters())
        return losses

    held = torch.utils.data.DataLoader(Noisy(), batch_size=8, shuffle=True)
    assert tune(None, None) == tune(None, held) == tune(lambda _: float(torch.rand(())), None)


class Branches(torch.nn.Module):
    """Two layers that read one tensor, and share its range once rewired."""

    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Conv2d(16, 16, 3, padding=1) for _ in range(2))

    def forward(self, x):
        return self.a(x).relu() + self.b(x)


def test_a_model_with_shared_ranges_is_saved_and_read(tmp_path):
    images = torch.randn(4, 16, 8, 8)
    models = [Branches().eval() for _ in range(3)]
    for model in models:
        qdq.swap_modules(model)
    for model in models[:2]:
        qdq.rewire_operations(model, images)
    qdq.calibrate_model(models[0], [images])
    assert any(
        isinstance(quantizer, SharedQuantizer) for _, quantizer in named_quantizers(models[0])
    )
    qdq.finetune(models[0], [images], schedule=qdq.Schedule(steps=2), folder=tmp_path)
    qdq.load_tuned(models[1], tmp_path / "last.safetensors")
    assert torch.equal(models[1](images), models[0](images))
    with pytest.raises(ModelError, match=r"_add_quantizer is .* there, absent here"):
        qdq.load_tuned(models[2], tmp_path / "last.safetensors")
