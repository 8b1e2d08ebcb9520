"""vLLM's own config, loader and model classes, on a compressed checkpoint, compute what transformers does.

On the CPU and without vLLM's compiled kernels (see `vllm_world`): its attention, its CUDA graphs and its generation are
not covered.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM, which pins a torch of its own, is not installed")

import torch
import transformers
import vllm_world
from models import BOS, EOS, PAD, VOCABULARY, factorise, tiny_model
from safetensors.torch import load_file, save_file
from torch import Tensor

from lrcompress.artifacts import Factors
from lrcompress.errors import ModelError
from lrcompress.hf import FORMAT_VERSION, write_model
from lrcompress.lowrank import AbstractLowRank, low_rank_module, put_module, to_int8
from lrcompress.pivoting import pivot

pytestmark = pytest.mark.slow

DENSE = ("layers.0.self_attn.k_proj", "layers.1.mlp.up_proj", "layers.1.self_attn.o_proj", "h.0.mlp.c_fc")
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = {"vocab_size": VOCABULARY, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS}
CLOSE = {"atol": 2e-5, "rtol": 1e-5}


def dense_model(name: str) -> transformers.PreTrainedModel:
    more = {"max_position_embeddings": 128, "initializer_range": 0.2, "tie_word_embeddings": False}
    torch.manual_seed(0)
    if name == "phi3":  # q, k and v, and gate and up, are one layer each on disk
        config = transformers.Phi3Config(**SIZES, **IDS, **more, num_key_value_heads=2)
        return transformers.Phi3ForCausalLM(config).eval()
    if name == "llama-one-key-head":
        config = transformers.LlamaConfig(**SIZES, **IDS, **more, num_key_value_heads=1)
        return transformers.LlamaForCausalLM(config).eval()
    return tiny_model(name)


def compressed(name: str, kind: str) -> tuple[transformers.PreTrainedModel, dict[str, int]]:
    """A model with factors of different ranks; `mixed` has dense and pivoted layers among them, and square factors."""
    model = dense_model(name)
    ranks, dense = factorise(model), dense_model(name)
    for index, layer in enumerate(list(ranks) if kind != "plain" else []):
        if kind == "mixed" and layer.endswith(DENSE):
            put_module(model, layer, dense.get_submodule(layer))
            ranks.pop(layer)
        elif kind == "mixed" and layer.endswith("h.1.attn.c_proj"):
            pair = model.get_submodule(layer).pair()
            square = Factors(torch.randn(16, 32) / 6, torch.randn(32, 16) / 4, pair.bias)
            place(model, layer, square, pivoted=True)
            ranks[layer] = 16  # then `rest` is [16, 16]
        elif kind == "pivoted" or (kind == "mixed" and index % 2):
            place(model, layer, model.get_submodule(layer).pair(), pivoted=True)
        if kind == "int8" or (kind == "pivoted int8"):
            place(model, layer, model.get_submodule(layer).pair(), pivoted=kind == "pivoted int8")
            to_int8(model.get_submodule(layer))
    return model, ranks


def place(model: torch.nn.Module, layer: str, pair: Factors, *, pivoted: bool) -> None:
    pair = Factors(*(None if x is None else x.detach() for x in vars(pair).values()))
    module = low_rank_module(pivot(pair) if pivoted else pair, device="cpu", dtype=torch.float32)
    put_module(model, layer, module)


def written(name: str, kind: str, folder: Path) -> tuple[transformers.PreTrainedModel, Tensor, Tensor]:
    """The model whose checkpoint is in `folder`, a sequence, and transformers' logits of it."""
    model, ranks = compressed(name, kind)
    write_model(model, ranks, folder, provenance={})
    ids = torch.randint(0, 256, (12,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model, ids, model(input_ids=ids[None]).logits[0]


def edit_section(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= changes
    (folder / "config.json").write_text(json.dumps(config))


def section(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def run(command: list[str], **environment: str) -> subprocess.Popen[str]:
    folders = [str(Path(__file__).parents[1]), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(folders)
    return subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)


def run_group(size: int, model_impl: str, meeting: Path, *folders: Path) -> None:
    command = [sys.executable, vllm_world.__file__, model_impl, str(meeting)]
    processes = [run([*command, str(rank), str(size), *map(str, folders)]) for rank in range(size)]
    answers = [process.communicate(timeout=600)[1][-2000:] for process in processes]
    assert [process.returncode for process in processes] == [0] * size, answers


@pytest.fixture(scope="module", autouse=True)
def _world(tmp_path_factory):
    from vllm.distributed import destroy_distributed_environment, destroy_model_parallel

    with vllm_world.without_kernels():
        folder = tmp_path_factory.mktemp("group")
        written("llama", "plain", folder / "model")
        vllm_world.join_group(vllm_world.config_of(folder / "model"), folder / "meeting")
        yield
    destroy_model_parallel()
    destroy_distributed_environment()


def served(folder: Path, **settings):
    config = vllm_world.config_of(folder, **settings)
    return config, vllm_world.served(config)


# -- equal to transformers ----


@pytest.mark.parametrize("kind", ["mixed", "int8", "pivoted int8"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "phi3"])
def test_logits_are_those_of_transformers(name, kind, tmp_path):
    _, ids, expected = written(name, kind, tmp_path / "model")
    with torch.no_grad():
        assert (dense_model(name)(input_ids=ids[None]).logits[0] - expected).abs().max() > 0.1, "factors do not matter"
    found = vllm_world.logits(*served(tmp_path / "model"), ids)
    torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["plain", "mixed"])
def test_outputs_of_fused_layers(kind, tmp_path):
    model, _, _ = written("qwen2", kind, tmp_path / "model")
    _, found = served(tmp_path / "model")
    x = torch.randn(5, 32)
    for block, fused in zip(model.model.layers, found.model.layers, strict=True):
        parts = {
            fused.self_attn.qkv_proj: (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj),
            fused.self_attn.o_proj: (block.self_attn.o_proj,),
            fused.mlp.gate_up_proj: (block.mlp.gate_proj, block.mlp.up_proj),
        }
        for layer, members in parts.items():
            torch.testing.assert_close(layer(x)[0], torch.cat([member(x) for member in members], -1), **CLOSE)


def test_factors_take_the_place_of_dense_weights(tmp_path):
    model, _, _ = written("llama", "plain", tmp_path / "model")
    _, found = served(tmp_path / "model", dtype="bfloat16")
    held = [parameter for name, parameter in found.named_parameters() if "proj" in name]
    saved = [module for module in model.modules() if isinstance(module, AbstractLowRank)]
    assert sum(map(torch.numel, held)) == sum(x.numel() for module in saved for x in module.parameters())
    assert {parameter.dtype for parameter in held} == {torch.bfloat16}


def test_a_checkpoint_that_was_saved_without_its_head(tmp_path):
    _, ids, expected = written("gpt2", "mixed", tmp_path / "model")
    short = {key.removeprefix("transformer."): rank for key, rank in section(tmp_path / "model")["ranks"].items()}
    pivoted = [key.removeprefix("transformer.") for key in section(tmp_path / "model")["pivoted"]]
    edit_section(tmp_path / "model", ranks=short, pivoted=pivoted)

    def rename(tensors):
        for key in list(tensors):
            tensors[key.removeprefix("transformer.")] = tensors.pop(key)

    edit_tensors(tmp_path / "model", rename)
    torch.testing.assert_close(vllm_world.logits(*served(tmp_path / "model"), ids), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["mixed", "pivoted int8"])
def test_a_layer_is_one_graph(kind, tmp_path):
    written("qwen2", kind, tmp_path / "model")
    _, found = served(tmp_path / "model")
    for layer in (found.model.layers[0].self_attn.qkv_proj, found.model.layers[0].mlp.down_proj):
        x = torch.randn(3, layer.input_size)
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(x)[0], layer(x)[0], **CLOSE)


def test_other_ranks_are_another_graph(tmp_path):
    # vLLM keeps compiled graphs by this hash
    written("llama", "plain", tmp_path / "model")
    hashes = [vllm_world.config_of(tmp_path / "model").compute_hash() for _ in range(2)]
    layer, rank = next(iter(section(tmp_path / "model")["ranks"].items()))
    edit_section(tmp_path / "model", ranks=section(tmp_path / "model")["ranks"] | {layer: rank + 1})
    hashes.append(vllm_world.config_of(tmp_path / "model").compute_hash())
    assert hashes[0] == hashes[1] != hashes[2]


def test_two_processes_compute_what_one_does(tmp_path):
    cases = [("llama", "mixed"), ("qwen2", "int8"), ("gpt2", "mixed"), ("phi3", "pivoted int8")]
    cases += [("llama-one-key-head", "mixed")]  # both processes hold its keys
    expected = {}
    for name, kind in cases:
        folder = tmp_path / f"{name} {kind}"
        _, ids, expected[folder] = written(name, kind, folder)
        torch.save(ids, folder / "ids.pt")
    run_group(2, "auto", tmp_path / "meeting", *expected)
    for folder, wanted in expected.items():
        torch.testing.assert_close(torch.load(folder / "logits0.pt"), wanted, **CLOSE)


def test_through_vllms_backend_of_transformers_models(tmp_path):
    # in a process of its own: it changes transformers' classes
    _, ids, expected = written("llama", "mixed", tmp_path / "model")
    torch.save(ids, tmp_path / "model" / "ids.pt")
    run_group(1, "transformers", tmp_path / "meeting", tmp_path / "model")
    torch.testing.assert_close(torch.load(tmp_path / "model" / "logits0.pt"), expected, **CLOSE)


# -- refused ----


def test_without_the_plugin_vllm_refuses(tmp_path):
    written("llama", "plain", tmp_path / "model")
    script = "import sys, pathlib, vllm_world; vllm_world.config_of(pathlib.Path(sys.argv[1]))"
    done = run([sys.executable, "-c", script, str(tmp_path / "model")], VLLM_PLUGINS="another")
    assert "Unknown quantization method: lrcompress" in done.communicate(timeout=600)[1]
    assert done.returncode != 0


def test_a_newer_format_is_refused(tmp_path):
    written("llama", "plain", tmp_path / "model")
    edit_section(tmp_path / "model", format_version=FORMAT_VERSION + 1)
    with pytest.raises(ValueError, match=r"format_version(.|\n)*got: (.|\n)*upgrade lrcompress"):
        vllm_world.config_of(tmp_path / "model")


def test_another_rank_than_that_of_the_weights(tmp_path):
    written("llama", "plain", tmp_path / "model")
    layer, rank = next(iter(section(tmp_path / "model")["ranks"].items()))
    edit_section(tmp_path / "model", ranks=section(tmp_path / "model")["ranks"] | {layer: rank + 1})
    with pytest.raises(ModelError, match=r"is not what config.json says(.|\n)*do: get the checkpoint's files again"):
        served(tmp_path / "model")


def test_whole_numbers_where_config_json_says_none(tmp_path):
    written("llama", "int8", tmp_path / "model")
    edit_section(tmp_path / "model", dtype="model", format_version=1)
    with pytest.raises((ModelError, ValueError), match=r"whether int8|A.scale"):
        served(tmp_path / "model")


@pytest.mark.parametrize("part", ["A.weight", "B.weight", "B.bias", "rest.weight", "place"])
def test_a_tensor_is_missing(part, tmp_path):
    written("qwen2", "mixed", tmp_path / "model")
    lost = next(key for key in load_file(tmp_path / "model" / "model.safetensors") if key.endswith(part))
    edit_tensors(tmp_path / "model", lambda tensors: tensors.pop(lost))
    with pytest.raises(ModelError, match=rf"lack tensors(.|\n)*{lost}"):
        served(tmp_path / "model")


def test_a_place_twice(tmp_path):
    written("gpt2", "pivoted", tmp_path / "model")
    edit_tensors(tmp_path / "model", lambda tensors: tensors["transformer.h.0.mlp.c_fc.place"].fill_(0))
    with pytest.raises(ModelError, match=r"c_fc.place is no order"):
        served(tmp_path / "model")


def test_a_bias_that_the_model_does_not_have(tmp_path):
    written("llama", "plain", tmp_path / "model")
    bias = {"model.layers.0.mlp.down_proj.B.bias": torch.zeros(32)}
    edit_tensors(tmp_path / "model", lambda tensors: tensors.update(bias))
    with pytest.raises(ModelError, match=r"down_proj' has a bias(.|\n)*export"):
        served(tmp_path / "model")


def test_a_low_rank_output_head(tmp_path):
    written("llama", "plain", tmp_path / "model")
    edit_section(tmp_path / "model", ranks=section(tmp_path / "model")["ranks"] | {"lm_head": 3})
    with pytest.raises(ModelError, match=r"'lm_head'(.|\n)*ParallelLMHead(.|\n)*export"):
        served(tmp_path / "model")


def test_low_rank_experts():
    from lrcompress.vllm.config import LowRankServingConfig

    config = LowRankServingConfig.from_config({"ranks": {"model.layers.0.mlp.experts.gate_up_proj": 3}})
    with pytest.raises(ModelError, match=r"mlp.experts'(.|\n)*export"):
        config.get_quant_method(torch.nn.Identity(), "model.layers.0.mlp.experts")
    assert config.get_quant_method(torch.nn.Identity(), "model.layers.1.mlp.experts") is None
