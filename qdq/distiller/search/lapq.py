"""LAPQ: search the scales of all layers together for the smallest loss (Nahshan et al., arXiv 1911.07190).

Each layer begins with a clip mode, or with the scales that make the error of its own output small. From there scipy
minimises the loss of the whole model.
"""

from __future__ import annotations

import copy
import logging
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdq.analyze.journal import Journal
from qdq.analyze.ranks import Ranks
from qdq.distiller.post_training.fusion import fold_batchnorms
from qdq.distiller.post_training.quantizer import PostTrainLinearQuantizer
from qdq.distiller.ranges.clipping import ClipMode
from qdq.distiller.search import search_log as log
from qdq.distiller.search.fingerprint import fingerprint_search
from qdq.distiller.search.layer_errors import ErrorOptions, minimize_layer_errors
from qdq.distiller.search.minimize import Objective, Vector, load_scipy, minimize
from qdq.distiller.search.search_options import INIT_NORMS, LapqOptions
from qdq.distiller.search.search_space import SearchSpace
from qdq.distiller.search.subset_loss import Criterion, SubsetLoss
from qdq.distiller.settings.overrides import Overrides
from qdq.distiller.statistics.two_passes import collect_quant_stats
from qdq.qat.losses import cross_entropy

logger = logging.getLogger(__name__)

_CLIP_KEYS = ("clip_acts", "clip_n_stds")

Test = Callable[[nn.Module], Mapping[str, float]]
"""Measures a model on the whole test set: name of a score -> score."""


@dataclass(frozen=True)
class LapqResult:
    """The result of LAPQ; the model has these parameters.

    Args:
        start_loss: The loss after the initialisation.
        loss: The smallest loss.
        evaluations: Number of evaluations of the search.
        parameters: Name -> scale or zero point, see `linear_quant_params`.
    """

    start_loss: float
    loss: float
    evaluations: int
    parameters: dict[str, torch.Tensor]


def ptq_coordinate_search(
    quantizer: PostTrainLinearQuantizer,
    dummy_input: Any,
    batches: Any,
    options: LapqOptions | None = None,
    *,
    criterion: Criterion = cross_entropy,
    calibration: Any = None,
    test: Test | None = None,
    path: Path | str | None = None,
) -> LapqResult:
    """Quantize the model of a quantizer, and search its scales for the smallest loss.

    The clip modes that the user has set for outputs are not used. The model is left at the best scales, also after
    Ctrl-C.

    Args:
        quantizer: A quantizer whose model is still float.
        dummy_input: One batch for `PostTrainLinearQuantizer.prepare_model`.
        batches: `(inputs, labels)` to measure the loss on, the same in every pass.
        options: How to search.
        criterion: The loss of a batch.
        calibration: Batches to collect statistics on if the quantizer has none; None: `batches`.
        test: Is called before and after the search; its scores are logged.
        path: File to which every measurement is appended; an interrupted search continues from it.

    Returns:
        Losses and scales.

    Raises:
        ArgumentError: A mode whose zero points depend on the scales, without `search_clipping`; nothing is quantized,
            or the file cannot be written.
        DataError: No batch, or batches that change from pass to pass.
        DependencyError: scipy is not installed.
        StateError: The model is quantized already, or its loss is not finite.
    """
    options = options or LapqOptions()
    load_scipy()
    loss = SubsetLoss(batches, criterion, options.eval_size, options.eval_memoize_dataloader)

    logger.info(log.INITIALIZING_QUANTIZER)
    if quantizer.model_activation_stats is None:
        source = batches if calibration is None else calibration
        quantizer.model_activation_stats = collect_quant_stats(quantizer.model, source)
    float_model = copy.deepcopy(quantizer.model) if options.init_mode in INIT_NORMS else None
    _start_from_clips(quantizer, options.init_mode)
    quantizer.prepare_model(dummy_input)
    SearchSpace(quantizer.layers, options.search_clipping)  # refuses before any measurement

    fingerprint = ""
    if path is not None:  # it reads all weights and data, which only a file needs
        facts = [options.init_mode, options.search_clipping, loss.digest()]
        fingerprint = fingerprint_search(quantizer, facts)
    journal = Journal(None if path is None else Path(path), fingerprint, Ranks())
    with closing(journal):
        logger.info(log.INITIALIZING_PARAMETERS)
        if float_model is not None:
            fold_batchnorms(float_model, dummy_input, None)
            power = INIT_NORMS[options.init_mode]
            errors = ErrorOptions(power, options.init_method, options.search_clipping)
            batch = loss.first_batch
            minimize_layer_errors(float_model, quantizer.layers, batch, errors, journal)
        objective = _search(quantizer, loss, options, journal, test)
    parameters = {name: value.clone() for name, value in quantizer.linear_quant_params.items()}
    logger.info(log.DONE)
    logger.info(log.BEST_SCORE, objective.best_loss)
    logger.info(log.BEST_CONFIGURATION, _as_numbers(parameters))
    _run_test(test, quantizer.model)
    return LapqResult(objective.start_loss, objective.best_loss, objective.evaluations, parameters)


def _start_from_clips(quantizer: PostTrainLinearQuantizer, init_mode: str) -> None:
    """Replace the user's clip modes by that of the start, also for weights, which stay adjustable."""
    clip = ClipMode.NONE if init_mode in INIT_NORMS else ClipMode[init_mode]
    quantizer.weight_options = quantizer.weight_options._replace(
        save_fp_weights=True, also_clip_weights=True
    )
    quantizer.defaults = replace(quantizer.defaults, clip_acts=clip, clip_n_stds=None)
    if quantizer.overrides is None:
        return
    overrides: Overrides = OrderedDict()
    for pattern, settings in quantizer.overrides.items():
        kept = {key: value for key, value in settings.items() if key not in _CLIP_KEYS}
        overrides[pattern] = kept
    quantizer.overrides = overrides


def _search(
    quantizer: PostTrainLinearQuantizer,
    loss: SubsetLoss,
    options: LapqOptions,
    journal: Journal,
    test: Test | None,
) -> Objective:
    """Search from the scales that the layers have, and leave the best ones in them."""
    space = SearchSpace(quantizer.layers, options.search_clipping)
    present: dict[str, torch.Tensor] = {}

    def measure(numbers: Vector) -> float:
        changed = {}
        for name, value in space.values_at(numbers).items():
            if name not in present or not torch.equal(value, present[name]):
                changed[name] = value
        quantizer.update_linear_quant_params(changed)  # each of them quantizes a weight again
        present.update(changed)
        return loss(quantizer.model)

    logger.info(log.EVALUATING_INITIAL)
    objective = Objective(measure, space.start, journal)
    logger.info(log.INITIAL_LOSS, objective.start_loss)
    _run_test(test, quantizer.model)
    logger.info(log.METHOD, options.method)
    try:
        with log.SearchLog(objective.start_loss, options.maxfev) as listener:
            minimize(objective, options, listener)
    finally:
        quantizer.update_linear_quant_params(space.values_at(objective.best))
    return objective


def _run_test(test: Test | None, model: nn.Module) -> None:
    if test is not None:
        logger.info(log.EVALUATING_TEST)
        logger.info(log.format_test(test(model)))


def _as_numbers(parameters: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """The parameters for the log: a number, or a list for channels."""
    return {name: value.squeeze().tolist() for name, value in parameters.items()}
