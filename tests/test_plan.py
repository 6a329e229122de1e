"""The decision as a file: written, edited, read, compared, applied."""

import pytest
import torch
from torch import nn

from qdq import (
    ArgumentError,
    DataError,
    Plan,
    analyze_layers,
    apply_plan,
    calibrate_model,
    diff_plans,
    enable_quantization,
    load_plan,
    rewire_operations,
    save_plan,
    swap_modules,
)
from qdq.cli.main import main
from qdq.errors import ArgumentTypeError
from qdq.plan import PlanChange, PlanEntry
from qdq.quantizer import named_quantizers


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        return self.head(torch.relu(self.conv(x) + x)).mean((2, 3))


@pytest.fixture
def block():
    batch = torch.randn(4, 3, 8, 8)
    model = Block().eval()
    swap_modules(model, batch, include=["*"])
    rewire_operations(model, batch)
    calibrate_model(model, [batch], method="max")
    return model, batch


def test_round_trip(tmp_path):
    names = {
        "a.b": PlanEntry("float", "the worst: it's #1", 1.25),
        "": PlanEntry("int8"),
        "<script>": PlanEntry("int8"),
    }
    plan = Plan(names, "kl")
    path = save_plan(plan, tmp_path / "plan.yaml")
    assert load_plan(path) == plan
    assert path.read_text().startswith("# qdq plan")


@pytest.mark.parametrize(("precision", "words"), [("int8", "int8"), ("fp8", "int8 or FP8")])
def test_the_head_names_the_formats(precision, words, tmp_path):
    path = save_plan(Plan({"a": PlanEntry(precision)}, "kl"), tmp_path / "plan.yaml")
    assert path.read_text().startswith(
        f"# qdq plan: which layer runs in {words} and which in float"
    )


def test_a_short_form_is_enough(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("layers:\n  conv: float\n  head: {precision: int8}\n")
    assert load_plan(path).precisions == {"conv": "float", "head": "int8"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: [1, 2]", "layers is a list of 2"),
        ("layer: {}", "layer is unknown"),
        ("metric: kl", "layers is missing"),
        ("layers: {a: {precision: fp16}}", "fp16"),
        ("layers: {a: {precision: int8, gian: 1}}", "gian"),
        ("layers: {a: {reason: x}}", "layers.a.precision is missing"),
        ("layers: {a: {precision: int8, gain: big}}", "gain"),
        ("layers: {a: 3}", "layers.a is 3"),
        ("a: [", "not YAML"),
        ("", "the whole is null"),
        ("!!python/object/apply:os.getcwd []", "not YAML"),
        ("layers: {a: float, b: int8, a: int8}", "'a' occurs twice"),
        ("layers: {a: {precision: int8, precision: float}}", "'precision' occurs twice"),
        ("layers: {[a]: float}", "a key is not a name"),
        ("layers: !!int abc", "not YAML"),
        ("layers: {a: !!float x}", "not YAML"),
        ("layers: {a: !!bool x}", "not YAML"),
        ("layers: {a: 2001-99-99}", "precision is '2001-99-99'"),
        ("layers: {a: !!timestamp x}", "precision is 'x'"),
        ("layers: {a: " + "[" * 3000 + "]" * 3000 + "}", "not YAML"),
        ("layers: {a: &x {precision: int8}, b: *x}", "aliases are not supported"),
        ("layers: {a: !!binary aGk=}", "not YAML"),
        ("layers: {a: {precision: int8, gain: true}}", "gain is true"),
        ("layers: {a: {precision: int8, gain: .nan}}", "nan is not a number"),
        ("layers: {a: {precision: int8, gain: -.inf}}", "inf is not a number"),
        ("layers: {a: {precision: int8, gain: 1" + "0" * 400 + "}}", "too large"),
    ],
)
def test_bad_files(tmp_path, text, message):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        load_plan(path)
    with pytest.raises(DataError, match="cannot read"):
        load_plan(tmp_path / "missing.yaml")


@pytest.mark.parametrize(
    "name", ["1.10", "yes", "~", "0x10", "1e3", "2001-01-01", "1:30", "<<", "a: b", " a"]
)
def test_a_name_is_what_is_written(tmp_path, name):
    path = save_plan(Plan({name: PlanEntry("int8")}), tmp_path / "plan.yaml")
    assert list(load_plan(path).layers) == [name]
    if name.strip() == name and ": " not in name:
        path.write_text(f"layers:\n  {name}: float\n")
        assert list(load_plan(path).layers) == [name]


def test_an_infinite_gain_is_null_in_the_file(tmp_path):
    path = save_plan(Plan({"a": PlanEntry("int8", gain=float("inf"))}), tmp_path / "plan.yaml")
    assert "gain: null" in path.read_text()
    assert load_plan(path).layers["a"].gain is None


def test_patterns_mean_the_same_to_apply_and_to_the_analysis(block):
    model, batch = block
    # The name goes before the pattern.
    plan = Plan({"*": PlanEntry("int8"), "conv": PlanEntry("float")})
    assert analyze_layers(
        model, [batch], pinned=dict(reversed(plan.precisions.items()))
    ).float_layers == ["conv"]
    enable_quantization(model)
    assert apply_plan(model, plan, batch) == ["conv"]
    assert not model.conv.input_quantizer.is_enabled
    assert model.stem.input_quantizer.is_enabled


@pytest.mark.parametrize(
    ("precisions", "message"),
    [
        ({"s*": "float", "*m": "int8"}, "'s\\*' and '\\*m' say float and int8 for stem"),
        ({"act": "int8"}, "'act'"),
        ({"act": "float"}, "'act'"),
        ({"left": "int8"}, "'left'"),
    ],
)
def test_what_cannot_be_obeyed_is_refused(precisions, message):
    batch = torch.randn(4, 16)
    parts = {"stem": nn.Linear(16, 16), "act": nn.ReLU(), "left": nn.Linear(16, 16)}
    model = nn.Sequential()
    for name, part in parts.items():
        model.add_module(name, part)
    swap_modules(model.eval(), batch, include=["*"], exclude=["left"])
    calibrate_model(model, [batch], method="max")
    with pytest.raises(ArgumentError, match=message):
        analyze_layers(model, [batch], pinned=precisions)
    with pytest.raises(ArgumentError, match=message):
        apply_plan(
            model,
            Plan({name: PlanEntry(precision) for name, precision in precisions.items()}),
            batch,
        )
    assert apply_plan(model, Plan({"left": PlanEntry("float")}), batch) == []  # it is in float


def states_of(model):
    return {name: quantizer.is_enabled for name, quantizer in named_quantizers(model)}


def test_apply_is_what_the_analysis_did(block, tmp_path):
    model, batch = block
    analysis = analyze_layers(
        model, [batch], max_float_layers=2, max_float_share=1, pinned={"conv": "float"}
    )
    states = states_of(model)
    assert not states["_add_quantizer"]  # there only for `conv`
    path = save_plan(analysis.plan, tmp_path / "plan.yaml")
    enable_quantization(model)
    assert sorted(apply_plan(model, load_plan(path), batch)) == sorted(analysis.float_layers)
    assert states_of(model) == states
    apply_plan(model, Plan({"conv": PlanEntry("int8")}), batch)
    assert model._add_quantizer.is_enabled


def test_apply_refuses_what_the_model_has_not(block):
    model, batch = block
    with pytest.raises(ArgumentError, match="nose"):
        apply_plan(model, Plan({"conv": PlanEntry("float"), "nose": PlanEntry("float")}), batch)
    assert model.conv.input_quantizer.is_enabled


def test_diff(tmp_path, capsys):
    first = Plan(
        {
            "a": PlanEntry("int8"),
            "b": PlanEntry("float"),
            "c": PlanEntry("int8"),
            "e": PlanEntry("fp8"),
        }
    )
    second = Plan(
        {
            "b": PlanEntry("int8", "edited"),
            "c": PlanEntry("int8", gain=2.0),
            "d": PlanEntry("float"),
            "e": PlanEntry("int8"),
        }
    )
    assert diff_plans(first, second) == [
        PlanChange("a", "int8", None),
        PlanChange("b", "float", "int8"),
        PlanChange("e", "fp8", "int8"),
        PlanChange("d", None, "float"),
    ]
    paths = [
        str(save_plan(plan, tmp_path / name))
        for plan, name in ((first, "one.yaml"), (second, "other.yaml"))
    ]
    with pytest.raises(SystemExit) as stop:
        main(["plan", "diff", *paths])
    assert stop.value.code == 1
    assert "b  float -> int8\ne  fp8 -> int8\n" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(["plan", "diff", paths[0], paths[0]])
    assert stop.value.code == 0
    with pytest.raises(SystemExit) as stop:
        main(["plan", "diff", paths[0], "missing.yaml"])
    assert stop.value.code == 2


def test_a_plan_that_pins_keeps_what_was_measured(block, tmp_path):
    model, batch = block
    first = analyze_layers(model, [batch], max_float_layers=1, max_float_share=1).plan
    (worst,) = [name for name, entry in first.layers.items() if entry.precision == "float"]
    edited = Plan(
        {
            **first.layers,
            worst: PlanEntry("int8", first.layers[worst].reason, first.layers[worst].gain),
        }
    )
    enable_quantization(model)

    path = save_plan(edited, tmp_path / "plan.yaml")
    for _ in range(3):  # a plan of a plan of a plan says it once
        path = save_plan(analyze_layers(model, [batch], pinned=load_plan(path)).plan, path)
    second = load_plan(path)
    assert second.precisions == edited.precisions
    for name, entry in second.layers.items():
        assert entry.gain == pytest.approx(first.layers[name].gain, abs=1e-6)
        assert entry.reason == f"pinned; earlier: {first.layers[name].reason}"

    by_divergence = analyze_layers(model, [batch], metric="kl", pinned=second).plan
    assert by_divergence.metric == "kl"
    entry = by_divergence.layers[worst]
    assert entry.gain is None
    assert entry.reason.startswith("pinned; earlier: step 1 of the search")
    assert entry.reason.endswith(f"gain {second.layers[worst].gain:g} in sqnr")
    assert analyze_layers(model, [batch], pinned={worst: "int8"}).plan.layers[worst] == PlanEntry(
        "int8", "pinned"
    )


def test_a_plan_that_is_not_there_cannot_be_corrected(tmp_path):
    (tmp_path / "damaged.yaml").write_text("layers: 1")
    for name, fix in {
        "missing.yaml": "give the plan.yaml of a run",
        "damaged.yaml": "correct it by hand",
    }.items():
        with pytest.raises(DataError) as caught:
            load_plan(tmp_path / name)
        assert caught.value.fix.startswith(fix)


def test_only_a_plan_is_saved(tmp_path):
    with pytest.raises(ArgumentTypeError, match="plan is of type Linear; expected a Plan"):
        save_plan(torch.nn.Linear(2, 2), tmp_path / "plan.yaml")
    assert not (tmp_path / "plan.yaml").exists()
