"""vLLM without its compiled kernels: one process or a gloo group on the CPU, its own config, loader and model classes.

Attention alone is a stand-in, since that of vLLM's CPU platform is compiled: a causal attention over one sequence.
"""

import os
import tempfile
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_DO_NOT_TRACK": "1"}

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


def config_of(folder: Path, **settings: Any) -> Any:
    """vLLM's config for a model folder, as its command line would make it."""
    from vllm.engine.arg_utils import EngineArgs

    settings = {"dtype": "float32", "max_model_len": 64} | settings
    return EngineArgs(
        model=str(folder), enforce_eager=True, skip_tokenizer_init=True, **settings
    ).create_engine_config()


def join_group(config: Any, meeting: Path, rank: int = 0, size: int = 1) -> None:
    """Join a gloo group of `size` processes that meet at a file; done once in a process."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized

    if not model_parallel_is_initialized():
        with set_current_vllm_config(config):
            init_distributed_environment(size, rank, f"file://{meeting}", rank, "gloo")
            initialize_model_parallel(size, 1)


def served(config: Any) -> nn.Module:
    """The model as vLLM's loader makes it from the checkpoint."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.model_loader import get_model

    torch.accelerator.empty_cache = lambda: None  # fails where there is no accelerator
    Attention.forward = _attention
    with set_current_vllm_config(config):
        return get_model(vllm_config=config)


def logits(config: Any, model: nn.Module, ids: Tensor) -> Tensor:
    """Of one sequence `ids` [T] → [T, V]."""
    from vllm.config import set_current_vllm_config
    from vllm.forward_context import set_forward_context

    with torch.no_grad(), set_current_vllm_config(config), set_forward_context(None, config):
        return model.compute_logits(model(ids, torch.arange(len(ids)), None, None))


def _attention(layer: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    heads = (x.view(len(x), -1, layer.head_size).transpose(0, 1) for x in (query, key, value))  # [H, T, D]
    mixed = scaled_dot_product_attention(*heads, is_causal=True, scale=layer.impl.scale, enable_gqa=True)
    return mixed.transpose(0, 1).reshape(len(query), -1)


def main(folder: Path, meeting: Path, rank: int, size: int, ids: list[int]) -> None:
    """One process of a tensor-parallel group: writes its logits beside the model."""
    config = config_of(folder, tensor_parallel_size=size, distributed_executor_backend="external_launcher")
    join_group(config, meeting, rank, size)
    torch.save(logits(config, served(config), torch.tensor(ids)), folder / f"logits{rank}.pt")


_ = tempfile
