"""Rows come from files, the Hub or the standard library, and every way in which they can be wrong is said."""

import csv
import json
import time
from pathlib import Path
from typing import Any

import pandas
import pytest
import torch
from models import EOS, PAD, tiny_tokenizer, write_jsonl, write_tsv, write_txt

from lrcompress import stdlib
from lrcompress.data import (
    DataSource,
    Rows,
    Sentences,
    Windows,
    fingerprint,
    read_rows,
    sentences,
    token_stream,
    windows,
)
from lrcompress.errors import DataError

TOKENIZER = tiny_tokenizer()
LABELS = {"NEGATIVE": 0, "POSITIVE": 1}


def source(path: Path | str, **more: Any) -> DataSource:
    return DataSource(path=str(path), **more)


def refused(path: Path | str, **more: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(source(path, **more))
    return str(caught.value)


def ids(text: str) -> list[int]:
    return TOKENIZER(text, add_special_tokens=False)["input_ids"]


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# files --------------------------------------------------------------------------------------------------------


def test_a_txt_file_is_one_text(tmp_path: Path):
    file = write_txt(tmp_path / "a.txt", 5)
    texts = read_rows(source(file))
    assert texts.inputs == [file.read_text()]
    assert texts.labels is None
    assert texts.origin == str(file)


def test_jsonl_has_columns_by_name(tmp_path: Path):
    file = write_jsonl(tmp_path / "a.jsonl", 5)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    texts = read_rows(source(file, label="label"))
    assert texts.inputs == [row["text"] for row in rows]
    assert texts.labels == [row["label"] for row in rows]


def test_jsonl_text_that_looks_like_a_number_or_a_date_stays_text(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", '{"date": "2020-01-01"}\n{"date": "007"}\n')
    assert read_rows(source(file, text="date")).inputs == ["2020-01-01", "007"]


def test_csv_has_quotes_and_columns_by_name_or_number(tmp_path: Path):
    file = tmp_path / "a.csv"
    rows = [["body", "class"], ['one, "two"', "POSITIVE"], ["line\nbreak", "NEGATIVE"], ["NA", "POSITIVE"]]
    with file.open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    named = read_rows(source(file, text="body", label="class"))
    assert named.inputs == ['one, "two"', "line\nbreak", "NA"]
    assert named.labels == ["POSITIVE", "NEGATIVE", "POSITIVE"]
    numbered = read_rows(source(file, text=0, label=1))
    assert numbered.inputs == ["body", *named.inputs]


def test_tsv_columns_by_number_have_no_header(tmp_path: Path):
    file = write_tsv(tmp_path / "a.tsv", 7)
    rows = [line.split("\t") for line in file.read_text().splitlines()]
    texts = read_rows(source(file, text=0, label=1))
    assert texts.inputs == [row[0] for row in rows]
    assert texts.labels == [row[1] for row in rows]


def test_tsv_columns_by_name_have_one(tmp_path: Path):
    file = write_tsv(tmp_path / "a.tsv", 7, header=True)
    texts = read_rows(source(file, label="label"))
    assert len(texts.inputs) == 7
    assert "text" not in texts.inputs


def test_lone_quotes_in_tsv_are_text(tmp_path: Path):
    lines = ['a "fine film\t1', "it's bad\t0", '"\t1', 'said "yes" twice\t0']
    texts = read_rows(source(write(tmp_path / "a.tsv", "\n".join(lines) + "\n"), text=0, label=1))
    assert texts.inputs == ['a "fine film', "it's bad", '"', 'said "yes" twice']
    assert texts.labels == ["1", "0", "1", "0"]


def test_parquet(tmp_path: Path):
    frame = pandas.DataFrame({"sentence": ["one", "two"], "label": [1, 0]})
    frame.to_parquet(tmp_path / "a.parquet")
    texts = read_rows(source(tmp_path / "a.parquet", text="sentence", label="label"))
    assert texts.inputs == ["one", "two"]
    assert sentences(texts, TOKENIZER, 16, LABELS).labels == [1, 0]


def test_blank_rows_are_dropped_with_their_labels(tmp_path: Path):
    file = write(tmp_path / "a.tsv", "one\t1\n\t0\n  \t0\ntwo\t1\n")
    texts = read_rows(source(file, text=0, label=1))
    assert texts.inputs == ["one", "two"]
    assert texts.labels == ["1", "1"]


def test_the_first_of_equal_texts_stays():
    texts = Rows(["a", "b", "a", "c", "b"], [0, 1, 2, 3, 4], "here").without_duplicates()
    assert texts == Rows(["a", "b", "c"], [0, 1, 3], "here", duplicates=2)
    assert Rows(["a", "b"], None, "here").without_duplicates() == Rows(["a", "b"], None, "here")


# what is wrong with a file ------------------------------------------------------------------------------------


def test_a_missing_file_is_named_with_where_paths_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    message = refused("no/such.tsv")
    assert "no such data file" in message
    assert "no/such.tsv" in message
    assert str(tmp_path) in message
    assert ".parquet" in message


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "tsv", "parquet"])
def test_an_empty_file_is_refused(tmp_path: Path, suffix: str):
    (tmp_path / f"a.{suffix}").touch()
    assert "is empty" in refused(tmp_path / f"a.{suffix}")


@pytest.mark.parametrize(("name", "text"), [("a.txt", " \n\n"), ("a.tsv", "text\tlabel\n"), ("a.tsv", "text\n \n")])
def test_a_file_without_text_is_refused(tmp_path: Path, name: str, text: str):
    assert "no row with text in column `text`" in refused(write(tmp_path / name, text))


@pytest.mark.parametrize(("key", "column"), [("text", "txet"), ("label", "labl"), ("text", 0), ("label", 3)])
def test_a_missing_column_is_answered_with_the_columns(tmp_path: Path, key: str, column: str | int):
    message = refused(write_jsonl(tmp_path / "a.jsonl", 3), **{key: column})
    assert f"no column `{column}`" in message
    assert f"key `{key}`" in message
    assert "allowed: text, label" in message
    assert isinstance(column, int) or f"nearest: {key}" in message


def test_a_missing_numbered_column_is_answered_with_the_numbers(tmp_path: Path):
    assert "allowed: 0, 1" in refused(write_tsv(tmp_path / "a.tsv", 3), text=0, label=2)


def test_a_column_that_is_no_text_is_refused_with_its_first_row(tmp_path: Path):
    message = refused(write_jsonl(tmp_path / "a.jsonl", 3), text="label")
    assert "column `label` is not text" in message
    assert "row 0: " in message


def test_a_row_that_is_no_text_is_refused_with_its_number(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"text": ["b"]}\n')
    assert "row 1: " in refused(file)


def test_a_row_without_the_text_is_a_blank_one(tmp_path: Path):
    file = write(tmp_path / "a.jsonl", '{"text": "a"}\n\n{"body": "b"}\n')
    assert read_rows(source(file)).inputs == ["a"]


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", b"no json\n"),
        ("a.parquet", b"no parquet"),
        ("a.txt", b"\xff\xfe\xfa"),
        ("a.tsv", b"\xff\tx\n"),
        ("a.csv", b'a,b\n1,2\n1,2,3,4\n"'),
    ],
)
def test_a_file_of_another_kind_than_its_name_says(tmp_path: Path, name: str, data: bytes):
    (tmp_path / name).write_bytes(data)
    message = refused(tmp_path / name)
    assert f"cannot be read as {Path(name).suffix}" in message
    assert "do: " in message


def test_a_file_of_an_unknown_kind_is_answered_with_the_known(tmp_path: Path):
    assert ".jsonl" in refused(write(tmp_path / "a.docx", "x")).partition("allowed: ")[2]


def test_a_folder_is_no_data_file(tmp_path: Path):
    assert "no such data file" in refused(tmp_path)


def test_a_hub_data_set_out_of_reach_is_refused_quickly():
    began = time.perf_counter()
    message = refused("nobody/no-such-data-set", split="test")
    assert time.perf_counter() - began < 20
    assert "neither a local file nor reachable on the Hub" in message
    assert "nobody/no-such-data-set" in message
    assert "check the network" in message


# labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [["0", "1"], [0, 1], [0.0, 1.0], ["NEGATIVE", "POSITIVE"], ["NEGATIVE", 1]])
def test_labels_are_the_models_numbers_or_names(labels: list[Any]):
    assert sentences(Rows(["a", "b"], labels, "here"), TOKENIZER, 16, LABELS).labels == [0, 1]


@pytest.mark.parametrize("label", [2, "2", -1, 0.5, "positive", "", float("nan"), None])
def test_a_label_that_is_not_the_models_is_refused_with_its_row(label: Any):
    with pytest.raises(DataError, match=r"(?s)here: a label.*row 1: .*allowed: 0, 1, NEGATIVE, POSITIVE"):
        sentences(Rows(["a", "b"], [1, label], "here"), TOKENIZER, 16, LABELS)


# fingerprints -------------------------------------------------------------------------------------------------


def test_a_fingerprint_follows_content_and_settings(tmp_path: Path):
    file = write_txt(tmp_path / "a.txt", 5)
    first = fingerprint(source(file))
    assert fingerprint(source(file)) == first
    assert fingerprint(source(file, separator="\n")) != first
    file.write_text(file.read_text() + "more")
    assert fingerprint(source(file)) != first


# one text as windows ------------------------------------------------------------------------------------------


def test_rows_are_joined_by_the_tokenizers_end_of_text():
    stream = token_stream(Rows(["ab", "c"], None, "here"), TOKENIZER, None)
    assert stream.tolist() == [*ids("ab"), EOS, *ids("c")]


@pytest.mark.parametrize("separator", ["\n\n", " ", ""])
def test_rows_are_joined_by_a_separator(separator: str):
    stream = token_stream(Rows(["ab", "c"], None, "here"), TOKENIZER, separator)
    assert stream.tolist() == ids(f"ab{separator}c")


def test_rows_are_joined_by_a_blank_line_where_the_tokenizer_has_no_end_of_text():
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    assert token_stream(Rows(["ab", "c"], None, "here"), tokenizer, None).tolist() == ids("ab\n\nc")


@pytest.mark.parametrize("stride", [None, 1, 3, 7, 8, 100])
@pytest.mark.parametrize("count", [8, 9, 15, 16, 40, 43])
def test_windows_score_each_token_but_the_first_once(count: int, stride: int | None):
    stream = torch.arange(count)
    examples = Windows(stream, 8, stride)
    scored: list[int] = []
    for batch in examples.batches(3):
        assert batch["input_ids"].shape[1] == 8
        assert batch["attention_mask"].all()
        for row, labels in zip(batch["input_ids"], batch["labels"], strict=True):
            assert (labels[labels != -100] == row[labels != -100]).all()
            scored += labels[1:][labels[1:] != -100].tolist()  # a window's first token has nothing before it
    assert scored == list(range(1, count))


def test_windows_with_a_stride_see_the_tokens_before():
    batch = Windows(torch.arange(12), 8, 4).batch([1])
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7, 8, 9, 10, 11]]
    assert batch["labels"].tolist() == [[-100, -100, -100, -100, 8, 9, 10, 11]]


def test_batches_go_on_at_a_number():
    examples = Windows(torch.arange(40), 8)
    whole = [batch["input_ids"].tolist() for batch in examples.batches(2)]
    assert [batch["input_ids"].tolist() for batch in examples.batches(2, start=2)] == whole[2:]
    assert sum(map(len, whole)) == len(examples)


def test_a_text_shorter_than_one_window_is_refused_with_both_lengths():
    texts = Rows(["abcde"], None, "here")
    assert len(windows(texts, TOKENIZER, 5, None, None)) == 1
    with pytest.raises(DataError, match=r"(?s)here is shorter than one window.*5 tokens.*at least 6.*do: "):
        windows(texts, TOKENIZER, 6, None, None)


# texts by themselves ------------------------------------------------------------------------------------------


def test_sentences_are_padded_to_the_longest_of_their_batch():
    examples = sentences(Rows(["abc", "d", "efghij"], [1, 0, 1], "here"), TOKENIZER, 16, LABELS)
    batch = examples.batch([0, 1])
    assert batch["input_ids"].tolist() == [ids("abc"), [*ids("d"), PAD, PAD]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    assert [b["input_ids"].shape for b in examples.batches(2)] == [(2, 3), (1, 6)]


def test_sentences_are_cut_at_the_length():
    assert sentences(Rows(["abcdefgh"], None, "here"), TOKENIZER, 3, LABELS).ids == [ids("abc")]


def test_batches_go_from_the_shortest_on_and_keep_their_labels():
    examples = sentences(Rows(["abcd", "d", "abc", "e"], [1, 0, 1, 1], "here"), TOKENIZER, 16, LABELS)
    assert examples.from_shortest([2, 0, 3]) == [3, 2, 0]
    found = list(examples.batches(2))
    assert [batch["input_ids"].shape[1] for batch in found] == [1, 4]
    assert [batch["labels"].tolist() for batch in found] == [[0, 1], [1, 1]]
    (last,) = examples.batches(2, start=1)
    assert last["input_ids"].tolist() == [[*ids("abc"), PAD], ids("abcd")]


def test_sentences_without_labels_give_none():
    assert "labels" not in Sentences([[1, 2]], None, PAD).batch([0])


def test_padding_is_masked_even_where_its_id_is_a_token():
    batch = Sentences([[PAD, 1], [2]], None, PAD).batch([0, 1])
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


# the standard library -----------------------------------------------------------------------------------------


def test_the_standard_librarys_splits_are_disjoint_and_not_empty():
    files = {split: set(stdlib.module_files(split)) for split in ("train", "validation", "test")}
    for split, held_out in stdlib.HELD_OUT.items():
        names = {part.removesuffix(".py") for file in files[split] for part in file.parts}
        assert sum(module in names for module in held_out) >= len(held_out) - 1  # modules come and go with versions
    assert len(files["train"]) > 10 * len(files["test"])
    assert not files["train"] & files["test"]
    assert not files["train"] & files["validation"]
    assert not files["test"] & files["validation"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_standard_library_is_a_data_source(split: str):
    texts = read_rows(source("python-stdlib", split=split))
    assert len(texts.inputs) >= 5
    assert all(text.strip() for text in texts.inputs)
    assert texts.origin == f"python-stdlib/{split}"


def test_an_unknown_split_of_the_standard_library_is_refused():
    assert "train, validation, test" in refused("python-stdlib", split="dev")
