"""From files, Hub data sets, or the standard library to batches of token ids."""

import csv
import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from pydantic import Field
from torch import Tensor

from lrcompress import hub
from lrcompress.errors import DataError, nearest
from lrcompress.part import Part
from lrcompress.stdlib import SPLITS, module_files, read_modules

STDLIB = "python-stdlib"
SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")


class DataSource(Part):
    """A local file or a Hub data set."""

    path: str = Field(min_length=1)
    """a .txt, .jsonl, .csv, .tsv or .parquet file, a Hub data set, or `python-stdlib`"""
    name: str | None = None
    """configuration of a Hub data set"""
    split: str | None = None
    """split of a Hub data set or of `python-stdlib` (train, validation, test)"""
    text: str | int = "text"
    """column of the text: a name, or a number from 0 for files without a header"""
    label: str | int | None = None
    """column of the class label"""
    separator: str | None = None
    """put between rows when they are joined to one text; null: the tokenizer's end of text"""

    @property
    def local(self) -> bool:
        """Whether this is a file."""
        return self.path != STDLIB and (self.path.endswith(SUFFIXES) or Path(self.path).exists())


class Data(Part):
    """Where texts come from; choices belong on validation, the report's numbers come from test."""

    train: DataSource
    """calibration and recovery"""
    validation: DataSource | None = None
    """for choosing between recipes: `evaluation.split: validation`"""
    test: DataSource | None = None
    """the numbers of the report"""


@dataclass(frozen=True)
class Texts:
    """Rows of a data source; labels as they stand there."""

    texts: list[str]
    labels: list[Any] | None
    origin: str
    duplicates: int = 0

    def without_duplicates(self) -> "Texts":
        """The first of equal texts; calibration on copies only gives them more weight."""
        first = {text: i for i, text in reversed(list(enumerate(self.texts)))}
        chosen = sorted(first.values())
        labels = None if self.labels is None else [self.labels[i] for i in chosen]
        return Texts([self.texts[i] for i in chosen], labels, self.origin, len(self.texts) - len(chosen))


def read_texts(source: DataSource) -> Texts:
    """All non-empty rows of a source. Raises DataError that says what is there instead."""
    if source.path == STDLIB:
        split = source.split or "train"
        if split not in SPLITS:
            raise DataError(
                f"unknown split of {STDLIB}", got=split, allowed=", ".join(SPLITS), do="correct data.….split"
            )
        return Texts(read_modules(split), None, f"{STDLIB}/{split}")
    if source.local:
        return _from_columns(_read_file(source), source)
    return _from_columns(_read_hub(source), source)


def fingerprint(source: DataSource) -> str:
    """What changes when the data do: a file's content, or the name of a Hub data set."""
    digest = hashlib.sha256(source.model_dump_json().encode())
    if source.path == STDLIB:
        for file in module_files(source.split or "train"):
            digest.update(file.read_bytes())
    elif source.local and Path(source.path).is_file():
        digest.update(Path(source.path).read_bytes())
    return digest.hexdigest()


def _read_file(source: DataSource) -> Any:
    """A file as a pandas frame; column names are numbers where the source names its columns by number."""
    import pandas

    path = Path(source.path)
    if not path.is_file():
        raise DataError(
            "no such data file", got=source.path, allowed=f"a file that ends in {', '.join(SUFFIXES)}",
            do=f"correct the path; relative paths start at {Path.cwd()}",
        )  # fmt: skip
    if path.stat().st_size == 0:
        raise DataError("the data file is empty", got=source.path, do="give a file with at least one row")
    header = None if isinstance(source.text, int) else 0
    strings: dict[str, Any] = {"dtype": str, "keep_default_na": False, "header": header}
    try:
        if path.suffix == ".txt":
            return pandas.DataFrame({source.text: [path.read_text(encoding="utf-8")]})
        if path.suffix == ".tsv":  # quotes are text in TSV: reviews are full of lone ones
            return pandas.read_csv(path, sep="\t", quoting=csv.QUOTE_NONE, **strings)
        if path.suffix == ".csv":
            return pandas.read_csv(path, **strings)
        if path.suffix == ".jsonl":
            lines = path.read_text(encoding="utf-8").split("\n")
            return pandas.DataFrame([json.loads(line) for line in lines if line.strip()])
        if path.suffix == ".parquet":
            return pandas.read_parquet(path)
    except (ValueError, UnicodeDecodeError) as error:  # what pandas raises for a file that is not of its kind
        raise DataError(
            f"{source.path} cannot be read as {path.suffix}", got=str(error), do="correct the file"
        ) from error
    raise DataError("unknown kind of data file", got=source.path, allowed=", ".join(SUFFIXES), do="convert it")


def _read_hub(source: DataSource) -> Any:
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with nullcontext() if hub.answers(source.path, "dataset") else hub.offline():
            rows = datasets.load_dataset(source.path, source.name, split=source.split or "train")
    except (FileNotFoundError, ConnectionError, ValueError, HfHubHTTPError, OSError) as error:
        raise DataError(
            f"data set `{source.path}` is neither a local file nor reachable on the Hub",
            got=f"{type(error).__name__}: {error}",
            allowed=f"a file that ends in {', '.join(SUFFIXES)}, a Hub data set id, or {STDLIB}",
            do="correct the path, or check the network (HF_HUB_OFFLINE, HF_ENDPOINT)",
        ) from error
    return rows.to_pandas()  # type: ignore[union-attr]


def _from_columns(frame: Any, source: DataSource) -> Texts:
    known = list(frame.columns)
    for key, column in (("text", source.text), ("label", source.label)):
        if column is not None and column not in known:
            raise DataError(
                f"{source.path} has no column `{column}` (data source key `{key}`)",
                allowed=", ".join(map(str, known)),
                do=nearest(str(column), map(str, known)) or f"set `{key}` to one of them",
            )
    texts = frame[source.text].tolist()
    bad = next((i for i, text in enumerate(texts) if not isinstance(text, str)), None)
    if bad is not None:
        raise DataError(
            f"{source.path}: column `{source.text}` is not text", got=f"row {bad}: {texts[bad]!r}",
            do="name the column that holds the text",
        )  # fmt: skip
    kept = [i for i, text in enumerate(texts) if text.strip()]
    if not kept:
        raise DataError(
            f"{source.path} has no row with text in column `{source.text}`", got=f"{len(texts)} blank rows",
            do="give at least one with text",
        )  # fmt: skip
    labels = None if source.label is None else frame[source.label].tolist()
    return Texts([texts[i] for i in kept], None if labels is None else [labels[i] for i in kept], source.path)


class Examples(ABC):
    """Sequences of token ids that can be taken by number."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`input_ids` [B, T], `attention_mask` [B, T], and `labels`."""

    def batches(self, size: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """All sequences in order, from batch number `start` on."""
        for first in range(start * size, len(self), size):
            yield self.batch(range(first, min(first + size, len(self))))


@final
class Windows(Examples):
    """Windows of one long text; each token but the first is scored once, in the first window that holds it."""

    def __init__(self, ids: Tensor, length: int, stride: int | None = None) -> None:
        stride = min(stride or length, length - 1)  # a window's own first token has nothing before it
        self.ids, self.length = ids, length
        last = len(ids) - length
        self.starts = [*range(0, last, stride), last]

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Labels are -100 where an earlier window scored the token."""
        ids = torch.stack([self.ids[self.starts[i] : self.starts[i] + self.length] for i in indices])
        labels = ids.clone()
        for row, i in enumerate(indices):
            if i > 0:
                labels[row, : self.starts[i - 1] + self.length - self.starts[i]] = -100
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@final
class Sentences(Examples):
    """Single texts, padded to the longest of their batch."""

    def __init__(self, ids: list[list[int]], labels: list[int] | None, pad: int) -> None:
        self.ids, self.labels, self.pad = ids, labels, pad

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`labels` [B] only where the data have them."""
        rows = [torch.tensor(self.ids[i]) for i in indices]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.pad)
        lengths = torch.tensor([len(row) for row in rows])
        mask = (torch.arange(padded.shape[1]) < lengths[:, None]).long()
        batch = {"input_ids": padded, "attention_mask": mask}
        if self.labels is not None:
            batch["labels"] = torch.tensor([self.labels[i] for i in indices])
        return batch


def token_stream(texts: Texts, tokenizer: Any, separator: str | None) -> Tensor:
    """All rows as one stream of ids [N], joined by the separator or the tokenizer's end of text."""
    end = tokenizer.eos_token_id
    if separator is not None or end is None:
        joined = ("\n\n" if separator is None else separator).join(texts.texts)
        return torch.tensor(tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"])
    ids: list[int] = []
    for row in tokenizer(texts.texts, add_special_tokens=False, verbose=False)["input_ids"]:
        ids += [*row, end]
    return torch.tensor(ids[:-1])


def windows(texts: Texts, tokenizer: Any, length: int, stride: int | None, separator: str | None) -> Windows:
    """The whole text as windows; DataError if it is shorter than one."""
    ids = token_stream(texts, tokenizer, separator)
    if len(ids) < length:
        raise DataError(
            f"{texts.origin} is shorter than one window", got=f"{len(ids)} tokens", allowed=f"at least {length}",
            do="give more text, or lower the length",
        )  # fmt: skip
    return Windows(ids, length, stride)


def sentences(
    texts: Texts, tokenizer: Any, length: int, label_ids: dict[str, int], *, by_length: bool = False
) -> Sentences:
    """Each row by itself, cut at `length` tokens; `label_ids` maps the model's label names to numbers.

    `by_length` sorts them, so that batches have little padding.
    """
    ids: list[list[int]] = tokenizer(texts.texts, truncation=True, max_length=length)["input_ids"]
    labels = None if texts.labels is None else _label_numbers(texts, label_ids)
    if by_length:
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        ids = [ids[i] for i in order]
        labels = None if labels is None else [labels[i] for i in order]
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return Sentences(ids, labels, pad)


def _label_numbers(texts: Texts, label_ids: dict[str, int]) -> list[int]:
    known = {str(number): number for number in label_ids.values()} | label_ids
    numbers = []
    for row, label in enumerate(texts.labels or []):
        number = known.get(str(int(label)) if isinstance(label, float) and label.is_integer() else str(label))
        if number is None:
            raise DataError(
                f"{texts.origin}: a label is not one of the model's", got=f"row {row}: {label!r}",
                allowed=", ".join(known), do="correct the file, or name the right column in `label`",
            )  # fmt: skip
        numbers.append(number)
    return numbers
