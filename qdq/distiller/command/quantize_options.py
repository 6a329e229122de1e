"""The post-training options of `compress_classifier.py`, under Distiller's names and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter
from cyclopts.types import PositiveFloat, PositiveInt
from cyclopts.validators import Number

from qdq.distiller.search.search_options import LapqOptions
from qdq.systems.settings import FLOAT_BITS

ModeName = Literal["sym", "sym_restr", "asym_s", "asym_u"]
ClipName = Literal["none", "avg", "n_std", "gauss", "laplace"]
InitName = Literal["NONE", "AVG", "LAPLACE", "GAUSS", "L1", "L2", "L3"]
MethodName = Literal["Powell", "Nelder-Mead", "COBYLA", "COBYQA"]

# The widths that codes, sums and multipliers can have.
CodeBits = Annotated[int, Parameter(validator=Number(gte=0, lte=FLOAT_BITS))]
SumBits = Annotated[int, Parameter(validator=Number(gte=2, lte=FLOAT_BITS))]
MultiplierBits = Annotated[int, Parameter(validator=Number(gte=1, lte=FLOAT_BITS))]

MODES: dict[str, str] = {
    "sym": "SYMMETRIC",
    "sym_restr": "SYMMETRIC_RESTRICTED",
    "asym_s": "ASYMMETRIC_SIGNED",
    "asym_u": "ASYMMETRIC_UNSIGNED",
}
"""Name on the command line -> name of the `LinearQuantMode`."""


@Parameter(name="*")
@dataclass(frozen=True)
class QuantizeOptions:
    """How a trained model is quantized.

    Args:
        quantize_eval: Quantize the model, then evaluate it. Needs --evaluate.
        qe_mode: Mode of weights and activations.
        qe_mode_acts: Mode of activations, in the place of --qe-mode.
        qe_mode_wts: Mode of weights, in the place of --qe-mode.
        qe_bits_acts: Bits of activations; 0 leaves them in float.
        qe_bits_wts: Bits of weights; 0 leaves them in float.
        qe_bits_accum: Bits of the accumulator.
        qe_clip_acts: How the ranges of activations are cut.
        qe_clip_n_stds: Number of standard deviations; n_std needs it.
        qe_no_clip_layers: Layers whose activations are not clipped.
        qe_no_quant_layers: Layers that stay in float. A layer in both lists stays in float.
        qe_per_channel: A scale for each output channel of a weight.
        qe_scale_approx_bits: Scales are a whole number of this many bits and a shift. Exact scales if left out.
        qe_save_fp_weights: Keep the float weights, so that they can be quantized again.
        qe_convert_pytorch: Evaluate with the int8 modules of torch.
        qe_pytorch_backend: Backend of these modules.
        qe_stats_file: Statistics of an earlier calibration, in YAML.
        qe_dynamic: Compute the range of an activation in every batch.
        qe_calibration: Collect statistics on this fraction of the calibration images. Without --quantize-eval the
            statistics are saved, and nothing else is done. If no statistics are named, the fraction is 0.05.
        qe_config_file: YAML file with a PostTrainLinearQuantizer, whose settings replace those of the options.
    """

    quantize_eval: Annotated[bool, Parameter(alias="--qe")] = False
    qe_mode: Annotated[ModeName, Parameter(alias="--qem")] = "sym"
    qe_mode_acts: Annotated[ModeName | None, Parameter(alias="--qema")] = None
    qe_mode_wts: Annotated[ModeName | None, Parameter(alias="--qemw")] = None
    qe_bits_acts: Annotated[CodeBits, Parameter(alias="--qeba")] = 8
    qe_bits_wts: Annotated[CodeBits, Parameter(alias="--qebw")] = 8
    qe_bits_accum: SumBits = 32
    qe_clip_acts: Annotated[ClipName, Parameter(alias="--qeca")] = "none"
    qe_clip_n_stds: PositiveFloat | None = None
    qe_no_clip_layers: Annotated[tuple[str, ...], Parameter(alias="--qencl")] = ()
    qe_no_quant_layers: Annotated[tuple[str, ...], Parameter(alias="--qenql")] = ()
    qe_per_channel: Annotated[bool, Parameter(alias="--qepc")] = False
    qe_scale_approx_bits: Annotated[MultiplierBits | None, Parameter(alias="--qesab")] = None
    qe_save_fp_weights: bool = False
    qe_convert_pytorch: Annotated[bool, Parameter(alias="--qept")] = False
    qe_pytorch_backend: Literal["fbgemm", "qnnpack"] = "fbgemm"
    qe_stats_file: Path | None = None
    qe_dynamic: bool = False
    qe_calibration: float | None = None
    qe_config_file: Path | None = None

    @property
    def mode_acts(self) -> str:
        """Name of the mode of activations."""
        return MODES[self.qe_mode_acts or self.qe_mode]

    @property
    def mode_wts(self) -> str:
        """Name of the mode of weights."""
        return MODES[self.qe_mode_wts or self.qe_mode]


@Parameter(name="*")
@dataclass(frozen=True)
class SearchOptions:
    """The search for better quantization parameters (LAPQ, Nahshan et al. 2019, arXiv 1911.07190).

    Args:
        qe_lapq: Search for the scales with the smallest loss. Needs --evaluate --quantize-eval.
        lapq_maxiter: Most iterations of the method.
        lapq_maxfev: Most evaluations of the loss.
        lapq_method: Method of scipy.optimize.minimize; one that needs no gradient.
        lapq_basinhopping: Search from several starts, with scipy.optimize.basinhopping.
        lapq_basinhopping_niter: Number of these starts.
        lapq_init_mode: Scales at the start: of a clip mode, or those with the smallest error of layers to a power.
        lapq_init_method: Method that finds the smallest error.
        lapq_eval_size: Fraction of the test images on which the loss is measured.
        lapq_eval_memoize_dataloader: Keep these images in memory.
        lapq_search_clipping: Search for clip values in the place of scales.
    """

    qe_lapq: Annotated[bool, Parameter(alias="--qe-coordinate-search")] = False
    lapq_maxiter: PositiveInt | None = None
    lapq_maxfev: PositiveInt | None = None
    lapq_method: MethodName = "Powell"
    lapq_basinhopping: Annotated[bool, Parameter(alias="--lapq-bh")] = False
    lapq_basinhopping_niter: Annotated[PositiveInt, Parameter(alias="--lapq-bh-niter")] = 100
    lapq_init_mode: InitName = "NONE"
    lapq_init_method: MethodName = "Powell"
    lapq_eval_size: float = 1.0
    lapq_eval_memoize_dataloader: bool = False
    lapq_search_clipping: bool = False

    def as_lapq(self, seed: int) -> LapqOptions:
        """The options of `ptq_coordinate_search`.

        Args:
            seed: Seed of the starts.

        Raises:
            ArgumentError: One is out of range.
        """
        options = {}
        for name, value in vars(self).items():
            if name.startswith("lapq_"):
                options[name.removeprefix("lapq_")] = value
        return LapqOptions(**options, seed=seed)
