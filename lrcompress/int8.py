"""Factors in 8 bits: a whole number from −127 to 127 for each entry, and a scale for each output channel.

Symmetric, by the largest magnitude of the channel (round to nearest). The scale is a number of the dtype that it is
stored in, so that a checkpoint holds what was measured. The product is taken with the whole numbers in the dtype of
the input, and scaled after it: no copy of the weight is kept.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LARGEST = 127


class Int8Linear(nn.Module):
    """`y = (q(x)) · scale + bias`, q `[O, I]` int8 and a scale for each of the O outputs.

    `weight` and `scale` are parameters without a gradient, so that a model counts, moves and saves them with the rest.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        numbers = torch.zeros(out_features, in_features, dtype=torch.int8, device=device)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.scale = nn.Parameter(torch.ones(out_features, dtype=dtype, device=device), requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def of(cls, linear: nn.Linear, scales: torch.dtype | None = None) -> "Int8Linear":
        """The same layer with its weight rounded, its scales numbers of `scales` (None: the weight's dtype).

        They are held in the weight's dtype; the bias is taken over.
        """
        weight = linear.weight.detach()
        layer = cls(linear.in_features, linear.out_features, False, device=weight.device, dtype=weight.dtype)
        if not weight.is_meta:
            numbers, scale = _grid(weight, scales or weight.dtype)
            layer.weight.copy_(numbers)
            layer.scale.copy_(scale)
        layer.bias = linear.bias
        return layer.train(linear.training)

    @property
    def in_features(self) -> int:
        """I."""
        return self.weight.shape[1]

    @property
    def out_features(self) -> int:
        """O."""
        return self.weight.shape[0]

    def dense_weight(self) -> Tensor:
        """The weight `[O, I]` that it stands for, in the dtype of the scale."""
        return dequantized(self.weight, self.scale)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [.., I] → [.., O]."""
        y = F.linear(x, self.weight.to(x.dtype)) * self.scale
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Shape, for printing a model."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


def dequantized(weight: Tensor, scale: Tensor) -> Tensor:
    """What whole numbers `[O, I]` stand for, in the dtype of their channels' scale `[O]`."""
    return weight.to(scale.dtype) * scale[:, None]


def rounded(weight: Tensor, scales: torch.dtype = torch.float32) -> Tensor:
    """A weight `[O, I]` on the grid of 8 bits whose scales are numbers of dtype `scales`, as float32 numbers."""
    numbers, scale = _grid(weight, scales)
    return numbers * scale[:, None]


def _grid(weight: Tensor, scales: torch.dtype) -> tuple[Tensor, Tensor]:
    """Whole numbers `[O, I]` and the scale `[O]` of each channel, which `scales` holds exactly; both in float32."""
    weight = weight.float()
    largest = weight.abs().amax(1)
    scale = torch.where(largest > 0, largest / LARGEST, 1.0).to(scales).float()
    # next to 0 the numbers of a half dtype are far apart: the one below would cut off the largest entries
    smallest = torch.finfo(scales).smallest_normal * torch.finfo(scales).eps
    scale = torch.where(largest > (LARGEST + 0.5) * scale, scale + smallest, scale)
    return (weight / scale[:, None]).round().clamp(-LARGEST, LARGEST), scale
