"""What exists only for a card: a decode step recorded as a CUDA graph, and state that is streamed through the card's memory."""

import gc
import os
import warnings
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

CHECK_INTERVAL = (
    8  # decode steps between two looks at which answers have ended: a look waits for the device
)
GRAPHS_KEPT = 4  # recordings of a decode step at once; each takes driver memory
IN_TRANSIT = (
    3  # pieces of a streamed state on the card at once: one fetched, one computed, one written back
)


def prepare_process() -> None:
    """Let what PyTorch takes of the card grow in place: the update's large blocks do not fit into the holes that a rollout
    leaves. To be called before CUDA starts; who has set something keeps it.
    """
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def free_bytes(device: torch.device) -> int:
    """What is free on the card, with what PyTorch keeps for later; for a CPU, of the machine's memory."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    with open("/proc/meminfo") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith("MemAvailable"))


def row_bucket(rows: int) -> int:
    """So many slots are decoded for `rows` in use: few numbers, so that few graphs are recorded."""
    return next((bucket for bucket in (8, 16, 32) if rows <= bucket), -(-rows // 32) * 32)


class GraphedStep:
    """The decode step of generate.Decoder as a CUDA graph: one launch instead of some thousand.

    A graph is bound to one number of rows and of cached columns. The first step of a new shape runs as it is, which also
    lets the libraries load and allocate what they need; the second is recorded; from then on the recording is replayed.
    Rows end and answers grow, so a rollout hardly comes back to a shape: the last few recordings are kept. They die with
    the rollout, because the update has no memory to spare for them; what is recorded again is some thirty steps.
    """

    works = True  # until this process has seen a recording fail

    def __init__(self):
        self.graphs, self.pool = (
            {},
            torch.cuda.graph_pool_handle(),
        )  # the graphs by shape, the latest used last

    def __call__(self, decoder, rows: int) -> None:
        shape = rows, decoder.cache.columns(1)
        is_new, graph = shape not in self.graphs, self.graphs.pop(shape, None)
        if self.works and graph is None and not is_new:
            graph = self._record(decoder, rows)
        if graph is None:
            decoder._step(rows)
        else:
            graph.replay()
            decoder.cache.span += 1
        self.graphs[shape] = graph
        if len(self.graphs) > GRAPHS_KEPT:
            del self.graphs[next(iter(self.graphs))]

    def _record(self, decoder, rows: int) -> torch.cuda.CUDAGraph | None:
        """Record a step without running it. None if that fails; nothing has changed then."""
        graph, span, collects = torch.cuda.CUDAGraph(), decoder.cache.span, gc.isenabled()
        gc.disable()  # the destructor of something that touches the driver would spoil the recording
        try:
            # The outer context gives the stream back even where the inner one fails to end the recording.
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self.pool),
            ):
                decoder._step(rows)
        except RuntimeError as error:
            GraphedStep.works = False
            self.graphs.clear()
            reason = str(error.__context__ or error).splitlines()[0]
            warnings.warn(
                f"a decode step cannot be recorded as a CUDA graph ({reason}); answers stay the same, but sampling is "
                "slower from now on. Where memory is short, lower model.memory_gib",
                stacklevel=2,
            )
            return None
        finally:
            decoder.cache.span = span
            if collects:
                gc.enable()
        return graph


class StreamedState:
    """Tensors that live in page-locked CPU memory and pass through the card piece by piece: one is fetched and one written
    back while another is computed, each on a stream of its own.
    """

    def __init__(self, tensors: list[Tensor], device: torch.device):
        """Raises OSError if the memory cannot be locked."""
        self.tensors, self.device = tensors, device
        self.up, self.down = torch.cuda.Stream(device), torch.cuda.Stream(device)
        for tensor in tensors:
            page_lock(tensor)

    def pieces(self, places: list[slice]) -> Iterator[list[Tensor]]:
        """The tensors at each place (the first is the longest), on the card, to be overwritten before the next is asked for."""
        compute, up, down = torch.cuda.current_stream(self.device), self.up, self.down
        sets = [
            [torch.empty_like(tensor[places[0]], device=self.device) for tensor in self.tensors]
            for _ in range(IN_TRANSIT)
        ]
        up.wait_stream(compute)  # whoever had this memory before may still be at work in it
        written = []  # the event after which a piece is home again, and what held it is free

        def fetch(i):
            held = [tensor[: places[i].stop - places[i].start] for tensor in sets[i % IN_TRANSIT]]
            if i >= IN_TRANSIT:
                up.wait_event(written[i - IN_TRANSIT])
            with torch.cuda.stream(up):
                for tensor, home in zip(held, self.tensors, strict=True):
                    tensor.copy_(home[places[i]], non_blocking=True)
                return held, up.record_event()

        ahead = fetch(0)
        for i, place in enumerate(places):
            piece, arrived = ahead
            if i + 1 < len(places):
                ahead = fetch(i + 1)
            compute.wait_event(arrived)
            yield piece
            down.wait_event(compute.record_event())
            with torch.cuda.stream(down):
                for tensor, home in zip(piece, self.tensors, strict=True):
                    home[place].copy_(tensor, non_blocking=True)
                written.append(down.record_event())
        down.synchronize()


def page_lock(tensor: Tensor) -> None:
    """Lock memory where it lies: PyTorch's own pinned allocations are rounded up to a power of two. Raises OSError."""
    error = torch.cuda.cudart().cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 0)
    if int(error) != 0:
        raise OSError(
            f"{tensor.nbytes:,} bytes of CPU memory could not be page-locked ({error}); free memory, raise "
            "`ulimit -l`, or set optimizer.offload=false"
        )
    weakref.finalize(tensor, torch.cuda.cudart().cudaHostUnregister, tensor.data_ptr())
