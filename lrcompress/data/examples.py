"""Sequences of token ids that can be taken by number, from rows of text."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor

from lrcompress.data.rows import Rows
from lrcompress.errors import DataError, ModelError
from lrcompress.seeds import generator

IGNORED = -100
"""The label of a position that is not scored."""


class Examples(ABC):
    """Inputs of a model that can be taken by number."""

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Keyword arguments of the model, and `labels` where there are any; B first in each."""

    def batches(self, size: int, start: int = 0, *, among: Iterable[int] | None = None) -> Iterator[dict[str, Tensor]]:
        """All sequences, or those of these numbers, from the shortest on; from batch number `start` on."""
        order = self.from_shortest(range(len(self)) if among is None else among)
        for first in range(start * size, len(order), size):
            yield self.batch(order[first : first + size])

    def size(self, index: int) -> int:
        """Tokens of a sequence, where sequences differ in them; batches of like ones have little padding."""
        return 0

    def from_shortest(self, indices: Iterable[int]) -> list[int]:
        """These sequences from the shortest on, equal ones in the data's order."""
        return sorted(indices, key=lambda index: (self.size(index), index))


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
                labels[row, : self.starts[i - 1] + self.length - self.starts[i]] = IGNORED
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}


@final
class MaskedWindows(Examples):
    """Windows of one long text in which 15 % of the tokens are to be found, as in BERT's training.

    Of those 80 % are shown as the mask token, 10 % as a random one, 10 % as they are (arXiv 1810.04805, section 3.1).
    Which ones follows from the window's number, so that every row of a report sees the same.
    """

    def __init__(self, ids: Tensor, length: int, stride: int | None, around: tuple[list[int], list[int]], mask: int,
                 vocabulary: int) -> None:  # fmt: skip
        """`around`: the special tokens before and after each window; `length` counts them."""
        self.before, self.after = (torch.tensor(part, dtype=torch.long) for part in around)
        self.ids, self.width = ids, length - len(self.before) - len(self.after)
        self.mask, self.vocabulary = mask, vocabulary
        last = len(ids) - self.width
        self.starts = [*range(0, last, min(stride or self.width, self.width)), last]

    def __len__(self) -> int:
        return len(self.starts)

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`labels` [B, T] are the tokens to find, IGNORED elsewhere."""
        shown, labels = zip(*(self._one(i) for i in indices), strict=True)
        ids = torch.stack(shown)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.stack(labels)}

    def _one(self, index: int) -> tuple[Tensor, Tensor]:
        draw = generator(index, "masked tokens")
        ids = self.ids[self.starts[index] : self.starts[index] + self.width]
        order = torch.randperm(self.width, generator=draw)
        chosen = order[: max(round(0.15 * self.width), 1)]
        fate = torch.rand(len(chosen), generator=draw)
        random = torch.randint(self.vocabulary, (len(chosen),), generator=draw)
        shown, labels = ids.clone(), torch.full_like(ids, IGNORED)
        labels[chosen] = ids[chosen]
        shown[chosen] = torch.where(fate < 0.8, self.mask, torch.where(fate < 0.9, random, ids[chosen]))
        outside = [torch.full_like(part, IGNORED) for part in (self.before, self.after)]
        return torch.cat([self.before, shown, self.after]), torch.cat([outside[0], labels, outside[1]])


@final
class Sentences(Examples):
    """Texts or pairs of them, padded to the longest of their batch; a label each, or a list with one for each token."""

    def __init__(
        self, ids: list[list[int]], labels: list[Any] | None, pad: int, types: list[list[int]] | None = None
    ) -> None:
        """`types`: which text of a pair each token is of, for models that read it."""
        self.ids, self.labels, self.pad, self.types = ids, labels, pad, types

    def __len__(self) -> int:
        return len(self.ids)

    def size(self, index: int) -> int:
        """Its tokens."""
        return len(self.ids[index])

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`labels` only where the data have them: [B], or [B, T] with IGNORED at padding."""
        batch = padded([self.ids[i] for i in indices], self.pad)
        if self.types is not None:
            batch["token_type_ids"] = padded([self.types[i] for i in indices], 0)["input_ids"]
        if self.labels is not None:
            chosen: list[Any] = [self.labels[i] for i in indices]
            of_tokens = isinstance(chosen[0], list)
            batch["labels"] = padded(chosen, IGNORED)["input_ids"] if of_tokens else torch.tensor(chosen)
        return batch


@final
class Pairs(Examples):
    """Texts with a text to write for each, both padded to the longest of their batch."""

    def __init__(self, ids: list[list[int]], targets: list[list[int]], pad: int, start: int) -> None:
        """`start`: what the decoder begins with."""
        self.ids, self.targets, self.pad, self.start = ids, targets, pad, start

    def __len__(self) -> int:
        return len(self.ids)

    def size(self, index: int) -> int:
        """Tokens of both texts."""
        return len(self.ids[index]) + len(self.targets[index])

    def batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """`labels` [B, U] and the decoder's inputs, which are one step behind them."""
        batch = padded([self.ids[i] for i in indices], self.pad)
        return batch | decoder_inputs(
            [self.targets[i] for i in indices], self.pad, self.start, batch["input_ids"].shape[1]
        )


def padded(rows: Sequence[list[int]], pad: int, *, at_least: int = 0) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T] of rows of different lengths, int64."""
    width = max(at_least, *(len(row) for row in rows))
    ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows], dtype=torch.long)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def decoder_inputs(targets: Sequence[list[int]], pad: int, start: int, encoder_length: int) -> dict[str, Tensor]:
    """`labels`, `decoder_input_ids` and `decoder_attention_mask` [B, U], with U other than the encoder's T.

    So a layer's tokens tell by their shape which mask is theirs.
    """
    longest = max(map(len, targets))
    width = longest + (longest == encoder_length)
    labels = padded(targets, IGNORED, at_least=width)["input_ids"]
    shifted = padded([[start, *row[:-1]] for row in targets], pad, at_least=width)
    return {
        "labels": labels,
        "decoder_input_ids": shifted["input_ids"],
        "decoder_attention_mask": shifted["attention_mask"],
    }


def token_stream(rows: Rows, tokenizer: Any, separator: str | None) -> Tensor:
    """All rows as one stream of ids [N], joined by the separator or the tokenizer's end of text."""
    end = tokenizer.eos_token_id
    if separator is not None or end is None:
        joined = ("\n\n" if separator is None else separator).join(rows.inputs)
        return torch.tensor(tokenizer(joined, add_special_tokens=False, verbose=False)["input_ids"])
    ids: list[int] = []
    for row in tokenizer(rows.inputs, add_special_tokens=False, verbose=False)["input_ids"]:
        ids += [*row, end]
    return torch.tensor(ids[:-1])


def windows(rows: Rows, tokenizer: Any, length: int, stride: int | None, separator: str | None) -> Windows:
    """The whole text as windows; DataError if it is shorter than one."""
    ids = token_stream(rows, tokenizer, separator)
    _check_long_enough(len(ids), length, rows.origin)
    return Windows(ids, length, stride)


def _check_long_enough(count: int, length: int, origin: str) -> None:
    if count < length:
        raise DataError(
            f"{origin} is shorter than one window", got=f"{count} tokens", allowed=f"at least {length}",
            do="give more text, or lower the length",
        )  # fmt: skip


def sentences(
    rows: Rows, tokenizer: Any, length: int, label_ids: Mapping[str, int] | None, *, types: bool = False
) -> Sentences:
    """Each row by itself, cut at `length` tokens, a pair where it is the longer one.

    `label_ids` maps the model's label names to numbers; None: labels are measured numbers. `types`: the model reads
    which text of a pair a token is of.
    """
    pairs = isinstance(rows.inputs[0], tuple)
    texts: Any = zip(*rows.inputs, strict=True) if pairs else (rows.inputs,)
    # some tokenizers make types only when they are asked to
    how = {"return_token_type_ids": True} if pairs and types else {}
    encoded = tokenizer(*map(list, texts), truncation=True, max_length=length, **how)
    ids: list[list[int]] = encoded["input_ids"]
    if pairs and (longest := max(map(len, ids))) > length:  # its special tokens alone are more
        raise DataError(
            "a pair of texts cannot be cut to the length", got=f"{longest} tokens", allowed=f"at most {length}",
            do="raise calibration.length, recovery.length and evaluation.length",
        )  # fmt: skip
    kinds: list[list[int]] | None = encoded["token_type_ids"] if how else None
    labels: list[Any] | None = None
    if rows.labels is not None and label_ids is None:
        labels = numbers(rows.labels, rows.origin)
    elif rows.labels is not None and label_ids is not None:
        labels = label_numbers(_named(rows.labels, rows.names, label_ids), rows.origin, label_ids)
    return Sentences(ids, labels, pad_of(tokenizer), kinds)


def _named(labels: list[Any], names: Sequence[str], label_ids: Mapping[str, int]) -> list[Any]:
    """Labels by the data set's names of its classes where these are the model's: it may number them otherwise."""
    own = {name.casefold(): number for name, number in label_ids.items()}
    if not names or not own.keys() >= {name.casefold() for name in names}:
        return labels
    known = {number: own[name.casefold()] for number, name in enumerate(names)}
    return [known.get(label, label) for label in labels]


def pad_of(tokenizer: Any) -> int:
    """The id that fills rows up; masked tokens, so that any will do where there is none."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0


def masked_windows(rows: Rows, tokenizer: Any, length: int, stride: int | None, separator: str | None) -> MaskedWindows:
    """The whole text as windows for a masked LM. DataError if it is shorter than one, ModelError without a mask."""
    if tokenizer.mask_token_id is None:
        raise ModelError("the model's tokenizer has no mask token", do="set `task`: masked-lm is for models like BERT")
    ids, around = token_stream(rows, tokenizer, separator), special_tokens(tokenizer)
    few = length - len(around[0]) - len(around[1])
    if few < 1:
        raise DataError(
            "a window has no room beside its special tokens", got=f"length {length}",
            allowed=f"at least {length - few + 1}", do="raise the length",
        )  # fmt: skip
    _check_long_enough(len(ids), few, rows.origin)
    return MaskedWindows(ids, length, stride, around, tokenizer.mask_token_id, len(tokenizer))


def special_tokens(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before and after a text."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    at = next(i for i in range(len(full)) if full[i : i + len(bare)] == bare)
    return full[:at], full[at + len(bare) :]


def labelled_tokens(rows: Rows, tokenizer: Any, length: int, label_ids: Mapping[str, int]) -> Sentences:
    """Lists of words, cut at `length` tokens, with each word's label at its first token."""
    if not tokenizer.is_fast:
        raise ModelError(
            "the model's tokenizer does not tell which tokens a word becomes", got=type(tokenizer).__name__,
            allowed="a fast tokenizer", do="save one beside the model: AutoTokenizer.from_pretrained(…, use_fast=True)",
        )  # fmt: skip
    encoded = tokenizer([list(words) for words in rows.inputs], is_split_into_words=True, truncation=True,
                        max_length=length)  # fmt: skip
    if rows.labels is None:
        return Sentences(encoded["input_ids"], None, pad_of(tokenizer))
    labels = []
    for row, (words, tags) in enumerate(zip(rows.inputs, rows.labels, strict=True)):
        if isinstance(tags, (str, bytes)) or not hasattr(tags, "__len__") or len(tags) != len(words):
            raise DataError(
                f"{rows.origin}: the labels of a row do not fit its words", got=f"row {row}: {tags!r:.80}",
                allowed=f"a list of {len(words)} labels", do="name the column of the tags in `label`",
            )  # fmt: skip
        numbers = label_numbers(list(tags), f"{rows.origin}, row {row}", label_ids)
        places = encoded.word_ids(row)
        firsts = [word is not None and word not in places[:at] for at, word in enumerate(places)]
        labels.append([numbers[word] if new else IGNORED for word, new in zip(places, firsts, strict=True)])
    return Sentences(encoded["input_ids"], labels, pad_of(tokenizer))


def pairs(rows: Rows, tokenizer: Any, length: int, start: int) -> Pairs:
    """Texts and the texts to write, each cut at `length` tokens. DataError without the latter."""
    kept = [i for i, answer in enumerate(rows.labels or []) if isinstance(answer, str) and answer.strip()]
    if kept:  # rows without an answer are left out
        rows = Rows([rows.inputs[i] for i in kept], [(rows.labels or [])[i] for i in kept], rows.origin)
    targets = written(rows)
    cut: dict[str, Any] = {"truncation": True, "max_length": length}
    ids = tokenizer(rows.inputs, **cut)["input_ids"]
    return Pairs(ids, tokenizer(text_target=targets, **cut)["input_ids"], pad_of(tokenizer), start)


def written(rows: Rows) -> list[str]:
    """The labels as texts that a model is to write. Raises DataError where they are none."""
    bad = None if rows.labels is None else next((x for x in rows.labels if not isinstance(x, str) or not x), None)
    if rows.labels is None or bad is not None:
        raise DataError(
            f"{rows.origin}: the task writes texts, and the data have none to compare them with",
            got="no column" if rows.labels is None else f"{bad!r:.80}", allowed="a column of texts",
            do="name it in the data source: `label` for seq2seq-lm, `text` for speech-seq2seq",
        )  # fmt: skip
    return rows.labels


def numbers(labels: Sequence[Any], origin: str) -> list[float]:
    """Labels that were measured, as floats; DataError at the first that is no finite number."""
    found = []
    for row, label in enumerate(labels):
        try:
            value = float(label)
        except (TypeError, ValueError, OverflowError):
            value = math.nan
        if not math.isfinite(value):
            raise DataError(
                f"{origin}: a label is no number, and the model has one output", got=f"row {row}: {label!r:.80}",
                allowed="a finite number", do="correct the file, or name the right column in `label`",
            )  # fmt: skip
        found.append(value)
    if len(found) > 1 and set(found) == {-1.0}:
        raise DataError(
            f"{origin}: every label is -1, which stands for hidden ones", got="-1", allowed="measured numbers",
            do="take another split, or no `label`",
        )  # fmt: skip
    return found


def label_numbers(labels: Sequence[Any], origin: str, label_ids: Mapping[str, int]) -> list[int]:
    """The model's numbers of class labels that are its names or numbers; DataError at the first that is neither."""
    known = {str(number): number for number in label_ids.values()} | dict(label_ids)
    numbers = []
    for row, label in enumerate(labels):
        number = known.get(str(int(label)) if isinstance(label, float) and label.is_integer() else str(label))
        if number is None:
            raise DataError(
                f"{origin}: a label is not one of the model's", got=f"row {row}: {label!r}",
                allowed=", ".join(known), do="correct the file, or name the right column in `label`",
            )  # fmt: skip
        numbers.append(number)
    return numbers
