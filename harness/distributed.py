"""Several processes (ranks) that share the steps of a run, one per GPU.

torchrun starts the ranks and sets the environment variables read here. At every collective the
ranks first exchange Python objects. A failing rank sends a RankFailure in place of data, so all
ranks raise it at the same point. If a rank crashes, its connections close and the other ranks get
an error. Python objects travel over gloo; tensors over gloo on CPUs and over NCCL on GPUs.
"""

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import gpu
from data_types import SingleProcess
from harness.cuda import is_out_of_memory
from harness.plan import TRANSIT

TIMEOUT = timedelta(minutes=30)  # the longest that one rank waits for another
POLL_SECONDS = 1.0  # how often a rank checks whether another one has failed
REPORT_SECONDS = 3.0  # after a broken connection: how long ranks have to report in


class RankFailure(Exception):
    """A rank failed or was interrupted. All ranks raise this at the same point."""

    def __init__(self, reason: str, exit_code: int):
        super().__init__(reason, exit_code)  # both arguments, or pickle could not restore it
        self.reason, self.exit_code = reason, exit_code

    def __str__(self) -> str:
        return self.reason

    @property
    def is_signal(self) -> bool:
        return self.exit_code > 128


class RankLost(RankFailure):
    """A rank cannot be reached. The reason is empty on all ranks but the one that reports it."""


class Torchrun(SingleProcess):
    """The ranks that torchrun started. Only check() and fail() may be called by one rank alone."""

    def __init__(self):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store, _, _ = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # When torchrun restarts the ranks, its static rendezvous keeps the store with old entries.
        self.store = store
        if store.check(["started"]):
            self.store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
        backend = "gloo"
        if torch.cuda.is_available():
            backend = "cpu:gloo,cuda:nccl"
            gpu.prepare_process()
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
        dist.init_process_group(
            backend, store=self.store, rank=self.rank, world_size=self.size, timeout=TIMEOUT
        )
        store.set("started", "")
        self._last_poll = time.monotonic()

    def all_gather_objects(self, item: Any) -> list:
        """The items of all ranks, ordered by rank.

        Raises RankFailure, the same on all ranks, if one of them has failed. Errors come before
        signals, and lower ranks first.
        """
        items = [None] * self.size
        with self._connected():
            dist.all_gather_object(items, item)
        failures = [item for item in items if isinstance(item, RankFailure)]
        if failures:
            raise min(failures, key=lambda failure: failure.is_signal)
        return items

    def fail(self, reason: str, exit_code: int) -> None:
        """Tell the others at their next collective that this rank failed. Raises RankFailure."""
        with self._connected():
            self.store.set("failed", "")
        self.all_gather_objects(RankFailure(f"rank {self.rank}: {reason}", exit_code))

    def check(self) -> None:
        """Raise RankFailure if another rank has failed. Call it often between collectives."""
        if time.monotonic() - self._last_poll < POLL_SECONDS:
            return
        self._last_poll = time.monotonic()
        with self._connected():
            failed = self.store.check(["failed"])
        if failed:
            self.all_gather_objects(None)

    def reduce_scatter(self, flat: Tensor, shards: list[slice]) -> Tensor:
        """Sum in float32, whatever the dtype: in bf16, adding each rank's share would round."""
        buffer_RW = flat.new_zeros((self.size, self._width(shards)), dtype=torch.float32)
        sum_W = torch.empty_like(buffer_RW[0])
        self.all_gather_objects(None)
        with self._connected():
            for pieces in self._pieces(flat, shards):
                for row_W, piece in zip(buffer_RW, pieces, strict=True):
                    row_W[: len(piece)] = piece
                dist.reduce_scatter_tensor(sum_W, buffer_RW.view(-1))
                local_piece = pieces[self.rank]
                local_piece.copy_(sum_W[: len(local_piece)])
        return flat[shards[self.rank]]

    def all_gather(self, flat: Tensor, shards: list[slice]) -> None:
        buffer_RW = flat.new_zeros((self.size, self._width(shards)))
        local_W = torch.zeros_like(buffer_RW[0])
        self.all_gather_objects(None)
        with self._connected():
            for pieces in self._pieces(flat, shards):
                local_W[: len(pieces[self.rank])] = pieces[self.rank]
                dist.all_gather_into_tensor(buffer_RW.view(-1), local_W)
                for row_W, piece in zip(buffer_RW, pieces, strict=True):
                    piece.copy_(row_W[: len(piece)])

    def close(self) -> None:
        dist.destroy_process_group()

    def _width(self, shards: list[slice]) -> int:
        return min(TRANSIT // self.size, shards[0].stop)

    def _pieces(self, flat: Tensor, shards: list[slice]) -> Iterator[list[Tensor]]:
        """One piece of every shard at a time. The last shards' pieces may be shorter, or empty."""
        width = self._width(shards)
        for start in range(0, shards[0].stop, width):
            yield [flat[shard][start : start + width] for shard in shards]

    @contextmanager
    def _connected(self) -> Iterator[None]:
        """Turn an error inside a collective into RankLost: the ranks cannot meet any more.

        The RuntimeError is that of torch.distributed for a lost rank, or the memory was full. In
        that case the others wait inside the collective, and would never hear of a failure.
        """
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            raise RankLost(self._explain(error), 1) from error

    def _explain(self, error: RuntimeError | MemoryError) -> str:
        """Find out which ranks are missing. One rank returns the message, the others ""."""
        try:
            if is_out_of_memory(error):
                self.store.add("explained", 1)
                cause = str(error).partition("\n")[0]
                return (
                    f"error: rank {self.rank} ran out of memory while it exchanged data with the "
                    f"others ({cause}); lower model.memory_gib for a smaller plan"
                )
            self.store.set(f"alive/{self.rank}", "")
            time.sleep(REPORT_SECONDS)
            missing = [
                str(rank) for rank in range(self.size) if not self.store.check([f"alive/{rank}"])
            ]
            if self.store.add("explained", 1) > 1:
                return ""
        except RuntimeError:  # the launcher holds the store
            return f"error: rank {self.rank}: the launcher is gone"
        if missing:
            ranks = ", ".join(missing)
            return f"error: rank {ranks} crashed or was killed, perhaps out of memory"
        cause = str(error).splitlines()[0]
        return f"error: rank {self.rank} lost its connection to the other ranks ({cause})"
