"""What an equal time buys, in place of equal steps: `python benchmarks/equal_time.py BED [--keep SHARE]...`.

The tool compresses in a fresh run folder. What all its stages took together, statistics and refit among them, is what
the others have: each is trained with the bed's steps, which says how long one takes, and then again from the same
closed form with as many as fill that time, at the learning rate of its sweep; without one it is left out. Scored on
test data; to be run on a machine that does nothing else. Writes results/equal_time_BED.json as it goes on; what is
there is not measured again.
"""

import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.cell import Measuring
from benchmarks.experiments import beds, recipe_of
from benchmarks.runner import best_rate, read, whole_sweep
from benchmarks.study import Study, arguments
from lrcompress import recipe as recipes
from lrcompress.artifacts import read_json

TOOL = "the tool"
FEWER = "the tool, statistics of a quarter of the sequences between rounds"
ONE_GO = "the tool, in one go"
OTHERS = {
    ONE_GO: "components",
    "svd_llm, in the coordinates of its own SVD": "svd_llm-whitened",
    "svd_llm": "svd_llm",
}
"""What is given the tool's time → variant of the experiments; the first where the tool trains in rounds."""
BEDS = {"demo": (0.4, 0.2), "minilm-sst2": (0.15,)}
"""Bed → sizes, if none is asked for."""


class Trial:
    """One bed, size and seed."""

    def __init__(self, study: Study, keep: float, seed: int) -> None:
        self.study, self.keep, self.seed = study, keep, seed
        self.steps: int = study.bed.settings["recovery"]["steps"]

    def run(self) -> None:
        """What has no row yet; every variant in a folder of its own."""
        with self._measuring("rounds") as one:
            if not self._has(TOOL):
                self._add(one, TOOL, self.steps)
            tool = self._row(TOOL)
            if tool["rounds"] > 1 and not self._has(FEWER):
                self._add(one, FEWER, self.steps, {"rounds_calibration": 0.25})
        for name, variant in OTHERS.items():
            if self._has(f"{name}, as long") or (name == ONE_GO and tool["rounds"] == 1):
                continue
            if not self._sweep(variant):
                print(f"{self.study.bed.name}/{variant} has no whole sweep at {self.keep:g}: left out", flush=True)
                continue
            with self._measuring(variant) as one:
                self._add(one, name, self.steps)
                row = self._row(name)
                more = round((tool["total"] - row["total"]) / (row["seconds"]["recovery"] / self.steps))
                self._add(one, f"{name}, as long", max(self.steps + more, 1))

    @contextmanager
    def _measuring(self, variant: str) -> Iterator[Measuring]:
        with tempfile.TemporaryDirectory() as folder:
            yield Measuring(self.study.bed, variant, self.seed, Path(folder))

    def _add(self, one: Measuring, name: str, steps: int, changes: Mapping[str, Any] = {}) -> None:
        """Measure a row and write it, in place of a former one."""
        rate = best_rate(self._sweep(one.variant))
        row = one.measure(self.keep, rate, ("test",), False, {"recovery": {"steps": steps, **changes}})
        if "failed" in row:
            raise SystemExit(f"{name}: {row['failed']}")
        assert one.work is not None
        rounds = read_json(one.work.stage("recovery") / "check-plan.json")["rounds"]
        key = self._key(name)
        self.study.value["rows"] = [row for row in self.study.value["rows"] if not key.items() <= row.items()]
        self.study.add(
            one.work, **key, steps=steps, learning_rate=rate, rounds=rounds,
            total=sum(row["seconds"].values()), seconds=row["seconds"], parameters=row["parameters"],
            **row["scores"]["test"], dense_loss=row["dense"]["test"]["loss"],
        )  # fmt: skip

    def _sweep(self, variant: str) -> dict[str, Any]:
        return whole_sweep(self.study.bed, read(self.study.bed, variant), self.keep)

    def _key(self, name: str) -> dict[str, Any]:
        return {"candidate": name, "keep": self.keep, "seed": self.seed}

    def _has(self, name: str) -> bool:
        return self.study.has(**self._key(name))

    def _row(self, name: str) -> dict[str, Any]:
        row = self.study.row(**self._key(name))
        assert row is not None
        return row


if __name__ == "__main__":
    command = arguments(__doc__, list(BEDS))
    command.add_argument(
        "--keep", type=float, action="append", help="one of the bed's sizes; default: those of the page"
    )
    command.add_argument("--seeds", type=int, default=1, help="how many")
    given = command.parse_args()
    bed = beds()[given.bed]
    sizes = given.keep or BEDS[given.bed]
    if unknown := [size for size in sizes if size not in bed.keeps]:
        command.error(f"{given.bed} has the sizes {', '.join(map(str, bed.keeps))}, not {unknown[0]:g}")
    ours = Study(
        "equal_time", given.bed, recipes.resolve(recipe_of(bed, "rounds", BEDS[given.bed][0], bed.rates[0]))[1]
    )
    for seed in range(given.seeds):
        for size in sizes:
            Trial(ours, size, seed).run()
