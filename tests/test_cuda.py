"""CUDA graphs and streams, emulated on a CPU: recorded operators that run later.

A recorded operator has no effect until it is replayed, on the tensors it was recorded with. Whether
CUDA's own kernels are right is for `pytest -m gpu` on a card.
"""

import gc
import itertools
import os
import random
import subprocess
import sys
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from helpers import random_model, random_tokens
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import gpu
import optimizer as optimizer_module
from generate import Decoder, SamplingParams, generate
from gpu import CHECK_INTERVAL, GRAPHS_KEPT, GraphedStep, StreamedState, round_up_slots
from harness import cuda
from harness.config import load_config
from harness.plan import GIB, find_shape, make_plan
from optimizer import AdamW
from qwen2_model import KVCache

# Two threads would take longer to wait for each other than such small operators take to run.
pytestmark = pytest.mark.usefixtures("one_thread")

# Operators that make the host wait for the device, or that copy host memory to it.
HOST_READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "allclose", "nonzero"}
HOST_READS |= {"masked_select", "unique", "_unique2", "repeat_interleave", "lift_fresh"}
HOST_READS |= {"resolve_conj"}  # tolist() and numpy() call it


def tensors_in(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def reads_host(func, args) -> bool:
    name = func.overloadpacket.__name__
    by_mask = any(index.dtype == torch.bool for index in tensors_in(args[1:2]))
    return name in HOST_READS or (name in ("index", "index_put_") and by_mask)


class Operator:
    """An operator and the tensors it was called with. They only change when it runs."""

    def __init__(self, func, args, kwargs):
        self.func, self.args, self.kwargs = func, args, kwargs
        storages = [tensor.untyped_storage() for tensor in tensors_in((args, kwargs))]
        before = [storage.clone() for storage in storages]
        self.outputs = func(*args, **kwargs)
        for storage, old in zip(storages, before, strict=True):
            storage.copy_(old)
        known = {storage.data_ptr() for storage in storages}
        self.allocated = [
            tensor
            for tensor in tensors_in(self.outputs)
            if tensor.untyped_storage().data_ptr() not in known
        ]

    def run(self):
        new_outputs = tensors_in(self.func(*self.args, **self.kwargs))
        for output, new in zip(tensors_in(self.outputs), new_outputs, strict=True):
            if output.data_ptr() != new.data_ptr():
                output.copy_(new)


class Recording(TorchDispatchMode):
    def __init__(self, record):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.record(func, args, kwargs or {})


# ---------------------------------------------------------------- the decode step as a graph


class EmulatedGraph:
    """Stands in for torch.cuda.CUDAGraph."""

    alive: weakref.WeakSet
    replays = 0

    def __init__(self):
        self.operators = []
        EmulatedGraph.alive.add(self)

    def record(self, func, args, kwargs):
        if reads_host(func, args):
            raise RuntimeError(f"{func} is not permitted when a stream is recorded")
        self.operators.append(Operator(func, args, kwargs))
        return self.operators[-1].outputs

    def replay(self):
        EmulatedGraph.replays += 1
        for operator in self.operators:
            operator.run()
        # Between two replays other graphs overwrite the memory that this one allocated.
        for tensor in itertools.chain.from_iterable(o.allocated for o in self.operators):
            tensor.fill_(torch.nan if tensor.is_floating_point() else 1)


@contextmanager
def record_graph(graph, pool):
    assert not gc.isenabled(), "a destructor may run while a graph is recorded"
    with Recording(graph.record):
        yield


class SetOnCuda:
    """An attribute that has the value it gets on CUDA, whatever the Decoder assigns."""

    def __init__(self, name, make):
        self.name, self.make = name, make

    def __set__(self, decoder, value):
        vars(decoder)[self.name] = self.make()


@pytest.fixture
def emulated_cuda(monkeypatch):
    """Call it to make Decoders work as on CUDA, with emulated graphs."""
    EmulatedGraph.alive, EmulatedGraph.replays = weakref.WeakSet(), 0

    def start():
        monkeypatch.setattr(torch.cuda, "CUDAGraph", EmulatedGraph)
        monkeypatch.setattr(torch.cuda, "graph", record_graph)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: None)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
        monkeypatch.setattr(GraphedStep, "works", True)
        for name, make in (("interval", lambda: CHECK_INTERVAL), ("graphs", GraphedStep)):
            monkeypatch.setattr(Decoder, name, SetOnCuda(name, make), raising=False)

    return start


PROMPTS = [
    random_tokens(n, seed=n).tolist() for n in (5, 1, 59, 17, 2)
]  # answers grow past KEY_BLOCK = 64
MAX_GEN_LEN = 23


def sample(slots=15, stop_ids=(7, 31, 40, 50, 60)):
    model = random_model()
    token_bytes = KVCache.bytes_per_token(model.config, torch.float32)
    completions = generate(
        model,
        PROMPTS,
        SamplingParams(MAX_GEN_LEN, 0.7, 89, frozenset(stop_ids)),
        num_answers=3,
        generator=torch.Generator().manual_seed(0),
        cache_bytes=slots * token_bytes * (59 + MAX_GEN_LEN),
    )
    return [completion.token_ids for completion in completions]


def test_the_least_recently_used_graph_is_dropped(emulated_cuda):
    # Catches: `self.graphs.pop(shape, None)` -> `self.graphs.get(shape)`.
    emulated_cuda()
    cache = SimpleNamespace(columns=lambda num_tokens: 64, longest=0)
    decoder, graphs = SimpleNamespace(cache=cache, step=lambda slots: None), GraphedStep()
    for slots in (8, 16, 32, 64, 8, 96):
        graphs.step(decoder, slots)
    assert [slots for slots, _ in graphs.graphs] == [32, 64, 8, 96]


@pytest.mark.parametrize("slots", [3, 6, 15])
def test_replayed_steps_sample_what_direct_steps_do(slots, emulated_cuda, monkeypatch):
    # Catches: a host read in the step (`if active_R.any():`); an address that changes between two
    # replays (`self.lengths_A = self.lengths_A.index_put(…)`); the cache's length not advanced at a
    # replay, or not taken back after recording; gc.disable() dropped.
    wanted, graphed_step, num_steps = sample(slots), GraphedStep.step, 0

    def step(self, decoder, slots):
        nonlocal num_steps
        num_steps, before = num_steps + 1, decoder.cache.longest
        graphed_step(self, decoder, slots)
        assert decoder.cache.longest == before + 1

    emulated_cuda()
    monkeypatch.setattr(GraphedStep, "step", step)
    assert sample(slots) == wanted
    assert EmulatedGraph.replays > num_steps / 2
    assert gc.isenabled()


def test_only_the_last_few_graphs_are_kept(emulated_cuda, monkeypatch):
    # Catches: `del self.graphs[…]` dropped; graphs that outlive the rollout.
    emulated_cuda()
    monkeypatch.setattr("qwen2_model.KEY_BLOCK", 4)  # a new shape every four steps
    alive, direct_step = [], Decoder.step

    def step(self, slots):
        alive.append(len(EmulatedGraph.alive))
        direct_step(self, slots)

    monkeypatch.setattr(Decoder, "step", step)
    sample(stop_ids=())
    assert max(alive) == GRAPHS_KEPT
    assert len(alive) > 2 * GRAPHS_KEPT
    assert not EmulatedGraph.alive


def test_a_step_that_cannot_be_recorded_runs_directly_after_one_warning(emulated_cuda, monkeypatch):
    # Catches: the exception not caught; the cache's length not taken back; the garbage collector
    # left off; a warning for every shape; an allocator that is left in its capture state.
    wanted = sample()
    emulated_cuda()
    left = []

    def leave(name):
        def function(device, pool):
            left.append(name)
            raise RuntimeError("the pool is not in use")  # as versions that have left it already

        return function

    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, leave(name), raising=False)

    @contextmanager
    def full(graph, pool):
        with Recording(graph.record):
            yield
        raise torch.OutOfMemoryError("CUDA error: out of memory")

    monkeypatch.setattr(torch.cuda, "graph", full)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert sample() == wanted
        assert sample() == wanted
    (message,) = [str(warning.message) for warning in caught]
    assert "CUDA error: out of memory" in message
    assert "model.memory_gib" in message
    assert gc.isenabled()
    assert left == ["_cuda_endAllocateToPool", "_cuda_releasePool"]


def test_slots_are_rounded_up_to_a_few_sizes():
    rounded = {slots: round_up_slots(slots) for slots in range(1, 257)}
    assert all(rounded[slots] >= slots for slots in rounded)
    assert set(rounded.values()) == {8, 16, *range(32, 257, 32)}


# ---------------------------------------------------------------- the optimizer's streams


class EmulatedStream:
    """Work to be done in order; an event is an item of it."""

    def __init__(self, device):
        self.device, self.work = device, []
        device.streams.append(self)

    def record_event(self):
        self.work.append(SimpleNamespace(happened=False))
        return self.work[-1]

    def wait_event(self, event):
        self.work.append(lambda: event.happened)

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        self.device.run_until_done(self)


class EmulatedDevice:
    """Streams do nothing until the host has to wait; then `choose` says which runs next."""

    def __init__(self, choose):
        self.choose, self.streams = choose, []
        self.compute, self.up, self.down = (EmulatedStream(self) for _ in range(3))
        self.current = self.compute

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def record(self, func, args, kwargs):
        if reads_host(func, args):
            self.run_until_done(self.compute)
            return func(*args, **kwargs)
        self.current.work.append(Operator(func, args, kwargs))
        return self.current.work[-1].outputs

    def run_until_done(self, stream):
        while stream.work:
            ready = [s for s in self.streams if s.work and (not callable(s.work[0]) or s.work[0]())]
            assert ready, "the streams wait for each other"
            item = self.choose(self, ready).work.pop(0)
            if isinstance(item, Operator):
                with _disable_current_modes():
                    item.run()
            elif not callable(item):
                item.happened = True


def by_priority(*priorities):
    return lambda device, ready: min(ready, key=lambda s: priorities[device.streams.index(s)])


def at_random(seed):
    rng = random.Random(seed)
    return lambda device, ready: rng.choice(ready)


ORDERS = [by_priority(*order) for order in itertools.permutations(range(3))]
ORDERS += [at_random(seed) for seed in range(3)]


@pytest.mark.parametrize("choose", ORDERS)
def test_streamed_state_gives_the_same_step_in_every_order(choose, monkeypatch):
    # Catches: each of the waits left out (`up.wait_event`, `compute.wait_event`, `down.wait_event`,
    # `down.synchronize`), by at least one order; a buffer reused one piece early.
    monkeypatch.setitem(optimizer_module.PIECE, "cpu", 50)  # five pieces, the last one shorter
    device = EmulatedDevice(choose)
    streams = iter((device.up, device.down))
    monkeypatch.setattr(torch.cuda, "Stream", lambda of: next(streams))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of=None: device.compute)
    monkeypatch.setattr(torch.cuda, "stream", device.stream)
    monkeypatch.setattr(gpu, "page_lock", lambda tensor: None)

    generator = torch.Generator().manual_seed(0)
    start, *gradients = torch.randn(3, 233, generator=generator).bfloat16()
    resident, streamed = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    settings = {"lr": 1e-2, "weight_decay": 0.1}
    wanted, got = AdamW([resident], **settings), AdamW([streamed], **settings)
    got.streamed = StreamedState(list(got.state.values()), torch.device("cpu"))
    for gradient in gradients:
        resident.grad, streamed.grad = gradient.clone(), gradient.clone()
        wanted.step()
        with Recording(device.record):
            got.step()
        assert got.weights_changed == wanted.weights_changed > 0
    assert torch.equal(streamed, resident)
    for name, tensor in wanted.state.items():
        assert torch.equal(got.state[name], tensor), name


# ---------------------------------------------------------------- memory


def test_memory_that_cannot_be_page_locked_is_a_user_error(monkeypatch):
    # Catches: RuntimeError, which is shown as a bug, with a traceback.
    cudart = SimpleNamespace(cudaHostRegister=lambda *args: 2)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    with pytest.raises(OSError, match=r"28 bytes.*ulimit -l.*optimizer\.offload=false"):
        gpu.page_lock(torch.zeros(7))


NAMES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


@pytest.mark.parametrize("name", NAMES)
def test_allocator_settings_of_the_user_are_kept(name, monkeypatch):
    # Catches: only one of the two names looked at.
    for known in NAMES:
        monkeypatch.delenv(known, raising=False)
    monkeypatch.setenv(name, "max_split_size_mb:64")
    gpu.prepare_process()
    assert {n: os.environ[n] for n in NAMES if n in os.environ} == {name: "max_split_size_mb:64"}


@pytest.mark.skipif(
    not hasattr(torch._C, "_accelerator_getAllocatorSettings"),
    reason="this PyTorch does not tell its settings",
)
def test_the_allocator_setting_reaches_pytorch_after_its_import():
    # Catches: `expandable_segment:True`, which PyTorch refuses.
    source = "import torch, gpu; gpu.prepare_process(); "
    source += "print(torch._C._accelerator_getAllocatorSettings())"
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    result = subprocess.run(
        [sys.executable, "-c", source], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "expandable_segments:True"


def test_cudnn_attention_is_off_and_bf16_sums_are_float32():
    # Catches: either setting dropped. cuDNN would build a plan for every new shape.
    source = "import torch, evaluate, gpu; gpu.prepare_process(); "
    source += "print(torch.backends.cuda.cudnn_sdp_enabled(), "
    source += "torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)"
    result = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False False"


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (torch.OutOfMemoryError("anything"), True),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"), True),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), True),
        (RuntimeError("unable to mmap 988097824 bytes from file <a>: Cannot allocate"), True),
        (MemoryError(), True),
        (RuntimeError("size mismatch"), False),
        (ValueError("not enough memory"), False),
        (None, False),
    ],
)
def test_out_of_memory_errors_are_recognised(error, wanted):
    assert cuda.is_out_of_memory(error) is wanted


# ---------------------------------------------------------------- what the card lacks


@pytest.fixture
def a40(monkeypatch):
    """What PyTorch reports of an A40 with 44 GiB free, in a machine with 60 GiB free."""
    free = {"cuda": 44 * GIB, "cpu": 60 * GIB}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A40")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 6))
    monkeypatch.setattr(cuda, "free_bytes", lambda device: free[device.type])
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return free


def check(*overrides):
    config = load_config("config_24GB.yaml", ["model.memory_gib=22.5", *overrides])
    cuda.check_cuda(config, make_plan(config, find_shape("Qwen2.5-3B")))


def test_a_card_is_refused_for_what_it_lacks(a40, monkeypatch):
    # Catches: `< (8, 0)` -> `<= (8, 6)`; the card's memory compared with the rollout alone; the
    # ranks of this machine not counted.
    check()
    a40["cuda"] = 21 * GIB
    with pytest.raises(ValueError, match=r"takes 21\.\d GiB.* 21\.0 GiB of the NVIDIA A40 is"):
        check()
    a40["cuda"] = 44 * GIB
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    with pytest.raises(ValueError, match=r"pins 86\.2 GiB .* 60\.0 GiB is .*offload=false"):
        check()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(ValueError, match=r"bfloat16 needs .* 8\.0 .* A40 has 7\.5; set .*float32"):
        check()


@pytest.mark.parametrize(
    ("said", "reason", "way_out"),
    [
        (
            "The NVIDIA driver on your system is too old (found version 12020). Please update your",
            "The NVIDIA driver on your system is too old (found version 12020)",
            "update the driver",
        ),
        ("No CUDA GPUs are available", "No CUDA GPUs are available", "model.device=cpu"),
    ],
)
def test_pytorch_says_why_there_is_no_cuda(said, reason, way_out, monkeypatch):
    def init():
        raise RuntimeError(said)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    line = cuda.why_no_cuda()
    assert f"{reason}; " in line
    assert way_out in line
    assert "\n" not in line
