"""Rows of a data source with their labels: texts, words, images, sounds; from files, folders, the Hub or the stdlib."""

import csv
import hashlib
import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from lrcompress import hub
from lrcompress.errors import DataError, nearest
from lrcompress.part import Part
from lrcompress.stdlib import SPLITS, module_files, read_modules

STDLIB = "python-stdlib"
SUFFIXES = (".txt", ".jsonl", ".csv", ".tsv", ".parquet")

Kind = Literal["text", "words", "image", "audio"]
"""What an input is: a string or a pair of them, a tuple of strings, or stored media"""

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")


class DataSource(Part):
    """A local file or folder, or a Hub data set."""

    path: str = Field(min_length=1)
    """a .txt, .jsonl, .csv, .tsv or .parquet file, a Hub data set, or `python-stdlib`; for images a folder with a
    folder for each label; for sounds one with a metadata.csv (columns file_name and text)"""
    name: str | None = None
    """configuration of a Hub data set"""
    split: str | None = None
    """split of a Hub data set or of `python-stdlib` (train, validation, test)"""
    text: str | int = "text"
    """column of the text: a name, or a number from 0 for files without a header; for token-classification, of the list
    of words; for seq2seq-lm, of what the encoder reads; for speech-seq2seq, of what is said"""
    text_pair: str | int | None = None
    """column of a second text that belongs to the first, for sequence-classification: a hypothesis, an answer"""
    label: str | int | None = None
    """column of the class label, or of the number that a model with one output gives; for token-classification, of the
    list of tags; for seq2seq-lm, of the text to write"""
    image: str = "image"
    """column of the images of a Hub data set, or of their files' names in a table"""
    audio: str | None = None
    """column of the sounds of a Hub data set (null: audio), or of their files' names in a table (null: file_name)"""
    language: str | None = None
    """what is said in sounds, for a Whisper of many languages: a name or code, en"""
    separator: str | None = None
    """put between rows when they are joined to one text; null: the tokenizer's end of text"""

    @property
    def local(self) -> bool:
        """Whether this is a file or a folder."""
        return self.path != STDLIB and (self.path.endswith(SUFFIXES) or Path(self.path).exists())


class Data(Part):
    """Where data come from; choices belong on validation, the report's numbers come from test."""

    train: DataSource
    """calibration and recovery"""
    validation: DataSource | None = None
    """for choosing between recipes: `evaluation.split: validation`"""
    test: DataSource | None = None
    """the numbers of the report"""


@dataclass(frozen=True)
class Media:
    """An image or a sound as it is stored: the bytes of a file, or the file's place."""

    place: str
    content: bytes | None = None

    def read(self) -> bytes:
        """The file's bytes. Raises DataError if it is not there."""
        if self.content is not None:
            return self.content
        try:
            return Path(self.place).read_bytes()
        except OSError as error:
            raise DataError("a file of the data cannot be read", got=f"{self.place}: {error}") from error


@dataclass(frozen=True)
class Rows:
    """Inputs of one kind, and labels as they stand there."""

    inputs: list[Any]
    """str, tuple of str, or Media"""
    labels: list[Any] | None
    origin: str
    duplicates: int = 0
    names: tuple[str, ...] = ()
    """the data set's own names of the classes that its labels number, of a Hub data set of texts"""

    def without_duplicates(self) -> "Rows":
        """The first of equal inputs; calibration on copies only gives them more weight."""
        first = {value: i for i, value in reversed(list(enumerate(self.inputs)))}
        chosen = sorted(first.values())
        labels = None if self.labels is None else [self.labels[i] for i in chosen]
        dropped = len(self.inputs) - len(chosen)
        return Rows([self.inputs[i] for i in chosen], labels, self.origin, dropped, self.names)


def read_rows(source: DataSource, kind: Kind = "text") -> Rows:
    """All non-empty rows of a source. Raises DataError that says what is there instead."""
    if source.path == STDLIB:
        split = source.split or "train"
        if split not in SPLITS:
            raise DataError(
                f"unknown split of {STDLIB}", got=split, allowed=", ".join(SPLITS), do="correct data.….split"
            )
        if kind != "text":
            raise DataError(f"{STDLIB} holds texts", got=f"a task that reads {kind}", do="name other data")
        return Rows(read_modules(split), None, f"{STDLIB}/{split}")
    if source.local and Path(source.path).is_dir():
        if kind == "image":
            return _image_folder(source)
        if kind == "audio":
            table = source.model_copy(update={"path": str(Path(source.path) / "metadata.csv")})
            return _from_columns(_read_file(table), table, kind)
    frame, names = (_read_file(source), ()) if source.local else _read_hub(source, kind)
    return replace(_from_columns(frame, source, kind), names=names)


def fingerprint(source: DataSource) -> str:
    """What changes when the data do: a file's content, or the name of a Hub data set."""
    digest = hashlib.sha256(source.model_dump_json().encode())
    if source.path == STDLIB:
        for file in module_files(source.split or "train"):
            digest.update(file.read_bytes())
    elif source.local and Path(source.path).is_file():
        digest.update(Path(source.path).read_bytes())
    elif source.local:
        for file in _files(Path(source.path)):  # a folder of media may be large: names, sizes and times stand for it
            found = file.stat()
            digest.update(f"{file.relative_to(source.path)} {found.st_size} {found.st_mtime_ns}".encode())
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


def _read_hub(source: DataSource, kind: Kind) -> tuple[Any, tuple[str, ...]]:
    """A pandas frame, and the names of the classes that its labels number."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        with nullcontext() if hub.answers(source.path, "dataset") else hub.offline():
            rows: Any = datasets.load_dataset(source.path, source.name, split=source.split or "train")
    except (FileNotFoundError, ConnectionError, ValueError, HfHubHTTPError, OSError) as error:
        raise DataError(
            f"data set `{source.path}` is neither a local file nor reachable on the Hub",
            got=f"{type(error).__name__}: {error}",
            allowed=f"a file that ends in {', '.join(SUFFIXES)}, a Hub data set id, or {STDLIB}",
            do="correct the path, or check the network (HF_HUB_OFFLINE, HF_ENDPOINT)",
        ) from error
    for name, feature in rows.features.items():
        if isinstance(feature, (datasets.Image, datasets.Audio)):
            rows = rows.cast_column(name, type(feature)(decode=False))  # opened when they are needed, by our own means
    wanted = [name for name in dict.fromkeys(_keys(source, kind).values()) if name in rows.column_names]
    names = rows.features.get(source.label)
    classes = tuple(names.names) if isinstance(names, datasets.ClassLabel) else ()
    frame = rows.select_columns(wanted).to_pandas() if None not in wanted and wanted else rows.to_pandas()
    if kind in ("image", "words") and source.label in frame:
        frame[source.label] = _named(frame[source.label], names)
        return frame, ()
    return frame, classes


def _named(column: Any, feature: Any) -> Any:
    """Class numbers by the data set's own names, which need not be numbered as the model's are."""
    import datasets

    inner = getattr(feature, "feature", feature)
    if not isinstance(inner, datasets.ClassLabel):
        return column

    def name(value: Any) -> Any:
        if hasattr(value, "__len__"):
            return [name(item) for item in value]
        return inner.int2str(int(value)) if value is not None and value >= 0 else value

    return column.map(name)


def _image_folder(source: DataSource) -> Rows:
    root = Path(source.path)
    files = [file for file in _files(root) if file.suffix.lower() in IMAGE_SUFFIXES]
    if not files:
        raise DataError(
            f"{source.path} has no images", got=f"{len(_files(root))} files", allowed=", ".join(IMAGE_SUFFIXES),
            do="name a folder that holds a folder of images for each label",
        )  # fmt: skip
    labels = [file.parent.name for file in files] if any(file.parent != root for file in files) else None
    return Rows([Media(str(file)) for file in files], labels, source.path)


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())


def _from_columns(frame: Any, source: DataSource, kind: Kind) -> Rows:
    keys = _keys(source, kind)
    known = list(frame.columns)
    for key, column in keys.items():
        if column is not None and column not in known:
            raise DataError(
                f"{source.path} has no column `{column}` (data source key `{key}`)",
                allowed=", ".join(map(str, known)),
                do=nearest(str(column), map(str, known)) or f"set `{key}` to one of them",
            )
    own, *more, other = keys.values()
    inputs = _inputs(frame[own].tolist(), kind, str(own), source)
    if more and more[0] is not None:
        inputs = list(zip(inputs, _inputs(frame[more[0]].tolist(), kind, str(more[0]), source), strict=True))
    labels = None if other is None else frame[other].tolist()
    kept = [i for i, value in enumerate(inputs) if kind != "text" or _has_text(value)]
    if kind == "audio" and labels is not None:  # silence is nothing to write down
        kept = [i for i in kept if isinstance(labels[i], str) and labels[i].strip()]
    if not kept:
        named = [other] if kind == "audio" else [own, *(column for column in more if column is not None)]
        raise DataError(
            f"{source.path} has no row with text in column {' and '.join(f'`{column}`' for column in named)}",
            got=f"{len(inputs)} blank rows", do="give at least one with text",
        )  # fmt: skip
    return Rows([inputs[i] for i in kept], None if labels is None else [labels[i] for i in kept], source.path)


def _keys(source: DataSource, kind: Kind) -> dict[str, str | int | None]:
    """The keys of the source that name columns of this kind of rows, with the columns: inputs first, labels last."""
    if kind == "image":
        return {"image": source.image, "label": source.label}
    if kind == "audio":
        return {"audio": source.audio or ("file_name" if source.local else "audio"), "text": source.text}
    pair: dict[str, str | int | None] = {"text_pair": source.text_pair} if kind == "text" else {}
    return {"text": source.text, **pair, "label": source.label}


def _has_text(value: str | tuple[str, str]) -> bool:
    return all(part.strip() for part in ((value,) if isinstance(value, str) else value))


def _inputs(values: list[Any], kind: Kind, column: str, source: DataSource) -> list[Any]:
    """The values of a column as a task reads them. Raises DataError at the first that is something else."""
    beside = Path(source.path).parent if source.local else Path()
    found, wanted = [], {"text": "text", "words": "a list of words"}.get(kind, "a file's name or content")
    for row, value in enumerate(values):
        if kind == "text" and (isinstance(value, str) or value is None or value != value):
            found.append(value if isinstance(value, str) else "")  # a missing one is a blank row
        elif kind == "words" and not isinstance(value, (str, bytes)) and hasattr(value, "__len__"):
            found.append(tuple(map(str, value)))
        elif kind in ("image", "audio") and isinstance(value, str):
            found.append(Media(str(beside / value)))
        elif kind in ("image", "audio") and isinstance(value, dict) and {"bytes", "path"} <= value.keys():
            found.append(Media(str(value["path"]), value["bytes"]))
        else:
            raise DataError(
                f"{source.path}: column `{column}` is not {wanted}", got=f"row {row}: {value!r:.80}",
                do=f"name the column that holds {'the text' if kind == 'text' else wanted}",
            )  # fmt: skip
    return found
