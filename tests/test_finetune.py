"""What is done with a loaded model: training by transformers' Trainer and by PEFT, casts, compiling, generating."""

from pathlib import Path
from typing import Any

import pytest
import torch
from models import PAD, factorise, tiny_batch, tiny_model, tiny_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments, pipeline

import lrcompress
from lrcompress.errors import LayerError
from lrcompress.hf import write_model
from lrcompress.lowrank import AbstractLowRank, low_rank_module, put_module, ranks_of, to_int8
from lrcompress.pivoting import pivot

LAYOUTS = ("plain", "pivoted")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of a tiny Llama in both layouts, and of a GPT-2."""
    place = tmp_path_factory.mktemp("models")
    for name, family in (("plain", "llama"), ("pivoted", "llama"), ("gpt2", "gpt2")):
        model = tiny_model(family)
        ranks = factorise(model)
        if name == "pivoted":
            for layer in ranks:
                stored = pivot(model.get_submodule(layer).pair())
                put_module(model, layer, low_rank_module(stored, device="cpu", dtype=torch.float32))
        write_model(model, ranks, place / name, processor=tiny_tokenizer(), provenance={})
    return {path.name: path for path in place.iterdir()}


def load(folder: Path, **more: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, **more)


@torch.no_grad()
def logits(model: torch.nn.Module) -> Tensor:
    device = next(model.parameters()).device
    return model.eval()(**{key: value.to(device) for key, value in tiny_batch("llama").items()}).logits


def rows() -> list[dict[str, Tensor]]:
    ids = torch.randint(0, 256, (16, 12), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in ids]


def train(model: PreTrainedModel, folder: Path, resume: Path | None = None, **more: Any) -> Trainer:
    settings = TrainingArguments(
        output_dir=str(folder), use_cpu=True, report_to=[], disable_tqdm=True, seed=0, max_steps=4, save_steps=2,
        per_device_train_batch_size=4, learning_rate=1e-2, logging_strategy="no", **more,
    )  # fmt: skip
    trainer = Trainer(model=model, args=settings, train_dataset=rows())
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


# -- training of everything ----


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trainer_goes_on_from_its_checkpoint_as_if_it_had_not_stopped(layout: str, folders, tmp_path: Path):
    straight = load(folders[layout])
    before = {name: value.detach().clone() for name, value in straight.named_parameters()}
    train(straight, tmp_path / "straight")
    still = [name for name, value in straight.named_parameters() if torch.equal(value, before[name])]
    assert not still, "not trained"
    halfway = tmp_path / "straight" / "checkpoint-2"
    resumed = load(folders[layout])
    train(resumed, tmp_path / "resumed", resume=halfway)
    for (name, one), other in zip(straight.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    saved = load(tmp_path / "straight" / "checkpoint-4")  # a checkpoint of the Trainer is one of ours
    assert ranks_of(saved) == ranks_of(straight) == lrcompress.saved_ranks(tmp_path / "straight" / "checkpoint-4")
    assert torch.equal(logits(saved), logits(straight))
    assert not torch.equal(logits(load(halfway)), logits(straight))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_checkpointing_gives_the_same_gradients(layout: str, folders):
    model, ids = load(folders[layout]).train(), tiny_batch("llama")["input_ids"]
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
        assert model.is_gradient_checkpointing == checkpointed
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.allclose(one, other, atol=1e-7)


# -- casts, places, compiling ----


CASTS = {
    "half": (lambda model: model.half(), torch.float16, 0.02),
    "bfloat16": (lambda model: model.bfloat16(), torch.bfloat16, 0.15),
    "to": (lambda model: model.to("cpu", torch.float64), torch.float64, 1e-5),
}
"""How, to which dtype, largest error in units of the largest logit."""


@pytest.mark.parametrize("how", CASTS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loaded_model_is_cast_and_moved_like_any_other(layout: str, how: str, folders):
    wanted, (cast, dtype, tolerance) = logits(load(folders[layout])), CASTS[how]
    model = cast(load(folders[layout]))
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    found = logits(model)
    assert found.dtype == dtype
    assert (found.double() - wanted.double()).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_it_gives_the_same_in_one_graph(layout: str, folders):
    model = load(folders[layout])
    torch.compiler.reset()
    assert torch.allclose(logits(torch.compile(model, backend="aot_eager", fullgraph=True)), logits(model), atol=1e-5)


def test_an_automatic_device_map_gives_the_same(folders):
    for layout in LAYOUTS:
        model = load(folders[layout], device_map="auto")
        assert torch.equal(logits(model).cpu(), logits(load(folders[layout])))


# -- generating ----


@pytest.mark.parametrize("name", [*LAYOUTS, "gpt2"])
def test_tokens_are_the_same_with_any_cache_and_from_a_pipeline(name: str, folders):
    model, tokenizer = load(folders[name]), tiny_tokenizer()
    inputs = tokenizer("def f(", return_tensors="pt")
    how: dict[str, Any] = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "pad_token_id": PAD}
    with torch.no_grad():
        wanted = inputs["input_ids"]
        for _ in range(12):  # without generate: the likeliest token after the whole text so far
            scores = model(wanted).logits[:, -1]
            scores[:, model.config.eos_token_id] = -torch.inf
            wanted = torch.cat([wanted, scores.argmax(-1, keepdim=True)], dim=1)
    for cache in ({"use_cache": False}, {}, {"cache_implementation": "static", "disable_compile": True}):
        assert torch.equal(model.generate(**inputs, **how, **cache), wanted), cache
    writer = pipeline("text-generation", model=str(folders[name]), device="cpu")
    (text,) = writer("def f(", **how, return_tensors=True)
    assert text["generated_token_ids"] == wanted[0].tolist()


# -- adapters ----


ADAPTED = {
    "by the factors' names": ("plain", lambda model: ["q_proj.A", "q_proj.B"], 2 * 2),
    "every Linear": ("plain", lambda model: "all-linear", 2 * 14),
    "by the layers' names": ("plain", lambda model: lrcompress.lora_targets(model, ["q_proj", "down_proj"]), 2 * 4),
    "one layer by its whole name": (
        "pivoted", lambda model: lrcompress.lora_targets(model, "model.layers.1.mlp.up_proj"), 2,
    ),
    "pivoted layers": ("pivoted", lambda model: lrcompress.lora_targets(model, ["q_proj", "mlp.up_proj"]), 2 * 4),
    "GPT-2's": ("gpt2", lambda model: lrcompress.lora_targets(model, ["c_attn", "c_proj"]), 2 * 2 * 3),
}  # fmt: skip
"""Folder, what PEFT's target_modules are, how many Linears that is (two blocks)."""


@pytest.mark.parametrize("case", ADAPTED)
def test_adapters_are_trained_saved_loaded_and_merged_into_the_factors(case: str, folders, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="pip install peft")
    name, targets, count = ADAPTED[case]
    base = load(folders[name])
    ranks = ranks_of(base)
    config = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=targets(base), r=2, lora_alpha=8)
    model = peft.get_peft_model(base, config)
    assert sum(isinstance(module, peft.tuners.lora.Linear) for module in model.modules()) == count
    train(model, tmp_path / "training")
    adapted = logits(model)
    assert not torch.allclose(adapted, logits(load(folders[name])), atol=1e-3), "the adapters do nothing"
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(load(folders[name]), tmp_path / "adapter")
    assert torch.equal(logits(again), adapted)
    merged = again.merge_and_unload()
    assert torch.allclose(logits(merged), adapted, atol=1e-4 * float(adapted.abs().max()))
    assert ranks_of(merged) == ranks
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(load(tmp_path / "merged")), logits(merged))
    assert sum(p.numel() for p in merged.parameters()) == load(folders[name]).num_parameters()


def test_targets_are_linears_of_the_named_layers_and_of_no_other(folders):
    for name in (*LAYOUTS, "gpt2"):
        model = load(folders[name])
        for asked in ranks_of(model):
            found = lrcompress.lora_targets(model, asked)
            assert [target.rpartition(".")[0] for target in found] == [asked, asked]
            assert all(type(model.get_submodule(target)) is torch.nn.Linear for target in found)
        ends = {asked.rpartition(".")[2] for asked in ranks_of(model)}
        assert len(lrcompress.lora_targets(model, ends)) == 2 * len(ranks_of(model))
    assert lrcompress.lora_targets(load(folders["plain"]), ["lm_head"]) == ["lm_head"]
    assert lrcompress.lora_targets(tiny_model("gpt2"), "h.1.mlp.c_fc") == ["transformer.h.1.mlp.c_fc"]


def test_names_without_a_layer_and_factors_in_8_bits_are_refused(folders):
    model = load(folders["plain"])
    for wrong in ("q_prj", "A", "proj", "all-linear", "model.layers.0"):
        with pytest.raises(LayerError, match=r"(?s)got: .*allowed: .*_proj.*all-linear"):
            lrcompress.lora_targets(model, [wrong])
    for module in list(model.modules()):
        if isinstance(module, AbstractLowRank):
            to_int8(module)
    with pytest.raises(LayerError, match="8 bits"):
        lrcompress.lora_targets(model, "q_proj")
