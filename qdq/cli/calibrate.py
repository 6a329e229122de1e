"""`qdq calibrate show|merge|solve`: saved calibration statistics."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveFloat

from qdq.observers.methods import Method

CalibMethod = Literal[Method, "best"]
"""Methods of `calibrate_model`, for the signatures of recipes; "best" needs the model."""


def show(
    file: Path,
    /,
    *,
    tensor: str = "*",
    plots: Path | None = None,
    json: Path | None = None,
) -> int:
    """Print the statistics of each tensor, its range by every method, and the fraction that it clips. Needs no torch.

    For example:

        qdq calibrate show calibration.safetensors
        qdq calibrate show calibration.safetensors --tensor "layer1.*" --plots layer1.html

    Args:
        file: Statistics that calibration saved.
        tensor: Only the quantizers with this name; a name or a glob.
        plots: Also write a page of histograms to this file, .html.
        json: Also write the figures to this file.
    """
    from qdq.files import write_json
    from qdq.run import guard_command
    from qdq.statistics import Statistics
    from qdq.statistics.show import format_statistics, write_plots

    guard_command(inputs=[file], outputs=[plots, json])
    statistics = Statistics.load(file).select(tensor)
    summary = statistics.summarize()
    print(format_statistics(summary))
    if plots is not None:
        write_plots(statistics, summary, plots)
    if json is not None:
        write_json(json, summary)
    return 0


def merge(*files: Path, output: Annotated[Path, Parameter(alias="-o")]) -> int:
    """Merge statistics of one model on different data. Needs no torch.

    The result is what one pass over all of the data would have collected. Batches are numbered in the order of the
    files. Statistics of different models are refused.

    For example:

        qdq calibrate merge a.safetensors b.safetensors -o both.safetensors

    Args:
        files: Two or more files of statistics.
        output: File to write, .safetensors; a readable summary is written next to it as .json.
    """
    from qdq.run import guard_command
    from qdq.statistics import merge_files
    from qdq.text import printable

    guard_command(
        inputs=files,
        outputs=[output, output.with_suffix(".json")],
        in_place=[(output, file) for file in files],
    )
    merged = merge_files(files, output)
    counts = f"{len(merged.tensors)} tensors, {merged.batches} batches of {len(files)} files"
    print(f"{printable(output)}: {counts}")
    return 0


def solve(
    file: Path,
    /,
    *,
    method: Method = "mse",
    percentile: PositiveFloat | None = None,
    onnx: Path | None = None,
    output: Annotated[Path | None, Parameter(alias="-o")] = None,
    json: Path | None = None,
) -> int:
    """Compute every range again by another method, without data and without the model. Needs no torch.

    Prints amax of each tensor and the fraction of values beyond it. With --onnx it also writes a copy of an exported
    file with the new scales; the exit code is 1 when some activations of that file could not get new scales.

    For example:

        qdq calibrate solve calibration.safetensors --method entropy
        qdq calibrate solve calibration.safetensors --method percentile --percentile 99.9 --onnx model.onnx -o new.onnx

    Args:
        file: Statistics that calibration saved.
        method: How a range is computed.
        percentile: For the method percentile, up to 100; 99.99 by default.
        onnx: A file that was exported from the calibrated model; it is not changed, unless --output names it.
        output: Where to write the copy with the new scales.
        json: Also write the ranges, and the changes in the copy, to this file.
    """
    from qdq.errors import ArgumentError
    from qdq.files import write_json
    from qdq.graph.tensors import list_data_files
    from qdq.run import guard_command
    from qdq.statistics import Statistics
    from qdq.statistics.rescale import rescale_onnx
    from qdq.statistics.show import format_ranges
    from qdq.text import make_printable, printable

    if (onnx is None) != (output is None):
        raise ArgumentError(
            "--onnx and --output go together.",
            "pass the file to read and the file to write, or neither.",
        )
    data_files = [] if onnx is None else list_data_files(onnx)
    guard_command(
        inputs=[file, onnx, *data_files], outputs=[output, json], in_place=[(output, onnx)]
    )
    options = {} if percentile is None else {"percentile": percentile}
    statistics = Statistics.load(file)
    if not statistics.complete:
        cut = f"cut off after {statistics.batches} batches"
        print(f"{printable(file)} contains a pass that was {cut}\n")
    ranges = statistics.solve_all(method, **options)
    print(format_ranges(statistics, ranges))
    rescaling = None
    if onnx is not None and output is not None:
        rescaling = rescale_onnx(onnx, output, statistics, method=method, **options)
        print(f"\n{make_printable(rescaling).format_table()}")
    if json is not None:
        write_json(json, {"method": method, **options, "amax": ranges, "onnx": rescaling})
    return 0 if rescaling is None or rescaling.is_whole else 1
