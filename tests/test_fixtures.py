"""Checkpoints as they were once written, of every format, load for ever with the logits that they had."""

import json
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from fixtures.make_checkpoints import CASES, CHECKPOINTS, EXPECTED, MODULES, Mlp, main
from safetensors.torch import load_file
from test_remote import elsewhere
from transformers import AutoModelForCausalLM

import lrcompress
from lrcompress import checkpoint, hf
from lrcompress.errors import ModelError
from lrcompress.lowrank import is_int8, pivoted_in, ranks_of

TOLERANCE = 1e-5


@pytest.mark.parametrize(("place", "newest"), [(CHECKPOINTS, hf.FORMAT_VERSION), (MODULES, checkpoint.FORMAT_VERSION)])
def test_every_format_has_its_checkpoint(place: Path, newest: int):
    assert {folder.name for folder in place.iterdir()} == {f"format-{n}" for n in range(1, newest + 1)} == set(CASES)
    for folder in place.iterdir():
        file = folder / ("config.json" if place == CHECKPOINTS else checkpoint.DESCRIPTION)
        found = json.loads(file.read_text())
        version = found.get("quantization_config", found)["format_version"]
        assert folder.name == f"format-{version}"
        assert sum(file.stat().st_size for file in folder.iterdir()) < 60_000


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_loads_and_merges(name: str):
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name)
    expected, case = load_file(CHECKPOINTS / name / EXPECTED), CASES[name]
    assert ranks_of(model) == lrcompress.saved_ranks(CHECKPOINTS / name)
    assert bool(pivoted_in(model)) == case.pivoted
    assert is_int8(model) == case.int8
    for _ in range(2):
        with torch.no_grad():
            assert torch.allclose(model(expected["input_ids"]).logits, expected["logits"], rtol=0, atol=TOLERANCE)
        lrcompress.merge(model)
    assert not ranks_of(model)


def test_a_checkpoint_loads_by_the_file_beside_it(tmp_path: Path):
    """In one process, since each start of transformers takes seconds; the folder is copied as it is written to."""
    shutil.copytree(CHECKPOINTS, tmp_path / "checkpoints")
    newer = tmp_path / "checkpoints" / "newer"
    shutil.copytree(CHECKPOINTS / "format-1", newer)
    edit(newer / "config.json", hf.FORMAT_VERSION + 1)
    said = elsewhere(
        f"""
import pathlib, torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
for folder in sorted(pathlib.Path({str(tmp_path / "checkpoints")!r}).glob("format-*")):
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    expected = load_file(folder / {EXPECTED!r})
    with torch.no_grad():
        difference = (model(expected["input_ids"]).logits - expected["logits"]).abs().max()
    print(folder.name, bool(difference <= {TOLERANCE}))
try:
    AutoModelForCausalLM.from_pretrained({str(newer)!r}, trust_remote_code=True)
except ValueError as error:
    print(error)
""",
        tmp_path / "modules",
    )
    assert said.splitlines()[:-1] == [f"{name} True" for name in sorted(CASES)]
    assert f"format_version is {hf.FORMAT_VERSION + 1}" in said
    assert "get all of the checkpoint's files again" in said


@pytest.mark.parametrize("name", CASES)
def test_a_plain_module_loads(name: str):
    module, expected = Mlp(), load_file(MODULES / name / EXPECTED)
    lrcompress.load_module(module, MODULES / name)
    assert len(ranks_of(module)) == len(module.layers)
    assert is_int8(module) == CASES[name].int8
    with torch.no_grad():
        found = module.eval()(expected["x"])
    assert torch.allclose(found, expected["outputs"], rtol=0, atol=TOLERANCE)


def edit(file: Path, version: object) -> None:
    found = json.loads(file.read_text())
    found.get("quantization_config", found)["format_version"] = version
    file.write_text(json.dumps(found))


@pytest.mark.parametrize("ahead", [1, 100])
@pytest.mark.parametrize(
    ("place", "file", "newest", "load"),
    [
        (CHECKPOINTS, "config.json", hf.FORMAT_VERSION, AutoModelForCausalLM.from_pretrained),
        (MODULES, checkpoint.DESCRIPTION, checkpoint.FORMAT_VERSION, partial(lrcompress.load_module, Mlp())),
    ],
)
def test_a_newer_format_is_refused_with_what_to_do(
    place: Path, file: str, newest: int, load, ahead: int, tmp_path: Path
):
    folder = shutil.copytree(place / "format-1", tmp_path / "newer")
    edit(folder / file, newest + ahead)
    with pytest.raises(ModelError) as caught:
        load(folder)
    message = str(caught.value)
    assert all(part in message for part in (f"got: {newest + ahead}", f"1 to {newest}", "upgrade lrcompress"))


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_is_never_made_anew(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def files() -> dict[str, bytes]:
        return {str(file): file.read_bytes() for place in (CHECKPOINTS, MODULES) for file in place.glob("*/*")}

    before = files()
    monkeypatch.setattr("sys.argv", ["make_checkpoints.py", name])
    with pytest.raises(SystemExit):
        main()
    assert "never made anew" in capsys.readouterr().err
    assert files() == before
