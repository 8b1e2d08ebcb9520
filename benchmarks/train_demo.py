"""Train the built-in demo model: a small GPT-2 of Python code, on the standard library's own sources.

python benchmarks/train_demo.py --output lrcompress/demo --log benchmarks/results/train_demo.json

Larger ones, for beds, on a GPU; with `--packages` the sources of the installed packages are training data, too.
"""

import argparse
import json
import math
import platform
import sys
import sysconfig
import time
import tokenize
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from lrcompress.stdlib import HELD_OUT, read_modules

EOS = "<|endoftext|>"
CONFIG = {
    "vocab_size": 4096, "n_positions": 256, "n_embd": 128, "n_layer": 6, "n_head": 4,
    "activation_function": "gelu_pytorch_tanh", "bos_token_id": 0, "eos_token_id": 0,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE for code: single digits, single punctuation marks, words with their leading space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?[^\W\d_]+|_|\d|[^\S\n]*\n|[^\S\n]+(?=\S)| ?[^\w\s]|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=CONFIG["vocab_size"],
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=EOS, eos_token=EOS, model_max_length=CONFIG["n_positions"]
    )


def package_sources(most: int, seed: int) -> list[str]:
    """Python files of the installed packages without repetitions, in a random order, up to so many characters in all.

    Without files whose names are those of held-out modules: packages carry copies of some.
    """
    place = Path(sysconfig.get_paths()["purelib"])
    held_out = {name for names in HELD_OUT.values() for name in names}
    files = [file for file in sorted(place.rglob("*.py")) if not held_out & {file.stem, file.parent.name}]
    found: dict[str, None] = {}
    size = 0
    for position in torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist():
        if size >= most:
            break
        try:
            with tokenize.open(files[position]) as stream:
                text = stream.read()
        except (SyntaxError, UnicodeDecodeError, OSError):
            continue
        if text.strip() and text not in found:
            found[text] = None
            size += len(text)
    return list(found)


def to_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """One stream of ids `[N]`, a text end after each text."""
    parts = []
    for first in range(0, len(texts), 1000):
        for text in tokenizer(texts[first : first + 1000], add_special_tokens=False, verbose=False)["input_ids"]:
            parts.append(torch.tensor([*text, tokenizer.eos_token_id]))
    return torch.cat(parts)


def loss_of(model: GPT2LMHeadModel, window: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss of windows `[B, T + 1]`."""
    window = window.to(model.device)
    with torch.autocast("cuda", dtype=torch.bfloat16) if model.device.type == "cuda" else nullcontext():
        logits = model(window[:, :-1]).logits
    return F.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: GPT2LMHeadModel, ids: torch.Tensor, length: int) -> float:
    """Token perplexity over non-overlapping windows of `length` tokens."""
    windows = ids[: (len(ids) - 1) // length * length + 1].unfold(0, length + 1, length)
    losses = [loss_of(model, part) * len(part) for part in windows.split(16)]
    return math.exp(torch.stack(losses).sum().item() / len(windows))


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised by five Newton-Schulz steps (Jordan et al. 2024).

    torch.optim.Muon computes these steps in bfloat16, which is 40 times slower than float32 on CPUs without it.
    """

    def __init__(self, parameters: Sequence[torch.Tensor], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update each matrix `[rows, columns]` by its orthogonalised momentum."""
        for group in self.param_groups:
            for parameter in group["params"]:
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                average.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonalise(parameter.grad.lerp(average, group["momentum"]))
                scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
                parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonalise(matrix: torch.Tensor) -> torch.Tensor:
    """U Vᵀ of the matrix's SVD, roughly, in float32."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = wide / (wide.norm() + 1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if matrix.shape[0] <= matrix.shape[1] else x.T


def optimizers(model: GPT2LMHeadModel, rate: float, adam_rate: float) -> Sequence[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for everything else."""
    inner = [p for p in model.transformer.h.parameters() if p.ndim == 2]
    chosen = {id(p) for p in inner}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [
        Muon(inner, lr=rate),
        torch.optim.AdamW(rest, lr=adam_rate, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_factor(step: int, steps: int) -> float:
    """Warm-up over 100 steps, constant, then linear decay over the last half."""
    return min((step + 1) / 100, 1.0, max(0.0, 2 * (1 - step / steps)))


def main() -> None:
    """Train, report, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=3e-3)
    parser.add_argument("--width", type=int, default=CONFIG["n_embd"])
    parser.add_argument("--blocks", type=int, default=CONFIG["n_layer"])
    parser.add_argument("--heads", type=int, default=CONFIG["n_head"])
    parser.add_argument("--packages", type=int, default=0, help="millions of characters of installed packages' sources")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)

    library = read_modules("train")
    tokenizer = train_tokenizer(library)
    more = package_sources(arguments.packages * 10**6, arguments.seed) if arguments.packages else []
    stream = to_ids(tokenizer, library + more)
    held_out = {split: to_ids(tokenizer, read_modules(split)) for split in HELD_OUT}
    config = CONFIG | {"n_embd": arguments.width, "n_layer": arguments.blocks, "n_head": arguments.heads}
    model = GPT2LMHeadModel(GPT2Config(**config)).to(arguments.device)
    length = CONFIG["n_positions"] - 1

    opts = optimizers(model, arguments.rate, arguments.adam_rate)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate_factor(step, arguments.steps)) for o in opts]
    generator = torch.Generator().manual_seed(arguments.seed)
    curve, start = [], time.time()
    for step in range(arguments.steps):
        offsets = torch.randint(len(stream) - length - 1, (arguments.batch,), generator=generator)
        window = torch.stack([stream[o : o + length + 1] for o in offsets.tolist()])
        loss = loss_of(model, window)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(opts, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if step % 200 == 199 or step == arguments.steps - 1:
            valid = perplexity(model, held_out["validation"][:30_000], length)
            curve.append(
                {
                    "step": step + 1,
                    "train_loss": round(loss.item(), 4),
                    "validation_perplexity": round(valid, 3),
                    "seconds": round(time.time() - start, 1),
                }
            )
            print(curve[-1], flush=True)

    model.half().save_pretrained(arguments.output)
    tokenizer.save_pretrained(arguments.output)
    model.float()
    log = {
        "command": " ".join(["python benchmarks/train_demo.py", *sys.argv[1:]]),
        "arguments": {key: str(value) for key, value in vars(arguments).items()},
        "environment": {
            "python": platform.python_version(), "torch": torch.__version__,
            "machine": platform.machine(), "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
        },
        "config": config,
        "tokens": {"stream": len(stream), **{split: len(ids) for split, ids in held_out.items()}},
        "parameters": sum(p.numel() for p in model.parameters()),
        "perplexity": {split: perplexity(model, ids, length) for split, ids in held_out.items()},
        "curve": curve,
    }  # fmt: skip
    arguments.log.parent.mkdir(parents=True, exist_ok=True)
    arguments.log.write_text(json.dumps(log, indent=1) + "\n")


if __name__ == "__main__":
    main()
