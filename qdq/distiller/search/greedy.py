"""Greedy search of clip modes, layer after layer in the order in which they run.

All layers begin in float. For the next one, each clip mode is tried on all evaluation data, and the one with the
smallest loss stays. Then the following layer gets new statistics, because what it reads is quantized now.
"""

from __future__ import annotations

import logging
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from tqdm import tqdm

from qdq.analyze.journal import Journal
from qdq.analyze.ranks import Ranks
from qdq.distiller.post_training.quantizer import PostTrainLinearQuantizer
from qdq.distiller.search.fingerprint import digest_batches, fingerprint_search
from qdq.distiller.search.greedy_files import save_config
from qdq.distiller.search.greedy_trials import FLOAT, Settings, Trials
from qdq.distiller.search.subset_loss import Criterion, SubsetLoss
from qdq.distiller.statistics.records import ModelStatistics
from qdq.distiller.statistics.statistics_file import plain_layer, read_statistics, save_statistics
from qdq.distiller.statistics.two_passes import collect_quant_stats, read_twice
from qdq.files import as_path, guard_files
from qdq.qat.losses import cross_entropy

logger = logging.getLogger(__name__)

CONFIG_FILE = "greedy_config.yaml"
"""The configuration of the quantizer with an override for each layer."""

STATISTICS_FILE = "greedy_stats.yaml"
"""The statistics that the configuration names."""

JOURNAL_FILE = "greedy_journal.jsonl"
"""The measurements, from which an interrupted search continues."""

_CLIPS: dict[str, Settings] = {
    name: {"clip_acts": name} for name in ("NONE", "AVG", "GAUSS", "LAPLACE")
}
_HALF = "fp16"
_HALF_SETTINGS: Settings = {"fpq_module": 16}
_SATURATING = (nn.Tanh, nn.Sigmoid)
_FLOAT_KINDS = (nn.Softmax, nn.LogSoftmax)


@dataclass(frozen=True)
class GreedyResult:
    """The result of a greedy search; the model is quantized so.

    Args:
        loss: The loss of the quantized model.
        choices: Layer -> its clip mode, "fp16" or "float".
        config: The configuration, for `--qe-config-file`.
        statistics: The statistics that it names.
    """

    loss: float
    choices: dict[str, str]
    config: Path
    statistics: Path


def ptq_greedy_search(
    quantizer: PostTrainLinearQuantizer,
    dummy_input: Any,
    batches: Any,
    folder: Path | str,
    *,
    criterion: Criterion = cross_entropy,
    calibration: Any = None,
) -> GreedyResult:
    """Choose the clip mode of each layer, quantize the model so, and write the configuration.

    Args:
        quantizer: A quantizer whose model is still float. Its settings hold for all layers, apart from clip modes.
        dummy_input: One batch for `PostTrainLinearQuantizer.prepare_model`.
        batches: `(inputs, labels)` to measure the loss on, the same in every pass.
        folder: Folder for the files. An interrupted search continues from what it has.
        criterion: The loss of a batch.
        calibration: Batches to collect statistics on; None: `batches`.

    Returns:
        The choices and the files.

    Raises:
        ArgumentError: A file cannot be written, or the statistics of the quantizer lack layers.
        DataError: No batch, or batches that change from pass to pass.
        StateError: The model is quantized already, or no layer of it is quantized.
    """
    folder = as_path(folder, "folder")
    config, statistics_file = folder / CONFIG_FILE, folder / STATISTICS_FILE
    guard_files(outputs=[config, statistics_file])
    loss = SubsetLoss(batches, criterion)
    source = batches if calibration is None else calibration
    if quantizer.model_activation_stats is None:
        quantizer.model_activation_stats = collect_quant_stats(quantizer.model, source)
    fingerprint = fingerprint_search(quantizer, [loss.digest(), digest_batches(source)])
    with closing(Journal(folder / JOURNAL_FILE, fingerprint, Ranks())) as journal:
        search = _Search(Trials(quantizer, dummy_input), loss, source, journal)
        search.run(quantizer.model_activation_stats)

    quantizer.overrides = search.trials.make_overrides(search.decided)
    quantizer.model_activation_stats = search.statistics
    save_statistics(statistics_file, search.statistics)
    save_config(config, quantizer, statistics_file)
    quantizer.prepare_model(dummy_input)
    return GreedyResult(loss(quantizer.model), search.choices, config, statistics_file)


class _Search:
    """The state of the search.

    Args:
        trials: Makes the models.
        loss: Their loss.
        calibration: Batches to collect statistics on.
        journal: Where measurements are and go.
    """

    def __init__(
        self, trials: Trials, loss: SubsetLoss, calibration: Any, journal: Journal
    ) -> None:
        self.trials = trials
        self.choices: dict[str, str] = {}
        self.decided: dict[str, Settings] = {}
        self.statistics: ModelStatistics = {}
        self._loss = loss
        self._calibration = calibration
        self._journal = journal

    def run(self, statistics: ModelStatistics) -> None:
        """Decide all layers.

        Args:
            statistics: Those of the float model.
        """
        self.statistics = dict(statistics)
        progress = tqdm(self.trials.layers.items(), desc="greedy", unit="layer", disable=None)
        for name, module in progress:
            if self.decided:
                self._renew_statistics(name)
            if isinstance(module, _FLOAT_KINDS):
                choice, settings = "float", FLOAT
            else:
                choice, settings = self._choose(name, module)
            self.choices[name] = choice
            self.decided[name] = settings

    def _choose(self, name: str, module: nn.Module) -> tuple[str, Settings]:
        """The candidate with the smallest loss, the first of equal ones."""
        candidates = dict(_CLIPS)
        if isinstance(module, _SATURATING):
            candidates[_HALF] = _HALF_SETTINGS
        losses = {}
        for label, settings in candidates.items():
            losses[label] = self._measure(name, label, settings)
            logger.info("%s: %s loss=%.4f", name, label, losses[label])
        best = min(losses, key=losses.__getitem__)
        logger.info("%s: %s", name, best)
        return best, candidates[best]

    def _measure(self, name: str, label: str, settings: Settings) -> float:
        key = ["loss", name, label, *self.choices.items()]
        loss = self._journal.get(key)
        if loss is None:
            trial = self.trials.prepare({**self.decided, name: settings}, self.statistics)
            loss = self._loss(trial.model)
            self._journal.add(key, loss)
        return float(loss)

    def _renew_statistics(self, name: str) -> None:
        """Collect the statistics of a float layer behind quantized ones, with BatchNorm folded into it."""
        key = ["statistics", name, *self.choices.items()]
        record = self._journal.get(key)
        if record is None:
            trial = self.trials.prepare(self.decided, self.statistics)
            collected = read_twice(trial.model, self._calibration)
            record = plain_layer(collected[name])
            self._journal.add(key, record)
        layer = read_statistics({name: record})[name]
        self.statistics[name] = layer
        batchnorm = self.trials.batchnorms.get(name)
        if batchnorm in self.statistics:
            self.statistics[batchnorm] = replace(self.statistics[batchnorm], output=layer.output)
