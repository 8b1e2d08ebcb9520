"""A compressed model in other forms, each compared with the model it was made from before it gets its name.

`dense`: multiplied out, for stock transformers and what converts its checkpoints; `remote-code`: a checkpoint with the
loader of this version beside it; `torch-export`: a `torch.export` program; `onnx`: a graph for onnxruntime. The last
two take `input_ids` and `attention_mask` of any batch size and length, a classifier that tells two texts apart
`token_type_ids` too, and give the logits.
"""

import copy
import os
import shutil
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from lrcompress.errors import ModelError, StageError, check_empty
from lrcompress.experts import Experts, is_fused
from lrcompress.hf import REMOTE_CODE, merge, saved_ranks, write_model
from lrcompress.source import task_name
from lrcompress.tasks import TASKS, tells_apart

Form = Literal["dense", "onnx", "torch-export", "remote-code"]
PROGRAM, GRAPH = "model.pt2", "model.onnx"

SHAPES = ((2, 7), (3, 11))
"""Batch and length of the inputs on which the two are compared; the first is also what a program is traced with."""

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
"""Largest difference of a logit at real tokens, as a share of the largest logit; for half precision, whose products
are rounded again when multiplied out, HALF."""
HALF = 5e-2

_OURS = ("README.md", REMOTE_CODE.name)


def export(folder: str | Path, to: Form, output: str | Path | None = None) -> Path:
    """Write the model in a run folder or a model folder in another form; returns the folder of it.

    `output` defaults to `DIR-<form>` beside the model's folder. A model in bfloat16 or float16 becomes a float32 graph
    or program: onnxruntime computes in half precision on few devices. Raises ModelError for a folder without a
    compressed model, or of one that a program cannot be made of; OutputError for an output that holds anything;
    StageError if the result does not compute the same.
    """
    place = _model_folder(Path(folder))
    target = Path(output) if output is not None else place.parent / f"{place.name}-{to}"
    check_empty(target, "the folder of the export", name="another --output")
    if to == "onnx":
        _check_onnx()
    model = _load(place, to)
    aside = target.with_name(target.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        again = _MAKERS[to](model, place, aside)
        _compare(model, again, to)
        for file in place.rglob("*"):  # tokenizer, generation config, pooling
            hidden = any(part.startswith(".") for part in file.relative_to(place).parts)
            if file.is_file() and not hidden and file.name not in _OURS and ".safetensors" not in file.name:
                to_file = aside / file.relative_to(place)
                to_file.parent.mkdir(parents=True, exist_ok=True)
                if not to_file.exists():
                    shutil.copyfile(file, to_file)
        os.replace(aside, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return target


def _model_folder(folder: Path) -> Path:
    for place in (folder / "model", folder):
        if (place / "config.json").is_file() and saved_ranks(place):
            return place
    raise ModelError(
        "the folder holds no compressed model", got=folder,
        allowed="the folder of a finished run, or its model folder", do="run lrcompress to the end, then export",
    )  # fmt: skip


def _check_onnx() -> None:
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if find_spec(name) is None]
    if missing:
        raise ModelError(
            "ONNX cannot be written here", got=f"no {', '.join(missing)}", do="pip install 'lrcompress[export]'"
        )


def _load(place: Path, to: Form) -> PreTrainedModel:
    config = transformers.AutoConfig.from_pretrained(place)
    names = config.architectures or ["nothing"]
    kind = getattr(transformers, names[0], None)
    takes_text = names[0].endswith(("ForCausalLM", "LMHeadModel", "ForSequenceClassification", "ForMaskedLM"))
    if kind is None or (to in ("onnx", "torch-export") and not takes_text):
        raise ModelError(
            f"a {to} of this model cannot be made", got=names[0],
            allowed="a causal LM, a masked LM, or a sequence classifier", do="export it as dense or remote-code",
        )  # fmt: skip
    transformers.utils.logging.disable_progress_bar()
    model = kind.from_pretrained(place, dtype="auto").eval()
    mixture = any(isinstance(module, Experts) or is_fused(module) for module in model.modules())
    if mixture and to in ("onnx", "torch-export"):
        raise ModelError(
            f"a {to} of a mixture of experts cannot be made: which tokens an expert gets depends on the data",
            got=names[0], allowed="dense, remote-code", do="export it in one of these forms",
        )  # fmt: skip
    return model.float() if to in ("onnx", "torch-export") else model


class _Logits(nn.Module):
    """A model that reads text as a function of tensors."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.more: dict[str, Any] = {"use_cache": False} if model.can_generate() else {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        """All `[batch, length]` int64 → logits `[batch, length, vocabulary]`, or `[batch, classes]`."""
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model(input_ids=input_ids, attention_mask=attention_mask, **types, **self.more).logits


Inputs = Mapping[str, Tensor]
Computes = Callable[[Inputs], Tensor]


def _output(model: PreTrainedModel) -> Computes:
    """Logits, or the first output of a model without a head."""

    def compute(inputs: Inputs) -> Tensor:
        found: Any = model(**inputs)
        return found.get("logits", found[0])

    return compute


def _dense(model: PreTrainedModel, place: Path, folder: Path) -> Computes:
    other = copy.deepcopy(model)
    merge(other)
    other.save_pretrained(folder)
    if saved_ranks(folder):
        raise StageError("the merged model's config still says that it is compressed")
    return _output(type(model).from_pretrained(folder, dtype="auto").eval())


def _remote_code(model: PreTrainedModel, place: Path, folder: Path) -> Computes:
    section: Mapping[str, Any] = vars(model.config.quantization_config)
    folder.rmdir()
    write_model(model, section["ranks"], folder, provenance=section.get("provenance", {}))
    return _output(type(model).from_pretrained(folder, dtype="auto").eval())


def _torch_export(model: PreTrainedModel, place: Path, folder: Path) -> Computes:
    torch.export.save(_program(model), folder / PROGRAM)
    model.config.save_pretrained(folder)
    program = torch.export.load(folder / PROGRAM).module()
    return lambda inputs: program(*inputs.values())


def _onnx(model: PreTrainedModel, place: Path, folder: Path) -> Computes:
    import onnxruntime

    names = _arguments(model)
    graph = torch.onnx.export(_program(model), dynamo=True, input_names=names, output_names=["logits"], verbose=False)
    assert graph is not None
    for node in graph.model.graph.all_nodes():
        node.metadata_props.clear()  # where in this machine's files each operation was traced
    graph.save(folder / GRAPH)
    model.config.save_pretrained(folder)
    session = onnxruntime.InferenceSession(folder / GRAPH, providers=["CPUExecutionProvider"])

    def run(inputs: Inputs) -> Tensor:
        found = session.run(["logits"], {name: inputs[name].numpy() for name in names})
        return torch.from_numpy(found[0])

    return run


_MAKERS: Mapping[Form, Callable[[PreTrainedModel, Path, Path], Computes]] = {
    "dense": _dense, "remote-code": _remote_code, "torch-export": _torch_export, "onnx": _onnx,
}  # fmt: skip


def _program(model: PreTrainedModel) -> torch.export.ExportedProgram:
    inputs = tuple(_inputs(model, *SHAPES[0]).values())
    with torch.no_grad():
        program = torch.export.export(_Logits(model), inputs, dynamic_shapes=dict.fromkeys(_arguments(model), _FREE))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # places on this machine
    return program


_FREE = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


def _arguments(model: PreTrainedModel) -> list[str]:
    """What a program of it takes: without the types a classifier of two texts would be blind to which is which."""
    task = TASKS[task_name(model.config, "auto")]
    types = ["token_type_ids"] if task.reads_pairs and tells_apart(model.config) else []
    return ["input_ids", "attention_mask", *types]


def _inputs(model: PreTrainedModel, batch: int, length: int) -> dict[str, Tensor]:
    """Random inputs of the model's task, without padding."""
    config: Any = model.config
    task = TASKS[task_name(config, "auto")]
    inputs = task.example_inputs(config, batch, length, torch.Generator().manual_seed(0))
    pad = _pad(model)
    if "input_ids" in inputs and pad is not None:  # a classifier looks for the last token that is none
        ids = inputs["input_ids"]
        ids[ids == pad] = (pad + 1) % config.get_text_config().vocab_size
    if "token_type_ids" in _arguments(model):
        inputs["token_type_ids"] = (torch.arange(length) >= length // 2).long().repeat(batch, 1)
    return {name: value.to(model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}


def _pad(model: PreTrainedModel) -> int | None:
    return getattr(model.config.get_text_config(), "pad_token_id", None)


@torch.no_grad()
def _compare(model: PreTrainedModel, again: Computes, to: Form) -> None:
    """Raise StageError unless both give the same output, at shapes that tracing did not see too, and beside padding."""
    for batch, length in SHAPES:
        inputs = _inputs(model, batch, length)
        mask, pad = inputs.get("attention_mask"), _pad(model)
        if mask is not None and pad is not None:
            inputs["input_ids"][0, -2:], mask[0, -2:] = pad, 0
        wanted, got = _output(model)(inputs).float(), again(inputs).float()
        if mask is not None and wanted.shape[:2] == mask.shape and "decoder_input_ids" not in inputs:
            wanted, got = wanted[mask.bool()], got[mask.bool()]
        difference = ((wanted - got).abs().max() / wanted.abs().max().clamp_min(1e-6)).item()
        if not difference <= TOLERANCE.get(model.dtype, HALF):
            raise StageError(f"the {to} computes something else: an output differs by {difference:.1e} of the largest")
