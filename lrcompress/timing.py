"""Time and peak memory of a report's rows: dense and compressed variants of one model, side by side.

The order is A B A B ...: each repetition runs every row once, so that a drift of the machine (heat, other
work) meets all rows alike and the ratio of two rows is taken between neighbours in time.
"""

import inspect
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from lrcompress.errors import InputError, ModelError, RecipeError
from lrcompress.latency import Phase, RowTiming, Timing, ratio_interval
from lrcompress.lowrank import swapped
from lrcompress.part import Part
from lrcompress.peak import peak_of

Task = Literal["causal-lm", "other"]
Rows = Mapping[str, Mapping[str, nn.Module]]
T = TypeVar("T")

_POSITIONS_AFTER_PADDING = frozenset(
    "camembert data2vec-text esm ibert layoutlmv3 lilt longformer luke markuplm mpnet roberta "
    "roberta-prelayernorm xlm-roberta xlm-roberta-xl xmod".split()
)  # these count positions from pad_token_id + 1, so that their tables hold that many fewer


class TimingSpec(Part):
    """What is timed: the sizes of the input and how often it is run."""

    batches: tuple[Annotated[int, Field(ge=1, le=4096)], ...] = Field(default=(1, 8), min_length=1)
    """Batch sizes; each is timed by itself. Peak memory is that of the largest."""
    prompt: int = Field(default=128, ge=1)
    """Tokens of each input, drawn at random: the prompt of a causal language model, else the whole input."""
    generate: int = Field(default=32, ge=1)
    """Tokens decoded one at a time after the prompt; read for causal language models only."""
    repeats: int = Field(default=10, ge=3)
    """Repetitions that count; the report shows their median, 10th and 90th percentile."""
    warmup: int = Field(default=2, ge=0)
    """Repetitions before these that don't count."""


class Clock(Protocol):
    """Times a call."""

    @property
    def name(self) -> str:
        """For the report."""
        ...

    def measure(self, call: Callable[[], T]) -> tuple[float, T]:
        """Seconds that the call took, and what it returned."""
        ...


class CpuClock:
    """`time.perf_counter_ns` around the call."""

    name = "perf_counter_ns"

    def measure(self, call: Callable[[], T]) -> tuple[float, T]:
        """Seconds, and the call's result."""
        start = time.perf_counter_ns()
        result = call()
        return (time.perf_counter_ns() - start) / 1e9, result


class CudaClock:
    """CUDA events on the current stream, and one synchronise after the call.

    So the stream is empty when the next call begins: its launches are not hidden behind another row's work.
    """

    name = "cuda events"

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def measure(self, call: Callable[[], T]) -> tuple[float, T]:
        """Seconds between the two events, and the call's result."""
        with torch.cuda.device(self._device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            result = call()
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3, result


def clock_of(device: torch.device | str) -> Clock:
    """The clock of a device; InputError if it is neither a CPU nor a CUDA device."""
    place = torch.device(device)
    if place.type == "cuda":
        return CudaClock(place)
    if place.type == "cpu":
        return CpuClock()
    raise InputError("timing has no clock for this device", got=device, allowed="cpu, cuda", do="set timing: null")


def positions(config: Any) -> int | None:
    """Tokens that a model of this transformers config takes at most; None where it states no limit."""
    text = config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None) or getattr(text, "max_target_positions", None)
    if not isinstance(stated, int) or stated <= 0:
        return None
    if text.model_type in _POSITIONS_AFTER_PADDING:
        return stated - (text.pad_token_id or 0) - 1
    return stated


def check(spec: TimingSpec, config: Any, task: Task) -> None:
    """Raise RecipeError if the timed inputs are longer than a model of this transformers config takes."""
    limit, generate = positions(config), spec.generate if task == "causal-lm" else 0
    if limit is None or spec.prompt + generate <= limit:
        return
    if task == "other":
        what, got, do = "timing.prompt", f"{spec.prompt} tokens", f"set timing.prompt to at most {limit}"
    else:
        what, got = (
            "timing.prompt + timing.generate",
            f"{spec.prompt} + {generate} = {spec.prompt + generate} tokens",
        )
        do = f"set timing.prompt to at most {limit - generate}, or timing.generate lower"
        if generate >= limit:
            do = f"set timing.generate to at most {limit - 1}, and timing.prompt to what remains of {limit}"
    raise RecipeError(f"{what} is longer than the model takes", got=got, allowed=f"at most {limit} tokens", do=do)


@torch.inference_mode()
def time_rows(
    model: nn.Module,
    rows: Rows,
    spec: TimingSpec,
    *,
    task: Task,
    vocab_size: int,
    device: torch.device | str,
    seed: int = 0,
    inputs: Callable[[int], Mapping[str, Any]] | None = None,
    clock: Clock | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[RowTiming]:
    """Latency of each row, by batch size, then row, then phase.

    `rows` maps a row's name to the modules that stand at their names in the model while it runs; the first
    row with none is the dense one, ValueError if there is none. The modules are on `device` already; they and
    the model are left in eval mode. The model's own modules are back in place at the end, after an error too.
    Inputs are random tokens below `vocab_size` with a full attention mask, the same for all rows; `inputs`
    gives other ones: batch size → keyword arguments of the model, which is timed as 'forward' then.
    A causal language model without KV cache is timed as 'forward' too. `clock` is the device's own if None.
    """
    dense = _dense_row(rows)
    place = torch.device(device)
    clock = clock or clock_of(place)
    facts = _Facts(_device_name(place), torch.get_num_threads(), _dtype_name(model), clock.name)
    _eval(model, rows)
    timed: list[RowTiming] = []
    for batch in spec.batches:
        work = _workload(model, batch, spec, task, vocab_size, place, seed, inputs)
        samples: dict[str, list[dict[Phase, float]]] = {row: [] for row in rows}
        for repetition in range(spec.warmup + spec.repeats):
            if progress:
                progress(f"batch {batch}: repetition {repetition + 1}/{spec.warmup + spec.repeats}")
            for row, modules in rows.items():
                with swapped(model, modules):
                    seconds = _run(model, work, clock)
                if repetition >= spec.warmup:
                    samples[row].append(seconds)
        timed += _results(samples, dense, batch, work, facts)
    return timed


def peak_bytes(
    model: nn.Module,
    rows: Rows,
    spec: TimingSpec,
    *,
    task: Task,
    vocab_size: int,
    device: torch.device | str,
    seed: int = 0,
    inputs: Callable[[int], Mapping[str, Any]] | None = None,
) -> dict[str, int]:
    """Peak memory of each row in bytes, from an untimed pass of its own; arguments as for `time_rows`.

    It is the bytes of the row's parameters and buffers, plus the most bytes that tensors made in one
    repetition at the largest batch (activations, logits, KV cache) hold at one time, as `peak_of` counts
    them. Other rows' modules, the inputs, the interpreter and the libraries don't count.
    """
    place = torch.device(device)
    _eval(model, rows)
    work = _workload(model, max(spec.batches), spec, task, vocab_size, place, seed, inputs)
    peaks: dict[str, int] = {}
    for row, modules in rows.items():
        with swapped(model, modules):
            held = sum(tensor.nbytes for tensor in chain(model.parameters(), model.buffers()))
            peaks[row] = held + peak_of(lambda: _run(model, work, _NoClock()), place)
    return peaks


def cache_name(model: nn.Module) -> str | None:
    """What the model calls its KV cache, as an argument and in its output; None for one without a cache.

    transformers 5.24 renamed `past_key_values` to `cache`.
    """
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in ("cache", "past_key_values") if name in accepted), None)


def prefill(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Tensor, Any]:
    """A prompt (keyword arguments of the model) → the most probable next token [B, 1], and the KV cache."""
    output = model(**inputs)
    cache = getattr(output, cache_name(model) or "", None)
    if cache is None:
        raise ModelError(
            "the model returned no KV cache, so decoding cannot be timed",
            got=type(model).__name__,
            do="set timing: null",
        )
    return output.logits[:, -1:].argmax(-1), cache


def decode(model: nn.Module, token: Tensor, cache: Any, mask: Tensor, steps: int) -> Tensor:
    """Greedy tokens [B, steps] that follow `token` [B, 1]; mask [B, T + steps] for a cache of T tokens.

    Changes the cache. No token ends the text early, so each run has the same number of steps.
    """
    start, name = mask.shape[1] - steps, cache_name(model) or ""
    tokens: list[Tensor] = []
    for end in range(start + 1, start + steps + 1):
        output = model(input_ids=token, attention_mask=mask[:, :end], use_cache=True, **{name: cache})
        token, cache = output.logits[:, -1:].argmax(-1), getattr(output, name)
        tokens.append(token)
    return torch.cat(tokens, dim=1)


@dataclass(frozen=True)
class _Workload:
    inputs: Mapping[str, Any]  # keyword arguments of the first call
    mask: Tensor | None  # [B, prompt + steps]; None: forward only
    prompt: int | None
    steps: int


@dataclass(frozen=True)
class _Facts:
    device: str
    threads: int
    dtype: str
    clock: str


class _NoClock:
    name = "none"

    def measure(self, call: Callable[[], T]) -> tuple[float, T]:
        return 0.0, call()


def _dense_row(rows: Rows) -> str:
    dense = next((row for row, modules in rows.items() if not modules), None)
    if dense is None:
        raise ValueError("no row is dense: one row needs an empty mapping, as all ratios are to it")
    return dense


def _eval(model: nn.Module, rows: Rows) -> None:
    for module in chain([model], *(modules.values() for modules in rows.values())):
        module.eval()


def _workload(
    model: nn.Module,
    batch: int,
    spec: TimingSpec,
    task: Task,
    vocab_size: int,
    device: torch.device,
    seed: int,
    inputs: Callable[[int], Mapping[str, Any]] | None,
) -> _Workload:
    if inputs is not None:
        return _Workload(inputs(batch), None, None, 0)
    accepted = inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(vocab_size, (batch, spec.prompt), generator=generator).to(device)
    if task == "other" or cache_name(model) is None:
        return _Workload({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, None, spec.prompt, 0)
    mask = torch.ones(batch, spec.prompt + spec.generate, dtype=torch.long, device=device)
    call = {"input_ids": ids, "attention_mask": mask[:, : spec.prompt], "use_cache": True}
    if "logits_to_keep" in accepted:  # as `generate` does: the prompt's other logits are of no use
        call["logits_to_keep"] = 1
    return _Workload(call, mask, spec.prompt, spec.generate)


def _run(model: nn.Module, work: _Workload, clock: Clock) -> dict[Phase, float]:
    """One repetition: seconds by phase, those of decode per token."""
    mask = work.mask
    if mask is None:
        return {"forward": clock.measure(lambda: model(**work.inputs))[0]}
    first, (token, cache) = clock.measure(lambda: prefill(model, work.inputs))
    rest, _ = clock.measure(lambda: decode(model, token, cache, mask, work.steps))
    return {"prefill": first, "decode": rest / work.steps}


def _results(
    samples: Mapping[str, list[dict[Phase, float]]], dense: str, batch: int, work: _Workload, facts: _Facts
) -> list[RowTiming]:
    results: list[RowTiming] = []
    for row, repetitions in samples.items():
        for phase in repetitions[0]:
            timing = Timing(tuple(one[phase] for one in repetitions))
            reference = Timing(tuple(one[phase] for one in samples[dense]))
            low, high = ratio_interval(timing.seconds, reference.seconds)
            results.append(
                RowTiming(
                    row=row,
                    batch=batch,
                    phase=phase,
                    timing=timing,
                    ratio_to_dense=timing.median_ms / reference.median_ms,
                    ratio_low=low,
                    ratio_high=high,
                    prompt=work.prompt,
                    generate=work.steps or None,
                    **vars(facts),
                )
            )
    return results


def _dtype_name(model: nn.Module) -> str:
    floating = (tensor.dtype for tensor in model.parameters() if tensor.is_floating_point())
    return str(next(floating, torch.get_default_dtype())).removeprefix("torch.")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    table = Path("/proc/cpuinfo")
    lines = table.read_text().splitlines() if table.exists() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())
