"""Fixed point, min-max, log and tanh against values and names that users of pytorch-playground have."""

import inspect
import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import qdq.systems as systems
from qdq.cli.recipes import load_recipe

GOLDEN = Path(__file__).parents[1] / "data" / "golden"


def load_cases(name):
    return json.loads((GOLDEN / name).read_text())["cases"]


FUNCTIONS = load_cases("playground_functions.json")
MODULES = load_cases("playground_modules.json")
CLI = load_cases("playground_cli.json")


def run(case):
    settings = {key: case[key] for key in ("overflow_rate", "sf", "bits") if key in case}
    return getattr(systems, case["function"])(torch.tensor(case["input"]), **settings)


@pytest.mark.parametrize("case", [case for case in FUNCTIONS if not case.get("fault")])
def test_values(case):
    result = run(case)
    if case["function"] == "compute_integral_part":
        assert result == case["expected"]
    else:
        torch.testing.assert_close(result, torch.tensor(case["expected"]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", [case for case in FUNCTIONS if case.get("fault")])
def test_faults_are_mended(case):
    result = run(case)
    assert bool(torch.isfinite(result).all())
    inputs = torch.tensor(case["input"])
    if case["function"] == "tanh_quantize":
        # Only the ends differ: the source has infinity there.
        expected = torch.tensor([[float(value) for value in row] for row in case["expected"]])
        is_end = expected.isinf()
        end = torch.tensor(1 - 1 / (2 * (2 ** case["bits"] - 1))).atanh()
        torch.testing.assert_close(result[~is_end], expected[~is_end], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result[is_end], expected[is_end].sign() * end)
    elif case["function"] == "min_max_quantize":
        assert set(result.unique().tolist()) == {inputs.min().item(), inputs.max().item()}
    elif case["bits"] == 1:
        assert result.shape == inputs.shape
        torch.testing.assert_close(result.abs(), torch.full_like(inputs, inputs.abs().mean()))
    else:
        assert result.abs().unique().numel() == 2  # a magnitude of one bit: two levels, not three
        assert not torch.allclose(result, torch.tensor(case["expected"]))


STEPS = [case for case in MODULES if "steps" in case]
INSERTIONS = [case for case in MODULES if "steps" not in case]


@pytest.mark.parametrize("case", STEPS, ids=lambda case: case["module"])
def test_steps(case):
    counter = case.get("counter", 1)
    quantizer = getattr(systems, case["module"])(
        "conv1_quant", case["bits"], overflow_rate=case.get("overflow_rate", 0.0), counter=counter
    )
    for step in case["steps"]:
        output = quantizer(torch.tensor(step["input"]))
        if case.get("fault"):
            # The logarithm has 7 bits, so it has one bit less after the point than the source takes.
            assert quantizer.sf == step["sf"] - 1
            assert repr(quantizer) == step["repr"].replace("sf=5", "sf=4")
        else:
            torch.testing.assert_close(output, torch.tensor(step["output"]), rtol=1e-4, atol=1e-5)
            assert quantizer.sf == step["sf"]
            assert repr(quantizer) == step["repr"]
        assert quantizer.counter == step["counter"]


def make_model():
    inner = nn.Sequential(nn.Conv2d(4, 4, 3), nn.ReLU())
    features = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 4, 3),
            bn1=nn.BatchNorm2d(4),
            relu1=nn.ReLU(),
            pool=nn.AvgPool2d(2),
            mp=nn.MaxPool2d(2),
            inner=inner,
        )
    )

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = features
            self.head = nn.Linear(4, 2)

        def forward(self, images):
            return self.head(self.features(images).mean((2, 3)))

    return Network().eval()


@pytest.mark.parametrize("case", INSERTIONS, ids=lambda case: case["type"])
def test_inserted_modules(case):
    model = systems.duplicate_model_with_quant(
        make_model(), case["bits"], counter=case["counter"], type=case["type"]
    )
    modules = {}
    for name, module in model.named_modules():
        text = type(module).__name__
        if isinstance(module, systems.LinearQuant | systems.NormalQuant):
            function = getattr(getattr(module, "quant_func", None), "__name__", "")
            text = f"{text}:{module.name}:{function}"
        modules[name] = text
    del modules[""]
    assert modules == case["modules"]


ACCURACY = {case["model"]: case for case in load_cases("playground_accuracy.json")}


def test_published_accuracies_in_the_docs():
    page = (Path(__file__).parents[2] / "docs" / "systems.md").read_text()
    table = page.partition("| network | float | 12 | 10 | 8 | 6 |")[2].partition("\n\n")[0]
    rows = [row.strip("|").split("|") for row in table.strip().splitlines()[1:]]
    assert len(rows) >= 4
    for name, *cells in ([cell.strip() for cell in row] for row in rows):
        case = ACCURACY[name]
        published = [case[column].partition("/")[0] for column in ("float", "12", "10", "8", "6")]
        assert cells == published, name


RECIPE = load_recipe("fixed_point")
PARAMETERS = inspect.signature(RECIPE.fixed_point).parameters
OTHERS = {
    "--data_root": None,  # the source has a folder of its machine
    "--model_root": Path("~/.torch/models/"),
    "--logdir": Path("log/default"),
}


@pytest.mark.parametrize(
    "case", [case for case in CLI if "option" in case], ids=lambda case: case["option"]
)
def test_options(case):
    name = case["option"].removeprefix("--")
    if name == "data_root":
        name = "data_dir"  # of which it is a synonym
    default = OTHERS.get(case["option"], case["default"])
    assert PARAMETERS[name].default == default
    if "choices" in case:
        assert RECIPE.QuantMethod.__args__ == tuple(case["choices"].split("|"))


@pytest.mark.parametrize("case", [case for case in CLI if "types" in case])
def test_types(case):
    names = set(case["types"].split())
    assert names <= {*RECIPE.UNAVAILABLE, *RECIPE.TORCHVISION_NAMES}


@pytest.mark.parametrize("case", [case for case in CLI if "line" in case])
def test_line(case, monkeypatch, tmp_path):
    assert (case["file"], case["line"]) == (RECIPE.RESULT_FILE, RECIPE.RESULT_LINE)
