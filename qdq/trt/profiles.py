"""Optimization profiles: the smallest, usual and largest shape of every dynamic input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qdq.errors import ArgumentError

Shape = tuple[int, ...]
Profile = dict[str, Shape]  # "min", "opt" and "max"

DEFAULT_BATCH = {"min": 1, "opt": 8, "max": 16}


def parse_shapes(text: str) -> dict[str, Shape]:
    """Shapes in the syntax of trtexec, `x:1x3x224x224,mask:1x77`, as input name -> dimensions.

    Raises:
        ArgumentError: Not that syntax, a dimension below 1, or an input named twice.
    """
    shapes: dict[str, Shape] = {}
    for part in text.split(","):
        name, colon, dims = part.strip().rpartition(
            ":"
        )  # the last colon: a name may hold others ("input:0")
        sizes = dims.split("x")
        if not colon or not name or not all(size.isdecimal() and int(size) > 0 for size in sizes):
            raise ArgumentError(
                f"{part.strip()!r} is no shape: expected INPUT:DIMxDIM... with dimensions of at least 1.",
                "write for example x:1x3x224x224, several inputs with commas between.",
            )
        if name in shapes:
            raise ArgumentError(f"input {name!r} has two shapes in {text!r}.", "give it one.")
        shapes[name] = tuple(map(int, sizes))
    return shapes


def solve_profiles(
    inputs: Mapping[str, Sequence[int | None]], given: Mapping[str, Mapping[str, Sequence[int]]]
) -> dict[str, Profile]:
    """The optimization profile of every input that has a dynamic dimension.

    Where only the first dimension, the batch, is dynamic and nothing is given, `DEFAULT_BATCH` holds. Of an
    input with one or two shapes given, the missing `opt` is its largest and the missing `min` and `max`
    are its `opt`.

    Args:
        inputs: Input name -> dimensions, None for a dynamic one.
        given: `min`, `opt` and `max` -> input name -> dimensions.

    Returns:
        Input name -> `min`, `opt` and `max`; static inputs are left out.

    Raises:
        ArgumentError: A dynamic dimension without a shape (L26), an unknown input, or shapes that
            contradict the graph or one another.
    """
    for kind, shapes in given.items():
        if unknown := sorted(set(shapes) - set(inputs)):
            raise ArgumentError(
                f"--{kind}-shapes names {', '.join(unknown)}, which the graph has not as input.",
                f"its inputs are {_list_inputs(inputs)}.",
            )
    profiles = {}
    for name, dims in inputs.items():
        chosen = {kind: tuple(shapes[name]) for kind, shapes in given.items() if name in shapes}
        for kind, shape in chosen.items():
            _check_fits(name, dims, kind, shape)
        if None in dims:
            profiles[name] = _complete(name, dims, chosen)
    return profiles


def _list_inputs(inputs: Mapping[str, Sequence[int | None]]) -> str:
    return ", ".join(f"{name} {_show(dims)}" for name, dims in inputs.items()) or "none"


def _show(dims: Sequence[int | None]) -> str:
    return "x".join("?" if dim is None else str(dim) for dim in dims) or "scalar"


def _check_fits(name: str, dims: Sequence[int | None], kind: str, shape: Shape) -> None:
    """Same rank, same static dimensions, nothing below 1."""
    fits = len(shape) == len(dims) and all(
        size >= 1 and dim in (None, size) for dim, size in zip(dims, shape, strict=True)
    )
    if not fits:
        raise ArgumentError(
            f"--{kind}-shapes {name}:{_show(shape)} does not fit input {name} of shape {_show(dims)}.",
            "keep the number of dimensions and every fixed one; put a size of at least 1 for each '?'.",
        )


def _complete(name: str, dims: Sequence[int | None], chosen: Mapping[str, Shape]) -> Profile:
    """All three shapes of one dynamic input."""
    if chosen:
        opt = chosen.get("opt") or chosen.get("max") or chosen["min"]
        profile = {"min": chosen.get("min", opt), "opt": opt, "max": chosen.get("max", opt)}
    elif None in dims[1:]:
        raise ArgumentError(
            f"input {name} of shape {_show(dims)} is dynamic beside the batch, and has no shapes (L26).",
            f"give its sizes, for example --min-shapes {name}:{_show([d or 1 for d in dims])}, "
            "--opt-shapes and --max-shapes likewise.",
        )
    else:
        rest = tuple(dim for dim in dims[1:] if dim is not None)
        profile = {kind: (batch, *rest) for kind, batch in DEFAULT_BATCH.items()}
    ordered = zip(profile["min"], profile["opt"], profile["max"], strict=True)
    if not all(low <= usual <= high for low, usual, high in ordered):
        raise ArgumentError(
            f"shapes of input {name} are not in order: min {_show(profile['min'])}, "
            f"opt {_show(profile['opt'])}, max {_show(profile['max'])}.",
            "choose them so that min <= opt <= max in every dimension.",
        )
    return profile
