"""Tiny random models, built from configs and never downloaded, a byte tokenizer for them, tiny data files."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers as t
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor

from lrcompress.artifacts import Factors
from lrcompress.layers import kind_of, read_weight
from lrcompress.lowrank import put_factors

VOCABULARY = 264
PAD, BOS, EOS, UNK = 256, 257, 258, 259
WIDTH, BLOCKS, HEADS, POSITIONS, LABELS = 32, 2, 4, 128, 2
TAGS = ("O", "B-PER", "I-PER", "B-LOC", "I-LOC")
MELS, SOUND = 80, 100
"""Whisper's: mel bands, and frames of a hundredth of a second that an input has."""

_INIT: dict[str, Any] = {
    "initializer_range": 0.2
}  # ten times the usual: at width 32 the layers would hardly matter otherwise
_IDS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_DECODER: dict[str, Any] = {
    **_IDS,
    **_INIT,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
    "tie_word_embeddings": False,
}
_ENCODER: dict[str, Any] = {
    **_IDS,
    **_INIT,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": BLOCKS,
    "num_attention_heads": HEADS,
}


@dataclass(frozen=True)
class Tiny:
    """`make` builds the model, `auto_class` is the transformers class that loads it, `reads` says what it reads."""

    make: Callable[[], t.PreTrainedModel]
    auto_class: str
    reads: Literal["tokens", "pixels", "sound"] = "tokens"

    @property
    def tokens(self) -> bool:
        return self.reads == "tokens"


def _gpt2() -> t.PreTrainedModel:
    return t.GPT2LMHeadModel(
        t.GPT2Config(n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=POSITIONS, **_INIT, **_IDS)
    )


def _gpt2_classifier() -> t.PreTrainedModel:
    config = t.GPT2Config(
        n_embd=WIDTH, n_layer=BLOCKS, n_head=HEADS, n_positions=POSITIONS, num_labels=LABELS, **_INIT, **_IDS
    )
    return t.GPT2ForSequenceClassification(config)


def _llama(*, tied: bool = False) -> t.PreTrainedModel:
    return t.LlamaForCausalLM(t.LlamaConfig(**_DECODER | {"tie_word_embeddings": tied}))


def _opt() -> t.PreTrainedModel:
    sizes = {
        "ffn_dim": 48,
        "word_embed_proj_dim": WIDTH,
        "max_position_embeddings": POSITIONS,
        "init_std": 0.2,
    }
    return t.OPTForCausalLM(
        t.OPTConfig(hidden_size=WIDTH, num_hidden_layers=BLOCKS, num_attention_heads=HEADS, **sizes, **_IDS)
    )


def _distilbert() -> t.PreTrainedModel:
    config = t.DistilBertConfig(
        dim=WIDTH, hidden_dim=48, n_layers=BLOCKS, n_heads=HEADS, num_labels=LABELS, **_INIT, **_IDS
    )
    return t.DistilBertForSequenceClassification(config)


def _vit() -> t.PreTrainedModel:
    sizes = {key: value for key, value in _ENCODER.items() if key not in _IDS}
    return t.ViTForImageClassification(t.ViTConfig(image_size=16, patch_size=8, num_labels=LABELS, **sizes))


def _t5() -> t.PreTrainedModel:
    sizes = {"d_model": WIDTH, "d_ff": 48, "d_kv": 8, "num_layers": BLOCKS, "num_heads": HEADS}
    return t.T5ForConditionalGeneration(t.T5Config(**sizes, decoder_start_token_id=PAD, **_IDS))


def _whisper() -> t.PreTrainedModel:
    sizes = {"d_model": WIDTH, "encoder_layers": BLOCKS, "decoder_layers": BLOCKS, "num_mel_bins": MELS}
    heads = {"encoder_attention_heads": HEADS, "decoder_attention_heads": HEADS}
    more = {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": SOUND // 2, "init_std": 0.2}
    ends = {"max_target_positions": 64, "decoder_start_token_id": BOS, "suppress_tokens": None}
    config = t.WhisperConfig(**sizes, **heads, **more, **ends, begin_suppress_tokens=None, **_IDS)
    model = t.WhisperForConditionalGeneration(config)
    model.generation_config.max_length = 24
    return model


def _gpt_neox() -> t.PreTrainedModel:
    sizes = {key: value for key, value in _DECODER.items() if key != "num_key_value_heads"}
    return t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**sizes))


def _moe(config: type, model: type) -> t.PreTrainedModel:
    experts = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return model(config(**_DECODER, **experts, head_dim=8))


TINY: dict[str, Tiny] = {
    "gpt2": Tiny(_gpt2, "AutoModelForCausalLM"),
    "gpt2-classifier": Tiny(_gpt2_classifier, "AutoModelForSequenceClassification"),
    "llama": Tiny(_llama, "AutoModelForCausalLM"),
    "llama-tied": Tiny(lambda: _llama(tied=True), "AutoModelForCausalLM"),
    "opt": Tiny(_opt, "AutoModelForCausalLM"),
    "qwen2": Tiny(lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**_DECODER)), "AutoModelForCausalLM"),
    "mistral": Tiny(lambda: t.MistralForCausalLM(t.MistralConfig(**_DECODER)), "AutoModelForCausalLM"),
    "bert": Tiny(
        lambda: t.BertForSequenceClassification(t.BertConfig(num_labels=LABELS, **_ENCODER)),
        "AutoModelForSequenceClassification",
    ),
    "roberta": Tiny(
        # RoBERTa counts positions from the padding id on
        lambda: t.RobertaForSequenceClassification(
            t.RobertaConfig(num_labels=LABELS, max_position_embeddings=PAD + 1 + POSITIONS, **_ENCODER)
        ),
        "AutoModelForSequenceClassification",
    ),
    "qwen3": Tiny(lambda: t.Qwen3ForCausalLM(t.Qwen3Config(**_DECODER, head_dim=8)), "AutoModelForCausalLM"),
    "phi3": Tiny(lambda: t.Phi3ForCausalLM(t.Phi3Config(**_DECODER)), "AutoModelForCausalLM"),
    "gemma": Tiny(lambda: t.GemmaForCausalLM(t.GemmaConfig(**_DECODER, head_dim=8)), "AutoModelForCausalLM"),
    "gpt_neox": Tiny(_gpt_neox, "AutoModelForCausalLM"),
    "mixtral": Tiny(lambda: _moe(t.MixtralConfig, t.MixtralForCausalLM), "AutoModelForCausalLM"),
    "qwen3_moe": Tiny(lambda: _moe(t.Qwen3MoeConfig, t.Qwen3MoeForCausalLM), "AutoModelForCausalLM"),
    "bert-masked": Tiny(lambda: t.BertForMaskedLM(t.BertConfig(**_ENCODER)), "AutoModelForMaskedLM"),
    "bert-embeddings": Tiny(lambda: t.BertModel(t.BertConfig(**_ENCODER)), "AutoModel"),
    "bert-tokens": Tiny(
        lambda: t.BertForTokenClassification(
            t.BertConfig(**_ENCODER, id2label=dict(enumerate(TAGS)), label2id={tag: i for i, tag in enumerate(TAGS)})
        ),
        "AutoModelForTokenClassification",
    ),
    "whisper": Tiny(_whisper, "AutoModelForSpeechSeq2Seq", reads="sound"),
    "distilbert": Tiny(_distilbert, "AutoModelForSequenceClassification"),
    "vit": Tiny(_vit, "AutoModelForImageClassification", reads="pixels"),
    "t5": Tiny(_t5, "AutoModelForSeq2SeqLM"),
}
"""Width 32, two blocks; `llama`, `qwen2` and `mistral` have two key/value heads for four query heads."""


def tiny_model(name: str, *, seed: int = 0) -> t.PreTrainedModel:
    """A model of `TINY` in evaluation mode; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return TINY[name].make().eval()


def tiny_wavlm() -> t.PreTrainedModel:
    """Its attention takes the weights of its projections, and calls only the last of them."""
    torch.manual_seed(0)
    config = t.WavLMConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, conv_dim=(16, 16),
        conv_kernel=(10, 3), conv_stride=(5, 2), num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
        num_feat_extract_layers=2, initializer_range=0.2, apply_spec_augment=False,
    )  # fmt: skip
    return t.WavLMModel(config).eval()


def tiny_tokenizer() -> t.PreTrainedTokenizerFast:
    """A token a byte, then <pad>, <s>, </s>, <unk>."""
    symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(symbols)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = t.PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=POSITIONS, padding_side="right")
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    fast.add_special_tokens(special)
    assert [fast.pad_token_id, fast.bos_token_id, fast.eos_token_id, fast.unk_token_id] == [
        PAD,
        BOS,
        EOS,
        UNK,
    ]
    return fast


def tiny_batch(name: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Inputs for a forward pass of two items: tokens [2, 12], the second padded at the end, or pixels."""
    generator = torch.Generator().manual_seed(seed)
    if TINY[name].reads == "pixels":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(0, 256, (2, 12), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 9:], mask[1, 9:] = PAD, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if TINY[name].reads == "sound":
        return {
            "input_features": torch.randn(2, MELS, SOUND, generator=generator), "decoder_input_ids": ids.flip(0)
        }  # fmt: skip
    return batch | {"decoder_input_ids": ids.flip(0)} if name == "t5" else batch


def save_tiny(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Write model and tokenizer so that the Auto classes load them; returns the folder."""
    tiny_model(name, seed=seed).save_pretrained(folder)
    if TINY[name].tokens:
        tiny_tokenizer().save_pretrained(folder)
    return folder


_GOOD = ("a warm film", "sharp and funny", "a joy to watch", "the cast is superb", "fresh from start to end")
_BAD = (
    "a dull film",
    "slow and empty",
    "a chore to sit through",
    "the plot is a mess",
    "stale from start to end",
)


def labelled_lines(count: int, *, seed: int = 0) -> list[tuple[str, int]]:
    """Sentences with a label that can be learned: 1 praises, 0 does not."""
    draw = random.Random(seed)
    labels = [draw.randrange(2) for _ in range(count)]
    return [
        (f"{draw.choice((_BAD, _GOOD)[label])}, {draw.choice(('part', 'take'))} {i}", label)
        for i, label in enumerate(labels)
    ]


def write_txt(path: Path, lines: int = 200, *, seed: int = 0) -> Path:
    """Plain text, a sentence a line."""
    path.write_text("".join(f"{text}\n" for text, _ in labelled_lines(lines, seed=seed)), encoding="utf-8")
    return path


def write_jsonl(path: Path, lines: int = 100, *, seed: int = 0) -> Path:
    """Objects with `text` and `label`."""
    rows = (json.dumps({"text": text, "label": label}) for text, label in labelled_lines(lines, seed=seed))
    path.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    return path


def write_tsv(path: Path, lines: int = 100, *, seed: int = 0, header: bool = False) -> Path:
    """Columns text, label; without a header unless asked for."""
    rows = [f"{text}\t{label}\n" for text, label in labelled_lines(lines, seed=seed)]
    path.write_text("".join(["text\tlabel\n"] * header + rows), encoding="utf-8")
    return path


def factorise(model: torch.nn.Module, *, seed: int = 0) -> dict[str, int]:
    """Put random factors, of ranks 3 to 6, in place of the dense layers inside blocks; returns the ranks.

    Changes the model. The products are of the size of the weights that they replace: each layer matters.
    """
    generator = torch.Generator().manual_seed(seed)
    factors: dict[str, Factors] = {}
    for name, module in model.named_modules():
        if kind_of(module) is None or not any(part.isdigit() for part in name.split(".")):
            continue
        weight, rank = read_weight(module), 3 + len(factors) % 4
        (out_features, in_features), scale = weight.shape, float(weight.detach().std()) ** 0.5
        a = torch.randn(rank, in_features, generator=generator) * scale
        b = torch.randn(out_features, rank, generator=generator) * scale
        bias = None if module.bias is None else torch.randn(out_features, generator=generator) * 0.1
        factors[name] = Factors(a, b, bias)
    put_factors(model, factors)
    return {name: pair.A.shape[0] for name, pair in factors.items()}
