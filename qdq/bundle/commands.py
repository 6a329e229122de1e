"""The trtexec commands of a bundle, as a shell file that `verify.sh` reads."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qdq.bundle.models import FLOAT, HALF_FLOAT, HALF_MODEL, MODEL
from qdq.graph.coverage import LayerCoverage
from qdq.product_types import LOW_TYPES, list_low_types, word_of
from qdq.trt.flags import (
    COMPARED_TYPES,
    HALF_SCALES,
    HIGHEST_OPSET_OF_8,
    REFERENCES,
    STRONG_TYPES,
    Version,
)
from qdq.trt.profiles import Profile
from qdq.trt.trtexec import Pair, build_flags, reference_flags, run_flags

RESULTS = Path("results")
"""The folder on the target that gets what trtexec writes."""

FLOAT_ENGINE = RESULTS / "float.plan"

_RELEASES: Mapping[str, Version] = {
    "8.6": (8, 6),
    "10": (10, 0),
    "11.0": STRONG_TYPES,
    "11.1": REFERENCES,
}
"""Name of a release in the shell file -> the oldest version that it serves."""


@dataclass(frozen=True)
class BundleFacts:
    """What the commands depend on.

    Args:
        opsets: Name of each ONNX file -> its opset.
        profiles: Dynamic input -> `min`, `opt` and `max` shape.
        pairs: The files of each pair.
        most_l2: Output name -> the mean squared difference at which trtexec shall fail.
        output_types: Output name -> its type, by numpy's name.
        has_long_inputs: Whether an input is int64.
        types: The types below 16 bit in which products are expected, by TensorRT's names; int8 if there are none.
        least_sm: Lowest compute capability that has the types of the file, 89 for 8.9; 0 if every GPU has them.
    """

    opsets: Mapping[str, int]
    profiles: Mapping[str, Profile]
    pairs: Sequence[Pair]
    most_l2: Mapping[str, float]
    output_types: Mapping[str, str]
    has_long_inputs: bool
    types: Sequence[str] = ("Int8",)
    least_sm: int = 0

    @property
    def engine(self) -> str:
        """Name of the quantized engine, its step and its files: its types, such as "int8" or "int8-FP8"."""
        return "-".join(map(word_of, self.types))

    @property
    def has_only_int8(self) -> bool:
        """Whether `--int8` before TensorRT 11 allows all types of the file."""
        return list(self.types) == ["Int8"]


def write_commands(facts: BundleFacts) -> str:
    """The text of `commands.sh`.

    It sets `releases`, `comparing` (those whose trtexec compares outputs), `engine`, `least_sm` and the numbers of
    pairs and outputs. Of its functions, `name_output NUMBER` and `type_output NUMBER` print a name and its type,
    `refuse RELEASE` why a release cannot be used, `has_step RELEASE STEP` says whether there is a command, and
    `run_step RELEASE STEP` runs it.
    """
    comparing = [name for name, version in _RELEASES.items() if version >= REFERENCES]
    types = [facts.output_types[name] for name in facts.most_l2]
    lines = [
        "# Made by qdq from its table of the flags that each trtexec takes; verify.sh reads it.",
        f"releases={shlex.quote(_join_versions())}",
        f"comparing={shlex.quote(' '.join(comparing))}",
        f"engine={shlex.quote(facts.engine)}",
        f"least_sm={facts.least_sm}",
        f"pairs={len(facts.pairs)}",
        f"outputs={len(facts.most_l2)}",
        "",
        *_print_by_number("name_output", list(facts.most_l2)),
        *_print_by_number("type_output", types),
        "refuse() {",
        '  case "$1" in',
        *_list_refusals(facts),
        "  esac",
        "}",
        "",
        "run_step() {",
        '  case "$1 $2" in',
    ]
    patterns = []
    for name, version in _RELEASES.items():
        if _find_refusal(facts, version):
            continue
        for step, flags in _list_steps(facts, version).items():
            pattern = shlex.quote(f"{name} {step}")
            patterns.append(pattern)
            lines.append(_case(pattern, f'"$trtexec" {shlex.join(flags)}'))
    lines += ["  esac", "}", "", "has_step() {", '  case "$1 $2" in']
    lines += [_case(pattern, "return 0") for pattern in patterns]
    return "\n".join([*lines, "  esac", "  return 1", "}", ""])


def _print_by_number(function: str, texts: Sequence[str]) -> list[str]:
    """A shell function that prints the text of a number."""
    cases = [_case(str(i), f"echo {shlex.quote(text)}") for i, text in enumerate(texts)]
    return [f"{function}() {{", '  case "$1" in', *cases, "  esac", "}", ""]


def _case(pattern: str, command: str) -> str:
    return f"    {pattern}) {command} ;;"


def _join_versions() -> str:
    """`80600:8.6 100000:10 ...`: the oldest version of each release as one number, newest last."""
    parts = []
    for name, (major, minor) in _RELEASES.items():
        parts.append(f"{10000 * major + 100 * minor}:{name}")
    return " ".join(parts)


def _list_refusals(facts: BundleFacts) -> list[str]:
    lines = []
    for name, version in _RELEASES.items():
        reason = _find_refusal(facts, version)
        if reason:
            lines.append(_case(name, f"echo {shlex.quote(reason)}"))
    return lines or ["    *) ;;"]


def _find_refusal(facts: BundleFacts, version: Version) -> str:
    """Why a version cannot build the files of a bundle; empty if it can."""
    if version >= HALF_SCALES:
        return ""
    if not facts.has_only_int8:
        return f"TensorRT before 10 has no {facts.engine}; use 10 or later."
    if MODEL not in facts.opsets:
        return (
            "TensorRT 8.6 has no float16 scales; make the bundle from a run with --precision fp32."
        )
    if facts.opsets[MODEL] > HIGHEST_OPSET_OF_8:
        return (
            f"TensorRT 8.6 reads Q/DQ up to opset {HIGHEST_OPSET_OF_8}, and {MODEL} has opset "
            f"{facts.opsets[MODEL]}, because an older one cannot express it."
        )
    if facts.has_long_inputs:
        return "TensorRT 8.6 takes int64 inputs as int32, and the files in inputs/ are int64."
    return ""


def list_types(layers: Sequence[LayerCoverage]) -> list[str]:
    """The types below 16 bit that a file promises, by TensorRT's names; int8 if there are none."""
    promised = [layer.promised for layer in layers if layer.promised in LOW_TYPES]
    return list_low_types(promised)


def choose_model(
    files: Collection[str], version: Version, *, has_only_int8: bool
) -> tuple[str, bool]:
    """The file of a bundle that a version builds, and whether the types of the graph decide there.

    Args:
        files: Names of the ONNX files in the bundle.
        version: Major and minor version of TensorRT.
        has_only_int8: As for `BundleFacts`.
    """
    has_flags = version < STRONG_TYPES and has_only_int8 and MODEL in files
    is_half = HALF_MODEL in files and not has_flags
    return HALF_MODEL if is_half else MODEL, is_half or not has_only_int8


def _list_steps(facts: BundleFacts, version: Version) -> dict[str, list[str]]:
    """Name of a step -> the flags of its command."""
    model, is_typed = choose_model(facts.opsets, version, has_only_int8=facts.has_only_int8)
    is_half = model == HALF_MODEL
    unquantized = HALF_FLOAT if is_half else FLOAT
    engine = RESULTS / f"{facts.engine}.plan"
    steps = {facts.engine: build_flags(Path(model), engine, facts.profiles, version, half=is_typed)}
    if unquantized in facts.opsets:
        steps["float"] = build_flags(
            Path(unquantized), FLOAT_ENGINE, facts.profiles, version, half=is_half, quantized=False
        )
    for number, pair in enumerate(facts.pairs):
        path = RESULTS / f"outputs.{number}.json"
        steps[f"outputs.{number}"] = run_flags(engine, pair, path, version)
    if version < REFERENCES:
        return steps
    for position, (output, most_l2) in enumerate(facts.most_l2.items()):
        if facts.output_types[output] not in COMPARED_TYPES:
            continue
        for shape_number, group in enumerate(_group_by_shape(facts.pairs)):
            step = f"references.{position}.{shape_number}"
            steps[step] = reference_flags(engine, group, output, most_l2, version)
    return steps


def _group_by_shape(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Pairs of the same shapes, which one call of trtexec can run."""
    groups: dict[str, list[Pair]] = {}
    for pair in pairs:
        groups.setdefault(str(sorted(pair.shapes.items())), []).append(pair)
    return list(groups.values())
