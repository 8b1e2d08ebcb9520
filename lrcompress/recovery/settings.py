"""The recipe sections of LoRA-LRD: its start, schedule of τ, loss and training, as recovery and as probe."""

import math
from itertools import pairwise
from typing import Any, Literal

from pydantic import Field, model_validator

from lrcompress.part import Part


class Tau(Part):
    """How the dense weight gives way: the layer is `(1−τ)·W x + τ·B A x + b`, and τ rises."""

    schedule: Literal["theseus", "linear", "cosine", "constant"] = "theseus"
    """theseus: each layer and batch takes W with probability 1−τ, else BA (arXiv 2002.02925), the blend in
    expectation at the cost of one branch, τ rising linearly; linear and cosine: the blend; constant: τ = start"""
    start: float = Field(default=0.3, gt=0, le=1)
    """τ at the first step"""
    end: float = Field(default=1.0, gt=0, le=1)
    """τ from `until` on"""
    until: float = Field(default=0.6, gt=0, le=1)
    """share of the steps after which τ has reached `end`"""

    def at(self, step: int, steps: int) -> float:
        """τ at a step counted from 0."""
        if self.schedule == "constant":
            return self.start
        progress = min(step / max(self.until * steps, 1), 1.0)
        if self.schedule == "cosine":
            progress = (1 - math.cos(math.pi * progress)) / 2
        return self.start + (self.end - self.start) * progress

    def final(self, steps: int) -> float:
        """τ of the function that the last step trained."""
        return self.at(steps - 1, steps)


class Loss(Part):
    """What the factors are trained on."""

    kind: Literal["distill", "task"] = "distill"
    """distill: match the dense model; task: the data's own labels"""
    temperature: float = Field(default=1.0, gt=0, le=100)
    """of both distributions in the distillation (arXiv 1503.02531); the term is multiplied by its square"""
    hidden: float = Field(default=10.0, ge=0)
    """weight of the squared error of the blocks' outputs, relative to the dense ones' squares (distill only)"""
    task: float = Field(default=0.0, ge=0)
    """weight of the task loss beside the distillation"""


class Round(Part):
    """A size that is trained on the way to the last one."""

    size: float = Field(gt=1)
    """as a multiple of the share of parameters that the plan keeps; a round of the whole dense size is left out"""
    steps: float = Field(gt=0, lt=1)
    """share of the recovery's steps"""


class Recovery(Part):
    """LoRA-LRD: learn the factors while the dense weight fades."""

    start: Literal["method", "lora"] = "method"
    """method: the closed-form factors; lora: A Kaiming-uniform (a = √5), B zero"""
    tau: Tau = Tau(schedule="constant", start=1.0)
    """schedule of τ; a number keeps τ constant; default: 1.0, which trains the factors directly, and with start `lora`,
    which has nothing to train directly from, theseus"""
    scaling: Literal["full", "source"] = "full"
    """full: BA → W, the layer is `(1−τ)·W x + τ·BA x`; source: BA → τ·W, the layer is `(1−τ)·W x + (α/r)·BA x`
    and is divided by τ at replacement"""
    alpha: float | None = Field(default=None, gt=0)
    """α of scaling `source`; null: r of the layer, so that α/r = 1"""
    loss: Loss = Loss()
    """what is minimised"""
    steps: int = Field(default=300, ge=1)
    """optimizer steps"""
    batch: int = Field(default=16, ge=1)
    """sequences a step"""
    length: int = Field(default=128, ge=2)
    """tokens a sequence: windows of a causal LM, the longest text of a classifier"""
    learning_rate: float = Field(default=1e-4, gt=0)
    """peak of AdamW's learning rate"""
    warmup: float = Field(default=0.06, ge=0, le=1)
    """share of the steps in which the learning rate rises; afterwards it falls linearly to 0"""
    weight_decay: float = Field(default=0.0, ge=0)
    """AdamW's"""
    gradient_clip: float = Field(default=1.0, gt=0)
    """largest norm of the gradient of a step"""
    train: Literal["factors", "factors+bias", "factors+bias+norm"] = "factors"
    """what is trained: A and B; the replaced layers' biases too; all normalisation layers too"""
    whiten: bool = True
    """train A·R and L·B, L and R being the method's roots: the factors in the coordinates in which the method takes its
    SVD, in which all directions matter alike. Without roots (svd) the directions stay as they are; default with start
    `lora`: false"""
    components: bool = True
    """with `whiten`: scale the R components of a pair by the roots of their singular values, so that weak ones learn as
    fast as strong ones"""
    rounds: tuple[Round, ...] = ()
    """sizes on the way to the plan's, from the largest on: each is trained, and statistics of the compressed model say
    where the rank of the next one goes, at the cost of another calibration each, or of a share of one. With ranks
    `budget` or `frontier`"""
    rounds_above: float = Field(default=1.0, ge=0)
    """nats, or for embeddings and numbers the square of their unit: rounds are for closed forms whose KL to the dense
    model (half the squared distance of those; the loss of a module without classes) is above this, on 64 training
    sequences that did not calibrate, or where all did, on those; nearer ones, and a refit that is a start, are trained
    in one go. 0: rounds for all but a refit"""
    rounds_calibration: float = Field(default=1.0, gt=0, le=1)
    """share of the calibration sequences whose statistics are taken between rounds"""
    check: int = Field(default=256, ge=0)
    """validation sequences on which trained factors must be nearer to the dense model, by KL, than those of the
    refit, or without one of the closed form, or these stay; where there is a data.validation, and the training distils
    from the closed form. 0: trained factors are taken as they are"""
    save_every: int = Field(default=50, ge=1)
    """steps between two saves of the training state"""

    @model_validator(mode="before")
    @classmethod
    def _constant(cls, value: Any) -> Any:
        if isinstance(value, dict) and value.get("start") == "lora":
            value = {"tau": Tau(), "whiten": False} | value
        return constant_tau(value)

    @model_validator(mode="after")
    def _rounds(self) -> "Recovery":
        if not self.rounds:
            return self
        sizes = [one.size for one in self.rounds]
        if any(after >= before for before, after in pairwise(sizes)):
            raise ValueError(f"rounds must fall in size, got {sizes}")
        if (share := sum(one.steps for one in self.rounds)) >= 1:
            raise ValueError(f"rounds must leave steps for the last size, and take {share:g} of them")
        direct = self.start == "method" and self.tau.at(0, 2) == self.tau.final(2) == 1 and self.scaling == "full"
        if not direct or self.train == "factors+bias+norm":
            raise ValueError(
                "rounds train directly from the closed form: they need start `method`, tau 1.0, scaling `full`, and "
                "train `factors` or `factors+bias`; for anything else set recovery.rounds to []"
            )
        return self

    def spans(self, keep: float) -> list[tuple[float, range]]:
        """Share of parameters and steps of each round, the last size's among them.

        `keep`: the last share. The steps of a round that would keep everything go to the next.
        """
        found, first, share = [], 0, 0.0
        for one in self.rounds:
            share += one.steps
            last = min(round(share * self.steps), self.steps - 1)
            if one.size * keep < 1 and last > first:
                found.append((one.size * keep, range(first, last)))
                first = last
        return [*found, (keep, range(first, self.steps))]

    @property
    def checked(self) -> bool:
        """Whether the start is an alternative to what was learned, and KL to the dense model tells which is better."""
        return self.check > 0 and self.start == "method" and self.loss.kind == "distill"

    def rate(self, step: int) -> float:
        """Learning rate at a step counted from 0."""
        warm = self.warmup * self.steps
        if step < warm:
            return self.learning_rate * (step + 1) / (warm + 1)
        return self.learning_rate * (self.steps - step) / max(self.steps - warm, 1)


class Learning(Part):
    """Short LoRA-LRD runs that look at layers instead of compressing them: for rank selection and analysis."""

    start: Literal["method", "lora"] = "lora"
    """lora: A Kaiming-uniform (a = √5), B zero, as the source does; method: the closed-form factors"""
    tau: Tau = Tau(schedule="linear", start=0.1)
    """schedule of τ; a number keeps τ constant (the source: 0.1)"""
    scaling: Literal["full", "source"] = "full"
    """as in the recovery"""
    loss: Loss = Loss()
    """what is minimised"""
    steps: int = Field(default=100, ge=1)
    """optimizer steps of each run"""
    batch: int = Field(default=16, ge=1)
    """sequences a step"""
    length: int = Field(default=128, ge=2)
    """tokens a sequence"""
    learning_rate: float = Field(default=1e-3, gt=0)
    """peak of AdamW's learning rate"""

    @model_validator(mode="before")
    @classmethod
    def _constant(cls, value: Any) -> Any:
        return constant_tau(value)

    def recovery(self) -> Recovery:
        """The same as settings of the training."""
        return Recovery(**{name: getattr(self, name) for name in Learning.model_fields}, whiten=False)


def constant_tau(value: Any) -> Any:
    """A section whose `tau` is a number, with the constant schedule that it stands for."""
    if isinstance(value, dict) and isinstance(value.get("tau"), (int, float)):
        return value | {"tau": {"schedule": "constant", "start": value["tau"]}}
    return value
