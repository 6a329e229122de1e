"""The worth of every step: its figures against numpy in float64, and the table."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import qdq
from qdq.judge import Judge, JudgedStep, JudgedSteps


class TwoOutputs(nn.Module):
    """Scores, and boxes that are a thousand times as large."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        scores = self.linear(x)
        return {"scores": scores, "boxes": 1000 * scores.cos()}


def _decibels(expected: torch.Tensor, actual: torch.Tensor) -> float:
    signal, noisy = expected.double().numpy(), actual.double().numpy()
    return float(10 * np.log10((signal**2).sum() / ((signal - noisy) ** 2).sum()))


@pytest.fixture
def batches() -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(5, 4), torch.randn(3, 4)]


def test_a_step_is_measured_against_the_model_of_the_start(batches: list[torch.Tensor]) -> None:
    model = nn.Linear(4, 3)
    expected = torch.cat([model(batch) for batch in batches]).detach()
    judge = Judge(model, batches)
    with torch.no_grad():
        model.weight.mul_(1.1)
    step = judge.measure("weights scaled", model)

    actual = torch.cat([model(batch) for batch in batches]).detach()
    same = (expected.argmax(1) == actual.argmax(1)).float().mean()
    assert step.sqnr_db == pytest.approx(_decibels(expected, actual), abs=1e-3)
    assert step.agreement == pytest.approx(float(same))
    assert judge.conclude().images == 8


def test_the_worst_output_decides_or_the_weights(batches: list[torch.Tensor]) -> None:
    model = TwoOutputs()
    plain = Judge(model, batches)
    weighted = Judge(model, batches, weights={"boxes": 1.0})
    with torch.no_grad():
        model.linear.bias.add_(0.1)
    worst = plain.measure("shifted", model)
    boxes = weighted.measure("shifted", model)

    assert worst.sqnr_db == min(worst.outputs.values())
    assert boxes.sqnr_db == pytest.approx(boxes.outputs["boxes"])
    assert worst.agreement is None


def test_steps_without_an_error_have_no_change() -> None:
    steps = (JudgedStep("a", float("inf"), None), JudgedStep("b", float("inf"), None))
    assert "nan" not in JudgedSteps("none", 1, steps).format_table()


def test_unknown_weights_are_refused(batches: list[torch.Tensor]) -> None:
    with pytest.raises(qdq.ArgumentError, match="boxs"):
        Judge(TwoOutputs(), batches, weights={"boxs": 1.0})


def test_a_change_counts_from_the_last_step_that_was_not_undone() -> None:
    steps = (
        JudgedStep("calibrated", 17.0, 0.9),
        JudgedStep("worse", 15.0, 0.8, is_undone=True),
        JudgedStep("better", 21.5, None, {"boxes": 30.0}),
    )
    text = JudgedSteps("photographs", 8, steps, ("fitted again",)).format_table()

    _, calibrated, worse, better, boxes, source, note = text.splitlines()
    assert calibrated.split() == ["calibrated", "17.00", "90.0%"]
    assert worse.split() == ["worse", "15.00", "-2.00", "80.0%", "undone"]
    assert better.split() == ["better", "21.50", "+4.50", "-"]
    assert boxes.split() == ["boxes", "30.00"]
    assert source == "held out: photographs"
    assert note == "fitted again"
