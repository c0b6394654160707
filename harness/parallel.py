"""Several processes that share the steps of a run, one a card: torchrun starts them, torch.distributed is the engine.

Whenever they meet, they first share Python objects. Who cannot go on shares the reason instead: so all hear of it at one moment,
nobody is waited for in vain, and all together they can still save. Who dies without a word breaks the connections, which the
others notice. Python objects go through gloo, tensors through gloo on CPUs and NCCL on cards.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

import gpu
from data_types import Alone
from harness.plan import TRANSIT

TIMEOUT = timedelta(minutes=30)  # longer than one process may wait for another's longest answer
LOOK, PATIENCE = (
    1.0,
    3.0,
)  # seconds: between two looks at whether another process has left; in which the living report


class Parting(Exception):
    """Raised where processes meet: they cannot go on together, for this reason. Empty where another process tells it."""

    def __init__(self, reason: str, code: int, can_meet: bool):
        super().__init__(reason, code, can_meet)  # all of it, or it could not be shared
        self.reason, self.code, self.can_meet = (
            reason,
            code,
            can_meet,
        )  # to exit with; whether all are still there, at one place


class Processes(Alone):
    """All of them, by the environment that torchrun sets."""

    def __init__(self):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        kept, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun's static rendezvous keeps the store, with all that was said there, when it starts the processes again.
        self.store = (
            dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], kept)
            if kept.check(["begun"])
            else kept
        )
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
            gpu.prepare_process()
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group(
            backend, store=self.store, rank=self.rank, world_size=self.size, timeout=TIMEOUT
        )
        kept.set("begun", "")
        self._looked = time.monotonic()

    def share(self, items: list) -> list:
        """Raises Parting where a process shares the reason why it cannot go on, or can no longer be met."""
        return [item for theirs in self._meet(items) for item in theirs]

    def leave(self, message: str, code: int) -> None:
        """Tell the others why this process cannot go on, at their next meeting, and hasten it. Raises Parting."""
        with self._unbroken():
            self.store.set("leaving", "")
        self._meet(Parting(f"rank {self.rank}: {message}" if message else "", code, can_meet=True))

    def check(self) -> None:
        """To be called often, between meetings: come to the next one at once if another process is leaving. Raises Parting."""
        if time.monotonic() - self._looked < LOOK:
            return
        self._looked = time.monotonic()
        with self._unbroken():
            leaving = self.store.check(["leaving"])
        if leaving:
            self._meet([])

    def reduce_scatter(self, flat: Tensor, parts: list[slice]) -> Tensor:
        """Summed in float32, whatever the tensor's type: in bf16 each addition would round, once for every process.

        The sum is rounded once, as a process rounds what a row of its own adds.
        """
        theirs_RW = flat.new_zeros((self.size, self._width(parts)), dtype=torch.float32)
        sum_W = torch.empty_like(theirs_RW[0])
        self.share([])
        for pieces in self._pieces(flat, parts):
            for theirs_W, piece in zip(theirs_RW, pieces, strict=True):
                theirs_W[: len(piece)] = piece
            with self._unbroken():
                dist.reduce_scatter_tensor(sum_W, theirs_RW.view(-1))
            pieces[self.rank].copy_(sum_W[: len(pieces[self.rank])])
        return flat[parts[self.rank]]

    def all_gather(self, flat: Tensor, parts: list[slice]) -> None:
        theirs_RW = flat.new_zeros((self.size, self._width(parts)))
        own_W = torch.zeros_like(theirs_RW[0])
        self.share([])
        for pieces in self._pieces(flat, parts):
            own_W[: len(pieces[self.rank])] = pieces[self.rank]
            with self._unbroken():
                dist.all_gather_into_tensor(theirs_RW.view(-1), own_W)
            for theirs_W, piece in zip(theirs_RW, pieces, strict=True):
                piece.copy_(theirs_W[: len(piece)])

    def close(self) -> None:
        dist.destroy_process_group()

    def _width(self, parts: list[slice]) -> int:
        return min(TRANSIT // self.size, parts[0].stop)

    def _pieces(self, flat: Tensor, parts: list[slice]) -> Iterator[list[Tensor]]:
        """The first piece of everybody's part, the second, and so on; the last parts may be shorter than the first."""
        width = self._width(parts)
        for start in range(0, parts[0].stop, width):
            yield [flat[part][start : start + width] for part in parts]

    def _meet(self, mine: list | Parting) -> list[list]:
        everybodys = [None] * self.size
        with self._unbroken():
            dist.all_gather_object(everybodys, mine)
        if partings := [theirs for theirs in everybodys if isinstance(theirs, Parting)]:
            raise min(
                partings, key=lambda parting: parting.code >= 128
            )  # a fault before a signal, and then the first rank's
        return everybodys

    @contextmanager
    def _unbroken(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what torch.distributed raises is one
            raise Parting(self._explain(error), 1, can_meet=False) from error

    def _explain(self, error: RuntimeError) -> str:
        """Find out who is missing: the living report, and one of them tells."""
        try:
            self.store.set(f"alive/{self.rank}", "")
            time.sleep(PATIENCE)
            missing = [
                str(rank) for rank in range(self.size) if not self.store.check([f"alive/{rank}"])
            ]
            if self.store.add("told", 1) > 1:
                return ""
        except RuntimeError:  # the store is where the launcher is
            return f"error: rank {self.rank}: the launcher is gone"
        if missing:
            return f"error: rank {', '.join(missing)} died without a word: killed, or out of memory"
        return f"error: rank {self.rank}: the connection to the others broke ({str(error).splitlines()[0]})"
