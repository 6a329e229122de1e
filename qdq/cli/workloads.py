"""Options that name the data and the outputs of a workload on the command line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cyclopts import Parameter

from qdq.errors import ArgumentError

DATA_FLAG = Parameter(name=("--data", "--data-dir"))
"""`--data-dir` is what torchvision and timm call a folder of images."""


@Parameter(name="*")  # --mask, not --output-options.mask
@dataclass(frozen=True)
class OutputOptions:
    """Which outputs of a model count, where, and how much.

    Args:
        outputs: Names of the outputs that count; all by default.
        mask: Name of the input that is 0 at padding, such as attention_mask; padding counts in no figure.
        output_weights: NAME=WEIGHT for each output that decides; by default the worst output decides.
    """

    outputs: tuple[str, ...] = ()
    mask: str | None = None
    output_weights: tuple[str, ...] = ()

    def as_arguments(self) -> dict[str, Any]:
        """The arguments of `WorkloadOptions`.

        Raises:
            ArgumentError: A weight that is not NAME=WEIGHT.
        """
        return {
            "outputs": {name: name for name in self.outputs} or None,
            "mask": self.mask,
            "output_weights": parse_numbers("--output-weights", self.output_weights),
        }


def list_named_files(model: str, data: Path | None, metric: str | None) -> list[Path]:
    """The files that the options of a workload read: without prefixes, and without the function after a colon.

    Args:
        model: The option `--model`.
        data: The option `--data`.
        metric: The option `--metric`.
    """
    files = []
    for option in (model, data, metric):
        if option is None:
            continue
        path = str(option).removeprefix("yolo/").removeprefix("hf/")
        file, separator, _ = path.rpartition(":")
        files.append(Path(file if separator else path))
    return files


def parse_numbers(option: str, texts: tuple[str, ...]) -> Mapping[str, float] | None:
    """NAME=VALUE for each of several outputs or metrics; None without any.

    Args:
        option: The option, for messages.
        texts: Its values.

    Raises:
        ArgumentError: Anything else.
    """
    if not texts:
        return None
    numbers = {}
    for text in texts:
        name, _, number = text.rpartition("=")
        if not name or name in numbers:
            raise ArgumentError(
                f"invalid value for {option}: {', '.join(texts)}.",
                "give NAME=VALUE once for each name.",
            )
        numbers[name] = parse_number(option, number)
    return numbers


def parse_number(option: str, text: str) -> float:
    """A number from the command line.

    Args:
        option: The option, for messages.
        text: Its value.

    Raises:
        ArgumentError: It is none.
    """
    try:
        return float(text)
    except ValueError:
        raise ArgumentError(
            f"invalid value for {option}: {text!r} is not a number.", "give one, for example 20."
        ) from None
