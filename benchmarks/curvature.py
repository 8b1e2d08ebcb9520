"""Other estimates of the curvature than the tool's: `python benchmarks/curvature.py BED`.

Each makes closed forms at the same budget of parameters, plain, without refit or training, and is scored by KL to the
dense model on validation data. Writes results/curvature_BED.json as it goes on; what is there is not measured again.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.experiments import beds, recipe_of
from benchmarks.study import Study, added, arguments, calibration_batches, closed_form, modules
from lrcompress import recipe as recipes
from lrcompress.artifacts import Factors, LayerStatistics
from lrcompress.calibrate import collect
from lrcompress.layers import read_weight
from lrcompress.linalg import Root, Roots, psd_root
from lrcompress.methods import Kron, Statistic
from lrcompress.workspace import Workspace

KEEPS = {"demo": (0.4, 0.2), "minilm-sst2": (0.3, 0.15)}
SEEDS = (0, 1, 2)
NEEDS = frozenset[Statistic](("weighted_input_moment", "grad_moment", "input_moment", "fisher_by_output"))
SWEEPS = 3
"""of the alternating weighted least squares"""

RootsOf = Callable[[str], Roots]


@dataclass
class Lab:
    """A bed with one seed's statistics."""

    work: Workspace

    def __post_init__(self) -> None:
        self.dense = {name: self.work.model.get_submodule(name) for name in self.work.layers}
        self.weights = {name: read_weight(layer).detach().double() for name, layer in self.dense.items()}
        self.once = self.statistics(1)

    def statistics(self, draws: int) -> dict[str, LayerStatistics]:
        """Sums over so many draws of labels for each sequence."""
        total: dict[str, LayerStatistics] = {}
        for draw in range(draws):
            seed = self.work.seed + 1000 * draw
            found, _ = collect(
                self.work.model, self.work.layers, calibration_batches(self.work), NEEDS, self.work.task, seed=seed
            )
            total = {name: added(total[name], one) if total else one for name, one in found.items()}
        return total

    @cached_property
    def four(self) -> dict[str, LayerStatistics]:
        """Of four draws of labels."""
        return self.statistics(4)

    @cached_property
    def squares(self) -> Mapping[str, Tensor]:
        """E[(Uᵀ ∇W V)²] `[O, I]` per sequence, U and V being the eigenvectors of kron's two moments."""
        bases = {name: _bases(Kron().roots(one)) for name, one in self.once.items()}
        sums = {name: torch.zeros(weight.shape, dtype=torch.float64) for name, weight in self.weights.items()}
        generator, count, task = torch.Generator().manual_seed(self.work.seed), 0, self.work.task
        for batch in calibration_batches(self.work):
            size = task.size(batch)
            with self._gradients() as found:
                task.fisher_loss(task.logits(self.work.model, batch), batch, generator).backward()
            for name, (x, g) in found.items():
                u, v = bases[name]
                ours, theirs = (g @ u).reshape(size, -1, u.shape[1]), (x @ v).reshape(size, -1, v.shape[1])
                sums[name] += torch.einsum("bto,bti->boi", ours, theirs).square().sum(0)
            count += size
        return {name: value / count for name, value in sums.items()}

    @contextmanager
    def _gradients(self) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
        """Fills the dictionary with inputs and gradients at the outputs, while a backward pass runs within."""
        found: dict[str, tuple[Tensor, Tensor]] = {}

        def hook(name: str) -> Callable[..., Tensor]:
            def forward(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
                output = output if output.requires_grad else output.detach().requires_grad_()

                def backward(gradient: Tensor) -> None:
                    found[name] = inputs[0].detach(), gradient.detach()

                output.register_hook(backward)
                return output.clone()

            return forward

        self.work.model.requires_grad_(False)
        hooks = [layer.register_forward_hook(hook(name)) for name, layer in self.dense.items()]
        try:
            yield found
        finally:
            for one in hooks:
                one.remove()

    def corrected(self, keep: float) -> dict[str, Factors]:
        """Kron's ranks; factors that minimise the error weighted by `squares` itself, which has no closed form."""
        found = {}
        for name, pair in closed_form(self.work, _kron(self), keep).items():
            u, v = _bases(Kron().roots(self.once[name]))
            target = u.T.double() @ self.weights[name] @ v.double()
            weights = self.squares[name] + 1e-3 * self.squares[name].mean()
            B, A = pair.B, pair.A.double() @ v.double()
            for _ in range(SWEEPS):
                B = _weighted(target, weights, A)
                A = _weighted(target.T, weights.T, B.T).T
            found[name] = Factors((A @ v.double().T).float(), (u.double() @ B).float(), pair.bias)
        return found


def _bases(roots: Roots) -> tuple[Tensor, Tensor]:
    """Eigenvectors of the two moments, `[O, O]` and `[I, I]`, as columns; float32."""
    assert roots.left is not None
    assert roots.right is not None
    left, right = roots.left.matrix.T, roots.right.matrix
    if left.ndim == 1:  # no gradient ever
        left = torch.eye(len(left), dtype=left.dtype)
    return (left / left.norm(dim=0)).float(), (right / right.norm(dim=0)).float()


def _weighted(target: Tensor, weights: Tensor, right: Tensor) -> Tensor:
    """The `X` [n, R] that minimises Σ weights ⊙ (target − X·right)², `right` [R, m]: a system for each row."""
    gram = torch.stack([(right * row) @ right.T for row in weights])  # [n, R, R]
    ridge = 1e-6 * gram.diagonal(dim1=1, dim2=2).mean(1)[:, None, None] * torch.eye(len(right), dtype=gram.dtype)
    return torch.linalg.solve(gram + ridge, ((weights * target) @ right.T)[..., None])[..., 0]


def separable(squares: Tensor, how: str) -> tuple[Tensor, Tensor]:
    """`a` [O] and `b` [I] with a bᵀ ≈ squares: by least squares, or by the sums over each side; b of mean 1."""
    if how == "sums":
        return squares.mean(1), squares.mean(0) / squares.mean().clamp_min(1e-300)
    u, s, v = torch.linalg.svd(squares, full_matrices=False)
    b = v[0].abs()
    return u[:, 0].abs() * s[0] * b.mean(), b / b.mean()


def corrected_roots(lab: Lab, how: str) -> RootsOf:
    """Kron's eigenvectors with eigenvalues by `squares`, in the nearest separable form."""

    def roots(name: str) -> Roots:
        u, v = (basis.double() for basis in _bases(Kron().roots(lab.once[name])))
        a, b = separable(lab.squares[name], how)
        a, b = (a + 1e-3 * a.mean()).clamp_min(1e-30).sqrt(), (b + 1e-4 * b.mean()).sqrt()
        return Roots(Root((u * a).T, u / a, 1e-3), Root(v * b, (v / b).T, 1e-4))

    return roots


def _kron(lab: Lab, left: float = 1e-3, right: float = 1e-4) -> RootsOf:
    return lambda name: Kron(output_damping=left, input_damping=right).roots(lab.once[name])


def _unweighted(lab: Lab) -> RootsOf:
    def roots(name: str) -> Roots:
        one, found = lab.once[name], Kron().roots(lab.once[name])
        assert one.input_moment is not None
        return Roots(found.left, psd_root(one.input_moment / one.tokens, damping=1e-4, side="right"))

    return roots


def _draws(lab: Lab) -> RootsOf:
    return lambda name: Kron().roots(lab.four[name])


def _scaled(lab: Lab) -> RootsOf:
    """Kron's, its product scaled to the trace of the Fisher information of the weight, which tokens of one sequence
    add to with each other's.
    """

    def roots(name: str) -> Roots:
        one, found = lab.once[name], Kron().roots(lab.once[name])
        assert one.fisher_by_output is not None
        assert found.left is not None
        assert found.right is not None
        estimate = found.left.matrix.square().sum() * found.right.matrix.square().sum()
        scale = (one.fisher_by_output.sum() / one.sequences / estimate.clamp_min(1e-300)).sqrt().clamp_min(1e-6)
        return Roots(Root(found.left.matrix * scale, found.left.inverse / scale, found.left.added), found.right)

    return roots


def closed(make: Callable[[Lab], RootsOf]) -> Callable[[Lab, float], dict[str, Factors]]:
    """Closed forms of these roots."""
    return lambda lab, keep: closed_form(lab.work, make(lab), keep)


CANDIDATES: dict[str, Callable[[Lab, float], dict[str, Factors]]] = {
    "the tool": closed(_kron),
    "four draws of labels": closed(_draws),
    "inputs not weighted by the gradient": closed(_unweighted),
    "scaled to the trace of the Fisher information": closed(_scaled),
    "damping × 0.1": closed(lambda lab: _kron(lab, 1e-4, 1e-5)),
    "damping × 10": closed(lambda lab: _kron(lab, 1e-2, 1e-3)),
    "damping × 100": closed(lambda lab: _kron(lab, 1e-1, 1e-2)),
    "corrected eigenvalues, least squares": closed(lambda lab: corrected_roots(lab, "least squares")),
    "corrected eigenvalues, sums": closed(lambda lab: corrected_roots(lab, "sums")),
    "corrected eigenvalues, not separable": lambda lab, keep: lab.corrected(keep),
}


def measure(name: str) -> None:
    """Every candidate with every seed that has no row yet."""
    recipe = recipes.resolve(recipe_of(beds()[name], "closed-kron", KEEPS[name][0]))[1]
    study = Study("curvature", name, recipe)
    for seed in SEEDS:
        todo = [(key, keep) for key in CANDIDATES for keep in KEEPS[name]]
        todo = [(key, keep) for key, keep in todo if not study.has(candidate=key, keep=keep, seed=seed)]
        if not todo:
            continue
        with study.opened(recipe, seed, "layers") as (work, scorer):
            lab = Lab(work)
            for key, keep in todo:
                began = time.perf_counter()
                pairs = CANDIDATES[key](lab, keep)
                seconds = time.perf_counter() - began
                score = scorer.score(modules(pairs))
                study.add(work, candidate=key, keep=keep, seed=seed, seconds=seconds, **vars(score))


if __name__ == "__main__":
    measure(arguments(__doc__, list(KEEPS)).parse_args().bed)
