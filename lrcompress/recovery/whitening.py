"""The coordinates in which factors are trained: near those in which the method takes its SVD.

A method's roots say how much each direction of a layer's input and output matters, by its statistics: L·W·R is the
weight in coordinates in which all directions matter alike. There a step of AdamW moves each of them as far as the
others; in plain coordinates the few that carry most of the input use up the learning rate, and the rest stays behind.
It is the natural gradient's preconditioning (K-FAC, arXiv 1503.05671) as a change of parameters with fixed statistics
(arXiv 1507.00210). The few that matter most are told apart, and all others get their mean, so that the coordinates of a
wide layer cost little memory and time.

The R components of a pair differ as much: a step that is right for the strongest is too long for it where the weakest
hardly move. With `components` the factors are scaled by the components' strength, so that relative to its size a weak
component moves further (as in scaled gradient descent, arXiv 2005.08898).
"""

import torch
from torch import Tensor, nn

from lrcompress.artifacts import Factors
from lrcompress.linalg import Root, Roots, product_svd

DIRECTIONS = 128
"""Directions of a side that have a scale of their own."""

DAMPING = 0.1
"""Added to a moment of mean eigenvalue 1: how far a step may go where calibration saw next to nothing. More than a
method adds, which divides by a root once and not at every step."""

WEAKEST = 0.01
"""Of the mean singular value: components below it are scaled as if they were there."""


class Scaling(nn.Module):
    """Of one side: the symmetric `S = c·(1 + V·diag(d)·Vᵀ)`, [n, n], near the root of a moment of mean eigenvalue 1.

    A diagonal root, [n], is taken as it is.
    """

    def __init__(self, root: Root, vectors_in: int) -> None:
        """`vectors_in`: the dimension of the root's matrix over which an eigenvector runs."""
        super().__init__()
        self.vectors: Tensor | None
        self.scale: Tensor
        scale = root.matrix if root.matrix.ndim == 1 else root.matrix.norm(dim=vectors_in)
        squares = scale.square()
        relative = (squares / squares.mean() + DAMPING).sqrt()
        self.rest = 1.0
        vectors = None
        if root.matrix.ndim == 2:
            order = relative.argsort(descending=True)
            top, others = order[:DIRECTIONS], order[DIRECTIONS:]
            vectors = (root.matrix if vectors_in == 0 else root.matrix.T)[:, top] / scale[top]
            # orthogonal to the top ones no direction is left where all are told apart
            self.rest = relative[others].square().mean().sqrt().item() if len(others) else 1.0
            vectors, relative = vectors.float(), relative[top]
        self.register_buffer("vectors", vectors, persistent=False)
        self.register_buffer("scale", relative.float(), persistent=False)

    def times(self, matrix: Tensor, power: int) -> Tensor:
        """`S^power · matrix`, [n, m], for a power of 1 or −1."""
        scale, rest = self.scale**power, self.rest**power
        if self.vectors is None:
            return scale[:, None] * matrix
        return rest * matrix + self.vectors @ ((scale - rest)[:, None] * (self.vectors.T @ matrix))


class Whitening(nn.Module):
    """Of one layer: `Ã = D·A·R` [r, I] and `B̃ = L·B·D` [O, r], and back, in float32.

    A and B are balanced by an SVD of L·B·A·R, whose singular values are s. D is the identity, or with `components` the
    diagonal of √s, of mean 1.
    """

    def __init__(self, roots: Roots, pair: Factors, *, components: bool, device: torch.device) -> None:
        super().__init__()
        self.left = None if roots.left is None else Scaling(roots.left, 1).to(device)
        self.right = None if roots.right is None else Scaling(roots.right, 0).to(device)
        A, B = self._scaled(pair.A.to(device).float(), pair.B.to(device).float(), 1)
        strength = None
        if B.any():  # LoRA's start has nothing to balance
            u, s, vt = product_svd(B, A)
            root = s.sqrt()
            A, B = (root[:, None] * vt).float(), (u * root).float()
            if components:
                strength = (s / s.mean()).clamp_min(WEAKEST).sqrt().float()
                strength = strength / strength.mean()
                A, B = strength[:, None] * A, B * strength
        self.strength: Tensor | None
        self.register_buffer("strength", strength, persistent=False)
        self.start = Factors(A, B, pair.bias)
        """the pair in these coordinates"""

    def back(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The plain factors of these."""
        if self.strength is not None:
            A, B = A / self.strength[:, None], B / self.strength
        return self._scaled(A, B, -1)

    def _scaled(self, A: Tensor, B: Tensor, power: int) -> tuple[Tensor, Tensor]:
        A = A if self.right is None else self.right.times(A.T, power).T
        return A, B if self.left is None else self.left.times(B, power)
