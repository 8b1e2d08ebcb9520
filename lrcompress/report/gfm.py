"""GitHub-flavoured Markdown of texts that may be hostile: tables, code and prose."""

import re

from .content import Cell, Column, Grid


def prose(text: str) -> str:
    """Text whose characters mean nothing to Markdown or HTML, on one line."""
    return re.sub(r"([\\`*\[\]<>|~&]|^[#+-]|(?<!\w)_|_(?!\w))", r"\\\1", _one_line(text))


def code(text: str) -> str:
    """A code span, also for text with backticks or, in a table, pipes."""
    text = _one_line(text).replace("|", "\\|")
    ticks = "`" * (_longest_run(text) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") or not text else ""
    return f"{ticks}{padding}{text}{padding}{ticks}"


def fence(text: str, language: str = "") -> str:
    """A code block that the text cannot close."""
    ticks = "`" * max(_longest_run(text) + 1, 3)
    return f"{ticks}{language}\n{text.rstrip()}\n{ticks}"


def table(grid: Grid) -> str:
    """A table; the winners are bold."""
    head = "| " + " | ".join(prose(column.title) for column in grid.columns) + " |"
    rule = "| " + " | ".join("---:" if column.kind == "number" else "---" for column in grid.columns) + " |"
    body = [
        "| " + " | ".join(_cell(column, cell) for column, cell in zip(grid.columns, row, strict=True)) + " |"
        for row in grid.rows
    ]
    return "\n".join([head, rule, *body])


def _cell(column: Column, cell: Cell) -> str:
    text = code(cell.text) if column.kind == "name" else prose(cell.text)
    return f"**{text}**" if cell.best else text


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
