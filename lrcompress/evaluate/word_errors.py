"""Word error rate of what a model writes down."""

from collections.abc import Mapping
from typing import ClassVar, Literal, final

import torch

from lrcompress.evaluate.base import AbstractEvaluator, Sums
from lrcompress.tasks import Scored


@final
class WordErrors(AbstractEvaluator):
    """Words that are wrong, missing or too many in what the model hears."""

    kind: Literal["word_errors"] = "word_errors"
    needs_texts: ClassVar[bool] = True
    tasks: ClassVar[frozenset[str]] = frozenset({"speech-seq2seq"})
    definitions: ClassVar[Mapping[str, str]] = {
        "wer": "words to replace, to add and to take away, over the words that are said; greedy search, without regard "
        "to upper case and punctuation (jiwer)"
    }

    def sums(self, scored: Scored, dense: Scored | None) -> dict[str, Sums]:
        """Errors and words of each sequence."""
        import jiwer

        plain = jiwer.Compose(
            [jiwer.ToLowerCase(), jiwer.RemovePunctuation(), jiwer.RemoveMultipleSpaces(), jiwer.Strip()]
        )
        errors, words = [], []
        for said, heard in zip(plain(list(scored.wanted)), plain(list(scored.written)), strict=True):
            count = len(said.split())
            found = jiwer.process_words(said, heard) if count else None  # jiwer refuses an empty reference
            errors.append(found.substitutions + found.deletions + found.insertions if found else len(heard.split()))
            words.append(count)
        return {"wer": Sums.over(*(torch.tensor(x, dtype=torch.float64) for x in (errors, words)))}

    def higher_is_better(self, name: str) -> bool:
        """Lower is better."""
        return False
