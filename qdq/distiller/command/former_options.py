"""Options of Distiller's sample that `compress_classifier.py` knows by name, to say what to use in their place."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated

from cyclopts import Parameter

from qdq.errors import ArgumentError

_PRUNING = (
    "quantize only; prune the model before, and pass its checkpoint to --exp-load-weights-from."
)
_SENSITIVITY = "use qdq ptq, which measures how sensitive each layer is."

FIXES = {
    "resume": "use --resume-from.",
    "reset_optimizer": "use --exp-load-weights-from, which takes the weights alone.",
    "activation_stats": "use --qe-calibration 0.05, which saves statistics of each layer.",
    "masks_sparsity": _PRUNING,
    "param_hist": "use qdq calibrate show on the statistics of qdq ptq.",
    "summary": "use qdq explain on a run folder of qdq ptq.",
    "sense": _SENSITIVITY,
    "sense_range": _SENSITIVITY,
    "confusion": "compare the labels of your images with qdq.predict.",
    "num_best_scores": "read the accuracy of each epoch in the log file.",
    "load_serialized": "pass the state dict; a file that contains code is never run.",
    "thinnify": _PRUNING,
    "kd_teacher_wt": "use --kd-student-wt, the weight of the labels.",
}
"""Field -> what to use in its place."""

Values = tuple[str, ...] | None


@Parameter(name="*", show=False)
@dataclass(frozen=True)
class FormerOptions:
    """Options that are refused, with what to use in their place; see `FIXES`."""

    resume: Values = None
    reset_optimizer: bool = False
    activation_stats: Annotated[Values, Parameter(alias="--act-stats")] = None
    masks_sparsity: bool = False
    param_hist: bool = False
    summary: Values = None
    sense: Values = None
    sense_range: Values = None
    confusion: bool = False
    num_best_scores: Values = None
    load_serialized: bool = False
    thinnify: bool = False
    kd_teacher_wt: Annotated[Values, Parameter(alias="--kd-tw")] = None

    def refuse(self) -> None:
        """Refuse the first of these options that is given.

        Raises:
            ArgumentError: One is.
        """
        for option in fields(self):
            if getattr(self, option.name) not in (None, False):
                name = option.name.replace("_", "-")
                raise ArgumentError(f"--{name} is not an option here.", FIXES[option.name])
