"""Each shipped recipe runs from end to end on a tiny model with tiny data."""

from pathlib import Path

import pytest
import torch
import transformers
from models import TINY, save_tiny, write_tsv, write_txt

import lrcompress
from lrcompress import stages
from lrcompress.recipe import load, shipped_recipes
from lrcompress.report import Report

TEXT_TASKS = ("auto", "causal-lm", "sequence-classification")
ELSEWHERE = ("text_pairs",)
SHIPPED = {
    name: file for name, file in shipped_recipes().items() if load(file).task in TEXT_TASKS and name not in ELSEWHERE
}
"""Those of other tasks run in `test_tasks.py` and `test_pairs.py`, which have their data."""
MODELS = {"encoder_sst2": "bert", "gpt2_sst2": "gpt2-classifier", "llama_qv": "llama"}
"""Recipe → tiny model; gpt2 for the others."""
CLASSIFIERS = ("encoder_sst2", "gpt2_sst2")
SMALL = [
    "calibration={sequences: 8, length: 24, batch: 4}",
    "recovery.steps=4",
    "recovery.rounds_above=0",
    "recovery.batch=4",
    "recovery.length=24",
    "evaluation={length: 32}",
    "timing={batches: [1], prompt: 8, generate: 2, repeats: 3, warmup: 0}",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models and data."""
    place = tmp_path_factory.mktemp("recipes")
    for name in ("gpt2", "gpt2-classifier", "llama", "bert"):
        save_tiny(name, place / name)
    for seed, split in enumerate(("train", "validation", "test")):
        write_txt(place / f"{split}.txt", 40, seed=seed)
        write_tsv(place / f"{split}.tsv", 40, seed=seed, header=True)
    return place


def settings(folder: Path, name: str) -> list[str]:
    """Local data in place of the recipe's own, its columns and separators as they are."""
    more = [*SMALL, "ranks.round_to=1"]  # layers of width 32 have no room for steps of 8
    for split in ("train", "validation", "test"):
        if name in CLASSIFIERS:
            more.append(f"data.{split}={{path: {folder}/{split}.tsv, label: label}}")
        else:
            more += [f"data.{split}.{key}=null" for key in ("name", "split")]
            more.append(f"data.{split}.path={folder}/{split}.txt")
    return more


VARIANTS = ("attn_only", "mlp_only", "all_linear", "smallest", "gpt2_sst2")
"""They differ from others in targets, size or data only, and run among the slow tests."""


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.slow] * (name in VARIANTS)) for name in SHIPPED])
def run(request: pytest.FixtureRequest, folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path, Report]:
    """A recipe's name, its run folder and its report; without the check in a fresh process, which takes seconds."""
    monkeypatch.setattr(stages, "check_in_fresh_process", lambda *_, **__: 0.0)
    name = request.param
    model = folder / MODELS.get(name, "gpt2")
    report = lrcompress.run(str(model), name, output=folder / f"run-{name}", settings=settings(folder, name))
    assert report is not None
    return name, folder / f"run-{name}", report


def test_a_shipped_recipe_runs(run: tuple[str, Path, Report]):
    name, output, report = run
    recipe = load(SHIPPED[name])
    baselines = [(method.kind, "uniform") for method in recipe.baselines] + [("svd_llm", "plan")]
    assert [(row.name, row.ranks) for row in report.rows if not str(row.ranks).startswith("keep-")] == [
        ("dense", None),
        *baselines,
        (recipe.method.kind, "plan"),
        *([("refit", "plan")] if recipe.refit is not None else []),
        ("lora_lrd", "plan"),
    ]
    metrics = {"accuracy"} if name in CLASSIFIERS else {"token_perplexity"}
    for row in report.rows:
        assert set(row.metrics) == metrics | {"kl", "agreement"}
        timed = not str(row.ranks).startswith("keep-")
        assert len(row.latency) == (1 if name in CLASSIFIERS else 2) * timed
    keep, dense = recipe.ranks.kept_share, report.rows[0].target_parameters
    for row in report.rows[1:]:
        share = float(row.ranks.removeprefix("keep-")) if row.ranks.startswith("keep-") else keep
        if share is not None:
            assert 0.9 * share * dense < row.target_parameters <= share * dense
    assert (keep is None) == (name == "smallest")
    groups = {layer.group for layer in report.layers}
    assert groups == {
        "attn_only": {"attention"},
        "seed_tau01": {"attention"},
        "llama_qv": {"attention"},
        "mlp_only": {"mlp"},
    }.get(name, {"attention", "mlp"})
    assert (report.rows[-1].before_replacement is not None) == (name == "seed_tau01")

    auto_class = getattr(transformers, TINY[MODELS.get(name, "gpt2")].auto_class)
    loaded = auto_class.from_pretrained(output / "model")
    assert sum(parameter.numel() for parameter in loaded.parameters()) == report.rows[-1].parameters
    with torch.no_grad():
        logits = loaded(torch.tensor([[1, 2, 3]])).logits
    assert logits.isfinite().all()
