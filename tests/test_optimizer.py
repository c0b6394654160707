"""AdamW against torch.optim.AdamW: the weights in float32, the master weights in bf16."""

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import optimizer as module
from flat import _views
from optimizer import AdamW, join_bits, split_bits

SHAPES = [(7, 11), (13,), (3, 5, 2)]
SETTINGS = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}


def random_params(dtype=torch.float32, device="cpu", scale=1.0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        nn.Parameter((scale * torch.randn(s, generator=generator)).to(device, dtype))
        for s in SHAPES
    ]


def random_grads(step: int, dtype=torch.float32, device="cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [
        (10.0 ** (step % 3) * torch.randn(s, generator=generator)).to(device, dtype) for s in SHAPES
    ]


def take_steps(optimizer, params, steps, dtype=None):
    """dtype rounds the gradients, so that bf16 and float32 parameters can get the same ones."""
    results = []
    for step in steps:
        for p, g in zip(
            params, random_grads(step, dtype or params[0].dtype, params[0].device), strict=True
        ):
            p.grad = g.to(p.dtype)
        optimizer.step()
        if isinstance(optimizer, AdamW):
            results.append((optimizer.weights_changed, optimizer.weights_changed_fp32))
        optimizer.zero_grad()
        assert all(p.grad is None for p in params)
    return results


def changed_by_a_step(optimizer: AdamW) -> tuple[float, float]:
    optimizer.step()
    return optimizer.weights_changed, optimizer.weights_changed_fp32


def masters(optimizer: AdamW) -> list[torch.Tensor]:
    parts = _views(optimizer.state["low_bits"], optimizer.params)
    return [join_bits(p.detach(), low) for p, low in zip(optimizer.params, parts, strict=True)]


def assert_equal(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert torch.equal(a, b)


def test_float32_weights_equal_torch():
    # Catches: eps inside the square root; `(1 - self.lr * self.weight_decay)` dropped; a bias
    # correction dropped; `1 - beta2` -> `1 - beta1`.
    ours, theirs = random_params(), random_params()
    optimizer, reference = AdamW(ours, **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for step in range(20):
        take_steps(optimizer, ours, [step])
        take_steps(reference, theirs, [step])
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_defaults_equal_those_of_torch_except_the_decay():
    # Catches: betas=(0.9, 0.999) -> (0.9, 0.95).
    ours, theirs = random_params(), random_params()
    take_steps(AdamW(ours, lr=1e-3), ours, range(5))
    take_steps(torch.optim.AdamW(theirs, lr=1e-3, weight_decay=0.0), theirs, range(5))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


def test_master_weights_equal_torch_in_float32_bit_for_bit():
    # Catches: `low_bits.copy_(new_low_bits)` dropped; moments in bf16; `(bits + 0x8000) >> 16` ->
    # `bits >> 16`.
    ours = random_params(torch.bfloat16)
    theirs = [nn.Parameter(p.detach().float()) for p in ours]
    slow = SETTINGS | {"lr": 1e-4}
    optimizer, reference = AdamW(ours, **slow), torch.optim.AdamW(theirs, **slow, foreach=False)
    for step in range(20):
        take_steps(optimizer, ours, [step], torch.bfloat16)
        take_steps(reference, theirs, [step], torch.bfloat16)
        assert_equal(masters(optimizer), [p.detach() for p in theirs])
        for weight, master in zip(ours, theirs, strict=True):
            down, up = (
                torch.nextafter(weight.detach(), weight.new_tensor(end))
                for end in (-torch.inf, torch.inf)
            )
            distance = (weight.float() - master).abs()
            assert (distance <= (down.float() - master).abs()).all()
            assert (distance <= (up.float() - master).abs()).all()


def test_small_updates_survive_bf16():
    # Catches: `low_bits.copy_(new_low_bits)` dropped.
    ours, plain = random_params(torch.bfloat16), random_params(torch.bfloat16)
    exact = [nn.Parameter(p.detach().float()) for p in ours]
    start = [p.detach().clone() for p in ours]
    optimizer, others = (
        AdamW(ours, lr=1e-6),
        [torch.optim.AdamW(p, lr=1e-6, weight_decay=0.0) for p in (plain, exact)],
    )
    for _ in range(300):
        for params, stepper in ((ours, optimizer), (plain, others[0]), (exact, others[1])):
            for p in params:
                p.grad = torch.ones_like(p)
            stepper.step()
    for master, p, e, s in zip(masters(optimizer), plain, exact, start, strict=True):
        assert torch.equal(p[s.abs() > 1e-3], s[s.abs() > 1e-3])  # plain bf16 does not move
        torch.testing.assert_close(
            master, s.float() - 3e-4, rtol=1e-4, atol=2e-6
        )  # 300 steps of 1e-6
        torch.testing.assert_close(master, e.detach(), rtol=0, atol=0)
    moved = torch.cat([(p != s).flatten() for p, s in zip(ours, start, strict=True)])
    assert moved.float().mean() > 0.05  # stored weights move where 3e-4 exceeds their last bit


finite = st.floats(width=32, allow_nan=False, allow_infinity=False).filter(
    lambda x: abs(x) < 3.38e38
)  # the largest bf16 is 3.39e38
edges = st.builds(
    lambda exponent, fraction, sign: struct.unpack(
        "f", struct.pack("I", sign << 31 | exponent << 23 | fraction)
    )[0],
    st.integers(0, 253),
    st.sampled_from([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x10000, 0x7F7FFF, 0x7F8000, 0x7FFFFF]),
    st.integers(0, 1),
)


@given(st.lists(st.one_of(finite, edges), min_size=1, max_size=29))
def test_split_and_join_are_exact_and_round_to_nearest(values):
    # Catches: `+ 0x8000` dropped; `low_bits.int()` -> `low_bits.int() & 0xFFFF`.
    master = torch.tensor(values, dtype=torch.float32)
    weight, low_bits = split_bits(master)
    assert (weight.dtype, low_bits.dtype) == (torch.bfloat16, torch.int16)
    assert torch.equal(join_bits(weight, low_bits).view(torch.int32), master.view(torch.int32))
    tie = (
        master.view(torch.int32) & 0xFFFF
    ) == 0x8000  # torch rounds a tie to even, we away from 0; both are nearest
    distance, wanted = (
        (rounded.double() - master.double()).abs() for rounded in (weight, master.bfloat16())
    )
    assert torch.equal(distance, wanted)
    assert torch.equal(weight[~tie], master.bfloat16()[~tie])


def test_a_new_master_weight_equals_the_bf16_weight():
    weights = random_params(torch.bfloat16)
    assert_equal(masters(AdamW(weights, lr=1.0)), [p.detach().float() for p in weights])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [1, 5, 77, 1000])
def test_the_size_of_the_pieces_does_not_matter(piece, dtype, monkeypatch):
    # Catches: `gradient[piece]` -> `gradient[:size]`.
    whole, parts = random_params(dtype), random_params(dtype)
    wanted = AdamW(whole, **SETTINGS)
    wanted_changes = take_steps(wanted, whole, range(4))
    monkeypatch.setitem(module.PIECE, "cpu", piece)
    got = AdamW(parts, **SETTINGS)
    changes = take_steps(got, parts, range(4))
    assert_equal(parts, whole)
    assert_equal(got.state.values(), wanted.state.values())
    for a, b in zip(changes, wanted_changes, strict=True):
        assert a == pytest.approx(b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_that_becomes_nan_counts_as_changed(dtype):
    # Catches: `updated != master` -> `(updated - master).abs() > 0`.
    weight = torch.nn.Parameter(torch.ones(16, dtype=dtype))
    weight.grad = torch.zeros_like(weight)
    weight.grad[3] = torch.nan
    optimizer = AdamW([weight], lr=1e-3)
    assert changed_by_a_step(optimizer) == (1 / 16, 1 / 16)


def test_a_gradient_that_is_not_contiguous_is_read_correctly():
    ours, theirs = random_params(), random_params()
    for params, optimizer in (
        (ours, AdamW(ours, **SETTINGS)),
        (theirs, torch.optim.AdamW(theirs, **SETTINGS)),
    ):
        for p, g in zip(params, random_grads(0), strict=True):
            p.grad = g.flip(0).transpose(0, -1).contiguous().transpose(0, -1)
        optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_missing_gradient_counts_as_0(dtype):
    # Catches: parameters without a gradient skipped, so that momentum and decay do not move them.
    ours, theirs = random_params(dtype), random_params(dtype)
    optimizer, reference = AdamW(ours, **SETTINGS), AdamW(theirs, **SETTINGS)
    for params, stepper, missing in ((ours, optimizer, None), (theirs, reference, 0.0)):
        for step in range(3):
            for p, g in zip(params, random_grads(step, dtype), strict=True):
                p.grad = g
            if step > 0:
                params[1].grad = None if missing is None else torch.zeros_like(params[1])
            stepper.step()
            stepper.zero_grad()
    assert_equal(ours, theirs)
    assert_equal(optimizer.state.values(), reference.state.values())


# --- how many weights changed


def test_share_of_changed_weights_in_float32_by_hand():
    # Catches: `changed +=` -> `changed =`, which counts only the last piece.
    params = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))]
    optimizer = AdamW(params, lr=1e-3)
    params[0].grad = torch.tensor([1.0, 0.0, -2.0])
    assert changed_by_a_step(optimizer) == (0.25, 0.25)  # 2 of 8
    params[1].grad = torch.ones(5)
    assert changed_by_a_step(optimizer) == (0.875, 0.875)  # two by momentum, and five more


def test_share_of_changed_weights_in_bf16_by_hand():
    # Catches: the two shares swapped; `updated != master` -> `updated != weight`.
    # bf16 is spaced 2^-8 just below 1 and 2^-18 just below 2^-10. The first update is 2^-14.
    weights = nn.Parameter(torch.tensor([1.0, 1.0, 2**-10, 2**-10], dtype=torch.bfloat16))
    optimizer = AdamW([weights], lr=2**-14, eps=1e-12)
    weights.grad = torch.tensor([1.0, 0.0, 1.0, 0.0], dtype=torch.bfloat16)
    assert changed_by_a_step(optimizer) == (0.25, 0.5)
    weights.grad = None
    assert changed_by_a_step(optimizer) == (0.25, 0.5)
    optimizer.lr = 0.0
    assert changed_by_a_step(optimizer) == (
        0.0,
        0.0,
    )  # although the first master weight is between two bf16 values


# --- state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restored_state_continues_the_same_way(dtype, tmp_path):
    # Catches: `self.steps = saved["steps"]` dropped; low_bits left out of the state.
    whole, first = random_params(dtype), random_params(dtype)
    unbroken, stopped = AdamW(whole, **SETTINGS), AdamW(first, **SETTINGS)
    take_steps(unbroken, whole, range(7))
    take_steps(stopped, first, range(4))
    torch.save(stopped.state_dict(), tmp_path / "state.pt")
    resumed_params = [nn.Parameter(p.detach().clone()) for p in first]
    resumed = AdamW(resumed_params, **SETTINGS)
    resumed.load_state_dict(torch.load(tmp_path / "state.pt"))
    take_steps(resumed, resumed_params, range(4, 7))
    assert_equal(resumed_params, whole)
    assert_equal(resumed.state.values(), unbroken.state.values())


@pytest.mark.parametrize("change", ["dtype", "size", "missing"])
def test_the_state_of_another_model_is_an_error(change):
    # Catches: the comparison of shapes dropped; copy_ would broadcast a state of one element.
    saved = AdamW(
        random_params(torch.bfloat16 if change == "dtype" else torch.float32), lr=1.0
    ).state_dict()
    if change == "size":
        saved["exp_avg"] = torch.zeros(1)
    if change == "missing":
        del saved["exp_avg_sq"]
    optimizer = AdamW(random_params(), lr=1.0)
    with pytest.raises(ValueError, match="another model"):
        optimizer.load_state_dict(saved)
    assert optimizer.steps == 0


def test_mixed_or_unsupported_dtypes_are_an_error():
    for dtypes in ((torch.float32, torch.bfloat16), (torch.float16,)):
        with pytest.raises(ValueError, match="wanted all float32 or all bfloat16"):
            AdamW([nn.Parameter(torch.zeros(2, dtype=d)) for d in dtypes], lr=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_bytes_per_weight_match_the_state(dtype):
    params = random_params(dtype)
    state = AdamW(params, lr=1.0).state.values()
    elements = sum(-(-p.numel() // 64) * 64 for p in params)  # parameters start at multiples of 64
    assert sum(t.nbytes for t in state) == AdamW.state_bytes_per_weight(dtype) * elements


# --- offloading


def test_offload_has_no_effect_on_a_cpu():
    ours, offloaded = random_params(torch.bfloat16), random_params(torch.bfloat16)
    take_steps(AdamW(ours, **SETTINGS), ours, range(3))
    take_steps(AdamW(offloaded, **SETTINGS, offload=True), offloaded, range(3))
    assert_equal(offloaded, ours)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("piece", [5, 2**23])
def test_offload_gives_the_same_numbers_on_cuda(piece, dtype, monkeypatch):
    # Would catch: `down.wait_event(...)` dropped, so that a piece leaves before it is updated.
    monkeypatch.setitem(module.PIECE, "cuda", piece)  # 5: dozens of pieces pass through
    ours, offloaded = random_params(dtype, "cuda"), random_params(dtype, "cuda")
    resident, streamed = AdamW(ours, **SETTINGS), AdamW(offloaded, **SETTINGS, offload=True)
    assert take_steps(resident, ours, range(5)) == take_steps(streamed, offloaded, range(5))
    assert streamed.state["exp_avg"].device.type == "cpu"
    torch.cuda.synchronize()
    assert_equal(offloaded, ours)
    assert_equal(streamed.state.values(), [t.cpu() for t in resident.state.values()])


@pytest.mark.parametrize("index", [0, 2])
def test_a_parameter_that_has_moved_is_an_error(index):
    # Catches: only the first parameter checked; the others would silently keep their values.
    params = random_params()
    optimizer = AdamW(params, lr=1.0)
    params[index].data = params[index].detach().clone()
    with pytest.raises(ValueError, match="the weights have moved"):
        optimizer.step()
