"""The classification flow of the field in its original shape, on scikit-learn's digits: train, calibrate, tune, export.

Held: every checkpoint `<model>-<method>-<images>.pth` holds what its method gives, solved here with numpy from the
histogram of each calibrator; tuning moves weights and no range; the file runs in ONNX Runtime and classifies as torch
does; every stage keeps Top1 within two points; the exit code says whether more than `--threshold` was lost.
"""

import argparse
import itertools
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn

from qdq import measure_tie_floor, predict
from qdq.compat import calib, quant_modules
from qdq.compat import nn as quant_nn
from qdq.compat.nn.modules.tensor_quantizer import TensorQuantizer
from qdq.compat.tensor_quant import QUANT_DESC_8BIT_PER_TENSOR, QuantDescriptor
from qdq.errors import ExportError, QdqError
from qdq.metrics import sqnr_db

datasets = pytest.importorskip("sklearn.datasets", reason="needs the extra 'demo'")

PERCENTILES = [99.9, 99.99, 99.999, 99.9999]
METHODS = [*[f"percentile-{p}" for p in PERCENTILES], "mse", "entropy"]
BATCH, CALIB_BATCHES = 64, 4
POINTS = 2.0  # Top1 that a stage may lose

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning"
)


@pytest.fixture(autouse=True)
def _restore():
    """The flow changes class defaults, and leaves them."""
    classes = [entry.replace_mod for entry in quant_modules._DEFAULT_QUANT_MAP]
    saved = [
        (cls, {key: value for key, value in vars(cls).items() if key.startswith("default_")})
        for cls in classes
    ]
    yield
    quant_modules.deactivate()
    for cls, before in saved:
        for key in [key for key in vars(cls) if key.startswith("default_")]:
            delattr(cls, key)
        for key, value in before.items():
            setattr(cls, key, value)
    assert torch.nn.Conv2d is nn.modules.conv.Conv2d and not TensorQuantizer.use_fb_fake_quant


# ------------------------------------------------------------------------------------------------- network and images


class Block(nn.Module):
    def __init__(self, c1, c2, stride):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(c1, c2, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(c2)
        self.conv2 = torch.nn.Conv2d(c2, c2, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(c2)
        self.downsample = None
        if stride != 1 or c1 != c2:
            self.downsample = nn.Sequential(
                torch.nn.Conv2d(c1, c2, 1, stride, bias=False), nn.BatchNorm2d(c2)
            )

    def forward(self, x):
        identity = x if self.downsample is None else self.downsample(x)
        return torch.relu(self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))) + identity)


class ResNet6(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = torch.nn.Conv2d(1, 12, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(12)
        self.layer1 = Block(12, 12, 1)
        self.layer2 = Block(12, 24, 2)
        self.avgpool = torch.nn.AdaptiveAvgPool2d(1)
        self.fc = torch.nn.Linear(24, 10)

    def forward(self, x):
        x = self.layer2(self.layer1(torch.relu(self.bn1(self.conv1(x)))))
        return self.fc(torch.flatten(self.avgpool(x), 1))


def prepare_data():
    """Batches to train on, and to test on."""
    digits = datasets.load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] / 8 - 1
    images = nn.functional.interpolate(images, size=16, mode="bilinear")
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], torch.from_numpy(digits.target)[order]
    batches = list(zip(images.split(BATCH), labels.split(BATCH), strict=True))
    batches = [batch for batch in batches if len(batch[0]) == BATCH]
    return batches[:20], batches[20:]


@pytest.fixture(scope="module")
def data():
    return prepare_data()


@pytest.fixture(scope="module")
def weights(data, tmp_path_factory):
    """A float network, trained here."""
    torch.manual_seed(0)
    model = ResNet6()
    assert all(type(module) is not quant_nn.QuantConv2d for module in model.modules())
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(6):
        for images, labels in data[0]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "resnet6.pth"
    torch.save(model.state_dict(), path)
    assert evaluate(model, data[1]) > 90  # or no loss below means anything
    return path


# ------------------------------------------------------------------------------------------------------ the flow itself


def parse(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--model-name", "-m", default="resnet6")
    parser.add_argument("--weights")
    parser.add_argument("--out-dir")
    parser.add_argument("--disable-pcq", action="store_true", help="weights per tensor")
    parser.add_argument("--calibrator", choices=["max", "histogram"], default="histogram")
    parser.add_argument("--num-calib-batch", type=int, default=CALIB_BATCHES)
    parser.add_argument("--num-finetune-epochs", type=int, default=0)
    parser.add_argument("--opset", type=int, default=None)
    parser.add_argument("--dynamic", action="store_true", help="batch size left open in the file")
    parser.add_argument(
        "--exporter", choices=["default", "dynamo", "torchscript"], default="default"
    )
    parser.add_argument("--threshold", type=float, default=-1.0)
    return parser.parse_args(argv)


def prepare_model(args):
    input_desc = QuantDescriptor(calib_method=args.calibrator)
    for cls in (quant_nn.QuantConv2d, quant_nn.QuantLinear):
        cls.set_default_quant_desc_input(input_desc)
        if args.disable_pcq:
            cls.set_default_quant_desc_weight(QUANT_DESC_8BIT_PER_TENSOR)
    quant_modules.initialize()
    model = ResNet6()
    quant_modules.deactivate()
    model.load_state_dict(torch.load(args.weights))
    return model.eval()


def evaluate(model, batches):
    model.eval()
    with torch.no_grad():
        hits = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return 100 * hits / sum(len(labels) for _, labels in batches)


def evaluate_onnx(path, batches):
    session = onnxruntime.InferenceSession(path)
    name = session.get_inputs()[0].name
    hits = sum(
        int((session.run(None, {name: x.numpy()})[0].argmax(1) == y.numpy()).sum())
        for x, y in batches
    )
    return 100 * hits / sum(len(labels) for _, labels in batches)


def collect_stats(model, data_loader, num_batches):
    for _, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            if module._calibrator is not None:
                module.disable_quant()
                module.enable_calib()
            else:
                module.disable()
    with torch.no_grad():
        for i, (image, _) in enumerate(data_loader):
            if i >= num_batches:
                break
            model(image)
    for _, module in model.named_modules():
        if isinstance(module, TensorQuantizer):
            if module._calibrator is not None:
                module.enable_quant()
                module.disable_calib()
            else:
                module.enable()


def compute_amax(model, **kwargs):
    for _, module in model.named_modules():
        if isinstance(module, TensorQuantizer) and module._calibrator is not None:
            if isinstance(module._calibrator, calib.MaxCalibrator):
                module.load_calib_amax()
            else:
                module.load_calib_amax(**kwargs)


def calibrate_model(args, model, data_loader, out_dir):
    """Every method from the same statistics; the last stays in the model."""
    collect_stats(model, data_loader, args.num_calib_batch)
    images = args.num_calib_batch * len(data_loader[0][0])
    if args.calibrator != "histogram":
        compute_amax(model)
        torch.save(model.state_dict(), out_dir / f"{args.model_name}-max-{images}.pth")
        return
    for percentile in PERCENTILES:
        compute_amax(model, method="percentile", percentile=percentile)
        torch.save(
            model.state_dict(), out_dir / f"{args.model_name}-percentile-{percentile}-{images}.pth"
        )
    for method in ("mse", "entropy"):
        compute_amax(model, method=method)
        torch.save(model.state_dict(), out_dir / f"{args.model_name}-{method}-{images}.pth")


def finetune(args, model, data_loader):
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=args.num_finetune_epochs)
    for _ in range(args.num_finetune_epochs):
        model.train()
        for images, labels in data_loader[:5]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()
        schedule.step()
    model.eval()


def export_onnx(args, model, path):
    options = {} if args.exporter == "default" else {"dynamo": args.exporter == "dynamo"}
    if args.dynamic:
        options["dynamic_axes"] = {"input": {0: "batch"}, "output": {0: "batch"}}
    opset = args.opset or (12 if args.disable_pcq else 13)
    torch.onnx.export(
        model,
        torch.randn(BATCH, 1, 16, 16),
        path,
        input_names=["input"],
        output_names=["output"],
        opset_version=opset,
        do_constant_folding=True,
        **options,
    )


def main(argv, data, out_dir):
    args = parse(argv)
    train, test = data
    model = prepare_model(args)
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module.disable()
    stages = {"Initial": evaluate(model, test)}
    for module in model.modules():
        if isinstance(module, TensorQuantizer):
            module.enable()
    calibrate_model(args, model, train, out_dir)
    stages["Calibrated"] = evaluate(model, test)
    if args.num_finetune_epochs:
        finetune(args, model, train)
        stages["Finetuned"] = evaluate(model, test)
        torch.save(model.state_dict(), out_dir / f"{args.model_name}-finetuned.pth")
    export_onnx(args, model, out_dir / f"{args.model_name}.onnx")
    stages["ONNX"] = evaluate_onnx(out_dir / f"{args.model_name}.onnx", test)

    print(f"{'Stage':12} | Top1")
    for stage, top1 in stages.items():
        print(f"{stage:12} | {top1:.2f}")
    if args.threshold >= 0 and min(list(stages.values())[1:]) < stages["Initial"] - args.threshold:
        return 1
    return 0


# ---------------------------------------------------------------------------------------------------- truth, in numpy


def solve(method, counts, edges):
    """amax by the definition of each method, without its prefix sums."""
    if method.startswith("percentile"):
        share = np.cumsum(counts) / counts.sum()
        return edges[np.flatnonzero(share >= float(method.split("-")[1]) / 100)[0]]
    return solve_mse(counts, edges) if method == "mse" else solve_entropy(counts, edges)


def solve_mse(counts, edges):
    centres, errors = (edges[:-1] + edges[1:]) / 2, []
    for amax in centres[128:]:
        codes = np.clip(np.round(centres * (127 / amax)), -127, 127)
        errors.append(np.sum(counts * (codes * (amax / 127) - centres) ** 2))
    return centres[128 + int(np.argmin(errors))]


def solve_entropy(counts, edges):
    hist, found = counts.astype(np.float64), []
    hist[0] = hist[1]
    for i in range(128, len(hist) + 1):
        group = np.arange(i) * 128 // i
        head = hist[:i]
        filled = np.bincount(group, head > 0, minlength=128)
        mean = np.bincount(group, head, minlength=128) / np.maximum(filled, 1)
        q = np.where(head > 0, mean[group], 0)
        p = head.copy()
        p[-1] += hist[i:].sum()
        if p[-1] > 0 and q[-1] == 0:
            found.append(np.inf)
            continue
        p, q, at = p / p.sum(), q / q.sum(), p > 0
        found.append(np.sum(p[at] * np.log(p[at] / q[at])))
    found = np.array(found)
    return edges[128 + int(np.flatnonzero(found <= found.min() + 1e-12)[-1])]


def histograms(model):
    return {
        name: (module._calibrator._calib_hist.numpy(), module._calibrator._calib_bin_edges.numpy())
        for name, module in model.named_modules()
        if isinstance(module, TensorQuantizer)
        and isinstance(module._calibrator, calib.HistogramCalibrator)
    }


def amaxes(state):
    return {key: value for key, value in state.items() if key.endswith("._amax")}


def stages_of(out):
    rows = [line.split("|") for line in out.splitlines() if "|" in line]
    assert [cell.strip() for cell in rows[0]] == ["Stage", "Top1"]
    return {stage.strip(): float(top1) for stage, top1 in rows[1:]}


# ------------------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("disable_pcq", [False, True], ids=["per-channel", "per-tensor"])
def test_checkpoints(disable_pcq, weights, data, tmp_path):
    args = parse(["--weights", str(weights), *(["--disable-pcq"] if disable_pcq else [])])
    model, inputs, samples = prepare_model(args), [], CALIB_BATCHES * BATCH
    hook = model.conv1.register_forward_hook(lambda m, args, out: inputs.append(args[0]))
    calibrate_model(args, model, data[0], tmp_path)
    hook.remove()
    assert sum(len(x) for x in inputs) == samples == 256
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        f"resnet6-{m}-{samples}.pth" for m in METHODS
    )
    states = {
        method: torch.load(tmp_path / f"resnet6-{method}-{samples}.pth") for method in METHODS
    }

    found = histograms(model)
    assert sorted(found) == sorted(
        f"{name}._input_quantizer"
        for name, m in model.named_modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    )
    assert found["conv1._input_quantizer"][0].sum() == samples * 16 * 16
    for name, (counts, edges) in found.items():
        for method, state in states.items():
            amax = float(state[f"{name}._amax"])
            assert amax == pytest.approx(solve(method, counts, edges), rel=1e-6), (name, method)

    keys = [f"{name}._amax" for name in found]
    vectors = {method: torch.stack([states[method][key] for key in keys]) for method in METHODS}
    for i, method in enumerate(METHODS):
        for other in METHODS[i + 1 :]:
            assert not torch.equal(vectors[method], vectors[other]), (method, other)
    for lower, higher in itertools.pairwise(PERCENTILES):
        assert (vectors[f"percentile-{lower}"] <= vectors[f"percentile-{higher}"]).all()

    trained = torch.load(weights)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = trained[f"{name}.weight"]
            axes = tuple(range(weight.dim())) if disable_pcq else tuple(range(1, weight.dim()))
            expected = weight.abs().amax(axes, keepdim=not disable_pcq)
            assert all(
                torch.equal(state[f"{name}._weight_quantizer._amax"], expected)
                for state in states.values()
            )
    for state in states.values():  # everything but the ranges is what was trained
        assert set(state) - set(amaxes(state)) == set(trained)
        assert all(torch.equal(state[key], value) for key, value in trained.items())

    initial = ResNet6()
    initial.load_state_dict(trained)
    top1 = evaluate(initial, data[1])
    for method, state in states.items():
        fresh = prepare_model(args)
        fresh.load_state_dict(state, strict=True)
        assert evaluate(fresh, data[1]) >= top1 - POINTS, method
        assert torch.equal(fresh.fc._input_quantizer.amax, state["fc._input_quantizer._amax"])


FLOWS = [
    (["--num-finetune-epochs", "2"], 13),  # opset by the script's own default
    (["--disable-pcq", "--opset", "13", "--exporter", "torchscript"], 13),
    (["--opset", "17", "--dynamic", "--exporter", "torchscript"], 17),
    (["--opset", "17", "--calibrator", "max", "--exporter", "dynamo"], 17),
]


@pytest.mark.parametrize(
    ("options", "opset"), FLOWS, ids=["finetuned", "per-tensor", "dynamic", "max"]
)
def test_flow(options, opset, weights, data, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        sys.exit(
            main(["--weights", str(weights), "--threshold", str(POINTS), *options], data, tmp_path)
        )
    stages = stages_of(capsys.readouterr().out)
    tuned = ["Finetuned"] if "--num-finetune-epochs" in options else []
    assert list(stages) == ["Initial", "Calibrated", *tuned, "ONNX"]
    assert all(top1 >= stages["Initial"] - POINTS for top1 in stages.values())
    assert stopped.value.code == 0

    path = tmp_path / "resnet6.onnx"
    onnx.checker.check_model(path, full_check=True)
    model = onnx.load(path)
    assert [o.version for o in model.opset_import if o.domain == ""] == [opset]
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == 6 and kinds.count("QuantizeLinear") == kinds.count(
        "DequantizeLinear"
    )
    # 7 weights and their inputs; two layers on one tensor may share a pair.
    assert kinds.count("QuantizeLinear") >= 14

    last = "finetuned" if tuned else "max-256" if "max" in options else "entropy-256"
    state = torch.load(tmp_path / f"resnet6-{last}.pth")
    reference = prepare_model(parse(["--weights", str(weights), *options]))
    reference.load_state_dict(state, strict=True)
    batches = [images for images, _ in data[1]]
    if "--dynamic" in options:
        batches.append(batches[0][:3])
    session = onnxruntime.InferenceSession(path)
    found = np.concatenate(
        [session.run(["output"], {"input": images.numpy()})[0] for images in batches]
    )
    # A value on the edge of two codes may go to either on another processor, and later layers carry that on.
    # Without such values the floor is infinite, and float32 alone leaves about 140 dB.
    floor = min(measure_tie_floor(reference, batches), 120)
    assert sqnr_db(predict(reference, batches), found) >= floor - 3


def test_finetuning_keeps_ranges(weights, data, tmp_path):
    main(
        ["--weights", str(weights), "--num-finetune-epochs", "2", "--exporter", "torchscript"],
        data,
        tmp_path,
    )
    before = torch.load(tmp_path / f"resnet6-entropy-{CALIB_BATCHES * BATCH}.pth")
    after = torch.load(tmp_path / "resnet6-finetuned.pth")
    assert list(after) == list(before) and len(amaxes(after)) == 15
    assert all(torch.equal(after[key], value) for key, value in amaxes(before).items())
    moved = [key for key in before if key.endswith("weight")]
    assert len(moved) == 13 and not any(torch.equal(after[key], before[key]) for key in moved)


def test_opset_12_is_refused(weights, data, tmp_path):
    """The original wrote it per tensor; ONNX has the axis from 13 on, and the message says so."""
    with pytest.raises(ExportError, match="opset_version=13") as caught:
        main(["--weights", str(weights), "--disable-pcq", "--calibrator", "max"], data, tmp_path)
    assert isinstance(caught.value, QdqError) and "opset 12" in str(caught.value)
    assert not (tmp_path / "resnet6.onnx").exists()


def test_too_much_lost(weights, data, tmp_path, capsys):
    """Calibrated on images in another scale, everything saturates."""
    options = ["--weights", str(weights), "--calibrator", "max", "--exporter", "torchscript"]
    faint = [(images / 50, labels) for images, labels in data[0]]
    with pytest.raises(SystemExit) as stopped:
        sys.exit(main([*options, "--threshold", str(POINTS)], (faint, data[1]), tmp_path))
    stages = stages_of(capsys.readouterr().out)
    assert stopped.value.code == 1 and stages["Calibrated"] < stages["Initial"] - POINTS
    assert stages["ONNX"] == pytest.approx(stages["Calibrated"], abs=POINTS)
    assert main(options, (faint, data[1]), tmp_path) == 0  # no threshold, no verdict
