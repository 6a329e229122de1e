"""Post-training quantization: from trained weights to a checked int8 engine.

python recipes/ptq.py
python recipes/ptq.py --model resnet50 --weights my.pth --data /data/imagenet --exclude fc
python recipes/ptq.py --model net.py:build --data net.py:batches --metric net.py:score
python recipes/ptq.py --formats int8,fp8 --target l4 orin
"""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal

import qdq
from qdq.cli.analyze import AnalysisOptions
from qdq.cli.calibrate import CalibMethod
from qdq.cli.main import Parameter, PositiveInt, UInt32, run_command
from qdq.cli.refusals import check_layers, choose_centering, choose_extra_macs
from qdq.cli.targets import choose_targets
from qdq.cli.workloads import DATA_FLAG, OutputOptions


def ptq(
    *,
    model: str = "efficientnet_lite0",
    weights: str = "DEFAULT",
    data: Annotated[Path | None, DATA_FLAG] = None,
    metric: str | None = None,
    output_options: OutputOptions = OutputOptions(),
    output: Path = Path("runs/ptq"),
    exclude: tuple[str, ...] = (),
    plan: Path | None = None,
    calib_method: CalibMethod = "mse",
    calib_batches: PositiveInt = 8,
    eval_images: PositiveInt = 500,
    analysis_images: PositiveInt = 32,
    analysis: AnalysisOptions = AnalysisOptions(),
    center: Annotated[bool | None, Parameter(negative="--no-center")] = None,
    accuracy: Literal["fast", "balanced", "best"] = "fast",
    extra_macs: float | None = None,
    formats: str = "int8",
    target: tuple[str, ...] = (),
    precision: Literal["auto", "fp32", "fp16"] = "auto",
    batch_size: PositiveInt = 16,
    image_size: PositiveInt | None = None,
    device: str | None = None,
    sm: int | None = None,
    seed: UInt32 = 0,
) -> int:
    """Quantize a model, leave its most sensitive layers in float, then export, check and build it.

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
        analysis_images: Calibration samples for the sensitivity analysis.
        analysis: Options of the sensitivity analysis.
        center: Subtract the middle of the range from the inputs of int8 layers behind ReLU6 and other clamps with two
            bounds: half of the step, and no operator more in the file. By default with --accuracy balanced and best,
            unless a format is fp8.
        accuracy: How much is done to come closer to the float model: fast corrects biases after the analysis, balanced
            also centers inputs and splits channels before calibration, and rounds weights for their outputs (minutes),
            best also reconstructs blocks and fine-tunes weights without labels (many minutes). What does not help on
            held-out calibration samples after the analysis is undone.
        extra_macs: How many multiplications the model may have more, as a share: balanced and best make layers wider
            where split channels gain most. By default 0.05 with --max-float-layers 0; else 0, which keeps the size of
            every layer.
        formats: Formats of the quantized layers: int8, fp8 or int8,fp8. fp8 needs a GPU of compute capability 8.9 or
            above; it quantizes the products of attention, too. With both, each layer gets the one that is better
            for the outputs of the whole model.
        target: The GPU that formats are chosen for and that the engine is built for: t4, a10, orin, l4, rtx40, h100,
            thor, rtx50 or another that --gpu takes. By default that of --sm. Of several, each gets a folder in the run
            folder, from one calibration.
        precision: Type of the float layers in the exported file; auto is fp16 if any layer is in FP8, else fp32, for
            each target by itself.
        batch_size: Images per batch; your own batches come as they are.
        image_size: Side of the images that the model gets, in pixels; by default that of the model. For classifiers,
            detectors and segmentation.
        device: Where the model runs: cpu, cuda or cuda:N. By default a GPU if there is one.
        sm: Compute capability to build for: 75, 80, 86, 89, 120 or 121. By default that of the target or of the
            device, on a CPU 89.
        seed: Seed of random weights, crops and the choice of samples.
    """
    settings = dict(locals())

    # Invalid options are refused here, before any work.
    qdq.check_run_folder(output, settings, target)
    run_device = qdq.choose_device(device)
    format_names = qdq.parse_formats(formats)
    centers = choose_centering(center, format_names, accuracy)
    analysis_options = analysis.as_arguments()
    targets = choose_targets(
        target,
        sm=sm,
        device=run_device,
        formats=format_names,
        method=calib_method,
        gpu=analysis.gpu,
        has_profile=analysis.profile is not None,
    )
    pinned = None
    if plan is not None:
        pinned = qdq.load_plan(plan)
    split_macs = choose_extra_macs(
        extra_macs,
        format_names,
        max_float_layers=analysis.max_float_layers,
        plan=pinned,
        accuracy=accuracy,
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
    fitted, held_out = workload.hold_out()
    check_layers(
        workload,
        exclude=exclude,
        plan=pinned,
        groups=analysis_options["groups"],
        profile=analysis_options["profile"],
        formats=format_names,
        sm=min(current.sm for current in targets),
    )
    analysis.check_labels(calibration.labels)
    run = qdq.start_run(
        output,
        seed=seed,
        settings=settings,
        device=qdq.describe_device(run_device),
        targets=target,
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
    ranges = qdq.calibrate_model(
        net, calibration, method=calib_method, statistics=run.statistics_file
    )
    start = "before the choice" if len(format_names) > 1 else f"all {format_names[0]}"
    outputs[start] = qdq.predict(net, samples, **view)
    scores[start] = workload.measure(net)
    judge.measure(f"calibrated, {start}", net)

    calibrated = net
    reports = []
    for current in targets:
        target_run = run.start_target(current.name)
        # Every target starts from the calibrated model; the last one may change it.
        net = calibrated if current is targets[-1] else copy.deepcopy(calibrated)
        target_outputs, target_scores = dict(outputs), dict(scores)
        target_judge = judge.copy()

        choice = None
        if len(format_names) > 1:
            target_run.stage("choose formats")
            choice = qdq.choose_formats(
                net,
                fitted.subset(analysis_images),
                qdq.Statistics.load(target_run.statistics_file),
                sm=current.sm,
                method="mse" if calib_method == "best" else calib_method,
                pinned=None if pinned is None else pinned.precisions,
                path=target_run.journal_file,
                **view,
                weights=workload.output_weights,
            )
            target_judge.measure(f"formats for SM {current.sm}", net)

        target_run.stage("analyze")
        analysis_result = qdq.analyze_layers(
            net,
            fitted.subset(analysis_images),
            pinned=pinned,
            corrects_bias=True,
            path=target_run.journal_file,
            **view,
            weights=workload.output_weights,
            **analysis_options,
        )
        qdq.save_plan(analysis_result.plan, target_run.plan_file)
        target_judge.measure(f"float layers: {len(analysis_result.float_layers)}", net)

        target_run.stage("recover accuracy")
        num_fitted = qdq.FITTED_SAMPLES[accuracy]
        steps = qdq.recover_accuracy(
            net,
            fitted.subset(num_fitted).by_source(),
            target_judge,
            effort=accuracy,
            refit=calibration.subset(num_fitted).by_source(),
            path=target_run.recovery_file,
            **view,
            weights=workload.output_weights,
        )
        target_outputs["mixed"] = qdq.predict(net, samples, **view)
        target_scores["mixed"] = workload.measure(net)

        target_run.stage("export and check")
        exported = qdq.export_onnx(
            net,
            workload.example,
            target_run.model_file,
            precision=precision,
            calibration=ranges,
            plan=swap_plan,
            rewired=rewired,
        )
        target_outputs["ONNX"] = qdq.predict(exported.path, samples, **view)
        target_scores["ONNX"] = workload.measure(exported.path)
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
            gpu=current.gpu,
        )
        qdq.save_references(net, calibration, target_run.references_file, exported.path)
        qdq.save_tuned(net, target_run.quantized_file)

        target_run.stage("build")
        build = qdq.build_engine(exported.path, backend=current.backend.name, sm=current.backend.sm)
        evaluation = qdq.evaluate_outputs(
            target_outputs,
            samples.labels,
            files={"float": net, "ONNX": exported.path},
            scores=target_scores,
            num_samples=samples.num_samples,
        )

        report = qdq.write_report(
            target_run,
            workload=replace(workload, module=net),
            folded=folded,
            plan=swap_plan,
            rewired=rewired,
            ranges=ranges,
            analysis=analysis_result,
            exported=exported,
            check=check,
            build=build,
            evaluation=evaluation,
            centering=centering,
            splitting=splitting,
            steps=steps,
            formats=choice,
        )
        reports.append(report)
    if run.targets:
        return qdq.write_targets(run, reports).exit_code
    return report.exit_code


if __name__ == "__main__":
    run_command(ptq)
