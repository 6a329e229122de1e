"""Types of the fields of `report.json` that its readers need.

The file is checked against them when it is read. It may have more fields. Earlier versions did not write the optional
ones.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from annotated_types import MinLen
from typing_extensions import TypedDict

from qdq.report.records import Count, LayerRecord, Size


class OutputFigures(TypedDict):
    """One of several outputs of a model that was evaluated."""

    name: str
    top1: float | None
    top5: float | None
    agreement: float | None
    sqnr_db: float | None


class Candidate(TypedDict):
    """A model that was evaluated."""

    name: str
    top1: float | None
    top5: float | None
    agreement: float | None
    sqnr_db: float | None
    megabytes: Size | None
    outputs: NotRequired[list[OutputFigures]]
    scores: NotRequired[dict[str, float | None]]


class Evaluation(TypedDict):
    """The section `evaluation`."""

    images: Count
    candidates: Annotated[list[Candidate], MinLen(1)]
    constant_outputs: NotRequired[list[str]]


class TypeCensus(TypedDict):
    """An entry of `summary.census`: the layers of a type; reports of earlier versions have none."""

    expected: Count
    missing: list[str]
    macs: Size | None


class Summary(TypedDict):
    """The section `summary`."""

    weighted_layers: Count
    missed_modules: list[str]
    candidates: Annotated[dict[str, Candidate], MinLen(1)]
    onnx_megabytes: Size
    engine_megabytes: Size
    int8_macs: Size | None
    census_expected_int8: Count
    census_missing_int8: list[str]
    census: NotRequired[dict[str, TypeCensus]]


class State(TypedDict):
    """The quality of the outputs in one state of the model."""

    sqnr_db: float | None
    metric: float | None
    outputs: NotRequired[dict[str, float | None]]


class Step(State):
    """A unit that was left in float."""

    layer: str
    layers: list[str]


class Point(State):
    """A set of float layers and its cost."""

    float_layers: list[str]
    cost: float


class Analysis(State):
    """The section `analysis`."""

    mode: str
    images: Count
    steps: list[Step]
    stopped_by: str
    metric_name: str
    pinned: dict[str, str]
    pareto: list[Point]


class LayerFormat(TypedDict):
    """An entry of `formats.choices`."""

    layers: Annotated[list[str], MinLen(1)]
    format: str
    reason: str
    int8_db: float | None
    fp8_db: float | None


class Formats(TypedDict):
    """The section `formats`."""

    sm: Count
    choices: list[LayerFormat]
    int8_db: NotRequired[float | None]
    fp8_db: NotRequired[float | None]
    chosen_db: NotRequired[float | None]


class Target(TypedDict):
    """The section `target`: that of a run with several."""

    name: str
    sm: Count


class Measurement(TypedDict):
    """A point of fine-tuning at which it was evaluated."""

    step: Count
    metric: float | None


class Tuning(TypedDict):
    """The section `tuning`."""

    losses: list[float | None]
    curve: list[Measurement]
    text: str


class FoldedPair(TypedDict):
    """An entry of `fold`."""

    batchnorm: str
    folded: bool
    reason: str


class Module(TypedDict):
    """An entry of `swap.modules`."""

    name: str
    type: str
    action: str
    reason: str


class Swap(TypedDict):
    """The section `swap`."""

    modules: list[Module]


class Operation(TypedDict):
    """An entry of `rewire.operations`."""

    name: str
    function: str
    action: str
    reason: str


class Rewire(TypedDict):
    """The section `rewire`."""

    operations: list[Operation]


class Range(TypedDict):
    """An entry of `calibration`."""

    name: str
    note: str


class Finding(TypedDict):
    """An entry of `check.findings`."""

    rule: str
    severity: str
    message: str
    node: str


class LayerTime(TypedDict):
    """An entry of `check.payoff.layers`."""

    name: str
    float16: Size
    int8: Size


class Payoff(TypedDict):
    """The section `check.payoff`: predicted times in microseconds."""

    gpu: str
    inputs: dict[str, str]
    float16: Size
    int8: Size
    int8_half_rest: Size
    num_unknown: int
    word: str
    ratio: Size
    pays: bool
    layers: list[LayerTime]


class Check(TypedDict):
    """The section `check`."""

    path: str
    findings: list[Finding]
    payoff: NotRequired[Payoff | None]


class CensusRow(TypedDict):
    """An entry of `build.layers`."""

    module: str
    node: str
    op_type: str
    expected_int8: bool
    int8: bool
    reason: str
    promised: NotRequired[str]
    built: NotRequired[str]


class CoverageRow(TypedDict):
    """An entry of `build.coverage.layers`."""

    name: str
    share: Size | None


class Coverage(TypedDict):
    """The entry `build.coverage`."""

    layers: list[CoverageRow]


class Build(TypedDict):
    """The section `build`."""

    backend: str
    backend_version: str
    sm: int | None
    engine_bytes: Count
    seconds: Size
    layers: list[CensusRow]
    coverage: Coverage
    trtexec: dict[str, str]
    warnings: list[str]


class Data(TypedDict):
    """The section `data`."""

    calibration: str
    evaluation: str
    labels: str
    labels_digest: NotRequired[str]


class JudgedStep(TypedDict):
    """The model after a step."""

    name: str
    sqnr_db: float | None
    agreement: float | None
    outputs: dict[str, float | None]
    is_undone: bool


class JudgedSteps(TypedDict):
    """The section `steps`."""

    description: str
    images: Count
    steps: list[JudgedStep]
    notes: list[str]


class CenteredInput(TypedDict):
    """A tensor that may be centered."""

    read_by: list[str]
    offset: float
    gain_db: float
    reason: str


class Centering(TypedDict):
    """The section `centering`."""

    inputs: list[CenteredInput]
    float_db: float | None
    text: str


class SplitPath(TypedDict):
    """A path along which channels may be split."""

    layers: list[str]
    channels: Count
    free: Count
    added: Count
    copied: list[Count]
    predicted_db: float | None
    reason: str


class Splitting(TypedDict):
    """The section `splitting`."""

    paths: list[SplitPath]
    float_db: float | None
    extra_macs: Size
    text: str


class StoredSections(TypedDict):
    """All sections of a report."""

    format: str
    model: str
    model_sha256: NotRequired[str]
    data: Data
    summary: Summary
    findings: list[str]
    evaluation: Evaluation
    target: NotRequired[Target | None]
    formats: NotRequired[Formats | None]
    analysis: Analysis
    fold: list[FoldedPair]
    centering: NotRequired[Centering | None]
    splitting: NotRequired[Splitting | None]
    swap: Swap
    rewire: Rewire
    steps: NotRequired[JudgedSteps | None]
    tuning: NotRequired[Tuning | None]
    calibration: list[Range]
    export: dict[str, Any]
    check: Check
    build: Build
    layers: list[LayerRecord]
    command: str
    settings: dict[str, Any]
    seed: Count
    environment: dict[str, str]
    seconds: dict[str, Size]


class RunState(TypedDict):
    """The fields that are read from the `run.json` of a run without a report."""

    stage: str


class JudgedOutput(TypedDict):
    """The fields of an output that the gate reads."""

    name: str
    sqnr_db: float | None


class JudgedCandidate(TypedDict):
    """The fields of a candidate that the gate reads."""

    name: str
    top1: NotRequired[float | None]
    top5: NotRequired[float | None]
    agreement: NotRequired[float | None]
    sqnr_db: NotRequired[float | None]
    outputs: NotRequired[list[JudgedOutput]]
    scores: NotRequired[dict[str, float | None]]


class JudgedEvaluation(TypedDict):
    """The fields of `evaluation` that the gate reads."""

    images: NotRequired[Count]
    candidates: Annotated[list[JudgedCandidate], MinLen(1)]


class JudgedSummary(TypedDict, total=False):
    """The fields of `summary` that the gate reads."""

    int8_macs: Size | None
    onnx_megabytes: Size | None
    census: dict[str, TypeCensus]


class JudgedData(TypedDict, total=False):
    """The fields of `data` that the gate reads."""

    labels_digest: str | None


class JudgedLayer(TypedDict, total=False):
    """The fields of a layer in float that the gate reads."""

    module: str
    node: str
    int8: bool
    built: str
    reason: str


class JudgedBuild(TypedDict, total=False):
    """The fields of `build` that the gate reads."""

    layers: list[JudgedLayer]
    coverage: Coverage


class JudgedSections(TypedDict):
    """The sections that the gate reads, also from earlier versions; a missing field is reported where it is needed."""

    evaluation: JudgedEvaluation
    summary: NotRequired[JudgedSummary]
    data: NotRequired[JudgedData]
    build: NotRequired[JudgedBuild]
