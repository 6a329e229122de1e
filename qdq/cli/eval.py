"""`qdq eval`: a float model, ONNX files and engines on the same samples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts.types import PositiveInt, UInt32

from qdq.cli.workloads import DATA_FLAG, OutputOptions, list_named_files


def evaluate_files(
    *onnx: Path,
    model: str = "efficientnet_lite0",
    weights: str = "DEFAULT",
    data: Annotated[Path | None, DATA_FLAG] = None,
    metric: str | None = None,
    output_options: OutputOptions = OutputOptions(),
    calib_batches: PositiveInt = 8,
    eval_images: PositiveInt = 500,
    batch_size: PositiveInt = 16,
    image_size: PositiveInt | None = None,
    device: str | None = None,
    seed: UInt32 = 0,
    json: Path | None = None,
) -> int:
    """Compare ONNX files and engines with the float model on the same samples.

    Prints the metrics of the task, or top-1 and top-5 if labels are known, and how far each file is from the float
    model: top-1 agreement and SQNR. The samples on which `qdq ptq` calibrates are left out.

    For example:

        qdq eval runs/ptq/model.onnx
        qdq eval a.onnx b.onnx --model resnet50 --data /data/imagenet
        qdq eval model.onnx model.rtx.engine --batch-size 1
        qdq eval a.onnx --model net.py:build --data net.py:batches --metric net.py:score

    Args:
        onnx: ONNX files, which ONNX Runtime runs on the CPU, and engines (.engine, .plan or .trt), which run on the
            GPU that they were built for. Without any, only the model is evaluated.
        model: The float model that the files are compared with, as for `qdq ptq`.
        weights: DEFAULT, another torchvision name, random, or the path of a checkpoint.
        data: As for `qdq ptq`.
        metric: As for `qdq ptq`.
        output_options: Which outputs count.
        calib_batches: As for `qdq ptq`: these batches are left out.
        eval_images: Number of images, or other samples.
        batch_size: Images per batch; your own batches come as they are.
        image_size: As for `qdq ptq`; an ONNX file has the size that it was exported with.
        device: Where the float model runs: cpu, cuda or cuda:N. By default a GPU if there is one.
        seed: Seed of random weights, and of the choice and the crops of images.
        json: Also write the table, and the device, to this file.
    """
    from qdq.device import choose_device, describe_device
    from qdq.evaluate import evaluate_outputs
    from qdq.files import to_jsonable, write_json
    from qdq.predictor import open_file, predict
    from qdq.text import MOST_CHARACTERS, make_printable, printable
    from qdq.workloads import load_workload
    from qdq.workloads.workload import WorkloadOptions

    _guard_files(onnx, list_named_files(model, data, metric), data, weights, json)
    run_device = choose_device(device)
    for path in onnx:
        open_file(path)  # refuses a bad file now, not after the float model has run
    workload = load_workload(
        WorkloadOptions(
            model=model,
            weights=weights,
            data=data,
            metric=metric,
            calib_batches=calib_batches,
            eval_samples=eval_images,
            batch_size=batch_size,
            image_size=image_size,
            seed=seed,
            **output_options.as_arguments(),
        )
    )
    samples = workload.evaluation

    print(f"device: {describe_device(run_device)}")
    candidates: dict[str, Any] = {"float": workload.module.to(run_device)}
    for path in onnx:
        candidates[str(path)] = path  # the whole path: files of different runs have the same name
    outputs, scores = {}, {}
    for name, candidate in candidates.items():
        outputs[name] = predict(candidate, samples, **workload.view)
        scores[name] = workload.measure(candidate)
    evaluation = evaluate_outputs(
        outputs,
        samples.labels,
        files=candidates,
        scores=scores,
        num_samples=samples.num_samples,
    )
    print(make_printable(evaluation).format_table())
    if samples.labels is None and not evaluation.metrics:
        print(f"no top-1: {printable(samples.label_note, MOST_CHARACTERS)}")
    if json is not None:
        write_json(json, {**to_jsonable(evaluation), "device": describe_device(run_device)})
    return 0


def _guard_files(
    onnx: tuple[Path, ...],
    named: list[Path],
    data: Path | None,
    weights: str,
    json: Path | None,
) -> None:
    from qdq.graph.tensors import list_data_files
    from qdq.run import guard_command
    from qdq.workloads.classification.folder import is_image_of

    inputs: list[Path | str | None] = [*onnx, *named, weights]
    for path in onnx:
        inputs += list_data_files(path)
    if is_image_of(data, json):
        inputs.append(json)
    guard_command(inputs=inputs, outputs=[json])
