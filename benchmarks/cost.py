"""What a compression costs at real sizes: `python benchmarks/cost.py SHAPE [--blocks N]`.

A model of random weights in the shape of a real one, the shipped recipe `all_linear` with all that can take time
(baselines, refit, a round): seconds and peak memory of each stage, seconds of a training step of each kind beside a
plain one, latency of the compressed model beside the dense one. Random weights say nothing of quality, so none is
shown. `--blocks` keeps the first N blocks: all stages but the dense model's own passes are sums over layers. Writes
results/cost_SHAPE[_BLOCKS]_DEVICE.json.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import step_cost
from benchmarks.beds import HERE, commit, write_result
from benchmarks.experiments import overlay
from lrcompress import build, pipeline, source
from lrcompress.progress import Display

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2", "dtype": "float32"},
    "llama-3.2-1b": {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True,
        "max_position_embeddings": 8192, "dtype": "bfloat16",
    },
}  # fmt: skip
"""Configurations of the published models, without what their weights would need."""

DATA = {split: {"path": "python-stdlib", "split": split} for split in ("train", "validation", "test")}

CHANGES = {
    "refit": {"start_below": 0.0},
    "recovery": {"rounds_above": 0.0, "steps": 40},
    "baselines": ["svd_llm"],
    "evaluate": [],
}
"""To `all_linear`, beside its data: a round whatever the start, and few steps."""


def make_model(shape: str, blocks: int | None, folder: Path) -> int:
    """Write a model of random weights with the demo's tokenizer; returns how many blocks it has."""
    values = dict(SHAPES[shape])
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    if blocks is not None:
        config.num_hidden_layers = blocks
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).to(config.dtype).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.open_source("demo").path).save_pretrained(folder)
    return config.num_hidden_layers


def measure(
    shape: str, blocks: int | None, device: str, rounds: int, steps: int, write: Callable[[dict[str, Any]], None]
) -> None:
    """All of it, for one shape on one device; written once the stages are through, and again with the steps."""
    recipe = yaml.safe_load((HERE.parent / "recipes" / "all_linear.yaml").read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as place:
        model, folder = Path(place) / shape, Path(place) / "run"
        count = make_model(shape, blocks, model)
        work = pipeline.open_workspace(str(model), overlay(recipe, CHANGES) | {"data": DATA}, folder, device=device,
                                       seed=0, display=Display(quiet=False))  # fmt: skip
        report = pipeline.execute(work)
        assert report is not None
        dense, result = report.rows[0], report.rows[-1]
        found = {
            "shape": shape, "blocks": count, "commit": commit(),
            "command": " ".join(["python benchmarks/cost.py", *sys.argv[1:]]),
            "environment": build.environment(work).model_dump(), "recipe": work.recipe.model_dump(mode="json"),
            "dense": {"parameters": dense.parameters, "target_parameters": dense.target_parameters},
            "result": {"parameters": result.parameters, "target_parameters": result.target_parameters},
            "stages": [stage.model_dump() for stage in report.stages],
            "latency": [{"row": row.name, "ranks": row.ranks, "peak_memory_bytes": row.peak_memory_bytes,
                         "measured": [one.model_dump() for one in row.latency]} for row in report.rows],
            "rounds": rounds, "steps": steps, "rows": [],
        }  # fmt: skip
        write(found)
        write(found | {"rows": step_cost.compared(work, rounds, steps)})


def main() -> None:
    """Measure one shape."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("--blocks", type=int)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=9)
    arguments = parser.parse_args()
    part = f"_{arguments.blocks}" if arguments.blocks else ""

    def write(found: dict[str, Any]) -> None:
        kind = found["environment"]["device"].partition(":")[0]
        write_result(HERE / "results" / f"cost_{arguments.shape}{part}_{kind}.json", found)
        if not found["rows"]:
            for stage in found["stages"]:
                print(f"{stage['name']:12} {stage['seconds']:7.1f} s {stage['peak_memory_bytes'] / 1e9:6.2f} GB")
        for row in found["rows"]:
            print(f"{row['variant']:40} {row['seconds']:.4f} {row['ratio']:.2f}")

    measure(arguments.shape, arguments.blocks, arguments.device, arguments.rounds, arguments.steps, write)


if __name__ == "__main__":
    main()
