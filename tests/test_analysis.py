"""The analysis: each number against its definition, findings that follow the numbers, and the whole command."""

import io
import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from runs import Case, classifier_case, cli, content, times, validated_case
from torch import nn

import lrcompress
from lrcompress import stages
from lrcompress.analysis.findings import findings
from lrcompress.analysis.measure import effective_rank
from lrcompress.analysis.schema import Analysis
from lrcompress.analysis.views import to_html, to_markdown
from lrcompress.artifacts import read_factors, read_json
from lrcompress.errors import DataError, LayerError, OutputError, RecipeError
from lrcompress.layers import read_weight
from lrcompress.linalg import relative_error
from lrcompress.progress import Display
from lrcompress.subspaces import right_basis, similarity

SMALL = "analysis: {learning: {steps: 4, batch: 4, length: 32}, trials: 3, examples: 20, keep_parameters: 0.5}\n"


# numbers ----------------------------------------------------------------------------------------------------------


def test_the_effective_rank_of_equal_values_is_their_number() -> None:
    found = effective_rank(torch.cat([torch.ones(5), torch.zeros(3)]))
    assert found.full == 8
    assert found.entropy == pytest.approx(5)
    assert found.stable == pytest.approx(5)
    assert (found.share_90, found.share_95, found.share_99) == (5, 5, 5)


@given(values=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30))
def test_effective_ranks_by_their_definitions(values: list[float]) -> None:
    squares = torch.tensor(values, dtype=torch.float64)
    found = effective_rank(squares)
    shares = (squares / squares.sum()).sort(descending=True).values
    assert found.entropy == pytest.approx(math.exp(-sum(p * math.log(p) for p in shares.tolist() if p > 0)), rel=1e-6)
    assert found.stable == pytest.approx(float(squares.sum() / squares.max()))
    for level in (90, 95, 99):
        least = getattr(found, f"share_{level}")
        assert float(shares[:least].sum()) >= level / 100 - 1e-9
        assert float(shares[: least - 1].sum()) < level / 100 + 1e-9
    assert 1 - 1e-9 <= found.stable <= found.entropy * (1 + 1e-9) <= len(values) * (1 + 1e-6)
    assert found.share_90 <= found.share_95 <= found.share_99


def test_a_matrix_of_zeros_has_no_dimension() -> None:
    assert effective_rank(torch.zeros(4)).share_95 == 0


# the whole command ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    found = validated_case(tmp_path_factory.mktemp("case"))
    found.recipe.write_text(found.recipe.read_text() + SMALL)
    return found


@pytest.fixture(scope="module")
def finished(case: Case) -> tuple[Path, Any]:
    outcome = cli("analyze", case.model, "--recipe", case.recipe, "--output", case.folder / "analysis")
    assert outcome.code == 0, outcome.err
    return case.folder / "analysis", outcome


@pytest.fixture(scope="module")
def value(finished: tuple[Path, Any]) -> Analysis:
    return Analysis.model_validate_json((finished[0] / "analysis.json").read_text())


def test_the_command_prints_findings_and_its_folder(finished: tuple[Path, Any], value: Analysis) -> None:
    folder, outcome = finished
    assert outcome.last_line == str(folder)
    said = " ".join(outcome.out.split())
    assert all(" ".join(text.split()) in said for text in value.findings)
    assert {place.name for place in folder.iterdir()} == {
        "recipe.yaml", "environment.json", "run.json", "stages", "analysis.json", "analysis.md", "analysis.html",
    }  # fmt: skip
    assert [place.name for place in sorted((folder / "stages").iterdir())] == [
        "01-layers", "02-statistics", "03-spectra", "04-learning", "05-analysis",
    ]  # fmt: skip


def test_every_layer_has_all_that_was_asked_for(value: Analysis) -> None:
    assert len(value.layers) == 8
    names = {"uniform", "energy", "budget", "rank_loss", "subspace", "random_search", "target"}
    assert {row.name for row in value.selectors} == names
    chosen = {row.name for row in value.selectors if row.refused is None}
    for layer in value.layers:
        assert set(layer.methods) == {"svd", "fwsvd", "asvd", "svd_llm", "kron"}
        assert set(layer.spectra) == {"weight", *layer.methods}
        assert set(layer.rank_loss) == {"optimum", "kron", "learned"}
        assert set(layer.similarity) == {"A", "B"}
        assert set(layer.kept) == chosen
        assert len(layer.rank_loss["learned"].ranks) >= 4
        for curve in layer.spectra.values():
            assert curve.values == sorted(curve.values, reverse=True)
            assert curve.ranks[0] == 1
    for row in value.selectors:
        assert (row.kl is None) == (row.refused is not None)
        if row.refused is None and row.name != "target":
            assert 0.35 < row.kept_share <= 0.5
    assert value.dense is not None
    assert value.dense.kl == pytest.approx(0, abs=1e-6)


def test_numbers_of_a_layer_are_those_of_its_tensors(case: Case, finished: tuple[Path, Any], value: Analysis) -> None:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    folder = finished[0] / "stages"
    pairs = {file.stem: read_factors(file) for file in (folder / "04-learning").glob("*.safetensors")}
    for layer in value.layers:
        weight = read_weight(model.get_submodule(layer.name)).detach().double()
        squares = torch.linalg.svdvals(weight).square()
        assert layer.weight == effective_rank(squares)
        moments = lrcompress.artifacts.read_tensors(folder / "02-statistics" / f"{layer.name}.safetensors")
        assert layer.inputs.stable == pytest.approx(
            effective_rank(torch.linalg.eigvalsh(moments["input_moment"])).stable
        )
        assert layer.curvature.full == layer.out_features
        by_rank = {found[layer.name].A.shape[0]: found[layer.name] for found in pairs.values()}
        for rank, error in zip(layer.rank_loss["learned"].ranks, layer.rank_loss["learned"].values, strict=True):
            assert error == pytest.approx(relative_error(weight, by_rank[rank]), rel=1e-4) or rank == 16
    two = [found for found in pairs.values() if found[value.layers[0].name].A.shape[0] == 16]
    for factor in ("A", "B"):
        name = value.layers[0].name
        bases = [right_basis(one[name].A if factor == "A" else one[name].B.T) for one in two]
        maps = [similarity(bases[i], bases[j]) for i in range(len(two)) for j in range(len(two)) if i != j]
        found = value.layers[0].similarity[factor]
        assert any(found.diagonal[-1] == pytest.approx(phi[-1, -1].item(), abs=1e-5) for phi in maps)
        assert found.level[-1] == pytest.approx(16 / (32 if factor == "A" else value.layers[0].out_features), rel=1e-5)


def test_an_analysis_that_is_there_does_nothing(case: Case, finished: tuple[Path, Any]) -> None:
    before = times(finished[0] / "stages")
    outcome = cli("analyze", case.model, "--recipe", case.recipe, "--output", finished[0])
    assert outcome.code == 0
    assert times(finished[0] / "stages") == before
    assert "first time" not in outcome.err


def test_the_views_are_stable_self_contained_and_say_only_what_is_there(value: Analysis) -> None:
    page = to_html(value)
    assert page == to_html(value)
    assert "<script" not in page
    assert not re.search(r'(src|href)="(?!#|data:)', page)
    assert page.count("<svg") == 8
    text = to_markdown(value)
    for layer in value.layers:
        assert text.count(f"`{layer.name}`") >= 4
        assert layer.name in page
    for heading in ("How many dimensions does this layer need?", "Rank by every selector", "Amplification"):
        assert heading in text
        assert heading in page


def test_a_hostile_name_is_escaped(value: Analysis) -> None:
    odd = value.model_copy(
        update={"model": value.model.model_copy(update={"id": "<b>x</b>"}), "findings": ["<i>a</i> | b"]}
    )
    assert "<b>x</b>" not in to_html(odd)
    assert "<i>a</i>" not in to_html(odd)
    assert "\\<i\\>" in to_markdown(odd)


def test_findings_follow_the_numbers(value: Analysis) -> None:
    text = " ".join(value.findings)
    best = min((row for row in value.selectors if row.kl is not None and row.name != "target"), key=lambda row: row.kl)
    assert f"At the same size {best.name} is the closest" in text
    target = next(row for row in value.selectors if row.name == "target")
    if target.kept_share is not None:
        assert f"{1 - target.kept_share:.0%} of the target layers' parameters are redundant" in text
    needs: dict[str, list[float]] = {}
    for layer in value.layers:
        needs.setdefault(layer.role, []).append(layer.methods["kron"].share_95 / layer.methods["kron"].full)
    most = max(needs, key=lambda role: sum(needs[role]) / len(needs[role]))
    assert f"Of the roles, {most} needs the most" in text
    turned = [
        layer.model_copy(update={"similarity": {
            key: one.model_copy(update={"range": None}) for key, one in layer.similarity.items()
        }})
        for layer in value.layers
    ]  # fmt: skip
    assert "no better than random subspaces" in " ".join(findings(turned, "kron", value.selectors, 0.01))


def test_an_interrupted_analysis_goes_on_to_the_same_numbers(
    case: Case, value: Analysis, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lrcompress import analysis_stage
    from lrcompress.evaluate.scorer import Scorer

    class Killed(BaseException):
        pass

    scored: list[int] = []
    score = Scorer.score

    def dying(self: Scorer, modules: Any) -> Any:
        scored.append(1)
        if len(scored) == 4:
            raise Killed
        return score(self, modules)

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "score", dying)
        with pytest.raises(Killed):
            lrcompress.analyze(str(case.model), case.recipe, tmp_path / "out")
    monkeypatch.setattr(analysis_stage, "to_html", lambda value: "")
    again = lrcompress.analyze(str(case.model), case.recipe, tmp_path / "out")
    assert again.layers == value.layers
    assert again.findings == value.findings
    assert len(read_json(tmp_path / "out" / "stages" / "05-analysis" / "analysis.json")["layers"]) == 8


class Counting(Display):
    """Notes how many bars are shown at once."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.console = Console(file=io.StringIO(), force_terminal=True, width=width)
        self.shown = self.most = 0

    @contextmanager
    def bar(self, what: str, total: int) -> Iterator[Any]:
        self.shown += 1
        self.most = max(self.most, self.shown)
        try:
            with super().bar(what, total) as advance:
                yield advance
        finally:
            self.shown -= 1


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("width", [50, 160])
def test_one_bar_at_a_time_in_a_terminal(case: Case, tmp_path: Path, width: int) -> None:
    """A bisection ends before its bar does."""
    display = Counting(width)
    lrcompress.analyze(str(case.model), case.recipe, tmp_path / "out", display=display)
    assert (display.shown, display.most) == (0, 1)
    text = display.console.file.getvalue()  # type: ignore[attr-defined]
    assert all(name in text for name in ("learning", "trials", "sizes", "layers"))


# what one asks for ------------------------------------------------------------------------------------------------


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without figures."""
    from lrcompress import analysis_stage

    monkeypatch.setattr(analysis_stage, "to_html", lambda value: "")
    monkeypatch.setattr(stages, "check_in_fresh_process", lambda *_, **__: 0.0)


@pytest.mark.usefixtures("plain")
def test_layers_by_pattern_and_no_validation_data(case: Case, tmp_path: Path) -> None:
    outcome = cli(
        "analyze", case.model, "--recipe", case.recipe, "--output", tmp_path / "out", "--layers", "h.1.mlp.*",
        "--set", "data.validation=null",
    )  # fmt: skip
    assert outcome.code == 0, outcome.err
    found = Analysis.model_validate_json((tmp_path / "out" / "analysis.json").read_text())
    assert [layer.name for layer in found.layers] == ["transformer.h.1.mlp.c_fc", "transformer.h.1.mlp.c_proj"]
    assert {row.name for row in found.selectors} == {"uniform", "energy", "budget", "rank_loss", "subspace"}
    assert "no validation data" in found.notes[0]
    assert not any("redundant" in text for text in found.findings)
    assert all(row.kl is None for row in found.selectors)


@pytest.mark.usefixtures("plain")
def test_a_classifier_has_its_accuracy(tmp_path: Path) -> None:
    case = classifier_case(tmp_path)
    lines = (tmp_path / "train.tsv").read_text().splitlines()[:30]
    (tmp_path / "validation.tsv").write_text("\n".join(lines) + "\n")
    text = case.recipe.read_text().replace(
        "data: {", f"data: {{validation: {{path: {tmp_path}/validation.tsv, label: label}}, "
    )
    case.recipe.write_text(text + SMALL)
    found = lrcompress.analyze(
        str(case.model), case.recipe, tmp_path / "out", settings=["method=svd_llm", "ranks={kind: energy}"]
    )
    assert found.dense is not None
    assert 0 <= found.dense.accuracy <= 1
    assert "budget" not in {row.name for row in found.selectors}  # svd_llm's values do not compare between layers
    assert found.method == "svd_llm"
    assert set(found.layers[0].rank_loss) == {"optimum", "svd_llm", "learned"}


def test_a_run_and_an_analysis_do_not_share_a_folder(case: Case, finished: tuple[Path, Any], tmp_path: Path) -> None:
    before = content(finished[0])
    with pytest.raises(OutputError, match=r"another kind of work(?s:.)*analysis(?s:.)*--output"):
        lrcompress.run(str(case.model), case.recipe, finished[0])
    assert content(finished[0]) == before
    lrcompress.run(str(case.model), case.recipe, tmp_path / "out", until="layers")
    with pytest.raises(OutputError, match="another kind of work"):
        lrcompress.analyze(str(case.model), case.recipe, tmp_path / "out")


def test_what_cannot_be_analysed_is_refused_before_any_work(case: Case, tmp_path: Path) -> None:
    with pytest.raises(LayerError, match="no layer matched `nowhere`"):
        lrcompress.analyze(str(case.model), case.recipe, tmp_path / "out", layers=["nowhere"])
    with pytest.raises(RecipeError, match="seeds must differ"):
        lrcompress.analyze(str(case.model), case.recipe, tmp_path / "out", settings=["analysis.seeds=[2, 2]"])
    with pytest.raises(DataError, match=r"data\.validation is data\.test"):
        lrcompress.analyze(
            str(case.model), case.recipe, tmp_path / "out",
            settings=[f"data.validation={{path: {case.folder}/test.txt}}"],
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


def test_the_default_folder_is_not_the_runs(case: Case, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from lrcompress import pipeline

    monkeypatch.chdir(tmp_path)
    work = pipeline.open_analysis(str(case.model), case.recipe)
    assert work.folder == Path("runs/gpt2-recipe-analysis")


# any module -------------------------------------------------------------------------------------------------------


def batches(count: int = 4) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (torch.randn(16, 12, generator=generator), torch.randint(0, 4, (16,), generator=generator))
        for _ in range(count)
    ]


def cross_entropy(outputs: torch.Tensor, batch: Any) -> torch.Tensor:
    return F.cross_entropy(outputs, batch[1])


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 20), nn.ReLU(), nn.Linear(20, 4))


RECIPE = {"analysis": {"learning": {"steps": 5}, "trials": 3}, "ranks": {"kind": "budget", "keep_parameters": 0.5}}


def test_a_plain_module_is_analysed_and_left_as_it_was() -> None:
    model = mlp()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    found = lrcompress.analyze_module(model, batches(), loss=cross_entropy, recipe=RECIPE, validation=batches(2))
    assert [layer.name for layer in found.layers] == ["0", "2", "4"]
    assert {row.name for row in found.selectors} >= {"uniform", "budget", "random_search", "target"}
    assert len(found.findings) >= 5
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in mlp().named_modules()]
    alone = lrcompress.analyze_module(mlp(), batches(), loss=cross_entropy, recipe=RECIPE)
    assert alone.layers[1].weight == found.layers[1].weight
    assert "random_search" not in {row.name for row in alone.selectors}


@pytest.mark.parametrize(
    "ranks",
    [
        {"kind": "random_search", "keep_parameters": 0.5, "trials": 6},
        {"kind": "target", "rise": 0.2},
        {"kind": "rank_loss", "keep_parameters": 0.5, "learning": {"start": "method", "steps": 3}},
        {"kind": "subspace", "keep_parameters": 0.5, "factor": "B", "unclear": "uniform", "learning": {"steps": 3}},
        {"kind": "frontier", "keep_parameters": [0.5, 0.8], "choose": 0.5},
    ],
    ids=lambda ranks: ranks["kind"],
)
def test_compress_takes_every_selector(ranks: dict[str, Any]) -> None:
    made = lrcompress.compress(
        mlp(), batches(), loss=cross_entropy, recipe={"ranks": ranks, "recovery": None}, validation=batches(2)
    )
    assert made.plan.kept_parameters < made.plan.dense_parameters
    with torch.no_grad():
        assert made.model(batches()[0][0]).isfinite().all()


@pytest.mark.gpu
def test_on_cuda_an_analysis_finds_what_it_finds_on_the_cpu() -> None:
    found = [
        lrcompress.analyze_module(
            mlp(), batches(), loss=cross_entropy, recipe=RECIPE, validation=batches(2), device=device
        )
        for device in ("cpu", "cuda")
    ]
    for here, there in zip(*(one.layers for one in found), strict=True):
        assert here.weight == there.weight
        assert here.inputs.entropy == pytest.approx(there.inputs.entropy, rel=1e-3)
        assert here.rank_loss["optimum"] == there.rank_loss["optimum"]
    assert [row.name for row in found[0].selectors] == [row.name for row in found[1].selectors]


def test_compress_without_validation_batches_does_not_search() -> None:
    with pytest.raises(DataError, match=r"chooses on validation data(?s:.)*pass `validation`"):
        lrcompress.compress(
            mlp(), batches(), loss=cross_entropy,
            recipe={"ranks": {"kind": "target", "rise": 0.2}, "recovery": None},
        )  # fmt: skip


def test_json_is_json(finished: tuple[Path, Any]) -> None:
    json.loads((finished[0] / "analysis.json").read_text())
