"""Optimization profiles: the smallest, usual and largest shape of every dynamic input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from qdq.errors import ArgumentError

Shape = tuple[int, ...]
Dimensions = Sequence[int | None]  # None for a dynamic one
Profile = dict[str, Shape]  # "min", "opt" and "max"

DEFAULT_BATCH = {"min": 1, "opt": 8, "max": 16}


def parse_shapes(text: str) -> dict[str, Shape]:
    """Shapes in the syntax of trtexec, `x:1x3x224x224,mask:1x77`, as input name -> dimensions.

    Raises:
        ArgumentError: Another syntax, a dimension below 1, or an input named twice.
    """
    shapes: dict[str, Shape] = {}
    for part in text.split(","):
        # The last colon ends the name, which may contain others ("input:0").
        name, _, sizes = part.strip().rpartition(":")
        shape = _parse_sizes(sizes)
        if not name or shape is None:
            raise ArgumentError(
                f"{part.strip()!r} is not a shape: expected INPUT:DIMxDIM... with dimensions of at least 1.",
                "write for example x:1x3x224x224, several inputs with commas between.",
            )
        if name in shapes:
            raise ArgumentError(f"input {name!r} has two shapes in {text!r}.", "give it one.")
        shapes[name] = shape
    return shapes


def _parse_sizes(text: str) -> Shape | None:
    """`1x3x224x224` as numbers; None for another form."""
    shape = []
    for size in text.split("x"):
        if not size.isdecimal() or int(size) < 1:
            return None
        shape.append(int(size))
    return tuple(shape)


def choose_profiles(
    inputs: Mapping[str, Dimensions], requests: Mapping[str, Mapping[str, Sequence[int]]]
) -> dict[str, Profile]:
    """The optimization profile of every input that has a dynamic dimension.

    If only the first dimension, the batch, is dynamic and no shape is requested, `DEFAULT_BATCH` applies. If one or two
    shapes of an input are requested, the missing `opt` is its largest, and the missing `min` and `max` are its `opt`.

    Args:
        inputs: Input name -> dimensions, None for a dynamic one.
        requests: `min`, `opt` and `max` -> input name -> dimensions.

    Returns:
        Input name -> `min`, `opt` and `max`; static inputs are left out.

    Raises:
        ArgumentError: A dynamic dimension without a shape (L26), an unknown input, or shapes that
            contradict the graph or one another.
    """
    _require_known_inputs(inputs, requests)
    profiles = {}
    for name, dimensions in inputs.items():
        requested: Profile = {}
        for kind, shapes in requests.items():
            if name in shapes:
                requested[kind] = tuple(shapes[name])
                _require_fit(name, dimensions, kind, requested[kind])
        if None in dimensions:
            profiles[name] = _complete(name, dimensions, requested)
    return profiles


def _require_known_inputs(
    inputs: Mapping[str, Dimensions], requests: Mapping[str, Mapping[str, Sequence[int]]]
) -> None:
    for kind, shapes in requests.items():
        unknown = sorted(set(shapes) - set(inputs))
        if unknown:
            raise ArgumentError(
                f"--{kind}-shapes names {', '.join(unknown)}, which are not inputs of the graph.",
                f"its inputs are {_list_inputs(inputs)}.",
            )


def _require_fit(name: str, dimensions: Dimensions, kind: str, shape: Shape) -> None:
    if not _fits(shape, dimensions):
        raise ArgumentError(
            f"--{kind}-shapes {name}:{_format_shape(shape)} does not fit input {name} of shape "
            f"{_format_shape(dimensions)}.",
            "keep the number of dimensions and every fixed one; put a size of at least 1 for each '?'.",
        )


def _fits(shape: Shape, dimensions: Dimensions) -> bool:
    """Whether a shape has the rank and the static dimensions, and nothing below 1."""
    if len(shape) != len(dimensions):
        return False
    for size, dimension in zip(shape, dimensions, strict=True):
        if size < 1 or dimension not in (None, size):
            return False
    return True


def _complete(name: str, dimensions: Dimensions, requested: Mapping[str, Shape]) -> Profile:
    """All three shapes of one dynamic input."""
    if requested:
        opt = requested.get("opt") or requested.get("max") or requested["min"]
        profile = {"min": requested.get("min", opt), "opt": opt, "max": requested.get("max", opt)}
    else:
        profile = _default_profile(name, dimensions)
    ordered = zip(profile["min"], profile["opt"], profile["max"], strict=True)
    if not all(low <= usual <= high for low, usual, high in ordered):
        raise ArgumentError(
            f"shapes of input {name} are not in order: min {_format_shape(profile['min'])}, "
            f"opt {_format_shape(profile['opt'])}, max {_format_shape(profile['max'])}.",
            "choose them so that min <= opt <= max in every dimension.",
        )
    return profile


def _default_profile(name: str, dimensions: Dimensions) -> Profile:
    """The default batches of an input that is dynamic only in the batch."""
    if None in dimensions[1:]:
        example = _format_shape([size or 1 for size in dimensions])
        raise ArgumentError(
            f"input {name} of shape {_format_shape(dimensions)} has a dynamic dimension besides the batch, but no "
            "shapes (L26).",
            f"give its sizes, for example --min-shapes {name}:{example}, --opt-shapes and --max-shapes likewise.",
        )
    sample = [size for size in dimensions[1:] if size is not None]
    return {kind: (batch, *sample) for kind, batch in DEFAULT_BATCH.items()}


def _list_inputs(inputs: Mapping[str, Dimensions]) -> str:
    texts = [f"{name} {_format_shape(dimensions)}" for name, dimensions in inputs.items()]
    return ", ".join(texts) or "none"


def _format_shape(dimensions: Dimensions) -> str:
    sizes = ["?" if size is None else str(size) for size in dimensions]
    return "x".join(sizes) or "scalar"
