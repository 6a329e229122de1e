"""Other number systems: fixed point, logarithmic, affine, binary, ternary and powers of two.

Each is emulated in torch on any device. `to_tensorrt` turns a model of any of them into quantized layers of qdq, if its
values fit int8 Q/DQ. docs/systems.md has one table of all. A name loads its module on first use.
"""

from typing import Any

from qdq.lazy import list_homes, load_name

_HOMES: dict[str, tuple[str, ...]] = {
    "acoustic": ("AcousticInput", "AcousticWeight", "acoustic_quantize"),
    "acoustic_model": ("prepare_acoustic",),
    "affine": ("FakeQuantize", "find_codes", "solve_affine"),
    "bases": ("BinaryBases", "fit_bases", "split_bases"),
    "binarize": ("binarize_model", "clipping_weights", "replace_weights"),
    "binary": ("BinaryInput", "BinaryWeight", "sign_at_random"),
    "input_ranges": ("calibrate_inputs",),
    "counting": ("LinearQuant", "LogQuant"),
    "duplicate": ("duplicate_model_with_quant",),
    "fixed_point": ("compute_integral_part", "linear_quantize", "sign_quantize"),
    "grid_state": ("pack_grids", "unpack_grids"),
    "hyperbolic": ("tanh_quantize",),
    "incremental": ("train_incremental",),
    "integer": (
        "IntegerNetwork",
        "QConv2d",
        "QConvBNReLU",
        "QLinear",
        "QMaxPool2d",
        "QMaxPooling2d",
        "QModule",
        "QParam",
        "QReLU",
        "QSigmoid",
        "holding_ranges",
        "restore_float",
    ),
    "logarithmic": ("compute_log_sf", "log_linear_quantize", "log_minmax_quantize"),
    "layer": ("convert_layer",),
    "min_max": ("min_max_quantize",),
    "moving_range": ("moving_ranges",),
    "normal": ("NormalQuant",),
    "parameters": ("quantize_parameters",),
    "powers": ("PowerLevels",),
    "rounds": ("RoundOptions",),
    "selection": ("select_layers",),
    "ternary": ("project_ternary",),
    "ternary_training": ("train_ternary",),
    "uint8_quantizers": ("UInt8Activation", "UInt8Weight"),
    "uint8_training": ("bias_codes", "prepare_uint8_training"),
    "unquantized": ("list_unquantized",),
    "verdict": ("to_tensorrt",),
    "xnor": ("xnor_conv2d", "xnor_dot"),
}
_HOME_OF = list_homes(_HOMES)

__all__ = sorted(_HOME_OF)


def __getattr__(name: str) -> Any:
    return load_name(__name__, _HOME_OF, name)


def __dir__() -> list[str]:
    return __all__
