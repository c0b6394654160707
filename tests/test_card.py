"""What a card does, proven on a CPU: CUDA graphs and streams stand in as what they are, a record of operators that run later.

An operator that is recorded has no effect; it takes effect when it is replayed, on the very tensors it was recorded with.
Whether a card's own kernels are right is for `pytest -m gpu` and `train.py --check` on a card.
"""

import gc
import itertools
import json
import math
import random
import warnings
import weakref
from contextlib import contextmanager, nullcontext
from unittest.mock import MagicMock

import pytest
import torch
import torch.nn.functional as F
from helpers import episode, random_model
from test_generate import ROW_BYTES, assert_same_samples, run
from test_optimizer import SETTINGS, assert_equal, random_grads, random_params, take_steps
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import generate as module
import gpu
import grpo
import optimizer as optimizer_module
import train
from flat import allocate, flat_gradient, flat_weights, zero_gradient
from generate import Sampling
from gpu import GRAPHS_KEPT, StreamedState, row_bucket
from harness import check
from harness.config import load_config
from harness.made_up import AnyTokenizer, random_questions, random_reward
from harness.plan import PROMPT_TOKENS, find_shape, make_plan, step_kernels
from optimizer import AdamW
from packing import pack_rows
from qwen2_model import KVCache, Transformer

# What makes the host wait for the device, or hands the device memory that it cannot find again at a replay.
HOST_READS = {
    "_local_scalar_dense",
    "item",
    "is_nonzero",
    "equal",
    "allclose",
    "nonzero",
    "masked_select",
    "unique",
    "_unique2",
    "repeat_interleave",
    "lift_fresh",
    "resolve_conj",
}  # fmt: skip; the last is the operator that tolist() and numpy() call


# Operators as small as these wait longer for a second thread than they work.
pytestmark = pytest.mark.usefixtures("one_thread")


def reads_host(func, args) -> bool:
    by_mask = any(
        isinstance(a, torch.Tensor) and a.dtype == torch.bool for a in tree_leaves(args[1:2])
    )
    return func.overloadpacket.__name__ in HOST_READS or (
        func.overloadpacket.__name__ in ("index", "index_put_") and by_mask
    )


class Operator:
    """One operator with the tensors it was recorded with."""

    def __init__(self, func, args, kwargs):
        """Learns what comes out, and takes back what went into tensors that stand."""
        self.func, self.args, self.kwargs = func, args, kwargs
        formal = func._schema.arguments
        given = [
            *zip(formal, args, strict=False),
            *((a, kwargs[a.name]) for a in formal if a.name in kwargs),
        ]
        written = [
            t
            for a, value in given
            if a.alias_info and a.alias_info.is_write
            for t in tree_leaves(value)
        ]
        before = [t.clone() for t in written]
        self.out = func(*args, **kwargs)
        for tensor, old in zip(written, before, strict=True):
            tensor.copy_(old)

    def run(self):
        for tensor, new in zip(
            tree_leaves(self.out), tree_leaves(self.func(*self.args, **self.kwargs)), strict=True
        ):
            if (
                isinstance(new, torch.Tensor)
                and tensor.untyped_storage().data_ptr() != new.untyped_storage().data_ptr()
            ):
                tensor.copy_(new)


class Recording(TorchDispatchMode):
    def __init__(self, record):
        super().__init__()
        self.record = record

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.record(func, args, kwargs or {})


# ---------------------------------------------------------------- the decode step as a graph


class EmulatedGraph:
    """In the place of torch.cuda.CUDAGraph."""

    alive: weakref.WeakSet
    replays = 0

    def __init__(self):
        self.operators = []
        EmulatedGraph.alive.add(self)

    def record(self, func, args, kwargs):
        if reads_host(func, args):
            raise RuntimeError(f"{func} is not permitted when a stream is recorded")
        self.operators.append(Operator(func, args, kwargs))
        return self.operators[-1].out

    def replay(self):
        for operator in self.operators:
            operator.run()
        EmulatedGraph.replays += 1
        standing = {
            t.untyped_storage().data_ptr()
            for o in self.operators
            for t in tree_leaves((o.args, o.kwargs))
            if isinstance(t, torch.Tensor)
        } - {t.untyped_storage().data_ptr() for o in self.operators for t in made_by(o)}
        for tensor in itertools.chain.from_iterable(map(made_by, self.operators)):
            if tensor.untyped_storage().data_ptr() not in standing:
                tensor.fill_(
                    torch.nan if tensor.is_floating_point() else 1
                )  # the pool is everybody's between two replays


def made_by(operator: Operator) -> list[torch.Tensor]:
    """Tensors that the operator allocated."""
    taken = {
        t.untyped_storage().data_ptr()
        for t in tree_leaves((operator.args, operator.kwargs))
        if isinstance(t, torch.Tensor)
    }
    return [
        t
        for t in tree_leaves(operator.out)
        if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in taken
    ]


@contextmanager
def record_graph(graph, pool):
    assert not gc.isenabled(), "a destructor may run while a graph is recorded"
    with Recording(graph.record):
        yield


@pytest.fixture
def card(monkeypatch):
    """Decoders work as on CUDA, with emulated graphs."""
    EmulatedGraph.alive, EmulatedGraph.replays = weakref.WeakSet(), 0
    for name, stand_in in (
        ("CUDAGraph", EmulatedGraph),
        ("graph", record_graph),
        ("graph_pool_handle", object),
        ("current_stream", lambda device=None: None),
        ("stream", lambda stream: nullcontext()),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(gpu.GraphedStep, "works", True)
    fixed = {"interval": gpu.CHECK_INTERVAL, "round_up": staticmethod(row_bucket)}

    def __setattr__(self, name, value):
        object.__setattr__(
            self, name, gpu.GraphedStep() if name == "step" else fixed.get(name, value)
        )

    monkeypatch.setattr(
        module, "Decoder", type("OnCard", (module.Decoder,), {"__setattr__": __setattr__})
    )


@pytest.mark.parametrize("slots", [3, 6, 15])
def test_replayed_steps_draw_what_plain_ones_do(slots, card, monkeypatch):
    # Catches, seen: a host read in the step (`if active_R.any():`); an address that changes between record and replay
    # (`self.lengths_A = self.lengths_A.index_put((answers_R,), lengths_R + active_R)`); `span += 1` dropped at a replay;
    # `cache.span = span` dropped after recording; gc.disable() dropped.
    plain_step, plain = module.Decoder._step, []
    wanted = random_wanted(slots)
    monkeypatch.setattr(
        module.Decoder, "_step", lambda self, rows: (plain.append(rows), plain_step(self, rows))[1]
    )
    graphed_step = gpu.GraphedStep.__call__

    def count_columns(self, decoder, rows):
        before = decoder.cache.span
        graphed_step(self, decoder, rows)
        assert decoder.cache.span == before + 1

    monkeypatch.setattr(gpu.GraphedStep, "__call__", count_columns)
    assert_same_samples(run(cache_bytes=slots * ROW_BYTES), wanted)
    assert EmulatedGraph.replays > len(plain), "more plain or recorded steps than replayed ones"
    assert gc.isenabled()


def random_wanted(slots):
    """The answers of the plain step on the CPU."""
    with pytest.MonkeyPatch.context() as undone:
        undone.setattr(module, "Decoder", module.Decoder.__mro__[1])
        return run(cache_bytes=slots * ROW_BYTES)


def test_few_graphs_are_alive(card, monkeypatch):
    # Catches: `del self.graphs[…]` dropped; the oldest shape taken for the least used (pop without going to the end).
    monkeypatch.setattr("qwen2_model.SPAN", 4)  # a new shape every four steps
    alive, plain_step = [], module.Decoder._step

    def step(self, rows):
        alive.append(len(EmulatedGraph.alive))
        plain_step(self, rows)

    monkeypatch.setattr(module.Decoder, "_step", step)
    run(stop_ids=frozenset())
    assert max(alive) == GRAPHS_KEPT
    assert len(alive) > 2 * GRAPHS_KEPT
    assert not EmulatedGraph.alive


def test_a_step_that_cannot_be_recorded_runs_as_it_is_with_one_warning(card, monkeypatch):
    # Catches: the exception let through; the span not taken back, the collector left off; a warning for each shape.
    wanted = random_wanted(15)

    recorded, plain_step = [], module.Decoder._step

    @contextmanager
    def refuse(graph, pool):
        recorded.append(graph)
        yield
        recorded.clear()
        raise torch.OutOfMemoryError("CUDA error: out of memory")

    def step(self, rows):
        if recorded:
            self.cache.span += 1  # what is recorded has no other effect
        else:
            plain_step(self, rows)

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(module.Decoder, "_step", step)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        assert_same_samples(run(), wanted)
        assert_same_samples(run(), wanted)
    assert [str(w.message) for w in warned] == [
        "a decode step cannot be recorded as a CUDA graph (CUDA error: out of memory); answers stay the same, but sampling is "
        "slower from now on. Where memory is short, lower model.memory_gib"
    ]
    assert gc.isenabled()


def test_rows_are_rounded_to_few_numbers():
    assert sorted({row_bucket(rows) for rows in range(1, 257)}) == [
        8,
        16,
        32,
        64,
        96,
        128,
        160,
        192,
        224,
        256,
    ]
    assert all(row_bucket(rows) >= rows for rows in range(1, 257))


# ---------------------------------------------------------------- the optimizer's streams


class EmulatedStream:
    """Work that waits in order; an event is a place in it."""

    def __init__(self, device):
        self.device, self.work = device, []
        device.streams.append(self)

    def record_event(self):
        event = EmulatedEvent(self.device)
        self.work.append(event)
        return event

    def wait_event(self, event):
        self.work.append(lambda: event.happened)

    def wait_stream(self, other):
        self.wait_event(other.record_event())

    def synchronize(self):
        self.device.run_until(self)


class EmulatedEvent:
    def __init__(self, device):
        self.device, self.happened = device, False


class EmulatedDevice:
    """Whatever is asked of a stream waits until the host must know; then streams take turns as `order` says."""

    def __init__(self, order):
        self.order, self.streams = order, []
        self.compute, self.up, self.down = (EmulatedStream(self) for _ in range(3))
        self.current = self.compute

    @contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before

    def record(self, func, args, kwargs):
        if reads_host(func, args):
            self.run_until(self.compute)
            return func(*args, **kwargs)
        operator = Operator(func, args, kwargs)
        self.current.work.append(operator)
        return operator.out

    def run_until(self, stream):
        while stream.work:
            ready = [s for s in self.streams if s.work and (not callable(s.work[0]) or s.work[0]())]
            assert ready, "streams wait for each other in a circle"
            first = self.order(self, ready).work.pop(0)
            if isinstance(first, EmulatedEvent):
                first.happened = True
            elif isinstance(first, Operator):
                with _disable_current_modes():
                    first.run()


def by_rank(*ranks):
    return lambda device, ready: min(ready, key=lambda s: ranks[device.streams.index(s)])


def at_random(seed):
    rng = random.Random(seed)
    return lambda device, ready: rng.choice(ready)


ORDERS = [by_rank(*ranks) for ranks in itertools.permutations(range(3))]
ORDERS += [at_random(seed) for seed in range(3)]


@pytest.mark.parametrize("order", ORDERS)
def test_streamed_state_is_the_same_whatever_runs_first(order, monkeypatch):
    # Catches, seen: each of the four events left out (`up.wait_event(written…)`, `compute.wait_event(arrived)`,
    # `down.wait_event(…)`, `down.synchronize()`), by at least one order; a buffer used again one piece early.
    monkeypatch.setitem(optimizer_module.PIECE, "cpu", 50)  # five pieces, the last one shorter
    ours, offloaded = random_params(torch.bfloat16), random_params(torch.bfloat16)
    resident, streamed = AdamW(ours, **SETTINGS), AdamW(offloaded, **SETTINGS)
    device = EmulatedDevice(order)
    streams = iter((device.up, device.down))
    monkeypatch.setattr(torch.cuda, "Stream", lambda of: next(streams))
    monkeypatch.setattr(gpu, "page_lock", lambda tensor: None)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda of=None: device.compute)
    streamed.offloaded, streamed.streamed = (
        True,
        StreamedState(list(streamed.state.values()), torch.device("cpu")),
    )
    monkeypatch.setattr(torch.cuda, "stream", device.stream)
    wanted = take_steps(resident, ours, range(2))
    got = []
    for step in range(2):
        for p, g in zip(offloaded, random_grads(step, torch.bfloat16), strict=True):
            p.grad = g
        with Recording(device.record):
            got.append(streamed.step())
        streamed.zero_grad()
    assert got == wanted
    assert_equal(offloaded, ours)
    assert_equal(streamed.state.values(), resident.state.values())


# ---------------------------------------------------------------- everything on one device

CARD, HOST = torch.device("cuda", 0), torch.device("cpu")


class PretendedCard(TorchFunctionMode):
    """What is asked for on "cuda" lies in CPU memory and says that it is on a card. Where a card would refuse to compute with
    tensors of two devices, so does this."""

    def __init__(self):
        super().__init__()
        self.places = (
            weakref.WeakKeyDictionary()
        )  # storage -> device, of what was made in here; autograd makes some unseen
        self.operations = 0  # on the card

    def place(self, tensor):
        return self.places.get(tensor.untyped_storage())

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name, args, kwargs = func.__name__, list(args), dict(kwargs or {})
        if name == "__get__" and func.__self__.__name__ == "device":
            return self.place(args[0]) or HOST
        if name == "__get__" and func.__self__.__name__ == "is_cuda":
            return self.place(args[0]) == CARD
        asked = kwargs.get("device")
        if name == "to" and (given := [a for a in args if isinstance(a, torch.device | str)]):
            asked, args, kwargs["copy"] = (
                given[0],
                [HOST if isinstance(a, torch.device | str) else a for a in args],
                True,
            )
        if name == "cpu":
            func, asked = torch.Tensor.clone, HOST
        if asked is not None:
            asked = CARD if torch.device(asked).type == "cuda" else torch.device(asked)
            kwargs |= {"device": HOST if asked == CARD else asked} if "device" in kwargs else {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        places = [self.place(t) for t in tensors]
        self.operations += CARD in places
        if CARD in places and HOST in places and not self.mixes(name, tensors, places):
            raise RuntimeError(f"{name}: tensors on {places}")
        if name == "mm" and "out_dtype" in kwargs:  # only a card has it
            out, product = (
                kwargs.get("out"),
                args[0].to(kwargs["out_dtype"]) @ args[1].to(kwargs["out_dtype"]),
            )
            result = product if out is None else out.copy_(product)
        else:
            result = func(*args, **kwargs)
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.device.type == "cpu" and self.place(t) is None:
                t_place = asked or (
                    CARD if CARD in places else HOST if not tensors or HOST in places else None
                )
                if t_place is not None:
                    self.places[t.untyped_storage()] = t_place
        return result

    def mixes(self, name, tensors, places) -> bool:
        """Whether a card takes these: a copy, indices from the host, a number without dimensions."""
        if name in ("copy_", "to"):
            return True
        if name == "__getitem__":
            return places[0] == CARD
        if name == "__setitem__":
            return places[0] == CARD and (len(tensors) == 2 or places[-1] == CARD)
        return all(t.dim() == 0 for t, place in zip(tensors, places, strict=True) if place == HOST)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_computed_together_is_on_one_device(dtype, monkeypatch):
    # Catches: a `.to(device)` or `device=` left out in the samplers, the rows, the loss or the optimizer.
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(gpu.GraphedStep, "works", False)
    weights = random_model(tied=True)

    def two_steps(device):
        with torch.device("meta"):
            model = Transformer(weights.config)
        allocate(model, device=device, dtype=dtype)
        flat_weights(model.parameters()).copy_(flat_weights(weights.parameters()))
        optimizer, seen = AdamW(model.parameters(), lr=1e-3), []
        for step in range(2):
            episodes = grpo.rollout(
                model,
                AnyTokenizer(97, frozenset(range(0, 97, 9))),
                random_questions(3, 11, 97),
                num_answers=5,
                max_gen_len=21,
                temperature=0.9,
                reward_function=random_reward(),
                generator=torch.Generator().manual_seed(step),
                cache_bytes=10**5,
            )
            stats = grpo.update_policy(
                model,
                optimizer,
                episodes,
                max_grad_norm=1.0,
                skip_unfinished=False,
                temperature=0.9,
                vocab_size=97,
                micro_batch_tokens=100,
                checkpoint_layers=1,
            )
            assert stats.logprob_diff_mean < (1e-5 if dtype == torch.float32 else 0.02)
            one = module.generate_one(
                model, [1, 2, 3], Sampling(9, 0.9, 97, frozenset({96})), torch.linspace(0, 0.9, 9)
            )
            seen.append(([e.response_token_ids for e in episodes], stats.loss, list(one)))
        return seen, flat_weights(model.parameters()).cpu()

    with PretendedCard() as card:
        seen, trained = two_steps("cuda")
    assert card.operations > 1000
    if dtype == torch.float32:  # in bf16 a card has other logits
        wanted, expected = two_steps("cpu")
        assert seen == wanted
        torch.testing.assert_close(trained, expected, rtol=0, atol=0)


@pytest.fixture
def pretended_card(monkeypatch):
    """CUDA as far as it only says something, no recordings, and streams that run everything at once."""
    said = {
        "is_available": True,
        "is_initialized": True,
        "device_count": 1,
        "get_device_name": "pretended card",
        "synchronize": None,
        "get_device_capability": (8, 6),
        "mem_get_info": (2**33, 2**33),
        "memory_reserved": 0,
        "memory_allocated": 0,
        "max_memory_allocated": 2**20,
        "reset_peak_memory_stats": None,
        "graph_pool_handle": 0,
    }
    for name, value in said.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    monkeypatch.setattr(gpu, "page_lock", lambda tensor: None)
    monkeypatch.setattr(gpu.GraphedStep, "works", False)
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "")
    with PretendedCard() as card:
        yield card


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_check_compares_is_on_one_device_and_agrees(dtype, tmp_path, pretended_card):
    # Catches: `.to("cpu", …)` of the gradient left out; the row not moved to the device.
    config = load_config(
        "config_tiny.yaml",
        ["model.device=cuda", f"model.dtype={dtype}", f"output_dir={tmp_path}/run"],
    )
    shape = find_shape("models/tiny")
    results = [
        *check._compare_with_cpu(config, shape),
        *check._step_save_and_go_on(config, shape, make_plan(config, shape)),
    ]
    assert len(results) == (7 if dtype == "float32" else 8)
    assert all(found <= bound for _, found, bound in results)


@pytest.mark.parametrize("offload", ["false", "true"])
def test_a_run_and_its_resumption_compute_together_what_is_on_one_device(
    offload, tmp_path, pretended_card, own_signals, capsys
):
    # Catches: the state of a checkpoint not copied to the device; a piece of an offloaded state used where it lives.
    command = [
        "--config",
        "config_tiny.yaml",
        "model.device=cuda",
        "model.dtype=bfloat16",
        f"output_dir={tmp_path}/run",
        f"optimizer.offload={offload}",
        "training.batch_size=8",
        "training.num_questions_per_batch=2",
        "data.test_size=4",
        "training.max_gen_len=64",
    ]
    assert train.main([*command, "training.max_steps=4"]) == 0
    assert train.main([*command, "training.max_steps=5", "--resume"]) == 0
    assert "rollout: 0.00 GiB at the peak" in capsys.readouterr().out
    steps = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps if "loss" in s] == [1, 2, 3, 4, 5]
    assert all(s["sampling/logp_difference_mean"] < 1e-3 for s in steps if "loss" in s)
    assert pretended_card.operations > 10_000


@pytest.mark.parametrize(
    ("refused", "mix"),
    [
        (True, lambda card, host: card + host),
        (True, lambda card, host: host[card.long()]),
        (True, lambda card, host: torch.mm(card[None], host[:, None])),
        (True, lambda card, host: card.masked_fill_(host > 0, 1.0)),
        (False, lambda card, host: card + host[0]),
        (False, lambda card, host: card[host.long()]),
        (False, lambda card, host: card.copy_(host)),
        (False, lambda card, host: card + host.to(card.device)),
    ],
)
def test_a_pretended_card_refuses_what_a_card_does(refused, mix):
    with PretendedCard():
        card, host = torch.zeros(3, device="cuda"), torch.zeros(3)
        with pytest.raises(RuntimeError, match="tensors on") if refused else nullcontext():
            assert mix(card, host).is_cuda


# ---------------------------------------------------------------- memory at the shape of the main job, on the meta device


class Census(TorchDispatchMode):
    """Counts kernels, and the bytes of the storages that live. A host read raises: the meta device has nothing to read."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.kernels = 0
        self.sizes, self.in_step = {}, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ == "add_" and getattr(args[1], "is_sparse", False):
            return args[
                0
            ]  # rows of the embedding's gradient: in place, and not to be had on the meta device
        assert not (self.in_step and reads_host(func, args)), (
            f"{func} makes the host wait in every decode step"
        )
        out = func(*args, **kwargs or {})
        is_view = not func._schema.is_mutable
        for tensor in tree_leaves(out):
            for part in parts(tensor):
                is_view &= part.untyped_storage()._cdata in self.sizes
                self._see(part.untyped_storage())
        self.kernels += not is_view
        return out

    def _see(self, storage):
        if storage._cdata not in self.sizes:
            self.sizes[storage._cdata] = storage.nbytes()
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._forget, storage._cdata)

    def _forget(self, key):
        self.live -= self.sizes.pop(key)


def parts(tensor) -> list[torch.Tensor]:
    if not isinstance(tensor, torch.Tensor):
        return []
    return [tensor._indices(), tensor._values()] if tensor.is_sparse else [tensor]


class FusedNorm(torch.autograd.Function):
    """What the fused kernel of a card allocates and keeps; on the meta device PyTorch takes the norm apart."""

    @staticmethod
    def forward(ctx, x_BSE, weight_E):
        ctx.save_for_backward(
            x_BSE, weight_E, x_BSE.new_empty(x_BSE.shape[:-1], dtype=torch.float32)
        )
        return torch.empty_like(x_BSE)

    @staticmethod
    def backward(ctx, grad_BSE):
        return torch.empty_like(grad_BSE), torch.empty_like(ctx.saved_tensors[1])


def fused_attention(q, k, v, attn_mask):
    """The operator that scaled_dot_product_attention is on a card where there is a mask."""
    mask = attn_mask.expand(*q.shape[:3], k.shape[2])
    return torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, torch.is_grad_enabled()
    )[0]


def unique_of_meta(tensor, return_inverse):
    return tensor.new_empty(tensor.numel()), torch.empty_like(tensor)


@pytest.fixture
def meta_card(monkeypatch):
    """The meta device with a card's fused kernels, its sizes of pieces and its rhythm of a decode step."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", fused_attention)
    monkeypatch.setattr(
        torch.nn.RMSNorm, "forward", lambda self, x_BSE: FusedNorm.apply(x_BSE, self.weight)
    )
    monkeypatch.setattr(torch.Tensor, "unique", unique_of_meta)
    monkeypatch.setattr(
        torch.Tensor, "__bool__", lambda self: False
    )  # asked once a row, of its loss
    monkeypatch.setitem(grpo.LOGIT_CHUNK_BYTES, "meta", grpo.LOGIT_CHUNK_BYTES["cuda"])
    monkeypatch.setitem(optimizer_module.PIECE, "meta", optimizer_module.PIECE["cuda"])
    return Census()


PLANS = [("config.yaml", "42.5"), ("config_24GB.yaml", "22.5"), ("config.yaml", "78")]


def planned(config, memory):
    config, shape = (
        load_config(config, [f"model.memory_gib={memory}"]),
        find_shape("Qwen2.5-3B-Instruct"),
    )
    with torch.device("meta"):
        model = Transformer(shape)
    return config, make_plan(config, shape), model


def assert_close_below(plan_part, measured):
    """What cannot be measured here, the context and the driver's memory of graphs, is taken as planned."""
    driver = sum(
        plan_part.get(name, 0)
        for name in ("CUDA context and workspaces", "graphs of the decode step")
    )
    total = sum(plan_part.values())
    assert 0.95 * total <= measured + driver <= total, ((measured + driver) / 2**30, total / 2**30)


@pytest.mark.parametrize(("config", "memory"), PLANS)
def test_a_decode_step_needs_what_is_planned(config, memory, meta_card, monkeypatch):
    # Catches, seen: the plan's lines "prompts" or "decode step" dropped; 20 kernels a layer instead of 32; a host read in the
    # step (`answers_R.tolist()`).
    config, plan, model = planned(config, memory)
    training, rows = config.training, plan.cache_rows
    longest = PROMPT_TOKENS + training.max_gen_len
    state = plan.rollout["optimizer state"]

    def admit(self):
        self.in_use, self.cache.span = rows, longest - 2

    monkeypatch.setattr(module.Decoder, "turn_over", admit)
    fixed = {"interval": gpu.CHECK_INTERVAL}
    on_card = type(
        "OnCard",
        (module.Decoder,),
        {
            "__setattr__": lambda self, name, value: object.__setattr__(
                self, name, fixed.get(name, value)
            )
        },
    )
    with meta_card, torch.no_grad():
        allocate(model, device="meta", dtype=torch.bfloat16)
        prefilled = KVCache(
            model.config,
            batch_size=training.num_questions_per_batch,
            max_len=PROMPT_TOKENS,
            device="meta",
            dtype=torch.bfloat16,
        )
        decoder = on_card(
            model,
            [[1] * PROMPT_TOKENS] * training.num_questions_per_batch,
            prefilled,
            Sampling(training.max_gen_len, 1.0, 151665, frozenset([2])),
            num_answers=8,
            slots=rows,
            uniforms_AG=torch.rand(training.batch_size + 1, training.max_gen_len + 1),
        )
        before, meta_card.peak, meta_card.kernels, meta_card.in_step = (
            meta_card.live,
            meta_card.live,
            0,
            True,
        )
        decoder._step(rows)
        step = meta_card.peak - before
        assert meta_card.kernels <= step_kernels(model.config)
    assert_close_below(
        plan.rollout, state + before + 2 * step
    )  # of the step as it is, and of its recordings


@pytest.mark.parametrize(("config", "memory"), PLANS)
def test_an_update_needs_what_is_planned(config, memory, meta_card):
    # Catches, seen: the plan's lines "gradients", "activations" or "optimizer state" dropped; norms planned as on a CPU.
    config, plan, model = planned(config, memory)
    tokens = config.training.micro_batch_tokens
    answers = math.ceil((tokens - PROMPT_TOKENS) / config.training.max_gen_len)
    length = (tokens - PROMPT_TOKENS) // answers
    episodes = [episode(0, [1] * PROMPT_TOKENS, [1] * length, 0.0) for _ in range(answers)]
    (row,) = pack_rows([(e, 1.0) for e in episodes], tokens)
    with meta_card:
        allocate(model, device="meta", dtype=torch.bfloat16)
        gradient = zero_gradient(model.parameters())
        row = row.to(gradient.device)
        loss, _ = grpo.row_loss(
            model,
            row,
            1,
            temperature=1.0,
            vocab_size=151665,
            checkpoint_layers=plan.checkpoint_layers,
        )
        loss.backward()
        del loss
        gradient_peak, meta_card.peak = meta_card.peak, meta_card.live
        optimizer = AdamW(model.parameters(), lr=1e-6)
        optimizer.steps = 1
        place = slice(0, optimizer_module.PIECE["cuda"])
        with torch.no_grad():
            assert (
                flat_gradient(model.parameters()).untyped_storage()._cdata
                == gradient.untyped_storage()._cdata
            )
            weights, state = flat_weights(model.parameters()), optimizer.state.values()
            optimizer._update(weights[place], gradient[place], *(tensor[place] for tensor in state))
    optimizer_peak = meta_card.peak - (
        sum(tensor.nbytes for tensor in state) if config.optimizer.offload else 0
    )
    assert_close_below(
        plan.update, max(gradient_peak + plan.update["optimizer state"], optimizer_peak)
    )
