"""Runs what has no result yet, in one child process at a time or several; a killed run goes on where it was."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Event, Lock
from typing import Any

from benchmarks.beds import write_result
from benchmarks.experiments import RESULTS, ROOT, Bed, Cell, recipe_of, variant_settings
from lrcompress.recipe import parse

SWEEP_SEED = 100
"""Not among the seeds that are compared."""

BESIDE_OTHERS = "memory ran out with several processes side by side, which says nothing of a row: use fewer --jobs"
_writing = Lock()


def run(wanted: Iterable[Cell], scratch: Path, say: Any = print, jobs: int = 1) -> int:
    """Measure every cell that has no result, in `jobs` processes at a time; returns how many failed."""
    groups: dict[tuple[str, str, int], list[Cell]] = {}
    for cell in wanted:
        groups.setdefault((cell.bed.name, cell.variant, cell.seed), []).append(cell)
    workers = Workers(scratch, jobs)
    sweeps: dict[tuple[str, str, float], Future[float]] = {}
    todo = []
    with ThreadPoolExecutor(jobs) as pool:
        try:
            # trained variants first: the start of their training is the row of a closed form
            for cells in sorted(groups.values(), key=lambda cells: not _trains(cells[0].bed, cells[0].variant)):
                bed, variant = cells[0].bed, cells[0].variant
                if all(map(is_done, cells)):
                    continue
                why = bed.missing()
                if why is not None:
                    say(f"{bed.name}: skipped: {why}")
                    continue
                todo.append(cells)
                for size in sorted({bed.swept_for(cell.keep) for cell in cells}) if _trains(bed, variant) else ():
                    key = (bed.name, variant, size)
                    if key not in sweeps:
                        sweeps[key] = pool.submit(_swept_rate, bed, variant, size, workers, say)
            # sweeps are before the rows that wait for them, so whoever waits waits for one that runs
            counts = [pool.submit(_measure_group, cells, sweeps, workers, say) for cells in todo]
            return sum(count.result() for count in counts)
        except BaseException:  # Ctrl-C, or one that could not go on: nothing new begins
            workers.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


class Workers:
    """What processes side by side share: scratch folders, each for one of them, and the sign to stop."""

    def __init__(self, scratch: Path, jobs: int) -> None:
        self.alone = jobs == 1
        self.stopped = Event()
        self._free: Queue[Path] = Queue()
        for number in range(jobs):
            self._free.put(scratch if self.alone else scratch / str(number))

    @contextmanager
    def place(self) -> Iterator[Path]:
        """A scratch folder that nobody else has meanwhile."""
        place = self._free.get()
        try:
            yield place
        finally:
            self._free.put(place)


def _measure_group(
    cells: Sequence[Cell], sweeps: Mapping[tuple[str, str, float], "Future[float]"], workers: Workers, say: Any
) -> int:
    """The cells of one variant and seed, once their sweeps are through; returns how many failed."""
    bed, variant, seed = cells[0].bed, cells[0].variant, cells[0].seed
    keys = {cell.keep: (bed.name, variant, bed.swept_for(cell.keep)) for cell in cells}
    rates = {keep: sweeps[key].result() if key in sweeps else None for keep, key in keys.items()}
    todo = [(cell.keep, rates[cell.keep]) for cell in cells if not is_done(cell)]
    return _measure(bed, variant, seed, todo, workers, say) if todo else 0


def is_done(cell: Cell) -> bool:
    """Whether it has a result, at the learning rate that is the best of the whole sweep."""
    value = read(cell.bed, cell.variant)
    row = value["rows"].get(cell_key(cell.keep, cell.seed))
    if row is None or not _trains(cell.bed, cell.variant):
        return row is not None
    sweep = sweep_of(value, cell.bed.swept_for(cell.keep))
    return next_rate(sweep, cell.bed.rates) is None and row["learning_rate"] == best_rate(sweep)


def sweep_of(value: Mapping[str, Any], keep: float) -> dict[str, Any]:
    """Learning rate → row, of the sweep at a size."""
    return {key.split("/")[-1]: row for key, row in value["sweep"].items() if row["keep"] == keep}


def read(bed: Bed, variant: str) -> dict[str, Any]:
    """The results of a variant so far."""
    file = result_file(bed, variant)
    if file.exists():
        return json.loads(file.read_text())
    return {"command": f"python -m benchmarks run {bed.name}/{variant}", "bed": bed.name, "variant": variant,
            "about": variant_settings(bed, variant)["about"], "recipe": None, "sweep": {}, "rows": {}}  # fmt: skip


def result_file(bed: Bed, variant: str) -> Path:
    """Where they are."""
    return RESULTS / bed.name / f"{variant}.json"


def cell_key(keep: float, seed: int | str) -> str:
    """Of a row in the file of its variant; of a sweep's, by its learning rate."""
    return f"{keep:g}/{seed}"


def next_rate(sweep: Mapping[str, Mapping[str, Any]], rates: Sequence[float]) -> float | None:
    """The learning rate to try next: from the middle of the grid on, until both neighbours of the best are worse.

    The same walk for every variant; None at its end. `rates` ascend.
    """
    tried = [rate for rate in rates if f"{rate:g}" in sweep]
    if not tried:
        return rates[len(rates) // 2]
    if all("failed" in sweep[f"{rate:g}"] for rate in tried):
        return next((rate for rate in reversed(rates) if rate < tried[0]), None)  # it broke down: go lower
    best = [f"{rate:g}" for rate in rates].index(f"{best_rate(sweep):g}")
    neighbours = [rates[i] for i in (best - 1, best + 1) if 0 <= i < len(rates)]
    return next((rate for rate in neighbours if rate not in tried), None)


def best_rate(sweep: Mapping[str, Mapping[str, Any]]) -> float:
    """The learning rate of the least validation KL; a rate at which training broke down loses."""
    scores = {rate: row["scores"]["validation"] for rate, row in sweep.items() if "failed" not in row}
    if not scores:
        raise SystemExit(f"no learning rate of the sweep trained: {', '.join(sweep)}")
    return float(min(scores, key=lambda rate: scores[rate]["kl"]))


def whole_sweep(bed: Bed, value: Mapping[str, Any], keep: float) -> dict[str, Any]:
    """The sweep that a size takes its learning rate from; nothing where it goes on, and so has chosen none."""
    found = sweep_of(value, bed.swept_for(keep))
    return found if next_rate(found, bed.rates) is None else {}


def untrained_of(bed: Bed, variant: str) -> str | None:
    """The variant that is this one's state before its training, where there is one."""
    recipe = recipe_of(bed, variant, bed.sweeps[0])
    if recipe["recovery"] is None:
        return None
    start = recipe | {"recovery": None}
    return next((other for other in bed.variants if recipe_of(bed, other, bed.sweeps[0]) == start), None)


def _trains(bed: Bed, variant: str) -> bool:
    return recipe_of(bed, variant, bed.sweeps[0])["recovery"] is not None


def _swept_rate(bed: Bed, variant: str, keep: float, workers: Workers, say: Any) -> float:
    while (rate := next_rate(sweep_of(read(bed, variant), keep), bed.rates)) is not None:
        _measure(bed, variant, SWEEP_SEED, [(keep, rate)], workers, say)
    return best_rate(sweep_of(read(bed, variant), keep))


def _measure(
    bed: Bed, variant: str, seed: int, todo: list[tuple[float, float | None]], workers: Workers, say: Any
) -> int:
    """Run the child, and write each row as it comes; returns how many failed."""
    with workers.place() as scratch:
        if workers.stopped.is_set():
            raise KeyboardInterrupt
        return _run_child(bed, variant, seed, todo, scratch, workers.alone, say)


def _run_child(
    bed: Bed,
    variant: str,
    seed: int,
    todo: list[tuple[float, float | None]],
    scratch: Path,
    alone: bool,
    say: Any,
) -> int:
    swept = seed == SWEEP_SEED
    method = recipe_of(bed, variant, bed.sweeps[0])["method"]["kind"]
    folder = scratch / bed.name / method / f"seed-{seed}"  # equal statistics, equal folder
    job = {
        "bed": bed.name, "variant": variant, "seed": seed, "cells": todo, "folder": str(folder),
        "splits": ["validation"] if swept else ["validation", "test"],
    }  # fmt: skip
    untrained = None if swept else untrained_of(bed, variant)
    if untrained is not None:
        job["untrained"] = [k for k, _ in todo if not is_done(Cell(bed, untrained, k, seed))]
    with tempfile.TemporaryDirectory() as place:
        file, log = Path(place) / "job.json", Path(place) / "log"
        file.write_text(json.dumps(job))
        command = [sys.executable, "-m", "benchmarks.cell", str(file)]
        with (
            log.open("w") as errors,
            subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True) as child,
        ):
            assert child.stdout is not None
            rows = iter(todo)
            failed = 0
            for line in child.stdout:
                keep, rate = next(rows)
                row = json.loads(line)
                start = row.pop("untrained", None)
                if start is not None and untrained is not None:
                    _write(bed, untrained, seed, keep, None, start)
                    say(f"{bed.name}/{untrained}/{keep:g}/{seed} {_figures(start)}")
                failed += "failed" in row
                if not alone and "OutOfMemoryError" in row.get("failed", ""):
                    raise SystemExit(BESIDE_OTHERS)
                _write(bed, variant, seed, keep, rate, row)
                say(f"{bed.name}/{variant}/{keep:g}/{seed} {_figures(row)}")
        error = log.read_text()
    for keep, rate in rows:  # the child died: its first open row is the one that killed it
        last = error.strip().splitlines()[-1:] or ["no message"]
        row = {
            "keep": keep,
            "seed": seed,
            "learning_rate": rate,
            "failed": f"the process ended with {child.returncode}: {last[0]}",
        }
        if child.returncode in (-9, 137):
            if not alone:
                raise SystemExit(BESIDE_OTHERS)
            row["failed"] = "killed, most likely for memory"
        elif child.returncode != 0 and "KeyboardInterrupt" in error:
            raise KeyboardInterrupt
        _write(bed, variant, seed, keep, rate, row)
        say(f"{bed.name}/{variant}/{keep:g}/{seed} failed: {row['failed']}")
        return failed + 1
    return failed


def _write(bed: Bed, variant: str, seed: int, keep: float, rate: float | None, row: Mapping[str, Any]) -> None:
    with _writing:
        value = read(bed, variant)
        value["recipe"] = parse(recipe_of(bed, variant, keep, rate)).model_dump(mode="json")
        if seed == SWEEP_SEED:
            value["sweep"][cell_key(keep, f"{rate:g}")] = dict(row)
        else:
            value["rows"][cell_key(keep, seed)] = dict(row)
        write_result(result_file(bed, variant), value)


def _figures(row: Mapping[str, Any]) -> str:
    if "failed" in row:
        return f"failed: {row['failed']}"
    parts = [f"{split} KL {scores['kl']:.4f}" for split, scores in row["scores"].items()]
    rate = f", learning rate {row['learning_rate']:g}" if row["learning_rate"] else ""
    return f"{', '.join(parts)}{rate}, {row['wall_seconds']:.0f} s"
