"""The plugin by which vLLM serves compressed checkpoints: what its entry point calls.

`pip install lrcompress[vllm]` is all there is to do: vLLM finds the entry point `vllm.general_plugins` by itself, in
each of its processes. Nothing of vLLM or torch is imported before it calls it.
"""


def register() -> None:
    """Make `quant_method: lrcompress` of a config.json known to vLLM; may be called more than once."""
    from vllm.model_executor.layers.quantization import (  # pyright: ignore[reportMissingImports]
        register_quantization_config,
    )

    from lrcompress.registration import METHOD
    from lrcompress.vllm.config import LowRankServingConfig

    register_quantization_config(METHOD)(LowRankServingConfig)
