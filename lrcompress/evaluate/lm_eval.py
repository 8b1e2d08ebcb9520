"""Tasks of the lm-evaluation-harness: the entry of a recipe."""

from typing import Literal, final

from pydantic import Field

from lrcompress.part import Part


@final
class LmEval(Part):
    """Tasks of EleutherAI's lm-evaluation-harness (extra `[eval]`). It takes the whole model, a causal LM."""

    kind: Literal["lm_eval"] = "lm_eval"
    tasks: tuple[str, ...] = Field(min_length=1)
    """names of tasks, groups or tags, as `lm-eval ls tasks` lists them"""
    limit: int | None = Field(default=None, ge=1)
    """only the first so many documents of each task: for a trial, since scores then do not compare with published
    ones; null: all"""
    fewshot: int | None = Field(default=None, ge=0)
    """solved examples before each question; null: the task's own number. A task that fixes 0 keeps it"""
    include: str | None = Field(default=None, min_length=1)
    """folder with task YAMLs of your own, which go before lm-eval's of the same name; relative paths of data in them
    start at this folder"""
