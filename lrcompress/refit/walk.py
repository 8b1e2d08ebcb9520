"""Forward passes that wait at every layer until it is solved, and take turns.

Each pass runs in a thread of its own, but only one at a time: a turn goes from the caller to a pass and back. So every
model can be walked through layer by layer, whatever its forward does between them.
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from lrcompress.artifacts import Factors
from lrcompress.layers import read_weight
from lrcompress.lowrank import in_place_of
from lrcompress.tasks import AbstractTask, Batch, real_rows


class Seat(nn.Module):
    """Stands in a layer's place: every pass waits here, then goes on with the dense or the compressed layer."""

    def __init__(self, name: str, dense: nn.Module, pair: Factors) -> None:
        super().__init__()
        self.name, self.dense = name, dense
        self.take(pair)

    def take(self, pair: Factors) -> None:
        """From now on the compressed passes use these factors."""
        self.pair, self.compressed = pair, in_place_of(self.dense, pair)

    @property
    def weight(self) -> Tensor:
        """Some models read a layer's dtype from it."""
        return read_weight(self.dense)

    def forward(self, x: Tensor) -> Tensor:
        """`x` [.., I] → [.., O], once the layer is solved."""
        walk = Walk.current.walk
        walk.wait(self, x)
        return self.dense(x) if walk.dense else self.compressed(x)


class _Stop(Exception):
    """Ends a pass that is no longer needed."""


class Walk:
    """One forward pass in a thread of its own, which runs only while `go_on` waits for it: one at a time, in turn."""

    current = threading.local()

    def __init__(self, model: nn.Module, task: AbstractTask, batch: Batch, *, dense: bool) -> None:
        self.dense = dense
        self.waits_at: Seat | None = None
        self.ended = False
        self._masks = task.token_masks(batch)
        self._run = lambda: task.logits(model, batch)
        self._error: BaseException | None = None
        self._stopped = False
        self._threads = torch.get_num_threads()
        self._its_turn, self._our_turn = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._walk, daemon=True)
        self._thread.start()

    @property
    def x(self) -> Tensor:
        """The input of the layer at which it waits."""
        return self._x

    @property
    def rows(self) -> Tensor:
        """That of real tokens, [N, I] in float32."""
        return real_rows(self._x, self._masks).float()

    def go_on(self) -> None:
        """Run until the next layer, or the end. Raises what the pass raised."""
        self.waits_at = None
        self._its_turn.release()
        self._our_turn.acquire()
        if self._error is not None:
            raise self._error

    def stop(self) -> None:
        """End it wherever it is."""
        self._stopped = True
        if not self.ended:
            self._its_turn.release()
            self._thread.join()

    def wait(self, seat: Seat, x: Tensor) -> None:
        """Called within the pass: give the turn back until the layer is solved."""
        self.waits_at, self._x = seat, x
        self._our_turn.release()
        self._its_turn.acquire()
        if self._stopped:
            raise _Stop

    def _walk(self) -> None:
        self._its_turn.acquire()
        Walk.current.walk = self
        torch.set_num_threads(self._threads)  # a new thread has the machine's default
        try:
            if not self._stopped:
                with torch.no_grad():
                    self._run()
        except _Stop:
            pass
        except BaseException as error:
            self._error = error
        finally:
            self.ended = True
            self._our_turn.release()


@contextmanager
def going(walks: Sequence[tuple[Walk, Walk]]) -> Iterator[None]:
    """All passes at their first layer; none is left running."""
    try:
        for pair in walks:
            for one in pair:
                one.go_on()
        yield
    finally:
        for pair in walks:
            for one in pair:
                one.stop()
