"""Classifiers of two texts, and models with one output: numbers instead of classes."""

import json
from pathlib import Path
from typing import Any

import pytest
import scipy.stats
import torch
import transformers
import yaml
from models import HEADS, PAD, POSITIONS, VOCABULARY, WIDTH, labelled_lines, save_tiny, tiny_tokenizer
from tokenizers.processors import TemplateProcessing

import lrcompress
from lrcompress.data import DataSource, Rows, read_rows
from lrcompress.errors import DataError, InputError, ModelError
from lrcompress.evaluate import Accuracy, Divergence, Regression, run
from lrcompress.evaluate.base import Columns, Sums
from lrcompress.evaluate.run import Totals
from lrcompress.evaluate.scorer import Scorer
from lrcompress.recipe import shipped_recipes
from lrcompress.tasks import CausalLM, Cut, SequenceClassification

SMALL: dict[str, Any] = {
    "calibration": {"sequences": 16, "length": 64, "batch": 8},
    "ranks": {"kind": "budget", "keep_parameters": 0.5},
    "refit": {"check": 4},
    "recovery": {"steps": 3, "batch": 4, "length": 64, "learning_rate": 1e-3, "loss": {"kind": "distill"}},
    "evaluation": {"length": 64, "batch": 8},
    "timing": None,
}


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Pairs as BERT has them: a mark after each text, and types that say which text a token is of."""
    fast = tiny_tokenizer()
    backend = fast.backend_tokenizer
    backend.post_processor = TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 257), ("</s>", 258)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, model_max_length=POSITIONS, pad_token="<pad>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )  # fmt: skip


def bert(folder: Path, **config: Any) -> Path:
    """A BERT whose token types matter, with the tokenizer."""
    torch.manual_seed(0)
    settings = transformers.BertConfig(
        vocab_size=VOCABULARY, pad_token_id=PAD, hidden_size=WIDTH, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=HEADS, initializer_range=0.2, max_position_embeddings=POSITIONS, **config,
    )  # fmt: skip
    transformers.BertForSequenceClassification(settings).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def pairs(path: Path, count: int = 32) -> Path:
    """Texts that say the same or not, and how much."""
    first, second = labelled_lines(count), labelled_lines(count, seed=1)
    lines = [
        {"question": a, "sentence": b, "label": int(x == y), "score": round(5 * (x == y) + i / count, 3)}
        for i, ((a, x), (b, y)) in enumerate(zip(first, second, strict=True))
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def recipe(file: Path, *, label: str | None = "label", **more: Any) -> dict[str, Any]:
    source = {"path": str(file), "text": "question", "text_pair": "sentence", "label": label}
    shipped = yaml.safe_load(shipped_recipes()["text_pairs"].read_text())
    return shipped | {"data": {"train": source, "test": source}} | SMALL | more


def test_a_batch_of_pairs_is_what_the_tokenizer_makes(tmp_path: Path) -> None:
    source = DataSource(path=str(pairs(tmp_path / "pairs.jsonl")), text="question", text_pair="sentence", label="label")
    rows, made = read_rows(source), tokenizer()
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert(tmp_path / "bert")).eval()
    task = SequenceClassification()
    examples = task.examples(rows, made, model.config, Cut(length=40))
    batch = examples.batch([3, 0, 5])
    first, second = zip(*(rows.inputs[i] for i in (3, 0, 5)), strict=True)
    wanted = made(list(first), list(second), truncation=True, max_length=40, padding=True, return_tensors="pt")
    assert {key: batch[key].tolist() for key in wanted} == {key: value.tolist() for key, value in wanted.items()}
    assert batch["token_type_ids"].unique().tolist() == [0, 1]
    with torch.no_grad():
        ours, theirs = task.logits(model, batch), model(**wanted).logits
        blind = model(input_ids=wanted["input_ids"], attention_mask=wanted["attention_mask"]).logits
    torch.testing.assert_close(ours, theirs)
    assert (ours - blind).abs().max() > 1e-2


def test_sorting_by_length_keeps_what_belongs_together(tmp_path: Path) -> None:
    source = DataSource(path=str(pairs(tmp_path / "p.jsonl")), text="question", text_pair="sentence", label="score")
    rows, made = read_rows(source), tokenizer()
    task = SequenceClassification(has_classes=False)
    config = transformers.BertConfig()
    examples = task.examples(rows, made, config, Cut(length=64))
    plain, (ordered,) = examples.batch(range(32)), examples.batches(32)
    assert ordered["attention_mask"].sum(1).diff().min() >= 0

    def items(batch: dict[str, torch.Tensor]) -> set[tuple[Any, ...]]:
        keys = ("input_ids", "token_type_ids")
        return {(*(tuple(batch[key][i].tolist()) for key in keys), batch["labels"][i].item()) for i in range(32)}

    assert items(plain) == items(ordered)


def test_pairs_with_a_blank_side_are_left_out_and_equal_pairs_counted_once(tmp_path: Path) -> None:
    rows = [("a", "b", 1), ("a", " ", 0), ("", "b", 0), ("a", "c", 1), ("a", "b", 0)]
    file = tmp_path / "rows.csv"
    file.write_text("one,two,label\n" + "".join(f"{a},{b},{label}\n" for a, b, label in rows))
    found = read_rows(DataSource(path=str(file), text="one", text_pair="two", label="label"))
    assert found.inputs == [("a", "b"), ("a", "c"), ("a", "b")]
    assert found.labels == ["1", "1", "0"]
    assert found.without_duplicates().inputs == [("a", "b"), ("a", "c")]


def test_data_without_a_whole_pair_name_both_columns(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text("one,two\na,\nb,\n")
    with pytest.raises(DataError, match="no row with text in column `one` and `two`"):
        read_rows(DataSource(path=str(file), text="one", text_pair="two"))


def test_a_missing_column_of_pairs_is_answered_with_the_columns(tmp_path: Path) -> None:
    file = pairs(tmp_path / "pairs.jsonl")
    with pytest.raises(DataError, match=r"(?s)no column `sentense` \(data source key `text_pair`\).*sentence"):
        read_rows(DataSource(path=str(file), text="question", text_pair="sentense"))


def test_the_recipe_of_pairs_runs_to_a_model_that_loads(tmp_path: Path) -> None:
    file = pairs(tmp_path / "pairs.jsonl")
    report = lrcompress.run(str(bert(tmp_path / "bert")), recipe(file), tmp_path / "run")
    assert report is not None
    assert report.rows[-1].metrics.keys() == {"accuracy", "kl", "agreement"}
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model").eval()
    dense = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "bert").eval()
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    inputs = tokenizer()(
        [row["question"] for row in rows], [row["sentence"] for row in rows], padding=True, return_tensors="pt",
        truncation=True, max_length=64,
    )  # fmt: skip
    with torch.no_grad():
        p, q = (model(**inputs).logits.log_softmax(-1) for model in (dense, loaded))
    kl = (p.exp() * (p - q)).sum(-1).mean().item()
    assert report.rows[-1].metrics["kl"].value == pytest.approx(kl, rel=1e-3, abs=1e-6)


def test_a_model_with_one_output_keeps_its_numbers(tmp_path: Path) -> None:
    """The softmax of one logit is 1 whatever it is: by classes nothing would be seen, nor learned."""
    file, model = pairs(tmp_path / "pairs.jsonl"), bert(tmp_path / "bert", num_labels=1)
    report = lrcompress.run(
        str(model), recipe(file, label="score", evaluate=["regression", "divergence"]), tmp_path / "run"
    )
    assert report is not None
    dense_row, result = report.rows[0], report.rows[-1]
    assert result.metrics.keys() == {"squared_error", "label_spearman", "kl"}
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    inputs = tokenizer()(
        [row["question"] for row in rows], [row["sentence"] for row in rows], padding=True, return_tensors="pt",
        truncation=True, max_length=64,
    )  # fmt: skip
    dense, loaded = (
        transformers.AutoModelForSequenceClassification.from_pretrained(place).eval()
        for place in (model, tmp_path / "run/model")
    )
    with torch.no_grad():
        before, after = (one(**inputs).logits[:, 0] for one in (dense, loaded))
    assert result.metrics["kl"].value == pytest.approx((before - after).square().mean().item() / 2, rel=1e-3)
    scores = torch.tensor([row["score"] for row in rows])
    for row, found in ((dense_row, before), (result, after)):
        assert row.metrics["squared_error"].value == pytest.approx((found - scores).square().mean().item(), rel=1e-4)
    # worse than kron's is what knows nothing of the outputs, by the distance that the run tries to keep
    by_name = {row.name: row.metrics["kl"].value for row in report.rows if row.name != "dense"}
    assert by_name["kron"] < by_name["svd"]


def test_the_rank_correlation_is_that_of_scipy_over_all_batches() -> None:
    draw = torch.Generator().manual_seed(0)
    logits, targets = torch.randn(12, 1, generator=draw), torch.randint(0, 4, (12,), generator=draw).double()
    task, metric = SequenceClassification(has_classes=False), Regression()
    first, second = (
        metric.sums(task.scored(logits[part], {"labels": targets[part]}), None)["label_spearman"]
        for part in (slice(0, 6), slice(6, 12))
    )
    assert isinstance(first, Columns)
    assert isinstance(second, Columns)
    found = metric.measurement("label_spearman", first + second)
    assert found.value == pytest.approx(scipy.stats.spearmanr(logits[:, 0], targets)[0])
    assert found.count == 12
    assert found.higher_is_better
    assert not metric.higher_is_better("squared_error")
    alike = metric.sums(task.scored(torch.ones(12, 1), {"labels": targets}), None)["label_spearman"]
    assert metric.measurement("label_spearman", alike).value == 0.0  # equal numbers have no order


def test_the_error_of_a_rank_correlation_is_its_spread_over_samples() -> None:
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(500, 200, dtype=torch.float64, generator=draw)
    y = 0.8 * x + 0.6 * torch.randn(500, 200, dtype=torch.float64, generator=draw)
    found = [Regression().measurement("label_spearman", Columns.of(a, b)) for a, b in zip(x, y, strict=True)]
    spread = torch.tensor([one.value for one in found]).std().item()
    claimed = [one.stderr for one in found if one.stderr is not None]
    assert sum(claimed) / len(claimed) == pytest.approx(spread, rel=0.15)


def test_columns_survive_a_kill(tmp_path: Path) -> None:
    totals: Totals = {"dense": {"a": Columns((1.0, 2.0), (3.0, 4.0)), "b": Sums(1.0, 2.0, 3.0, 4.0, 5.0)}}
    run._save(tmp_path / "sums.json", 7, totals)
    assert run._load(tmp_path / "sums.json") == (7, totals)


def test_the_gradients_of_one_output_have_the_gaussians_second_moment() -> None:
    logits = torch.tensor([[3.0], [-2.0], [float("nan")]], requires_grad=True)
    task = SequenceClassification(has_classes=False)
    (gradient,) = torch.autograd.grad(task.fisher_loss(logits, {}, torch.Generator().manual_seed(0)), logits)
    assert gradient.abs().tolist() == [[1.0], [1.0], [0.0]]


def test_the_task_loss_of_one_output_is_that_of_transformers(tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert(tmp_path / "bert", num_labels=1))
    batch = dict(tokenizer()(["a", "b c"], ["d", "e"], padding=True, return_tensors="pt"))
    batch["labels"] = torch.tensor([0.5, -2.0])
    task = SequenceClassification().of(model.config, {})
    with torch.no_grad():
        wanted = model(**batch).loss
        assert task.loss(task.logits(model, batch), batch).item() == pytest.approx(wanted.item())


def test_scores_of_one_output_have_a_distance_and_no_accuracy(tmp_path: Path) -> None:
    model = transformers.AutoModelForSequenceClassification.from_pretrained(bert(tmp_path / "bert", num_labels=1))
    batch = dict(tokenizer()(["a", "b c"], ["d", "e"], padding=True, return_tensors="pt"), labels=torch.ones(2))
    score = Scorer(model, [batch], SequenceClassification(has_classes=False)).score({})
    assert score.kl == 0
    assert score.accuracy is None
    assert score.loss is not None


@pytest.mark.parametrize("form", ["torch-export", "onnx"])
def test_a_program_of_a_pair_classifier_reads_which_text_is_which(form: Any, tmp_path: Path) -> None:
    """With other types the model says something else: a program without them would be wrong for every pair."""
    settings = recipe(pairs(tmp_path / "p.jsonl"), recovery=None, refit=None, baselines=[])
    lrcompress.run(str(bert(tmp_path / "bert")), settings, tmp_path / "run")
    place = lrcompress.export(tmp_path / "run", form)
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "run/model").eval()
    inputs = dict(tokenizer()(["a warm film"], ["is it warm"], return_tensors="pt"))
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        wanted = model(**inputs).logits
        blind = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    if form == "onnx":
        onnxruntime = pytest.importorskip("onnxruntime")
        session = onnxruntime.InferenceSession(place / "model.onnx", providers=["CPUExecutionProvider"])
        found = torch.from_numpy(session.run(["logits"], {name: value.numpy() for name, value in inputs.items()})[0])
    else:
        found = torch.export.load(place / "model.pt2").module()(*inputs.values())
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (blind - wanted).abs().max() > 1e-2


def test_types_are_made_by_tokenizers_that_do_not_offer_them(tmp_path: Path) -> None:
    """ALBERT's leaves them away unless it is asked, and its checkpoints were trained with them."""
    made = tokenizer()
    made.model_input_names = ["input_ids", "attention_mask"]
    rows = Rows([("a", "b")], None, "rows")
    assert "token_type_ids" not in made(["a"], ["b"])
    batch = SequenceClassification().examples(rows, made, transformers.BertConfig(), Cut(length=20)).batch([0])
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 1, 1]]
    blind = transformers.BertConfig(type_vocab_size=1)  # as RoBERTa's: an id of 1 would have no embedding
    assert "token_type_ids" not in SequenceClassification().examples(rows, made, blind, Cut(length=20)).batch([0])


def test_a_pair_that_cannot_be_cut_to_the_length_is_refused() -> None:
    rows = Rows([("abc", "defg")], None, "rows")
    with pytest.raises(DataError, match="at most 2"):
        SequenceClassification().examples(rows, tokenizer(), transformers.BertConfig(), Cut(length=2))


@pytest.mark.parametrize(
    ("own", "wanted"),
    [
        ({"CONTRADICTION": 0, "NEUTRAL": 1, "ENTAILMENT": 2}, [2, 1, 0]),
        ({"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}, [0, 1, 2]),
        ({"contradiction": 0, "entailment": 1}, None),
    ],
    ids=["its names, another order", "no names", "classes that the model lacks"],
)
def test_classes_go_by_name_where_data_and_model_name_them_alike(own: dict[str, int], wanted: list[int] | None) -> None:
    """GLUE's MNLI counts from entailment, most models of it from contradiction."""
    rows = Rows([("a", "b")] * 3, [0, 1, 2], "mnli", names=("entailment", "neutral", "contradiction"))
    config = transformers.BertConfig(label2id=own, id2label={i: name for name, i in own.items()})

    def labels() -> list[int]:
        examples = SequenceClassification().examples(rows, tokenizer(), config, Cut(length=20))
        return examples.batch(range(3))["labels"].tolist()

    if wanted is None:
        with pytest.raises(DataError, match="a label is not one of the model's"):
            labels()
    else:
        assert labels() == wanted


def test_hidden_labels_of_numbers_are_refused() -> None:
    rows = Rows([("a", "b")] * 3, [-1.0] * 3, "stsb")
    with pytest.raises(DataError, match="every label is -1"):
        SequenceClassification(has_classes=False).examples(rows, tokenizer(), transformers.BertConfig(), Cut(length=20))


def refusal(model: Path, tmp_path: Path, settings: dict[str, Any]) -> str:
    with pytest.raises(InputError) as caught:
        lrcompress.run(str(model), settings, tmp_path / "run")
    assert not (tmp_path / "run/stages").exists()
    return str(caught.value)


def test_accuracy_of_one_output_is_refused(tmp_path: Path) -> None:
    text = refusal(bert(tmp_path / "bert", num_labels=1), tmp_path, recipe(pairs(tmp_path / "p.jsonl"), label="score"))
    assert "metric `accuracy` does not fit task sequence-classification, whose outputs are no classes" in text
    assert "divergence, regression" in text


def test_which_metrics_fit_which_outputs() -> None:
    classes, number = SequenceClassification(), SequenceClassification(has_classes=False)
    assert [kind.fits(classes) for kind in (Accuracy, Divergence, Regression)] == [True, True, False]
    assert [kind.fits(number) for kind in (Accuracy, Divergence, Regression)] == [False, True, True]
    assert not Regression.fits(CausalLM())


def test_ranks_by_accuracy_of_one_output_are_refused(tmp_path: Path) -> None:
    settings = recipe(pairs(tmp_path / "p.jsonl"), label="score", evaluate=["regression"])
    other = settings["data"]["test"] | {"path": str(pairs(tmp_path / "v.jsonl", 20))}
    settings["data"]["validation"] = other
    settings["ranks"] = {"kind": "target", "rise": 0.1, "metric": "accuracy"}
    text = refusal(bert(tmp_path / "bert", num_labels=1), tmp_path, settings)
    assert "ranks.metric `accuracy` does not fit" in text
    assert "loss, kl" in text


def test_splits_are_pairs_all_or_none(tmp_path: Path) -> None:
    settings = recipe(pairs(tmp_path / "p.jsonl"))
    settings["data"]["test"] = settings["data"]["test"] | {"text_pair": None}
    text = refusal(bert(tmp_path / "bert"), tmp_path, settings)
    assert "no data.test.text_pair" in text
    assert "as in data.train" in text


def test_one_output_of_a_multi_label_model_is_no_number(tmp_path: Path) -> None:
    model = bert(tmp_path / "bert", num_labels=1, problem_type="multi_label_classification")
    assert "1 output, problem_type multi_label_classification" in refusal(
        model, tmp_path, recipe(pairs(tmp_path / "p.jsonl"))
    )


def test_labels_of_one_output_must_be_numbers(tmp_path: Path) -> None:
    settings = recipe(pairs(tmp_path / "p.jsonl"), label="question", evaluate=["regression"])
    text = refusal(bert(tmp_path / "bert", num_labels=1), tmp_path, settings)
    assert "a label is no number, and the model has one output" in text
    assert "row 0" in text


@pytest.mark.parametrize("kind", ["multi_label_classification", "regression"])
def test_several_outputs_that_are_no_alternatives_are_refused(kind: str, tmp_path: Path) -> None:
    model = bert(tmp_path / "bert", num_labels=3, problem_type=kind)
    text = refusal(model, tmp_path, recipe(pairs(tmp_path / "p.jsonl")))
    assert f"problem_type {kind}" in text
    assert "lrcompress.compress" in text


def test_an_image_model_with_one_output_is_refused() -> None:
    with pytest.raises(ModelError, match="1 output"):
        lrcompress.tasks.ImageClassification().of(transformers.ViTConfig(id2label={0: "LABEL_0"}), {})


def test_pairs_for_a_task_that_reads_one_text_are_refused(tmp_path: Path) -> None:
    source = {"path": str(pairs(tmp_path / "p.jsonl")), "text": "question", "text_pair": "sentence"}
    text = refusal(save_tiny("gpt2", tmp_path / "gpt2"), tmp_path, {"data": {"train": source}} | SMALL)
    assert "data.train.text_pair does not fit task causal-lm" in text
    assert "sequence-classification" in text
