"""`python -m benchmarks run [PATTERN]` measures what has no result yet, `table` writes the pages from the results."""

import tempfile
from pathlib import Path

import click

from benchmarks import experiments, runner


@click.group(help=__doc__)
def main() -> None:
    """The benchmark suite."""


@main.command()
@click.argument("pattern", default="*")
@click.option("--scratch", type=click.Path(file_okay=False, path_type=Path), help="run folders; default: temporary")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True, help="processes at a time")
def run(pattern: str, scratch: Path | None, jobs: int) -> None:
    """Measure the cells <bed>/<variant>/<keep>/<seed> that fit PATTERN (a glob, or the beginning of an id)."""
    wanted = list(experiments.cells(pattern))
    if not wanted:
        raise click.UsageError(f"no cell fits `{pattern}`; beds: {', '.join(experiments.beds())}")
    with tempfile.TemporaryDirectory() as folder:
        failed = runner.run(wanted, scratch or Path(folder), say=lambda text: click.echo(text), jobs=jobs)
    if failed:
        raise click.ClickException(f"{failed} cells failed; their rows say why")


@main.command(name="list")
@click.argument("pattern", default="*")
def list_cells(pattern: str) -> None:
    """Cells that fit PATTERN, and whether they have a result."""
    for cell in experiments.cells(pattern):
        click.echo(f"{cell.id}{'' if runner.is_done(cell) else '  open'}")


@main.command()
@click.option("--vllm", "python", metavar="PYTHON", help="an interpreter that has vLLM, for its column")
def families(python: str | None) -> None:
    """What each model family can do, tried on tiny random models."""
    from benchmarks import families as capabilities

    capabilities.write(python)


@main.command()
def table() -> None:
    """Write README.md and benchmarks/README.md from the results."""
    from benchmarks import table as tables

    tables.write()


if __name__ == "__main__":
    main()
