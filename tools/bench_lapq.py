"""LAPQ and greedy search with few bits, on a small ResNet for scikit-learn's digits.

python tools/bench_lapq.py [--bits 4] [--maxiter 1] [--init-mode NONE AVG LAPLACE L2] [--json FILE]

LAPQ runs from each start. The first of them also runs in pieces, each of which is stopped, and must come to the same
bits. The configuration that the greedy search writes is read again, and must give the same loss.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import qdq
from qdq.cli.main import PositiveInt, UInt32, run_command
from qdq.cli.recipes import load_recipe
from qdq.distiller import (
    LapqOptions,
    LapqResult,
    PostTrainLinearQuantizer,
    collect_quant_stats,
    ptq_coordinate_search,
    ptq_greedy_search,
)
from qdq.distiller.files.config import read_post_training
from qdq.distiller.post_training.modularization import modularize
from qdq.distiller.search.subset_loss import SubsetLoss
from qdq.files import write_json
from qdq.run import describe_environment

_SEARCH_IMAGES = 512  # on which the loss is measured; the others are for training and for the test
_EVALUATIONS_PER_PIECE = 150


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Args:
        name: How the network is quantized.
        loss: Loss on the images of the search, at the end of it.
        accuracy: Accuracy on the images of the test, in per cent.
        start_loss: The loss before the search; None without one.
        start_accuracy: The accuracy before it.
        evaluations: Number of losses that the search asked for.
    """

    name: str
    loss: float
    accuracy: float
    start_loss: float | None = None
    start_accuracy: float | None = None
    evaluations: int | None = None


@dataclass(frozen=True)
class Search:
    """A run of LAPQ: its options, its result, the network and the line of the table."""

    options: LapqOptions
    result: LapqResult
    net: nn.Module
    row: Row


class Digits:
    """The images of the search and of the test, and a network that was trained on the former.

    Args:
        seed: Seed of the training.
        epochs: Its epochs.
    """

    def __init__(self, seed: int, epochs: int) -> None:
        digits = load_digits()
        images = torch.tensor(digits.images)[:, None].float() / 16
        labels = torch.tensor(digits.target)
        train_images, train_labels = images[::2], labels[::2]
        self.test_images, self.test_labels = images[1::2], labels[1::2]
        self.batches = [(train_images[:_SEARCH_IMAGES], train_labels[:_SEARCH_IMAGES])]
        torch.manual_seed(seed)
        recipe = load_recipe("qat_digits")
        net = recipe.make_network("resnet")
        loader = DataLoader(TensorDataset(train_images, train_labels), 64, shuffle=True)
        recipe.train(net, loader, epochs)
        self.example = train_images[:2]
        self.net = modularize(net, self.example)
        self.statistics = collect_quant_stats(self.net, [train_images])

    def make_quantizer(self, bits: int) -> PostTrainLinearQuantizer:
        """A quantizer for a copy of the network."""
        return PostTrainLinearQuantizer(
            copy.deepcopy(self.net),
            bits,
            bits,
            model_activation_stats=copy.deepcopy(self.statistics),
        )

    def measure(self, net: nn.Module) -> float:
        """Accuracy on the images of the test, in per cent."""
        answers = qdq.predict(net, [self.test_images]).argmax(1)
        return 100 * float((answers == self.test_labels.numpy()).mean())


def search(digits: Digits, bits: int, mode: str, maxiter: int) -> Search:
    """Run LAPQ on a copy of the network."""
    quantizer = digits.make_quantizer(bits)
    accuracies: list[float] = []

    def test(net: nn.Module) -> dict[str, float]:
        accuracies.append(digits.measure(net))
        return {"Top1": accuracies[-1]}

    options = LapqOptions(maxiter=maxiter, init_mode=mode)
    result = ptq_coordinate_search(quantizer, digits.example, digits.batches, options, test=test)
    start_accuracy, accuracy = accuracies
    row = Row(
        f"W{bits}A{bits} LAPQ from {mode}",
        result.loss,
        accuracy,
        result.start_loss,
        start_accuracy,
        result.evaluations,
    )
    return Search(options, result, quantizer.model, row)


class _Stopped(Exception):  # noqa: N818  # no error
    """The search was stopped on purpose."""


class _StopAfter:
    """The cross-entropy, which ends the search after some calls."""

    def __init__(self, limit: int) -> None:
        self._left = limit

    def __call__(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        if not self._left:
            raise _Stopped
        self._left -= 1
        return qdq.cross_entropy(outputs, batch)


def search_in_pieces(
    digits: Digits, bits: int, options: LapqOptions, path: Path
) -> tuple[LapqResult, int]:
    """Run LAPQ again and again, each time until it is stopped.

    Returns:
        The result of the last run, and the number of runs.
    """
    runs = 0
    while True:
        runs += 1
        quantizer = digits.make_quantizer(bits)
        try:
            result = ptq_coordinate_search(
                quantizer,
                digits.example,
                digits.batches,
                options,
                criterion=_StopAfter(_EVALUATIONS_PER_PIECE),
                path=path,
            )
        except _Stopped:
            continue
        return result, runs


def is_same(first: LapqResult, second: LapqResult) -> bool:
    """Whether two searches ended at the same bits."""
    for name, value in first.parameters.items():
        if not torch.equal(value, second.parameters[name]):
            return False
    is_equal: bool = first.loss == second.loss and first.evaluations == second.evaluations
    return is_equal


def bench_lapq(
    *,
    bits: PositiveInt = 4,
    maxiter: PositiveInt = 1,
    init_mode: tuple[str, ...] = ("NONE", "AVG", "LAPLACE", "L2"),
    epochs: PositiveInt = 20,
    seed: UInt32 = 0,
    json: Path | None = None,
) -> int:
    """Print losses and accuracies; the exit status is 1 if a loss does not fall or a search is not reproduced.

    Args:
        bits: Bits of weights and activations.
        maxiter: Iterations of Powell's method.
        init_mode: Where LAPQ starts.
        epochs: Epochs of the training in float.
        seed: Seed of the training.
        json: Also write the figures to this file.
    """
    digits = Digits(seed, epochs)
    loss = SubsetLoss(digits.batches)
    rows = [Row("float", loss(digits.net), digits.measure(digits.net))]
    checks: dict[str, bool] = {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in init_mode:
            searched = search(digits, bits, mode, maxiter)
            rows.append(searched.row)
            name, result = searched.row.name, searched.result
            checks[f"{name}: the loss falls"] = result.loss < result.start_loss
            checks[f"{name}: the model is at the best point"] = loss(searched.net) == result.loss
            if mode == init_mode[0]:
                path = Path(folder) / "lapq.jsonl"
                resumed, runs = search_in_pieces(digits, bits, searched.options, path)
                checks[f"{name}: {runs} runs end at the same bits"] = is_same(resumed, result)

        quantizer = digits.make_quantizer(bits)
        greedy = ptq_greedy_search(quantizer, digits.example, digits.batches, folder)
        accuracy = digits.measure(quantizer.model)
        rows.append(Row(f"W{bits}A{bits} greedy", greedy.loss, accuracy))
        again = read_post_training(greedy.config).build(copy.deepcopy(digits.net))
        again.prepare_model(digits.example)
        checks["greedy: the configuration gives the same loss"] = loss(again.model) == greedy.loss

    print_report(rows, checks)
    if json:
        content = {
            "rows": [asdict(row) for row in rows],
            "checks": checks,
            "choices": greedy.choices,
            "environment": describe_environment(),
        }
        write_json(json, content)
    return 0 if all(checks.values()) else 1


def print_report(rows: list[Row], checks: dict[str, bool]) -> None:
    """Print the table and what was checked."""
    print(f"{'':24}{'loss':>19}{'top-1, %':>19}{'evaluations':>13}")
    for row in rows:
        losses = describe_change(row.start_loss, row.loss, 4)
        accuracies = describe_change(row.start_accuracy, row.accuracy, 2)
        print(f"{row.name:24}{losses:>19}{accuracies:>19}{row.evaluations or '':>13}")
    for text, is_true in checks.items():
        print(f"{'yes' if is_true else 'NO '} {text}")


def describe_change(start: float | None, end: float, digits: int) -> str:
    """`0.1589 -> 0.0206`, or the end alone."""
    text = f"{end:.{digits}f}"
    return text if start is None else f"{start:.{digits}f} -> {text}"


if __name__ == "__main__":
    run_command(bench_lapq)
