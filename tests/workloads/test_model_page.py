"""Every command of docs/models.md gives a workload that runs."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from qdq import WorkloadOptions, load_workload, predict
from qdq.cli.main import make_app
from qdq.metrics import name_arrays

pytest.importorskip("torchvision", reason="needs the extra 'demo'")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"
FENCE = re.compile(r"^```(python|bash)\n(.*?)^```", re.M | re.S)
NEEDS = {"smp": "segmentation_models_pytorch", "yolo/": "ultralytics", "hf/": "transformers"}
NEEDS |= {"timm/": "timm", "ssdlite": "faster_coco_eval", "lraspp": "torchmetrics"}
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "cat", "dog", "runs", "sees"]


def list_commands():
    commands = []
    for language, text in FENCE.findall(PAGE.read_text()):
        if language == "bash":
            commands += text.splitlines()
    return commands


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The files that the page names."""
    root = tmp_path_factory.mktemp("models")
    for language, text in FENCE.findall(PAGE.read_text()):
        if language == "python":
            assert len([line for line in text.splitlines() if line.strip()]) <= 17
            name = text.splitlines()[0].removeprefix("# ")
            (root / name).write_text(text)
    (root / "texts.txt").write_text("cat runs\ndog sees cat\ndog\ncat sees dog\n")
    write_images(root / "imagenet" / "tench")
    write_images(root / "pictures")
    write_images(root / "masks" / "images")
    write_images(root / "masks" / "masks", "L")
    return root


def write_images(folder, mode="RGB"):
    image_module = pytest.importorskip("PIL.Image")
    folder.mkdir(parents=True)
    for index in range(4):
        image_module.new(mode, (40, 32), 1 + index % 2).save(folder / f"{index}.png")


def write_shapes(root):
    from qdq.workloads.detection.shapes import write_shapes as write

    if not (root / "shapes.yaml").exists():
        path = write(root / "shapes", 4, 4, 64)
        content = {**yaml.safe_load(path.read_text()), "path": str(root / "shapes")}
        (root / "shapes.yaml").write_text(yaml.safe_dump(content))


def save_models(root, model):
    """The model file that a command names, small and with random weights."""
    if model.startswith("hf/"):
        save_transformers(root / model.removeprefix("hf/"))
    elif model.startswith("yolo/"):
        tasks = pytest.importorskip("ultralytics.nn.tasks")
        network = tasks.DetectionModel("yolo11n.yaml", nc=3, verbose=False)
        network.names = {0: "circle", 1: "square", 2: "triangle"}
        torch.save({"model": network, "train_args": {"imgsz": 64}}, root / "yolo11n.pt")
    elif model.startswith("ssdlite"):
        from qdq.workloads.detection.torchvision_detectors import build_detector

        torch.save(build_detector(model, 4, 96).state_dict(), root / "ssdlite.pt")


def save_transformers(folder):
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes["intermediate_size"] = 32
    if folder.name == "vit":
        config = transformers.ViTConfig(**sizes, image_size=32, patch_size=16)
        transformers.ViTForImageClassification(config).save_pretrained(folder)
        transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        return
    config = transformers.BertConfig(**sizes, vocab_size=len(WORDS))
    transformers.BertModel(config).save_pretrained(folder)
    (folder / "words.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(folder / "words.txt")).save_pretrained(folder)


@pytest.mark.parametrize("command", list_commands())
def test_command_gives_a_workload_that_runs(command, folder, monkeypatch):
    for mark, module in NEEDS.items():
        if mark in command:
            pytest.importorskip(module)
    monkeypatch.chdir(folder)
    tokens = shlex.split(command)
    assert tokens.pop(0) == "qdq"
    _, bound, _ = make_app().parse_args(tokens, exit_on_error=False, print_error=False)
    arguments = bound.arguments
    save_models(folder, arguments["model"])
    if arguments.get("data", Path()).name == "shapes.yaml":
        write_shapes(folder)
    names = ("model", "weights", "data", "metric", "image_size")
    named = {name: arguments[name] for name in names if name in arguments}
    outputs = arguments["output_options"].as_arguments() if "output_options" in arguments else {}
    small = {"calib_batches": 1, "eval_samples": 2, "batch_size": 2}
    workload = load_workload(WorkloadOptions(**named, **outputs, **small))
    predicted = predict(workload.module, workload.evaluation, **workload.view)
    assert all(np.isfinite(array).all() for array in name_arrays(predicted).values())
    assert all(np.isfinite(score) for score in workload.measure(workload.module).values())
    assert workload.example is not None


def test_page_shows_every_kind():
    commands = "\n".join(list_commands())
    for kind in ("net.py:", "resnet18", "timm/", "ssdlite", "yolo/", "lraspp", "hf/", "smp_"):
        assert kind in commands
