"""The flow of Distiller: range-linear quantization after training and in training, from its YAML files.

It stands on `qdq.systems`, whose `to_tensorrt` turns the models into quantized layers of qdq. docs/distiller.md has the
home of each name, key and option. A name loads its module on first use.
"""

from typing import Any

from qdq.lazy import list_homes, load_name

_HOMES: dict[str, tuple[str, ...]] = {
    "ranges.aciq": ("find_clip_constant",),
    "files.checkpoint": (
        "QuantizedCheckpoint",
        "QuantizerMetadata",
        "read_checkpoint",
        "rebuild_model",
        "save_checkpoint",
    ),
    "ranges.clipping": ("ClipMode", "RangeStatistics", "parse_clip", "statistics_of"),
    "statistics.collector": ("StatisticsCollector",),
    "training.compress": ("TrainOptions", "train_compressed"),
    "training.compress_file": ("CompressPlan", "read_compress_file"),
    "files.config": ("QuantizerConfig", "read_post_training", "read_quantizers", "read_sections"),
    "training.distillation": ("KnowledgeDistillation",),
    "training.dorefa": ("ClippedLinearQuantization", "DorefaWeight"),
    "training.ema": ("FakeLinearQuantization", "RangeLinearParameter"),
    "training.folded_pairs": ("find_folded_pairs", "fold_simulated_batchnorm", "simulate_folding"),
    "training.folding": ("SimulatedFoldedBatchNorm",),
    "search.greedy": ("GreedyResult", "ptq_greedy_search"),
    "statistics.histogram_images": ("save_histogram_images",),
    "statistics.histograms": ("collect_histograms", "save_histograms"),
    "search.lapq": ("LapqResult", "ptq_coordinate_search"),
    "layers.convert_lstm": ("convert_model_to_distiller_lstm",),
    "layers.lstm": ("DistillerLSTM",),
    "layers.lstm_cell": ("DistillerLSTMCell",),
    "layers.param_layer": ("RangeLinearQuantParamLayerWrapper",),
    "layers.leaves": ("FPWrapper", "RangeLinearEmbeddingWrapper", "RangeLinearFakeQuantWrapper"),
    "files.layer_params_file": ("save_layer_quant_params",),
    "training.ncf_training": ("NCFQuantAwareTrainQuantizer",),
    "ranges.linear_params": ("LinearParams", "solve_params"),
    "ranges.linear_functions": (
        "approx_scale_as_mult_and_shift",
        "get_scale_approximation_params",
        "linear_dequantize",
        "linear_quantize",
        "linear_quantize_clamp",
    ),
    "ranges.modes": ("LinearQuantMode", "ModePair", "get_quantized_range", "parse_mode"),
    "post_training.modularization": ("modularize",),
    "layers.modules": (
        "BatchMatmul",
        "Concat",
        "EltwiseAdd",
        "EltwiseDiv",
        "EltwiseMult",
        "EltwiseSub",
        "Matmul",
    ),
    "layers.multi_input": (
        "RangeLinearQuantConcatWrapper",
        "RangeLinearQuantEltwiseAddWrapper",
        "RangeLinearQuantEltwiseMultWrapper",
        "RangeLinearQuantMatmulWrapper",
    ),
    "settings.overrides": ("override_layers", "resolve"),
    "training.pact": ("LearnedClippedLinearQuantization",),
    "statistics.portion": ("choose_portion",),
    "post_training.quantizer": ("PostTrainLinearQuantizer",),
    "files.quantizer_arguments": ("describe_arguments",),
    "ranges.range_params": (
        "asymmetric_linear_quantization_params",
        "symmetric_linear_quantization_params",
    ),
    "training.range_training": ("QuantAwareTrainRangeLinearQuantizer",),
    "statistics.records": ("LayerStatistics", "TensorRecord"),
    "ranges.scale_approximation": ("approximate_scale", "evaluate_approximation"),
    "command.scores": ("Scores",),
    "search.search_options": ("LapqOptions",),
    "settings.layer_settings": ("LayerSettings", "update_settings"),
    "ranges.solve": ("solve_clipped", "solve_tensor", "solve_weight"),
    "statistics.two_passes": ("collect_quant_stats",),
    "statistics.statistics_file": ("read_statistics", "save_statistics"),
    "ranges.tensor_statistics": (
        "get_tensor_avg_max_abs",
        "get_tensor_avg_min_max",
        "get_tensor_max_abs",
        "get_tensor_mean_n_stds_max_abs",
        "get_tensor_mean_n_stds_min_max",
        "get_tensor_min_max",
    ),
    "post_training.torch_int8": ("convert_to_pytorch",),
    "training.quantizers": ("DorefaQuantizer", "PACTQuantizer", "WRPNQuantizer"),
    "command.training_log": ("TrainingLog",),
    "training.wrpn": ("WRPNWeight",),
}
_HOME_OF = list_homes(_HOMES)

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    return load_name(__name__, _HOME_OF, name)


def __dir__() -> list[str]:
    return __all__
