"""Does one accuracy pass after another, and keeps those that help on samples that they were not fitted to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import nn

from qdq.accuracy.adaround import round_weights
from qdq.accuracy.bias import correct_bias
from qdq.accuracy.blocks import reconstruct_blocks
from qdq.batch import list_filled_batches
from qdq.corrections import AccuracyPass, Snapshot, undo_passes
from qdq.errors import ArgumentError, DataError, StateError
from qdq.files import as_path
from qdq.forward import require_model
from qdq.judge import Judge, JudgedSteps
from qdq.outputs import Mask, OutputView, Selection
from qdq.qat.weight_tuning import tune_weights
from qdq.recovery import Recovery, digest_recovery

logger = logging.getLogger(__name__)

EFFORTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "fast": ("correct_bias",),
        "balanced": ("round_weights", "correct_bias"),
        "best": ("round_weights", "reconstruct_blocks", "correct_bias", "tune_weights"),
    }
)
"""Effort -> the passes that are tried, in this order. The first ones fit biases, too: so biases are corrected after
them, and only if that helps on top of them. Fine-tuning starts from what helped."""

FITTED_SAMPLES: Mapping[str, int] = MappingProxyType({"fast": 64, "balanced": 128, "best": 128})
"""Effort -> a good number of samples to fit; a bias needs fewer than the weights of a layer."""

_LEAST_GAIN_DB = 0.05  # a pass that gains less is undone

_Pass = Callable[..., object]
_PASSES: Mapping[str, tuple[str, _Pass]] = MappingProxyType(
    {
        "correct_bias": ("biases corrected", correct_bias),
        "round_weights": ("weights rounded for their outputs", round_weights),
        "reconstruct_blocks": ("blocks reconstructed", reconstruct_blocks),
        "tune_weights": ("weights fine-tuned", tune_weights),
    }
)
"""Pass -> its step in the table, and the function."""


def recover_accuracy(
    model: nn.Module,
    batches: Iterable[Any],
    judge: Judge,
    *,
    effort: str = "fast",
    tunes: bool = True,
    refit: Iterable[Any] | None = None,
    outputs: Selection | None = None,
    mask: Mask | None = None,
    weights: Mapping[str, float] | None = None,
    path: Path | str | None = None,
) -> JudgedSteps:
    """Try the passes of an effort, and undo each that gains less than 0.05 dB on the samples of the judge.

    Call it when the choice of float layers is made: what a pass fits depends on that. After Ctrl-C the passes that are
    done stay.

    Args:
        model: A calibrated model, changed in place.
        batches: Samples to fit, without those of the judge; see `correct_bias`. They must fit in memory together.
        judge: It has measured the model at least once, in the present state.
        effort: One of `EFFORTS`: "fast" corrects biases, "balanced" also rounds weights for their outputs, "best" also
            reconstructs blocks and fine-tunes weights, which costs many minutes.
        tunes: False leaves `tune_weights` out of "best": `finetune` will train the model anyway.
        refit: All samples. If they are given, the passes that were kept are fitted to them at the end, as more samples
            fit better.
        outputs: Parts of the outputs that the passes report, as for `predictor.predict`.
        mask: What leaves padding out, as for `predictor.predict`.
        weights: Weight of each output in the loss of `tune_weights`; those of the judge, as a rule.
        path: File with the state after every pass. The same call continues from it after Ctrl-C or a `kill -9`: it does
            an interrupted pass again from its beginning, and ends with the same model. The last fit is one pass.

    Returns:
        What every step was worth, those before this call included.

    Raises:
        ArgumentError: An unknown effort, a weight for an output that does not exist, or a file that cannot be written.
        ArgumentTypeError: What is no model, or one tensor or dictionary instead of batches.
        DataError: No batch with samples.
        StateError: The judge has measured nothing yet.
    """
    require_model(model)
    if effort not in EFFORTS:
        raise ArgumentError(
            f"effort is {effort!r}; known are {', '.join(EFFORTS)}.", "pass one of them."
        )
    if not judge.steps:
        raise StateError("the judge has measured nothing yet.", "call judge.measure(name, model).")
    view = OutputView(outputs, mask, weights)
    view.weigh(judge.outputs)  # refuses weights of other outputs before the first pass
    names = [name for name in EFFORTS[effort] if tunes or name != "tune_weights"]
    batches = list_filled_batches(batches)  # once: each pass would read the samples again
    if refit is not None:
        refit = list(refit)
    passes = _list_passes(batches, view)
    recovery = Recovery(None, "")
    if path is not None:  # the digest reads all weights and data, which only a file needs
        facts = f"{view.describe()} weights {sorted((weights or {}).items())}"
        key = digest_recovery(model, judge, names, batches, refit, facts)
        recovery = Recovery(as_path(path, "path"), key)
        recovery.resume(model, judge, passes, refit)
    for name in names:
        if name in recovery.tried:
            continue
        _try_pass(model, passes[name], judge, recovery)
        recovery.tried.append(name)
        recovery.save(model, judge)
    if refit is not None and not recovery.is_fitted:
        notes, recovery.is_refitted = _fit_again(model, refit)
        recovery.notes += notes
        recovery.is_fitted = True
        recovery.save(model, judge)
    for note in recovery.notes:
        logger.info("%s", note)
    return judge.conclude(recovery.notes)


def refit_passes(model: nn.Module, batches: Iterable[Any], steps: JudgedSteps) -> JudgedSteps:
    """Fit the passes that changed a model to all samples, when nothing is judged any more: more samples fit better.

    A model that `finetune` has trained has no passes left and does not change.

    Args:
        model: The model, changed in place.
        batches: All samples, those of the judge included. They must fit in memory together.
        steps: What `recover_accuracy` returned when it was called without `refit`.

    Returns:
        The steps, with a note of what was done.

    Raises:
        ArgumentTypeError: What is no model, or one tensor or dictionary instead of batches.
        DataError: No batch with samples.
    """
    require_model(model)
    notes, _ = _fit_again(model, list_filled_batches(batches))
    for note in notes:
        logger.info("%s", note)
    if not notes:
        return steps
    return replace(steps, notes=(*steps.notes, *notes))


def _list_passes(batches: list[Any], view: OutputView) -> dict[str, AccuracyPass]:
    """Name -> the pass with the options of this call, as it records itself."""
    passes = {}
    for name, (_, run) in _PASSES.items():
        options: dict[str, Any] = {"outputs": view.outputs, "mask": view.mask}
        if name == "tune_weights":  # the others fit layers and blocks, not outputs
            options["weights"] = view.weights
        passes[name] = AccuracyPass(name, partial(run, batches=batches, **options))
    return passes


def _try_pass(
    model: nn.Module, accuracy_pass: AccuracyPass, judge: Judge, recovery: Recovery
) -> None:
    """Do a pass, measure it, and undo it if it is not worth it; if it cannot be done, note the reason."""
    name = accuracy_pass.name
    title, _ = _PASSES[name]
    best = [step for step in judge.steps if not step.is_undone][-1]
    former = Snapshot(model)
    try:
        accuracy_pass.run(model)
    except (DataError, StateError) as error:  # it has left the model as it was
        recovery.notes.append(f"{name} was left out: {error.message}")
        return
    step = judge.measure(title, model)
    is_better = step.sqnr_db - best.sqnr_db >= _LEAST_GAIN_DB
    if is_better:
        recovery.done.append(name)
    else:
        former.restore(model)
        judge.mark_undone()


def _fit_again(model: nn.Module, batches: list[Any]) -> tuple[list[str], bool]:
    """Do the passes of a model again on other samples.

    Returns:
        What was done, in words, and whether the passes are fitted to these samples now.
    """
    former = Snapshot(model)
    passes = undo_passes(model)
    if not passes:
        return [], False
    try:
        for accuracy_pass in passes:
            accuracy_pass.run(model, batches=batches)
    except BaseException as error:
        former.restore(model)
        if not isinstance(error, DataError | StateError):
            raise
        reason = (
            f"The passes keep their fit to the samples without the held-out ones: {error.message}"
        )
        return [reason], False
    names = ", ".join(accuracy_pass.name for accuracy_pass in passes)
    return [f"The passes that stay were then fitted to all calibration samples: {names}"], True
