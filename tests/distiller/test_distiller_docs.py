"""docs/distiller.md against the code: options, defaults, keys, files, names, and links to it."""

import inspect
import re
from pathlib import Path

import cyclopts
import pytest
from golden import read_cases

pytest.importorskip("torchvision", reason="needs the extra 'demo'")

from qdq import distiller
from qdq.cli.recipes import load_recipe
from qdq.distiller.command.former_options import FIXES
from qdq.distiller.files import checkpoint, file_kinds
from qdq.distiller.files.quantizer_classes import CLASSES, find_class, list_keys
from qdq.distiller.settings.layer_settings import LAYER_KEYS
from qdq.distiller.statistics import histogram_images, histograms
from qdq.distiller.training.learning_rates import LR_SCHEDULERS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "distiller.md").read_text()
WORDS = re.sub(r"\s+", " ", PAGE)


def show(default):
    if default is None or default == ():
        return "-"
    if default is False:
        return "off"
    return f"`{int(default) if default == 1 else default}`"


def list_options():
    """The row that each option has in the table, and the names of the refused ones."""
    recipe = load_recipe("compress_classifier")
    app = cyclopts.App(default_parameter=cyclopts.Parameter(negative=()))
    app.default(recipe.compress_classifier)
    rows, refused = [], []
    for argument in app.assemble_argument_collection():
        if not argument.name.startswith("--"):
            continue
        names = ", ".join(f"`{name}`" for name in argument.names)
        if argument.name.removeprefix("--").replace("-", "_") in FIXES:
            refused.append(names)
        else:
            rows.append(f"| {names} | {show(argument.field_info.default)} | ")
    return rows, refused


ROWS, REFUSED = list_options()


def test_there_are_options():
    assert len(ROWS) > 60 and len(REFUSED) == len(FIXES)


@pytest.mark.parametrize("row", ROWS)
def test_the_table_has_every_option_with_its_default(row):
    assert row in PAGE


def test_the_table_has_no_other_options():
    written = re.findall(r"^\| (`--.*?) \| ", PAGE, re.MULTILINE)
    assert len(written) == len(ROWS)


@pytest.mark.parametrize("names", REFUSED)
def test_refused_options_are_named(names):
    assert names in WORDS


def test_keys_of_a_quantizer_after_training():
    parameters = inspect.signature(distiller.PostTrainLinearQuantizer).parameters
    for key in list_keys(distiller.PostTrainLinearQuantizer):
        default = parameters[key].default
        shown = "" if default is None else f" {getattr(default, 'name', default)}"
        assert f"| `{key}` |{shown} | " in PAGE


def test_keys_of_layers():
    table = PAGE.partition("| key of a layer |")[2].partition("\n\n")[0]
    assert set(LAYER_KEYS) | {"fp16", "from_output: True"} == set(re.findall(r"`([^`]+)`", table))


@pytest.mark.parametrize("name", [name for name in CLASSES if name != "PostTrainLinearQuantizer"])
def test_keys_of_training(name):
    row = next(
        line
        for line in PAGE.splitlines()
        if line.startswith(f"| `{name}` | ") or line == f"| `{name}` | |"
    )
    common = {"bits_activations", "bits_weights", "bits_bias", "overrides"}
    if "_" in row:
        assert set(list_keys(find_class(name, ""))) - common == set(
            re.findall(r"`(\w+_\w+|mode)`", row)
        )
    else:
        assert set(list_keys(find_class(name, ""))) == common


def test_schedulers():
    for name in LR_SCHEDULERS:
        assert name in PAGE


def test_files_of_the_source_and_of_this():
    table = PAGE.partition("## Files")[2].partition("\n## ")[0]
    for case in read_cases("distiller_logs_files"):
        if case["kind"] in ("file", "folder"):
            assert case["name"].partition("-")[0] in table
    for name in (
        file_kinds.STATISTICS_FILE,
        file_kinds.PREPARED_STATISTICS_FILE,
        file_kinds.PARAMETERS_FILE,
        checkpoint.FILE,
        histograms.FILE,
        histogram_images.FOLDER,
    ):
        assert f"`{name}" in table


def list_homes():
    """The names on the right of the table of classes."""
    table = PAGE.partition("## Classes and functions")[2].partition("\n## ")[0]
    homes = []
    for line in table.splitlines():
        cells = line.split(" | ")
        if len(cells) != 2 or "---" in line or cells[0] == "| there":
            continue
        names = cells[0] if "the same names" in cells[1] else cells[1]
        homes += re.findall(r"`(\w+)`", names)
    return homes


@pytest.mark.parametrize("name", list_homes())
def test_names_are_attributes(name):
    fields = {"quantize", "dequantize", "fake_quantize", "prepare_model"}
    if name in fields:
        owners = (distiller.LinearParams, distiller.PostTrainLinearQuantizer)
        assert any(hasattr(owner, name) for owner in owners)
    else:
        assert hasattr(distiller, name)


def test_classes_of_the_source_have_a_row():
    for case in read_cases("distiller_yaml"):
        if "class_" in case:
            assert f"`{case['class_']}`" in PAGE


def test_pages_link_to_it():
    assert "docs/distiller.md" in (ROOT / "README.md").read_text()
    assert "distiller.md" in (ROOT / "docs" / "systems.md").read_text()


ACCURACIES = read_cases("distiller_accuracy")
WORDS_OF_KEYS = {
    "top1": "top-1",
    "top5": "top-5",
    "fp32": "float",
    "fp32_mean": "float mean",
    "best_validation": "best in validation",
    "tolerance_rel": "relative tolerance",
}


def describe_settings(case):
    """The settings of a published figure in words."""
    parts = []
    if "mode" in case:
        scales = "channel" if case["per_channel"] else "tensor"
        parts += [case["mode"], f"{case['bits']} bits", f"per {scales}", f"clip {case['clip']}"]
    if "first_last_bits" in case:
        ends = "" if case["clip_last"] else "not "
        parts += [f"first and last {case['first_last_bits']}", f"additions {case['add_bits']}"]
        parts += [f"last {ends}clipped"]
    if "init" in case:
        parts.append(f"init {case['init']}")
    if "epochs" in case:
        parts.append(f"{case['epochs']} epochs")
    if "cli" in case:
        parts.append(f"`{case['cli']}`")
    return ", ".join(parts)


def describe_figures(figures):
    """Numbers with their words, those of the float network behind them."""
    parts = []
    for key, value in figures.items():
        word = WORDS_OF_KEYS.get(key, key)
        if isinstance(value, dict):
            parts += [f"{word} {part}" for part in describe_figures(value).split(", ")]
        elif isinstance(value, float):
            parts.append(f"{word} {value:g}" if value < 10 else f"{word} {value}")
    return ", ".join(parts)


def list_rows(case):
    """The rows of a case: one, or one for each stage of a search."""
    settings = describe_settings(case)
    stages = [case]
    names = [settings]
    if "start" in case:
        stages = [case["start"], *case["after"]]
        names = [f"{settings}, start"]
        names += [f"{settings}, {stage['evaluations']} evaluations" for stage in case["after"]]
    for name, stage in zip(names, stages, strict=True):
        yield f"| {case['model']} | {name} | {describe_figures(stage)} |".replace("|  |", "| |")


def test_published_accuracies_are_all_there():
    table = PAGE.partition("## Published figures")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ")][1:]
    assert rows == [row for case in ACCURACIES for row in list_rows(case)]
    assert len(ACCURACIES) == 26
