"""LoRA-LRD: learn the factors while the dense weight fades."""

from lrcompress.recovery.loop import Recovered, before_replacement, modules_with, recover
from lrcompress.recovery.settings import Loss, Recovery, Tau

__all__ = ["Loss", "Recovered", "Recovery", "Tau", "before_replacement", "modules_with", "recover"]
