"""Passes that help on held-out samples stay, the others are undone; the steps say what each was worth."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

import qdq
from qdq import recover
from qdq.corrections import list_passes
from qdq.judge import Judge
from qdq.recover import EFFORTS, FITTED_SAMPLES


@pytest.fixture
def samples() -> torch.Tensor:
    return torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net(samples: torch.Tensor) -> nn.Module:
    """A calibrated net whose weights have a mean error: its third channel is rounded coarsely."""
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * 36, 5),
    ).eval()  # fmt: skip
    return model


def _calibrate(model: nn.Module, samples: torch.Tensor) -> None:
    qdq.swap_modules(model, samples[:2])
    qdq.calibrate_model(model, [samples])
    with torch.no_grad():  # a coarse range of the weights: biases can take its mean error away
        for module in model.modules():
            if isinstance(module, qdq.TensorQuantizer) and module.axis is not None:
                module.amax = module.amax * 12


def _state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in model.state_dict().items()}


def test_a_pass_that_helps_stays_and_is_fitted_to_all_samples(
    net: nn.Module, samples: torch.Tensor
) -> None:
    judge = Judge(net, [samples[:32]])
    _calibrate(net, samples)
    judge.measure("calibrated", net)
    by_hand = copy.deepcopy(net)
    steps = qdq.recover_accuracy(net, [samples[32:]], judge, refit=[samples])
    qdq.correct_bias(by_hand, [samples])

    calibrated, corrected = steps.steps
    assert corrected.sqnr_db > calibrated.sqnr_db + 0.05
    assert not corrected.is_undone
    assert steps.notes == (
        "The passes that stay were then fitted to all calibration samples: correct_bias",
    )
    for name, values in by_hand.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], values, rtol=0, atol=0)


def test_a_pass_that_does_not_help_is_undone(net: nn.Module, samples: torch.Tensor) -> None:
    judge = Judge(net, [samples[:32]])
    _calibrate(net, samples)
    judge.measure("calibrated", net)
    before = _state(net)
    # Fitted to data of another kind: what it learns does not hold for the held-out samples.
    steps = qdq.recover_accuracy(net, [3 * samples[32:].abs() + 5], judge, refit=[samples])

    assert steps.steps[-1].is_undone
    assert list_passes(net) == []
    assert steps.notes == ()
    after = net.state_dict()
    assert all(torch.equal(after[name], values) for name, values in before.items())


def test_what_cannot_be_fitted_is_left_out_and_said(net: nn.Module, samples: torch.Tensor) -> None:
    judge = Judge(net, [samples[:32]])
    _calibrate(net, samples)
    judge.measure("calibrated", net)
    ragged = [samples[32:48], samples[48:, :, :, :7]]
    steps = qdq.recover_accuracy(net, ragged, judge)

    assert len(steps.steps) == 1
    (note,) = steps.notes
    assert note.startswith("correct_bias was left out: ")


def test_balanced_rounds_weights_too(net: nn.Module, samples: torch.Tensor) -> None:
    judge = Judge(net, [samples[:32]])
    _calibrate(net, samples)
    judge.measure("calibrated", net)
    steps = qdq.recover_accuracy(net, [samples[32:]], judge, effort="balanced")

    assert [step.name for step in steps.steps[1:]] == [
        "weights rounded for their outputs",
        "biases corrected",
    ]
    kept = [step for step in steps.steps if not step.is_undone]
    assert judge.measure("again", net).sqnr_db == pytest.approx(kept[-1].sqnr_db, abs=1e-6)


def test_the_last_fit_has_the_options_of_the_pass(net: nn.Module, samples: torch.Tensor) -> None:
    judge = Judge(net, [samples[:32]])
    _calibrate(net, samples)
    by_hand, reference = copy.deepcopy(net), copy.deepcopy(net)
    with torch.no_grad():
        next(reference.parameters()).mul_(1.1)
    qdq.round_weights(net, [samples[32:]], reference=reference)
    judge.measure("rounded", net)
    qdq.recover_accuracy(net, [samples[32:]], judge, refit=[samples])
    qdq.round_weights(by_hand, [samples], reference=reference)
    if len(list_passes(net)) == 2:
        qdq.correct_bias(by_hand, [samples])

    for name, values in by_hand.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], values, rtol=0, atol=0)


def test_refit_passes_fits_to_all_samples_what_was_judged_without_some(
    net: nn.Module, samples: torch.Tensor
) -> None:
    judge = Judge(net, [samples[:32]])
    _calibrate(net, samples)
    judge.measure("calibrated", net)
    at_once = copy.deepcopy(net)
    qdq.recover_accuracy(at_once, [samples[32:]], judge.copy(), refit=[samples])
    steps = qdq.recover_accuracy(net, [samples[32:]], judge)
    refitted = qdq.refit_passes(net, [samples], steps)

    assert refitted.steps == steps.steps
    assert refitted.notes == (
        "The passes that stay were then fitted to all calibration samples: correct_bias",
    )
    for name, values in at_once.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], values, rtol=0, atol=0)


def test_refit_passes_does_nothing_after_fine_tuning(net: nn.Module, samples: torch.Tensor) -> None:
    judge = Judge(net, [samples[:32]])
    _calibrate(net, samples)
    judge.measure("calibrated", net)
    steps = qdq.recover_accuracy(net, [samples[32:]], judge)
    qdq.finetune(net, [samples[32:]], schedule=qdq.Schedule(steps=2))
    before = _state(net)
    assert qdq.refit_passes(net, [samples], steps) is steps
    assert all(torch.equal(net.state_dict()[name], values) for name, values in before.items())


def test_ctrl_c_in_the_last_fit_keeps_what_was_fitted(
    net: nn.Module, samples: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge(net, [samples[:32]])
    _calibrate(net, samples)
    judge.measure("calibrated", net)

    def interrupt() -> Iterator[torch.Tensor]:
        yield samples
        raise KeyboardInterrupt

    class Interrupted(list[torch.Tensor]):
        def __iter__(self) -> Iterator[torch.Tensor]:
            return interrupt()

    by_hand = copy.deepcopy(net)
    qdq.correct_bias(by_hand, [samples[32:]])
    monkeypatch.setattr("qdq.recover.list", Interrupted, raising=False)
    with pytest.raises(KeyboardInterrupt):
        qdq.recover_accuracy(net, [samples[32:]], judge, refit=[samples])
    for name, values in by_hand.state_dict().items():
        torch.testing.assert_close(net.state_dict()[name], values, rtol=0, atol=0)


def test_best_tries_every_pass(
    net: nn.Module, samples: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuning = ("weights fine-tuned", partial(qdq.tune_weights, steps=5, lr=1e-3))
    monkeypatch.setattr(recover, "_PASSES", {**recover._PASSES, "tune_weights": tuning})
    judge = Judge(net, [samples[:32]])
    _calibrate(net, samples)
    judge.measure("calibrated", net)
    steps = qdq.recover_accuracy(net, [samples[32:]], judge, effort="best", refit=[samples])

    assert [step.name for step in steps.steps[1:]] == [
        "weights rounded for their outputs",
        "blocks reconstructed",
        "biases corrected",
        "weights fine-tuned",
    ]
    stay = [step.sqnr_db for step in steps.steps if not step.is_undone]
    assert stay == sorted(stay)


def test_fine_tuning_is_left_to_finetune(
    net: nn.Module, samples: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recover, "EFFORTS", {"best": ("correct_bias", "tune_weights")})
    judge = Judge(net, [samples[:32]])
    _calibrate(net, samples)
    judge.measure("calibrated", net)
    steps = qdq.recover_accuracy(net, [samples[32:]], judge, effort="best", tunes=False)

    assert [step.name for step in steps.steps[1:]] == ["biases corrected"]


def test_wrong_calls_say_what_to_do(net: nn.Module, samples: torch.Tensor) -> None:
    judge = Judge(net, [samples[:32]])
    with pytest.raises(qdq.ArgumentError, match="fast, balanced, best"):
        qdq.recover_accuracy(net, [samples], judge, effort="slow")
    with pytest.raises(qdq.StateError, match=r"judge\.measure"):
        qdq.recover_accuracy(net, [samples], judge)


def test_every_effort_says_how_many_samples_it_needs() -> None:
    assert FITTED_SAMPLES.keys() == EFFORTS.keys()


def test_weights_of_outputs_are_those_of_fine_tuning(
    net: nn.Module, samples: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights: dict[str, Mapping[str, float] | None] = {}

    def run(name: str, model: nn.Module, batches: object, **options: Any) -> None:
        weights[name] = options.get("weights")

    passes = {name: (name, partial(run, name)) for name in EFFORTS["best"]}
    monkeypatch.setattr(recover, "_PASSES", passes)
    judge = Judge(net, [samples[:32]], weights={"output": 2.0})
    _calibrate(net, samples)
    judge.measure("calibrated", net)
    qdq.recover_accuracy(net, [samples[32:]], judge, effort="best", weights={"output": 2.0})
    assert weights == dict.fromkeys(EFFORTS["best"]) | {"tune_weights": {"output": 2.0}}


def test_weights_of_unknown_outputs_are_refused_at_once(
    net: nn.Module, samples: torch.Tensor
) -> None:
    judge = Judge(net, [samples[:32]])
    _calibrate(net, samples)
    judge.measure("calibrated", net)
    before = _state(net)
    with pytest.raises(qdq.ArgumentError, match="weights names logits"):
        qdq.recover_accuracy(net, [samples[32:]], judge, weights={"logits": 1.0})
    assert all(torch.equal(values, before[name]) for name, values in net.state_dict().items())
