"""Which Q/DQ pair keeps a file from building, or changes its numbers in ONNX Runtime, found by halving. No torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np
import onnx_ir as ir
from tqdm import tqdm

from qdq.build import build_engine
from qdq.bundle.floor import Floor, measure_floor, measure_sqnr
from qdq.check.load import load_onnx, require_whole
from qdq.check.parity import OnnxModel
from qdq.errors import ArgumentError, BuildError, CheckError
from qdq.files import as_path
from qdq.graph.names import name_unnamed
from qdq.graph.pairs import is_op
from qdq.graph.passes import run_passes
from qdq.graph.remove_pairs import RemovePairs
from qdq.graph.save import save_model
from qdq.metrics import Array
from qdq.pairs import Pair
from qdq.text import printable
from qdq.trt.backend import DEFAULT_SM

_Test = Callable[[Path], str]
"""A file -> what is wrong with it; "" if nothing is."""


@dataclass(frozen=True)
class Culprit:
    """A pair with which a file fails.

    Args:
        name: Name of its Q, or of its DQ if the codes are constant.
        reads: Name of the tensor that it quantizes, or of the codes.
        reason: What failed with it and the pairs before it.
    """

    name: str
    reads: str
    reason: str


@dataclass(frozen=True)
class Bisection:
    """Result of `bisect_pairs`.

    Args:
        path: The file.
        question: What was asked of each file, such as "builds".
        pairs: Number of pairs of the file.
        tests: Number of files that were tried.
        culprits: The pairs without which the file passes; empty if it passes as it is.
        reason: Why the file fails even without any pair; "" if it passes then.
    """

    path: Path
    question: str
    pairs: int
    tests: int
    culprits: tuple[Culprit, ...]
    reason: str

    def format_table(self) -> str:
        """One line for each pair, then the verdict."""
        lines = []
        for culprit in self.culprits:
            lines.append(f"{culprit.name} (reads {culprit.reads}): {culprit.reason}")
        subject = f"{self.path.name}, {self.pairs} pairs, {self.tests} files tried:"
        if self.reason:
            lines.append(f"{subject} it fails without any pair, too: {self.reason}")
        elif self.culprits:
            lines.append(f"{subject} {self.question} without these {len(self.culprits)} pairs")
        else:
            lines.append(f"{subject} {self.question} as it is")
        return "\n".join(lines)


def bisect_pairs(
    onnx: Path | str,
    *,
    inputs: Mapping[str, Array] | None = None,
    backend: str = "auto",
    sm: int = DEFAULT_SM,
) -> Bisection:
    """Find the Q/DQ pairs that keep a file from building, or that make ONNX Runtime's default session differ.

    Copies of the file keep only the first pairs, in the order of the graph. The number of pairs is halved until one
    more pair makes the difference. That pair is left out, and the search goes on until the rest passes.

    Args:
        onnx: An ONNX file with Q/DQ.
        inputs: Input name -> array, one batch. With them no engine is built: the outputs of ONNX Runtime's default
            session are compared with those of the file as it is written, and may differ by their tie floor.
        backend: As for `build_engine`.
        sm: Likewise.

    Raises:
        ArgumentError: The file has no Q/DQ, or other inputs.
        CheckError: The file cannot be read, or the inputs have other shapes or types.
        DependencyError: No TensorRT can build here.
        ExportError: A pair cannot be removed, as its scale is computed.
    """
    path = as_path(onnx, "onnx")
    loaded = load_onnx(path)
    require_whole(loaded)
    model = loaded.model
    name_unnamed(model)
    pairs = _list_pairs(model)
    if not pairs:
        raise ArgumentError(
            f"{printable(path)} has no Q/DQ.", "give the model.onnx that `qdq ptq` writes."
        )
    with tempfile.TemporaryDirectory(prefix="qdq-") as folder:
        test: _Test
        if inputs is None:
            question = "builds"
            test = _Builder(Path(folder) / "model.engine", backend, sm)
        else:
            question = "computes the same in ONNX Runtime's default session"
            _run_file(OnnxModel(path), inputs)  # an error then names the file, not a copy
            test = _Comparer(inputs)
        with tqdm(desc="bisect", unit="file", disable=None) as bar:
            search = _Search(model, pairs, test, Path(folder) / "model.onnx", bar)
            reason = search.explain([])
            culprits = [] if reason else search.find_culprits()
    return Bisection(path, question, len(pairs), search.tests, tuple(culprits), reason)


@dataclass(frozen=True)
class _Pair:
    """A pair, or the DQ of constant codes."""

    name: str
    reads: str
    dequantizes: tuple[str, ...]


def _list_pairs(model: ir.Model) -> list[_Pair]:
    """The pairs in the order of the graph."""
    pairs: dict[str, _Pair] = {}
    for node in model.graph:
        if not is_op(node, "DequantizeLinear"):
            continue
        codes = node.inputs[0]
        producer = None if codes is None else codes.producer()
        first = producer if is_op(producer, "QuantizeLinear") else node
        name, tensor = str(first.name), first.inputs[0]
        former = pairs.get(name)
        dequantizes = (*(former.dequantizes if former else ()), str(node.name))
        pairs[name] = _Pair(name, "" if tensor is None else str(tensor.name), dequantizes)
    return list(pairs.values())


class _Search:
    """Tries files that keep some of the pairs.

    Args:
        model: The graph.
        pairs: Its pairs.
        test: Says what is wrong with a file.
        path: Where the files are written.
        bar: Is moved for each file.

    Attributes:
        tests: Number of files that were tried.
    """

    def __init__(
        self, model: ir.Model, pairs: Sequence[_Pair], test: _Test, path: Path, bar: tqdm[NoReturn]
    ) -> None:
        self.tests = 0
        self._model = model
        self._pairs = pairs
        self._test = test
        self._path = path
        self._bar = bar

    def explain(self, pairs: Sequence[_Pair]) -> str:
        """What is wrong with the file that has only some pairs; "" if nothing is."""
        copy = self._model.clone()
        removed: list[str] = []
        for pair in self._pairs:
            if pair not in pairs:
                removed += pair.dequantizes
        run_passes(copy, [RemovePairs(removed)])
        save_model(copy, self._path)
        self.tests += 1
        self._bar.update()
        return self._test(self._path)

    def find_culprits(self) -> list[Culprit]:
        """The pairs without which the file passes; without any pair it passes."""
        culprits: list[Culprit] = []
        rest = list(self._pairs)
        reason = self.explain(rest)
        while reason:
            index, reason = self._find_first(rest, reason)
            culprits.append(Culprit(rest[index].name, rest[index].reads, reason))
            del rest[index]
            reason = self.explain(rest)
        return culprits

    def _find_first(self, pairs: Sequence[_Pair], reason: str) -> tuple[int, str]:
        """The pair that makes the pairs before it fail, by its index, and what fails.

        Args:
            pairs: Pairs with which the file fails.
            reason: Why it fails.
        """
        passing, failing = 0, len(pairs)
        while failing - passing > 1:
            middle = (passing + failing) // 2
            middle_reason = self.explain(pairs[:middle])
            if middle_reason:
                failing, reason = middle, middle_reason
            else:
                passing = middle
        return failing - 1, reason


class _Builder:
    """Builds a file; see `_Test`."""

    def __init__(self, engine: Path, backend: str, sm: int) -> None:
        self._engine = engine
        self._backend = backend
        self._sm = sm

    def __call__(self, path: Path) -> str:
        try:
            build_engine(path, self._engine, backend=self._backend, sm=self._sm)
        except BuildError as error:
            return error.message.replace(str(path), "the file")
        return ""


class _Comparer:
    """Compares the two sessions of ONNX Runtime; see `_Test`."""

    def __init__(self, inputs: Mapping[str, Array]) -> None:
        self._inputs = inputs

    def __call__(self, path: Path) -> str:
        plain = _run_file(OnnxModel(path), self._inputs)
        try:
            default = _run_file(OnnxModel(path, session="default"), self._inputs)
        except CheckError as error:
            return error.message.replace(str(path), "the file")
        floors = measure_floor(ir.load(path), [Pair(self._inputs, plain, {})])
        for name, decibels in measure_sqnr([plain], [default]).items():
            if _is_below(decibels, floors.get(name)):
                return f"output {name} has {decibels:.1f} dB against the session that computes what is written"
        return ""


def _run_file(file: OnnxModel, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """The outputs of a file by name.

    Raises:
        ArgumentError: Inputs of other names.
        CheckError: Inputs of other shapes or types.
    """
    if file.inputs.keys() != inputs.keys():
        raise ArgumentError(
            f"the inputs given are {sorted(inputs)}, those of the file {sorted(file.inputs)}.",
            "give an array for each input.",
        )
    outputs = file(*(inputs[name] for name in file.inputs))
    return dict(zip(file.outputs, outputs, strict=True))


def _is_below(decibels: float, floor: Floor | None) -> bool:
    """Whether an SQNR is too low; NaN is."""
    if floor is None or floor.required_sqnr_db is None:
        return not np.isposinf(decibels)
    return not decibels >= floor.required_sqnr_db
