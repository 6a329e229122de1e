"""Distillation of a model whose outputs differ in scale: each output has its own error."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from two_heads import TwoHeads, db

from qdq import (
    ArgumentError,
    ArgumentTypeError,
    DataError,
    Distillation,
    Schedule,
    calibrate_model,
    finetune,
    predict,
    swap_modules,
)
from qdq.qat import _DistanceMetric
from qdq.qat.losses import Objective


def returning(**outputs):
    """A model that returns tensors that it does not compute."""

    class Returning(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ParameterDict(outputs)

        def forward(self, x, attention_mask=None):
            return dict(self.parts)

    return Returning()


def error(actual, expected):
    """Mean relative error of the samples, by numpy."""
    actual, expected = np.float64(actual.detach()), np.float64(expected.detach())
    axes = tuple(range(1, actual.ndim))
    return (((actual - expected) ** 2).sum(axes) / (expected**2).sum(axes)).mean()


@pytest.fixture
def outputs():
    return {"boxes": 1000 * torch.randn(5, 4, 2), "scores": torch.randn(5, 10)}


def loss_of(distillation, outputs, batch=None):
    student = returning(**{name: tensor + 0.1 for name, tensor in outputs.items()})
    objective = Objective(student, returning(**outputs), None, distillation)
    return objective(torch.zeros(5, 1) if batch is None else batch).item()


def test_every_output_counts_the_same(outputs):
    errors = [error(tensor + 0.1, tensor) for tensor in outputs.values()]
    assert errors[1] > 1000 * errors[0]
    only_mse = {"kl": 0, "features": 0}
    assert loss_of(Distillation(**only_mse), outputs) == pytest.approx(np.mean(errors), rel=1e-4)
    weights = {"boxes": 3, "scores": 1}
    weighted = loss_of(Distillation(**only_mse, weights=weights), outputs)
    assert weighted == pytest.approx(np.average(errors, weights=[3, 1]), rel=1e-4)
    boxes = loss_of(Distillation(**only_mse, weights={"boxes": 1}), outputs)
    assert boxes == pytest.approx(errors[0], rel=1e-3)
    part = {"boxes": "boxes"}
    assert loss_of(Distillation(**only_mse, outputs=part), outputs) == pytest.approx(boxes)


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_errors_are_relative_to_those_before_training(outputs, scale):
    outputs["boxes"] *= scale
    student = returning(**{name: tensor + 0.1 for name, tensor in outputs.items()})
    distillation = Distillation(kl=0, features=0)
    objective = Objective(student, returning(**outputs), None, distillation)
    batch = torch.zeros(5, 1)
    objective.balance(batch)
    errors = [error(tensor + 0.1, tensor) for tensor in outputs.values()]
    shares = errors / np.maximum(errors, 1e-3 * max(errors))
    assert (shares[0] < 1) == (scale == 1)  # not more than a thousandfold
    start = np.mean(errors) * np.mean(shares)
    assert objective(batch).item() == pytest.approx(start, rel=1e-3)
    with torch.no_grad():
        student.parts["boxes"] += 0.1  # four times the squared error
    expected = np.mean(errors) * np.mean(shares * [4, 1])
    assert objective(batch).item() == pytest.approx(expected, rel=1e-3)
    objective.balance(batch)  # the errors stay those before training
    resumed = Objective(student, returning(**outputs), None, distillation)
    resumed.unpack(objective.pack())
    assert resumed(batch).item() == objective(batch).item() == pytest.approx(expected, rel=1e-3)


def test_a_state_that_loses_in_one_output_is_not_the_best(outputs):
    def shift(boxes, scores):
        return returning(boxes=outputs["boxes"] + boxes, scores=outputs["scores"] + scores)

    view = Distillation().view
    metric = _DistanceMetric(shift(0.1, 0.1), returning(**outputs), [torch.zeros(5, 1)], view)
    start = metric(shift(0.1, 0.1))
    assert metric(shift(0.1, 0.05)) == pytest.approx(start + 20 * math.log10(2), abs=1e-3)
    assert metric(shift(0.2, 0.05)) == pytest.approx(start - 20 * math.log10(2), abs=1e-2)
    view = Distillation(weights={"scores": 1.0, "boxes": 0.0}).view
    metric = _DistanceMetric(shift(0.1, 0.1), returning(**outputs), [torch.zeros(5, 1)], view)
    assert metric(shift(0.2, 0.05)) > start + 6


def test_divergence_is_of_the_outputs_that_are_named(outputs):
    """The boxes `[N, 4]` have no classes, although they have the shape."""
    outputs = {"boxes": outputs["boxes"][..., 0], "scores": outputs["scores"]}
    student = returning(boxes=outputs["boxes"], scores=2 * outputs["scores"])

    def measure(**options):
        distillation = Distillation(**only_kl, **options)
        return Objective(student, returning(**outputs), None, distillation)(torch.zeros(5, 1))

    only_kl = {"mse": 0, "features": 0}
    for temperature in (1.0, 3.0):
        logits = [factor * outputs["scores"].double() / temperature for factor in (1, 2)]
        p, q = (np.float64(scores.softmax(1)) for scores in logits)
        expected = temperature**2 * (p * np.log(p / q)).sum(1).mean()
        named = measure(kl={"scores": 2.0}, temperature=temperature)
        assert named.item() == pytest.approx(2 * expected, rel=1e-4)
        alone = measure(outputs={"scores": "scores"}, temperature=temperature)
        assert alone.item() == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ArgumentError, match="kl needs one output"):
        loss_of(Distillation(**only_kl), outputs)
    with pytest.raises(ArgumentError, match="kl names logits; the outputs are"):
        loss_of(Distillation(kl={"logits": 1.0}), outputs)
    with pytest.raises(ArgumentError, match="weight of 'scores' is -1"):
        Distillation(kl={"scores": -1})


def test_padding_has_no_error():
    states = torch.randn(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    student = returning(states=states + torch.where(mask[..., None] == 0, math.nan, 0.1))
    distillation = Distillation(kl=0, features=0, mask="attention_mask")
    objective = Objective(student, returning(states=states), None, distillation)
    loss = objective({"x": torch.zeros(2, 1), "attention_mask": mask})
    loss.backward()
    kept = states * mask[..., None]
    assert float(loss.detach()) == pytest.approx(
        error(kept + 0.1 * mask[..., None], kept), rel=1e-4
    )
    gradient = student.parts["states"].grad
    assert (gradient[mask == 0] == 0).all()
    with pytest.raises(DataError, match=r"the mask \[2, 5\] fits no output"):
        objective({"x": torch.zeros(2, 1), "attention_mask": torch.ones(2, 5)})


def test_what_a_distillation_refuses():
    with pytest.raises(ArgumentTypeError, match="outputs is of type list"):
        Distillation(outputs=["scores"])
    with pytest.raises(ArgumentError, match="weight of 'scores' is -1"):
        Distillation(weights={"scores": -1})
    teacher = returning(scores=torch.ones(5, 2))
    student = returning(scores=torch.ones(5, 3))
    with pytest.raises(ArgumentError, match="in the teacher"):
        Objective(student, teacher, None, Distillation(features=0))(torch.zeros(5, 1))


def test_a_teacher_with_another_order():
    parts = {"boxes": torch.ones(5, 2), "scores": 2 * torch.ones(5, 3)}
    teacher = returning(**dict(reversed(parts.items())))
    loss = Objective(returning(**parts), teacher, None, Distillation(features=0))(torch.zeros(5, 1))
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)


@pytest.fixture
def heads():
    """A model whose scores lose much more than its boxes, and its float teacher."""
    torch.manual_seed(0)
    teacher = TwoHeads().eval()
    with torch.no_grad():
        teacher.scores.weight[:, 0] *= 20
    model = copy.deepcopy(teacher)
    batches = [torch.randn(8, 3, 8, 8) for _ in range(4)]
    swap_modules(model, batches[0], include=["*"])
    calibrate_model(model, batches, method="max")
    return model, teacher, batches


def measure(model, teacher, batches):
    expected, outputs = predict(teacher, batches), predict(model, batches)
    return {name: db(expected[name], outputs[name]) for name in expected}


def test_fine_tuning_improves_the_worst_and_loses_nowhere(heads):
    model, teacher, batches = heads
    before = measure(model, teacher, batches)
    tuning = finetune(
        model,
        batches,
        teacher=teacher,
        distillation=Distillation(kl={"scores": 1.0}),
        schedule=Schedule(epochs=30, lr=3e-4),
        held=batches,
    )
    after = measure(model, teacher, batches)
    worst = min(before, key=before.get)
    assert after[worst] > before[worst] + 1
    assert all(after[name] >= before[name] for name in before)
    assert tuning.curve[0].metric == pytest.approx(min(before.values()), abs=1e-3)
    best = max(point.metric for point in tuning.curve)
    assert best == pytest.approx(min(after.values()), abs=1e-3)
