"""The refit is the reduced-rank regression on the compressed model's own inputs: by hand, in models, in runs."""

import json
import threading

import pytest
import torch
import torch.nn.functional as F
from models import tiny_batch, tiny_model
from runs import causal_case, classifier_case, cli
from torch import Tensor, nn

import lrcompress
from lrcompress import stages
from lrcompress.artifacts import Factors
from lrcompress.evaluate.scorer import Scorer
from lrcompress.layers import Targets, bias_of, find_layers, read_weight
from lrcompress.linalg import Roots, psd_root, truncate, weighted_svd
from lrcompress.lowrank import LowRankLinear, put_factors
from lrcompress.refit import Refit, better, refit
from lrcompress.tasks import CausalLM, SequenceClassification, UserTask, default_forward

TASK = UserTask(default_forward, lambda y, batch: F.cross_entropy(y, batch[1]))


def two_layers(bias: bool = True) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 12, bias=bias), nn.Tanh(), nn.Linear(12, 8, bias=bias)).eval()


def batches(count: int = 4, size: int = 200) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(10, 10, generator=generator)
    return [
        (torch.randn(size, 10, generator=generator) @ mix, torch.randint(0, 8, (size,), generator=generator))
        for _ in range(count)
    ]


def plain_start(model: nn.Module, rank: int) -> dict[str, Factors]:
    return {
        name: truncate(weighted_svd(read_weight(model.get_submodule(name)).detach(), Roots()), rank,
                       bias_of(model.get_submodule(name)))
        for name in find_layers(model, Targets())
    }  # fmt: skip


def solved_by_hand(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """min ‖W x + b − M y − c‖² over M of a rank, by the SVD of the fitted values; x, y [N, I]."""
    target = x @ weight.T + bias
    mean_t, mean_y = target.mean(0), y.mean(0)
    full = torch.linalg.lstsq(y - mean_y, target - mean_t).solution  # [I, O]
    _, _, vt = torch.linalg.svd((y - mean_y) @ full, full_matrices=False)
    project = vt[:rank].T @ vt[:rank]
    cut = full @ project
    return cut.T, mean_t - mean_y @ cut


def test_it_is_the_reduced_rank_regression() -> None:
    model, data = two_layers(), batches()
    start = plain_start(model, 3)
    found = refit(model, start, lambda name: None, data, Refit(damping=1e-9), TASK)
    x = torch.cat([b[0] for b in data]).double()
    first, last = (model[i] for i in (0, 2))
    W0, b0 = first.weight.detach().double(), first.bias.detach().double()
    M, c = solved_by_hand(W0, b0, x, x, 3)
    assert torch.allclose(found["0"].B @ found["0"].A, M, atol=1e-4)
    assert torch.allclose(found["0"].bias, c, atol=1e-4)
    inner, outer = (x @ W0.T + b0).tanh(), (x @ M.T + c).tanh()
    M, c = solved_by_hand(last.weight.detach().double(), last.bias.detach().double(), inner, outer, 3)
    assert torch.allclose(found["2"].B @ found["2"].A, M, atol=1e-4)
    assert torch.allclose(found["2"].bias, c, atol=1e-4)


def test_the_output_side_root_weighs_the_errors() -> None:
    """With one output that counts alone, rank 1 gives that output as the full-rank answer does."""
    model, data = two_layers(), batches()
    root = psd_root(torch.diag(torch.tensor([1.0] + [0.0] * 7)), damping=1e-12, side="left")
    found = refit(model, plain_start(model, 12), lambda name: None, data, Refit(damping=1e-9), TASK)
    start = plain_start(model, 12) | {"2": plain_start(model, 1)["2"]}
    one = refit(model, start, lambda name: root if name == "2" else None, data, Refit(damping=1e-9), TASK)
    full = (found["2"].B @ found["2"].A)[0]
    assert torch.allclose((one["2"].B @ one["2"].A)[0], full, atol=1e-4)


def test_without_biases_no_mean_is_taken_away() -> None:
    model, data = two_layers(bias=False), batches()
    found = refit(model, plain_start(model, 8), lambda name: None, data, Refit(), TASK)
    assert all(pair.bias is None for pair in found.values())
    x = torch.cat([b[0] for b in data])
    assert torch.allclose(x @ (found["0"].B @ found["0"].A).float().T, model[0](x), atol=0.3 * model[0](x).std().item())


@pytest.mark.parametrize("name", ["gpt2", "llama", "opt", "bert", "distilbert", "t5"])
def test_every_layer_of_a_family_is_solved_and_the_model_left_alone(name: str) -> None:
    model = tiny_model(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start = plain_start(model, 4)
    task = SequenceClassification() if name in ("bert", "distilbert") else CausalLM()
    if name == "t5":
        task = UserTask(default_forward, lambda y, batch: y.mean())
    data = [tiny_batch(name, seed=seed) for seed in range(6)]
    alive = threading.active_count()
    found = refit(model, start, lambda key: None, data, Refit(), task)
    assert threading.active_count() == alive
    assert list(found) == list(start)
    changed = [key for key in start if not torch.equal(found[key].A, start[key].A)]
    assert changed == list(start)
    assert {key: pair.A.shape for key, pair in found.items()} == {key: pair.A.shape for key, pair in start.items()}
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_it_is_nearer_to_the_dense_model_on_what_it_was_fitted_to() -> None:
    model = tiny_model("bert")
    start = plain_start(model, 6)
    data = [tiny_batch("bert", seed=seed) for seed in range(100)]
    found = refit(model, start, lambda name: None, data, Refit(), SequenceClassification())
    scorer = Scorer(model, data, SequenceClassification())
    scores = []
    for pairs in (start, found):
        layers = {n: LowRankLinear.of(p, device="cpu", dtype=torch.float32) for n, p in pairs.items()}
        scores.append(scorer.score(layers).kl)
    assert scores[1] < 0.8 * scores[0]
    checked = better(model, start, found, data, SequenceClassification())
    assert checked.factors is found
    assert checked.share == pytest.approx(scores[1] / scores[0])
    assert "kept" in checked.note
    other = better(model, found, dict(start), data, SequenceClassification())
    assert all(other.factors[name] is found[name] for name in found)
    assert other.share == pytest.approx(scores[0] / scores[1])
    assert "dropped" in other.note
    assert Refit().starts(checked.share) == (scores[1] < 0.7 * scores[0])
    assert not Refit().starts(0.75)
    assert Refit(start_below=1).starts(0.9)
    assert Refit().starts(better(model, start, found, [], SequenceClassification()).share)


def test_padding_does_not_count() -> None:
    model = tiny_model("bert")
    start = plain_start(model, 4)
    ids = torch.randint(0, 256, (8, 9), generator=torch.Generator().manual_seed(1))
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wide = {key: F.pad(value, (0, 7)) for key, value in short.items()}
    one, other = (refit(model, start, lambda n: None, [b], Refit(), SequenceClassification()) for b in (short, wide))
    for name in (name for name in start if "layer.0.attention.self" in name):
        assert torch.allclose(one[name].B @ one[name].A, other[name].B @ other[name].A, atol=1e-3), name


class Routed(nn.Module):
    """Sends positive rows through one layer and the others through another; a third is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(10, 10), nn.Linear(10, 10), nn.Linear(10, 10)])
        self.first, self.head = nn.Linear(10, 10), nn.Linear(10, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        up = x[:, 0] > 0
        y = torch.empty_like(x)
        y[up], y[~up] = self.blocks[0](x[up]), self.blocks[1](x[~up])
        return self.head(y.tanh())


def test_routed_and_uncalled_layers_do_not_stop_it() -> None:
    torch.manual_seed(0)
    model = Routed().eval()
    start = {
        name: truncate(weighted_svd(model.get_submodule(name).weight.detach(), Roots()), 3,
                       bias_of(model.get_submodule(name)))
        for name in ("first", "blocks.0", "blocks.1", "blocks.2", "head")
    }  # fmt: skip
    found = refit(model, start, lambda name: None, batches(), Refit(), TASK)
    assert found["blocks.2"] is start["blocks.2"]
    assert found["first"] is not start["first"]
    assert found["head"] is not start["head"]


def test_what_a_pass_raises_is_raised_and_no_thread_stays() -> None:
    model, alive = two_layers(), threading.active_count()
    start = plain_start(model, 3)

    def forward(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        y = module[0](batch[0])
        raise RuntimeError(f"broken at {list(y.shape)}")

    with pytest.raises(RuntimeError, match="broken at"):
        refit(model, start, lambda name: None, batches(), Refit(), UserTask(forward, lambda y, b: y.sum()))
    assert threading.active_count() == alive
    assert isinstance(model[0], nn.Linear)


def test_a_compressed_module_has_refitted_factors() -> None:
    data = batches()
    recipe = {"ranks": {"kind": "fixed", "rank": 3}, "recovery": None, "method": "svd_llm"}
    products = []
    for section in (None, {"check": 0}):
        model = two_layers()
        lrcompress.compress(model, data, loss=lambda y, b: F.cross_entropy(y, b[1]), recipe=recipe | {"refit": section})
        products.append(model[2].weight.detach())
    assert not torch.allclose(*products)


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the check of the checkpoint in a fresh process, which takes seconds."""
    monkeypatch.setattr(stages, "check_in_fresh_process", lambda *_, **__: 0.0)


@pytest.mark.usefixtures("unchecked")
def test_a_run_refits_says_so_and_starts_the_recovery_there(tmp_path) -> None:
    case = classifier_case(tmp_path)
    settings = ["--set", "refit={check: 8}", "--set", "timing=null", "--set", "baselines=[]"]
    done = cli(*case.arguments(tmp_path / "run", *settings))
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert [row["name"] for row in report["rows"]][-3:] == ["kron", "refit", "lora_lrd"]
    stage = next(stage for stage in report["stages"] if stage["name"] == "refit")
    assert "KL to dense on held-out sequences" in stage["notes"][0]
    assert "a recovery starts from those before the refit" in stage["notes"][0]  # so few sequences gain little
    assert report["rows"][-1]["start"] == "kron"
    assert "solved again layer by layer" not in (tmp_path / "run" / "model" / "README.md").read_text()
    more = ["--set", "refit={check: 0}", "--set", "recovery={steps: 1, learning_rate: 1.0e-9, batch: 2}"]
    done = cli(*case.arguments(tmp_path / "run", *settings, *more))
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["rows"][-1]["start"] == "refit"
    kl = {row["name"]: row["metrics"]["kl"]["value"] for row in report["rows"]}
    assert kl["lora_lrd"] == pytest.approx(kl["refit"], rel=1e-3)
    assert kl["lora_lrd"] != pytest.approx(kl["kron"], rel=0.01)
    assert "solved again layer by layer" in (tmp_path / "run" / "model" / "README.md").read_text()
    done = cli(*case.arguments(tmp_path / "run", *settings, "--set", "recovery=null"))
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert report["rows"][-1]["name"] == "refit"


@pytest.mark.usefixtures("unchecked")
def test_a_checkpoint_of_a_refit_is_what_was_measured(tmp_path) -> None:
    case = causal_case(tmp_path)
    done = cli(
        *case.arguments(
            tmp_path / "run", "--set", "refit={check: 0}", "--set", "timing=null", "--set", "recovery=null",
            "--set", "layout=pivoted", "--set", "baselines=[]",
        )
    )  # fmt: skip
    assert done.code == 0, done.err
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    loss = report["rows"][-1]["metrics"]["token_perplexity"]["value"]
    assert loss > 0
    assert report["rows"][-1]["name"] == "refit"


def test_put_factors_takes_what_a_refit_gives() -> None:
    model = two_layers()
    found = refit(model, plain_start(model, 3), lambda name: None, batches(), Refit(), TASK)
    put_factors(model, found)
    assert model(batches()[0][0]).shape == (200, 8)
