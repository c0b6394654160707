"""What only a GPU needs: CUDA graphs of decode steps, and streamed optimizer state."""

import contextlib
import gc
import os
import warnings
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

import psutil
import torch
from torch import Tensor

if TYPE_CHECKING:
    from generate import Decoder

CHECK_INTERVAL = 8  # decode steps between two checks for answers that have ended
GRAPHS_KEPT = 4  # recorded decode steps; each takes up driver memory
IN_TRANSIT = 3  # pieces of streamed state on the GPU: one arrives, one is updated, one leaves


def prepare_process() -> None:
    """Set how PyTorch allocates memory and rounds products. Call it before CUDA is initialised."""
    # Let the memory pool grow in place: the large blocks of the update do not fit into the holes
    # that a rollout leaves behind. A setting of the user has priority.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"
    # Otherwise products of few rows may add up partial sums in bf16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


def free_bytes(device: torch.device) -> int:
    """Free memory of the GPU, including PyTorch's own pool; for a CPU, of the machine."""
    if device.type == "cuda":
        pooled = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + pooled
    return psutil.virtual_memory().available


def round_up_slots(slots: int) -> int:
    """Round a number of slots up to one of a few sizes, so that few graphs are recorded."""
    for size in (8, 16, 32):
        if slots <= size:
            return size
    return -(-slots // 32) * 32


class GraphedStep:
    """Decoder.step as a CUDA graph: one launch instead of about a thousand.

    A graph is bound to one shape: a number of slots and a number of cached columns. The first step
    of a new shape runs eagerly, which also lets libraries load and allocate; the second is
    recorded; all later ones replay the recording. Answers grow, so a rollout rarely returns to an
    old shape, and only the last few recordings are kept. They are freed with the rollout, before
    the update needs the memory.
    """

    works = True  # False once a recording has failed in this process

    def __init__(self):
        self.graphs: dict[tuple[int, int], torch.cuda.CUDAGraph | None] = {}
        self.pool = torch.cuda.graph_pool_handle()

    def step(self, decoder: "Decoder", slots: int) -> None:
        shape = slots, decoder.cache.columns(1)
        seen = shape in self.graphs
        graph = self.graphs.pop(shape, None)
        if graph is None and seen and self.works:
            graph = self._record(decoder, slots)
        if graph is None:
            decoder.step(slots)
        else:
            graph.replay()
            decoder.cache.longest += 1
        self.graphs[shape] = graph  # the most recently used shape is the last
        if len(self.graphs) > GRAPHS_KEPT:
            del self.graphs[next(iter(self.graphs))]

    def _record(self, decoder: "Decoder", slots: int) -> torch.cuda.CUDAGraph | None:
        """Record a step without running it. Returns None, with nothing changed, if that fails."""
        graph, longest = torch.cuda.CUDAGraph(), decoder.cache.longest
        collects_garbage = gc.isenabled()
        gc.disable()  # a destructor that calls the driver would spoil the recording
        try:
            # The outer context restores the stream even if the inner one fails to end the
            # recording.
            stream = torch.cuda.stream(torch.cuda.current_stream())
            with stream, torch.cuda.graph(graph, pool=self.pool):
                decoder.step(slots)
        except RuntimeError as error:
            GraphedStep.works = False
            self.graphs.clear()
            self._leave_capture_state()
            reason = str(error.__context__ or error).splitlines()[0]
            warnings.warn(
                f"a decode step cannot be recorded as a CUDA graph ({reason}); the results stay "
                "the same, but sampling is slower. If memory is short, lower model.memory_gib",
                stacklevel=2,
            )
            return None
        finally:
            decoder.cache.longest = longest
            if collects_garbage:
                gc.enable()
        return graph

    def _leave_capture_state(self) -> None:
        """Tell the allocator that the recording has ended.

        Up to PyTorch 2.11 a recording that fails at its end leaves the allocator in its capture
        state, and the next attempt to free memory would fail an internal assertion.
        """
        device = torch.cuda.current_device()
        for leave in (torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool):
            with contextlib.suppress(RuntimeError):  # newer versions have done it already
                leave(device, self.pool)


class StreamedState:
    """Tensors in page-locked CPU memory that pass through the GPU piece by piece.

    While one piece is updated, the next arrives and the previous one leaves, on separate streams.
    """

    def __init__(self, tensors: list[Tensor], device: torch.device):
        """Raises OSError if the memory cannot be page-locked."""
        self.tensors, self.device = tensors, device
        self.up, self.down = torch.cuda.Stream(device), torch.cuda.Stream(device)
        for tensor in tensors:
            page_lock(tensor)

    def pieces(self, slices: list[slice]) -> Iterator[list[Tensor]]:
        """Yield each slice of the tensors, on the GPU. No slice may be longer than the first.

        The caller updates a piece in place before it asks for the next.
        """
        compute = torch.cuda.current_stream(self.device)
        up, down = self.up, self.down
        buffers = [
            [torch.empty_like(tensor[slices[0]], device=self.device) for tensor in self.tensors]
            for _ in range(IN_TRANSIT)
        ]
        up.wait_stream(compute)  # earlier kernels may still be using this memory
        written = []  # per piece: the event after which its buffer is free again

        def fetch(i: int) -> tuple[list[Tensor], torch.cuda.Event]:
            length = slices[i].stop - slices[i].start
            piece = [buffer[:length] for buffer in buffers[i % IN_TRANSIT]]
            if i >= IN_TRANSIT:
                up.wait_event(written[i - IN_TRANSIT])
            with torch.cuda.stream(up):
                for on_card, tensor in zip(piece, self.tensors, strict=True):
                    on_card.copy_(tensor[slices[i]], non_blocking=True)
                return piece, up.record_event()

        following = fetch(0)
        for i, where in enumerate(slices):
            piece, arrived = following
            if i + 1 < len(slices):
                following = fetch(i + 1)
            compute.wait_event(arrived)
            yield piece
            down.wait_event(compute.record_event())
            with torch.cuda.stream(down):
                for on_card, tensor in zip(piece, self.tensors, strict=True):
                    tensor[where].copy_(on_card, non_blocking=True)
                written.append(down.record_event())
        down.synchronize()


def page_lock(tensor: Tensor) -> None:
    """Page-lock memory in place; torch's pinned allocations are rounded up to a power of two.

    Raises OSError if the memory cannot be locked.
    """
    error = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(error) != 0:
        raise OSError(
            f"{tensor.nbytes:,} bytes of CPU memory could not be page-locked ({error}); free some "
            "memory, raise `ulimit -l`, or set optimizer.offload=false"
        )
    weakref.finalize(tensor, torch.cuda.cudart().cudaHostUnregister, tensor.data_ptr())
