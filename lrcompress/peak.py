"""The peak memory of a call: what PyTorch's tensors hold at one time, beyond what is there already."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@torch.no_grad()
def peak_of(call: Callable[[], object], device: torch.device) -> int:
    """Bytes that the call needs at its peak above what was held before it. It runs once, on CUDA twice.

    CUDA: by the allocator (`torch.cuda.max_memory_allocated`), so workspaces that kernels take from it count.
    Else: storages of the tensors that PyTorch's operations return, added when made, taken off when freed;
    scratch memory inside one operation does not count. That number is the same at each run. No peak per call
    can be had from the process's resident size, which keeps what earlier calls freed.
    """
    return _allocator_peak(call, device) if device.type == "cuda" else _tracked_peak(call)


def _allocator_peak(call: Callable[[], object], device: torch.device) -> int:
    call()  # libraries allocate their workspaces at the first call and keep them
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _tracked_peak(call: Callable[[], object]) -> int:
    # in inference mode composite operations (linear, attention) would hide their parts
    with torch.inference_mode(False), torch.no_grad(), _LiveBytes() as live:
        call()
    return live.peak


class _LiveBytes(TorchDispatchMode):
    """Bytes of the storages made within the block and not yet freed, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._seen: set[int] = set()  # ids of storages alive; PyTorch keeps one Python object for each

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._add(tensor, counts=False)  # one not seen yet was made outside
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._add(tensor, counts=True)
        self.peak = max(self.peak, self._live)
        return result

    def _add(self, tensor: Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        if id(storage) in self._seen:
            return
        size = storage.nbytes() if counts else 0
        self._seen.add(id(storage))
        self._live += size
        weakref.finalize(storage, self._free, id(storage), size).atexit = False

    def _free(self, key: int, size: int) -> None:
        self._seen.discard(key)
        self._live -= size


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
