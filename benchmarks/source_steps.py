"""The sources' own steps: does BA go to τW, at which rank, and what is left after replacement?

python benchmarks/source_steps.py BED...

Beds: `mlp` (784-128-128-10 on Fashion-MNIST by its Hub name where that can be reached, else 64-128-128-10 on
scikit-learn's digits), `demo` (the built-in GPT-2), `minilm_sst2`, `llama` (a small Llama-shaped model trained here on
the demo's text). Each trains LoRA-LRD at several ranks with two seeds, by the source's literal recipe (τ = 0.1, task
loss, LoRA start), with τ fading to 1, and with fading from the closed-form start. Writes results/source_steps_BED.json
and pictures/source_steps_BED.png.
"""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.nn.functional as F
from beds import HERE, bed, commit, write_result
from torch import Tensor, nn

from lrcompress import build, pipeline
from lrcompress import recipe as recipes
from lrcompress.artifacts import Factors, Layer
from lrcompress.calibrate import collect
from lrcompress.evaluate.scorer import Scorer
from lrcompress.layers import Targets, bias_of, find_layers, read_weight
from lrcompress.linalg import relative_error, truncate, weighted_svd
from lrcompress.lowrank import LowRankLinear
from lrcompress.methods import Kron
from lrcompress.recovery import recover
from lrcompress.recovery.settings import Recovery
from lrcompress.subspaces import evidence, right_basis, similarity
from lrcompress.tasks import AbstractTask, UserTask, default_forward

TAU = 0.1
FADING = {"schedule": "linear", "start": TAU, "end": 1.0, "until": 0.6}
VARIANTS: dict[str, dict[str, Any]] = {
    "literal": {"start": "lora", "tau": TAU, "scaling": "source", "loss": {"kind": "task"}},
    "fading": {"start": "lora", "tau": FADING, "loss": {"kind": "distill"}},
    "fading, kron start": {"start": "method", "tau": FADING, "loss": {"kind": "distill"}},
}
SEEDS = (0, 1)


@dataclass(frozen=True)
class Bed:
    """A dense model with its data."""

    model: nn.Module
    task: AbstractTask
    data: Any
    """training data by number"""
    calibration: Sequence[Any]
    """batches for the statistics of kron"""
    validation: Sequence[Any]
    targets: Mapping[str, dict[str, Any]]
    """name of a choice of layers → the recipe's targets"""
    ranks: tuple[int, ...]
    steps: int
    batch: int
    learning_rate: float
    about: str


class Rows:
    """Tensors of equal length as training data."""

    def __init__(self, *tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors[0])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """The rows of these numbers."""
        return tuple(tensor[list(indices)] for tensor in self.tensors)


def mlp_bed() -> Bed:
    """Three dense layers, trained here."""
    train, held, about = _images()
    model = nn.Sequential(
        nn.Linear(train[0].shape[1], 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    for _ in range(1500):
        rows = torch.randint(len(train[0]), (64,), generator=generator)
        loss = F.cross_entropy(model(train[0][rows]), train[1][rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    data = Rows(*train)
    chunks = [data.batch(range(i, min(i + 64, len(data)))) for i in range(0, min(len(data), 2048), 64)]
    task = UserTask(default_forward, lambda outputs, batch: F.cross_entropy(outputs, batch[1]), lambda batch: batch[1])
    return Bed(
        model.eval(), task, data,
        chunks, [held], {"the 128 × 128 layer": {"include": ["2"]}, "all layers": {"include": ["0", "2", "4"]}},
        (5, 32, 64, 80), 600, 64, 1e-3, about,
    )  # fmt: skip


def _images() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], str]:
    from lrcompress import hub

    name = "zalando-datasets/fashion_mnist"
    if hub.answers(name, "dataset"):
        import datasets

        found = datasets.load_dataset(name)
        parts = []
        for split in ("train", "test"):
            rows: Any = found[split]  # type: ignore[index,call-overload]
            pixels = torch.tensor(numpy.stack([numpy.asarray(image) for image in rows["image"]]))
            parts.append((pixels.float().flatten(1) / 255, torch.tensor(rows["label"])))
        return parts[0], parts[1], "Fashion-MNIST, 784-128-128-10, test split"
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]  # the extra `bench`

    pixels, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    held, rest = order[:400], order[400:]
    return (x[rest], y[rest]), (x[held], y[held]), "scikit-learn's digits, 64-128-128-10, 400 held out"


def workspace_bed(case: str) -> Bed:
    """A case with a recipe: its model and data."""
    model, recipe = bed(case)
    work = pipeline.open_workspace(model, recipes.resolve(recipe)[1], HERE / "unused")
    calibration = work.training_examples(128)
    chosen = work.calibration_indices(calibration, 256)
    count = 500 if case == "minilm_sst2" else 12
    held = work.scoring_examples()
    drawn = torch.randperm(len(held), generator=torch.Generator().manual_seed(0))[:count].tolist()
    targets: dict[str, dict[str, Any]] = {"all": {"groups": ["all"]}}
    if case == "demo":
        targets = {"attention": {"groups": ["attention"]}, **targets}
    small = case == "demo"
    return Bed(
        work.model, work.task, calibration, list(calibration.batches(16, among=chosen)),
        list(held.batches(16, among=drawn)), targets,
        (5, 64) if small else (32, 96), 60, 4 if small else 16, 1e-3,
        f"{case}, {count} validation sequences",
    )  # fmt: skip


def llama_bed() -> Bed:
    """Four blocks of width 128 with two key/value heads, trained on the demo's text."""
    from transformers import LlamaConfig, LlamaForCausalLM

    demo = pipeline.open_workspace("demo", recipes.resolve("demo")[1], HERE / "unused")
    sizes: dict[str, Any] = {
        "hidden_size": 128,
        "intermediate_size": 344,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    }
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=demo.source.config.vocab_size, num_key_value_heads=2, max_position_embeddings=256,
            tie_word_embeddings=True, bos_token_id=0, eos_token_id=0, pad_token_id=None, **sizes,
        )
    )  # fmt: skip
    data, steps = demo.training_examples(128), 700
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        batch = data.batch(torch.randint(len(data), (8,), generator=generator).tolist())
        loss = demo.task.loss(demo.task.logits(model, batch), batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    held = demo.scoring_examples()
    targets = {
        "q and v": {"include": ["self_attn.q_proj", "self_attn.v_proj"]},
        "down_proj of blocks 1 and 2": {"include": ["layers.[12].mlp.down_proj"]},
    }
    return Bed(
        model.eval(), demo.task, data, [data.batch(range(i, i + 16)) for i in range(0, 256, 16)],
        [held.batch(range(i, i + 6)) for i in range(0, 12, 6)], targets, (5, 32), 60, 4, 1e-3,
        f"Llama-shaped, {sum(p.numel() for p in model.parameters()):,} parameters, {steps} steps of training on the "
        "demo's text, 12 validation windows",
    )  # fmt: skip


BEDS: dict[str, Callable[[], Bed]] = {
    "mlp": mlp_bed,
    "demo": lambda: workspace_bed("demo"),
    "minilm_sst2": lambda: workspace_bed("minilm_sst2"),
    "llama": llama_bed,
}


def measure(one: Bed, progress: Callable[[Any], None]) -> dict[str, Any]:
    """Every choice of layers, rank, variant and seed."""
    scorer = Scorer(one.model, one.validation, one.task)
    rows: list[dict[str, Any]] = []
    value: dict[str, Any] = {"about": one.about, "dense": vars(scorer.score({})), "rows": rows, "maps": {}}
    for name, chosen in one.targets.items():
        layers = find_layers(one.model, Targets(**chosen))
        statistics, _ = collect(one.model, layers, one.calibration, Kron.needs, one.task, seed=0)
        spectra = {
            key: weighted_svd(read_weight(one.model.get_submodule(key)).detach(), Kron().roots(statistics[key]))
            for key in layers
        }
        for rank in one.ranks:
            for variant in VARIANTS:
                pairs = []
                for seed in SEEDS:
                    found, seconds = _learn(one, layers, spectra, rank, variant, seed)
                    pairs.append(found)
                    rows.append(
                        {"layers": name, "rank": rank, "variant": variant, "seed": seed, "seconds": seconds}
                        | _scores(one, scorer, found, variant)
                    )
                    progress(rows[-1])
                rows[-1]["phi"] = _phi(pairs, rank)
                if rank == one.ranks[-1]:
                    value["maps"][f"{name}, {variant}"] = _maps(pairs)
    return value


def _learn(
    one: Bed, layers: Mapping[str, Layer], spectra: Mapping[str, Any], rank: int, variant: str, seed: int
) -> tuple[dict[str, Factors], float]:
    settings = Recovery(steps=one.steps, batch=one.batch, learning_rate=one.learning_rate, **VARIANTS[variant])
    most = {key: min(rank, layer.in_features, layer.out_features) for key, layer in layers.items()}
    start = {
        key: truncate(spectra[key], most[key], bias_of(one.model.get_submodule(key))) for key in layers
    }  # a LoRA start takes only the shapes
    began = time.perf_counter()
    done = recover(one.model, layers, start, one.data, settings, one.task, seed=seed)
    return done.factors, time.perf_counter() - began


def _scores(one: Bed, scorer: Scorer, pairs: Mapping[str, Factors], variant: str) -> dict[str, Any]:
    """Quality before and after replacement, and how near BA is to the weight (or (1/τ)BA, in the source's scaling)."""
    errors, before, after = [], {}, {}
    tau = TAU if variant == "literal" else 1.0
    for name, pair in pairs.items():
        module = one.model.get_submodule(name)
        weight, bias = read_weight(module).detach(), bias_of(module)
        errors.append(relative_error(weight, pair))
        blend = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        blend.weight.data = (1 - tau) * weight + tau * (pair.B @ pair.A)
        if bias is not None:
            blend.bias.data = bias
        before[name] = blend
        after[name] = LowRankLinear.of(Factors(pair.A, pair.B, bias), device=weight.device, dtype=weight.dtype)
    found = {"rank_loss": sum(errors) / len(errors), "rank_loss_least": min(errors), "after": vars(scorer.score(after))}
    return found | {"before": vars(scorer.score(before)) if variant == "literal" else None}


def _phi(pairs: Sequence[Mapping[str, Factors]], rank: int) -> dict[str, Any]:
    """φ(r, r) of the two seeds, and the mean of random subspaces; means over layers."""
    found: dict[str, Any] = {}
    for factor in ("A", "B"):
        values = []
        for name in pairs[0]:
            a, b = (one[name].A if factor == "A" else one[name].B.T for one in pairs)
            seen = evidence(similarity(right_basis(a), right_basis(b)), a.shape[1])
            quarter = max(len(seen.phi) // 4, 1) - 1
            values.append([seen.phi[quarter], seen.level[quarter], seen.phi[-1], seen.level[-1]])
        means = torch.tensor(values).mean(0).tolist()
        found[factor] = dict(zip(("quarter", "quarter_random", "full", "full_random"), means, strict=True))
    return found | {"rank": rank}


def _maps(pairs: Sequence[Mapping[str, Factors]]) -> dict[str, list[list[float]]]:
    """φ(i, j) of the first chosen layer, at most 40 × 40."""
    name = next(iter(pairs[0]))
    found = {}
    for factor in ("A", "B"):
        a, b = (one[name].A if factor == "A" else one[name].B.T for one in pairs)
        phi = similarity(right_basis(a), right_basis(b))
        step = -(-len(phi) // 40)
        found[factor] = [[round(value, 4) for value in row] for row in phi[::step, ::step].tolist()]
    return found


def draw(value: Mapping[str, Any], file: Path) -> None:
    """Heat maps of φ for each choice of layers and variant."""
    from matplotlib.figure import Figure

    maps = value["maps"]
    figure = Figure(figsize=(2.3 * len(maps), 4.6), layout="constrained")
    grid = figure.subplots(2, len(maps), squeeze=False)
    for column, (title, pair) in enumerate(maps.items()):
        for row, factor in enumerate(("A", "B")):
            axes = grid[row][column]
            image = axes.imshow(pair[factor], vmin=0, vmax=1, cmap="viridis")
            axes.set_xticks([])
            axes.set_yticks([])
            name = title.replace(", ", "\n", 1)
            axes.set_title(f"{name}\n{factor}" if row == 0 else factor, fontsize=8)
    figure.colorbar(image, ax=grid, shrink=0.7, label="φ(i, j)")
    file.parent.mkdir(exist_ok=True)
    figure.savefig(file, dpi=80, metadata={"Software": None})


def _say(name: str, row: Mapping[str, Any]) -> None:
    print(name, row["layers"], row["rank"], row["variant"], row["after"], flush=True)


def main() -> None:
    """Measure the beds that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("beds", nargs="+", choices=list(BEDS))
    for name in parser.parse_args().beds:
        torch.manual_seed(0)
        began = time.perf_counter()
        value = measure(BEDS[name](), partial(_say, name))
        demo = pipeline.open_workspace("demo", recipes.resolve("demo")[1], HERE / "unused")
        head = {
            "command": f"python benchmarks/source_steps.py {name}", "commit": commit(),
            "environment": build.environment(demo).model_dump(), "seeds": list(SEEDS),
            "seconds": time.perf_counter() - began,
        }  # fmt: skip
        write_result(HERE / "results" / f"source_steps_{name}.json", head | value)
        draw(value, HERE / "pictures" / f"source_steps_{name}.png")


if __name__ == "__main__":
    main()
