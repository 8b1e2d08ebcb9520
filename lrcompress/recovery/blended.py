"""The layer of LoRA-LRD while it learns.

        x [.., I]
    ┌──────┴───────┐
    │              │
 W [O, I]      A [R, I]
 frozen        B [O, R]          y = (1−τ)·W x + gain·B A x + b
    │              │
×(1−τ)          ×gain            gain = τ (BA → W), or the source's α/r (BA → τ·W)
    └──────┬───────┘
         + b [O]                 at the end: A, (gain/τ)·B and b are the new layer

A and B may be trained in other coordinates than these (whitening.py).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lrcompress.artifacts import Factors
from lrcompress.layers import read_weight
from lrcompress.recovery.whitening import Whitening

Branch = Literal["blend", "dense", "factored"]


class BlendedLinear(nn.Module):
    """A dense layer and the pair that takes over from it, which is trained in float32."""

    def __init__(
        self, dense: nn.Module, start: Factors, *, gain: float | None, whitening: Whitening | None = None
    ) -> None:
        """`gain` None is τ itself (full scale); otherwise the fixed factor of the pair (the source's α/r).

        With `whitening` the start is in its coordinates, and so are the parameters A and B.
        """
        super().__init__()
        weight = read_weight(dense).detach()
        self.dense_weight: Tensor
        self.dense_bias: Tensor | None
        self.register_buffer("dense_weight", weight, persistent=False)
        bias = None if dense.bias is None else dense.bias.detach()  # type: ignore[union-attr]
        self.register_buffer("dense_bias", bias, persistent=False)
        self.whitening = whitening
        self.A = nn.Parameter(start.A.to(weight.device, torch.float32, copy=True))
        self.B = nn.Parameter(start.B.to(weight.device, torch.float32, copy=True))
        own = bias if start.bias is None or bias is None else start.bias.to(bias.device, torch.float32)
        self.bias = None if own is None else nn.Parameter(own.to(torch.float32, copy=True))
        # what the dense weight's share adds where the start has another bias than the dense layer (a refit)
        self.shift: Tensor | None
        shift = None if bias is None or own is None else bias.float() - own
        shift = None if shift is None or not shift.any() else shift.to(weight.dtype)
        self.register_buffer("shift", shift, persistent=False)
        self.gain = gain
        self.tau = 0.0
        self.branch: Branch = "blend"

    @property
    def weight(self) -> Tensor:
        """The dense weight `[O, I]`: some models read a layer's dtype from it."""
        return self.dense_weight

    def forward(self, x: Tensor) -> Tensor:
        """`x` [.., I] → [.., O]: one branch, or their blend."""
        if self.branch == "dense":
            return F.linear(x, self.dense_weight, self.dense_bias)
        scale = self._scale() / self.tau if self.branch == "factored" else self._scale()
        A, B = self._plain()
        A, B = A.to(x.dtype), (B if scale == 1.0 else scale * B).to(x.dtype)
        y = F.linear(F.linear(x, A), B, None if self.bias is None else self.bias.to(x.dtype))
        if self.branch == "factored":
            return y
        return y if self.tau == 1.0 else y + (1 - self.tau) * F.linear(x, self.dense_weight, self.shift)

    def replacement(self) -> Factors:
        """The factors without the dense weight: what stands in its place, `(gain/τ)·B A x + b`."""
        bias = None if self.bias is None else self.bias.detach()
        A, B = self._plain()
        return Factors(A.detach(), self._scale() / self.tau * B.detach(), bias)

    @torch.no_grad()
    def take(self, learned: Factors, tau: float, *, drawn: bool) -> None:
        """Be the blend at τ with these factors, which a training's `replacement` gave. Changes the layer.

        `drawn`: the training took one branch or the other; their mean has the dense layer's own bias in W's share.
        """
        self.whitening = self.gain = None
        self.A.data, self.B.data = (factor.to(self.A) for factor in (learned.A, learned.B))
        if self.bias is not None and learned.bias is not None:
            self.bias.data = learned.bias.to(self.bias)
            if drawn and self.dense_bias is not None:
                self.shift = (self.dense_bias.float() - self.bias).to(self.dense_weight.dtype)
        self.tau, self.branch = tau, "blend"

    def _plain(self) -> tuple[Tensor, Tensor]:
        if self.whitening is None:
            return self.A, self.B
        with torch.autocast(self.A.device.type, enabled=False):  # inverse roots have no digits to spare
            return self.whitening.back(self.A, self.B)

    def _scale(self) -> float:
        return self.tau if self.gain is None else self.gain


def lora_start(rank: int, in_features: int, out_features: int, generator: torch.Generator) -> Factors:
    """LoRA's random start (arXiv 2106.09685, sec. 4.1): A Kaiming-uniform with a = √5, B zero."""
    bound = 1 / math.sqrt(in_features)
    A = torch.empty(rank, in_features).uniform_(-bound, bound, generator=generator)
    return Factors(A, torch.zeros(out_features, rank), None)
