"""Where a model comes from: a Hub id, a local folder, or the built-in demo."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from lrcompress import hub
from lrcompress.errors import ModelError
from lrcompress.experts import unfuse
from lrcompress.hf import saved_ranks
from lrcompress.tasks import TASKS, AbstractModelTask

DEMO = Path(__file__).parent / "demo"


@dataclass(frozen=True)
class ModelSource:
    """A model that exists: its config is read, its weights are not."""

    id: str
    """as the user wrote it, without the revision"""
    path: str
    """what from_pretrained gets"""
    revision: str | None
    """the commit on the Hub; None elsewhere"""
    config: Any
    kind: Literal["hub", "local", "demo"]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that the checkpoint is stored in, and the result will be."""
        dtype = getattr(self.config, "dtype", None)
        return dtype if isinstance(dtype, torch.dtype) else torch.float32

    @property
    def name(self) -> str:
        """A short name for folders."""
        return Path(self.id).resolve().name if self.kind == "local" else self.id.replace("/", "--")


def open_source(text: str) -> ModelSource:
    """Read the config of `demo`, a local folder, or `id[@revision]` on the Hub.

    A branch or tag becomes the commit that it stands for. Raises ModelError if there is no such model in either place,
    or if it is already compressed.
    """
    if text == "demo":
        source = ModelSource("demo", str(DEMO), None, _config(str(DEMO), text), "demo")
    elif Path(text).is_dir():
        source = ModelSource(text, text, None, _config(text, text), "local")
    else:
        name, _, revision = text.partition("@")
        found = hub.find(name, revision or None)
        path = name if found.reached else str(found.folder)  # by name, each load would wait for the Hub
        source = ModelSource(name, path, found.commit, _config(str(found.folder), name), "hub")
    if saved_ranks(source.config):
        raise ModelError(
            f"`{text}` is already compressed", got="quantization_config.quant_method lrcompress",
            allowed="a dense model", do="compress the model it was made from, or merge it first (lrcompress.merge)",
        )  # fmt: skip
    if getattr(source.config, "quantization_config", None):
        raise ModelError(
            f"`{text}` is quantised", got=source.config.quantization_config, allowed="a dense model",
            do="compress the unquantised model, then quantise the result",
        )  # fmt: skip
    return source


def task_name(config: Any, asked: str) -> str:
    """The task of a recipe, `auto` resolved by the config's architecture."""
    if asked != "auto":
        return asked
    names = getattr(config, "architectures", None) or ["nothing"]
    for name, task in TASKS.items():
        if names[0].endswith(task.endings) and type(config) in auto_class(name)._model_mapping:
            return name
    endings = dict.fromkeys(ending for task in TASKS.values() for ending in task.endings)
    raise ModelError(
        "the task does not follow from the model's config", got=f"architecture {names[0]}",
        allowed=f"an architecture that ends in {', '.join(endings)}, or task: {' | '.join(TASKS)}",
        do="set `task` in the recipe",
    )  # fmt: skip


def auto_class(task: str) -> Any:
    """The transformers class that loads a model for a task."""
    return getattr(transformers, TASKS[task].auto_class)


def skeleton(source: ModelSource, task: str) -> nn.Module:
    """The model on the meta device: names and shapes, no weights. ModelError where there is none for the task."""
    try:
        with torch.device("meta"):
            model = auto_class(task).from_config(source.config)
    except ValueError as error:
        raise ModelError(
            f"transformers has no {TASKS[task].auto_class} for `{source.id}`", got=source.config.model_type,
            allowed=f"a model of task {task}", do="correct `task` in the recipe, or name another model",
        ) from error  # fmt: skip
    unfuse(model)
    return model


def load_model(
    source: ModelSource, task: str, device: torch.device, dtype: torch.dtype, *, fused: bool = False
) -> PreTrainedModel:
    """The dense model with its weights, in eval mode; experts as Linears unless `fused`.

    Raises ModelError for weights that are not finite, and for ones that are not in the checkpoint: transformers
    makes those up.
    """
    transformers.utils.logging.disable_progress_bar()  # ours are the only bars of a run
    try:
        model, found = auto_class(task).from_pretrained(
            source.path, revision=source.revision, dtype=dtype, output_loading_info=True
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"the weights of `{source.id}` cannot be loaded", got=str(error), do=_advice(source, "check the model")
        ) from error
    missing = [name for name, _ in model.named_parameters() if name in found["missing_keys"]]
    if task == "feature-extraction":  # its pooler is not read, and many checkpoints have none
        for name in [name for name in missing if name.startswith("pooler.")]:
            model.get_parameter(name).data.zero_()
            missing.remove(name)
    if missing:
        raise ModelError(
            f"the checkpoint of `{source.id}` lacks weights that task {task} needs", got=f"no {', '.join(missing[:4])}",
            allowed=f"a checkpoint of {type(model).__name__}", do="name a model that was trained for the task",
        )  # fmt: skip
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            count = int((~torch.isfinite(parameter)).sum())
            raise ModelError(
                f"`{source.id}` has weights that are not finite", got=f"{count} in {name}", allowed="finite numbers",
                do="use a sound checkpoint",
            )  # fmt: skip
    if not fused:
        unfuse(model)
    return model.eval().to(device)


def load_processor(source: ModelSource, kind: str, **more: Any) -> Any:
    """The model's tokenizer, image processor or both: `kind` is the transformers class. ModelError if there is none."""
    try:
        processor = getattr(transformers, kind).from_pretrained(source.path, revision=source.revision, **more)
    except (OSError, ValueError, ImportError) as error:
        what = kind.removeprefix("Auto").replace("ImageP", "image p").lower()
        raise ModelError(
            f"the {what} of `{source.id}` cannot be loaded", got=str(error), do=_advice(source, "check the model")
        ) from error
    if getattr(processor, "vocab_size", 1) == 0:  # what transformers makes of a model without tokenizer files
        raise ModelError(
            f"`{source.id}` has no tokenizer", got="an empty vocabulary", allowed="a tokenizer beside the model",
            do=_advice(source, "save the tokenizer to the model's folder"),
        )  # fmt: skip
    return processor


def companions(source: ModelSource, task: AbstractModelTask) -> dict[str, Path]:
    """Files beside the model that belong to the task, by their place in its folder, where they exist."""
    found = {
        name: cached_file(
            source.path, name, revision=source.revision, _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False, _raise_exceptions_for_gated_repo=False,
        )
        for name in task.companions
    }  # fmt: skip
    return {name: Path(place) for name, place in found.items() if place is not None}


def identity(source: ModelSource) -> str:
    """What changes when the weights do: the commit on the Hub, or a hash of a folder's config and weights."""
    if source.kind == "hub":
        return f"{source.id}@{source.revision}"
    digest = hashlib.sha256()
    root = Path(source.path)
    for file in sorted([*root.iterdir(), *root.glob("*/config.json")]):  # the latter: the pooling of an embedding model
        if file.suffix in (".json", ".safetensors", ".bin", ".txt", ".model"):
            digest.update(file.name.encode())
            digest.update(_file_digest(file))
    return digest.hexdigest()


def stated_license(source: ModelSource) -> tuple[str | None, str]:
    """The licence that the model's card states, several joined by commas, and why the card cannot be read, or "".

    None where it states none, or there is no card.
    """
    from huggingface_hub import ModelCard

    card: Path | None = Path(source.path) / "README.md"
    if source.path == source.id and source.revision is not None:
        card = hub.card_file(source.id, source.revision)
    if card is None or not card.is_file():
        return None, ""
    try:
        found = ModelCard.load(card, ignore_metadata_errors=True).data.get("license")
    except Exception as error:  # people write these: the parser's errors, those of the text, those of the client
        return None, f"{type(error).__name__}: {_first_line(error)}"
    names = found if isinstance(found, list) else [found]
    return ", ".join(str(name) for name in names if name) or None, ""


def _file_digest(file: Path) -> bytes:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.digest()


def _config(folder: str, name: str) -> Any:
    try:
        return transformers.AutoConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"`{name}` is without a usable config.json", got=_first_line(error),
            allowed="a model that transformers knows",
            do="check its config.json, and that transformers is new enough: pip install --upgrade transformers",
        ) from error  # fmt: skip


def _advice(source: ModelSource, otherwise: str) -> str:
    """What to do where something of the model is not there."""
    if source.kind == "hub" and source.path != source.id:
        return "the Hub does not answer, and the cache may lack files: check the network, HF_ENDPOINT, HF_HUB_OFFLINE"
    return otherwise


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
