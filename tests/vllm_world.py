"""vLLM without its compiled kernels: its own config, loader and model classes on the CPU, in one process or in a group.

What is compiled in vLLM has a stand-in in torch: its operators their own `forward_native`, and attention a causal one
over a single sequence.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

os.environ |= {"VLLM_TARGET_DEVICE": "cpu", "VLLM_LOGGING_LEVEL": "CRITICAL", "VLLM_NO_USAGE_STATS": "1"}

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


@contextmanager
def without_kernels() -> Iterator[None]:
    """Within the block vLLM does without what it has compiled, and without processes of its own."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models import registry

    with (
        mock.patch.object(torch.accelerator, "empty_cache"),  # fails where there is no accelerator
        mock.patch.object(torch.ops._C, "gelu_new", None, create=True),
        mock.patch.object(Attention, "forward", _attention),
        mock.patch.object(registry, "_run_in_subprocess", lambda function: function()),
    ):
        yield


def config_of(folder: Path, **settings: Any) -> Any:
    """vLLM's config for a model folder, as its command line would make it."""
    from vllm.engine.arg_utils import EngineArgs

    settings = {"dtype": "float32", "max_model_len": 64} | settings
    return EngineArgs(
        model=str(folder), enforce_eager=True, skip_tokenizer_init=True, **settings
    ).create_engine_config()


def join_group(config: Any, meeting: Path, rank: int = 0, size: int = 1) -> None:
    """Join a gloo group of `size` processes that meet at a file; once in a process."""
    from vllm.config import set_current_vllm_config
    from vllm.distributed import init_distributed_environment, initialize_model_parallel, model_parallel_is_initialized

    if not model_parallel_is_initialized():
        with set_current_vllm_config(config):
            init_distributed_environment(size, rank, f"file://{meeting}", rank, "gloo")
            initialize_model_parallel(size, 1)


def served(config: Any) -> nn.Module:
    """The model as vLLM's loader makes it from the checkpoint."""
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.model_loader import get_model

    with set_current_vllm_config(config):
        model = get_model(vllm_config=config)
    for module in model.modules():
        if isinstance(module, CustomOp):
            module._forward_method = module.forward_native
    return model


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


def main(model_impl: str, meeting: str, rank: str, size: str, *folders: str) -> None:
    """One process of a tensor-parallel group: of each folder's `ids.pt` the logits, written beside it."""
    for folder in map(Path, folders):
        parallel = {"tensor_parallel_size": int(size), "distributed_executor_backend": "external_launcher"}
        with without_kernels():
            config = config_of(folder, model_impl=model_impl, **parallel)
            join_group(config, Path(meeting), int(rank), int(size))
            found = logits(config, served(config), torch.load(folder / "ids.pt"))
        torch.save(found, folder / f"logits{rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
