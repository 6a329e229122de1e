"""The bundle: a folder that builds, checks and times a model on the target, with what is there. Needs no torch."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from qdq.build import has_type
from qdq.bundle.archive import place_archive, write_archive
from qdq.bundle.commands import BundleFacts, list_types, write_commands
from qdq.bundle.expected import describe_bundle
from qdq.bundle.floor import Floor, measure_floor, measure_sqnr, run_pairs
from qdq.bundle.folder import (
    EXPECTED_FILE,
    find_parent,
    list_digests,
    name_arrays,
    replace_folder,
    require_outside,
    require_place,
)
from qdq.bundle.models import FLOAT, HALF_FLOAT, Variants, make_variants
from qdq.check.load import load_onnx, require_whole
from qdq.check.parity import OnnxModel
from qdq.errors import ArgumentError, CheckError, DataError
from qdq.files import as_path, guard_files, write_atomic
from qdq.graph.code_types import list_lacking
from qdq.graph.coverage import LayerCoverage, count_qdq, measure_coverage
from qdq.graph.names import name_unnamed
from qdq.graph.save import save_model
from qdq.metrics import Array
from qdq.pairs import Pair, digest_file, load_pairs
from qdq.product_types import word_of
from qdq.run import MODEL_FILE, REFERENCES_FILE, require_one_target
from qdq.text import list_names, printable
from qdq.trt.profiles import Profile
from qdq.trt.trtexec import Pair as PairFiles

_TARGET = Path(__file__).parent / "target"
_TARGET_FILES = ("verify.sh", "verify.py", "README.txt")
_COMMANDS_FILE = "commands.sh"
# trtexec separates names with commas.
_TENSOR_NAME = re.compile(r"[\w./:-]+", re.ASCII)


@dataclass(frozen=True)
class BundleReport:
    """Result of `make_bundle`.

    Args:
        folder: The folder.
        archive: The `.tar.gz`, or None.
        archive_bytes: Its size; 0 if there is none.
        files: Its files -> bytes.
        pairs: Number of inputs with references.
        source: Where the references come from.
        floors: Output name -> what a correct engine reaches.
        layers: The products of the network.
        notes: What could not be made, and why.
    """

    folder: Path
    archive: Path | None
    archive_bytes: int
    files: dict[str, int]
    pairs: int
    source: str
    floors: dict[str, Floor]
    layers: tuple[LayerCoverage, ...]
    notes: tuple[str, ...]

    def format_table(self) -> str:
        """What the folder holds and what the target must reach, then the command for the target."""
        megabytes = sum(self.files.values()) / 1e6
        lines = [
            f"{self.folder}: {len(self.files)} files, {megabytes:.1f} MB",
            f"{self.pairs} pairs of inputs and references ({self.source})",
        ]
        for type_name in list_types(self.layers):
            count = sum(layer.expected == type_name for layer in self.layers)
            lines.append(f"{count} of {len(self.layers)} products expected in {word_of(type_name)}")
        for name, floor in self.floors.items():
            if floor.required_sqnr_db is None:
                limit = "must be exact"
            else:
                limit = f"SQNR at least {floor.required_sqnr_db:.2f} dB (tie floor {floor.sqnr_db:.2f} dB)"
            lines.append(f"output {name}: {limit}")
        lines += [f"note: {note}" for note in self.notes]
        if self.archive is not None:
            lines.append(f"{self.archive}: {self.archive_bytes / 1e6:.1f} MB")
        lines.append("on the target: sh verify.sh")
        return "\n".join(lines)


def make_bundle(
    source: Path | str,
    output: Path | str,
    *,
    inputs: Mapping[str, Array] | None = None,
    count: int = 8,
    with_float: bool = False,
    archive: bool = False,
) -> BundleReport:
    """Write a folder that proves on the target that the engine is right, quantized as promised, and fast.

    The folder holds the model for each version of TensorRT, inputs with the outputs that belong to them, what is
    expected, and `verify.sh`. The same source gives the same bytes.

    Args:
        source: A run folder, or a QDQ ONNX file.
        output: The folder. It must be new or empty, or hold an earlier bundle, which is replaced.
        inputs: Input name -> samples `[N, ...]`, one pair each; for a file with a fixed batch of B, N is a multiple of
            B and a pair has B samples. A scalar is the same in all pairs. The references are then the outputs of the
            file in ONNX Runtime. A run needs none: it kept samples and the outputs of its torch model.
        count: Most number of pairs.
        with_float: Also write the network without Q/DQ; only then can `verify.sh` say whether the quantized
            engine is faster.
        archive: Also write `OUTPUT.tar.gz`.

    Raises:
        ArgumentError: There is no such source, it is a run of several targets, it is in the folder, it lacks inputs,
            names that trtexec cannot take, or a folder with other files.
        CheckError: The file cannot be read or run, or does not compute its references.
        DataError: The references of the run cannot be read or are of another file.
        ExportError: The network without Q/DQ cannot be made.
    """
    source, output = as_path(source, "source"), as_path(output, "output")
    if count < 1:
        raise ArgumentError(f"count is {count}; it must be 1 or more.", "use 8.")
    require_place(output)
    require_outside(output, [source])
    archive_path = place_archive(output) if archive else None
    guard_files(inputs=[source], outputs=[archive_path])
    require_one_target(source)
    onnx = source / MODEL_FILE if source.is_dir() else source
    model = _load(onnx)
    if inputs is None:
        pairs = _fit_outputs(model, _read_pairs(source, onnx, count))
        origin = "the torch model that was exported"
    else:
        pairs = _compute_pairs(onnx, inputs, count)
        origin = "ONNX Runtime on the file itself"
    _require_names(pairs[0])
    variants = make_variants(model, pairs, with_float=with_float)
    _require_references(model, variants, pairs)
    floors = measure_floor(model, pairs)
    layers = measure_coverage(model).layers

    with tempfile.TemporaryDirectory(dir=find_parent(output), prefix=".bundle") as folder:
        staged = Path(folder)
        for name, graph in variants.graphs.items():
            save_model(graph, staged / name)
        profiles = _make_profiles(model, pairs)
        files = []
        for number, pair in enumerate(pairs):
            files.append(_write_pair(staged, number, pair, profiles))
        facts = BundleFacts(
            opsets={name: graph.opset_imports[""] for name, graph in variants.graphs.items()},
            profiles=profiles,
            pairs=files,
            most_l2={name: floor.most_mean_square for name, floor in floors.items()},
            output_types={name: str(array.dtype) for name, array in pairs[0].quantized.items()},
            has_long_inputs=any(array.dtype == np.int64 for array in pairs[0].inputs.values()),
            types=list_types(layers),
            least_sm=max((least_sm for *_, least_sm in list_lacking(model.graph, sm=0)), default=0),
        )
        write_atomic(staged / _COMMANDS_FILE, write_commands(facts))
        for name in _TARGET_FILES:
            write_atomic(staged / name, (_TARGET / name).read_bytes())
        expected = describe_bundle(
            pairs,
            files,
            origin,
            floors,
            layers,
            variants.notes,
            list_digests(staged),
            digest_file(onnx),
        )
        write_atomic(staged / EXPECTED_FILE, json.dumps(expected, indent=1) + "\n")
        sizes = replace_folder(staged, output)

    archive_bytes = 0
    if archive_path is not None:
        archive_bytes = write_archive(output, list(sizes), archive_path).stat().st_size
    return BundleReport(
        folder=output,
        archive=archive_path,
        archive_bytes=archive_bytes,
        files=sizes,
        pairs=len(pairs),
        source=origin,
        floors=floors,
        layers=layers,
        notes=variants.notes,
    )


def _load(onnx: Path) -> ir.Model:
    """The graph of a file with Q/DQ; unnamed nodes get the names that TensorRT's parser gives them.

    Raises:
        ArgumentError: It has no Q/DQ, or bfloat16 tensors.
        CheckError: It cannot be read.
    """
    loaded = load_onnx(onnx)
    require_whole(loaded)
    if not any(count_qdq(loaded.model)):
        raise ArgumentError(
            f"{printable(onnx)} has no Q/DQ: nothing in it would run in int8 or FP8.",
            "give the model.onnx that `qdq ptq` writes, or another QDQ file.",
        )
    if has_type(loaded.model, ir.DataType.BFLOAT16):
        raise ArgumentError(
            f"{printable(onnx)} has bfloat16 tensors; a bundle takes float32 and float16.",
            "export with precision 'fp32': the bundle has a float16 file as well.",
        )
    name_unnamed(loaded.model)
    return loaded.model


def _read_pairs(source: Path, onnx: Path, count: int) -> list[Pair]:
    """The pairs that a run kept.

    Raises:
        ArgumentError: There are none.
        DataError: They are of another file.
    """
    path = source / REFERENCES_FILE
    if not source.is_dir():
        raise ArgumentError(
            f"{printable(source)} is a file, and there are no inputs for it.",
            "give inputs=, or --inputs FILE.npz; a run folder keeps its own.",
        )
    if not path.is_file():
        raise ArgumentError(
            f"{printable(source)} has no {REFERENCES_FILE}: the run is not finished, or is of an earlier qdq.",
            "run the same command again, or give inputs.",
        )
    stored = load_pairs(path)
    if stored.model_sha256 != digest_file(onnx):
        raise DataError(
            f"{printable(path)} was made for another {MODEL_FILE}: the file was written again since.",
            "run the same command again, or give inputs.",
        )
    return stored.pairs[:count]


def _fit_outputs(model: ir.Model, pairs: Sequence[Pair]) -> list[Pair]:
    """The pairs with outputs of the types and shapes that the file has."""
    fitted = []
    for pair, outputs in zip(pairs, run_pairs(model, pairs), strict=True):
        quantized = {}
        for name, array in outputs.items():
            quantized[name] = pair.quantized[name].astype(array.dtype).reshape(array.shape)
        fitted.append(replace(pair, quantized=quantized))
    return fitted


def _compute_pairs(onnx: Path, inputs: Mapping[str, Array], count: int) -> list[Pair]:
    """Pairs of given inputs and what ONNX Runtime computes for them.

    Raises:
        ArgumentError: Inputs of other names or numbers than the file has, or none.
    """
    file = OnnxModel(onnx)
    if inputs.keys() != file.inputs.keys():
        raise ArgumentError(
            f"the inputs given are {list_names(list(inputs), 5)}, those of {printable(onnx)} are "
            f"{list_names(list(file.inputs), 5)}.",
            "give an array [N, ...] for each input.",
        )
    pairs = []
    for samples in _cut_samples(file, inputs)[:count]:
        outputs = file(*samples.values())
        pairs.append(Pair(samples, dict(zip(file.outputs, outputs, strict=True)), {}))
    return pairs


def _cut_samples(file: OnnxModel, inputs: Mapping[str, Array]) -> list[dict[str, Array]]:
    """The inputs of each pair: one sample, or as many as the fixed batch of the file has.

    Raises:
        ArgumentError: They have different numbers of samples, none, or a part of a batch.
    """
    batch_sizes: dict[str, int] = {}
    for name, shape in file.inputs.items():
        if inputs[name].ndim == 0:
            continue
        first = shape[0] if shape else 1
        batch_sizes[name] = first if isinstance(first, int) else 1
        if len(inputs[name]) % batch_sizes[name]:
            raise ArgumentError(
                f"the input {printable(name)} has {len(inputs[name])} samples, and the file takes {first} at a time.",
                f"give a multiple of {first}.",
            )
    numbers = {len(inputs[name]) // size for name, size in batch_sizes.items()} or {1}
    if len(numbers) != 1 or numbers == {0}:
        raise ArgumentError(
            f"the inputs have {sorted(numbers)} samples or batches.",
            "give the same number of each, at least one.",
        )
    pairs = []
    for number in range(*numbers):
        samples = {}
        for name in file.inputs:
            size = batch_sizes.get(name)
            start = number * (size or 0)
            samples[name] = inputs[name] if size is None else inputs[name][start : start + size]
        pairs.append(samples)
    return pairs


def _require_names(pair: Pair) -> None:
    """Refuse names of inputs and outputs that trtexec cannot take on its command line."""
    refused = []
    for name in (*pair.inputs, *pair.quantized):
        if not _TENSOR_NAME.fullmatch(name):
            refused.append(name)
    if refused:
        raise ArgumentError(
            f"trtexec cannot take the names {list_names(list(map(printable, refused)), 5)}.",
            "use letters, digits and . / : _ - in the names of inputs and outputs.",
        )


def _require_references(model: ir.Model, variants: Variants, pairs: Sequence[Pair]) -> None:
    """Refuse files that do not compute their references here, in ONNX Runtime.

    The limit is the tie floor of the file against its own outputs. One against the references would be low for a file
    that is wrong.

    Raises:
        CheckError: The figures.
    """
    references = [pair.quantized for pair in pairs]
    outputs = run_pairs(model, pairs)
    computed = [
        replace(pair, quantized=arrays) for pair, arrays in zip(pairs, outputs, strict=True)
    ]
    floors = measure_floor(model, computed)
    for file, graph in variants.graphs.items():
        if file in (FLOAT, HALF_FLOAT):
            continue
        for name, decibels in measure_sqnr(references, run_pairs(graph, pairs)).items():
            required = floors[name].required_sqnr_db
            if required is not None and not decibels >= required:
                raise CheckError(
                    f"output {printable(name)} of {file} has {decibels:.1f} dB against its references in ONNX "
                    f"Runtime; a correct file has at least {required:.1f} dB.",
                    "run `qdq check` on the model; if it is clean, report it.",
                )


def _make_profiles(model: ir.Model, pairs: Sequence[Pair]) -> dict[str, Profile]:
    """The smallest and largest shapes of the pairs, for the inputs with a dynamic dimension."""
    profiles: dict[str, Profile] = {}
    for value in model.graph.inputs:
        name = str(value.name)
        if name not in pairs[0].inputs or value.shape is None or value.shape.is_static():
            continue
        shapes = np.array([pair.inputs[name].shape for pair in pairs])
        smallest = tuple(map(int, shapes.min(0)))
        largest = tuple(map(int, shapes.max(0)))
        profiles[name] = {"min": smallest, "opt": largest, "max": largest}
    return profiles


def _write_pair(
    folder: Path, number: int, pair: Pair, profiles: Mapping[str, Profile]
) -> PairFiles:
    """Write the arrays of a pair, raw and as `.npy`; the files are relative to the folder."""
    inputs = _write_arrays(folder, Path("inputs"), number, pair.inputs)
    references = _write_arrays(folder, Path("references"), number, pair.quantized)
    _write_arrays(folder, Path("references/float"), number, pair.float)
    shapes = {name: pair.inputs[name].shape for name in profiles}
    return PairFiles(inputs, references, shapes)


def _write_arrays(
    folder: Path, place: Path, number: int, arrays: Mapping[str, Array]
) -> dict[str, Path]:
    """Write arrays as `NUMBER.NAME.bin` (little-endian, C order, no header) and `.npy`; returns the raw files."""
    files = name_arrays(place, number, arrays)
    for name, file in files.items():
        path = folder / file
        path.parent.mkdir(parents=True, exist_ok=True)
        array = arrays[name]
        little = np.asarray(array, array.dtype.newbyteorder("<"), order="C")
        write_atomic(path, little.tobytes())
        np.save(path.with_suffix(".npy"), little, allow_pickle=False)
    return files
