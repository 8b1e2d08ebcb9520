"""Other forms of a compressed model compute the same, or are not written."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from models import TINY, tiny_batch, tiny_model
from runs import cli
from test_remote import save

import lrcompress
from lrcompress import exporting
from lrcompress.errors import ModelError, OutputError, StageError
from lrcompress.lowrank import ranks_of


def inputs(name: str) -> dict[str, torch.Tensor]:
    batch = tiny_batch(name)
    ids = batch["input_ids"]
    return {"input_ids": ids, "attention_mask": batch.get("attention_mask", torch.ones_like(ids))}


@pytest.mark.parametrize(("name", "int8"), [("gpt2", False), ("bert", True)])
def test_a_dense_one_loads_in_stock_transformers(name: str, int8: bool, tmp_path: Path):
    model = save(name, tmp_path / "model", pivoted=True, int8=int8)
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    done = cli("export", tmp_path, "--to", "dense")
    assert done.code == 0, done.err
    folder = tmp_path / "model-dense"
    assert done.out.strip().endswith(str(folder))
    assert (folder / "tokenizer.json").read_text() == "{}"
    assert not (folder / "modeling_lrcompress.py").exists()
    config = json.loads((folder / "config.json").read_text())
    assert not config.keys() & {"quantization_config", "auto_map"}
    dense = getattr(transformers, TINY[name].auto_class).from_pretrained(folder).eval()
    assert not ranks_of(dense)
    with torch.no_grad():
        assert torch.allclose(dense(**tiny_batch(name)).logits, model(**tiny_batch(name)).logits, atol=1e-4)


@pytest.mark.slow
def test_a_program_takes_any_batch_and_length_and_needs_no_lrcompress(tmp_path: Path):
    model = save("gpt2", tmp_path / "model", pivoted=True)
    folder = lrcompress.export(tmp_path / "model", "torch-export", tmp_path / "out")
    with zipfile.ZipFile(folder / exporting.PROGRAM) as parts:
        assert not any(b"site-packages" in parts.read(part) for part in parts.namelist())
    batch = inputs("gpt2")
    with torch.no_grad():
        torch.save((batch, model(**batch).logits), tmp_path / "wanted.pt")
    code = f"""
import sys, torch
program = torch.export.load({str(folder / exporting.PROGRAM)!r}).module()
batch, wanted = torch.load({str(tmp_path / "wanted.pt")!r})
assert torch.allclose(program(batch["input_ids"], batch["attention_mask"]), wanted, atol=1e-5)
assert "lrcompress" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bert", "llama-tied"])
def test_onnx_computes_the_same_from_a_smaller_file(name: str, tmp_path: Path):
    import onnxruntime

    model = save(name, tmp_path / "model", pivoted=True)
    folder = lrcompress.export(tmp_path / "model", "onnx")
    file = folder / exporting.GRAPH
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    batch = inputs(name)
    if name == "bert":  # which text of a pair a token is of
        batch["token_type_ids"] = (torch.arange(batch["input_ids"].shape[1]) % 2).expand_as(batch["input_ids"])
    (found,) = session.run(["logits"], {key: value.numpy() for key, value in batch.items()})
    with torch.no_grad():
        wanted = model(**batch).logits
    difference = (torch.from_numpy(found) - wanted).abs()
    real = difference[batch["attention_mask"].bool()] if wanted.ndim == 3 else difference
    assert real.max() <= 1e-4 * wanted.abs().max()
    weights = sum(value.numel() * 4 for value in model.parameters())
    size = sum(part.stat().st_size for part in folder.iterdir())
    assert size < weights + 200_000  # a graph has its operations beside the weights
    assert b"site-packages" not in file.read_bytes()


def test_remote_code_is_renewed(tmp_path: Path):
    model = save("bert", tmp_path / "model")
    (tmp_path / "model" / "modeling_lrcompress.py").unlink()
    folder = lrcompress.export(tmp_path / "model", "remote-code")
    assert (folder / "modeling_lrcompress.py").is_file()
    again = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    assert ranks_of(again) == ranks_of(model)


@pytest.mark.parametrize("name", ["t5", "vit", "whisper", "bert-embeddings", "mixtral"])
def test_a_model_that_reads_something_else_is_exported_too(name: str, tmp_path: Path):
    model = save(name, tmp_path / "model")
    folder = lrcompress.export(tmp_path / "model", "dense")
    again = getattr(transformers, TINY[name].auto_class).from_pretrained(folder)
    assert ranks_of(again) == {}
    assert [*again.state_dict()] == [*tiny_model(name).state_dict()]
    assert ranks_of(model)


def test_what_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save("bert", tmp_path / "model")
    monkeypatch.setattr(exporting, "merge", lambda model: next(model.parameters()).data.add_(1))
    with pytest.raises((StageError, RuntimeError), match=r"computes something else|still says"):
        lrcompress.export(tmp_path / "model", "dense")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_bad_input_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ModelError, match="no compressed model"):
        lrcompress.export(tmp_path, "dense")
    save("t5", tmp_path / "model")
    with pytest.raises(ModelError, match="T5ForConditionalGeneration"):
        lrcompress.export(tmp_path, "torch-export")
    save("mixtral", tmp_path / "mixture")
    with pytest.raises(ModelError, match="mixture of experts"):
        lrcompress.export(tmp_path / "mixture", "torch-export")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="not empty"):
        lrcompress.export(tmp_path, "dense", tmp_path / "full")
    assert cli("export", tmp_path, "--to", "gguf").code == 2
    monkeypatch.setattr(exporting, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"lrcompress\[export\]"):
        lrcompress.export(tmp_path, "onnx", tmp_path / "graph")
