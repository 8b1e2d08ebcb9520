"""Experts of a mixture, which transformers holds in three-dimensional weights, as Linears of their own, and back.

      transformers                          here
┌───────────────────────────┐     ┌──────────────────────────┐
│ gate_up_proj [E, 2·I, H]  │     │ up   E × Linear H → 2·I  │     so each expert has ranks of its own
│ down_proj    [E, H, I]    │  ⇄  │ down E × Linear I → H    │
└───────────────────────────┘     └──────────────────────────┘

The names are `….experts.up.3` and `….experts.down.3`. A module of which no expert is low-rank goes back to what
transformers has. Experts whose weights are transposed, have biases or a norm of their own are left as they are.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lrcompress.lowrank import AbstractLowRank, put_module


class Experts(nn.Module):
    """Computes what the module it was made of does, with a Linear, or a low-rank layer, for each expert's matrix."""

    _shell: Any
    _tokens: Tensor

    def __init__(self, fused: Any) -> None:
        super().__init__()
        self._parts = ("gate_up_proj" if fused.has_gate else "up_proj", "down_proj")
        shell = copy.copy(fused)  # all but the weights: activation, gate, and what to make the original of again
        shell._parameters = dict.fromkeys(self._parts)
        self.__dict__["_shell"] = shell
        self.up, self.down = (nn.ModuleList(map(_linear, fused.get_parameter(part))) for part in self._parts)
        self.train(fused.training)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`[N, H]` tokens, `[N, K]` experts of each and their weights → `[N, H]`."""
        result = torch.zeros_like(hidden_states)
        for number, (up, down) in enumerate(zip(self.up, self.down, strict=True)):
            token, position = torch.where(top_k_index == number)
            if len(token) == 0:
                continue
            self._tokens = token
            hidden = up(hidden_states[token])
            gated = self._shell._apply_gate(hidden) if self._shell.has_gate else self._shell.act_fn(hidden)
            found = down(gated) * top_k_weights[token, position, None]
            result.index_add_(0, token, found.to(result.dtype))
        return result

    def masks(self, masks: Sequence[Tensor], count: int) -> list[Tensor]:
        """Of masks `[B, T]` over the tokens of the batch, those of the `count` tokens that an expert has now."""
        index = self._tokens
        fitting = [mask.flatten() for mask in masks if len(index) == count and mask.numel() > int(index[-1])]
        return [mask[index] for mask in fitting[:1]]

    def fused(self) -> nn.Module:
        """The module of transformers with these weights, all of which must be dense."""
        module = copy.copy(self._shell)
        module._parameters = {
            name: _stacked(part) for name, part in zip(self._parts, (self.up, self.down), strict=True)
        }
        return module.train(self.training)


def _stacked(linears: nn.ModuleList) -> nn.Parameter:
    weights = [linear.get_parameter("weight") for linear in linears]
    trained = any(weight.requires_grad for weight in weights)
    return nn.Parameter(torch.stack([weight.detach() for weight in weights]), requires_grad=trained)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
    return linear


def is_fused(module: nn.Module) -> bool:
    """Whether this is a module of experts that `Experts` can stand for."""
    facts = [getattr(module, name, None) for name in ("has_gate", "has_bias", "is_transposed", "has_post_expert_norm")]
    if None in facts[:3] or any(facts[1:]) or not hasattr(module, "_apply_gate"):
        return False
    part = "gate_up_proj" if facts[0] else "up_proj"
    return all(getattr(module, name, torch.empty(0)).ndim == 3 for name in (part, "down_proj"))


def _holder_name(layer: str) -> str:
    """`….experts` of `….experts.up.3`."""
    return layer.rpartition(".")[0].rpartition(".")[0]


def expert_holder(model: nn.Module, layer: str) -> Experts | None:
    """The `Experts` of which a named layer is one matrix of one expert; None for any other layer."""
    name = _holder_name(layer)
    holder = model.get_submodule(name) if name else None
    return holder if isinstance(holder, Experts) else None


def unfuse(model: nn.Module, layers: Iterable[str] | None = None) -> None:
    """Put `Experts` in the place of fused ones: all, or those that hold one of the named layers. Changes the model."""
    wanted = None if layers is None else {_holder_name(name) for name in layers}
    names = [name for name, module in model.named_modules() if name and is_fused(module)]
    for name in names:  # one at a time: their weights are most of the model
        if wanted is None or name in wanted:
            put_module(model, name, Experts(model.get_submodule(name)))


def fuse(model: nn.Module) -> None:
    """Put transformers' own modules in the place of `Experts` without a low-rank layer. Changes the model."""
    names = [name for name, module in model.named_modules() if isinstance(module, Experts)]
    for name in names:
        experts = model.get_submodule(name)
        if isinstance(experts, Experts) and not any(isinstance(part, AbstractLowRank) for part in experts.modules()):
            put_module(model, name, experts.fused())


def regrouped(model: nn.Module, modules: Mapping[str, nn.Module], dtype: torch.dtype) -> dict[str, nn.Module]:
    """Modules for a model in `dtype` whose experts are fused, from `modules` for this one, whose experts are not."""
    found: dict[str, nn.Module] = {}
    for name, module in modules.items():
        experts = expert_holder(model, name)
        if experts is None:
            found[name] = module
            continue
        holder = _holder_name(name)
        if holder not in found:
            found[holder] = copy.deepcopy(experts).to(dtype)
        put_module(found[holder], name.removeprefix(f"{holder}."), module)
    return found
