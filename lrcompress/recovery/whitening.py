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

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lrcompress.artifacts import Factors, read_tensors, write_tensors
from lrcompress.linalg import Root, Roots, product_svd

DIRECTIONS = 128
"""Directions of a side that have a scale of their own."""

DAMPING = 0.1
"""Added to a moment of mean eigenvalue 1: how far a step may go where calibration saw next to nothing. More than a
method adds, which divides by a root once and not at every step."""

WEAKEST = 0.01
"""Of the mean singular value: components below it are scaled as if they were there."""


@dataclass(frozen=True)
class Directions:
    """Of one side of a layer: those that matter most, and how much, as the square roots of a moment's eigenvalues.

    The moment is divided by its mean eigenvalue and damped.
    """

    vectors: Tensor | None
    """[n, K] in float32; None: the K = n axes themselves, of a diagonal moment"""
    scale: Tensor
    """[K] in float32"""
    rest: Tensor
    """[]: of all directions beyond these"""

    @classmethod
    def of(cls, root: Root, vectors_in: int) -> "Directions":
        """`vectors_in`: the dimension of the root's matrix over which an eigenvector runs."""
        scale = root.matrix if root.matrix.ndim == 1 else root.matrix.norm(dim=vectors_in)
        squares = scale.square()
        relative = (squares / squares.mean() + DAMPING).sqrt()
        if root.matrix.ndim == 1:
            return cls(None, relative.float(), torch.ones(()))
        order = relative.argsort(descending=True)
        top, others = order[:DIRECTIONS], order[DIRECTIONS:]
        vectors = (root.matrix if vectors_in == 0 else root.matrix.T)[:, top] / scale[top]
        # orthogonal to the top ones no direction is left where all are told apart
        rest = relative[others].square().mean().sqrt().float() if len(others) else torch.ones(())
        return cls(vectors.float().contiguous(), relative[top].float(), rest)


@dataclass(frozen=True)
class Coordinates:
    """Of one layer; None is a side whose directions matter alike."""

    left: Directions | None = None
    right: Directions | None = None

    @classmethod
    def of(cls, roots: Roots) -> "Coordinates":
        """Those of a method's roots."""
        left = None if roots.left is None else Directions.of(roots.left, 1)
        return cls(left, None if roots.right is None else Directions.of(roots.right, 0))

    def write(self, file: Path) -> None:
        """As safetensors."""
        sides = {"left": self.left, "right": self.right}
        write_tensors(file, {
            f"{side}.{key}": value
            for side, found in sides.items() if found is not None
            for key, value in vars(found).items() if value is not None
        })  # fmt: skip

    @classmethod
    def read(cls, file: Path) -> "Coordinates":
        """What `write` wrote."""
        tensors = read_tensors(file)

        def side(name: str) -> Directions | None:
            if f"{name}.scale" not in tensors:
                return None
            return Directions(tensors.get(f"{name}.vectors"), tensors[f"{name}.scale"], tensors[f"{name}.rest"])

        return cls(side("left"), side("right"))


class Scaling(nn.Module):
    """Of one side: the symmetric `S = rest·1 + V·diag(scale − rest)·Vᵀ`, [n, n], near the root of its moment."""

    def __init__(self, directions: Directions) -> None:
        super().__init__()
        self.vectors: Tensor | None
        self.scale: Tensor
        self.inverse: Tensor
        self.rest = directions.rest.item()
        self.register_buffer("vectors", directions.vectors, persistent=False)
        self.register_buffer("scale", directions.scale, persistent=False)
        # V·diag(1/scale − 1/rest), or diag(1/scale): a step takes S⁻¹ twice a layer, in as few operators as can be
        inverse = 1 / directions.scale
        if directions.vectors is not None:
            inverse = directions.vectors * (inverse - 1 / self.rest)
        self.register_buffer("inverse", inverse, persistent=False)

    def times(self, matrix: Tensor) -> Tensor:
        """`S · matrix`, [n, m]."""
        if self.vectors is None:
            return self.scale[:, None] * matrix
        return self.rest * matrix + self.vectors @ ((self.scale - self.rest)[:, None] * (self.vectors.T @ matrix))

    def solve(self, matrix: Tensor) -> Tensor:
        """`S⁻¹ · matrix`, [n, m]."""
        if self.vectors is None:
            return self.inverse[:, None] * matrix
        return torch.addmm(matrix, self.inverse, self.vectors.T @ matrix, beta=1 / self.rest)


class Whitening(nn.Module):
    """Of one layer: `Ã = D·A·R` [r, I] and `B̃ = L·B·D` [O, r], and back, in float32.

    A and B are balanced by an SVD of L·B·A·R, whose singular values are s. D is the identity, or with `components` the
    diagonal of √s, of mean 1.
    """

    def __init__(self, coordinates: Coordinates, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.device = device
        left, right = coordinates.left, coordinates.right
        self.left = None if left is None else Scaling(left).to(device)
        self.right = None if right is None else Scaling(right).to(device)
        self.strength: Tensor | None
        self.register_buffer("strength", None, persistent=False)

    def into(self, pair: Factors, *, components: bool) -> Factors:
        """The pair in these coordinates, from now on with its own D. Changes the module."""
        A, B = self.weighted(pair.A.to(self.device).float(), pair.B.to(self.device).float())
        self.strength = None
        if B.any():  # LoRA's start has nothing to balance
            u, s, vt = product_svd(B, A)
            root = s.sqrt()
            A, B = (root[:, None] * vt).float(), (u * root).float()
            if components:
                strength = (s / s.mean()).clamp_min(WEAKEST).sqrt().float()
                self.strength = strength / strength.mean()
                A, B = self.strength[:, None] * A, B * self.strength
        return Factors(A, B, pair.bias)

    def weighted(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """A·R and L·B."""
        A = A if self.right is None else self.right.times(A.T).T
        return A, B if self.left is None else self.left.times(B)

    def back(self, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        """The plain factors of these."""
        if self.strength is not None:
            A, B = A / self.strength[:, None], B / self.strength
        A = A if self.right is None else self.right.solve(A.T).T
        return A, B if self.left is None else self.left.solve(B)
