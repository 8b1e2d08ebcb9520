"""The built-in model is what its log says, and small enough to ship."""

import json
from pathlib import Path

import torch
import transformers

from lrcompress.source import DEMO
from lrcompress.stdlib import HELD_OUT, SPLITS, module_files

LOG = json.loads((Path(__file__).parent.parent / "benchmarks/results/train_demo.json").read_text())


def test_it_is_at_most_ten_megabytes():
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 10_000_000


def test_it_predicts_held_out_code():
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    text = next(file for file in module_files("test") if file.name == "heapq.py").read_text()
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"][:1530]).view(-1, 255)
    with torch.inference_mode():
        loss = model(ids, labels=ids).loss
    assert loss.exp().item() <= 25
    assert LOG["perplexity"]["test"] <= 25
    assert LOG["parameters"] == model.num_parameters()


def test_splits_share_no_file():
    files = [set(module_files(split)) for split in SPLITS]
    assert all(files)
    assert not files[0] & files[1]
    assert not files[0] & files[2]
    assert not files[1] & files[2]
    assert {file.stem for file in files[2]} >= set(HELD_OUT["test"]) - {"string"}
