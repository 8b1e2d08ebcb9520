"""A compressed model loads as it was written: whole, in part, in another dtype, and not when damaged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from models import TINY, factorise, save_tiny, tiny_batch, tiny_model, tiny_tokenizer
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrcompress.errors import ModelError, OutputError, StageError
from lrcompress.hf import FORMAT_VERSION, attach_config, merge, saved_ranks, write_model
from lrcompress.layers import kind_of
from lrcompress.lowrank import LowRankLinear, ranks_of
from lrcompress.verify import check_in_fresh_process

FRESH = ("gpt2", "llama", "bert")
KINDS = ("gpt2", "gpt2-classifier", "llama-tied", "opt", "bert", "distilbert", "vit", "t5", "mixtral")
"""All families load and merge in `test_families.py`; these differ in what is asked here."""
PROVENANCE = {"method": "kron", "base": "tiny"}


def logits(model, name: str, **more) -> Tensor:
    with torch.no_grad():
        return model(**tiny_batch(name), **more).logits


def compressed(name: str):
    model = tiny_model(name)
    return model, factorise(model)


def written(name: str, folder: Path, **more):
    model, ranks = compressed(name)
    write_model(model, ranks, folder, provenance=PROVENANCE, **more)
    return model


def load(name: str, folder: Path, auto_class: str | None = None, **more):
    return getattr(transformers, auto_class or TINY[name].auto_class).from_pretrained(folder, **more)


def section(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def edit_section(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


# -- loads as it was ----


@pytest.mark.parametrize("name", KINDS)
def test_loads_with_equal_logits(name, tmp_path):
    model = written(name, tmp_path / "model")
    assert not torch.equal(logits(model, name), logits(tiny_model(name), name)), "the factors do not matter"
    loaded = load(name, tmp_path / "model")
    assert ranks_of(loaded) == ranks_of(model) == saved_ranks(tmp_path / "model")
    assert torch.equal(logits(loaded, name), logits(model, name))


@pytest.mark.parametrize("name", KINDS)
def test_second_save_is_the_same(name, tmp_path):
    written(name, tmp_path / "one")
    load(name, tmp_path / "one").save_pretrained(tmp_path / "two")
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one["model.safetensors"] == two["model.safetensors"]
    assert section(tmp_path / "one") == section(tmp_path / "two")
    assert torch.equal(logits(load(name, tmp_path / "two"), name), logits(load(name, tmp_path / "one"), name))


@pytest.mark.parametrize("name", FRESH)
def test_loads_in_a_fresh_process(name, tmp_path):
    model = written(name, tmp_path / "model")
    check = {"auto_class": TINY[name].auto_class, "tolerance": 0.0}
    assert check_in_fresh_process(tmp_path / "model", model, tiny_batch(name), **check) == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", KINDS)
def test_loads_in_another_dtype(name, dtype, tmp_path):
    model = written(name, tmp_path / "model")
    loaded = load(name, tmp_path / "model", dtype=dtype)
    stored = dict(model.named_parameters())
    for key, parameter in loaded.named_parameters():
        keeps = name == "t5" and dtype == torch.float16 and ".wo." in key  # transformers keeps these in float32
        assert parameter.dtype == (torch.float32 if keeps else dtype), key
        assert torch.equal(parameter, stored[key].to(parameter.dtype)), key
    batch = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tiny_batch(name).items()}
    with torch.no_grad():
        difference = (loaded(**batch).logits.float() - logits(model, name)).abs().max()
    assert difference < 0.15 * logits(model, name).abs().max()


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "t5"])
def test_half_precision_checkpoint_keeps_its_dtype(name, tmp_path):
    model, ranks = compressed(name)
    model.to(torch.bfloat16)
    write_model(model, ranks, tmp_path / "model", provenance=PROVENANCE)
    loaded = load(name, tmp_path / "model", dtype="auto")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}
    wide = load(name, tmp_path / "model", dtype=torch.float32)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float32}
    assert torch.isfinite(logits(wide, name)).all()


@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_sharded(name, tmp_path):
    model = written(name, tmp_path / "model", max_shard_size="30KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load(name, tmp_path / "model"), name), logits(model, name))


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_device_map(name, tmp_path):
    model = written(name, tmp_path / "model")
    assert torch.equal(logits(load(name, tmp_path / "model", device_map="cpu"), name), logits(model, name))


def test_disk_offload(tmp_path):
    model = written("llama", tmp_path / "model")
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    loaded = load("llama", tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


# -- in parts ----


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert", "distilbert", "vit", "t5"])
def test_base_model(name, tmp_path):
    model = written(name, tmp_path / "model")
    loaded = load(name, tmp_path / "model", "AutoModel")
    base = model if name == "t5" else model.base_model
    with torch.no_grad():
        expected = base(**tiny_batch(name), output_hidden_states=True)
        got = loaded(**tiny_batch(name), output_hidden_states=True)
    key = "decoder_hidden_states" if name == "t5" else "hidden_states"
    assert torch.equal(got[key][-1], expected[key][-1])


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_base_model_gets_heads(name, tmp_path):
    base = tiny_model(name).base_model
    ranks = factorise(base)
    write_model(base, ranks, tmp_path / "base", provenance=PROVENANCE)
    for auto_class in ("AutoModelForCausalLM", "AutoModelForSequenceClassification"):
        loaded = load(name, tmp_path / "base", auto_class)
        assert set(ranks_of(loaded)) == {f"{loaded.base_model_prefix}.{key}" for key in ranks}
        with torch.no_grad():
            expected, got = base(**tiny_batch(name)), loaded.base_model(**tiny_batch(name))
        assert torch.equal(got.last_hidden_state, expected.last_hidden_state)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_other_head(name, tmp_path):
    written(name, tmp_path / "model")
    loaded = load(name, tmp_path / "model", "AutoModelForSequenceClassification")
    assert len(ranks_of(loaded)) == len(saved_ranks(tmp_path / "model") or {})


def test_encoder_alone(tmp_path):
    model = written("t5", tmp_path / "model")
    encoder = transformers.T5EncoderModel.from_pretrained(tmp_path / "model")
    batch = {key: value for key, value in tiny_batch("t5").items() if not key.startswith("decoder")}
    with torch.no_grad():
        assert torch.equal(encoder(**batch).last_hidden_state, model.encoder(**batch).last_hidden_state)


@pytest.mark.parametrize("name", ["gpt2", "llama-tied", "t5"])
def test_tied_head_stays_tied(name, tmp_path):
    written(name, tmp_path / "model")
    loaded = load(name, tmp_path / "model")
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    assert not isinstance(loaded.get_output_embeddings(), LowRankLinear)


# -- an ordinary model afterwards ----


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_casts_and_saves_given_states(name, tmp_path):
    written(name, tmp_path / "model")
    loaded = load(name, tmp_path / "model")
    assert not hasattr(loaded.config, "_is_quantized")
    assert loaded.half().dtype == torch.float16
    assert loaded.float().dtype == torch.float32
    doubled = {key: value * 2 for key, value in loaded.state_dict().items()}
    loaded.save_pretrained(tmp_path / "doubled", state_dict=dict(doubled))  # transformers 5.24 empties it
    again = load(name, tmp_path / "doubled")
    layer = next(iter(ranks_of(again)))
    assert torch.equal(again.get_submodule(layer).A.weight, doubled[f"{layer}.A.weight"])


@pytest.mark.parametrize("name", ["gpt2", "llama", "bert", "t5"])
def test_a_training_step_changes_every_factor(name, tmp_path):
    written(name, tmp_path / "model")
    loaded = load(name, tmp_path / "model").train()
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    batch = tiny_batch(name)
    labels = torch.tensor([0, 1]) if name == "bert" else batch["input_ids"]
    batch.pop("decoder_input_ids", None)
    loaded(**batch, labels=labels).loss.backward()
    torch.optim.SGD(loaded.parameters(), lr=0.5).step()
    for layer in ranks_of(loaded):
        for part in ("A.weight", "B.weight"):
            assert not torch.equal(loaded.state_dict()[f"{layer}.{part}"], before[f"{layer}.{part}"]), layer


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "t5"])
def test_generation_with_cache_equals_without(name, tmp_path):
    written(name, tmp_path / "model")
    loaded = load(name, tmp_path / "model")
    batch = {key: value[:1] for key, value in tiny_batch(name).items() if not key.startswith("decoder")}
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached, plain = (loaded.generate(**batch, **settings, use_cache=use) for use in (True, False))
    assert torch.equal(cached, plain)


def test_loads_with_the_config_of_a_loaded_model(tmp_path):
    model = written("gpt2", tmp_path / "model")
    config = load("gpt2", tmp_path / "model").config
    assert torch.equal(logits(load("gpt2", tmp_path / "model", config=config), "gpt2"), logits(model, "gpt2"))


def test_plain_save_pretrained_after_attaching(tmp_path):
    model, ranks = compressed("llama")
    attach_config(model, ranks, PROVENANCE)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load("llama", tmp_path), "llama"), logits(model, "llama"))


# -- damaged ----


def test_unknown_format_version_is_refused(tmp_path):
    written("gpt2", tmp_path / "model")
    edit_section(tmp_path / "model", format_version=FORMAT_VERSION + 1)
    with pytest.raises(ModelError, match=r"format_version(.|\n)*got: 4(.|\n)*allowed: 1 to 3(.|\n)*upgrade lrcompress"):
        load("gpt2", tmp_path / "model")
    with pytest.raises(ModelError, match="upgrade lrcompress"):
        saved_ranks(tmp_path / "model")


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "t5"])
@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("ignore", [False, True])
def test_wrong_rank(name, which, ignore, tmp_path):
    written(name, tmp_path / "model")
    ranks = section(tmp_path / "model")["ranks"]
    layer = list(ranks)[which]
    edit_section(tmp_path / "model", ranks=ranks | {layer: ranks[layer] + 1})
    with pytest.raises(ModelError, match=r"(rank|factors)(.|\n)*do: "):
        load(name, tmp_path / "model", ignore_mismatched_sizes=ignore)


def test_a_rank_that_is_none(tmp_path):
    written("gpt2", tmp_path / "model")
    ranks = section(tmp_path / "model")["ranks"]
    edit_section(tmp_path / "model", ranks=ranks | {next(iter(ranks)): 0})
    with pytest.raises(ModelError, match="something else than ranks"):
        load("gpt2", tmp_path / "model")


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "t5"])
@pytest.mark.parametrize("part", ["A.weight", "B.weight", "B.bias"])
def test_missing_factor(name, part, tmp_path):
    written(name, tmp_path / "model")
    keys = [key for key in load_file(tmp_path / "model" / "model.safetensors") if key.endswith(part)]
    if not keys:
        pytest.skip("no such tensor in this model")
    edit_tensors(tmp_path / "model", lambda tensors: tensors.pop(keys[0]))
    with pytest.raises(ModelError, match=r"(lack factors|would be random)(.|\n)*do: "):
        load(name, tmp_path / "model")


@pytest.mark.parametrize("name", ["gpt2", "llama", "vit", "t5"])
def test_a_layer_missing_from_the_ranks(name, tmp_path):
    written(name, tmp_path / "model")
    ranks = section(tmp_path / "model")["ranks"]
    ranks.pop(next(iter(ranks)))
    edit_section(tmp_path / "model", ranks=ranks)
    with pytest.raises(ModelError, match=r"(does not list|would be random)"):
        load(name, tmp_path / "model")


@pytest.mark.parametrize("auto_class", ["AutoModelForCausalLM", "AutoModel", "AutoModelForSequenceClassification"])
def test_a_layer_under_another_name(auto_class, tmp_path):
    written("gpt2", tmp_path / "model")
    ranks = section(tmp_path / "model")["ranks"]
    first = next(iter(ranks))
    edit_section(tmp_path / "model", ranks={key.replace(first, first + "x"): rank for key, rank in ranks.items()})
    with pytest.raises(ModelError, match=r"lack factors|does not have|does not list|would be random"):
        load("gpt2", tmp_path / "model", auto_class)


@pytest.mark.parametrize(("auto_class", "message"), [(None, "does not have"), ("AutoModel", "would be random")])
def test_a_layer_that_another_transformers_named_otherwise(auto_class, message, tmp_path):
    # ViT's names on disk are not the model's: the files alone cannot tell
    written("vit", tmp_path / "model")
    ranks = section(tmp_path / "model")["ranks"]
    edit_section(tmp_path / "model", ranks={key.replace("q_proj", "query"): rank for key, rank in ranks.items()})
    with pytest.raises(ModelError, match=message):
        load("vit", tmp_path / "model", auto_class)


def test_a_layer_that_is_not_dense(tmp_path):
    written("gpt2", tmp_path / "model")
    ranks = section(tmp_path / "model")["ranks"]
    first, *_ = ranks
    ranks = {("transformer.h.0.ln_1" if key == first else key): rank for key, rank in ranks.items()}
    edit_section(tmp_path / "model", ranks=ranks)

    def rename(tensors):
        for key in [key for key in tensors if key.startswith(first + ".")]:
            tensors[key.replace(first, "transformer.h.0.ln_1")] = tensors.pop(key)

    edit_tensors(tmp_path / "model", rename)
    with pytest.raises(ModelError, match=r"no dense layer(.|\n)*LayerNorm"):
        load("gpt2", tmp_path / "model")


def test_factors_that_do_not_fit_together(tmp_path):
    written("llama", tmp_path / "model")
    key = "model.layers.0.mlp.up_proj.A.weight"
    edit_tensors(tmp_path / "model", lambda tensors: tensors.update({key: tensors[key][:-1].clone()}))
    with pytest.raises(ModelError, match="do not fit together"):
        load("llama", tmp_path / "model")


def test_extra_tensor_is_reported_and_harmless(tmp_path):
    model = written("llama", tmp_path / "model")
    edit_tensors(tmp_path / "model", lambda tensors: tensors.update({"model.more.A.weight": torch.ones(2, 3)}))
    loaded, info = load("llama", tmp_path / "model", output_loading_info=True)
    assert "model.more.A.weight" in info["unexpected_keys"]
    assert torch.equal(logits(loaded, "llama"), logits(model, "llama"))


def test_ranks_must_be_the_models():
    model, ranks = compressed("gpt2")
    ranks.pop(next(iter(ranks)))
    with pytest.raises(StageError, match="rank plan"):
        attach_config(model, ranks, PROVENANCE)


# -- the folder ----


def test_folder_has_everything_and_no_local_path(tmp_path):
    source = save_tiny("llama", tmp_path / "source")
    model = load("llama", source)
    ranks = factorise(model)
    for folder in ("one", "two"):
        write_model(
            model,
            ranks,
            tmp_path / folder,
            processor=tiny_tokenizer(),
            provenance=PROVENANCE,
            card="# Card\n",
        )
    one, two = files(tmp_path / "one"), files(tmp_path / "two")
    assert one == two
    assert one["README.md"] == b"# Card\n"
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= one.keys()
    assert not any(str(tmp_path).encode() in content for content in one.values())
    assert section(tmp_path / "one")["provenance"] == PROVENANCE
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "one")
    assert tokenizer.decode(tokenizer("plain words")["input_ids"]) == "plain words"


@pytest.mark.parametrize("occupied", ["file", "folder"])
def test_nothing_is_written_over(occupied, tmp_path):
    place = tmp_path / "model"
    if occupied == "folder":
        place.mkdir()
    kept = place / "mine.txt" if occupied == "folder" else place
    kept.write_text("mine")
    model, ranks = compressed("gpt2")
    with pytest.raises(OutputError, match="not empty"):
        write_model(model, ranks, place, provenance=PROVENANCE)
    assert kept.read_text() == "mine"


def test_an_empty_folder_and_the_leftovers_of_a_killed_run_are_fine(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model.partial").mkdir()
    (tmp_path / "model.partial" / "model-00009.safetensors").write_text("half")
    written("gpt2", tmp_path / "model")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert "model-00009.safetensors" not in files(tmp_path / "model")


def test_saved_ranks_of_others_are_none(tmp_path):
    assert saved_ranks(save_tiny("gpt2", tmp_path / "dense")) is None
    assert saved_ranks(tmp_path / "absent") is None
    assert saved_ranks(tiny_model("gpt2").config) is None
    assert saved_ranks({"quantization_config": {"quant_method": "gptq"}}) is None
    model = written("gpt2", tmp_path / "model")
    assert saved_ranks(model.config) == ranks_of(model)
    assert saved_ranks(transformers.AutoConfig.from_pretrained(tmp_path / "model")) == ranks_of(model)


# -- the check in a fresh process ----


def test_fresh_process_notices_other_weights(tmp_path):
    model = written("bert", tmp_path / "model")
    check = {"auto_class": TINY["bert"].auto_class, "tolerance": 1e-6}
    layer = model.get_submodule(next(iter(ranks_of(model))))
    with torch.no_grad():
        layer.B.bias.add_(0.5)
    model.train()
    with pytest.raises(StageError, match="other logits"):
        check_in_fresh_process(tmp_path / "model", model, tiny_batch("bert"), **check)
    assert model.training


def test_fresh_process_passes_on_why_it_failed(tmp_path):
    model = written("bert", tmp_path / "model")
    edit_section(tmp_path / "model", format_version=9)
    check = {"auto_class": TINY["bert"].auto_class, "tolerance": 1e-6}
    with pytest.raises(StageError, match="upgrade lrcompress"):
        check_in_fresh_process(tmp_path / "model", model, tiny_batch("bert"), **check)


# -- merging ----


@pytest.mark.parametrize("name", KINDS)
def test_merged_model_is_an_ordinary_one(name, tmp_path):
    model = written(name, tmp_path / "factored")
    expected, ranks = logits(model, name), ranks_of(model)
    merge(model)
    original = tiny_model(name)
    assert ranks_of(model) == {}
    assert saved_ranks(model.config) is None
    assert {key: kind_of(model.get_submodule(key)) for key in ranks} == {
        key: kind_of(original.get_submodule(key)) for key in ranks
    }
    assert torch.allclose(logits(model, name), expected, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in (tmp_path / "dense" / "config.json").read_text()
    assert torch.equal(logits(load(name, tmp_path / "dense"), name), logits(model, name))


_STOCK = """
import sys, torch, transformers
folder, auto_class = sys.argv[1:]
saved = torch.load(folder + "/check.pt")
model, info = getattr(transformers, auto_class).from_pretrained(folder, output_loading_info=True)
assert not any(info.values()), info
with torch.no_grad():
    assert torch.allclose(model(**saved["batch"]).logits, saved["logits"], atol=1e-5, rtol=1e-5)
assert "lrcompress" not in sys.modules
"""


@pytest.mark.parametrize("name", ["gpt2"])
def test_merged_model_loads_without_this_package(name, tmp_path):
    model, _ = compressed(name)
    expected = logits(model, name)
    merge(model)
    model.save_pretrained(tmp_path)
    torch.save({"batch": tiny_batch(name), "logits": expected}, tmp_path / "check.pt")
    command = [sys.executable, "-c", _STOCK, str(tmp_path), TINY[name].auto_class]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
