"""Check that `qdq check` reads every file that TensorRT-RTX builds, on the backend tests of the onnx wheel.

Usage: python tools/check_foreign.py [--every N] [--json FILE]

The models are the files of `onnx/backend/test/data` in the wheel, and those that its operator tests generate.
Each is checked twice: unchanged, and without the shapes of its outputs, as onnx-graphsurgeon writes files. TensorRT-RTX
builds each in a separate process. `refused_but_built` must be empty.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from onnx.backend.test.case.node import collect_testcases

from qdq import BuildError, CheckError, QdqError, build_engine, check_onnx
from qdq.files import to_jsonable

DATA = Path(onnx.__file__).parent / "backend" / "test" / "data"


@dataclass
class Figures:
    """The results.

    Args:
        models: Number of models.
        valid: Number of models that are reported as valid ONNX.
        built: Number of models that TensorRT-RTX builds.
        refused: Names that `qdq check` refuses.
        refused_but_built: The refused ones that TensorRT-RTX builds.
        crashed: Names on which TensorRT-RTX crashed.
        rules: Number of models that break each rule.
        seconds_checking: Time of all checks.
    """

    models: int = 0
    valid: int = 0
    built: int = 0
    refused: list[str] = field(default_factory=list)
    refused_but_built: list[str] = field(default_factory=list)
    crashed: list[str] = field(default_factory=list)
    rules: dict[str, int] = field(default_factory=dict)
    seconds_checking: float = 0.0


def list_models() -> Iterator[tuple[str, onnx.ModelProto]]:
    """Every model of the backend tests, by name."""
    for path in sorted(DATA.rglob("*.onnx")):
        yield str(path.relative_to(DATA)), onnx.load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of numpy about the data of the tests
        cases = collect_testcases(None)
    for case in cases:
        if case.model is not None:
            yield case.name, case.model


def drop_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with outputs without shape."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for output in copy.graph.output:
        if output.type.HasField("tensor_type"):
            output.type.tensor_type.ClearField("shape")
    return copy


def try_model(name: str, model: onnx.ModelProto, folder: Path, figures: Figures) -> None:
    """Check and build one model."""
    path = folder / "model.onnx"
    path.write_bytes(model.SerializeToString())
    figures.models += 1
    began = time.perf_counter()
    is_refused = False
    try:
        report = check_onnx(path)
        figures.valid += report.validity.is_valid
        for rule in {finding.rule for finding in report.findings}:
            figures.rules[rule] = figures.rules.get(rule, 0) + 1
    except CheckError:
        is_refused = True
        figures.refused.append(name)
    figures.seconds_checking += time.perf_counter() - began
    try:
        build_engine(path, folder / "engine", backend="rtx")
        figures.built += 1
        if is_refused:
            figures.refused_but_built.append(name)
    except BuildError as error:
        if "TensorRT crashed" in error.message:
            figures.crashed.append(name)
    except QdqError:  # a dynamic input without shapes
        pass


def main() -> None:
    """Try the models and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--every", type=int, default=1, help="take only every N-th model")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    figures = Figures()
    with tempfile.TemporaryDirectory() as folder:
        for name, model in list(list_models())[:: options.every]:
            try_model(name, model, Path(folder), figures)
            try_model(f"{name} without shapes", drop_shapes(model), Path(folder), figures)
    text = json.dumps(to_jsonable(figures), indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
