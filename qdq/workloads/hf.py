"""Models that transformers has saved in a folder: `hf/FOLDER`, with texts or images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qdq.errors import ArgumentError, DataError, DependencyError, ModelError, QdqError
from qdq.files import read_file
from qdq.seeds import seeded_rng
from qdq.weights import first_line
from qdq.workloads.embedding import EmbeddingSimilarity
from qdq.workloads.sample_batches import SampleBatches, ShuffledBatches
from qdq.workloads.workload import Score, Workload, WorkloadOptions

PREFIX = "hf/"
"""Begins the names of folders of transformers."""

_CONFIG = "config.json"
_IMAGE_PROCESSOR = "preprocessor_config.json"
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "sentencepiece.bpe.model")
_ATTENTION_MASK = "attention_mask"
_MOST_TOKENS = 512
# Nothing is downloaded, and no code of the folder runs.
_LOCAL = {"local_files_only": True, "trust_remote_code": False}
_EMBEDDING = "last_hidden_state"


@dataclass(frozen=True)
class _Split:
    """Items to calibrate and to evaluate on, with where they come from.

    Args:
        calibration: Texts or image files.
        evaluation: Others.
        source: Where they come from.
    """

    calibration: Sequence[Any]
    evaluation: Sequence[Any]
    source: str


def load_transformers_model(options: WorkloadOptions) -> Workload:
    """A model saved by `save_pretrained` together with its tokenizer or its image processor.

    Texts are padded to the longest one, and padding counts in no figure. The metric of a model that returns
    `last_hidden_state` is the mean cosine between its embeddings and those of the float model.

    Args:
        options: The model is "hf/FOLDER". The data is a text file with one text a line, or a folder of images; images
            default to the packaged photographs.

    Raises:
        ArgumentError: Options that do not fit.
        DataError: The data cannot be read, or is too little.
        DependencyError: transformers is not installed.
        ModelError: The folder holds no such model, or one that needs more than a text or an image.
    """
    folder = Path(options.model.removeprefix(PREFIX))
    if not (folder / _CONFIG).is_file():
        raise ModelError(
            f"{folder} holds no {_CONFIG}; expected a folder that save_pretrained has written.",
            "check the path after hf/; it is relative to here.",
        )
    if options.metric is not None:
        raise ArgumentError(
            f"--metric {options.metric} is given, and {options.model} brings its own.",
            "leave it out, or build the model yourself: --model FILE.py:FUNCTION.",
        )
    if options.image_size is not None:
        raise ArgumentError(
            f"--image-size {options.image_size} is given, and the folder of {options.model} says how its inputs are "
            "made.",
            "leave it out, or change the size in the folder's image processor.",
        )
    transformers = _import_transformers()
    module = _load_module(transformers, folder, options)
    if (folder / _IMAGE_PROCESSOR).is_file():
        if options.mask is not None:
            raise ArgumentError(
                f"--mask {options.mask} is given, and images have no padding.", "leave it out."
            )
        calibration, evaluation = _load_image_batches(transformers, folder, options)
        mask = None
    elif any((folder / name).is_file() for name in _TOKENIZERS):
        calibration, evaluation = _load_text_batches(transformers, folder, options)
        mask = options.mask or _ATTENTION_MASK
    else:
        raise ModelError(
            f"{folder} holds neither a tokenizer nor an image processor.",
            "save it into the same folder: tokenizer.save_pretrained(folder).",
        )
    training = ShuffledBatches(calibration.batches, calibration.description)
    return Workload(
        name=options.model,
        weights=_describe_weights(options),
        module=module,
        calibration=calibration,
        evaluation=evaluation,
        load_training=lambda: training,
        score=_choose_score(module, evaluation, mask),
        outputs=options.outputs,
        mask=mask,
        output_weights=options.output_weights,
    )


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise DependencyError(
            f"transformers cannot be imported ({first_line(error)}).",
            "pip install 'qdq[transformers]'",
        ) from error
    return transformers


def _describe_weights(options: WorkloadOptions) -> str:
    return (
        f"random (seed {options.seed})" if options.weights == "random" else "weights of the folder"
    )


# The model


def _load_module(transformers: Any, folder: Path, options: WorkloadOptions) -> nn.Module:
    """The model of the class that its configuration names, in evaluation mode.

    Raises:
        ModelError: It cannot be loaded, or is an encoder with a decoder.
    """
    if options.weights not in ("DEFAULT", "random"):
        raise ArgumentError(
            f"--weights {options.weights} is given, and {options.model} has the weights of its folder.",
            "leave it out, or pass --weights random.",
        )
    try:
        config = transformers.AutoConfig.from_pretrained(folder, **_LOCAL)
        model_class = _find_class(transformers, config)
        if config.is_encoder_decoder:
            raise ModelError(
                f"{options.model} is an encoder with a decoder: its forward needs what it has said so far.",
                "quantize encoder and decoder one by one: --model FILE.py:FUNCTION.",
            )
        config.use_cache = False  # a cache would be an output that grows from call to call
        module = _make_module(model_class, config, folder, options)
    except QdqError:
        raise
    except Exception as error:  # damaged files can raise anything
        raise _unloadable(folder, error) from error
    return module.eval()


def _unloadable(folder: Path, error: Exception) -> ModelError:
    return ModelError(
        f"{folder} cannot be loaded: {first_line(error)}.", "save it again with save_pretrained."
    )


def _find_class(transformers: Any, config: Any) -> Any:
    """The class of transformers that the configuration names; AutoModel if it names none.

    Raises:
        ModelError: transformers has no such class.
    """
    name = (config.architectures or ["AutoModel"])[0]
    model_class = getattr(transformers, name, None)
    if model_class is None:
        raise ModelError(
            f"transformers {transformers.__version__} has no class {name}, which the folder names.",
            "install the version that saved it, or build the model yourself: --model FILE.py:FUNCTION.",
        )
    return model_class


def _make_module(
    model_class: Any, config: Any, folder: Path, options: WorkloadOptions
) -> nn.Module:
    with torch.inference_mode(False), seeded_rng(options.seed):
        if options.weights == "random":
            random_module: nn.Module = _from_config(model_class, config)
            return random_module
        module: nn.Module = model_class.from_pretrained(folder, config=config, **_LOCAL)
    return module.float()


def _from_config(model_class: Any, config: Any) -> nn.Module:
    if hasattr(model_class, "from_config"):  # AutoModel
        module: nn.Module = model_class.from_config(config)
        return module
    built: nn.Module = model_class(config)
    return built


def _choose_score(module: nn.Module, evaluation: SampleBatches, mask: str | None) -> Score | None:
    """The similarity of embeddings, if the model returns them."""
    similarity = EmbeddingSimilarity(module, evaluation, _EMBEDDING, mask)
    return similarity if similarity.has_embedding else None


def _load_part(part: Any, folder: Path) -> Any:
    """The tokenizer or the image processor of a folder.

    Raises:
        ModelError: It cannot be loaded.
    """
    try:
        return part.from_pretrained(folder, **_LOCAL)
    except Exception as error:  # damaged files can raise anything
        raise _unloadable(folder, error) from error


# Texts


def _load_text_batches(
    transformers: Any, folder: Path, options: WorkloadOptions
) -> tuple[SampleBatches, SampleBatches]:
    """Tokenized texts of a file; all batches have the length of the longest text."""
    split = _split(_read_texts(options), options, "texts")
    tokenizer = _load_part(transformers.AutoTokenizer, folder)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise ModelError(
            f"the tokenizer of {folder} has no token for padding.",
            "set tokenizer.pad_token, and save it.",
        )
    most_tokens = min(tokenizer.model_max_length, _MOST_TOKENS)
    texts = [*split.calibration, *split.evaluation]
    tokens = tokenizer(texts, truncation=True, max_length=most_tokens)
    length = max(map(len, tokens["input_ids"]))

    def encode(texts: Sequence[str]) -> Any:
        return tokenizer(
            list(texts),
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
        )

    return _make_batches(split, encode, f"texts, {length} tokens each with padding", options)


def _read_texts(options: WorkloadOptions) -> tuple[list[str], str]:
    """The lines of the file that are not empty, and its name.

    Raises:
        ArgumentError: No file.
        DataError: It is no text.
    """
    if options.data is None:
        raise ArgumentError(
            f"{options.model} needs texts.", "pass --data FILE.txt with one text a line."
        )
    path = Path(options.data)
    try:
        lines = read_file(path).decode().splitlines()
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8.", "save it as UTF-8.") from error
    return [line.strip() for line in lines if line.strip()], str(path)


# Images


def _load_image_batches(
    transformers: Any, folder: Path, options: WorkloadOptions
) -> tuple[SampleBatches, SampleBatches]:
    """Images of a folder, or the packaged photographs, as the image processor of the model wants them."""
    from qdq.workloads.classification.images import read_image  # needs Pillow

    if options.data is None:
        split = _split_photographs(options)
    else:
        split = _split(_list_images(Path(options.data)), options, "images")
    processor = _load_part(transformers.AutoImageProcessor, folder)

    def encode(files: Sequence[Path]) -> Any:
        images = [read_image(file) for file in files]
        try:
            return processor(images=images, return_tensors="pt")
        except (ValueError, RuntimeError) as error:
            raise DataError(
                f"the image processor of {folder} makes no batch of the images: {first_line(error)}.",
                "use one that resizes them to one size, or build the batches yourself: --data FILE.py:FUNCTION.",
            ) from error

    return _make_batches(split, encode, "images", options)


def _split_photographs(options: WorkloadOptions) -> _Split:
    """The packaged photographs, as many as there are."""
    from qdq.workloads.classification.images import (
        CALIBRATION_PHOTOGRAPHS,
        LABELLED_PHOTOGRAPHS,
        find_photographs,
    )

    calibration = find_photographs(CALIBRATION_PHOTOGRAPHS)
    evaluation = LABELLED_PHOTOGRAPHS.find_files()
    num_calibration = options.calib_batches * options.batch_size
    return _Split(
        calibration[:num_calibration],
        evaluation[: options.eval_samples],
        "the packaged photographs",
    )


def _list_images(folder: Path) -> tuple[list[Path], str]:
    """The image files below a folder, in order, and its name.

    Raises:
        DataError: It is no folder.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    if not folder.is_dir():
        raise DataError(f"{folder} is no folder; expected a folder of images.", "check --data.")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMG_EXTENSIONS)
    return files, str(folder)


# Batches


def _split(items: tuple[Sequence[Any], str], options: WorkloadOptions, kind: str) -> _Split:
    """Items to calibrate and to evaluate on: in random order, and none in both.

    Raises:
        DataError: There are fewer than two.
    """
    values, source = items
    if len(values) < 2:
        raise DataError(
            f"{source} has {len(values)} {kind}; expected at least 2, to calibrate and to evaluate on.",
            f"add {kind}.",
        )
    generator = torch.Generator().manual_seed(options.seed)
    order = torch.randperm(len(values), generator=generator).tolist()
    wanted = options.calib_batches * options.batch_size
    num_calibration = min(wanted, len(values) // 2)
    shuffled = [values[index] for index in order]
    evaluation = shuffled[num_calibration : num_calibration + options.eval_samples]
    return _Split(shuffled[:num_calibration], evaluation, f"{source}, seed {options.seed}")


def _make_batches(
    split: _Split, encode: Callable[[Sequence[Any]], Any], kind: str, options: WorkloadOptions
) -> tuple[SampleBatches, SampleBatches]:
    sets = []
    for items in (split.calibration, split.evaluation):
        batches = []
        for start in range(0, len(items), options.batch_size):
            batches.append(encode(items[start : start + options.batch_size]))
        sets.append(SampleBatches(batches, f"{len(items)} {kind}, of {split.source}"))
    calibration, evaluation = sets
    return calibration, evaluation
