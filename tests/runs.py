"""Tiny runs: folders with a model, data and a recipe, and the command line in this process."""

import io
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from models import save_tiny, write_tsv, write_txt

from lrcompress.cli import main

RECIPE = """
calibration: {sequences: 16, length: 32, batch: 8}
recovery: {steps: 6, batch: 4, length: 32, learning_rate: 1.0e-3, save_every: 2}
timing: {batches: [1], prompt: 8, generate: 2, repeats: 3, warmup: 0}
"""


@dataclass(frozen=True)
class Case:
    """A model folder and a recipe file."""

    model: Path
    recipe: Path

    @property
    def folder(self) -> Path:
        """Where both lie, and runs may."""
        return self.recipe.parent

    def arguments(self, output: Path, *more: object) -> list[object]:
        """Of `lrcompress`."""
        return ["run", self.model, "--recipe", self.recipe, "--output", output, *more]


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def last_line(self) -> str:
        """Of stdout."""
        return self.out.splitlines()[-1]


def causal_case(folder: Path) -> Case:
    """A GPT-2 and plain text; perplexity and divergence; two baselines."""
    write_txt(folder / "train.txt", 200)
    write_txt(folder / "test.txt", 20, seed=1)
    text = f"data: {{train: {{path: {folder}/train.txt}}, test: {{path: {folder}/test.txt}}}}\n"
    text += "baselines: [svd, svd_llm]\nevaluate: [perplexity, divergence]\nevaluation: {length: 32, batch: 8}\n"
    (folder / "recipe.yaml").write_text(text + RECIPE)
    return Case(save_tiny("gpt2", folder / "gpt2"), folder / "recipe.yaml")


def validated_case(folder: Path) -> Case:
    """The causal case with validation data of its own."""
    case = causal_case(folder)
    write_txt(folder / "validation.txt", 40, seed=2)
    text = case.recipe.read_text().replace("data: {", f"data: {{validation: {{path: {folder}/validation.txt}}, ")
    case.recipe.write_text(text)
    return case


def classifier_case(folder: Path) -> Case:
    """A BERT classifier and labelled sentences; accuracy and divergence; one baseline."""
    write_tsv(folder / "train.tsv", 100, header=True)
    write_tsv(folder / "test.tsv", 40, seed=1)
    text = f"data: {{train: {{path: {folder}/train.tsv, label: label}}, "
    text += f"test: {{path: {folder}/test.tsv, text: 0, label: 1}}}}\n"
    text += "baselines: [fwsvd]\nevaluate: [accuracy, divergence]\n"
    (folder / "recipe.yaml").write_text(text + RECIPE)
    return Case(save_tiny("bert", folder / "bert"), folder / "recipe.yaml")


def cli(*arguments: object) -> Outcome:
    """`lrcompress ...` as the script runs it; an exception that leaves it is what the interpreter makes of it."""
    out, err = io.StringIO(), io.StringIO()
    argv = ["lrcompress", *map(str, arguments)]
    with patch.object(sys, "argv", argv), redirect_stdout(out), redirect_stderr(err):
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except Exception:
            traceback.print_exc()
            code = 1
    return Outcome(code, out.getvalue(), err.getvalue())


def content(folder: Path) -> dict[str, bytes]:
    """Relative path → bytes of every file below a folder."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def times(folder: Path) -> dict[str, int]:
    """Relative path → nanosecond of the last change of every file and folder below a folder."""
    return {str(file.relative_to(folder)): file.stat().st_mtime_ns for file in sorted(folder.rglob("*"))}
