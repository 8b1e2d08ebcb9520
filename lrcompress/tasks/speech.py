"""The task of speech recognition by an encoder and a decoder, as Whisper does it."""

import copy
from typing import Any, ClassVar, final

import torch
from torch import Tensor, nn

from lrcompress.data import Examples, Kind, Rows
from lrcompress.data.examples import IGNORED
from lrcompress.data.media import sounds
from lrcompress.errors import DataError, ModelError
from lrcompress.tasks.base import Batch, Scored
from lrcompress.tasks.model import AbstractModelTask, Cut, at_labels, decoder_start

_MULTILINGUAL = 51865
"""Vocabularies of Whisper from this size on have tokens of languages, as transformers tells the two kinds apart."""


@final
class SpeechSeq2Seq(AbstractModelTask):
    """What is said in a sound; `labels` [B, U] are its ids, given the ones before."""

    name = "speech-seq2seq"
    auto_class = "AutoModelForSpeechSeq2Seq"
    endings = ("ForConditionalGeneration", "ForSpeechSeq2Seq")
    kind: ClassVar[Kind] = "audio"
    processor: ClassVar[str] = "AutoProcessor"
    arguments: ClassVar[tuple[str, ...]] = ("input_features", "decoder_input_ids", "decoder_attention_mask")
    masks: ClassVar[tuple[str, ...]] = ("decoder_attention_mask",)

    def examples(self, rows: Rows, processor: Any, config: Any, cut: Cut) -> Examples:
        """Sounds with what is said."""
        if config.model_type != "whisper":
            raise ModelError(
                "speech-seq2seq knows Whisper's inputs", got=config.model_type, allowed="whisper",
                do="name a Whisper model",
            )  # fmt: skip
        many = config.vocab_size >= _MULTILINGUAL
        if many and cut.language is None:
            raise DataError(
                "the model knows many languages, and writes after a token of the one that it hears", got="no language",
                allowed="a language's name or code", do="set `language` of each data source: en, say",
            )  # fmt: skip
        if many:
            processor = copy.deepcopy(processor)  # the language is these data's, the tokenizer the caller's
            processor.tokenizer.set_prefix_tokens(language=cut.language, task="transcribe")
        return sounds(rows, processor, cut.length, decoder_start(config))

    def example_inputs(self, config: Any, batch: int, length: int, generator: torch.Generator) -> dict[str, Tensor]:
        """Noise of the encoder's full length, and `length` tokens of the decoder's vocabulary."""
        frames = 2 * config.max_source_positions  # two frames become one position
        return {
            "input_features": torch.randn(batch, config.num_mel_bins, frames, generator=generator),
            "decoder_input_ids": torch.randint(config.vocab_size, (batch, length), generator=generator),
        }

    def scored(self, logits: Tensor, batch: Batch) -> Scored:
        """Each token of what is said."""
        return at_labels(logits, batch["labels"])

    def read_texts(self, model: nn.Module, batch: Batch, processor: Any) -> tuple[list[str], list[str]]:
        """What the model hears, and what is said."""
        generate: Any = model.generate
        heard = generate(input_features=batch["input_features"], do_sample=False, num_beams=1)
        said = [row[row != IGNORED] for row in batch["labels"]]
        first, second = (processor.batch_decode(ids, skip_special_tokens=True) for ids in (heard, said))
        return first, second
