"""Fine-tuning of a quantized model: from trained weights to a checked int8 engine, with or without labels.

python recipes/qat.py
python recipes/qat.py --model net.py:build --data net.py:batches --metric net.py:score
python recipes/qat.py --formats int8,fp8 --target l4
torchrun --nproc-per-node 4 recipes/qat.py --model resnet50 --data /data/imagenet --loss both
"""

from pathlib import Path
from typing import Annotated, Literal

import qdq
from qdq.cli.calibrate import CalibMethod
from qdq.cli.main import NonNegativeInt, Parameter, PositiveInt, UInt32, run_command
from qdq.cli.refusals import (
    check_layers,
    check_tuning,
    choose_centering,
    choose_extra_macs,
    choose_patience,
)
from qdq.cli.targets import choose_targets
from qdq.cli.workloads import DATA_FLAG, OutputOptions


def qat(
    *,
    model: str = "efficientnet_lite0",
    weights: str = "DEFAULT",
    data: Annotated[Path | None, DATA_FLAG] = None,
    metric: str | None = None,
    output_options: OutputOptions = OutputOptions(),
    output: Path = Path("runs/qat"),
    exclude: tuple[str, ...] = (),
    plan: Path | None = None,
    calib_method: CalibMethod = "mse",
    calib_batches: PositiveInt = 8,
    eval_images: PositiveInt = 500,
    max_float_layers: NonNegativeInt = 0,
    center: Annotated[bool | None, Parameter(negative="--no-center")] = None,
    accuracy: Literal["fast", "balanced", "best"] = "fast",
    extra_macs: float | None = None,
    formats: str = "int8",
    target: str | None = None,
    gpu: str | None = None,
    loss: Literal["distill", "labels", "both"] = "distill",
    ranges: Literal["frozen", "lsq", "pact", "ema"] = "frozen",
    layers: tuple[str, ...] | None = None,
    schedule: Annotated[qdq.Schedule, Parameter(name="*")] = qdq.Schedule(),  # noqa: B008  # frozen
    amp: bool = False,
    tensorboard: bool = False,
    batch_size: PositiveInt = 16,
    image_size: PositiveInt | None = None,
    device: str | None = None,
    sm: int | None = None,
    seed: UInt32 = 0,
) -> int:
    """Quantize a model, correct its biases, fine-tune it, then export, check and build it.

    If it is killed, the same command continues where it stopped.

    Args:
        model: A classifier, detector or segmentation network of torchvision by its name, efficientnet_lite0, whose
            weights are packaged, timm/NAME, hf/FOLDER, yolo/FILE.pt, or your own network: FILE.py:FUNCTION, a function
            that returns it.
        weights: DEFAULT, another torchvision name, random, or the path of a checkpoint.
        data: For a classifier a folder with one folder per class, with or without train and val above them; for a
            detector a YAML file in the format of ultralytics; for segmentation a folder with images and masks; for
            hf/FOLDER a file with one text a line, or a folder of images; for your own network FILE.py:FUNCTION, a
            function that returns batches. Classifiers, detectors and segmentation bring pictures of their own.
        metric: For your own network FILE.py:FUNCTION, a function that gets predict(inputs) and returns a number, or
            numbers by name. More must be better.
        output_options: Which outputs count.
        output: Run folder. Files of an earlier run in it are removed first; a folder with other files is refused.
        exclude: Layers to keep in float: dotted names, globs or re:EXPRESSION.
        plan: The plan.yaml of an earlier run, which you may edit. The layers that it names run as it says.
        calib_method: How the range of an activation is computed; best selects, for each layer, the method with the
            smallest error of its output.
        calib_batches: Batches to calibrate on.
        eval_images: Images, or other samples, to evaluate on.
        max_float_layers: The analysis leaves at most this many layers in float.
        center: Subtract the middle of the range from the inputs of int8 layers behind ReLU6 and other clamps with two
            bounds: half of the step, and no operator more in the file. By default with --accuracy balanced and best,
            unless a format is fp8.
        accuracy: How much is done before fine-tuning to start closer to the float model: fast corrects biases, balanced
            also centers inputs and rounds weights for their outputs, best also reconstructs blocks. What does not help
            on held-out calibration samples is undone. best does not fine-tune here, because fine-tuning follows anyway.
            Channels are always split if a layer may be int8.
        extra_macs: How many multiplications the model may have more, as a share: layers become wider where split
            channels gain most. By default 0.05 without float layers; else 0, which keeps the size of every layer.
        formats: Formats of the quantized layers: int8, fp8 or int8,fp8. fp8 needs a GPU of compute capability 8.9 or
            above; it quantizes the products of attention, too. With both, each layer gets the one that is better
            for the outputs of the whole model.
        target: The GPU that formats are chosen for and that the engine is built for: t4, a10, orin, l4, rtx40, h100,
            thor, rtx50 or another that --gpu takes. By default that of --sm.
        gpu: Predict whether int8 or FP8 pays on this GPU: a10, a100, h100, l4, l40s, orin, orinnano, rtx3090, rtx4090,
            rtxpro6000 or t4. By default on the target, if it is one of these.
        loss: distill: the float model is the teacher, no labels are needed. labels: cross entropy. both: both losses
            together. With labels the last weights are kept, not the best.
        ranges: frozen as calibrated, learned by lsq or pact, or ema, which follows the data.
        layers: Train only these layers; patterns as for exclude. All layers if left out.
        schedule: Length and learning rates. With accuracy balanced or best, training stops by default after 2
            measurements in a row that were not better; there are about 10.
        amp: Compute in bfloat16 where torch.autocast does.
        tensorboard: Write the curves into the run folder for TensorBoard.
        batch_size: Images per batch; your own batches come as they are.
        image_size: Side of the images that the model gets, in pixels; by default that of the model. For classifiers,
            detectors and segmentation.
        device: Where the model runs: cpu, cuda or cuda:N. By default a GPU if there is one, under torchrun that of
            the local rank.
        sm: Compute capability to build for: 75, 80, 86, 89, 120 or 121. By default that of the target or of the
            device, on a CPU 89.
        seed: Seed of random weights, crops and the choice of samples.
    """
    settings = dict(locals())

    # Invalid options are refused here, before any work.
    qdq.check_run_folder(output, settings)
    run_device = qdq.choose_device(device)
    format_names = qdq.parse_formats(formats)
    centers = choose_centering(center, format_names, accuracy)
    (built_for,) = choose_targets(
        () if target is None else (target,),
        sm=sm,
        device=run_device,
        formats=format_names,
        method=calib_method,
        gpu=gpu,
    )
    pinned = None
    if plan is not None:
        pinned = qdq.load_plan(plan)
    split_macs = choose_extra_macs(
        extra_macs, format_names, max_float_layers=max_float_layers, plan=pinned
    )
    workload = qdq.load_workload(
        qdq.WorkloadOptions(
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
    net = workload.module
    calibration, samples, view = workload.calibration, workload.evaluation, workload.view
    check_layers(
        workload,
        exclude=exclude,
        plan=pinned,
        layers=layers,
        formats=format_names,
        sm=built_for.sm,
    )
    uses_labels = loss in ("labels", "both")
    if uses_labels:
        training = workload.load_training()
        fitted, held_out = workload.hold_out()
    else:
        training, fitted, held_out = workload.split_training()
    check_tuning(loss, training.labels, schedule, tensorboard=tensorboard)
    schedule = choose_patience(schedule, accuracy, uses_labels=uses_labels)
    run = qdq.start_run(
        output, seed=seed, settings=settings, device=qdq.describe_device(run_device)
    )

    run.stage("float")
    net.to(run_device)
    outputs, scores = {}, {}
    outputs["float"] = qdq.predict(net, samples, **view)
    scores["float"] = workload.measure(net)
    judge = qdq.Judge(net, held_out, **view, weights=workload.output_weights)

    run.stage("fold, swap, rewire")
    folded = qdq.fold_batchnorm(net, workload.example)
    centering = None
    if centers:
        centering = qdq.center_inputs(net, calibration, exclude=exclude, **view)
    splitting = None
    if split_macs is not None:
        splitting = qdq.split_channels(
            net, fitted.subset(32), extra_macs=split_macs, exclude=exclude, **view
        )
    swap_plan = qdq.swap_modules(net, workload.example, exclude=exclude, formats=format_names)
    rewired = qdq.rewire_operations(net, workload.example, exclude=exclude, formats=format_names)

    run.stage("calibrate")
    calibrated_ranges = qdq.calibrate_model(
        net, calibration, method=calib_method, statistics=run.statistics_file
    )
    outputs["calibrated"] = qdq.predict(net, samples, **view)
    scores["calibrated"] = workload.measure(net)
    start = "before the choice" if len(format_names) > 1 else f"all {format_names[0]}"
    judge.measure(f"calibrated, {start}", net)

    choice = None
    if len(format_names) > 1:
        run.stage("choose formats")
        choice = qdq.choose_formats(
            net,
            fitted.subset(workload.num_held_out),
            qdq.Statistics.load(run.statistics_file),
            sm=built_for.sm,
            method="mse" if calib_method == "best" else calib_method,
            pinned=None if pinned is None else pinned.precisions,
            path=run.journal_file,
            **view,
            weights=workload.output_weights,
        )
        judge.measure(f"formats for SM {built_for.sm}", net)

    run.stage("analyze")
    analysis = qdq.analyze_layers(
        net,
        fitted.subset(workload.num_held_out),
        pinned=pinned,
        **view,
        weights=workload.output_weights,
        max_float_layers=max_float_layers,
        corrects_bias=True,
        path=run.journal_file,
    )
    qdq.save_plan(analysis.plan, run.plan_file)
    judge.measure(f"float layers: {len(analysis.float_layers)}", net)

    run.stage("recover accuracy")
    num_fitted = qdq.FITTED_SAMPLES[accuracy]
    all_fitted = calibration.subset(num_fitted).by_source()
    steps = qdq.recover_accuracy(
        net,
        fitted.subset(num_fitted).by_source(),
        judge,
        effort=accuracy,
        tunes=False,
        refit=all_fitted if uses_labels else None,
        **view,
        weights=workload.output_weights,
    )
    outputs["start"] = qdq.predict(net, samples, **view)
    scores["start"] = workload.measure(net)

    run.stage("fine-tune")
    uses_teacher = loss in ("distill", "both")
    distillation = qdq.Distillation(**view, weights=workload.output_weights)
    tuning = qdq.finetune(
        net,
        training,
        loss=qdq.cross_entropy if uses_labels else None,
        distillation=distillation if uses_teacher else None,
        held=None if uses_labels else held_out,
        ranges=ranges,
        layers=layers,
        schedule=schedule,
        seed=seed,
        amp=amp,
        folder=run.tuning_folder,
        tensorboard=tensorboard,
    )
    if not run.is_first:
        return 0  # torchrun: only the first process continues
    end = "fine-tuned"
    if tuning.best_step == 0:
        end = "start, kept"
        steps = qdq.refit_passes(net, all_fitted, steps)
    outputs[end] = qdq.predict(net, samples, **view)
    scores[end] = workload.measure(net)

    run.stage("export and check")
    exported = qdq.export_onnx(
        net,
        workload.example,
        run.model_file,
        calibration=calibrated_ranges,
        plan=swap_plan,
        rewired=rewired,
    )
    outputs["ONNX"] = qdq.predict(exported.path, samples, **view)
    scores["ONNX"] = workload.measure(exported.path)
    checked = samples.subset(qdq.CHECKED_SAMPLES)
    expected = qdq.predict(net, checked, **view)
    found = qdq.predict(exported.path, checked, **view)
    found_default = qdq.predict(exported.path, checked, session="default", **view)
    tie_floor_db = qdq.measure_tie_floor(
        net, checked, expected=expected, precision=exported.remainder, **view
    )
    check = qdq.check_onnx(
        exported.path,
        expected=expected,
        found=found,
        found_default=found_default,
        tie_floor_db=tie_floor_db,
        gpu=built_for.gpu,
    )
    qdq.save_references(net, calibration, run.references_file, exported.path)
    qdq.save_tuned(net, run.quantized_file)

    run.stage("build")
    build = qdq.build_engine(exported.path, backend=built_for.backend.name, sm=built_for.backend.sm)
    evaluation = qdq.evaluate_outputs(
        outputs,
        samples.labels,
        files={"float": net, "ONNX": exported.path},
        scores=scores,
        num_samples=samples.num_samples,
    )

    report = qdq.write_report(
        run,
        workload=workload,
        folded=folded,
        plan=swap_plan,
        rewired=rewired,
        ranges=calibrated_ranges,
        analysis=analysis,
        exported=exported,
        check=check,
        build=build,
        evaluation=evaluation,
        centering=centering,
        splitting=splitting,
        steps=steps,
        tuning=tuning,
        formats=choice,
    )
    return report.exit_code


if __name__ == "__main__":
    run_command(qat)
