"""The stage in which a run folder's statistics, spectra and learned pairs become an analysis, and its files."""

from dataclasses import asdict
from pathlib import Path

from lrcompress import build, stages
from lrcompress.analysis.findings import findings
from lrcompress.analysis.measure import compare_selectors, measure_layers
from lrcompress.analysis.schema import Analysis, LayerAnalysis, SelectorRow
from lrcompress.analysis.settings import all_methods
from lrcompress.analysis.views import to_html, to_markdown
from lrcompress.artifacts import Spectrum, read_json, read_spectrum, write_json, write_views
from lrcompress.rank_stages import SCORES, bench, check_validation
from lrcompress.ranks.context import AbstractContext
from lrcompress.workspace import Workspace

NO_VALIDATION = "The recipe has no validation data: no plan was scored, and nothing is said about redundancy."


def stage(work: Workspace, folder: Path) -> list[str]:
    """Every selector's plan and score, then each layer's numbers."""
    assert work.selectors is not None
    scored = "validation" in work.sources
    notes = check_validation(work) if scored else [NO_VALIDATION]
    method = work.recipe.method.kind
    methods = tuple(one.kind for one in all_methods(work.recipe.method))

    def context() -> tuple[AbstractContext, list[str]]:
        one = bench(work, folder, work.stage("learning"), examples=work.recipe.analysis.examples)
        return one, one.notes

    def spectrum(kind: str, name: str) -> Spectrum:
        return read_spectrum(work.stage("spectra") / kind / f"{name}.safetensors")

    values = work.spectrum_values()
    rows, plans = compare_selectors(work.layers, values, work.selectors, context, scored=scored)
    dense = SelectorRow(name="dense", kept_share=1.0, **asdict(context()[0].dense_score())) if scored else None
    layers = measure_layers(
        work.layers, context()[0], lambda name: stages.read_statistics(work, name), spectrum, methods, work.selectors,
        plans,
    )  # fmt: skip
    write_json(
        folder / "analysis.json",
        {
            "layers": [layer.model_dump(mode="json") for layer in layers],
            "selectors": [row.model_dump(mode="json") for row in rows],
            "dense": dense and dense.model_dump(mode="json"),
            "findings": findings(layers, method, rows, work.recipe.analysis.rise),
            "notes": notes,
        },
    )
    (folder / SCORES).unlink(missing_ok=True)
    return notes


def analysis(work: Workspace) -> Analysis:
    """The whole value, from a finished folder."""
    found = read_json(work.stage("analysis") / "analysis.json")
    assert work.selectors is not None
    keep = work.selectors["uniform"].kept_share
    assert keep is not None
    return Analysis(
        model=build.model_info(work),
        environment=build.environment_of_run(work),
        recipe=work.recipe.model_dump(mode="json"),
        method=work.recipe.method.kind,
        keep_parameters=keep,
        layers=[LayerAnalysis.model_validate(layer) for layer in found["layers"]],
        dense=found["dense"] and SelectorRow.model_validate(found["dense"]),
        selectors=[SelectorRow.model_validate(row) for row in found["selectors"]],
        findings=found["findings"],
        notes=found["notes"],
        seconds={row.name: row.seconds for row in build.stage_rows(work)},
    )


def write(folder: Path, value: Analysis) -> None:
    """analysis.json, analysis.md and analysis.html."""
    write_views(folder, "analysis", value.model_dump(mode="json"), to_markdown(value), to_html(value))
