"""What models are asked to do; `TASKS` is the registry of those that a recipe can name."""

from collections.abc import Mapping

from lrcompress.tasks.base import AbstractTask, Batch, Scored, first_tensor, fisher_probe, real_rows, to_device
from lrcompress.tasks.classify import ImageClassification, SequenceClassification, TokenClassification
from lrcompress.tasks.embed import FeatureExtraction
from lrcompress.tasks.language import CausalLM, MaskedLM, Seq2SeqLM
from lrcompress.tasks.model import AbstractModelTask, Cut, tells_apart
from lrcompress.tasks.speech import SpeechSeq2Seq
from lrcompress.tasks.user import UserTask, default_forward

TASKS: Mapping[str, AbstractModelTask] = {
    task.name: task
    for task in (
        CausalLM(), MaskedLM(), SequenceClassification(), TokenClassification(), ImageClassification(),
        SpeechSeq2Seq(), Seq2SeqLM(), FeatureExtraction(),
    )
}  # fmt: skip
"""By name, in the order in which a model's architecture is looked up."""

__all__ = [
    "TASKS", "AbstractModelTask", "AbstractTask", "Batch", "CausalLM", "Cut", "FeatureExtraction",
    "ImageClassification", "MaskedLM", "Scored", "Seq2SeqLM", "SequenceClassification", "SpeechSeq2Seq",
    "TokenClassification", "UserTask", "default_forward", "fisher_probe", "first_tensor", "real_rows",
    "tells_apart", "to_device",
]  # fmt: skip
