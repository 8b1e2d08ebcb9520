"""The built-in model is what its log says, and small enough to ship."""

import json
from pathlib import Path

import torch
import transformers

from lrcompress.data import DataSource, read_rows, windows
from lrcompress.evaluate import Perplexity
from lrcompress.evaluate.run import measure_rows
from lrcompress.source import DEMO
from lrcompress.stdlib import HELD_OUT, SPLITS, module_files
from lrcompress.tasks import CausalLM

LOG = json.loads((Path(__file__).parent.parent / "benchmarks/results/train_demo.json").read_text())


def test_it_is_at_most_ten_megabytes():
    assert sum(file.stat().st_size for file in DEMO.iterdir()) <= 10_000_000


def test_it_predicts_held_out_modules(tmp_path: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    texts = read_rows(DataSource(path="python-stdlib", split="test"))
    examples = windows(texts, tokenizer, 256, None, None)
    rows = {"dense": {}}
    measured = measure_rows(
        model, rows, examples, [Perplexity()], CausalLM(), batch_size=16, state=tmp_path / "sums.json"
    )
    (perplexity,) = measured["dense"]
    assert perplexity.value <= 25
    assert LOG["perplexity"]["test"] <= 25
    assert LOG["parameters"] == model.num_parameters()


def test_splits_share_no_file():
    files = [set(module_files(split)) for split in SPLITS]
    assert all(files)
    assert not files[0] & files[1]
    assert not files[0] & files[2]
    assert not files[1] & files[2]
    assert {file.stem for file in files[2]} >= set(HELD_OUT["test"]) - {"string"}
