"""The plan against what it predicts: weights, activations, the update's peak, and its budget."""

import platform
import re
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.synthetic import random_episodes, random_model
from flat import zero_gradient
from grpo import LOGIT_CHUNK_BYTES, policy_logprobs
from harness import cpu
from harness.config import load_config
from harness.cpu import packs_for_decoding
from harness.plan import (
    PROMPT_TOKENS,
    PUBLISHED,
    activation_bytes_per_token,
    find_shape,
    make_plan,
    num_weights,
)
from packing import pack_micro_batches
from qwen2_model import Qwen2Config, Transformer, causal_attention
from tests.tables import what_fits_on_one_card

SHAPE = Qwen2Config(50_000, 512, 2048, 8, 8, 2, 4096, 1e-6, 1e4, True)


def small(*overrides: str):
    return load_config("config_tiny.yaml", ["model.path=nowhere", *overrides])


@pytest.mark.parametrize("size", PUBLISHED)
def test_weights_are_counted(size):
    # Catches: a bias, a norm or an untied head forgotten.
    shape = find_shape(f"somewhere/Qwen2.5-{size}-Instruct")
    with torch.device("meta"):
        model = Transformer(shape)
    assert num_weights(shape) == sum(p.numel() for p in model.parameters())


def test_an_absent_model_of_unknown_name_is_an_error():
    wanted = r"(?s)^model\.path=nowhere/none does not exist; name.*known sizes: 0\.5B, 1\.5B, "
    with pytest.raises(FileNotFoundError, match=wanted):
        find_shape("nowhere/none")


def test_a_task_without_test_size_passes_the_number_of_held_out_questions():
    # Catches: config.data.test_size read from any task; held_out ignored.
    config = small("model.memory_gib=2.0").model_copy(update={"data": object()})
    one, many = [make_plan(config, SHAPE, held_out=n).evaluation_cache_bytes for n in (1, 100)]
    assert make_plan(config, SHAPE).evaluation_cache_bytes == one
    assert many == 100 * one


def test_an_evaluation_is_planned_like_a_rollout_of_its_own():
    # Catches: the cache for a small batch taken for an evaluation of many questions, which then
    # decodes one answer at a time although there is memory for all of them.
    batch = "training.batch_size=8", "training.num_questions_per_batch=2"
    plan = make_plan(small("model.memory_gib=2.0", "data.test_size=100", *batch), SHAPE)
    assert "KV cache, 8 of 8 answers at once" in plan.rollout
    assert "KV cache, 100 of 100 answers at once" in plan.evaluation
    assert plan.evaluation["prompts"] == 50 * plan.rollout["prompts"]


# ---------------------------------------------------------------- what autograd keeps


@pytest.mark.parametrize("recompute_layers", [0, 3, 7])
def test_activations_are_what_autograd_keeps(recompute_layers):
    # Catches: norms that keep nothing in float32; recomputed layers and the others swapped; the
    # bytes of one dtype taken for the other.
    shape = Qwen2Config(128, 192, 832, 7, 6, 2, 4096, 1e-6, 1e4, True)
    model, tokens_1S = Transformer(shape).bfloat16(), torch.arange(640)[None] % 128
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor, tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_1SE = model.hidden_states(
            tokens_1S, tokens_1S, causal_attention, recompute_layers=recompute_layers
        )
    measured = (sum(size for _, size in kept.values()) + hidden_1SE.nbytes) / 640
    planned = [activation_bytes_per_token(shape, torch.bfloat16, layers) for layers in range(8)]
    layer = planned[1] - planned[2] + 2 * 192
    in_flight = (1.5 if recompute_layers == 7 else 0.5) * layer  # only in the backward pass
    assert 0.8 < measured / (planned[recompute_layers] - in_flight) <= 1


class PeakMemory(TorchDispatchMode):
    """Adds up the storages that operators allocate in this context while they are alive."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for tensor in tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), size=0)  # it was there before
        outputs = func(*args, **kwargs or {})
        for tensor in tree_leaves(outputs):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage(), tensor.untyped_storage().nbytes())
        return outputs

    def _add(self, storage, size):
        key = storage._cdata
        if key not in self.known:
            self.known.add(key)
            self.live += size
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key, size):
        self.known.discard(key)
        self.live -= size


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("answer_len", "chunk"), [(40, 10**6), (700, 10**6), (700, 10**7)])
def test_the_gradient_takes_the_memory_that_is_planned(answer_len, chunk, tied, monkeypatch):
    # Catches: the chunk, the head's gradient or the activations left out of the plan; the gradient
    # of a tied embedding forgotten, which comes when the activations are gone.
    monkeypatch.setitem(LOGIT_CHUNK_BYTES, "cpu", chunk)
    shape = Qwen2Config(5003, 128, 384, 3, 4, 2, 4096, 1e-6, 1e4, tied)
    model = random_model(shape, device="cpu", dtype=torch.float32)
    tokens = PROMPT_TOKENS + 2 * answer_len
    lengths = f"training.max_gen_len={answer_len}", f"training.micro_batch_tokens={tokens}"
    planned = make_plan(small("model.memory_gib=4", *lengths), shape).update
    for part in ("weights", "optimizer state", "gradient", "optimizer temporaries"):
        del planned[part]
    episodes = random_episodes(1, 2, PROMPT_TOKENS, answer_len, mean=None, vocab_size=5003)
    (micro_batch,) = pack_micro_batches([(e, 1.0) for e in episodes], tokens)
    zero_gradient(model.parameters())
    with PeakMemory() as memory:
        logprobs_P = policy_logprobs(model, micro_batch, temperature=1.0, vocab_size=5003)
        logprobs_P.sum().backward()
    assert 0.6 < memory.peak / sum(planned.values()) <= 1


@pytest.mark.parametrize(("longest", "mean"), [(300, 129), (500, 200)])
def test_unequal_answers_take_the_memory_that_is_planned(longest, mean, monkeypatch):
    # Catches: the padding of the queries or the prompts that each answer gathers again left out.
    # The shape has the proportions of a published model, and layers enough to outweigh the rest.
    monkeypatch.setitem(LOGIT_CHUNK_BYTES, "cpu", 10**5)
    shape = Qwen2Config(509, 96, 520, 12, 6, 1, 4096, 1e-6, 1e4, True)
    model = random_model(shape, device="cpu", dtype=torch.float32)
    settings = f"training.max_gen_len={longest}", "training.micro_batch_tokens=1280"
    planned = make_plan(small("model.memory_gib=4", *settings), shape).update
    del planned["optimizer state"], planned["optimizer temporaries"]
    episodes = random_episodes(4, 8, PROMPT_TOKENS, longest, mean=mean, vocab_size=509)
    micro_batches = pack_micro_batches([(e, 1.0) for e in episodes], 1280)
    micro_batch = max(micro_batches, key=lambda micro_batch: len(micro_batch.tokens_S))
    gradient = zero_gradient(model.parameters())
    with PeakMemory() as memory:
        logprobs_P = policy_logprobs(model, micro_batch, temperature=1.0, vocab_size=509)
        logprobs_P.sum().backward()
    measured = memory.peak + 2 * gradient.nbytes  # the weights are as large
    assert 0.95 < measured / sum(planned.values()) <= 1


# ---------------------------------------------------------------- the budget


def test_nccl_is_planned_for():
    # Catches: NCCL's buffers left out, or planned for one rank or for CPUs.
    for device, cards, planned in (("cuda", 2, 2**30), ("cuda", 1, 0), ("cpu", 2, 0)):
        plan = make_plan(small("model.memory_gib=12", f"model.device={device}"), SHAPE, cards=cards)
        for parts in (plan.rollout, plan.update):
            assert parts.get("NCCL buffers", 0) == planned


def test_a_plan_uses_its_budget_and_stays_within_it():
    # Catches: cache_slots rounded up; recompute_layers that never grows; the prompts of the
    # evaluation forgotten.
    plans = [
        make_plan(small(f"model.memory_gib={gib}", "training.micro_batch_tokens=4096"), SHAPE)
        for gib in (2.0, 2.4, 40.0)
    ]
    for plan in plans:
        assert plan.needed <= plan.budget
        assert plan.evaluation_cache_bytes <= plan.cache_bytes
    assert plans[0].cache_slots < plans[1].cache_slots <= plans[2].cache_slots == 256
    assert plans[0].recompute_layers > plans[1].recompute_layers
    assert plans[2].recompute_layers == 0


def test_the_table_of_what_fits_is_what_the_plan_says():
    # Catches: a setting of config.yaml changed without the table.
    pages = [Path("README.md"), *Path("docs").glob("*.md")]
    assert any(what_fits_on_one_card() in page.read_text(encoding="utf-8") for page in pages)


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ("model.device=cpu model.memory_gib=1.0", "model.memory_gib="),
        ("model.device=cpu model.memory_gib=1.6", "training.micro_batch_tokens="),
        ("model.device=cuda model.memory_gib=2.4", "training.micro_batch_tokens="),
        (
            "model.device=cuda model.memory_gib=1.6 training.micro_batch_tokens=704",
            "optimizer.offload=true",
        ),
        (
            "model.device=cuda model.memory_gib=1.6",
            "optimizer.offload=true and training.micro_batch_tokens=",
        ),
        ("model.device=cuda model.memory_gib=1.2", "model.memory_gib="),
        ("model.device=cuda model.memory_gib=1.2 optimizer.offload=true", "model.memory_gib="),
    ],
)
def test_the_advice_makes_the_run_fit(settings, advice):
    # Catches: offloading advised to a CPU, or where it is not enough; a smaller micro-batch advised
    # where the rollout does not fit; the needed memory rounded down.
    defaults = ["training.micro_batch_tokens=8192", "optimizer.offload=false"]
    settings = [*defaults, *settings.split()]
    with pytest.raises(ValueError, match=r"does not fit into \d\.\d\d GiB \(model\.mem") as error:
        make_plan(small(*settings), SHAPE)
    advised = str(error.value).splitlines()[-1]
    assert advised.startswith(f"set {advice}")
    make_plan(small(*settings, *re.findall(r"[\w.]+=[\w.]+", advised)), SHAPE)


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_packed_weights_are_planned_for(dtype, size):
    # Catches: the packed copy of the weights left out on a CPU, or planned for CUDA.
    if not packs_for_decoding("cpu", getattr(torch, dtype)):
        pytest.skip(f"oneDNN is not there, or slow in {dtype}")
    settings = [f"model.dtype={dtype}", "model.memory_gib=12.0"]
    parts = make_plan(small(*settings), SHAPE).rollout
    packed = "weights, packed for decoding"
    assert parts[packed] == parts["weights"] == size * num_weights(SHAPE)
    assert packed not in make_plan(small(*settings, "model.device=cuda"), SHAPE).rollout


def test_a_plan_with_a_limit_needs_no_card(monkeypatch):
    # Catches: free memory asked for although model.memory_gib says what may be used.
    monkeypatch.setattr("harness.plan.free_bytes", lambda device: pytest.fail("asked the card"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    plan = make_plan(small("model.device=cuda", "model.memory_gib=12.0"), SHAPE)
    assert plan.budget == 12 * 2**30
    with pytest.raises(ValueError, match=r"memory_gib=null .* no CUDA device; .*memory_gib=22\.5"):
        make_plan(small("model.device=cuda", "model.memory_gib=null"), SHAPE)


def test_without_a_limit_the_plan_takes_what_is_free_except_one_gib(monkeypatch):
    # Catches: the reserve added, or left out; model.memory_gib advised though it is not the limit.
    monkeypatch.setattr("harness.plan.free_bytes", lambda device: 9 * 2**30)
    unlimited, limited = small("model.memory_gib=null"), small("model.memory_gib=8.0")
    assert make_plan(unlimited, SHAPE) == make_plan(limited, SHAPE)
    monkeypatch.setattr("harness.plan.free_bytes", lambda device: 5 * 2**28)
    with pytest.raises(ValueError, match=r"into 0\.25 GiB \(model\.memory_gib=null\)") as error:
        make_plan(unlimited, SHAPE)
    assert re.search(r"\d GiB of free memory would be enough", str(error.value))


# ---------------------------------------------------------------- what only a CPU needs

PAGE_FAULTS = """
import resource, torch
from harness import cpu
def count():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(12):
        torch.empty(2**24).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
before = count()
cpu.prepare_process()
print(before, count())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept():
    # Catches: the two options of mallopt swapped, or M_MMAP_MAX left out.
    command = [sys.executable, "-c", PAGE_FAULTS]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    before, after = map(int, result.stdout.split())
    assert after < 0.8 * before  # the heap may grow a few times before a freed block fits


SHAPES = """
import pathlib, re, torch
from harness import cpu
cpu.prepare_process()
def kib():
    return int(re.search(r"RssAnon:\\s*(\\d+)", pathlib.Path("/proc/self/status").read_text())[1])
matrix = torch.ones(500, 128, dtype=torch.bfloat16)
matrix @ matrix[:128]
before = kib()
for length in range(64, 464):
    matrix[:length] @ matrix[:128]
print(kib() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="there is no /proc")
@pytest.mark.skipif(
    not cpu.packs_for_decoding("cpu", torch.bfloat16), reason="oneDNN has no bf16 on this CPU"
)
def test_products_of_many_shapes_take_little_memory():
    # Catches: either of the two caches left at its default.
    command = [sys.executable, "-c", SHAPES]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(result.stdout) < 100 * 2**10


@pytest.mark.parametrize("library", ["no mallopt", "no oneDNN"])
def test_a_cpu_without_these_libraries_still_works(library, monkeypatch):
    # Catches: mallopt called on macOS; an operator of oneDNN called without oneDNN.
    if library == "no mallopt":
        monkeypatch.setattr("ctypes.CDLL", lambda name: object())
        cpu.prepare_process()
        return
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops, "mkldnn", None)
    model = random_model(SHAPE_OF_ONE_LAYER, device="cpu", dtype=torch.bfloat16)
    with cpu.packed_for_decoding(model, 3):
        assert "logits" not in vars(model)
    monkeypatch.setattr(cpu, "operations_per_second", lambda dtype: 14e9 / dtype.itemsize)
    assert cpu.warn_of_slow_dtype(torch.bfloat16) == ""
    monkeypatch.setattr(cpu, "operations_per_second", lambda dtype: 10.0 ** (3 * dtype.itemsize))
    assert "1000000 times slower; set model.dtype=float32" in cpu.warn_of_slow_dtype(torch.bfloat16)


SHAPE_OF_ONE_LAYER = Qwen2Config(640, 128, 384, 1, 4, 2, 2048, 1e-6, 1e4, True)
