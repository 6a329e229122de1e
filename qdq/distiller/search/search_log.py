"""The lines that LAPQ prints, in Distiller's words, and its progress bar."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import TracebackType

from tqdm import tqdm

from qdq.distiller.search.minimize import Listener

logger = logging.getLogger(__name__)

INITIALIZING_QUANTIZER = "Initializing quantizer..."
INITIALIZING_PARAMETERS = "Initializing quantization parameters..."
EVALUATING_INITIAL = "Evaluating initial quantization score..."
INITIAL_LOSS = "Evaluation set loss after initialization %.3f"
EVALUATING_TEST = "Evaluating on full test set..."
METHOD = 'Using "%s" minimization algorithm.'
EVALUATIONS = "%d evaluations: loss=%.3f"
ITERATION = "Iteration %d: \t Score=%.3f"
SAVING_BEST = "Saving current best quantization parameters."
DONE = "Optimization done"
BEST_SCORE = "Best score: %s"
BEST_CONFIGURATION = "Best Configuration: %s"

_EVALUATIONS_PER_LINE = 20


def format_test(results: Mapping[str, float]) -> str:
    """The line of a test: `Test: Top1 = 91.250, Loss = 0.312`.

    Args:
        results: Name -> value, in the order of the line.
    """
    parts = [f"{name} = {value:.3f}" for name, value in results.items()]
    return "Test: " + ", ".join(parts)


class SearchLog(Listener):
    """Shows a search: a bar, a line every 20 evaluations and lines after each iteration. A with-block ends the bar.

    Args:
        start_loss: The loss at the start.
        limit: Most evaluations; None: unknown.
    """

    def __init__(self, start_loss: float, limit: int | None) -> None:
        self._saved_loss = start_loss
        self._num_iterations = 0
        self._progress = tqdm(total=limit, desc="lapq", unit="evaluation", disable=None)

    def __enter__(self) -> SearchLog:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._progress.close()

    def evaluated(self, count: int, loss: float, best_loss: float) -> None:
        """See `Listener`."""
        self._progress.set_postfix_str(f"best loss {best_loss:.4f}", refresh=False)
        self._progress.update()
        if count % _EVALUATIONS_PER_LINE == 0:
            logger.info(EVALUATIONS, count, loss)

    def iterated(self, loss: float, best_loss: float) -> None:
        """See `Listener`."""
        self._num_iterations += 1
        logger.info(ITERATION, self._num_iterations, loss)
        if best_loss < self._saved_loss:
            self._saved_loss = best_loss
            logger.info(SAVING_BEST)
