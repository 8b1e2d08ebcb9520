"""Compressed models as transformers checkpoints: the ranks are in config.json, `from_pretrained` loads them.

Importing this module registers `LowRankConfig` and `LowRankQuantizer` with transformers: the one import of
the package that has a side effect, because transformers has no other way to find a loader.
"""

import copy
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lrcompress.artifacts import StoredDtype
from lrcompress.errors import ModelError, StageError, check_empty
from lrcompress.experts import fuse, unfuse
from lrcompress.layers import write_weight
from lrcompress.loading import check_loaded, check_stored, place_factors, stored_factors
from lrcompress.lowrank import AbstractLowRank, is_int8, pivoted_in, put_module, ranks_of
from lrcompress.registration import METHOD

if TYPE_CHECKING:  # these take seconds to import, and whoever registers the loader may not need them
    from transformers import PreTrainedConfig, PreTrainedModel

FORMAT_VERSION = 3
"""1: `ranks`, all layers plain; 2: `pivoted` names layers in that layout; 3: `dtype` of the factors. The least one
that will do is written, so that older versions read what they can."""

REMOTE_CODE = Path(__file__).parent / "remote" / "modeling_lrcompress.py"
_ITS_IMPORT = REMOTE_CODE.with_name("deferred.py")

# Such a transformers (5.17) keeps the dtype on disk for a "pre-quantized" checkpoint, whatever is asked for.
_KEEPS_STORED_DTYPE = not hasattr(HfQuantizer, "get_new_dtype")


class LowRankConfig(QuantizationConfigMixin):
    """The `quantization_config` of config.json: which layers are low-rank, and of what rank.

    `ranks` maps the dotted names of the saved model's layers to ranks, `pivoted` names those in the pivoted
    layout, `dtype` is int8 where factors are stored in 8 bits; `provenance` says where the factors come from
    (version, method, base model). Raises ModelError for a format that this version cannot read.
    """

    def __init__(
        self,
        ranks: Mapping[str, int],
        format_version: int | None = None,
        provenance: Mapping[str, str] | None = None,
        pivoted: Sequence[str] = (),
        dtype: StoredDtype = "model",
        **_: Any,
    ) -> None:
        least = 3 if dtype != "model" else 2 if pivoted else 1
        if format_version is None:
            format_version = least
        if format_version not in range(least, FORMAT_VERSION + 1):
            raise ModelError(
                "config.json: quantization_config.format_version is unknown",
                got=format_version,
                allowed=f"{least} to {FORMAT_VERSION}" if least < FORMAT_VERSION else FORMAT_VERSION,
                do="upgrade lrcompress: pip install --upgrade lrcompress",
            )
        wrong = {name: rank for name, rank in ranks.items() if type(rank) is not int or rank < 1}
        if wrong:
            raise ModelError(
                "config.json: quantization_config.ranks holds something else than ranks",
                got=wrong,
                allowed="whole numbers from 1",
                do="get the checkpoint's config.json again",
            )
        if dtype not in get_args(StoredDtype):
            raise ModelError(
                "config.json: quantization_config.dtype is unknown",
                got=dtype, allowed=" or ".join(get_args(StoredDtype)),
                do="upgrade lrcompress: pip install --upgrade lrcompress",
            )  # fmt: skip
        strange = sorted(set(pivoted) - set(ranks))
        if strange:
            raise ModelError(
                "config.json: quantization_config.pivoted names layers without a rank",
                got=strange[:4], allowed="names in quantization_config.ranks",
                do="get the checkpoint's config.json again",
            )  # fmt: skip
        self.quant_method = METHOD  # pyright: ignore[reportAttributeAccessIssue]  an enum, but only for their own
        self.format_version = format_version
        self.ranks = dict(sorted(ranks.items()))
        if pivoted:  # absent from what versions before it read
            self.pivoted = sorted(pivoted)
        if dtype != "model":
            self.dtype = dtype
        self.provenance = dict(provenance or {})

    def get(self, key: str, default: Any = None) -> Any:
        """As a dictionary's `get`: transformers reads `quant_method` so, from a config of a loaded model."""
        return vars(self).get(key, default)


class LowRankQuantizer(HfQuantizer):
    """Puts low-rank layers into the empty model before weights are loaded, checks afterwards, then lets go.

    The loaded model is an ordinary one, without a quantizer, so that `.half()`, training and saving a given
    state dict work; its config keeps the ranks, so that it saves as what it is.
    """

    quantization_config: LowRankConfig

    def _process_model_before_weight_loading(
        self, model: "PreTrainedModel", checkpoint_files: list[str] | None = None, **_: Any
    ) -> "PreTrainedModel":
        ranks = self.quantization_config.ranks
        self.pre_quantized = self.pre_quantized and not _KEEPS_STORED_DTYPE
        self.stored = stored_factors(checkpoint_files or [])
        if self.stored is not None:
            check_stored(model, ranks, self.stored)
        pivoted, dtype = self.quantization_config.get("pivoted", ()), self.quantization_config.get("dtype")
        self.layers = place_factors(model, ranks, pivoted, int8=dtype == "int8")
        return model

    def _process_model_after_weight_loading(self, model: "PreTrainedModel", **_: Any) -> "PreTrainedModel":
        from transformers import PreTrainedModel

        ranks = self.quantization_config.ranks
        check_loaded(model, self.layers, whole=len(self.layers) == len(ranks) == len(self.stored or ranks))
        self.remove_quantization_config(model)
        model.config.quantization_config = self.quantization_config
        vars(model.config).pop("auto_map", None)  # a plain save_pretrained does not take the file along
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                vars(module.config).pop("_is_quantized", None)
        return model

    def is_serializable(self) -> bool:
        """Always: factors are saved as they are."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are plain Linears; those in 8 bits stay as they are while the rest is trained."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Factors are plain Linears."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Factors are plain Linears."""
        return True


for known in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
    known.pop(METHOD, None)  # a checkpoint's own loader came first
register_quantization_config(METHOD)(LowRankConfig)
register_quantizer(METHOD)(LowRankQuantizer)


def attach_config(model: "PreTrainedModel", ranks: Mapping[str, int], provenance: Mapping[str, str]) -> None:
    """Record the ranks in `model.config`, so that `model.save_pretrained` writes what loads back.

    Changes `model.config`. Raises StageError if the model's low-rank layers are not those of `ranks`.
    """
    if dict(ranks) != ranks_of(model):
        differing = sorted(set(ranks.items()) ^ set(ranks_of(model).items()))
        raise StageError(f"the model's low-rank layers are not those of the rank plan: {differing[:4]}")
    model.config.quantization_config = LowRankConfig(
        ranks, provenance=provenance, pivoted=pivoted_in(model), dtype="int8" if is_int8(model) else "model"
    )


def write_model(
    model: "PreTrainedModel",
    ranks: Mapping[str, int],
    folder: Path,
    *,
    processor: Any = None,
    companions: Mapping[str, Path] = MappingProxyType({}),
    provenance: Mapping[str, str],
    card: str | None = None,
    max_shard_size: str | int = "5GB",
) -> None:
    """Write config.json, safetensors, generation config, tokenizer or processor, and README.md (`card`).

    `companions` are files to put beside them, by their places in the folder. Same weights, same bytes. Written aside
    and renamed: a folder with its final name is complete. Changes `model.config` (`attach_config`). Raises OutputError
    if `folder` holds anything.
    """
    check_empty(folder, "the model's folder")
    attach_config(model, ranks, provenance)
    aside = folder.with_name(folder.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    model.save_pretrained(aside, max_shard_size=max_shard_size)
    _add_remote_code(model, aside)
    if processor is not None:
        processor.save_pretrained(aside)
    for name, file in companions.items():
        (aside / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(file, aside / name)
    if card is not None:
        (aside / "README.md").write_text(card, encoding="utf-8")
    for file in aside.iterdir():  # safetensors writes files that only their owner may read
        if file.is_file():
            shutil.copymode(aside / "config.json", file)
    os.replace(aside, folder)


def _add_remote_code(model: "PreTrainedModel", folder: Path) -> None:
    """Beside the weights the code that loads them without lrcompress, and in config.json what leads to it."""
    for code in (REMOTE_CODE, _ITS_IMPORT):
        shutil.copyfile(code, folder / code.name)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["auto_map"] = {auto: f"{REMOTE_CODE.stem}.{name}" for auto, name in _auto_classes(model).items()}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _auto_classes(model: "PreTrainedModel") -> dict[str, str]:
    """Auto class → model class, of those that transformers has for the model's config."""
    from transformers.models.auto import modeling_auto

    found = {}
    for auto in vars(modeling_auto).values():
        mapping = getattr(auto, "_model_mapping", None)
        if isinstance(auto, type) and mapping is not None and type(model.config) in mapping:
            classes = mapping[type(model.config)]
            found[auto.__name__] = (classes[0] if isinstance(classes, tuple) else classes).__name__
    return dict(sorted(found.items()))


def saved_ranks(
    model: "str | os.PathLike[str] | PreTrainedConfig | Mapping[str, Any]",
) -> dict[str, int] | None:
    """Ranks of a model that is compressed already; None for any other.

    `model` is a model folder, a transformers config, or the content of a config.json. Raises ModelError as
    `LowRankConfig` does.
    """
    if isinstance(model, str | os.PathLike):
        file = Path(model) / "config.json"
        model = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    section = model.get("quantization_config") if isinstance(model, Mapping) else vars(model).get("quantization_config")
    if section is None or section.get("quant_method") != METHOD:
        return None
    return section.ranks if isinstance(section, LowRankConfig) else LowRankConfig(**section).ranks


def merge(model: nn.Module) -> None:
    """Multiply each low-rank layer out into a dense layer; products in float32. Changes the model.

    In a transformers model, or one within another module, it is one of its original kind: afterwards transformers alone
    loads what the model saves. Elsewhere it is a Linear.
    """
    originals = _originals(model)
    for name in ranks_of(model):
        layer = model.get_submodule(name)
        if isinstance(layer, AbstractLowRank):
            kind = originals.get(name) or _linear(layer)
            put_module(model, name, _dense(layer, kind).train(layer.training))
    fuse(model)


def _originals(model: nn.Module) -> dict[str, nn.Module]:
    """Modules of the dense transformers models that are here, on the meta device, by name. Changes `config`."""
    from transformers import PreTrainedModel

    found: dict[str, nn.Module] = {}
    within: list[str] = []
    for name, module in model.named_modules():
        if not isinstance(module, PreTrainedModel) or name.startswith(tuple(within)):
            continue
        prefix = f"{name}." if name else ""
        within.append(prefix)
        config = copy.deepcopy(module.config)
        for holder in (config, module.config):
            vars(holder).pop("quantization_config", None)
        with torch.device("meta"):
            skeleton = type(module)(config)
        unfuse(skeleton)
        found |= {prefix + inner: original for inner, original in skeleton.named_modules(remove_duplicate=False)}
    return found


def _linear(layer: AbstractLowRank) -> nn.Module:
    return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")


def _dense(layer: AbstractLowRank, kind: nn.Module) -> nn.Module:
    # `kind`: the original layer on the meta device, of which a new one is made
    pair = layer.pair()
    dense = copy.deepcopy(kind).to_empty(device=pair.B.device).to(pair.B.dtype)
    write_weight(dense, pair.B.detach().float() @ pair.A.detach().float())  # [O, I]
    if pair.bias is not None:
        with torch.no_grad():
            dense.get_parameter("bias").copy_(pair.bias)
    return dense
