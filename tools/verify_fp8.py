"""FP8 against other software: casts, ONNX Runtime, and the kernels of TensorRT-RTX.

python tools/verify_fp8.py [--values 10000000] [--json FILE]
python tools/verify_fp8.py --networks vit_b_16 swin_t [--sm 89 120] [--json FILE]

The first command compares fake quantization with the casts of torch and of ml_dtypes, bit by bit. The second one
exports networks of `fp8_networks.py` in FP8, and compares the file in ONNX Runtime with torch, and the types and the
attention of the engines with what the file promises.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import torch
from fp8_networks import load_network

import qdq
from qdq.check.parity import TIE_MARGIN_DB, measure_parity
from qdq.cli.main import PositiveInt, run_command
from qdq.files import write_json
from qdq.formats import FP8, scale_from_amax
from qdq.metrics import Outputs
from qdq.quantize import fake_quantize
from qdq.run import describe_environment
from qdq.workloads.workload import Workload

_TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_RANGES = (448.0, 3.3, 1e-3, 6e4)
_PIECE = 1 << 20
_EQUAL_DB = 60.0  # a file that is as near to torch as this needs no tie floor


@dataclass(frozen=True)
class Engine:
    """What TensorRT-RTX builds from a file.

    Args:
        sm: Compute capability, 89 for 8.9.
        products: Type -> number of products that should run in it, and do.
        others: Products that run in another type than promised, with the reason.
        fused: Number of attentions in one kernel.
        split: Softmax of each other attention, with the reason.
    """

    sm: int
    products: dict[str, int]
    others: list[str]
    fused: int
    split: list[str]


@dataclass(frozen=True)
class Parity:
    """A file in ONNX Runtime against torch.

    Args:
        remainder: Type of everything that is not quantized.
        sqnr_db: SQNR of the worst output, in dB.
        floor_db: Its tie floor.
        is_equal: Whether it differs by ties only.
    """

    remainder: str
    sqnr_db: float
    floor_db: float
    is_equal: bool


@dataclass(frozen=True)
class Row:
    """A network in FP8.

    Args:
        network: Its name.
        parities: The file with a remainder of fp32, and the one of fp16, which is built.
        problems: Errors and warnings of the check of the latter.
        engines: One for each compute capability.
    """

    network: str
    parities: list[Parity]
    problems: list[str]
    engines: list[Engine]

    @property
    def has_faults(self) -> bool:
        """Whether a file differs or breaks a rule, an engine has another type than promised or attention in pieces."""
        are_equal = all(parity.is_equal for parity in self.parities)
        are_as_promised = not any(engine.others or engine.split for engine in self.engines)
        return not are_equal or bool(self.problems) or not are_as_promised


def verify_fp8(
    *,
    values: PositiveInt = 10_000_000,
    networks: tuple[str, ...] = (),
    sm: tuple[PositiveInt, ...] = (89, 120),
    json: Path | None = None,
) -> int:
    """Compare each result with both casts, for each type and range; or export and build networks.

    Args:
        values: Random values for each type and range; all ties and their neighbours are added.
        networks: Networks of `fp8_networks.py`, which are verified instead of values.
        sm: Compute capabilities that their engines are built for.
        json: Also write the figures to this file.
    """
    if networks:
        return _verify_networks(networks, sm, json)
    rows = []
    for name, dtype in _TYPES.items():
        for amax in _RANGES:
            count, differences = _compare(values, dtype, amax)
            rows.append({"type": name, "amax": amax, "values": count, "differences": differences})
            print(f"{name:5} amax {amax:<8g} {count:>10} values, {differences} differences")
    if json:
        write_json(json, {"rows": rows, "environment": describe_environment()})
    return int(any(row["differences"] for row in rows))


def _verify_networks(names: tuple[str, ...], sms: tuple[int, ...], json: Path | None) -> int:
    """Print a few lines for each network; 1 if one has a fault."""
    rows = []
    for name in names:
        row = _verify_network(name, sms)
        rows.append(row)
        if json:
            write_json(
                json, {"rows": list(map(asdict, rows)), "environment": describe_environment()}
            )
    return int(any(row.has_faults for row in rows))


def _verify_network(name: str, sms: tuple[int, ...]) -> Row:
    """Quantize a network, compare its files with torch, and build engines."""
    workload = load_network(name)
    model = workload.module
    qdq.fold_batchnorm(model, workload.example)
    qdq.swap_modules(model, workload.example, formats=("fp8",))
    qdq.rewire_operations(model, workload.example, formats=("fp8",))
    qdq.calibrate_model(model, workload.calibration, method="max")
    expected = qdq.predict(model, workload.evaluation, **workload.view)
    parities = []
    engines = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for precision in ("fp32", "fp16"):
            qdq.export_onnx(model, workload.example, path, precision=precision)
            parities.append(_compare_file(path, workload, expected, precision))
            print(f"{name}: {_format_parity(parities[-1])}", flush=True)
        problems = []
        for finding in qdq.check_onnx(path).problems:
            problems.append(f"{finding.rule} {finding.node}: {finding.message}")
            print(f"{name}: {problems[-1]}")
        for sm in sms:
            engines.append(_build(path, sm))
            print(f"{name}, {_format_engine(engines[-1])}", flush=True)
    return Row(name, parities, problems, engines)


def _compare_file(path: Path, workload: Workload, expected: Outputs, precision: str) -> Parity:
    """Compare a file with the outputs of torch."""
    actual = qdq.predict(path, workload.evaluation, **workload.view)
    floors = qdq.measure_tie_floor(
        workload.module,
        workload.evaluation,
        expected=expected,
        precision=precision,
        **workload.view,
    )
    worst = measure_parity(expected, actual, floors)
    assert worst.tie_floor_db is not None  # noqa: S101  # it was given
    least_db = min(_EQUAL_DB, worst.tie_floor_db - TIE_MARGIN_DB)
    return Parity(precision, worst.sqnr_db, worst.tie_floor_db, worst.sqnr_db >= least_db)


def _format_parity(parity: Parity) -> str:
    verdict = "equal" if parity.is_equal else "DIFFERS"
    return (
        f"{parity.remainder} in ONNX Runtime {parity.sqnr_db:.1f} dB, "
        f"tie floor {parity.floor_db:.1f} dB: {verdict}"
    )


def _build(path: Path, sm: int) -> Engine:
    """The types and the attention of an engine."""
    build = qdq.build_engine(path, path.with_suffix(f".sm{sm}.engine"), backend="rtx", sm=sm)
    products: Counter[str] = Counter()
    others = []
    for layer in build.layers:
        if layer.built == layer.promised:
            products[layer.promised] += 1
        else:
            others.append(
                f"{layer.module}: {layer.promised} promised, {layer.built} built: {layer.reason}"
            )
    split = []
    for attention in build.attention:
        if not attention.is_fused:
            split.append(f"{attention.softmax}: {attention.reason}")
    return Engine(sm, dict(products), others, len(build.attention) - len(split), split)


def _format_engine(engine: Engine) -> str:
    """A line for an engine, then one for each product of another type and each attention that is split."""
    counts = [f"{count} {type_name}" for type_name, count in engine.products.items()]
    num_attentions = engine.fused + len(engine.split)
    lines = [
        f"SM {engine.sm}: {' + '.join(counts)} as promised, {len(engine.others)} in another type; "
        f"attention: {engine.fused} of {num_attentions} in one kernel"
    ]
    return "\n  ".join([*lines, *engine.others, *engine.split])


def _compare(values: int, dtype: torch.dtype, amax: float) -> tuple[int, int]:
    """The number of values, and how many of them differ from a cast."""
    generator = torch.Generator().manual_seed(0)
    count = 0
    differences = 0
    for start in range(0, values, _PIECE):
        size = min(_PIECE, values - start)
        # Magnitudes over 40 octaves, so that subnormal and clipped values are among them.
        octaves = 40 * torch.rand(size, generator=generator) - 30
        random = torch.randn(size, generator=generator) * amax * octaves.exp2()
        piece = torch.cat([random, _edges(amax)]) if start == 0 else random
        inputs = piece.clamp(-6.5e4, 6.5e4).to(dtype)
        count += len(inputs)
        differences += _count_differences(inputs, amax)
    return count, differences


def _edges(amax: float) -> torch.Tensor:
    """All codes and ties with their neighbours in float32, and values beyond the range, on both sides of 0."""
    codes = np.array([*FP8.list_magnitudes(), 464, 480, 1e4])
    ties = (codes[1:] + codes[:-1]) / 2
    scale = scale_from_amax(np.float32(amax), FP8)
    edges = (np.concatenate([codes, ties]) * scale).astype(np.float32)
    above = np.nextafter(edges, np.float32(np.inf))
    below = np.nextafter(edges, np.float32(-np.inf))
    positive = np.concatenate([edges, above, below])
    return torch.from_numpy(np.concatenate([positive, -positive]))


def _count_differences(inputs: torch.Tensor, amax: float) -> int:
    """How many results differ in a bit from one of the two casts."""
    result = fake_quantize(inputs, torch.tensor(amax), FP8)
    scale = torch.tensor(amax) / 448
    ratio = (inputs.float() / scale).clamp(-448, 448)
    by_torch = (ratio.to(torch.float8_e4m3fn).float() * scale).to(inputs.dtype)
    codes = ratio.numpy().astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    by_numpy = torch.from_numpy(codes * scale.numpy()).to(inputs.dtype)
    bits = torch.int32 if inputs.dtype == torch.float32 else torch.int16
    is_equal = torch.ones(len(inputs), dtype=torch.bool)
    for expected in (by_torch, by_numpy):
        is_equal &= result.view(bits) == expected.view(bits)
    return int((~is_equal).sum())


if __name__ == "__main__":
    run_command(verify_fp8)
