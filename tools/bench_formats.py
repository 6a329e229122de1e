"""SQNR of int8, FP8 and a mix of both, with the same products in 8 bits.

python tools/bench_formats.py minilm vit_b_16 [--samples 16] [--json FILE]

The networks are those of `fp8_networks.py`. Each of them is measured with attention in float and with attention in FP8:
there is no int8 attention. All formats have the ranges of one calibration. The mix is chosen on calibration samples
(`choose_formats`), and all figures are of other samples.
"""

from __future__ import annotations

import copy
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from fp8_networks import load_network

import qdq
from qdq.cli.main import PositiveInt, run_command
from qdq.dataflow import Dataflow
from qdq.files import write_json
from qdq.formats import FORMAT_NAMES
from qdq.forward import trace_forward
from qdq.metrics import Outputs, pair_arrays, sqnr_db
from qdq.mixed import FormatChoice
from qdq.rewire import list_attention
from qdq.run import describe_environment
from qdq.workloads.workload import Workload

_SM = 89


@dataclass(frozen=True)
class Row:
    """A network with attention in a format.

    Args:
        network: Its name.
        attention: "float" or "fp8".
        macs: Fraction of all MACs in 8 bits, the same for all formats.
        chosen_on: "int8", "fp8", "mixed" -> SQNR on the samples of the choice, of the worst output, in dB.
        measured: The same on other samples, of each output.
        num_layers: "int8", "fp8" -> number of layers and calls in the mix.
        seconds: Duration of the choice.
    """

    network: str
    attention: str
    macs: float
    chosen_on: dict[str, float | None]
    measured: dict[str, dict[str, float]]
    num_layers: dict[str, int]
    seconds: float


def bench_formats(
    *networks: str,
    samples: PositiveInt = 48,
    method: str = "mse",
    json: Path | None = None,
) -> int:
    """Print the SQNR of each format for each network.

    Args:
        networks: Networks of `fp8_networks.py`.
        samples: Calibration samples that the mix is chosen on, at most.
        method: Method of the ranges.
        json: Also write the figures to this file.
    """
    rows = []
    for name in networks:
        workload = load_network(name)
        qdq.fold_batchnorm(workload.module, workload.example)
        attention = _list_attention(workload)
        excluded = {"float": attention, "fp8": ()} if attention else {"float": ()}
        for attention_format, exclude in excluded.items():
            row = _measure(name, workload, attention_format, exclude, samples, method)
            rows.append(row)
            print(_format_row(row), flush=True)
            if json:
                data = {"rows": list(map(asdict, rows)), "environment": describe_environment()}
                write_json(json, data)
    return 0


def _list_attention(workload: Workload) -> tuple[str, ...]:
    """The products of attention of the swapped model: `nn.MultiheadAttention` calls others in float."""
    model = copy.deepcopy(workload.module)
    qdq.swap_modules(model, workload.example)
    with qdq.disable_quantization(model):
        return tuple(list_attention(Dataflow(trace_forward(model, workload.example))))


def _measure(
    name: str,
    workload: Workload,
    attention: str,
    exclude: tuple[str, ...],
    num_samples: int,
    method: str,
) -> Row:
    """The figures of one row."""
    model = copy.deepcopy(workload.module)
    example = workload.example
    expected = qdq.predict(model, workload.evaluation, **workload.view)
    qdq.swap_modules(model, example, formats=FORMAT_NAMES)
    rewired = qdq.rewire_operations(model, example, formats=FORMAT_NAMES, exclude=exclude)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.safetensors"
        qdq.calibrate_model(model, workload.calibration, method=method, statistics=path)
        statistics = qdq.Statistics.load(path)

    subset = workload.calibration.subset(num_samples)
    measured = {}

    def choose(mix: str, pinned: dict[str, str]) -> FormatChoice:
        chosen = copy.deepcopy(model)
        choice = qdq.choose_formats(
            chosen, subset, statistics, sm=_SM, method=method, pinned=pinned, **workload.view
        )
        outputs = qdq.predict(chosen, workload.evaluation, **workload.view)
        measured[mix] = _compare(expected, outputs)
        return choice

    began = time.perf_counter()
    choice = choose("mixed", {})
    seconds = time.perf_counter() - began
    free: list[str] = []
    for entry in choice.choices:
        if entry.int8_db is not None:
            free += entry.layers
    for format_name in FORMAT_NAMES:
        choose(format_name, dict.fromkeys(free, format_name))
    formats = list(choice.formats.values())
    return Row(
        network=name,
        attention=attention,
        macs=rewired.int8_macs / rewired.macs,
        chosen_on={"int8": choice.int8_db, "fp8": choice.fp8_db, "mixed": choice.chosen_db},
        measured=measured,
        num_layers={format_name: formats.count(format_name) for format_name in FORMAT_NAMES},
        seconds=seconds,
    )


def _compare(expected: Outputs, outputs: Outputs) -> dict[str, float]:
    """SQNR of each output in dB."""
    return {name: sqnr_db(*pair) for name, pair in pair_arrays(expected, outputs).items()}


def _format_row(row: Row) -> str:
    """A few lines for a person."""
    lines = [
        f"{row.network}, attention in {row.attention}: {row.macs:.1%} of all MACs in 8 bits, "
        f"mix of {row.num_layers['int8']} int8 and {row.num_layers['fp8']} FP8, chosen in {row.seconds:.0f} s"
    ]
    for mix in ("int8", "fp8", "mixed"):
        figures = ", ".join(f"{name} {figure:.2f}" for name, figure in row.measured[mix].items())
        lines.append(
            f"  {mix:5} {figures} dB; on the samples of the choice {row.chosen_on[mix]} dB"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    run_command(bench_formats)
