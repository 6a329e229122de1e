"""Statistics of all tensors of a model: in one file, merged exactly, solved again without data. Needs no torch."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, ClassVar

import numpy as np
from annotated_types import Ge
from safetensors import SafetensorError
from safetensors import numpy as safetensors
from tqdm import tqdm

from qdq.errors import ArgumentError, DataError
from qdq.files import as_path, read_file, write_atomic, write_json
from qdq.formats import Format
from qdq.observers.solve import SOLVERS, solve_amax
from qdq.observers.tensor_statistics import TensorStatistics
from qdq.schema import digest_parts, parse_json, validate
from qdq.text import list_names, printable

logger = logging.getLogger(__name__)

_SUMMARY_KEYS = {"batches", "complete", "tensors"}
STATISTICS_FORMAT = "qdq calibration statistics 1"
_FIX = "give a file that calibration saved, or collect the statistics again."
_SEPARATOR = "//"  # between the name of a quantizer and that of an array


@dataclass(frozen=True, eq=False)
class Statistics:
    """What calibration collected of a model, see `collect_statistics`.

    Args:
        tensors: Name of the quantizer -> statistics of what it quantizes.
        formats: Name of the quantizer -> its format; None for one that is no integer format.
        batches: How many batches were taken.
        model: Fingerprint of the model: names, formats and shapes.
        data: Digest of the weights and the first batch; "" if it is not known, or there was none.
        complete: Whether the pass came to its end.
        limit: How many batches the pass was to take at most; None: all.
        shared: Name of a quantizer that uses the range of another -> name of that one, which is in `tensors`.
    """

    tensors: dict[str, TensorStatistics]
    formats: dict[str, Format | None]
    batches: int = 0
    model: str = ""
    data: str = ""
    complete: bool = True
    limit: int | None = None
    shared: dict[str, str] = field(default_factory=dict)

    def merge(self, other: Statistics) -> Statistics:
        """What one pass over the batches of both, those of `other` last, would have collected.

        Raises:
            ArgumentError: They are of different models.
        """
        numbers = [
            int(tensor.numbers[-1]) + 1 for tensor in self.tensors.values() if tensor.num_batches
        ]
        shift = max([self.batches, *numbers])
        moved = {name: tensor.shifted(shift) for name, tensor in other.tensors.items()}
        return replace(
            merge_parts([self, replace(other, tensors=moved)]), limit=None
        )  # no one pass took them

    def select(self, pattern: str) -> Statistics:
        """Those of the tensors whose quantizer has a name that fits.

        Args:
            pattern: A name, or a glob such as "layer1.*".

        Raises:
            ArgumentError: None fits.
        """
        tensors = {
            name: tensor for name, tensor in self.tensors.items() if fnmatchcase(name, pattern)
        }
        if not tensors:
            raise ArgumentError(
                f"no tensor fits {pattern!r}; there are {list_names(list(self.tensors), 3)}.",
                "give the name of a quantizer, or a glob such as '*._input_quantizer'.",
            )
        shared = {name: leader for name, leader in self.shared.items() if leader in tensors}
        return replace(
            self,
            tensors=tensors,
            formats={name: self.formats[name] for name in tensors},
            shared=shared,
        )

    def solve(self, name: str, method: str = "mse", **options: Any) -> float:
        """The range of one tensor; see `observers.solve.solve_amax`.

        Raises:
            ArgumentError: No such quantizer, or as for `solve_amax`.
        """
        if name not in self.tensors:
            raise ArgumentError(
                f"there are no statistics of {name!r}.", f"choose one of {', '.join(self.tensors)}."
            )
        return solve_amax(self.tensors[name], self.formats[name] or Format(), method, **options)

    def solve_all(self, method: str = "mse", **options: Any) -> dict[str, float]:
        """The range of every tensor by name; of one without integer format its maximum, as in calibration.

        Raises:
            ArgumentError: As for `solve_amax`.
        """
        return {
            name: self.solve(name, method, **options) if fmt else self.solve(name, "max")
            for name, fmt in self.formats.items()
        }

    def clipped_share(self, name: str, amax: float) -> float:
        """Share of the values of a tensor beyond a range, see `TensorStatistics.clipped_share`."""
        fmt = self.formats[name]
        return self.tensors[name].clipped_share(amax, fmt is not None and fmt.unsigned)

    def summarize(self) -> dict[str, Any]:
        """What the JSON beside the file holds: figures of each tensor, and by every method amax and what it clips."""
        return {
            "batches": self.batches,
            "complete": self.complete,
            "tensors": {
                name: self._summarize_tensor(name)
                for name in tqdm(
                    self.tensors, desc="solve", unit="tensor", disable=None, leave=False
                )
            },
        }

    def _summarize_tensor(self, name: str) -> dict[str, Any]:
        tensor, fmt = self.tensors[name], self.formats[name]
        figures = (
            "count",
            "zeros",
            "num_batches",
            "low",
            "high",
            "absmax",
            "mean",
            "std",
            "laplace_b",
        )
        ranges = {method: self.solve(name, method) for method in (SOLVERS if fmt else ("max",))}
        return {
            **{figure: getattr(tensor, figure) for figure in figures},
            "format": None if fmt is None else asdict(fmt),
            "amax": ranges,
            "clipped": {method: self.clipped_share(name, amax) for method, amax in ranges.items()},
        }

    def save(self, path: Path | str) -> Path:
        """Write the file, and where the pass is complete a readable summary beside it (`.json`); both atomically.

        Args:
            path: Ends in `.safetensors`.

        Raises:
            ArgumentError: Another ending; the folder cannot be written to; a file that is no summary lies beside it.
        """
        path = require_suffix(path)
        require_place_of_summary(path)
        write_atomic(path, self.to_bytes())
        if self.complete:
            write_json(path.with_suffix(".json"), self.summarize())
        else:
            path.with_suffix(".json").unlink(missing_ok=True)  # of an earlier pass
        return path

    @classmethod
    def load(cls, path: Path | str) -> Statistics:
        """Read what `save` wrote.

        Raises:
            DataError: The file cannot be read, or is of another kind.
        """
        path = as_path(path, "path")
        try:
            content = read_file(path)
        except OSError as error:
            raise DataError(
                f"cannot read {path}: {error.strerror or error}.", "give a file that `save` wrote."
            ) from error
        return cls.from_bytes(content, str(path))

    def to_bytes(self) -> bytes:
        """The content of the file."""
        arrays = {
            f"{name}{_SEPARATOR}{part}": np.ascontiguousarray(array)
            for name, tensor in self.tensors.items()
            for part, array in tensor.to_arrays().items()
        }
        facts = {
            "batches": self.batches,
            "model": self.model,
            "data": self.data,
            "complete": self.complete,
            "limit": self.limit,
            "shared": self.shared,
            "formats": {
                name: None if fmt is None else asdict(fmt) for name, fmt in self.formats.items()
            },
        }
        facts["digest"] = _digest(facts, arrays)
        return safetensors.save(
            arrays, {STATISTICS_FORMAT: json.dumps(facts)}
        )  # one key: the order of several is random

    @classmethod
    def from_bytes(cls, content: bytes, source: str = "the content") -> Statistics:
        """The inverse of `to_bytes`.

        Args:
            content: What it returned.
            source: What the content was read from, for messages.

        Raises:
            DataError: The content is of another kind, or damaged.
        """
        try:
            arrays = safetensors.load(content)
        except (
            SafetensorError,
            ValueError,
            KeyError,
            TypeError,
        ) as error:  # types that numpy has not
            raise DataError(
                f"{source} is no file of calibration statistics: {printable(error, 100)}.", _FIX
            ) from error
        header = content[8 : 8 + int.from_bytes(content[:8], "little")].decode()
        metadata = parse_json(header, f"the header of {source}", _FIX).get("__metadata__", {})
        if STATISTICS_FORMAT not in metadata:
            raise DataError(
                f"{source} holds no calibration statistics: it lacks {STATISTICS_FORMAT!r}.", _FIX
            )
        facts = parse_json(metadata[STATISTICS_FORMAT], f"the metadata of {source}", _FIX)
        stored = validate(_StoredFacts, facts, source, _FIX)
        facts.pop("digest", None)
        if stored.digest is not None and stored.digest != _digest(facts, arrays):
            raise DataError(f"{source} is damaged: its digest is not that of its content.", _FIX)
        try:
            return cls(
                tensors=_split_parts(stored, arrays),
                formats={
                    name: Format(**asdict(fmt)) if fmt else None
                    for name, fmt in stored.formats.items()
                },
                batches=stored.batches,
                model=stored.model,
                data=stored.data,
                complete=stored.complete,
                limit=stored.limit,
                shared=stored.shared,
            )
        except ArgumentError as error:
            raise DataError(f"{source} is damaged: {error.message}", _FIX) from error


@dataclass(frozen=True)
class _StoredFormat:
    """A format as it stands in the file, with all of its fields."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    num_bits: int
    unsigned: bool
    narrow_range: bool


@dataclass(frozen=True)
class _StoredFacts:
    """What stands beside the arrays; files of earlier versions have no digest."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    batches: Annotated[int, Ge(0)]
    model: str
    data: str
    complete: bool
    limit: Annotated[int, Ge(0)] | None
    shared: dict[str, str]
    formats: dict[str, _StoredFormat | None]
    digest: str | None = None


def _digest(facts: dict[str, Any], arrays: dict[str, Any]) -> str:
    parts = {
        f"{name} {array.dtype} {array.shape}": array.reshape(-1).view(np.uint8)
        for name, array in arrays.items()
    }
    return digest_parts(facts, {name: array.data for name, array in parts.items()})


def _split_parts(stored: _StoredFacts, arrays: dict[str, Any]) -> dict[str, TensorStatistics]:
    """The arrays of each tensor.

    Raises:
        ArgumentError: An array is missing, too many or damaged, or a range is shared that is not there.
    """
    parts: dict[str, dict[str, Any]] = {name: {} for name in stored.formats}
    for key, array in arrays.items():
        name, _, part = key.rpartition(_SEPARATOR)
        if name not in parts:
            raise ArgumentError(f"'{printable(name)}' has statistics, but no format.", _FIX)
        parts[name][part] = array
    for name, leader in stored.shared.items():
        if leader not in parts:
            raise ArgumentError(
                f"'{printable(name)}' shares the range of '{printable(leader)}', which is not there.",
                _FIX,
            )
    tensors = {}
    for name, arrays_of_tensor in parts.items():
        try:
            tensors[name] = TensorStatistics.from_arrays(arrays_of_tensor)
        except ArgumentError as error:
            raise ArgumentError(f"'{printable(name)}': {error.message}", _FIX) from error
    return tensors


def merge_parts(parts: Iterable[Statistics]) -> Statistics:
    """The sum of parts whose batches are numbered apart, as those of several processes; exact in any order.

    Raises:
        ArgumentError: They are of different models, or batch numbers overlap.
    """
    merged, *others = parts
    for other in others:
        if other.model != merged.model or other.tensors.keys() != merged.tensors.keys():
            missing = sorted(merged.tensors.keys() ^ other.tensors.keys())
            raise ArgumentError(
                "the statistics are of different models"
                + (
                    f": only one has {', '.join(missing[:3])}."
                    if missing
                    else ", formats or shapes."
                ),
                "merge statistics that were collected with the same quantized model.",
            )
        merged = replace(
            merged,
            tensors={
                name: tensor.merge(other.tensors[name]) for name, tensor in merged.tensors.items()
            },
            batches=merged.batches + other.batches,
            data=merged.data or other.data,
            complete=merged.complete and other.complete,
        )
    return merged


def merge_files(paths: Sequence[Path | str], output: Path | str) -> Statistics:
    """Write the sum of files into one; see `Statistics.merge`.

    Args:
        paths: Two or more files of complete passes over different data.
        output: Where to write, ending in `.safetensors`; may be one of them.

    Raises:
        ArgumentError: Fewer than two files, a pass that is not complete, files of different models, another ending.
        DataError: A file cannot be read, or is of another kind.
    """
    require_suffix(output)
    require_place_of_summary(Path(output))
    if len(paths) < 2:
        raise ArgumentError(
            f"{len(paths)} file was given; merging takes two or more.", "name all files to merge."
        )
    merged = _load_complete(paths[0])
    first_batches = {merged.data: paths[0]}
    for path in paths[1:]:
        part = _load_complete(path)
        if part.data and part.data in first_batches:
            twin = first_batches[part.data]
            logger.warning(
                "%s and %s begin with the same batch; the same data would count twice", twin, path
            )
        first_batches[part.data] = path
        try:
            merged = merged.merge(part)
        except ArgumentError as error:
            raise ArgumentError(
                f"{path} does not fit {paths[0]}: {error.message}", error.fix
            ) from None
    merged.save(output)
    return merged


def _load_complete(path: Path | str) -> Statistics:
    found = Statistics.load(path)
    if not found.complete:
        raise ArgumentError(
            f"{path} holds a pass that was cut off after {found.batches} batches.",
            "run the same calibration again, it goes on from there; then merge.",
        )
    return found


def require_place_of_summary(path: Path) -> None:
    """Refuse a file of statistics beside which somebody else's JSON has the name of its summary.

    Raises:
        ArgumentError: It would be replaced.
    """
    summary = path.with_suffix(".json")
    try:
        content = json.loads(read_file(summary))
    except (OSError, ValueError, RecursionError):  # there is none, or it is damaged
        return
    if not isinstance(content, dict) or not content.keys() >= _SUMMARY_KEYS:
        raise ArgumentError(
            f"{summary} is no summary of statistics, and the one of {path.name} would replace it.",
            "choose another name.",
        )


def require_suffix(path: Path | str) -> Path:
    """Refuse a file name that does not end in `.safetensors`.

    Raises:
        ArgumentError: Another ending.
    """
    path = as_path(path, "path")
    if path.suffix != ".safetensors":
        raise ArgumentError(
            f"{path} does not end in .safetensors.", "name it calibration.safetensors, say."
        )
    return path
