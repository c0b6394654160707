"""The plan against what it is a plan of: weights counted, activations weighed, budgets kept."""

import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from harness.config import load_config
from harness.cpu import packs_for_decoding
from harness.plan import PUBLISHED, activation_bytes_per_token, find_shape, make_plan, num_weights
from qwen2_model import Qwen2Config, Transformer, attend_causally
from tests.tables import what_fits_on_one_card


@pytest.mark.parametrize("size", PUBLISHED)
def test_weights_are_counted_right(size):
    # Catches: a bias, a norm or an untied head forgotten.
    shape = find_shape(f"somewhere/Qwen2.5-{size}-Instruct")
    with torch.device("meta"):
        model = Transformer(shape)
    assert num_weights(shape) == sum(p.numel() for p in model.parameters())


def test_a_model_that_is_not_there_and_is_none_of_the_published_is_asked_for():
    with pytest.raises(
        FileNotFoundError, match=r"^model\.path=nowhere/none does not exist; name a directory"
    ):
        find_shape("nowhere/none")


def test_a_task_may_not_say_how_many_questions_it_holds_out():
    # Catches: config.data.test_size of any task; held_out not passed on.
    config = small("model.memory_gib=2.0")
    config = config.model_copy(update={"data": object()})
    few, many = (
        make_plan(config, SHAPE, held_out=held_out).evaluation_cache_bytes for held_out in (0, 1000)
    )
    assert make_plan(config, SHAPE).evaluation_cache_bytes == few > many


@pytest.mark.parametrize("checkpoint_layers", [0, 3, 7])
def test_activations_are_what_autograd_keeps(checkpoint_layers):
    # Catches: norms that keep nothing in float32; checkpoint_layers and the rest exchanged; bytes of one dtype for the other.
    shape = Qwen2Config(128, 192, 832, 7, 6, 2, 4096, 1e-6, 1e4, True)
    model, tokens_1S = Transformer(shape).bfloat16(), torch.arange(640)[None] % 128
    weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor, tensor.untyped_storage().nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden_1SE = model.hidden_states(
            tokens_1S, tokens_1S, attend_causally, checkpoint_layers=checkpoint_layers
        )
    measured = (sum(size for _, size in kept.values()) + hidden_1SE.nbytes) / 640
    planned = [activation_bytes_per_token(shape, torch.bfloat16, layers) for layers in range(8)]
    layer = planned[1] - planned[2] + 2 * 192
    in_flight = (
        1.5 if checkpoint_layers == 7 else 0.5
    ) * layer  # of the backward pass, which has not begun
    assert 0.8 < measured / (planned[checkpoint_layers] - in_flight) <= 1


def small(*overrides: str):
    return load_config("config_tiny.yaml", ["model.path=nowhere", *overrides])


SHAPE = Qwen2Config(50_000, 512, 2048, 8, 8, 2, 4096, 1e-6, 1e4, True)


def test_a_plan_stays_within_its_budget_and_uses_it():
    # Catches: cache rows rounded up; checkpoint_layers that never grow; the prompts of the evaluation forgotten.
    plans = [
        make_plan(small(f"model.memory_gib={g}", "training.micro_batch_tokens=4096"), SHAPE)
        for g in (2.0, 2.4, 40.0)
    ]
    for plan in plans:
        assert max(sum(plan.rollout.values()), sum(plan.update.values())) <= plan.budget
        assert plan.evaluation_cache_bytes <= plan.cache_bytes
    assert plans[0].cache_rows < plans[1].cache_rows <= plans[2].cache_rows == 256
    assert (
        plans[0].checkpoint_layers > plans[1].checkpoint_layers >= plans[2].checkpoint_layers == 0
    )


def test_the_table_of_what_one_card_trains_is_what_the_plan_says():
    # Catches: the state in CPU memory where the card would hold it; a setting of config.yaml changed without the table.
    assert what_fits_on_one_card() in Path("README.md").read_text()


def test_what_does_not_fit_names_the_setting_that_would():
    # Catches: the remedy computed from the rollout alone.
    with pytest.raises(ValueError, match=r"model\.memory_gib=0\.2") as error:
        make_plan(small("model.memory_gib=0.2"), SHAPE)
    needed = float(re.search(r"raise model.memory_gib by ([\d.]+)", str(error.value))[1])
    make_plan(
        small(f"model.memory_gib={0.2 + needed + 0.1}", "training.micro_batch_tokens=704"), SHAPE
    )


@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 2), ("float32", 4)])
def test_packed_weights_are_planned_for(dtype, size):
    # Catches: the second copy of the weights that decodes on the CPU left out; a card planned with it.
    if not packs_for_decoding("cpu", getattr(torch, dtype)):
        pytest.skip(f"this CPU build has no oneDNN with {dtype}")
    settings = [f"model.dtype={dtype}", "model.memory_gib=12.0"]
    parts = make_plan(small(*settings), SHAPE).rollout
    assert parts["weights, packed for decoding"] == parts["weights"] == size * num_weights(SHAPE)
    assert (
        "weights, packed for decoding"
        not in make_plan(small(*settings, "model.device=cuda"), SHAPE).rollout
    )


def test_a_plan_for_a_card_needs_no_card(monkeypatch):
    # Catches: free memory asked for where model.memory_gib says what may be used.
    monkeypatch.setattr("harness.plan.free_bytes", lambda device: pytest.fail("asked the card"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (
        make_plan(small("model.device=cuda", "model.memory_gib=12.0"), SHAPE).budget == 12 * 2**30
    )
    with pytest.raises(
        ValueError,
        match=r"model\.memory_gib=null .* no CUDA device is here; .*model\.memory_gib=43\.5",
    ):
        make_plan(small("model.device=cuda", "model.memory_gib=null"), SHAPE)


def test_without_a_limit_the_plan_takes_what_is_free_but_one_gib(monkeypatch):
    # Catches: the reserve added, or left out.
    monkeypatch.setattr("harness.plan.free_bytes", lambda device: 9 * 2**30)
    assert make_plan(small("model.memory_gib=null"), SHAPE) == make_plan(
        small("model.memory_gib=8.0"), SHAPE
    )
    monkeypatch.setattr("harness.plan.free_bytes", lambda device: 5 * 2**28)
    with pytest.raises(ValueError, match=r"does not fit into 0\.25 GiB \(model\.memory_gib=null\)"):
        make_plan(small("model.memory_gib=null"), SHAPE)


FREED = """
import resource, torch
from harness import cpu
if {keep}:
    cpu.prepare_process()
for _ in range(12):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(2**24).fill_(1.0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_freed_memory_is_kept():
    # Catches: the two options of mallopt exchanged, or either left out.
    faults = {}
    for keep in (False, True):
        result = subprocess.run(
            [sys.executable, "-c", FREED.format(keep=keep)],
            capture_output=True,
            text=True,
            check=True,
        )
        faults[keep] = [int(line) for line in result.stdout.split()]
    assert sum(faults[True]) < sum(faults[False]) / 2, (
        faults
    )  # the heap may grow a few times before a hole fits
