"""Imports go down only: a table of what each part of the package may import."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import lrcompress

ROOT = Path(lrcompress.__file__).parent
FILES = sorted(file for file in ROOT.rglob("*.py"))

TOP = {
    "cli",
    "__main__",
    "pipeline",
    "redo",
    "terminal",
    "preflight",
    "stages",
    "rank_stages",
    "recovery_stage",
    "analysis_stage",
    "chain",
    "build",
    "api",
    "workspace",
}

BOTTOM = {"errors", "artifacts", "part", "linalg", "patterns", "seeds"}
CLOSED: dict[str, set[str]] = {
    "errors": set(),
    "part": set(),
    "patterns": set(),
    "seeds": set(),
    "peak": set(),
    "heap": set(),
    "hub": {"errors"},
    "artifacts": {"errors", "part"},
    "linalg": {"artifacts", "errors", "part"},
    "methods": {"artifacts", "errors", "linalg", "part", "patterns"},
    "ranks": {"artifacts", "errors", "linalg", "part", "patterns", "recovery", "seeds", "subspaces"},
    "subspaces": {"linalg"},
    "selection": BOTTOM | {"evaluate", "layers", "lowrank", "progress", "ranks", "recovery", "tasks"},
    "layers": BOTTOM,
    "int8": set(),
    "remote": set(),
    "lowrank": BOTTOM | {"int8", "remote"},
    "experts": {"lowrank"},
    "tasks": BOTTOM | {"data"},
    "data": BOTTOM | {"stdlib", "hub"},
    "calibrate": BOTTOM | {"experts", "methods", "layers", "tasks"},
    "recovery": BOTTOM | {"layers", "lowrank", "tasks", "data"},
    "evaluate": BOTTOM | {"layers", "lowrank", "tasks", "data"},
    "timing": BOTTOM | {"layers", "lowrank", "tasks", "latency", "peak"},
    "adapters": {"errors", "int8", "layers", "lowrank"},
    "loading": BOTTOM | {"experts", "layers", "lowrank"},
    "checkpoint": BOTTOM | {"layers", "lowrank", "loading"},
    "exporting": {"errors", "experts", "hf", "source", "tasks"},
    "source": BOTTOM | {"experts", "hf", "hub", "tasks"},
    "registration": set(),
    "upload": {"errors", "registration", "report"},
    "hf": BOTTOM | {"experts", "layers", "lowrank", "loading", "registration"},
    "analysis": BOTTOM | {"methods", "ranks", "recovery", "report", "subspaces"},
    "recipe": BOTTOM | {"analysis", "data", "evaluate", "layers", "methods", "ranks", "recovery", "refit", "timing"},
    "refit": BOTTOM | {"evaluate", "heap", "layers", "lowrank", "tasks"},
    "pivoting": BOTTOM | {"int8", "recovery"},
    "vllm": {"artifacts", "errors", "hf", "lowrank", "registration"},
}
"""Part (module or subpackage) → parts of ours that it may import, its own aside."""

MODEL_CODE = {"transformers", "safetensors", "huggingface_hub", "datasets", "pathlib", "os", "shutil", "io", "json"}
"""What methods and ranks never see: models and the disk."""


def part_of(file: Path) -> str:
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def imported(file: Path, *, everywhere: bool = True) -> frozenset[str]:
    """Full names of imported modules; `from package import x` counts as `package.x` where that is a module."""
    tree = parsed(file)
    skipped = {id(n) for node in ast.walk(tree) if _is_type_checking(node) for n in ast.walk(node)}
    nodes = ast.walk(tree) if everywhere else tree.body
    names: set[str] = set()
    for node in nodes:
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = _absolute(node, file)
            folder = ROOT.joinpath(*module.split(".")[1:])
            inside = {alias.name for alias in node.names if (folder / f"{alias.name}.py").exists()}
            if module.startswith("lrcompress"):
                inside |= {alias.name for alias in node.names if module == "lrcompress"}
                names |= {f"{module}.{name}" for name in inside}
            if not module.startswith("lrcompress") or (len(inside) < len(node.names)):
                names.add(module)
    return frozenset(names)


def _absolute(node: ast.ImportFrom, file: Path) -> str:
    if not node.level:
        return str(node.module)
    package = ("lrcompress", *file.relative_to(ROOT).parts[:-1])
    return ".".join((*package[: len(package) - node.level + 1], *([node.module] if node.module else [])))


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def ours(file: Path) -> set[str]:
    """Parts of this package that a file imports, its own part aside."""
    parts = {name.split(".")[1] for name in imported(file) if name.startswith("lrcompress.")}
    return parts - {part_of(file), "__version__"}


def others(file: Path, *, everywhere: bool = True) -> set[str]:
    return {name.split(".")[0] for name in imported(file, everywhere=everywhere)} - {"lrcompress"}


@pytest.mark.parametrize("part", CLOSED)
def test_imports_of_ours_are_those_of_the_table(part: str) -> None:
    files = [file for file in FILES if part_of(file) == part]
    assert files, f"{part} is gone: remove it from the table"
    for file in files:
        assert ours(file) <= CLOSED[part], f"{file.relative_to(ROOT)}: {ours(file) - CLOSED[part]}"


def test_the_table_itself_goes_down_only() -> None:
    done: set[str] = {"stdlib", "latency", "progress", "report"}
    left = dict(CLOSED)
    while left:
        ready = {part for part, needs in left.items() if needs <= done | {part}}
        assert ready, f"a circle among {sorted(left)}"
        done |= ready
        left = {part: needs for part, needs in left.items() if part not in ready}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_nothing_below_imports_what_is_above(file: Path) -> None:
    part = part_of(file)
    if part in TOP or part == "__init__":
        return
    assert not ours(file) & TOP, f"{ours(file) & TOP}"


def test_the_command_line_is_at_the_very_top() -> None:
    for file in FILES:
        allowed = {"__main__"} if part_of(file) != "cli" else set()
        assert part_of(file) in {"cli", *allowed} or "cli" not in ours(file), file
        if part_of(file) not in {"cli", "terminal", "__main__"}:
            assert "terminal" not in ours(file), file
        if part_of(file) not in {"cli", "terminal", "__main__", "__init__"}:
            assert "pipeline" not in ours(file), file


@pytest.mark.parametrize("part", ["methods", "ranks", "linalg", "subspaces", "patterns", "part"])
def test_below_the_line_there_are_only_tensors(part: str) -> None:
    for file in (file for file in FILES if part_of(file) == part):
        assert not others(file) & MODEL_CODE, file
        assert not {name for name in imported(file) if name.startswith("torch.nn")}, file
        used = {node.id for node in ast.walk(parsed(file)) if isinstance(node, ast.Name)}
        assert not used & {"open", "nn"}, file


def test_recipe_and_ranks_read_only_the_settings_of_the_recovery() -> None:
    for file in (ROOT / "recipe.py", *(ROOT / "ranks").glob("*.py")):
        used = {name for name in imported(file) if name.startswith("lrcompress.recovery")}
        assert used <= {"lrcompress.recovery.settings"}, file


def test_only_layers_knows_conv1d() -> None:
    """Comments and docstrings may speak of it; code may not."""
    knowing = set()
    for file in FILES:
        for node in ast.walk(parsed(file)):
            names = [getattr(node, key, None) for key in ("id", "attr", "name")]
            if "Conv1D" in names:
                knowing.add(file.relative_to(ROOT).as_posix())
    assert knowing == {"layers.py", "remote/modeling_lrcompress.py"}  # the latter is alone in its checkpoint


def test_no_class_is_told_by_its_name() -> None:
    """Layer kinds are told by type: no string comparison with the layer that stores its weight transposed."""
    for file in FILES:
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.Compare):
                constants = [n.value for n in ast.walk(node) if isinstance(n, ast.Constant)]
                assert "Conv1D" not in constants, file


def test_heavy_optional_libraries_are_imported_where_they_are_used() -> None:
    for file in FILES:
        assert not others(file, everywhere=False) & {
            "datasets",
            "pandas",
            "accelerate",
            "matplotlib",
            "lm_eval",
            "numpy",
        }, file


def test_only_the_plugin_for_vllm_imports_vllm_and_that_when_it_is_called() -> None:
    assert {part_of(file) for file in FILES if "vllm" in others(file)} == {"vllm"}
    heavy = "{'torch', 'transformers', 'vllm'}"
    script = f"import sys, lrcompress.vllm as plugin; plugin.register; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_no_cycles_between_modules() -> None:
    graph = {}
    for file in FILES:
        name = ".".join(("lrcompress", *file.relative_to(ROOT).with_suffix("").parts)).removesuffix(".__init__")
        graph[name] = imported(file, everywhere=False) - {name}
    known, state = set(graph), {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != "open", " → ".join((*path, name))
        if name in state:
            return
        state[name] = "open"
        for other in sorted(graph[name] & known):
            visit(other, (*path, name))
        state[name] = "done"

    for name in sorted(known):
        visit(name, ())


def test_every_imported_package_is_a_dependency() -> None:
    allowed = {
        "torch",
        "transformers",
        "safetensors",
        "huggingface_hub",
        "onnxruntime",
        "datasets",
        "pandas",
        "pydantic",
        "yaml",
        "click",
    }
    allowed |= {"rich", "jinja2", "matplotlib", "accelerate", "PIL", "soundfile", "jiwer"}
    allowed |= {"lm_eval", "numpy", "vllm", *sys.stdlib_module_names}
    for file in FILES:
        assert others(file) <= allowed, (file, others(file) - allowed)
