"""analysis.md and analysis.html."""

import yaml

from lrcompress.analysis import content, figures
from lrcompress.analysis.schema import Analysis
from lrcompress.report import gfm
from lrcompress.report.content import Grid, environment_facts, model_facts, short_id
from lrcompress.report.html import page


def to_markdown(value: Analysis) -> str:
    """The whole analysis as one Markdown text, but for the pictures."""
    parts = [f"# The layers of {gfm.code(short_id(value.model.id))}"]
    parts.append("## Findings\n\n" + "\n".join(f"- {gfm.prose(text)}" for text in value.findings))
    if value.notes:
        parts.append("## Notes\n\n" + "\n".join(f"- {gfm.prose(text)}" for text in value.notes))
    parts += [f"## {title}\n\n{gfm.prose(text)}\n\n{gfm.table(grid)}" for title, text, grid in _sections(value)]
    parts.append(f"## Recipe\n\n{gfm.fence(_recipe_text(value), 'yaml')}")
    parts.append("## Environment\n\n" + "\n".join(f"- {gfm.prose(f'{k}: {v}')}" for k, v in _facts(value).items()))
    return "\n\n".join(parts) + "\n"


def to_html(value: Analysis) -> str:
    """One self-contained page: no script, no resource of another place, equal bytes for equal analyses."""
    return page("analysis", "analysis.html.j2").render(
        title=short_id(value.model.id),
        value=value,
        sections=_sections(value),
        plots=figures.plots(value),
        recipe=_recipe_text(value),
        facts=_facts(value),
    )


def _sections(value: Analysis) -> list[tuple[str, str, Grid]]:
    found = [
        ("How many dimensions does this layer need?", content.DIMENSIONS, content.dimension_grid(value)),
        ("Selectors", content.SELECTORS, content.selector_grid(value)),
        ("Rank by every selector", content.KEPT, content.kept_grid(value)),
        ("Effective ranks", content.EFFECTIVE, content.effective_grid(value)),
        ("Rank loss", content.RANK_LOSS, content.rank_loss_grid(value)),
        ("Amplification", content.AMPLIFICATION, content.amplification_grid(value)),
    ]
    return [section for section in found if section[2]]


def _recipe_text(value: Analysis) -> str:
    return yaml.safe_dump(value.recipe, sort_keys=False, allow_unicode=True, width=100)


def _facts(value: Analysis) -> dict[str, str]:
    stages = {f"seconds of {name}": f"{seconds:.1f}" for name, seconds in value.seconds.items()}
    return model_facts(value.model) | environment_facts(value.environment) | stages
