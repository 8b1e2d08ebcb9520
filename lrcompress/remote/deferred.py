"""A tensor whose values are computed when they are used; its shape, dtype and device are known before."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only


def defer(make: Callable[..., Tensor], inputs: tuple[Tensor, ...], shape: tuple[int, ...], like: Tensor) -> Tensor:
    """`make(*inputs)`, of this shape, in the dtype and on the device of `like`, when its values are used.

    A gradient goes to the `inputs`. In a graph that is being traced, where what is not used is taken away, it is
    computed at once, and so it is from tensors that are none of torch's own kinds.
    """
    if is_traced() or any(type(tensor) not in (Tensor, torch.nn.Parameter) for tensor in inputs):
        return make(*inputs)
    return _Defer.apply(make, shape, like, *inputs)  # type: ignore[return-value]


def is_traced() -> bool:
    """Whether torch.compile, torch.export, torch.jit.trace or a transform of torch.func is at work."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[reportPrivateImportUsage]
    return traced or torch._C._are_functorch_transforms_active()


class Deferred(Tensor):
    """Stands for what `make()` gives; every operation on it is one on that."""

    _make: Callable[[], Tensor]
    _made: Tensor | None

    @staticmethod
    def __new__(cls, make: Callable[[], Tensor], shape: tuple[int, ...], like: Tensor) -> "Deferred":
        """Shape, dtype and device are those of what `make` will give."""
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        made._make, made._made = make, None
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map_only(Deferred, Deferred.made, (args, kwargs or {}))
        return func(*args, **kwargs)

    def made(self) -> Tensor:
        """The values, without a gradient; computed once."""
        if self._made is None:
            with torch.no_grad(), _in_its_dtype(self.device):
                self._made = self._make()
        return self._made

    # what reads memory without an operation

    def numpy(self, *, force: bool = False) -> Any:
        """As a tensor's."""
        return self.made().detach().requires_grad_(self.requires_grad).numpy(force=force)

    def tolist(self) -> Any:
        """As a tensor's."""
        return self.made().tolist()

    def data_ptr(self) -> int:
        """As a tensor's."""
        return self.made().data_ptr()

    def untyped_storage(self) -> Any:
        """As a tensor's."""
        return self.made().untyped_storage()

    def __repr__(self, **_: Any) -> str:
        return repr(self.made())

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.made().__reduce_ex__(protocol)


def _in_its_dtype(device: torch.device) -> Any:
    """No autocast, which would make it in another dtype than was said."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


class _Defer(torch.autograd.Function):
    """Computes nothing forward; backward what the gradient needs."""

    @staticmethod
    def forward(
        ctx: Any, make: Callable[..., Tensor], shape: tuple[int, ...], like: Tensor, *inputs: Tensor
    ) -> Deferred:
        ctx.make = make
        ctx.save_for_backward(*inputs)
        return Deferred(lambda: make(*inputs), shape, like)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        inputs, needed = ctx.saved_tensors, ctx.needs_input_grad[3:]
        wanted = [tensor for tensor, needs in zip(inputs, needed, strict=True) if needs]
        again = torch.is_grad_enabled()
        with torch.enable_grad(), _in_its_dtype(grads[0].device):
            made = ctx.make(*inputs)
        found = iter(torch.autograd.grad(made, wanted, grads, create_graph=again))
        return None, None, None, *(next(found) if needs else None for needs in needed)
