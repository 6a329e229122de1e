"""`qdq eval`."""

from __future__ import annotations

from pathlib import Path


def evaluate_files(
    *onnx: Path,
    model: str = "efficientnet_lite0",
    weights: str = "DEFAULT",
    data_dir: Path | None = None,
    eval_images: int = 500,
    batch_size: int = 16,
    seed: int = 0,
    json: Path | None = None,
) -> int:
    """Accuracy of a float model and of ONNX files made from it, on the same images.

    Args:
        onnx: ONNX files, run by ONNX Runtime on the CPU; none evaluates the model alone.
        model: The float model they are compared with: efficientnet_lite0 or any torchvision classifier.
        weights: DEFAULT, a torchvision name, random, or the path of a checkpoint.
        data_dir: ImageFolder; the packaged photographs if left out.
        eval_images: How many images.
        batch_size: Images a batch.
        seed: For the choice and the crops of images.
        json: Also write the table there.
    """
    from qdq.data import load_images
    from qdq.evaluate import evaluate_outputs, predict
    from qdq.models import load_model
    from qdq.run import write_json

    loaded = load_model(model, weights, seed)
    _, images = load_images(data_dir, loaded, evaluation=eval_images, batch_size=batch_size, seed=seed)
    outputs = {"float": predict(loaded.module, images)}
    outputs |= {path.name: predict(path, images) for path in onnx}
    evaluation = evaluate_outputs(
        outputs, images.labels, files={"float": loaded.module, **{path.name: path for path in onnx}}
    )
    print(evaluation.format_table())
    if images.labels is None:
        print(f"no top-1: {images.label_note}")
    if json:
        write_json(json, evaluation)
    return 0
