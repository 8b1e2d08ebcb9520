"""Which layers are found, and that every kind of dense layer is read as `[O, I]`."""

import pytest
import torch
import transformers as t
from models import BLOCKS, TINY, tiny_model
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lrcompress.errors import LayerError
from lrcompress.layers import Targets, block_names, find_layers, kind_of, read_weight, write_weight
from lrcompress.linalg import Roots, truncate, weighted_svd
from lrcompress.lowrank import LowRankLinear

# per model: name of a block, its attention layers, its other layers
EXPECTED: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "gpt2": ("transformer.h.{}", ("attn.c_attn", "attn.c_proj"), ("mlp.c_fc", "mlp.c_proj")),
    "opt": (
        "model.decoder.layers.{}",
        tuple(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")),
        ("fc1", "fc2"),
    ),
    "bert": (
        "bert.encoder.layer.{}",
        (*(f"attention.self.{name}" for name in ("query", "key", "value")), "attention.output.dense"),
        ("intermediate.dense", "output.dense"),
    ),
    "distilbert": (
        "distilbert.transformer.layer.{}",
        tuple(f"attention.{name}_lin" for name in ("q", "k", "v", "out")),
        ("ffn.lin1", "ffn.lin2"),
    ),
}
EXPECTED["roberta"] = ("roberta.encoder.layer.{}", *EXPECTED["bert"][1:])
for _name in ("llama", "llama-tied", "qwen2", "mistral"):
    EXPECTED[_name] = (
        "model.layers.{}",
        tuple(f"self_attn.{name}_proj" for name in ("q", "k", "v", "o")),
        tuple(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    )


def names(model: nn.Module, **targets: tuple[str, ...]) -> list[str]:
    return list(find_layers(model, Targets(**targets)))


class Mlp(nn.Module):
    """No blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 12, bias=False), nn.ReLU(), nn.Linear(12, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


@pytest.mark.parametrize("name", EXPECTED)
def test_groups_are_the_layers_inside_blocks(name: str) -> None:
    model = tiny_model(name)
    block, attention, mlp = EXPECTED[name]
    blocks = [block.format(i) for i in range(BLOCKS)]
    wanted = {
        "attention": {f"{b}.{layer}" for b in blocks for layer in attention},
        "mlp": {f"{b}.{layer}" for b in blocks for layer in mlp},
    }
    wanted["all"] = wanted["attention"] | wanted["mlp"]
    for group, expected in wanted.items():
        assert set(names(model, groups=(group,))) == expected
    assert names(model) == names(model, groups=("all",))
    assert names(model) == [n for n, _ in model.named_modules() if n in wanted["all"]]  # in the model's order
    layers = find_layers(model, Targets())
    assert block_names(layers.values()) == blocks
    for n, layer in layers.items():
        module = model.get_submodule(n)
        assert layer.name == n
        assert (layer.out_features, layer.in_features) == tuple(read_weight(module).shape)
        assert layer.bias == (module.bias is not None)
        assert layer.kind == ("conv1d" if name == "gpt2" else "linear")
        assert blocks[layer.block] in n
        assert layer.group == ("attention" if n in wanted["attention"] else "mlp")


@pytest.mark.parametrize(("name", "count"), [("vit", 6 * BLOCKS), ("t5", (6 + 10) * BLOCKS)])
def test_other_families_are_found_without_a_table(name: str, count: int) -> None:
    model = tiny_model(name)
    found = find_layers(model, Targets())
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    outside = {n for n in linears if not any(part.isdigit() for part in n.split("."))}
    assert set(found) == set(linears) - outside
    assert len(found) == count
    assert {layer.group for layer in found.values()} == {"attention", "mlp"}
    if name == "vit":
        assert outside == {"classifier"}


@pytest.mark.parametrize("name", TINY)
def test_a_skeleton_without_weights_has_the_same_layers(name: str) -> None:
    with torch.device("meta"):
        skeleton = TINY[name].make()
    assert all(parameter.is_meta for parameter in skeleton.parameters())
    assert find_layers(skeleton, Targets()) == find_layers(tiny_model(name), Targets())


def test_heads_and_embeddings_are_chosen_only_by_name() -> None:
    untied = tiny_model("llama")
    for found in (names(untied), names(untied, groups=("attention", "mlp"))):
        assert "lm_head" not in found
    assert "lm_head" in names(untied, groups=("all",), include=("lm_head",))
    assert names(untied, include=("lm_head",)) == ["lm_head"]  # include alone: no group
    assert "classifier" not in names(tiny_model("bert"))
    assert names(tiny_model("bert"), include=("classifier", "pooler.dense")) == ["bert.pooler.dense", "classifier"]
    with pytest.raises(LayerError, match="no layer matched `embed_tokens`"):
        names(untied, include=("embed_tokens",))


@pytest.mark.parametrize(("name", "owner"), [("gpt2", "transformer.wte"), ("llama-tied", "model.embed_tokens")])
def test_tied_heads_are_refused(name: str, owner: str) -> None:
    model = tiny_model(name)
    with pytest.raises(LayerError, match=f"lm_head shares its weight with {owner}"):
        names(model, include=("lm_head",))
    assert "lm_head" not in names(model, include=("*",), exclude=("lm_head",))


class TwoNames(nn.Module):
    """One layer at two names: replacing it at one of them would untie the two."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.other = nn.Linear(8, 8), nn.Linear(8, 8)
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        return self.again(self.other(self.first(x)))


def test_a_layer_at_two_names_is_refused() -> None:
    model = TwoNames()
    assert names(model) == ["other"]
    with pytest.raises(LayerError, match="first shares its weight with again"):
        names(model, include=("first",))


def test_a_parent_at_two_names_is_one_place() -> None:
    """Replacing a layer in a module replaces it wherever the module stands."""
    model = nn.Module()
    model.net = Mlp()
    model.alias = model.net
    assert names(model) == ["net.net.0", "net.net.2", "net.net.4"]


def test_patterns_add_and_remove() -> None:
    model = tiny_model("gpt2")
    assert names(model, include=("attn.c_attn",)) == [f"transformer.h.{i}.attn.c_attn" for i in range(BLOCKS)]
    assert names(model, include=("transformer.h.1.*",)) == [n for n in names(model) if ".h.1." in n]
    assert names(model, groups=("mlp",), exclude=("h.0.*",)) == [
        "transformer.h.1.mlp.c_fc",
        "transformer.h.1.mlp.c_proj",
    ]
    assert names(model, include=("h.[01].attn.c_*",), groups=("mlp",)) == names(model)


def test_unmatched_patterns_say_what_there_is_and_what_is_nearest() -> None:
    model = tiny_model("gpt2")
    for key in ("include", "exclude"):
        with pytest.raises(LayerError) as refused:
            names(model, **{key: ("attn.c_atn",)})
        text = str(refused.value)
        assert "no layer matched `attn.c_atn`" in text
        # 4 in each block, and the head
        assert (
            f"this model has {4 * BLOCKS + 1} candidate layers in 5 groups: attn.c_attn, attn.c_proj, mlp.c_fc" in text
        )
        assert "edit `targets`; nearest: attn.c_attn" in text
    with pytest.raises(LayerError, match=r"edit `targets`; .*patterns fit a name or its end"):
        names(model, include=("zzzzzz",))


def test_nothing_left_says_so() -> None:
    with pytest.raises(LayerError, match=r"no layer is left to compress(?s:.)*attn\.c_attn"):
        names(tiny_model("gpt2"), exclude=("*",))
    with pytest.raises(LayerError, match="no layer is left"):
        names(Mlp(), groups=("attention",))
    with pytest.raises(LayerError, match="no layer is left"):
        names(nn.ReLU())


def test_a_model_without_blocks_is_taken_whole() -> None:
    layers = find_layers(Mlp(), Targets())
    assert [(n, layer.block, layer.group, layer.bias) for n, layer in layers.items()] == [
        ("net.0", None, "other", True),
        ("net.2", None, "other", False),
        ("net.4", None, "other", True),
    ]
    assert names(Mlp(), include=("net.2",)) == ["net.2"]
    assert block_names(layers.values()) == []


def test_a_head_that_the_model_names_is_left_out_without_blocks_too() -> None:
    model = Mlp()
    model.get_output_embeddings = lambda: model.net[4]
    assert names(model) == ["net.0", "net.2"]
    assert names(model, groups=("all",), include=("net.4",)) == ["net.0", "net.2", "net.4"]


def test_a_model_that_is_itself_a_layer_has_no_place_to_replace_it() -> None:
    with pytest.raises(LayerError, match="no layer is left"):
        names(nn.Linear(4, 4))


class Subclass(nn.Linear):
    """Computes as Linear does."""


class Other(nn.Linear):
    """Does not."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def test_only_layers_that_compute_as_linear_count() -> None:
    attention = nn.MultiheadAttention(8, 2)
    assert kind_of(attention.out_proj) is None  # its parent reads its weight, nobody calls it
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2)
    assert names(encoder) == [f"layers.{i}.linear{j}" for i in range(2) for j in (1, 2)]
    assert kind_of(Subclass(2, 2)) == "linear"
    for module in (Other(2, 2), nn.Embedding(2, 2), nn.Conv1d(2, 2, 1), LowRankLinear(4, 4, 1), attention):
        assert kind_of(module) is None
        with pytest.raises(TypeError, match=f"{type(module).__name__} is no dense layer"):
            read_weight(module)


def pair() -> tuple[Conv1D, nn.Linear]:
    """A Conv1D [6 → 10] and the Linear that computes the same."""
    conv, linear = Conv1D(10, 6), nn.Linear(6, 10)
    with torch.no_grad():
        linear.weight.copy_(conv.weight.T)
        linear.bias.copy_(conv.bias.normal_())
    return conv, linear


def test_conv1d_and_the_equivalent_linear_are_the_same_layer() -> None:
    conv, linear = pair()
    x = torch.randn(3, 6)
    assert torch.allclose(conv(x), linear(x), atol=1e-6)
    assert torch.equal(read_weight(conv), read_weight(linear))
    assert read_weight(conv).shape == (10, 6)
    factors = [truncate(weighted_svd(read_weight(m).detach(), Roots()), 3, m.bias.detach()) for m in (conv, linear)]
    assert torch.allclose(factors[0].B @ factors[0].A, factors[1].B @ factors[1].A, atol=1e-12)
    layer = LowRankLinear.of(factors[0], device="cpu", dtype=torch.float32)
    u, s, vt = torch.linalg.svd(linear.weight)
    best = (u[:, :3] * s[:3]) @ vt[:3]
    assert torch.allclose(layer(x), x @ best.T + linear.bias, atol=1e-5)


def test_weights_are_written_in_the_orientation_they_are_read_in() -> None:
    for module in pair():
        weight = torch.randn(10, 6, dtype=torch.float64)
        parameter = module.weight
        write_weight(module, weight)
        assert module.weight is parameter
        assert torch.equal(read_weight(module), weight.float())
        x = torch.randn(2, 6)
        assert torch.allclose(module(x), x @ weight.float().T + module.bias, atol=1e-5)


def test_reading_gives_the_parameter_itself_so_nothing_is_copied() -> None:
    for module in pair():
        assert read_weight(module).data_ptr() == module.weight.data_ptr()


def test_a_bare_model_without_its_head_is_found_too() -> None:
    assert names(t.GPT2Model(tiny_model("gpt2").config)) == [
        n.removeprefix("transformer.") for n in names(tiny_model("gpt2"))
    ]
