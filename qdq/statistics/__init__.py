"""Statistics of all tensors of a model, in one file: merged exactly, and ranges without data. Needs no torch."""

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
from qdq.formats import Format, NumBits
from qdq.observers.solve import list_methods, solve_amax
from qdq.observers.tensor_statistics import TensorStatistics
from qdq.schema import digest_parts, parse_json, validate
from qdq.text import list_names, printable

logger = logging.getLogger(__name__)

_SUMMARY_KEYS = {"batches", "complete", "tensors"}
STATISTICS_FORMAT = "qdq calibration statistics 1"
_FIX = "give a file that calibration saved, or collect the statistics again."
# The last for types that numpy lacks.
_LOAD_ERRORS = (
    SafetensorError,
    ValueError,
    KeyError,
    TypeError,
)
_FIGURES = (
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
_SEPARATOR = "//"  # between the names of a quantizer and of an array


@dataclass(frozen=True, eq=False)
class Statistics:
    """The statistics that calibration collected, see `collect_statistics`.

    Args:
        tensors: Name of the quantizer -> statistics of the tensor that it quantizes.
        formats: Name of the quantizer -> its format; None if it is not an integer format.
        batches: Number of batches.
        model: Fingerprint of the model: names, formats and shapes.
        data: Digest of the weights and the first batch; "" if it is unknown, or there was no batch.
        complete: Whether the pass was finished.
        limit: Upper limit on the batches of the pass; None: no limit.
        shared: Name of a quantizer that uses the range of another one -> name of that one, which is in `tensors`.
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
        """The statistics of one pass over the batches of both, with the batches of `other` last.

        Raises:
            ArgumentError: They are of different models.
        """
        shift = self.batches
        for tensor in self.tensors.values():
            shift = max(shift, tensor.end_number)
        shifted = {}
        for name, tensor in other.tensors.items():
            shifted[name] = tensor.shifted(shift)
        merged = merge_parts([self, replace(other, tensors=shifted)])
        return replace(merged, limit=None)  # no single pass took all batches

    def select(self, pattern: str) -> Statistics:
        """The statistics of the tensors whose quantizer has a matching name.

        Args:
            pattern: A name, or a glob such as "layer1.*".

        Raises:
            ArgumentError: No name matches.
        """
        names = [name for name in self.tensors if fnmatchcase(name, pattern)]
        if not names:
            raise ArgumentError(
                f"no tensor matches {pattern!r}; there are {list_names(list(self.tensors), 3)}.",
                "give the name of a quantizer, or a glob such as '*._input_quantizer'.",
            )
        shared = {}
        for name, leader in self.shared.items():
            if leader in names:
                shared[name] = leader
        return replace(
            self,
            tensors={name: self.tensors[name] for name in names},
            formats={name: self.formats[name] for name in names},
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
        """The range of every tensor by name; without an integer format it is the maximum, as in calibration.

        Raises:
            ArgumentError: As for `solve_amax`.
        """
        ranges = {}
        for name, fmt in self.formats.items():
            if fmt:
                ranges[name] = self.solve(name, method, **options)
            else:
                ranges[name] = self.solve(name, "max")
        return ranges

    def clipped_share(self, name: str, amax: float) -> float:
        """Fraction of the values of a tensor outside a range, see `TensorStatistics.clipped_share`."""
        fmt = self.formats[name]
        return self.tensors[name].clipped_share(amax, fmt is not None and fmt.unsigned)

    def summarize(self) -> dict[str, Any]:
        """The content of the JSON file: the figures of each tensor, and the amax and clipping of every method."""
        names = tqdm(self.tensors, desc="ranges", unit="tensor", disable=None, leave=False)
        return {
            "batches": self.batches,
            "complete": self.complete,
            "tensors": {name: self._summarize_tensor(name) for name in names},
        }

    def _summarize_tensor(self, name: str) -> dict[str, Any]:
        tensor, fmt = self.tensors[name], self.formats[name]
        summary: dict[str, Any] = {figure: getattr(tensor, figure) for figure in _FIGURES}
        summary["format"] = _format_to_json(fmt)
        summary["amax"] = ranges = {}
        summary["clipped"] = fractions = {}
        methods = list_methods(fmt) if fmt else ["max"]
        for method in methods:
            ranges[method] = self.solve(name, method)
            fractions[method] = self.clipped_share(name, ranges[method])
        return summary

    def save(self, path: Path | str) -> Path:
        """Write the file and, if the pass is complete, a readable summary next to it (`.json`); both atomically.

        Args:
            path: Ends in `.safetensors`.

        Raises:
            ArgumentError: Wrong suffix; the folder cannot be written to; another `.json` file is next to it.
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
        """Read a file that `save` wrote.

        Raises:
            DataError: The file cannot be read, or is another kind of file.
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
        arrays = {}
        for name, tensor in self.tensors.items():
            for part, array in tensor.to_arrays().items():
                arrays[f"{name}{_SEPARATOR}{part}"] = np.ascontiguousarray(array)
        facts = {
            "batches": self.batches,
            "model": self.model,
            "data": self.data,
            "complete": self.complete,
            "limit": self.limit,
            "shared": self.shared,
            "formats": {name: _format_to_json(fmt) for name, fmt in self.formats.items()},
        }
        facts["digest"] = _digest(facts, arrays)
        metadata = {STATISTICS_FORMAT: json.dumps(facts)}  # one key: the order of several is random
        return safetensors.save(arrays, metadata)

    @classmethod
    def from_bytes(cls, content: bytes, source: str = "the content") -> Statistics:
        """The inverse of `to_bytes`.

        Args:
            content: The bytes that it returned.
            source: The origin of the content, for messages.

        Raises:
            DataError: The content is another kind of file, or damaged.
        """
        try:
            arrays = safetensors.load(content)
        except _LOAD_ERRORS as error:
            raise DataError(
                f"{source} is not a file of calibration statistics: {printable(error, 100)}.", _FIX
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
                formats={name: _format_from_stored(fmt) for name, fmt in stored.formats.items()},
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
    """A format in the file, with all of its fields."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    num_bits: NumBits
    unsigned: bool
    narrow_range: bool


@dataclass(frozen=True)
class _StoredFacts:
    """The facts beside the arrays; files of earlier versions have no digest."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    batches: Annotated[int, Ge(0)]
    model: str
    data: str
    complete: bool
    limit: Annotated[int, Ge(0)] | None
    shared: dict[str, str]
    formats: dict[str, _StoredFormat | None]
    digest: str | None = None


def _format_to_json(fmt: Format | None) -> dict[str, Any] | None:
    return None if fmt is None else asdict(fmt)


def _format_from_stored(fmt: _StoredFormat | None) -> Format | None:
    return None if fmt is None else Format(**asdict(fmt))


def _digest(facts: dict[str, Any], arrays: dict[str, Any]) -> str:
    """Digest of the facts, and of names, types, shapes and values of the arrays."""
    parts = {}
    for name, array in arrays.items():
        parts[f"{name} {array.dtype} {array.shape}"] = array.reshape(-1).view(np.uint8).data
    return digest_parts(facts, parts)


def _split_parts(stored: _StoredFacts, arrays: dict[str, Any]) -> dict[str, TensorStatistics]:
    """The arrays of each tensor.

    Raises:
        ArgumentError: An array is missing, unexpected or damaged, or a shared range is missing.
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
                f"'{printable(name)}' shares the range of '{printable(leader)}', which is missing.",
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
    """The sum of parts whose batches have different numbers, for example of several processes; exact in any order.

    Raises:
        ArgumentError: They are of different models, or batch numbers overlap.
    """
    merged, *rest = parts
    for part in rest:
        _require_same_model(merged, part)
        tensors = {}
        for name, tensor in merged.tensors.items():
            tensors[name] = tensor.merge(part.tensors[name])
        merged = replace(
            merged,
            tensors=tensors,
            batches=merged.batches + part.batches,
            data=merged.data or part.data,
            complete=merged.complete and part.complete,
        )
    return merged


def _require_same_model(first: Statistics, second: Statistics) -> None:
    missing = sorted(first.tensors.keys() ^ second.tensors.keys())
    if not missing and first.model == second.model:
        return
    difference = ", formats or shapes"
    if missing:
        difference = f": only one has {', '.join(missing[:3])}"
    raise ArgumentError(
        f"the statistics are of different models{difference}.",
        "merge statistics that were collected with the same quantized model.",
    )


def merge_files(paths: Sequence[Path | str], output: Path | str) -> Statistics:
    """Write the sum of files into one; see `Statistics.merge`.

    Args:
        paths: Two or more files of complete passes over different data.
        output: The file to write, ending in `.safetensors`; may be one of them.

    Raises:
        ArgumentError: Fewer than two files, a pass that is not complete, files of different models, wrong suffix.
        DataError: A file cannot be read, or is another kind of file.
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
    """The statistics in a file; an incomplete pass is refused."""
    statistics = Statistics.load(path)
    if not statistics.complete:
        raise ArgumentError(
            f"{path} holds a pass that was cut off after {statistics.batches} batches.",
            "run the same calibration again, which continues from there; then merge.",
        )
    return statistics


def require_place_of_summary(path: Path) -> None:
    """Refuse a file of statistics if its summary would replace a JSON file that is not a summary.

    Raises:
        ArgumentError: Such a JSON file is next to it.
    """
    summary = path.with_suffix(".json")
    try:
        content = json.loads(read_file(summary))
    except (OSError, ValueError, RecursionError):  # there is none, or it is damaged
        return
    if not isinstance(content, dict) or not content.keys() >= _SUMMARY_KEYS:
        raise ArgumentError(
            f"{summary} is not a summary of statistics and would be overwritten by the one of {path.name}.",
            "choose another name.",
        )


def require_suffix(path: Path | str) -> Path:
    """Refuse a file name that does not end in `.safetensors`.

    Raises:
        ArgumentError: Another suffix.
    """
    path = as_path(path, "path")
    if path.suffix != ".safetensors":
        raise ArgumentError(
            f"{path} does not end in .safetensors.", "name it calibration.safetensors, for example."
        )
    return path
