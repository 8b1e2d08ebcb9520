"""Latencies as values: all samples, their percentiles, the ratio to the dense model, and their JSON."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from lrcompress.artifacts import read_json, write_json

Phase = Literal["prefill", "decode", "forward"]

_RESAMPLES = 2000


@dataclass(frozen=True)
class Timing:
    """All samples of one latency, in seconds, in the order they were taken."""

    seconds: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.seconds:
            raise ValueError("a Timing needs at least one sample")

    @property
    def median_ms(self) -> float:
        """Median, milliseconds."""
        return self._quantile_ms(0.5)

    @property
    def p10_ms(self) -> float:
        """10th percentile, linear between samples, milliseconds."""
        return self._quantile_ms(0.1)

    @property
    def p90_ms(self) -> float:
        """90th percentile, linear between samples, milliseconds."""
        return self._quantile_ms(0.9)

    def _quantile_ms(self, q: float) -> float:
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(q).item() * 1e3


@dataclass(frozen=True)
class RowTiming:
    """One latency of one row, beside the dense row's, with what is needed to read it."""

    row: str
    batch: int
    phase: Phase
    """prefill: the prompt up to its first token; decode: one further token with KV cache, a sample being the
    mean of a repetition; forward: one call on a whole batch"""
    timing: Timing
    ratio_to_dense: float
    """median of this row / median of the dense row; above 1 is slower than dense"""
    ratio_low: float
    """lower end of the ratio's 95 % interval"""
    ratio_high: float
    """upper end of the ratio's 95 % interval"""
    prompt: int | None
    """tokens of each input; None where the caller made the inputs"""
    generate: int | None
    """tokens decoded in each repetition; None for forward"""
    device: str
    threads: int
    """PyTorch's threads inside one operation on the CPU"""
    dtype: str
    clock: str

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of the whole batch read (prefill) or written (decode) in a second; None for forward."""
        if self.phase == "forward":
            return None
        tokens = self.batch * (1 if self.phase == "decode" else self.prompt or 1)
        return tokens * 1e3 / self.timing.median_ms

    @property
    def examples_per_second(self) -> float | None:
        """Inputs of the whole batch in a second; None for prefill and decode."""
        return self.batch * 1e3 / self.timing.median_ms if self.phase == "forward" else None

    def summary(self) -> dict[str, Any]:
        """The entry of a report's `latency` list."""
        timing, rate = self.timing, self.examples_per_second or self.tokens_per_second
        return {
            "batch": self.batch,
            "phase": self.phase,
            "median_ms": timing.median_ms,
            "p10_ms": timing.p10_ms,
            "p90_ms": timing.p90_ms,
            "ratio_to_dense": self.ratio_to_dense,
            "ratio_low": self.ratio_low,
            "ratio_high": self.ratio_high,
            "per_second": rate,
        }

    def to_json(self) -> dict[str, Any]:
        """Everything, with all samples, as JSON values; `from_json` takes it back."""
        return asdict(self) | {"timing": {"seconds": list(self.timing.seconds)}}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "RowTiming":
        """What `to_json` gave."""
        return cls(**{**value, "timing": Timing(tuple(value["timing"]["seconds"]))})


def ratio_interval(samples: Sequence[float], reference: Sequence[float]) -> tuple[float, float]:
    """95 % interval of median(samples) / median(reference), by bootstrap over pairs taken side by side.

    2000 resamples with a fixed seed; both sequences in the order of the repetitions, of equal length.
    """
    pairs = torch.tensor([list(samples), list(reference)], dtype=torch.float64)  # [2, repetitions]
    count = pairs.shape[1]
    picks = torch.randint(count, (_RESAMPLES, count), generator=torch.Generator().manual_seed(0))
    medians = pairs[:, picks].quantile(0.5, dim=-1)  # [2, resamples]
    ends = (medians[0] / medians[1]).quantile(torch.tensor([0.025, 0.975], dtype=torch.float64))
    return ends[0].item(), ends[1].item()


def write_timings(path: Path, timings: Sequence[RowTiming], peaks: Mapping[str, int]) -> None:
    """One JSON file of all samples and peaks; `read_timings` takes it back."""
    write_json(path, {"latency": [timing.to_json() for timing in timings], "peak_memory_bytes": dict(peaks)})


def read_timings(path: Path) -> tuple[list[RowTiming], dict[str, int]]:
    """What `write_timings` wrote."""
    value = read_json(path)
    return [RowTiming.from_json(item) for item in value["latency"]], value["peak_memory_bytes"]
