"""`qdq eval`: a float model and ONNX files on the same images."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cyclopts.types import PositiveInt, UInt32


def evaluate_files(
    *onnx: Path,
    model: str = "efficientnet_lite0",
    weights: str = "DEFAULT",
    data_dir: Path | None = None,
    eval_images: PositiveInt = 500,
    batch_size: PositiveInt = 16,
    device: str | None = None,
    seed: UInt32 = 0,
    json: Path | None = None,
) -> int:
    """Compare ONNX files with the float model on the same images.

    Prints top-1 and top-5 if labels are known, and how far each file is from the float model: top-1 agreement and
    SQNR. If the folder has no train and val, the images on which `qdq ptq` calibrates are left out.

    For example:

        qdq eval runs/ptq/model.onnx
        qdq eval a.onnx b.onnx --model resnet50 --data-dir /data/imagenet

    Args:
        onnx: ONNX files, which ONNX Runtime runs on the CPU; without any, only the model is evaluated.
        model: The float model that the files are compared with: efficientnet_lite0 or any torchvision classifier.
        weights: DEFAULT, another torchvision name, random, or the path of a checkpoint.
        data_dir: A folder with one folder per class, with or without train and val above them; the packaged photographs
            by default.
        eval_images: Number of images.
        batch_size: Images per batch.
        device: Where the float model runs: cpu, cuda or cuda:N. By default a GPU if there is one.
        seed: Seed of random weights, and of the choice and the crops of images.
        json: Also write the table, and the device, to this file.
    """
    from qdq.check import OnnxModel
    from qdq.device import choose_device, describe_device
    from qdq.evaluate import evaluate_outputs, predict
    from qdq.files import to_jsonable, write_json
    from qdq.text import MOST_CHARACTERS, make_printable, printable
    from qdq.workloads.classification import load_images
    from qdq.workloads.classification.models import load_model

    _guard_files(onnx, data_dir, weights, json)
    run_device = choose_device(device)
    for path in onnx:
        OnnxModel(path)  # refuses a bad file now, not after the float model has run
    net = load_model(model, weights, seed)
    _, images = load_images(data_dir, net, evaluation=eval_images, batch_size=batch_size, seed=seed)

    print(f"device: {describe_device(run_device)}")
    candidates: dict[str, Any] = {"float": net.module.to(run_device)}
    for path in onnx:
        candidates[str(path)] = path  # the whole path: files of different runs have the same name
    outputs = {name: predict(candidate, images) for name, candidate in candidates.items()}
    evaluation = evaluate_outputs(outputs, images.labels, files=candidates)
    print(make_printable(evaluation).format_table())
    if images.labels is None:
        print(f"no top-1: {printable(images.label_note, MOST_CHARACTERS)}")
    if json is not None:
        write_json(json, {**to_jsonable(evaluation), "device": describe_device(run_device)})
    return 0


def _guard_files(
    onnx: tuple[Path, ...], data_dir: Path | None, weights: str, json: Path | None
) -> None:
    from qdq.graph.tensors import list_data_files
    from qdq.run import guard_command
    from qdq.workloads.classification.folder import is_image_of

    inputs: list[Path | str | None] = [*onnx, data_dir, weights]
    for path in onnx:
        inputs += list_data_files(path)
    if is_image_of(data_dir, json):
        inputs.append(json)
    guard_command(inputs=inputs, outputs=[json])
