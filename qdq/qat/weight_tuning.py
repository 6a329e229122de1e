"""Fine-tuning as an accuracy pass: weights and biases of the quantized layers learn the outputs of the float model.

It is `finetune` with distillation and frozen ranges, for as many samples as the other passes get. It trains what the
layers keep beside it for float, and nothing else: so it can be taken back and done again like any other pass.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from qdq.accuracy.layerwise import (
    format_change,
    measure_change,
    plan_layers,
    require_counts,
    run_flat,
)
from qdq.batch import count_samples, is_by_sample, join_batches, map_leaves
from qdq.corrections import AccuracyPass, record_pass, undoing_passes
from qdq.device import without_tf32
from qdq.errors import ArgumentError, QdqError, StateError
from qdq.forward import require_data, require_model
from qdq.nn import QuantMixin
from qdq.outputs import Mask, Selection
from qdq.qat.losses import Distillation, Objective
from qdq.qat.trainer import Trainer, copy_float, require_no_inference
from qdq.run import require_seed
from qdq.schedule import Schedule
from qdq.seeds import seeded_rng

_FIX = "leave this pass out, or see how finetune trains the model."


@dataclass(frozen=True)
class WeightTuning:
    """Result of `tune_weights`.

    Args:
        layers: The trained layers, in the order in which they run.
        skipped: Quantized layer -> why it was not trained.
        losses: Loss of each step.
        before_db: SQNR of the outputs against the float model on the same batches, before the training, in dB; of
            several outputs, that of the worst.
        after_db: The same after the training.
        outputs: Name -> SQNR before and after, if there are several outputs.
    """

    layers: tuple[str, ...]
    skipped: Mapping[str, str]
    losses: tuple[float, ...]
    before_db: float
    after_db: float
    outputs: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def format_table(self) -> str:
        """SQNR before and after, then the skipped layers with the reasons."""
        lines = [
            f"{len(self.layers)} layers fine-tuned in {len(self.losses)} steps: "
            f"SQNR {self.before_db:.2f} to {self.after_db:.2f} dB"
        ]
        lines += format_change(self.outputs)
        for name, reason in self.skipped.items():
            lines.append(f"  {name}: {reason}")
        return "\n".join(lines)


@without_tf32()
def tune_weights(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    steps: int = 100,
    batch_size: int = 16,
    lr: float = 1e-5,
    bias_lr: float = 1e-4,
    seed: int = 0,
    outputs: Selection | None = None,
    mask: Mask | None = None,
    weights: Mapping[str, float] | None = None,
) -> WeightTuning:
    """Train weights and biases of the int8 layers, without labels: the float model is the teacher; in place.

    The loss is that of `Distillation`: the distance of the outputs, and of those of the blocks inside. Ranges,
    BatchNorm, layers in float and all other parameters do not change, and a parameter that several modules share does
    not, either. The cost is that of `steps` training steps and as many forwards of the float model. On a GPU,
    everything runs without TF32.

    The layers keep their float weights and biases, and use them while they are not quantized. If ranges or the choice
    of float layers change later, the model is trained again (`qdq.corrections`). If other passes ran before, it starts
    from what they made. After an error or Ctrl-C the model is as before.

    Args:
        model: A calibrated model.
        batches: As for `calibrate_model`; they must fit in memory together.
        steps: Number of steps.
        batch_size: Samples in a step.
        lr: Largest learning rate of the weights, see `Schedule`.
        bias_lr: Largest learning rate of the biases.
        seed: Seed of the choice of samples.
        outputs: Parts of the outputs to learn and to report, as for `predictor.predict`; None for all.
        mask: What leaves padding out of them, as for `predictor.predict`.
        weights: Weight of the relative error of each output, see `Distillation`.

    Returns:
        The layers, and the SQNR before and after.

    Raises:
        ArgumentError: An unknown output, also in `weights`, or an option out of range.
        ArgumentTypeError: One tensor or dictionary instead of batches, or an option of another type.
        DataError: No batch, or batches that differ in shape.
        StateError: No layer is quantized, one has no range, or the outputs hold NaN or Inf; the model cannot be
            trained: it has no gradient, float16 weights or too little memory, or it is in `torch.inference_mode`.
    """
    require_model(model)
    require_data(model)
    require_no_inference(model)
    schedule = Schedule(steps=steps, lr=lr, bias_lr=bias_lr, tune_batchnorm=0.0)
    require_counts(batch_size=batch_size)
    require_seed(seed)
    distillation = Distillation(outputs=outputs, mask=mask, weights=weights)
    inputs = join_batches(batches)
    again = partial(
        tune_weights,
        batches=[inputs],
        steps=steps,
        batch_size=batch_size,
        lr=lr,
        bias_lr=bias_lr,
        seed=seed,
        outputs=outputs,
        mask=mask,
        weights=weights,
    )
    with undoing_passes(model, "tune_weights"):
        layers, skipped = _choose_layers(model, inputs)
        outputs_before = run_flat(model, inputs, distillation.view)
        distillation.view.weigh(list(outputs_before))  # refuses weights of unknown outputs
        with _refusing_untrainable():
            teacher = copy_float(model)
            expected = run_flat(teacher, inputs, distillation.view)
            for layer in layers.values():
                layer.keep_float()
            objective = Objective(model, teacher, None, distillation)
            with _training_only(model, layers.values()), seeded_rng(seed):
                losses = _train(model, objective, inputs, schedule, steps, batch_size)
        outputs_after = run_flat(model, inputs, distillation.view)
        record_pass(model, AccuracyPass("tune_weights", again))
    change = measure_change(expected, outputs_before, outputs_after)
    return WeightTuning(tuple(layers), skipped, tuple(losses), **vars(change))


def _choose_layers(model: nn.Module, inputs: Any) -> tuple[dict[str, QuantMixin], dict[str, str]]:
    """The layers whose weight and bias are theirs alone, so that they can be changed while they are quantized.

    Returns:
        The layers by name, and the others with the reason.

    Raises:
        StateError: There is none.
    """
    plan = plan_layers(model, inputs)
    users: Counter[nn.Parameter] = Counter()
    for module in model.modules():
        users.update(module.parameters(recurse=False))
    layers = {}
    skipped = dict(plan.skipped)
    for name, layer in plan.layers.items():
        if any(users[parameter] > 1 for parameter in layer.list_learnable()):
            skipped[name] = "another module uses its weight or bias, too"
        else:
            layers[name] = layer
    if not layers:
        raise StateError("there is no quantized layer to train.", _FIX)
    return layers, skipped


@contextmanager
def _training_only(model: nn.Module, layers: Iterable[QuantMixin]) -> Iterator[None]:
    """In the block only weight and bias of some layers need gradients."""
    former = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_(False)
        for layer in layers:
            for parameter in layer.list_learnable():
                parameter.requires_grad_(True)
        yield
    finally:
        for parameter, requires_grad in former:
            parameter.requires_grad_(requires_grad)


@contextmanager
def _refusing_untrainable() -> Iterator[None]:
    """In the block what fails is the model's fault, because the options are right.

    Raises:
        StateError: The model cannot be trained, or there is not enough memory.
    """
    try:
        yield
    except ArgumentError as error:
        raise StateError(error.message, _FIX) from error
    except RuntimeError as error:
        if isinstance(error, QdqError):
            raise
        raise StateError(f"the model cannot be trained: {error}", _FIX) from error


def _train(
    model: nn.Module,
    objective: Objective,
    inputs: Any,
    schedule: Schedule,
    steps: int,
    batch_size: int,
) -> list[float]:
    """Train on random samples.

    Returns:
        The loss of each step.
    """
    losses = []
    trainer = Trainer(model, objective, schedule, steps)
    try:
        for _ in tqdm(range(steps), desc="fine-tune", unit="step", disable=None):
            losses.append(trainer.run_step(_draw(inputs, batch_size)))
    finally:
        trainer.finish()
    return losses


def _draw(inputs: Any, count: int) -> Any:
    """Some of the samples, drawn from torch's global generator."""
    size = count_samples(inputs)
    index = torch.randperm(size)[:count]

    def take(leaf: Any) -> Any:
        return leaf[index] if is_by_sample(leaf, size) else leaf

    return map_leaves(take, inputs)
