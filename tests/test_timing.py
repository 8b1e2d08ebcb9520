"""Timing and peak memory: exact values by a fake clock, order, KV-cache decoding against `generate`."""

import json

import pytest
import torch
from pydantic import ValidationError
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    RobertaConfig,
    T5Config,
)

from lrcompress.errors import InputError, ModelError, RecipeError
from lrcompress.latency import RowTiming, Timing, ratio_interval, read_timings, write_timings
from lrcompress.lowrank import LowRankLinear
from lrcompress.peak import peak_of
from lrcompress.timing import (
    CpuClock,
    TimingSpec,
    check,
    clock_of,
    decode,
    peak_bytes,
    positions,
    prefill,
    time_rows,
)

SPEC = TimingSpec(batches=(1, 3), prompt=5, generate=4, repeats=3, warmup=2)
CPU = torch.device("cpu")


class FakeClock:
    """Runs the call and answers with the next number."""

    name = "fake"

    def __init__(self, seconds):
        self.seconds = iter(seconds)

    def measure(self, call):
        return next(self.seconds), call()


class Toy(nn.Module):
    """A 'classifier' that notes the name of the layer standing in it at each call."""

    def __init__(self, width=8):
        super().__init__()
        self.embed = nn.Embedding(11, width)
        self.layer = Named("A", width)
        self.seen = []

    def forward(self, input_ids, attention_mask):
        self.seen.append((self.layer.name, tuple(input_ids.shape), input_ids.sum().item()))
        assert attention_mask.all()
        assert not self.training
        assert torch.is_inference_mode_enabled()
        return self.layer(self.embed(input_ids))


class Named(nn.Linear):
    def __init__(self, name, width=8):
        super().__init__(width, width)
        self.name = name


class Broken(nn.Module):
    def forward(self, x):
        raise RuntimeError("broken layer")


def other(model, rows, spec=SPEC, **more):
    return time_rows(model, rows, spec, task="other", vocab_size=11, device=CPU, **more)


def gpt2():
    sizes = {"n_layer": 2, "n_head": 2, "n_embd": 16, "vocab_size": 50, "n_positions": 32}
    special = {"bos_token_id": 0, "eos_token_id": 0, "tie_word_embeddings": False}
    return GPT2LMHeadModel(GPT2Config(initializer_range=0.5, **sizes, **special))


def llama():
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "vocab_size": 50,
        "initializer_range": 0.5,
    }
    return LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))


def opt():
    sizes = {"hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 2, "vocab_size": 50}
    return OPTForCausalLM(
        OPTConfig(num_attention_heads=2, init_std=0.5, word_embed_proj_dim=16, max_position_embeddings=32, **sizes)
    )


def test_medians_percentiles_ratios_are_exact():
    spec = TimingSpec(batches=(2,), prompt=5, repeats=3, warmup=1)
    clock = FakeClock([99, 99, 0.010, 0.020, 0.030, 0.050, 0.020, 0.030])
    dense, low = other(Toy(), {"dense": {}, "low": {"layer": Named("B")}}, spec, clock=clock)
    assert dense.timing.seconds == (0.010, 0.030, 0.020)
    assert low.timing.seconds == (0.020, 0.050, 0.030)
    assert (dense.timing.median_ms, low.timing.median_ms) == pytest.approx((20, 30))
    assert (low.timing.p10_ms, low.timing.p90_ms) == pytest.approx((22, 46))
    assert low.ratio_to_dense == pytest.approx(1.5)
    assert (dense.ratio_to_dense, dense.ratio_low, dense.ratio_high) == (1, 1, 1)
    assert low.ratio_low <= 1.5 <= low.ratio_high
    assert (low.row, low.batch, low.phase, low.prompt, low.generate) == ("low", 2, "forward", 5, None)
    assert (low.clock, low.dtype, low.threads) == ("fake", "float32", torch.get_num_threads())
    assert low.examples_per_second == pytest.approx(2 / 0.030)
    assert low.tokens_per_second is None


def test_rows_are_interleaved_and_warmup_is_run_but_not_counted():
    model, rows = Toy(), {"dense": {}, "B": {"layer": Named("B")}, "C": {"layer": Named("C")}}
    timings = other(model, rows)
    rounds = SPEC.warmup + SPEC.repeats
    assert [name for name, _, _ in model.seen] == ["A", "B", "C"] * rounds * 2
    assert [shape for _, shape, _ in model.seen] == [(1, 5)] * 3 * rounds + [(3, 5)] * 3 * rounds
    assert len({total for _, shape, total in model.seen if shape == (3, 5)}) == 1  # the same tokens for all
    assert [(t.row, t.batch) for t in timings] == [(row, batch) for batch in (1, 3) for row in rows]
    assert all(len(t.timing.seconds) == SPEC.repeats for t in timings)


def test_ratio_interval_is_of_pairs_and_deterministic():
    drifting = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0]
    assert ratio_interval([0.5 * one for one in drifting], drifting) == (0.5, 0.5)  # common drift cancels
    noisy = [1.1, 0.9, 1.3, 1.0, 0.8, 1.2, 1.0]
    low, high = ratio_interval(noisy, [1.0] * 7)
    assert low < 1.0 < high
    assert ratio_interval(noisy, [1.0] * 7) == (low, high)


@pytest.mark.parametrize("build", [gpt2, llama, opt])
def test_decode_gives_the_tokens_of_generate(build):
    torch.manual_seed(0)
    model = build().eval()
    ids = torch.randint(50, (2, 6))
    mask = torch.ones(2, 6 + 7, dtype=torch.long)
    with torch.inference_mode():
        token, cache = prefill(model, {"input_ids": ids, "attention_mask": mask[:, :6], "use_cache": True})
        ours = torch.cat([token, decode(model, token, cache, mask, 7)], dim=1)
        theirs = model.generate(
            ids,
            attention_mask=mask[:, :6],
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    assert cache.get_seq_length() == 6 + 7
    assert ours.tolist() == theirs[:, 6:].tolist()
    assert len(set(ours[0].tolist())) > 3  # a text that repeats one token would show little


@pytest.mark.parametrize("build", [gpt2, llama, opt])
def test_causal_model_is_timed_by_phase(build):
    model = build()
    clock = FakeClock([0.010, 0.040] * 2 * 5)
    timings = time_rows(model, {"dense": {}}, SPEC, task="causal-lm", vocab_size=50, device="cpu", clock=clock)
    assert [(t.batch, t.phase) for t in timings] == [(b, p) for b in (1, 3) for p in ("prefill", "decode")]
    first, second = timings[2:]
    assert first.timing.median_ms == pytest.approx(10)
    assert first.tokens_per_second == pytest.approx(3 * 5 / 0.010)
    assert second.timing.median_ms == pytest.approx(40 / SPEC.generate)  # per token
    assert second.tokens_per_second == pytest.approx(3 * SPEC.generate / 0.040)
    assert (second.prompt, second.generate) == (5, 4)


def test_prefill_computes_the_last_logits_only():
    model, shapes = gpt2(), []
    model.lm_head.register_forward_hook(lambda _module, _inputs, output: shapes.append(tuple(output.shape)))
    peak_bytes(model, {"dense": {}}, SPEC, task="causal-lm", vocab_size=50, device="cpu")
    assert set(shapes) == {(3, 1, 50)}


def test_classifier_and_a_callers_inputs_are_timed_as_forward():
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 50}
    model = BertForSequenceClassification(BertConfig(num_attention_heads=2, **sizes))
    timings = time_rows(model, {"dense": {}}, SPEC, task="other", vocab_size=50, device="cpu")
    assert [(t.batch, t.phase, t.clock) for t in timings] == [(b, "forward", CpuClock.name) for b in (1, 3)]
    plain = nn.Sequential(nn.Linear(4, 4))
    timings = other(plain, {"dense": {}}, inputs=lambda batch: {"input": torch.zeros(batch, 4)})
    assert [(t.phase, t.prompt) for t in timings] == [("forward", None)] * 2


def test_model_is_restored_after_success_and_after_an_error():
    model = Toy()
    former = model.layer
    other(model, {"dense": {}, "B": {"layer": Named("B")}})
    assert model.layer is former
    for run in (time_rows, peak_bytes):
        model = nn.Sequential(nn.Linear(4, 4))
        former = model[0]
        with pytest.raises(RuntimeError, match="broken layer"):
            run(model, {"dense": {}, "bad": {"0": Broken()}}, SPEC, task="other", vocab_size=1, device="cpu",
                inputs=lambda batch: {"input": torch.zeros(batch, 4)})  # fmt: skip
        assert model[0] is former


def test_peak_of_counts_what_is_alive_at_once():
    x = torch.zeros(100)

    def chain():
        y = x + 1  # 400 bytes
        y = y + 1  # beside the former: 800
        y = y.view(10, 10).t()  # views hold nothing of their own
        return y.sum()  # 404

    assert peak_of(chain, CPU) == 800
    with torch.inference_mode():
        assert peak_of(chain, CPU) == 800
    assert peak_of(lambda: x.view(4, 25), CPU) == 0
    kept = []
    assert peak_of(lambda: kept.extend(x + i for i in range(5)), CPU) == 2000
    assert peak_of(lambda: nn.Linear(100, 50, bias=False)(x), CPU) >= 200


def test_peak_memory_of_a_low_rank_row_is_below_dense():
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 8))
    rows = {"dense": {}, "low": {"0": LowRankLinear(1024, 1024, rank=64)}}
    inputs = {
        "task": "other",
        "vocab_size": 1,
        "device": "cpu",
        "inputs": lambda batch: {"input": torch.zeros(batch, 1024)},
    }
    peaks = peak_bytes(model, rows, SPEC, **inputs)
    saved = 4 * (1024 * 1024 - 64 * 2048)
    assert 0 < peaks["dense"] - peaks["low"] <= saved
    assert peaks["dense"] - peaks["low"] > 0.95 * saved
    assert peaks == peak_bytes(model, rows, SPEC, **inputs)  # the same at each run
    parameters = sum(parameter.nbytes for parameter in model.parameters())
    assert peaks["dense"] == parameters + 3 * 1024 * 4 * 2  # ReLU's input and output


def test_peak_memory_of_a_causal_model_holds_its_cache():
    model = gpt2()
    short, long = (
        peak_bytes(model, {"dense": {}}, spec, task="causal-lm", vocab_size=50, device="cpu")["dense"]
        for spec in (SPEC, SPEC.model_copy(update={"generate": 24}))
    )
    cache_bytes = 2 * 2 * 16 * 4 * max(SPEC.batches)  # of one position: keys and values, layers, width, float32
    assert long >= short + cache_bytes  # beyond some length the cache outweighs the prompt's activations
    assert short > sum(parameter.nbytes for parameter in model.parameters()) + cache_bytes * 9


def test_check_names_the_limit_and_what_to_set():
    config = GPT2Config(n_positions=128)
    check(TimingSpec(prompt=96, generate=32), config, "causal-lm")
    with pytest.raises(
        RecipeError, match=r"128 \+ 32 = 160(.|\n)*at most 128 tokens(.|\n)*timing\.prompt to at most 96"
    ):
        check(TimingSpec(), config, "causal-lm")
    with pytest.raises(RecipeError, match=r"timing\.generate to at most 127"):
        check(TimingSpec(generate=200), config, "causal-lm")
    check(TimingSpec(), config, "other")
    with pytest.raises(RecipeError, match=r"timing\.prompt to at most 128"):
        check(TimingSpec(prompt=129), config, "other")
    assert positions(RobertaConfig(max_position_embeddings=514, pad_token_id=1)) == 512
    assert positions(T5Config()) is None
    check(TimingSpec(prompt=9999), T5Config(), "other")


def test_what_cannot_be_timed_says_so():
    with pytest.raises(ValueError, match="no row is dense"):
        other(Toy(), {"B": {"layer": Named("B")}})
    with pytest.raises(InputError, match="no clock"):
        clock_of("meta")
    with pytest.raises(ValueError, match="at least one sample"):
        Timing(())
    uncached = {"input_ids": torch.zeros(1, 2, dtype=torch.long), "use_cache": False}
    with pytest.raises(ModelError, match="no KV cache"):
        prefill(gpt2(), uncached)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batches": []},
        {"batches": [0]},
        {"prompt": 0},
        {"generate": 0},
        {"repeats": 2},
        {"warmup": -1},
        {"x": 1},
    ],
)
def test_spec_bounds(wrong):
    with pytest.raises(ValidationError):
        TimingSpec.model_validate(wrong)


def test_spec_keys_are_documented():
    assert all(field.description for field in TimingSpec.model_fields.values())


def test_json_round_trip(tmp_path):
    timings = other(Toy(), {"dense": {}, "B": {"layer": Named("B")}})
    write_timings(tmp_path / "timing.json", timings, {"dense": 10, "B": 5})
    assert read_timings(tmp_path / "timing.json") == (timings, {"dense": 10, "B": 5})
    entry = json.loads(json.dumps(timings[1].summary()))
    assert {"batch", "phase", "median_ms", "p10_ms", "p90_ms", "ratio_to_dense"} <= set(entry)
    assert RowTiming.from_json(json.loads(json.dumps(timings[0].to_json()))) == timings[0]


@pytest.mark.gpu
def test_cuda_events_and_allocator():
    device = torch.device("cuda", 0)
    model = nn.Sequential(nn.Linear(4096, 4096)).to(device)
    rows = {"dense": {}, "low": {"0": LowRankLinear(4096, 4096, rank=64).to(device)}}
    inputs = {"task": "other", "vocab_size": 1, "device": device,
              "inputs": lambda batch: {"input": torch.zeros(batch, 4096, device=device)}}  # fmt: skip
    timings = time_rows(model, rows, SPEC, **inputs)
    assert all(t.clock == "cuda events" and min(t.timing.seconds) > 0 for t in timings)
    peaks = peak_bytes(model, rows, SPEC, **inputs)
    assert peaks["low"] < peaks["dense"] / 8
