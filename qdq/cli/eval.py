"""`qdq eval`."""

from __future__ import annotations

from pathlib import Path

from cyclopts.types import PositiveInt, UInt32


def evaluate_files(
    *onnx: Path,
    model: str = "efficientnet_lite0",
    weights: str = "DEFAULT",
    data_dir: Path | None = None,
    eval_images: PositiveInt = 500,
    batch_size: PositiveInt = 16,
    seed: UInt32 = 0,
    json: Path | None = None,
) -> int:
    """Accuracy of a float model and of ONNX files made from it, on the same images.

    Prints top-1 and top-5 where labels are known, and how far each file is from the float model: how often both name
    the same class, and the SQNR. Of a folder without train and val, images that `qdq ptq` calibrates on are left out.

    Such as:

        qdq eval runs/ptq/model.onnx
        qdq eval a.onnx b.onnx --model resnet50 --data-dir /data/imagenet

    Args:
        onnx: ONNX files, run by ONNX Runtime on the CPU; none evaluates the model alone.
        model: The float model they are compared with: efficientnet_lite0 or any torchvision classifier.
        weights: DEFAULT, a torchvision name, random, or the path of a checkpoint.
        data_dir: ImageFolder, with train and val or without; the packaged photographs if left out.
        eval_images: How many images.
        batch_size: Images a batch.
        seed: Of random weights, and of the choice and the crops of images.
        json: Also write the table to this file.
    """
    from qdq.check import OnnxModel
    from qdq.evaluate import evaluate_outputs, predict
    from qdq.files import write_json
    from qdq.graph.tensors import list_data_files
    from qdq.run import guard_command
    from qdq.text import MOST_CHARACTERS, make_printable, printable
    from qdq.workloads.classification import load_images
    from qdq.workloads.classification.folder import is_image_of
    from qdq.workloads.classification.models import load_model

    data_files = [file for path in onnx for file in list_data_files(path)]
    image = json if is_image_of(data_dir, json) else None
    guard_command(inputs=[*onnx, *data_files, data_dir, image, weights], outputs=[json])
    for path in onnx:
        OnnxModel(path)  # a bad file is refused now, not after the float model has run
    loaded = load_model(model, weights, seed)
    _, images = load_images(
        data_dir, loaded, evaluation=eval_images, batch_size=batch_size, seed=seed
    )
    outputs_of_files = {
        str(path): predict(path, images) for path in onnx
    }  # the whole path: runs name their files alike
    outputs = {"float": predict(loaded.module, images), **outputs_of_files}
    evaluation = evaluate_outputs(
        outputs, images.labels, files={"float": loaded.module, **{str(path): path for path in onnx}}
    )
    print(make_printable(evaluation).format_table())
    if images.labels is None:
        print(f"no top-1: {printable(images.label_note, MOST_CHARACTERS)}")
    if json is not None:
        write_json(json, evaluation)
    return 0
