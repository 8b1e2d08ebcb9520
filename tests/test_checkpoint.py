"""A compressed module without `from_pretrained` is saved and loaded exactly, or refused with the reason."""

import json
from pathlib import Path

import pytest
import torch
from models import factorise
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lrcompress.artifacts import Factors
from lrcompress.checkpoint import load_module, save_module
from lrcompress.errors import ModelError, OutputError
from lrcompress.lowrank import put_factors, ranks_of


class Mlp(nn.Module):
    """[.., 6] → [.., 4]; batch statistics are buffers."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(6, width), nn.Linear(width, width, bias=False), nn.Linear(width, 4)])
        self.norm = nn.BatchNorm1d(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.layers[0](x).relu())
        return self.layers[2](self.layers[1](x).relu())


class Tied(nn.Module):
    """An output weight that is the embedding, and one layer that stands at two names."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(10, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6)])
        self.again = self.layers[0]
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.again(self.layers[0](self.embedding(x)).relu()))


class Views(nn.Module):
    """Two buffers that are parts of one storage."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        whole = torch.arange(8.0)
        self.register_buffer("left", whole[:4])
        self.register_buffer("right", whole[4:])
        self.register_buffer("none", torch.empty(0))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers[0](x) * self.left + self.right


CASES = {
    "mlp": (Mlp, lambda: torch.randn(5, 6)),
    "tied": (Tied, lambda: torch.tensor([1, 4, 7])),
    "views": (Views, lambda: torch.randn(3, 4)),
}


def compressed(make) -> nn.Module:
    model = make()
    factorise(model)
    return model.eval()


def fresh(make) -> nn.Module:
    torch.manual_seed(1)
    return make().eval()


def edit_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def edit_description(folder: Path, **changes) -> None:
    file = folder / "lrcompress.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("case", CASES)
def test_loads_as_it_was(case, tmp_path):
    make, draw = CASES[case]
    x, model = draw(), compressed(make)
    with torch.no_grad():
        if case == "mlp":
            model.norm.running_mean += 1
        save_module(model, tmp_path / "one")
        loaded = fresh(make)
        assert not torch.equal(loaded(x), model(x))
        load_module(loaded, tmp_path / "one")
        assert torch.equal(loaded(x), model(x))
    assert ranks_of(loaded) == ranks_of(model) != {}
    save_module(loaded, tmp_path / "two")
    for name in ("model.safetensors", "lrcompress.json"):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes()


def test_a_layer_at_two_names(tmp_path):
    model = Tied()
    layer = Factors(torch.randn(2, 6), torch.randn(6, 2), torch.randn(6))
    put_factors(model, {"layers.0": layer})
    model.again = model.layers[0]
    save_module(model, tmp_path / "module")
    loaded = fresh(Tied)
    load_module(loaded, tmp_path / "module")
    assert loaded.again is loaded.layers[0]
    assert loaded.head.weight is loaded.embedding.weight
    assert torch.equal(loaded(torch.arange(10)), model(torch.arange(10)))
    stored = load_file(tmp_path / "module" / "model.safetensors")
    assert len(stored) == 4  # A, B, bias, embedding


def test_gradients_reach_the_factors(tmp_path):
    save_module(compressed(Mlp), tmp_path / "module")
    loaded = fresh(Mlp).train()
    load_module(loaded, tmp_path / "module")
    assert loaded.layers[0].training
    loaded(torch.randn(5, 6)).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in loaded.parameters())


def test_the_module_keeps_its_dtype(tmp_path):
    save_module(compressed(Mlp), tmp_path / "module")
    loaded = fresh(Mlp).to(torch.bfloat16)
    load_module(loaded, tmp_path / "module")
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.bfloat16}


DAMAGE = {
    "missing factor": (lambda t: t.pop("layers.1.B.weight"), "no tensor layers.1.B.weight"),
    "missing bias": (lambda t: t.pop("layers.0.B.bias"), "no tensor layers.0.B.bias"),
    "extra": (lambda t: t.update(more=torch.ones(1)), "a tensor more that the module lacks"),
    "shape": (lambda t: t.update({"norm.weight": torch.ones(3)}), "norm.weight .3., the module's is .8."),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_tensors_are_refused_and_change_nothing(damage, tmp_path):
    save_module(compressed(Mlp), tmp_path / "module")
    change, message = DAMAGE[damage]
    edit_tensors(tmp_path / "module", change)
    loaded = fresh(Mlp)
    before = {name: value.clone() for name, value in loaded.state_dict().items()}
    with pytest.raises(ModelError, match=rf"{message}(.|\n)*do: "):
        load_module(loaded, tmp_path / "module")
    after = loaded.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": {"layers.0": 4, "layers.1": 4, "layers.2": 5}}, "the module's is"),
        ({"ranks": {"layers.1": 4, "layers.2": 5}}, r"no tensor layers.0.weight"),
        ({"ranks": {"layers.7": 4}}, r"no dense layer there(.|\n)*nearest: layers"),
        ({"ranks": {"norm": 4}}, r"no dense layer there(.|\n)*BatchNorm1d"),
        ({"format_version": 4}, "upgrade lrcompress"),
    ],
)
def test_wrong_descriptions_are_refused(changes, message, tmp_path):
    save_module(compressed(Mlp), tmp_path / "module")
    edit_description(tmp_path / "module", **changes)
    loaded = fresh(Mlp)
    with pytest.raises(ModelError, match=message):
        load_module(loaded, tmp_path / "module")
    assert ranks_of(loaded) == {}


def test_another_module_is_refused(tmp_path):
    save_module(compressed(Mlp), tmp_path / "module")
    with pytest.raises(ModelError, match="is not of this module"):
        load_module(Mlp(width=16), tmp_path / "module")


def test_no_checkpoint(tmp_path):
    with pytest.raises(ModelError, match=r"no lrcompress.json(.|\n)*save_module"):
        load_module(Mlp(), tmp_path)


def test_nothing_is_written_over(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        save_module(compressed(Mlp), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_state_that_is_no_tensor_is_refused(tmp_path):
    class Remembers(nn.Linear):
        def get_extra_state(self):
            return {"epoch": 3}

    model = Mlp()
    model.norm = Remembers(2, 2)
    with pytest.raises(ModelError, match=r"norm._extra_state"):
        save_module(model, tmp_path / "module")
    assert not (tmp_path / "module").exists()
