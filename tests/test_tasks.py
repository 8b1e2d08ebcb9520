"""Every task from its own data to a model that loads, with its metrics; and what is said of data that do not fit it."""

import json
import wave
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import transformers
import yaml
from models import MELS, PAD, SOUND, TAGS, labelled_lines, save_tiny, tiny_model, tiny_tokenizer, write_txt
from torch.nn import functional as F

import lrcompress
from lrcompress.data import DataSource, read_rows
from lrcompress.errors import DataError, InputError, ModelError, RecipeError
from lrcompress.evaluate.embedding import Embedding
from lrcompress.evaluate.entities import Entities, entities
from lrcompress.evaluate.word_errors import WordErrors
from lrcompress.hf import saved_ranks
from lrcompress.recipe import shipped_recipes
from lrcompress.report.card import CLASSES, PIPELINES
from lrcompress.tasks import TASKS, Cut, FeatureExtraction, Scored

WORDS = ["Ada", "met", "Bob", "in", "Oslo", "and", "went", "home"]
MARKS = ["B-PER", "O", "B-PER", "O", "B-LOC", "O", "O", "O"]
RATE = 16000


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def tagged(path: Path, count: int = 24) -> Path:
    draw = numpy.random.default_rng(0)
    orders = [draw.permutation(len(WORDS)).tolist() for _ in range(count)]
    return write_rows(path, [{"words": [WORDS[i] for i in o], "tags": [MARKS[i] for i in o]} for o in orders])


def questions(path: Path, count: int = 24) -> Path:
    return write_rows(path, [{"text": f"say {i} backwards", "label": f"{i}"[::-1]} for i in range(10, 10 + count)])


def lines(path: Path, count: int = 40) -> Path:
    return write_rows(path, [{"text": text} for text, _ in labelled_lines(count)])


def pictures(folder: Path, count: int = 12) -> Path:
    from PIL import Image

    draw = numpy.random.default_rng(0)
    for name in ("LABEL_0", "LABEL_1"):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = draw.integers(0, 255, (20, 18, 3), dtype=numpy.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


def recording(file: Path, seconds: float, rate: int = RATE, seed: int = 0) -> None:
    draw = numpy.random.default_rng(seed)
    with wave.open(str(file), "wb") as out:
        out.setnchannels(1)
        out.setsampwidth(2)
        out.setframerate(rate)
        out.writeframes((draw.normal(size=int(seconds * rate)) * 3000).astype("<i2").tobytes())


def recordings(folder: Path, count: int = 8, rate: int = RATE) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        recording(folder / f"{i}.wav", 0.5 + 0.05 * i, rate, seed=i)
    rows = "".join(f"{i}.wav,word {i}\n" for i in range(count))
    (folder / "metadata.csv").write_text(f"file_name,text\n{rows}", encoding="utf-8")
    return folder


def save_with_processor(name: str, folder: Path) -> Path:
    save_tiny(name, folder)
    if name == "vit":
        transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder)
    if name == "whisper":
        extractor = transformers.WhisperFeatureExtractor(feature_size=MELS, chunk_length=SOUND // 100)
        transformers.WhisperProcessor(extractor, tiny_tokenizer()).save_pretrained(folder)
    if name == "bert-masked":
        tokenizer = tiny_tokenizer()
        tokenizer.add_special_tokens({"mask_token": "<mask>"})
        tokenizer.save_pretrained(folder)
    return folder


CASES: dict[str, tuple[str, Any, dict[str, Any], set[str]]] = {
    "masked-lm": (
        "bert-masked", lambda p: write_txt(p.with_suffix(".txt"), 60), {},
        {"token_perplexity", "accuracy", "kl", "agreement"},
    ),
    "token-classification": (
        "bert-tokens", lambda p: tagged(p.with_suffix(".jsonl")), {"text": "words", "label": "tags"},
        {"accuracy", "entity_f1", "kl", "agreement"},
    ),
    "seq2seq-lm": (
        "t5", lambda p: questions(p.with_suffix(".jsonl")), {"label": "label"},
        {"token_perplexity", "accuracy", "kl", "agreement"},
    ),
    "image-classification": ("vit", pictures, {}, {"accuracy", "kl", "agreement"}),
    "speech-seq2seq": ("whisper", recordings, {}, {"wer", "token_perplexity", "kl", "agreement"}),
    "feature-extraction": ("bert-embeddings", lambda p: lines(p.with_suffix(".jsonl")), {}, {"cosine", "spearman"}),
}  # fmt: skip
"""Task → tiny model, what writes its data, their columns, the metrics of its recipe."""

RECIPES = {
    "masked-lm": "masked_lm", "token-classification": "token_classes", "seq2seq-lm": "seq2seq",
    "image-classification": "image_classes", "speech-seq2seq": "speech", "feature-extraction": "embeddings",
}  # fmt: skip


def recipe_of(name: str, folder: Path) -> dict[str, Any]:
    _, write, columns, _ = CASES[name]
    source = {"path": str(write(folder / "data")), **columns}
    return {
        **yaml.safe_load(shipped_recipes()[RECIPES[name]].read_text()),
        "data": {"train": source, "test": source},
        "calibration": {"sequences": 16, "length": 32, "batch": 8},
        "ranks": {"kind": "budget", "keep_parameters": 0.4},
        "refit": {"check": 4},
        "recovery": {"steps": 3, "batch": 4, "length": 32, "learning_rate": 1e-3},
        "evaluation": {"length": 32, "batch": 8},
        "timing": {"batches": [2], "prompt": 8, "repeats": 3, "warmup": 0},
    }


@pytest.mark.parametrize("name", CASES)
def test_a_task_runs_from_its_recipe_to_a_model_that_loads(name: str, tmp_path: Path) -> None:
    """The shipped recipe on a tiny model and tiny data, with the task left to the model's config."""
    model = save_with_processor(CASES[name][0], tmp_path / "model")
    report = lrcompress.run(str(model), recipe_of(name, tmp_path) | {"task": "auto"}, tmp_path / "run")
    assert report is not None
    assert report.model.task == name
    dense, result = report.rows[0], report.rows[-1]
    assert result.metrics.keys() == CASES[name][3]
    assert {"svd", "svd_llm", "kron", "refit", "lora_lrd"} < {row.name for row in report.rows}
    assert result.target_parameters <= 0.4 * dense.target_parameters
    assert result.latency
    difference = next(note for stage in report.stages for note in stage.notes if "fresh process" in note)
    assert float(difference.split()[-1]) < 1e-5
    loaded = getattr(transformers, TASKS[name].auto_class).from_pretrained(tmp_path / "run/model")
    assert saved_ranks(tmp_path / "run/model") == loaded.config.quantization_config.ranks
    getattr(transformers, TASKS[name].processor).from_pretrained(tmp_path / "run/model")


def test_the_card_names_the_classes_of_every_task() -> None:
    assert {name: (task.auto_class, task.processor) for name, task in TASKS.items()} == CLASSES
    assert PIPELINES.keys() == TASKS.keys()


# what counts ----------------------------------------------------------------------------------------------------


def test_masked_tokens_are_those_of_bert_and_the_same_each_time(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"mask_token": "<mask>"})
    rows = read_rows(DataSource(path=str(write_txt(tmp_path / "a.txt", 400))))
    examples = TASKS["masked-lm"].examples(rows, tokenizer, None, Cut(64))
    batch, again = examples.batch(range(100)), examples.batch(range(100))
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    found = batch["labels"] != -100
    plain = torch.where(found, batch["labels"], batch["input_ids"])
    text = tokenizer(rows.inputs[0], add_special_tokens=False)["input_ids"]
    assert plain[0].tolist() == text[:64]
    assert found.sum(1).unique().tolist() == [round(0.15 * 64)]
    masked = (batch["input_ids"] == tokenizer.mask_token_id)[found].float().mean()
    kept = (batch["input_ids"] == batch["labels"])[found].float().mean()
    assert 0.75 < masked < 0.85
    assert 0.07 < kept < 0.14


def test_words_are_labelled_at_their_first_token(tmp_path: Path) -> None:
    rows = read_rows(DataSource(path=str(tagged(tmp_path / "a.jsonl", 3)), text="words", label="tags"), "words")
    config = tiny_model("bert-tokens").config
    batch = TASKS["token-classification"].examples(rows, tiny_tokenizer(), config, Cut(64)).batch([0, 1, 2])
    for row, (words, tags) in enumerate(zip(rows.inputs, rows.labels or [], strict=True)):
        labels = batch["labels"][row]
        assert [TAGS[label] for label in labels[labels != -100]] == tags
        firsts = torch.nonzero(labels != -100).flatten().tolist()
        assert [chr(batch["input_ids"][row, at]) for at in firsts] == [
            chr(tiny_tokenizer()(w)["input_ids"][0]) for w in words
        ]


def test_the_loss_of_a_seq2seq_model_is_that_of_transformers(tmp_path: Path) -> None:
    model, task = tiny_model("t5"), TASKS["seq2seq-lm"]
    rows = read_rows(DataSource(path=str(questions(tmp_path / "a.jsonl")), label="label"))
    batch = task.examples(rows, tiny_tokenizer(), model.config, Cut(32)).batch([0, 5, 9])
    with torch.no_grad():
        own = task.loss(task.logits(model, batch), batch)
        oracle = model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=batch["labels"]
        ).loss
    assert own == pytest.approx(oracle.item(), rel=1e-5)


def test_both_sides_of_a_pair_have_masks_that_tell_apart() -> None:
    from lrcompress.data.examples import Pairs

    batch = Pairs([[1, 2, 3], [4]], [[5, 6, 7], [8]], PAD, 0).batch([0, 1])
    assert batch["decoder_input_ids"].shape[1] != batch["input_ids"].shape[1]
    assert batch["decoder_attention_mask"].sum(1).tolist() == [3, 1]
    assert batch["decoder_input_ids"][0, :3].tolist() == [0, 5, 6]


def test_images_are_what_the_processor_of_transformers_makes(tmp_path: Path) -> None:
    from PIL import Image

    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    rows = read_rows(DataSource(path=str(pictures(tmp_path / "a", 3))), "image")
    assert rows.labels == ["LABEL_0"] * 3 + ["LABEL_1"] * 3
    batch = TASKS["image-classification"].examples(rows, processor, tiny_model("vit").config, Cut(32)).batch([0, 5])
    opened = [Image.open(tmp_path / "a" / place) for place in ("LABEL_0/0.png", "LABEL_1/2.png")]
    assert torch.equal(batch["pixel_values"], processor(images=opened, return_tensors="pt")["pixel_values"])
    assert batch["labels"].tolist() == [0, 1]


def test_embeddings_are_pooled_as_the_model_states_it() -> None:
    model, ids = tiny_model("bert-embeddings"), torch.randint(0, 256, (3, 7))
    mask = torch.tensor([[1] * 7, [1] * 4 + [0] * 3, [1] * 2 + [0] * 5])
    batch = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
        mean = TASKS["feature-extraction"].logits(model, batch)
        stated = {"1_Pooling/config.json": {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}}
        first = TASKS["feature-extraction"].of(model.config, stated).logits(model, batch)
    assert torch.allclose(mean[1], F.normalize(hidden[1, :4].mean(0), dim=0), atol=1e-6)
    assert torch.allclose(first, F.normalize(hidden[:, 0], dim=-1))
    for modes in ("cls", ["cls"]):  # as sentence-transformers 6 writes it
        newer = FeatureExtraction().of(model.config, {"1_Pooling/config.json": {"pooling_mode": modes}})
        assert newer.pooling == "cls"
    for strange in ({"pooling_mode_max_tokens": True}, {"pooling_mode": "max"}, {"pooling_mode": ["cls", "mean"]}):
        with pytest.raises(ModelError, match="pooling is not known"):
            FeatureExtraction().of(model.config, {"1_Pooling/config.json": strange})
    with pytest.raises(ModelError, match="Dense"):
        FeatureExtraction().of(model.config, {"modules.json": [{"type": "sentence_transformers.models.Dense"}]})
    with pytest.raises(ModelError, match="an encoder"):
        FeatureExtraction().of(tiny_model("t5").config, {})


def test_the_divergence_of_embeddings_is_half_their_squared_distance() -> None:
    x, y = torch.randn(2, 5, 8)
    one, other = (Scored(F.normalize(z, dim=-1), None, torch.arange(5), gaussian=True) for z in (x, y))
    assert torch.allclose(one.divergence(other), 1 - F.cosine_similarity(x, y), atol=1e-6)


# metrics --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tags", "wanted"),
    [
        ("O O", set()),
        ("B-PER I-PER O B-PER", {(0, 2, "PER"), (3, 4, "PER")}),
        ("B-PER B-PER I-LOC", {(0, 1, "PER"), (1, 2, "PER"), (2, 3, "LOC")}),
        ("I-PER I-PER B-LOC", {(0, 2, "PER"), (2, 3, "LOC")}),
        ("NOUN NOUN O VERB", {(0, 2, "NOUN"), (3, 4, "VERB")}),
        ("U-PER U-PER S-LOC I-LOC", {(0, 1, "PER"), (1, 2, "PER"), (2, 3, "LOC"), (3, 4, "LOC")}),
        ("B-PER L-PER I-PER", {(0, 2, "PER"), (2, 3, "PER")}),
    ],
)
def test_entities_of_tags(tags: str, wanted: set[tuple[int, int, str]]) -> None:
    assert entities(tags.split()) == wanted


def test_entity_f1_counts_whole_entities_of_each_sequence() -> None:
    targets = torch.tensor([1, 2, 0, 3, 1, 0])  # PER(0-2) LOC(3) | PER(4)
    heard = torch.tensor([1, 2, 0, 1, 1, 3])  # PER right, PER wrong | PER right, LOC too many
    scored = Scored(F.one_hot(heard, 5).float(), targets, torch.tensor([0, 0, 0, 0, 1, 1]), classes=TAGS)
    sums = Entities().sums(scored, None)["entity_f1"]
    assert Entities().measurement("entity_f1", sums).value == pytest.approx(2 * 2 / (4 + 3))


def test_spearman_is_that_of_scipy_and_blind_to_a_rotation() -> None:
    from scipy.stats import spearmanr

    x, noise = torch.randn(12, 6), torch.randn(12, 6)
    dense, near = (Scored(F.normalize(z, dim=-1), None, torch.arange(12), gaussian=True) for z in (x, x + noise / 2))
    rows, columns = torch.triu_indices(12, 12, offset=1)
    cosines = [(s.logits @ s.logits.T)[rows, columns] for s in (dense, near)]
    assert Embedding().sums(near, dense)["spearman"].mean == pytest.approx(spearmanr(*cosines).statistic, abs=1e-6)
    turned = Scored(dense.logits @ torch.linalg.qr(torch.randn(6, 6)).Q, None, torch.arange(12), gaussian=True)
    assert Embedding().sums(turned, dense)["spearman"].mean > 0.99
    assert Embedding().sums(turned, dense)["cosine"].mean < 0.9


def test_equal_texts_have_no_rank_correlation() -> None:
    same = Scored(torch.ones(4, 6) / 6**0.5, None, torch.arange(4), gaussian=True)
    assert Embedding().sums(same, same).keys() == {"cosine"}


def test_word_errors_are_summed_over_words() -> None:
    wanted, written = ["One two three.", "four", ""], ["one three", "four five", "six"]
    sums = WordErrors().sums(
        Scored(torch.zeros(0, 1), None, torch.zeros(0).long(), written=written, wanted=wanted), None
    )
    assert sums["wer"].mean == pytest.approx((1 + 1 + 1) / 4)


# what does not fit ------------------------------------------------------------------------------------------------


def refusal(model: str, tmp_path: Path, change: dict[str, Any], name: str) -> str:
    folder = save_with_processor(model, tmp_path / "model")
    recipe = recipe_of(name, tmp_path)
    for split in ("train", "test"):
        recipe["data"][split] = recipe["data"][split] | change.get("data", {})
    recipe |= {key: value for key, value in change.items() if key != "data"}
    with pytest.raises(InputError) as caught:
        lrcompress.run(str(folder), recipe, tmp_path / "run")
    assert not (tmp_path / "run/stages").exists()
    return str(caught.value)


def test_a_metric_of_another_task_is_refused(tmp_path: Path) -> None:
    text = refusal("vit", tmp_path, {"evaluate": ["perplexity"]}, "image-classification")
    assert "metric `perplexity` does not fit task image-classification" in text
    assert "accuracy, divergence" in text


def test_tags_that_do_not_fit_the_words_are_refused(tmp_path: Path) -> None:
    rows = [{"words": ["a", "b"], "tags": ["O"]}]
    path = str(write_rows(tmp_path / "bad.jsonl", rows))
    text = refusal("bert-tokens", tmp_path, {"data": {"path": path}}, "token-classification")
    assert "the labels of a row do not fit its words" in text
    assert "a list of 2 labels" in text


def test_a_text_is_no_list_of_words(tmp_path: Path) -> None:
    path = str(write_rows(tmp_path / "bad.jsonl", [{"words": "a b", "tags": ["O", "O"]}]))
    text = refusal("bert-tokens", tmp_path, {"data": {"path": path}}, "token-classification")
    assert "column `words` is not a list of words" in text


def test_a_pair_needs_an_answer(tmp_path: Path) -> None:
    text = refusal("t5", tmp_path, {"data": {"label": None}}, "seq2seq-lm")
    assert "the task writes texts" in text
    assert "`label` for seq2seq-lm" in text


def test_sounds_at_another_rate_are_refused(tmp_path: Path) -> None:
    slow = recordings(tmp_path / "slow", 3, rate=8000)
    text = refusal("whisper", tmp_path, {"data": {"path": str(slow)}}, "speech-seq2seq")
    assert "8000 Hz" in text
    assert "ffmpeg" in text
    assert "16000" in text


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    text = refusal("vit", tmp_path, {"data": {"path": str(tmp_path / "none")}}, "image-classification")
    assert "has no images" in text


def test_a_file_that_is_no_image_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad/LABEL_0").mkdir(parents=True)
    (tmp_path / "bad/LABEL_0/a.png").write_text("no")
    text = refusal("vit", tmp_path, {"data": {"path": str(tmp_path / "bad")}}, "image-classification")
    assert "is no image" in text


def test_embeddings_have_no_task_loss(tmp_path: Path) -> None:
    change = {"recovery": {"steps": 2, "length": 32, "loss": {"kind": "task"}}}
    text = refusal("bert-embeddings", tmp_path, change, "feature-extraction")
    assert "feature-extraction has no task loss" in text


def test_a_model_without_a_mask_token_is_no_masked_lm(tmp_path: Path) -> None:
    model = save_tiny("bert-masked", tmp_path / "plain")
    with pytest.raises(ModelError, match="no mask token"):
        lrcompress.run(str(model), recipe_of("masked-lm", tmp_path), tmp_path / "run")


def test_an_unknown_metric_names_all(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="word_errors"):
        lrcompress.run(str(tmp_path), {"evaluate": ["words"]}, tmp_path / "run")


def test_a_sound_that_is_longer_than_the_model_hears_is_refused(tmp_path: Path) -> None:
    folder = recordings(tmp_path / "long", 2)
    recording(folder / "1.wav", 1.5)
    text = refusal("whisper", tmp_path, {"data": {"path": str(folder)}}, "speech-seq2seq")
    assert "1.wav: 1.5 s" in text


def test_a_whisper_of_many_languages_must_be_told_which(tmp_path: Path) -> None:
    config = tiny_model("whisper").config
    config.vocab_size = 51865
    rows = read_rows(DataSource(path=str(recordings(tmp_path / "a", 2))), "audio")
    with pytest.raises(DataError, match="no language"):
        TASKS["speech-seq2seq"].examples(rows, None, config, Cut(32))


def test_the_language_of_a_split_is_not_left_in_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another split may have another one, and the tokenizer is saved with the result."""
    processor = transformers.AutoProcessor.from_pretrained(save_with_processor("whisper", tmp_path / "model"))
    config = tiny_model("whisper").config
    config.vocab_size = 51865
    rows = read_rows(DataSource(path=str(recordings(tmp_path / "a", 2))), "audio")
    asked: list[str] = []

    def prefixes(tokenizer: Any, *, language: str, task: str) -> None:
        asked.append(language)
        tokenizer.prefix = language

    monkeypatch.setattr(type(processor.tokenizer), "set_prefix_tokens", prefixes, raising=False)
    TASKS["speech-seq2seq"].examples(rows, processor, config, Cut(32, language="de"))
    assert asked == ["de"]
    assert not hasattr(processor.tokenizer, "prefix")


def test_what_is_missing_is_a_blank_row_and_left_out(tmp_path: Path) -> None:
    rows = [{"text": "a", "label": "b"}, {"text": None, "label": "c"}, {"text": "d", "label": None}]
    found = read_rows(DataSource(path=str(write_rows(tmp_path / "a.jsonl", rows)), label="label"))
    assert found.inputs == ["a", "d"]
    assert len(TASKS["seq2seq-lm"].examples(found, tiny_tokenizer(), tiny_model("t5").config, Cut(8))) == 1


@pytest.fixture
def hub_set(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Columns, and features of some, of what every data set of the Hub holds while a test runs."""
    import datasets

    held: dict[str, Any] = {}

    def load(path: str, name: str | None, split: str) -> Any:
        rows = datasets.Dataset.from_dict(held["columns"])
        for column, feature in held["features"].items():
            rows = rows.cast_column(column, feature)  # as it is stored: media need no encoder
        return rows

    monkeypatch.setattr("lrcompress.hub.answers", lambda *_: True)
    monkeypatch.setattr(datasets, "load_dataset", load)
    return held


def test_images_of_a_hub_set_come_with_the_names_of_its_classes(hub_set: dict[str, Any], tmp_path: Path) -> None:
    import datasets

    folder = pictures(tmp_path / "a", 1)
    stored = [{"bytes": (folder / f"LABEL_{i}/0.png").read_bytes(), "path": None} for i in (0, 1)]
    hub_set["columns"] = {"image": stored, "kind": [0, 1], "id": [7, 8]}
    names = datasets.ClassLabel(names=["LABEL_1", "LABEL_0"])  # numbered otherwise than the model's
    hub_set["features"] = {"image": datasets.Image(), "kind": names}
    rows = read_rows(DataSource(path="user/images", label="kind"), "image")
    assert rows.labels == ["LABEL_1", "LABEL_0"]
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    batch = TASKS["image-classification"].examples(rows, processor, tiny_model("vit").config, Cut(32)).batch([0, 1])
    assert batch["labels"].tolist() == [1, 0]
    assert batch["pixel_values"].shape == (2, 3, 16, 16)


def test_sounds_and_tags_of_a_hub_set(hub_set: dict[str, Any], tmp_path: Path) -> None:
    import datasets

    file = recordings(tmp_path / "a", 1) / "0.wav"
    hub_set["columns"] = {"audio": [{"bytes": file.read_bytes(), "path": None}] * 3, "sentence": ["one", None, "two"]}
    hub_set["features"] = {"audio": datasets.Audio()}
    rows = read_rows(DataSource(path="user/sounds", text="sentence"), "audio")
    assert rows.labels == ["one", "two"]
    assert [media.read() for media in rows.inputs] == [file.read_bytes()] * 2
    hub_set["columns"] = {"tokens": [WORDS], "tags": [[TAGS.index(mark) for mark in MARKS]]}
    hub_set["features"] = {"tags": datasets.List(datasets.ClassLabel(names=list(TAGS)))}
    rows = read_rows(DataSource(path="user/tags", text="tokens", label="tags"), "words")
    assert rows.inputs == [tuple(WORDS)]
    assert rows.labels == [MARKS]


def test_a_cut_off_image_is_named(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "a", 2)
    file = folder / "LABEL_1/1.png"
    file.write_bytes(file.read_bytes()[:600])
    rows = read_rows(DataSource(path=str(folder)), "image")
    processor = transformers.ViTImageProcessorPil(size={"height": 16, "width": 16})
    examples = TASKS["image-classification"].examples(rows, processor, tiny_model("vit").config, Cut(32))
    with pytest.raises(DataError, match=r"LABEL_1/1\.png"):
        examples.batch([3])


def test_an_image_of_16_bits_keeps_its_shades(tmp_path: Path) -> None:
    from PIL import Image

    from lrcompress.data.media import _image
    from lrcompress.data.rows import Media

    shades = numpy.array([[0, 20000], [40000, 65535]], dtype=numpy.uint16)
    Image.fromarray(shades).save(tmp_path / "a.png")
    assert numpy.array(_image(Media(str(tmp_path / "a.png"))))[..., 0].tolist() == [[0, 78], [156, 255]]


def test_a_marian_model_writes(tmp_path: Path) -> None:
    from lrcompress.source import task_name

    config = transformers.MarianConfig(vocab_size=264, d_model=32, architectures=["MarianMTModel"])
    assert task_name(config, "auto") == "seq2seq-lm"


def test_a_missing_sound_is_told_early(tmp_path: Path) -> None:
    folder = recordings(tmp_path / "a", 3)
    (folder / "1.wav").unlink()
    rows = read_rows(DataSource(path=str(folder)), "audio")
    processor = transformers.AutoProcessor.from_pretrained(save_with_processor("whisper", tmp_path / "model"))
    with pytest.raises(DataError, match=r"1\.wav"):
        TASKS["speech-seq2seq"].examples(rows, processor, tiny_model("whisper").config, Cut(32))
