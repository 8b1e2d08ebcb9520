"""Tasks of language models: the next token, masked tokens, a text that answers a text."""

from typing import Any, ClassVar, final

import torch
from torch import Tensor

from lrcompress.data import Examples, Rows
from lrcompress.data.examples import masked_windows, pairs, windows
from lrcompress.tasks.base import Batch, Scored
from lrcompress.tasks.model import AbstractModelTask, Cut, at_labels, decoder_start, random_tokens


@final
class CausalLM(AbstractModelTask):
    """Next-token prediction; `labels` [B, T] holds the ids to score, -100 elsewhere."""

    name = "causal-lm"
    auto_class = "AutoModelForCausalLM"
    endings = ("ForCausalLM", "LMHeadModel")

    def examples(self, rows: Rows, processor: Any, config: Any, cut: Cut) -> Examples:
        """Windows of the whole text."""
        return windows(rows, processor, cut.length, cut.stride, cut.separator)

    def scored(self, logits: Tensor, batch: Batch) -> Scored:
        """Position t predicts token t + 1."""
        return at_labels(logits[:, :-1], batch["labels"][:, 1:])


@final
class MaskedLM(AbstractModelTask):
    """Masked tokens of a text, from both sides; `labels` [B, T] holds them, -100 elsewhere."""

    name = "masked-lm"
    auto_class = "AutoModelForMaskedLM"
    endings = ("ForMaskedLM",)

    def examples(self, rows: Rows, processor: Any, config: Any, cut: Cut) -> Examples:
        """Windows of the whole text, each with the same tokens masked whenever it is read."""
        return masked_windows(rows, processor, cut.length, cut.stride, cut.separator)

    def scored(self, logits: Tensor, batch: Batch) -> Scored:
        """The masked tokens."""
        return at_labels(logits, batch["labels"])


@final
class Seq2SeqLM(AbstractModelTask):
    """A text that answers a text; `labels` [B, U] are its ids, given the ones before."""

    name = "seq2seq-lm"
    auto_class = "AutoModelForSeq2SeqLM"
    endings = ("ForConditionalGeneration", "MTModel")
    arguments: ClassVar[tuple[str, ...]] = (
        "input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask",
    )  # fmt: skip
    masks: ClassVar[tuple[str, ...]] = ("attention_mask", "decoder_attention_mask")

    def examples(self, rows: Rows, processor: Any, config: Any, cut: Cut) -> Examples:
        """Pairs of texts."""
        return pairs(rows, processor, cut.length, decoder_start(config))

    def example_inputs(self, config: Any, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Both sides `length` tokens long."""
        answer = random_tokens(config, batch, length, generator)
        return random_tokens(config, batch, length, generator) | {"decoder_input_ids": answer["input_ids"]}

    def scored(self, logits: Tensor, batch: Batch) -> Scored:
        """Each token of the answer."""
        return at_labels(logits, batch["labels"])
