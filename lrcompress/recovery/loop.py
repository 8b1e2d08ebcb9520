"""LoRA-LRD's training: blended layers in, learned factors out."""

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lrcompress.artifacts import Factors, Layer
from lrcompress.errors import NumericalError
from lrcompress.layers import block_names, read_weight
from lrcompress.lowrank import swapped
from lrcompress.recovery.blended import BlendedLinear, lora_start
from lrcompress.recovery.distill import Losses, Recorder, as_teacher, distillation
from lrcompress.recovery.settings import Recovery
from lrcompress.recovery.state import load_state, save_state
from lrcompress.recovery.whitening import Coordinates, Whitening
from lrcompress.seeds import generator
from lrcompress.tasks import AbstractTask, Batch, to_device


class TrainingData(Protocol):
    """Sequences that can be taken by number."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int]) -> Batch:
        """The sequences of these numbers."""
        ...


@dataclass(frozen=True)
class Recovered:
    """What the recovery learned."""

    factors: dict[str, Factors]
    others: dict[str, Tensor]
    """trained parameters outside the replaced layers, by name (normalisation layers); at least float32"""
    curve: list[dict[str, Any]]
    """step, loss, tau, kl, hidden, seconds and tokens_per_second of each step"""


def modules_with(model: nn.Module, parameters: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """Copies of the model's modules with these parameters, by name, in them; on its device, in its dtypes.

    Trained `Recovered.others` as modules, to stand beside the factors that they were trained with.
    """
    modules: dict[str, nn.Module] = {}
    for name, value in parameters.items():
        owner, _, key = name.rpartition(".")
        if owner not in modules:
            modules[owner] = copy.deepcopy(model.get_submodule(owner))
        parameter = modules[owner].get_parameter(key)
        parameter.data = value.to(parameter)
    return modules


class Progress(Protocol):
    """Called after each step with the point of the curve."""

    def __call__(self, step: int, point: Mapping[str, Any], /) -> None:
        """`step` steps of those asked for are done."""
        ...


def recover(
    model: nn.Module,
    layers: Mapping[str, Layer],
    start: Mapping[str, Factors],
    data: TrainingData,
    settings: Recovery,
    task: AbstractTask,
    *,
    seed: int,
    coordinates: Callable[[str], Coordinates] | None = None,
    steps: range | None = None,
    state: Path | None = None,
    progress: Progress = lambda step, point: None,
) -> Recovered:
    """Train the factors of the layers in `start` while their dense weights fade; the model is left as it was.

    `steps`: which of the settings' steps, default all of them; data, rates and τ are those of the whole training.

    `coordinates` gives those that a layer is trained in with `whiten`, from the method's roots; without it they are the
    plain ones. With `state` the training goes on at the last save there. All
    randomness follows from (seed, step): a resumed training is the same, bit by bit, as one that ran through. Raises
    NumericalError with the step and the layer when a loss or a gradient is not finite.
    """
    with blended(model, start, settings, seed, coordinates) as pairs:
        norms = _norm_parameters(model) if settings.train == "factors+bias+norm" else {}
        parameters = _trainable(pairs, norms, settings)
        training = _Training(model, layers, pairs, norms, parameters, data, settings, task, seed)
        try:
            steps = range(settings.steps) if steps is None else steps
            curve = training.run(steps, state, progress)
            final = settings.tau.at(steps[-1], settings.steps)
            for pair in pairs.values():
                pair.tau = final
            factors = {name: pair.replacement() for name, pair in pairs.items()}
            others = {name: training.parameters[name].detach().clone() for name in norms}
        finally:
            training.restore()
        return Recovered(factors, others, curve)


def before_replacement(
    model: nn.Module, start: Mapping[str, Factors], learned: Mapping[str, Factors], settings: Recovery
) -> dict[str, BlendedLinear]:
    """The layers of the function that a training from `start` ended with, when `learned` were the factors it gave.

    Of `theseus` the mean over its draws.
    """
    tau, drawn, found = settings.tau.final(settings.steps), settings.tau.schedule == "theseus", {}
    for name, factors in learned.items():
        found[name] = _blend(model.get_submodule(name), start[name], settings, 0, name, None)
        found[name].take(factors, tau, drawn=drawn)
    return found


@contextmanager
def blended(
    model: nn.Module,
    start: Mapping[str, Factors],
    settings: Recovery,
    seed: int,
    coordinates: Callable[[str], Coordinates] | None = None,
) -> Iterator[dict[str, BlendedLinear]]:
    """Within the block the named layers are BlendedLinears at the recovery's start, and nothing else is trained."""
    given = coordinates if settings.whiten else None
    pairs = {name: _blend(model.get_submodule(name), start[name], settings, seed, name, given) for name in start}
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    model.requires_grad_(False)
    model.eval()  # dropout would make the dense branch a noisy teacher
    with swapped(model, pairs):
        try:
            yield pairs
        finally:
            for parameter, flag in trainable:
                parameter.requires_grad_(flag)


def _blend(
    dense: nn.Module,
    start: Factors,
    settings: Recovery,
    seed: int,
    name: str,
    coordinates: Callable[[str], Coordinates] | None,
) -> BlendedLinear:
    rank, in_features = start.A.shape
    gain = None if settings.scaling == "full" else (settings.alpha or rank) / rank
    if settings.start == "lora":
        start = lora_start(rank, in_features, start.B.shape[0], generator(seed, "lora", name))
    elif gain is not None:  # the source's pair stands for τ·W
        start = Factors(start.A, start.B * (settings.tau.at(0, settings.steps) / gain), start.bias)
    whitening = None
    if coordinates is not None:
        whitening = Whitening(coordinates(name), read_weight(dense).device)
        start = whitening.into(start, components=settings.components)
    return BlendedLinear(dense, start, gain=gain, whitening=whitening)


def _norm_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters of normalisation layers, found by their class's name: each family has its own RMSNorm."""
    return {
        f"{name}.{key}": parameter
        for name, module in model.named_modules()
        if type(module).__name__.lower().endswith(("norm", "layernorm"))
        for key, parameter in module.named_parameters(recurse=False)
    }


def _is_half(parameter: nn.Parameter) -> bool:
    return torch.finfo(parameter.dtype).bits < 32


def _trainable(
    pairs: Mapping[str, BlendedLinear], norms: Mapping[str, nn.Parameter], settings: Recovery
) -> dict[str, nn.Parameter]:
    chosen: dict[str, nn.Parameter] = dict(norms)
    for name, pair in pairs.items():
        chosen |= {f"{name}.A": pair.A, f"{name}.B": pair.B}
        if pair.bias is not None:
            pair.bias.requires_grad_(settings.train != "factors")
            if settings.train != "factors":
                chosen[f"{name}.bias"] = pair.bias
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    return chosen


class _Training:
    """One run of the optimizer."""

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[str, Layer],
        pairs: dict[str, BlendedLinear],
        norms: dict[str, nn.Parameter],
        parameters: dict[str, nn.Parameter],
        data: TrainingData,
        settings: Recovery,
        task: AbstractTask,
        seed: int,
    ) -> None:
        self.model, self.pairs, self.norms = model, pairs, norms
        # a step is below the spacing of half precision: the norms that have it are copies of what is trained
        self.masters = {name: nn.Parameter(norm.detach().float()) for name, norm in norms.items() if _is_half(norm)}
        self.parameters = parameters | self.masters
        self.data, self.settings, self.task, self.seed = data, settings, task, seed
        self.originals = {name: parameter.detach().clone() for name, parameter in norms.items()}
        self.device = next(iter(pairs.values())).A.device
        # without blocks (an MLP) the replaced layers' own outputs are compared
        self.points = block_names(layers[name] for name in pairs) or list(pairs)
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=0.0, weight_decay=settings.weight_decay)

    def run(self, steps: range, state: Path | None, progress: Progress) -> list[dict[str, Any]]:
        """Those of the steps that are left."""
        saved, curve = (0, []) if state is None else load_state(state, self.parameters, self.optimizer)
        self._copy_masters()
        if curve:
            progress(saved - steps.start, curve[-1])
        with _recorder(self.model, self.points, self.settings) as recorder:
            for step in range(max(saved, steps.start), steps.stop):
                curve.append(self.step(step, recorder))
                done = step + 1
                progress(done - steps.start, curve[-1])
                if state is not None and done % self.settings.save_every == 0 and done < steps.stop:
                    save_state(state, done, self.parameters, self.optimizer, curve)
        return curve

    def step(self, step: int, recorder: Recorder | None) -> dict[str, Any]:
        """One optimizer step; returns its point of the curve."""
        began = time.perf_counter()
        batch = to_device(self.data.batch(self._indices(step)), self.device)
        tau = self._set_branches(step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings.rate(step)
        losses = self._losses(batch, recorder)
        if not torch.isfinite(losses.total):
            raise NumericalError(f"recovery: the loss of step {step} is {losses.total.item()}; {self._culprit(batch)}")
        if losses.total.requires_grad:  # not where no token came to any of the trained experts
            losses.total.backward()
        for name, master in self.masters.items():
            grad, self.norms[name].grad = self.norms[name].grad, None
            master.grad = None if grad is None else grad.float()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.gradient_clip)
        if not torch.isfinite(norm):
            bad = [name for name, p in self.parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
            raise NumericalError(f"recovery: the gradient of step {step} is not finite, first at {bad[0]}")
        self.optimizer.step()
        self._copy_masters()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.perf_counter() - began
        masks = self.task.token_masks(batch)
        count = sum(int(mask.sum()) for mask in masks) if masks else self.task.size(batch)
        point = {"step": step, "loss": losses.total.item(), "tau": tau, "seconds": seconds}
        point |= {"tokens_per_second": count / seconds}
        parts = {"kl": losses.kl, "hidden": losses.hidden}
        return point | {key: value.item() for key, value in parts.items() if value is not None}

    def restore(self) -> None:
        """Give the model's own parameters their values back. Changes the model."""
        for name, parameter in self.norms.items():
            parameter.data = self.originals[name]
            parameter.grad = None

    def _copy_masters(self) -> None:
        for name, master in self.masters.items():
            self.norms[name].data.copy_(master)

    def _indices(self, step: int) -> list[int]:
        """Which sequences a step sees: epochs of seeded permutations, cut into batches."""
        size = min(self.settings.batch, len(self.data))
        per_epoch = len(self.data) // size
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(len(self.data), generator=generator(self.seed, "epoch", epoch))
        return order[position * size : (position + 1) * size].tolist()

    def _set_branches(self, step: int) -> float:
        tau = self.settings.tau.at(step, self.settings.steps)
        draws = torch.rand(len(self.pairs), generator=generator(self.seed, "branch", step))
        if self.settings.tau.schedule == "theseus":
            chosen = draws < tau
            chosen[draws.argmin()] = True  # a step without any factors would train nothing
            for pair, factored in zip(self.pairs.values(), chosen.tolist(), strict=True):
                pair.tau, pair.branch = tau, "factored" if factored else "dense"
        else:
            for pair in self.pairs.values():
                pair.tau, pair.branch = tau, "blend"
        return tau

    def _losses(self, batch: Batch, recorder: Recorder | None) -> Losses:
        settings = self.settings.loss
        with _autocast(self.device):
            if settings.kind == "task":
                return Losses(self.task.loss(self.task.logits(self.model, batch), batch))
            with torch.no_grad(), as_teacher(self.pairs, self.norms, self.originals):
                teacher = self.task.logits(self.model, batch)
            teacher_hidden = recorder.take() if recorder else []
            student = self.task.logits(self.model, batch)
            hidden = recorder.take() if recorder else []
            return distillation(student, teacher, hidden, teacher_hidden, batch, self.task, settings)

    @torch.no_grad()
    def _culprit(self, batch: Batch) -> str:
        """The first replaced layer whose output is not finite, as words."""
        bad: list[str] = []  # in the order of the calls, which need not be the order of the names
        names = {pair: name for name, pair in self.pairs.items()}

        def note(pair: BlendedLinear, _: object, output: Tensor) -> None:
            if not torch.isfinite(output).all():
                bad.append(names[pair])

        hooks = [pair.register_forward_hook(note) for pair in names]
        try:
            self.task.logits(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        if bad:
            return f"the first layer with a non-finite output is {bad[0]}"
        return "every replaced layer's output is finite; lower the learning rate"


@contextmanager
def _recorded(model: nn.Module, names: Sequence[str]) -> Iterator[Recorder]:
    recorder = Recorder(model, names)
    try:
        yield recorder
    finally:
        recorder.close()


def _recorder(model: nn.Module, names: Sequence[str], settings: Recovery) -> Any:
    wanted = settings.loss.kind == "distill" and settings.loss.hidden > 0
    return _recorded(model, names) if wanted else nullcontext()


def _autocast(device: torch.device) -> Any:
    """bfloat16 on CUDA; the CPU computes in float32."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
