"""How LAPQ searches: its options under the names of Distiller's command line, without their `lapq_`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qdq.distiller.ranges.clipping import ClipMode
from qdq.errors import ArgumentError, ArgumentTypeError

METHODS = ("Powell", "Nelder-Mead", "COBYLA", "COBYQA")
"""The methods of scipy that need no gradient: the loss is a step function of the scales, which has none."""

INIT_NORMS = {"L1": 1, "L2": 2, "L3": 3}
"""Initialisation by the smallest error of each layer -> the power p of its mean |y - yq|^p."""

INIT_CLIPS = (ClipMode.NONE, ClipMode.AVG, ClipMode.LAPLACE, ClipMode.GAUSS)
"""Clip modes that an initialisation may use; N_STD has no number of deviations here."""


@dataclass(frozen=True)
class MinimizeOptions:
    """How scipy searches.

    Args:
        maxiter: Most iterations of the method, of each hop with basin hopping; None: the limit of scipy.
        maxfev: Most evaluations of the loss in the whole search; None: no limit.
        method: The method of `scipy.optimize.minimize`: Powell, Nelder-Mead, COBYLA or COBYQA.
        basinhopping: Go on from random points near each minimum.
        basinhopping_niter: Number of those points.
        seed: Seed of the points.

    Raises:
        ArgumentError: A number out of range or an unknown method.
        ArgumentTypeError: A count that is no integer.
    """

    maxiter: int | None = None
    maxfev: int | None = None
    method: str = "Powell"
    basinhopping: bool = False
    basinhopping_niter: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("maxiter", "maxfev"):
            if getattr(self, name) is not None:
                _require_count(name, getattr(self, name), 1)
        _require_count("basinhopping_niter", self.basinhopping_niter, 0)
        _require_count("seed", self.seed, 0)
        _require_choice("method", self.method, METHODS)


@dataclass(frozen=True)
class LapqOptions(MinimizeOptions):
    """How LAPQ searches.

    Args:
        maxiter: See `MinimizeOptions`, as for the options up to `seed`.
        init_mode: Where the search starts: the scales of a clip mode (NONE, AVG, LAPLACE, GAUSS), or those with the
            smallest mean |y - yq|^p of each layer's output (L1, L2, L3).
        init_method: The method of scipy for L1, L2, L3.
        eval_size: Fraction of the batches that the loss is measured on, above 0 to 1.
        eval_memoize_dataloader: Keep these batches in memory.
        search_clipping: Search the ends of ranges instead of scales.

    Raises:
        ArgumentError: A number out of range, an unknown method or mode.
        ArgumentTypeError: A count that is no integer, a fraction that is no number.
    """

    init_mode: str = "NONE"
    init_method: str = "Powell"
    eval_size: float = 1.0
    eval_memoize_dataloader: bool = False
    search_clipping: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_choice("init_method", self.init_method, METHODS)
        clips = [clip.name for clip in INIT_CLIPS]
        _require_choice("init_mode", self.init_mode, (*clips, *INIT_NORMS))
        _require_fraction("eval_size", self.eval_size)


def _require_count(name: str, value: Any, lowest: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(
            f"{name} is {value!r}, a {type(value).__name__}.", "give an integer."
        )
    if value < lowest:
        raise ArgumentError(f"{name} is {value}; expected {lowest} or more.", f"correct {name}.")


def _require_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ArgumentError(
            f"{name} is {value!r}; expected {', '.join(choices)}.", "choose one of these."
        )


def _require_fraction(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ArgumentTypeError(
            f"{name} is {value!r}, a {type(value).__name__}.", "give a number above 0, up to 1."
        )
    if not 0 < value <= 1:
        raise ArgumentError(
            f"{name} is {value}; expected a fraction above 0, up to 1.", f"correct {name}."
        )
