"""docs/compat.md against the code: its table names every public name where it is, and its two scripts agree."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from qdq.compat import quant_modules
from qdq.quantizer import named_quantizers

PAGE = (Path(__file__).parents[2] / "docs" / "compat.md").read_text()
ROOT = "qdq.compat"

# What scripts import, module by module, written down from the documentation of pytorch-quantization.
DIMENSIONS = ("1d", "2d", "3d")
LAYERS = [
    f"{kind}{n}"
    for kind in ("Conv", "ConvTranspose", "MaxPool", "AvgPool", "AdaptiveAvgPool")
    for n in DIMENSIONS
]
LAYERS += ["Linear", "LSTM", "LSTMCell"]
INSTANCE_NORMS = [f"QuantInstanceNorm{n}" for n in DIMENSIONS]
SPECIFIED = {
    "": "initialize deactivate enable_onnx_export __version__ calib cuda_ext nn optim quant_modules tensor_quant utils "
    "version",
    "version": "__version__",
    "quant_modules": "initialize deactivate enable_onnx_export QuantModuleReplacementHelper _quant_entry "
    "_DEFAULT_QUANT_MAP _quant_module_helper_object",
    "tensor_quant": "QuantDescriptor ScaledQuantDescriptor tensor_quant fake_tensor_quant legacy_fake_tensor_quant "
    "_tensor_quant "
    "fake_affine_tensor_quant scaled_e4m3 TensorQuantFunction FakeTensorQuantFunction LegacyFakeTensorQuantFunction "
    "FakeAffineTensorQuantFunction ScaledE4M3Function QUANT_DESC_8BIT_PER_TENSOR QUANT_DESC_UNSIGNED_8BIT_PER_TENSOR "
    "QUANT_DESC_8BIT_LINEAR_WEIGHT_PER_ROW "
    + " ".join(
        f"QUANT_DESC_8BIT_CONV{kind}{n}D_WEIGHT_PER_CHANNEL"
        for kind in ("", "TRANSPOSE")
        for n in (1, 2, 3)
    ),
    "cuda_ext": "fake_tensor_quant_ fake_tensor_quant fake_tensor_quant_with_axis fake_e4m3fy",
    "calib": "MaxCalibrator HistogramCalibrator calibrate_weights calibrator max histogram",
    "calib.calibrator": "_Calibrator",
    "calib.max": "MaxCalibrator",
    "calib.histogram": "HistogramCalibrator _compute_amax_mse _compute_amax_percentile _compute_amax_entropy",
    "nn": " ".join(
        [
            "TensorQuantizer Clip functional modules",
            *LAYERS,
            *(f"Quant{x}" for x in LAYERS),
            *INSTANCE_NORMS,
        ]
    ),
    "nn.functional": "clip ClipFunction",
    "nn.modules": "tensor_quantizer _utils clip quant_linear quant_conv quant_pooling quant_instancenorm quant_rnn",
    "nn.modules._utils": "QuantMixin QuantInputMixin pop_quant_desc_in_kwargs",
    "nn.modules.clip": "Clip",
    "nn.modules.quant_linear": "QuantLinear Linear",
    "nn.modules.quant_conv": "_QuantConvNd _ConvNd _QuantConvTransposeNd QuantConv2d QuantConvTranspose2d Conv2d",
    "nn.modules.quant_pooling": "QuantMaxPool2d QuantAvgPool2d QuantAdaptiveAvgPool2d",
    "nn.modules.quant_instancenorm": "QuantInstanceNorm2d",
    "nn.modules.quant_rnn": "QuantLSTM QuantLSTMCell",
    "nn.modules.tensor_quantizer": "TensorQuantizer",
    "optim": "helper",
    "optim.helper": "match_parameters group_parameters freeze_parameters quant_weight_inplace",
    "utils": "reduce_amax quant_logging",
    "utils.quant_logging": "reset_logger_handler",
}
# Names without an underscore that those modules share among themselves; scripts have no business with them.
HELPERS = {
    *(
        "find_root",
        "largest_code",
        "missing_ranges",
        "named_quantizers",
        "quantized_weights",
        "require_bound",
    ),
    *("divide_by_number", "round_e4m3", "split_kwargs"),
}


def _section(title):
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def _codes(cell):
    return re.findall(r"`([^`]+)`", cell)


def _rows():
    """(names, modules, home) of each row of the tables of names."""
    lines = [line for line in _section("Every name").splitlines() if line.startswith("| `")]
    cells = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    assert {len(row) for row in cells} == {3}
    return [(_codes(names), _codes(modules), home) for names, modules, home in cells]


ROWS = _rows()
NAMED = [(module, name) for names, modules, _ in ROWS for module in modules for name in names]


def _resolve(path):
    """A dotted path: the longest part that is a module, then attributes."""
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            value = getattr(value, part)
        return value
    raise AssertionError(path)


def _home(module):
    return _resolve(f"{ROOT}.{module}".rstrip("."))


def _public(module):
    """Names without an underscore of what `module` defines, for a package also of what it takes from its modules."""
    home = f"{ROOT}." if hasattr(module, "__path__") else module.__name__
    for name, value in vars(module).items():
        origin = getattr(value, "__module__", None)
        if (
            not name.startswith("_")
            and name not in HELPERS
            and isinstance(origin, str)
            and origin.startswith(home)
        ):
            yield name, value


def test_every_specified_name_is_in_the_table():
    for module, names in SPECIFIED.items():
        assert [name for name in names.split() if not hasattr(_home(module), name)] == [], module
    documented = {(name, id(getattr(_resolve(module), name))) for module, name in NAMED}
    for module, names in SPECIFIED.items():
        found = {name: (name, id(getattr(_home(module), name))) for name in names.split()}
        assert [name for name, key in found.items() if key not in documented] == [], module


def test_every_public_name_is_in_the_table():
    documented = {(name, id(getattr(_resolve(module), name))) for module, name in NAMED}
    missing = {
        f"{module.__name__}.{name}"
        for module in map(_home, SPECIFIED)
        for name, value in _public(module)
        if (name, id(value)) not in documented
    }
    assert missing == set(), "add them to the table of docs/compat.md, or to HELPERS above"


@pytest.mark.parametrize(("module", "name"), NAMED)
def test_name_is_where_the_table_says(module, name):
    assert module == ROOT or module.startswith(f"{ROOT}.")
    assert isinstance(_resolve(module), ModuleType)
    assert hasattr(_resolve(module), name)


def test_no_name_is_said_twice():
    assert len(NAMED) == len(set(NAMED))


@pytest.mark.parametrize(
    ("names", "home"), [(names, home) for names, _, home in ROWS], ids=lambda value: str(value)[:40]
)
def test_home_exists_in_qdq(names, home):
    paths = [code for code in _codes(home) if re.match(r"(qdq|torch)\b", code)]
    assert home.startswith("none: ") or paths[0].startswith("qdq"), names
    for path in paths:
        assert not path.startswith(ROOT)
        assert _resolve(path) is not None


def _scripts():
    blocks = re.findall(
        r"^```python\n(.*?)^```", _section("Side by side"), re.MULTILINE | re.DOTALL
    )
    assert len(blocks) == 2
    return blocks


class Network(nn.Module):
    """Built by torch.nn's names at the time, as a script's own models are."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            *(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2)),
            *(nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()),
        )
        self.head = nn.Linear(16, 16)

    def forward(self, images):
        return self.head(self.features(images).mean((2, 3)))


def _build_model():
    torch.manual_seed(1)
    return Network()


@pytest.fixture
def both(tmp_path, monkeypatch):
    """The namespaces that the two scripts leave behind."""
    monkeypatch.chdir(tmp_path)
    # Put back at the end: the script sets them for the process.
    for entry in quant_modules._DEFAULT_QUANT_MAP:
        monkeypatch.setattr(
            entry.replace_mod,
            "default_quant_desc_input",
            entry.replace_mod.default_quant_desc_input,
        )
    batches = [torch.randn(4, 3, 12, 12) for _ in range(3)]
    namespaces = [
        {"__name__": "__main__", "build_model": _build_model, "batches": batches} for _ in range(2)
    ]
    try:
        for code, namespace in zip(_scripts(), namespaces, strict=True):
            exec(compile(code, "compat.md", "exec"), namespace)  # noqa: S102
    finally:
        quant_modules.deactivate()
    return namespaces


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripts_side_by_side_agree(both, tmp_path):
    compat, core = (
        {name: q.amax for name, q in named_quantizers(namespace["model"])} for namespace in both
    )
    assert compat.keys() == core.keys()
    assert len(compat) == 7
    for name, amax in compat.items():  # the least squared error, over bins that are not the same
        torch.testing.assert_close(
            amax.flatten(), core[name].flatten(), rtol=0 if "weight" in name else 0.02, atol=0
        )

    images = both[0]["batches"][0]
    found = {}
    for path, namespace in zip(("model_compat.onnx", "model_core.onnx"), both, strict=True):
        session = onnxruntime.InferenceSession(tmp_path / path)
        found[path] = session.run(None, {session.get_inputs()[0].name: images.numpy()})[0]
        with torch.no_grad():
            expected = namespace["model"](images).numpy()
        step = float(compat["head._input_quantizer"]) / 127  # what a tie may move
        assert np.abs(found[path] - expected).max() <= step
    assert np.corrcoef(*(outputs.ravel() for outputs in found.values()))[0, 1] > 0.9999
    assert (tmp_path / "model_core.onnx").stat().st_size < (
        tmp_path / "model_compat.onnx"
    ).stat().st_size
