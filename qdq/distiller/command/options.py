"""All options of `compress_classifier.py`."""

from __future__ import annotations

from dataclasses import dataclass

from cyclopts import Parameter

from qdq.distiller.command.former_options import FormerOptions
from qdq.distiller.command.option_checks import (
    check_action,
    check_export,
    check_fractions,
    check_model,
    check_training,
    check_without_quantizer,
)
from qdq.distiller.command.quantize_options import QuantizeOptions, SearchOptions
from qdq.distiller.command.quantizer_checks import check_quantizer, check_search, check_sources
from qdq.distiller.command.run_options import (
    ExportOptions,
    ImageOptions,
    ModelOptions,
    TrainingOptions,
)


@Parameter(name="*")
@dataclass(frozen=True)
class Options:
    """All options, in groups."""

    model: ModelOptions = ModelOptions()  # noqa: RUF009  # frozen
    images: ImageOptions = ImageOptions()  # noqa: RUF009
    quantize: QuantizeOptions = QuantizeOptions()  # noqa: RUF009
    search: SearchOptions = SearchOptions()  # noqa: RUF009
    training: TrainingOptions = TrainingOptions()  # noqa: RUF009
    export: ExportOptions = ExportOptions()  # noqa: RUF009
    former: FormerOptions = FormerOptions()  # noqa: RUF009

    def check(self) -> None:
        """Refuse options that contradict each other or do nothing together, and log those without an effect.

        Raises:
            ArgumentError: There are such options, or one is out of range.
        """
        self.former.refuse()
        check_fractions(self)
        check_model(self.model)
        check_sources(self.quantize)
        check_action(self)
        if self.quantize.quantize_eval:
            check_quantizer(self.quantize)
        else:
            check_without_quantizer(self)
        check_search(self.search, self.quantize)
        check_training(self.training)
        check_export(self)
