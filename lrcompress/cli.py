"""The command line: parse, call one function of the package, print."""

import errno
import sys
from pathlib import Path
from typing import Any

import click

from lrcompress import __version__
from lrcompress.errors import InputError

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="lrcompress")
def cli() -> None:
    """Make a pretrained model smaller by low rank."""


@cli.command()
@click.argument("model")
@click.option("--recipe", required=True, help="Recipe file, or the name of a shipped recipe (attn_only, demo, …).")
@click.option("--output", type=click.Path(path_type=Path), help="Run folder.  [default: runs/MODEL-RECIPE]")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Override a key, as ranks.keep_parameters=0.3.",
)
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute.")
@click.option("--seed", default=0, show_default=True, help="Seed of every random choice.")
@click.option("--until", metavar="STAGE", help="Stop after this stage.")
@click.option("--redo", multiple=True, metavar="STAGE", help="Run this stage again, and those after it.")
@click.option("--dry-run", is_flag=True, help="Show layers, sizes, stages and disk needed; read no weights.")
@click.option("--push", "repo", metavar="USER/NAME", help="Put the result on the Hub.")
@click.option("-v", "--verbose", is_flag=True, help="Show notes of the stages; on errors the traceback.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no table.")
def run(
    model: str, recipe: str, output: Path | None, settings: tuple[str, ...], device: str, seed: int,
    until: str | None, redo: tuple[str, ...], dry_run: bool, repo: str | None, verbose: bool, quiet: bool,
) -> None:  # fmt: skip
    """Compress MODEL by a recipe; the result is in DIR, the last line of the output.

    MODEL is a Hub id (optionally id@revision), a local folder, or `demo`. A run that was interrupted goes on
    where it was; one that is finished does nothing.
    """
    from lrcompress import pipeline, terminal
    from lrcompress.progress import Display

    if repo is not None:
        _check_push(repo, until)
    display = Display(quiet=quiet, verbose=verbose)
    work = pipeline.open_workspace(model, recipe, output, settings=settings, device=device, seed=seed, display=display)
    if dry_run:
        terminal.show_plan(work, pipeline.plan_of_work(work, until, redo))
        return
    report = pipeline.execute(work, until=until, redo=redo)
    if report is not None and not quiet:
        terminal.show_report(report)
    if repo is not None:
        _push(work.folder, repo, quiet=quiet)
    click.echo(str(work.folder))


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("repo", metavar="USER/NAME")
@click.option("--private", is_flag=True, help="Make the repository a private one, if it is new.")
@click.option("--revision", metavar="BRANCH", help="Commit to this branch; made if there is none.  [default: main]")
@click.option("--message", help="Of the commit.")
@click.option("--dry-run", is_flag=True, help="List what would be uploaded; ask nobody.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def push(
    folder: Path, repo: str, private: bool, revision: str | None, message: str | None, dry_run: bool, quiet: bool
) -> None:
    """Put the result in DIR (of a run, or a model folder) on the Hub, in one commit.

    What is there already is not sent again: an unchanged push does nothing, one that was cut goes on. The token is
    that of `hf auth login`, or HF_TOKEN.
    """
    if not dry_run:
        _push(folder, repo, private=private, revision=revision, message=message, quiet=quiet)
        return
    from lrcompress import upload

    upload.check_name(repo)
    for name, data in upload.files_to_push(folder, repo).items():
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        click.echo(f"{size:>15,}  {name}")


@cli.command()
@click.argument("model")
@click.option("--recipe", required=True, help="Recipe file, or the name of a shipped recipe (attn_only, demo, …).")
@click.option("--output", type=click.Path(path_type=Path), help="Folder.  [default: runs/MODEL-RECIPE-analysis]")
@click.option("--layers", multiple=True, metavar="PATTERN", help="Layers to look at, in place of the recipe's targets.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Override a key, as analysis.trials=50.")
@click.option("--device", default="auto", show_default=True, metavar="auto|cpu|cuda[:N]", help="Where to compute.")
@click.option("--seed", default=0, show_default=True, help="Seed of every random choice.")
@click.option("-v", "--verbose", is_flag=True, help="Show notes of the stages; on errors the traceback.")
@click.option("-q", "--quiet", is_flag=True, help="No progress and no findings.")
def analyze(
    model: str, recipe: str, output: Path | None, layers: tuple[str, ...], settings: tuple[str, ...], device: str,
    seed: int, verbose: bool, quiet: bool,
) -> None:  # fmt: skip
    """How many dimensions do the layers of MODEL use, and which rank is enough?

    Nothing is compressed. The folder gets analysis.html, .md and .json: spectra, effective ranks, rank loss,
    subspaces that two runs share, and the ranks that every selector would choose. An analysis that was interrupted
    goes on where it was.
    """
    from lrcompress import pipeline, terminal
    from lrcompress.progress import Display

    display = Display(quiet=quiet, verbose=verbose)
    work = pipeline.open_analysis(
        model, recipe, output, layers=layers, settings=settings, device=device, seed=seed, display=display
    )
    value = pipeline.execute_analysis(work)
    if not quiet:
        terminal.show_analysis(value)
    click.echo(str(work.folder))


@cli.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--to", required=True, type=click.Choice(["dense", "onnx", "torch-export", "remote-code"]), help="Form.")
@click.option("--output", type=click.Path(path_type=Path), help="Folder.  [default: beside the model's, with the form]")
def export(folder: Path, to: str, output: Path | None) -> None:
    """Write the model in DIR (of a run, or a model folder) in another form.

    dense: multiplied out, for stock transformers. remote-code: a checkpoint that loads by trust_remote_code. onnx and
    torch-export: a graph or a program of any batch size and length. Each is compared with the model first.
    """
    from lrcompress import exporting

    click.echo(str(exporting.export(folder, to, output)))  # type: ignore[arg-type]  click has checked it


def _check_push(repo: str, until: str | None) -> None:
    """Before the hours of a run: would the Hub take the result?"""
    from lrcompress import upload

    if until is not None:
        raise click.UsageError("--push puts a finished run on the Hub, and --until ends this one before")
    upload.check(repo)


def _push(folder: Path, repo: str, *, quiet: bool, **options: Any) -> None:
    from huggingface_hub.utils import disable_progress_bars

    from lrcompress import upload

    if quiet:
        disable_progress_bars()
    done = upload.push(folder, repo, **options)
    click.echo(f"{'pushed to' if done.changed else 'unchanged:'} {done.url}", err=True)


def main() -> None:
    """Entry point: errors of input are exit code 2, a message and no traceback."""
    verbose = any(argument in ("-v", "--verbose") for argument in sys.argv)
    try:
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else DONE)
    except click.ClickException as error:
        error.show()
        sys.exit(BAD_INPUT)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; the same command goes on where it was", err=True)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if verbose and not (isinstance(error, InputError) or _disk_full(error)):
            raise
        sys.exit(_explain(error))


def _explain(error: Exception) -> int:
    if isinstance(error, InputError):
        click.echo(f"error: {error}", err=True)
        return BAD_INPUT
    if _disk_full(error):
        click.echo("error: the disk is full\n  do: free some and run the same command again; it goes on", err=True)
        return BAD_INPUT
    click.echo(f"error: {type(error).__name__}: {error}\n  do: run again with -v for the traceback", err=True)
    return FAILED


def _disk_full(error: Any) -> bool:
    return getattr(error, "errno", None) == errno.ENOSPC or "No space left on device" in str(error)


if __name__ == "__main__":
    main()
