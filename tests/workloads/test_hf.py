"""Folders of transformers by name, with texts and images; small models with random weights."""

import numpy as np
import pytest
import torch

from qdq import ArgumentError, DataError, ModelError, WorkloadOptions, load_workload, predict

transformers = pytest.importorskip("transformers")

WORDS = "[PAD] [UNK] [CLS] [SEP] [MASK] the cat dog sees a red blue house car and runs .".split()  # noqa: SIM905
SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A text encoder, an image classifier, and texts of different lengths."""
    root = tmp_path_factory.mktemp("hf")
    (root / "vocab.txt").write_text("\n".join(WORDS))
    torch.manual_seed(0)
    bert = transformers.BertConfig(**SMALL, intermediate_size=64, vocab_size=len(WORDS))
    transformers.BertModel(bert).save_pretrained(root / "bert")
    transformers.BertTokenizerFast(str(root / "vocab.txt")).save_pretrained(root / "bert")
    vit = transformers.ViTConfig(**SMALL, intermediate_size=64, image_size=32, patch_size=16)
    transformers.ViTForImageClassification(vit).save_pretrained(root / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "vit")
    t5 = {"d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 20, "d_kv": 8}
    transformers.T5ForConditionalGeneration(transformers.T5Config(**t5)).save_pretrained(
        root / "t5"
    )
    texts = [
        "the cat runs",
        "a dog",
        "the red house and the blue car",
        "a cat sees a dog .",
        "",
        "dog",
    ]
    (root / "texts.txt").write_text("\n".join(texts))
    (root / "one.txt").write_text("the cat\n")
    (root / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    return root


def load(folders, name, data="texts.txt", **options):
    options = {"batch_size": 2, "calib_batches": 1, **options}
    if data is not None:
        options["data"] = folders / data
    return load_workload(WorkloadOptions(model=f"hf/{folders / name}", **options))


def test_texts_are_padded_and_padding_counts_in_no_figure(folders):
    workload = load(folders, "bert")
    batches = [*workload.calibration, *workload.evaluation]
    assert [batch["input_ids"].shape for batch in batches] == [(2, 9), (2, 9), (1, 9)]
    assert workload.calibration.num_samples + workload.evaluation.num_samples == 5
    assert workload.mask == "attention_mask"
    outputs = predict(workload.module, workload.evaluation, **workload.view)
    num_tokens = sum(int(batch["attention_mask"].sum()) for batch in workload.evaluation)
    assert outputs["last_hidden_state"].shape == (num_tokens, 32)
    assert not workload.module.config.use_cache


def test_similarity_of_embeddings_against_torch(folders):
    workload = load(folders, "bert")
    assert workload.measure(workload.module) == {"cosine": pytest.approx(1.0)}
    changed = load(folders, "bert", weights="random", seed=3).module
    cosines = []
    with torch.no_grad():
        for batch in workload.evaluation:
            mask = batch["attention_mask"].double()[..., None]
            pooled = []
            for module in (workload.module, changed):
                hidden = module(**batch).last_hidden_state.double()
                pooled.append((hidden * mask).sum(1) / mask.sum(1))
            cosines += torch.cosine_similarity(*pooled).tolist()
    assert workload.measure(changed) == {"cosine": pytest.approx(np.mean(cosines), abs=1e-6)}


def test_a_model_with_one_output_has_its_similarity(folders):
    config = transformers.DistilBertConfig(
        dim=32, n_layers=1, n_heads=2, hidden_dim=32, vocab_size=20
    )
    folder = folders / "distil"
    transformers.DistilBertModel(config).save_pretrained(folder)
    transformers.DistilBertTokenizerFast(str(folders / "vocab.txt")).save_pretrained(folder)
    workload = load(folders, "distil")
    assert workload.measure(workload.module) == {"cosine": pytest.approx(1.0)}


def test_images_go_through_the_processor_of_the_folder(folders, tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    for index in range(6):
        path = tmp_path / str(index % 2) / f"{index}.png"
        path.parent.mkdir(exist_ok=True)
        image_module.new("RGB", (50, 40), (40 * index, 0, 0)).save(path)
    workload = load(folders, "vit", tmp_path, batch_size=4)
    assert [len(batch["pixel_values"]) for batch in workload.calibration] == [3]
    assert workload.calibration.batches[0]["pixel_values"].shape == (3, 3, 32, 32)
    assert workload.score is None
    assert workload.mask is None
    reds = {
        round(float(image[0, 0, 0]), 3)
        for batch in (*workload.calibration, *workload.evaluation)
        for image in batch["pixel_values"]
    }
    assert reds == {round(2 * 40 * index / 255 - 1, 3) for index in range(6)}


@pytest.mark.parametrize(
    ("name", "data", "options", "kind", "message"),
    [
        ("absent", None, {}, ModelError, "holds no config.json"),
        ("bert", None, {}, ArgumentError, "needs texts"),
        ("bert", "one.txt", {}, DataError, "has 1 texts; expected at least 2"),
        ("bert", "bytes.txt", {}, DataError, "is no text in UTF-8"),
        ("bert", "texts.txt", {"metric": "a.py:f"}, ArgumentError, "brings its own"),
        ("bert", "texts.txt", {"weights": "x.pth"}, ArgumentError, "has the weights of its folder"),
        ("bert", "texts.txt", {"image_size": 96}, ArgumentError, "how its inputs are made"),
        ("vit", "texts.txt", {"mask": "x"}, ArgumentError, "images have no padding"),
        ("vit", "texts.txt", {}, DataError, "is no folder; expected a folder of images"),
        ("t5", "texts.txt", {}, ModelError, "encoder with a decoder"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_is_named(folders, name, data, options, kind, message):
    with pytest.raises(kind, match=message):
        load(folders, name, data, **options)


def test_a_folder_without_a_tokenizer(folders):
    folder = folders / "bare"
    folder.mkdir()
    config = transformers.BertConfig(**SMALL, intermediate_size=64, vocab_size=len(WORDS))
    config.save_pretrained(folder)
    with pytest.raises(ModelError, match="neither a tokenizer nor an image processor"):
        load(folders, "bare", weights="random")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folders, "bare")
    (folder / "model.safetensors").write_bytes(b"half")
    with pytest.raises(ModelError, match="cannot be loaded"):
        load(folders, "bare")
    config.architectures = ["NoSuchModel"]
    config.save_pretrained(folder)
    with pytest.raises(ModelError, match="has no class NoSuchModel"):
        load(folders, "bare")
