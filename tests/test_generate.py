"""SamplingParams: what is drawn has the model's distribution, and scheduling changes none of it."""

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import CONFIG, Seen, random_model, random_tokens

import generate as module
from generate import (
    SamplingParams,
    count_slots,
    generate,
    generate_one,
    sample_tokens,
    sampling_logits,
)
from qwen2_model import KVCache

TEMPERATURE, VOCAB = 0.7, 89  # the head has 101 rows
STOP_IDS = frozenset([7, 31, 40, 50, 60])
PROMPTS = [
    random_tokens(n, seed=n, vocab_size=VOCAB).tolist() for n in (5, 1, 59, 17, 2)
]  # 59 + 23 crosses a SPAN of 64
NUM_ANSWERS, MAX_GEN_LEN = 3, 23
SLOT_BYTES = KVCache.bytes_per_token(CONFIG, torch.float32) * (59 + MAX_GEN_LEN)


SAMPLING = SamplingParams(MAX_GEN_LEN, TEMPERATURE, VOCAB, STOP_IDS)


def log_probs(logits_PV, temperature, vocab_size):
    return torch.log_softmax(sampling_logits(logits_PV, temperature, vocab_size), dim=-1)


def run(
    model=None,
    prompts=PROMPTS,
    *,
    seed=0,
    num_answers=NUM_ANSWERS,
    cache_bytes=None,
    progress=None,
    **changes,
):
    return generate(
        model or random_model(),
        prompts,
        replace(SAMPLING, **changes),
        num_answers=num_answers,
        generator=torch.Generator().manual_seed(seed),
        cache_bytes=cache_bytes,
        progress=progress or Seen(),
    )


def slots_of(cache_bytes) -> int:
    return count_slots(random_model(), PROMPTS, SAMPLING, answers=15, cache_bytes=cache_bytes)


def assert_same_samples(got, wanted):
    assert [s.token_ids for s in got] == [s.token_ids for s in wanted]
    assert [s.is_finished for s in got] == [s.is_finished for s in wanted]
    for a, b in zip(got, wanted, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert a.entropy == pytest.approx(b.entropy, abs=1e-4)


def chi_square(counts, probs) -> tuple[float, float]:
    """The statistic, and what chance exceeds about once in 10,000 (Wilson and Hilferty's cube, z = 3.7)."""
    total, used = sum(counts), [i for i, p in enumerate(probs) if p > 0]
    assert all(counts[i] == 0 for i in range(len(counts)) if i not in used)
    df = len(used) - 1
    return (
        sum((counts[i] - total * probs[i]) ** 2 / (total * probs[i]) for i in used),
        df * (1 - 2 / (9 * df) + 3.7 * math.sqrt(2 / (9 * df))) ** 3,
    )


# --- one draw


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_log_probs_are_the_log_softmax_of_the_real_entries(temperature):
    # Catches: `div_` -> `mul_`; the mask dropped; the mask on [vocab_size + 1:].
    logits_PV = 5 * torch.randn(7, 13, generator=torch.Generator().manual_seed(0))
    logits_PV[:, 11:] = 1e4  # rows without a token, with whatever training left there
    wanted_PV = torch.log_softmax(logits_PV[:, :11] / temperature, dim=-1)
    got_PV = log_probs(logits_PV.clone(), temperature, 11)
    torch.testing.assert_close(got_PV[:, :11], wanted_PV)
    assert (got_PV[:, 11:].exp() == 0).all()
    assert (got_PV[:, 11:].exp() * got_PV[:, 11:] == 0).all()  # as the entropy needs it: not NaN


def test_draws_have_the_distribution():
    # Catches: the cumulative sum of square roots of probabilities; ids shifted by one; the first uniform used for all rows.
    logits_V = torch.tensor([0.3, -2.0, 1.7, 0.0, -4.0, 2.2, 0.9, -1.0, 0.0, 50.0, 1e9])
    draws = 100_000
    log_probs_RV = log_probs(logits_V.repeat(draws, 1), 1.3, 9)
    uniform_R = torch.rand(draws, generator=torch.Generator().manual_seed(0))
    ids_R, logprobs_R, entropy_R = sample_tokens(
        log_probs_RV.clone(), uniform_R, log_probs_RV.shape[1]
    )
    probs_V = torch.softmax(logits_V[:9].double() / 1.3, dim=0)
    statistic, threshold = chi_square(
        torch.bincount(ids_R, minlength=11).tolist(), [*probs_V.tolist(), 0, 0]
    )
    assert statistic < threshold
    torch.testing.assert_close(logprobs_R, probs_V.log().float()[ids_R])
    torch.testing.assert_close(entropy_R, -(probs_V * probs_V.log()).sum().float().expand(draws))


@pytest.mark.parametrize("uniform", [0.0, 2**-24, 0.5, 1 - 2**-24])
def test_the_ends_of_the_uniform_draw_possible_ids(uniform):
    # Catches: right=True -> False, which draws id 0 at 0.0 however impossible it is; `cdf_RV[:, -1:]` dropped, which
    # lets a sum below 1 draw the last row of the head.
    generator = torch.Generator().manual_seed(0)
    logits_RV = 3 * torch.randn(500, 997, generator=generator)
    logits_RV[:, :3] = -1e30
    ids_R, logprobs_R, _ = sample_tokens(
        log_probs(logits_RV, 1.0, 977), torch.full((500,), uniform), 977
    )
    assert (ids_R >= 3).all()
    assert (ids_R < 977).all()
    assert (logprobs_R > -100).all()


# --- whole answers


def test_first_tokens_have_the_models_distribution():
    # Catches: one uniform shared by all answers of a prompt; temperature dropped in _step.
    model, prompt, draws = random_model(vocab_size=17), [3, 1, 4, 1, 5], 4000
    samples = run(
        model, [prompt], num_answers=draws, max_gen_len=1, vocab_size=13, stop_ids=frozenset([2])
    )
    with torch.no_grad():
        probs = torch.softmax(
            model(torch.tensor([prompt]))[0, -1, :13].double() / TEMPERATURE, dim=0
        ).tolist()
    counts = torch.bincount(torch.tensor([s.token_ids[0] for s in samples]), minlength=17).tolist()
    assert sum(counts[13:]) == 0
    statistic, threshold = chi_square(counts, probs + [0] * 4)
    assert statistic < threshold


def test_ids_beyond_the_vocabulary_are_never_drawn():
    # Catches: vocab_size not handed to log_probs (the head's own number of rows in its place).
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 1000
    samples = run(model, seed=1)
    assert max(max(s.token_ids) for s in samples) < VOCAB
    assert all(math.isfinite(x) and x > -50 for s in samples for x in s.logprobs)


def test_log_probabilities_and_entropy_equal_those_of_a_full_forward():
    # Catches: `p[:-1]` -> `p[-longest:]` in prefill, so that a prompt's last token stands in the cache twice;
    # log-probabilities of the untempered logits; the entropy summed instead of averaged; `lengths_R + 2 * active_R`.
    model = random_model()
    samples = run(model)
    for i, s in enumerate(samples):
        prompt = PROMPTS[i // NUM_ANSWERS]
        with torch.no_grad():
            logits_SV = model(torch.tensor([prompt + s.token_ids]))[0, len(prompt) - 1 : -1, :VOCAB]
        logprobs_SV = torch.log_softmax(logits_SV / TEMPERATURE, dim=-1)
        wanted_S = logprobs_SV.gather(1, torch.tensor(s.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(s.logprobs), wanted_S, rtol=0, atol=1e-4)
        assert s.entropy == pytest.approx(
            -(logprobs_SV.exp() * logprobs_SV).sum(1).mean().item(), abs=1e-4
        )


def test_every_stop_id_stops_and_nothing_outlives_the_budget():
    # Catches: `lengths_R + 1 >= max_gen_len` -> `lengths_R >= max_gen_len`; only the smallest stop id looked at;
    # is_finished for every row that ended.
    samples = run(num_answers=40)
    for s in samples:
        assert not STOP_IDS & set(s.token_ids[:-1])
        assert s.is_finished == (s.token_ids[-1] in STOP_IDS)
        assert len(s.token_ids) == MAX_GEN_LEN or s.is_finished
        assert 1 <= len(s.token_ids) == len(s.logprobs) <= MAX_GEN_LEN
    assert {s.token_ids[-1] for s in samples if s.is_finished} == STOP_IDS
    assert any(s.is_finished and len(s.token_ids) == MAX_GEN_LEN for s in samples)
    assert any(not s.is_finished for s in samples)


def test_nothing_but_the_budget_ends_an_answer_without_stop_ids():
    samples = run(stop_ids=frozenset(), max_gen_len=5)
    assert all(len(s.token_ids) == 5 and not s.is_finished for s in samples)


# --- scheduling


@pytest.mark.parametrize("slots", [1, 3, 7, 15])
def test_the_cache_budget_changes_nothing(slots):
    # Catches: uniforms that belong to the slot; a row that takes over a slot and keeps its predecessor's length; answers_R not
    # moved with its cache.
    every, few = Seen(), Seen()
    wanted = run(progress=every)
    budget = slots * SLOT_BYTES + SLOT_BYTES // 2
    got = run(cache_bytes=budget, progress=few)
    assert (slots_of(budget), slots_of(None)) == (slots, 15)
    assert_same_samples(got, wanted)
    tokens = sum(len(s.token_ids) for s in got)
    assert (
        few.counts["row_steps"] == every.counts["row_steps"] == tokens
    )  # no step for a row that has ended


@pytest.mark.parametrize("slots", [1, 4, 15])
def test_many_answers_are_drawn_as_one_is(slots):
    # Catches: a draw from the wrong row of the table of uniforms, or one column late (`ids_AG[answers_R, lengths_R]` -> `0`).
    model, generator = random_model(), torch.Generator().manual_seed(0)
    uniforms_AG = torch.rand((len(PROMPTS) * NUM_ANSWERS + 1, MAX_GEN_LEN + 1), generator=generator)
    samples = run(model, cache_bytes=slots * SLOT_BYTES)
    assert len(samples) == 15
    for i, sample in enumerate(samples):
        assert (
            list(generate_one(model, PROMPTS[i // NUM_ANSWERS], SAMPLING, uniforms_AG[i]))
            == sample.token_ids
        )


def test_answers_do_not_depend_on_the_other_prompts():
    # Catches: a mask as wide as the longest row's for all rows.
    wanted = run()
    for count in (1, 2):  # random numbers come answer by answer, so the first prompts keep theirs
        got = run(prompts=PROMPTS[:count])
        assert_same_samples(got, wanted[: count * NUM_ANSWERS])


def test_prompts_go_through_the_model_in_batches(monkeypatch):
    # Catches: `extend(rows, ...)` -> `extend(slice(len(part)), ...)` in prefill.
    wanted = run()
    monkeypatch.setattr(module, "PREFILL_TOKENS", 120)
    got = run()
    assert_same_samples(got, wanted)


@pytest.mark.parametrize(("interval", "round_to"), [(5, 4), (8, 8), (1, 4), (5, 1)])
@pytest.mark.parametrize("slots", [1, 3, 6, 15])
def test_looking_seldom_and_rounding_rows_up_changes_nothing(
    interval, round_to, slots, monkeypatch
):
    # What CUDA does, on the CPU. Catches: an ended row that goes on growing (`lengths_R + active_R` -> `+ 1`) or wakes up
    # (`~active_R | ` dropped); a cache too short; holes closed with slots that have ended themselves.
    def fixed(value):  # a property goes before what __init__ assigns to the same name
        return property(lambda self: value, lambda self, assigned: None)

    class EagerGraphs:
        def step(self, decoder, slots):
            decoder.step(slots)

    names = {"interval": fixed(interval), "graphs": fixed(EagerGraphs())}
    seldom = type("Seldom", (module.Decoder,), names)
    wanted = run()
    monkeypatch.setattr(module, "Decoder", seldom)
    monkeypatch.setattr(module, "round_up_slots", lambda n: -(-n // round_to) * round_to)
    seen = Seen()
    got = run(cache_bytes=slots * SLOT_BYTES, progress=seen)
    assert_same_samples(got, wanted)
    row_steps = seen.counts["row_steps"]
    assert sum(len(s.token_ids) for s in got) < row_steps or (interval == 1 and slots == 1)
    if slots % round_to == 0:
        assert row_steps % (interval * round_to) == 0


@pytest.mark.parametrize("slots", [2, 15])
def test_progress_counts_prompts_and_ended_answers(slots):
    # Catches: `return len(ended) - alive` -> `return len(ended)`.
    seen = Seen()
    run(cache_bytes=slots * SLOT_BYTES, progress=seen)
    assert seen.phases == [("prefill", 5), ("decode", 15)]
    for name, total in seen.phases:
        assert sum(amount for part, amount in seen.updates if part == name) == total
    assert min(amount for _, amount in seen.updates) == 0


def test_the_generator_decides():
    assert_same_samples(run(), run())
    assert [s.token_ids for s in run(seed=1)] != [s.token_ids for s in run()]


def test_weights_keep_no_graph():
    model = random_model()
    run(model)
    assert all(p.grad is None for p in model.parameters())


# --- refusals


def test_an_empty_prompt_is_refused():
    with pytest.raises(ValueError, match="no tokens"):
        run(prompts=[[1, 2], []])


def test_a_prompt_too_long_for_the_model_says_what_would_fit():
    # Catches: `>` -> `>=`.
    prompt = random_tokens(500, vocab_size=VOCAB).tolist()
    with pytest.raises(
        ValueError,
        match=r"prompt 0 has 500 tokens; with an answer of max_gen_len=13 .*=512; .*max_gen_len=12",
    ):
        run(prompts=[prompt], max_gen_len=13)
    samples = run(prompts=[prompt], max_gen_len=12)
    assert len(samples) == NUM_ANSWERS


@pytest.mark.parametrize("cache_bytes", [0, SLOT_BYTES - 1])
def test_a_budget_without_room_for_a_row_says_what_one_takes(cache_bytes):
    with pytest.raises(ValueError, match=rf"hold no answer: .* 82 tokens, take {SLOT_BYTES:,}"):
        run(cache_bytes=cache_bytes)
    assert slots_of(SLOT_BYTES) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [1, 6, 15])
def test_cuda_draws_what_the_cpu_draws(slots):
    # Would catch: a CUDA graph replayed for another shape, or replayed without the span growing.
    wanted = run()
    got = run(random_model().cuda(), cache_bytes=slots * SLOT_BYTES)
    assert_same_samples(got, wanted)


def test_the_cache_is_freed_without_the_garbage_collector(monkeypatch):
    # Catches: a decoder that holds a bound method of its own; on a GPU its cache would still stand during the update.
    caches = []
    plain = KVCache.__init__

    def remember(self, *args, **kwargs):
        plain(self, *args, **kwargs)
        caches.append(weakref.ref(self))

    monkeypatch.setattr(KVCache, "__init__", remember)
    gc.collect()
    gc.disable()
    try:
        run()
        assert caches
        assert all(cache() is None for cache in caches)
    finally:
        gc.enable()
