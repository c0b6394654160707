"""Sampling follows the model's distribution, and scheduling does not change what is sampled."""

import gc
import math
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import CONFIG, RecordingProgress, random_model, random_tokens

import generate as module
from generate import (
    SamplingParams,
    count_slots,
    generate,
    generate_one,
    sample_tokens,
    scale_and_mask_,
)
from qwen2_model import KVCache

TEMPERATURE, VOCAB = 0.7, 89  # the head has 101 rows
STOP_IDS = frozenset([7, 31, 40, 50, 60])
PROMPTS = [
    random_tokens(n, seed=n, vocab_size=VOCAB).tolist() for n in (5, 1, 59, 17, 2)
]  # 59 + 23 crosses a KEY_BLOCK of 64
NUM_ANSWERS, MAX_GEN_LEN = 3, 23
SLOT_BYTES = KVCache.bytes_per_token(CONFIG, torch.float32) * (59 + MAX_GEN_LEN)


SAMPLING = SamplingParams(MAX_GEN_LEN, TEMPERATURE, VOCAB, STOP_IDS)


def log_probs(logits_PV, temperature, vocab_size):
    return torch.log_softmax(scale_and_mask_(logits_PV, temperature, vocab_size), dim=-1)


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
        progress=progress or RecordingProgress(),
    )


def slots_of(cache_bytes) -> int:
    return count_slots(random_model(), PROMPTS, SAMPLING, answers=15, cache_bytes=cache_bytes)


def assert_same_completions(got, wanted):
    assert [s.token_ids for s in got] == [s.token_ids for s in wanted]
    assert [s.is_finished for s in got] == [s.is_finished for s in wanted]
    for a, b in zip(got, wanted, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)
        assert a.entropy == pytest.approx(b.entropy, abs=1e-4)


def chi_square(counts, probs) -> tuple[float, float]:
    """The statistic, and the bound that it exceeds by chance once in 10,000 times.

    The bound is Wilson and Hilferty's approximation at z = 3.7.
    """
    total, used = sum(counts), [i for i, p in enumerate(probs) if p > 0]
    assert all(counts[i] == 0 for i in range(len(counts)) if i not in used)
    df = len(used) - 1
    return (
        sum((counts[i] - total * probs[i]) ** 2 / (total * probs[i]) for i in used),
        df * (1 - 2 / (9 * df) + 3.7 * math.sqrt(2 / (9 * df))) ** 3,
    )


# --- one token


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_logits_are_divided_by_the_temperature_and_masked(temperature):
    # Catches: `div_` -> `mul_`; the mask dropped; the mask on [vocab_size + 1:].
    logits_PV = 5 * torch.randn(7, 13, generator=torch.Generator().manual_seed(0))
    logits_PV[:, 11:] = 1e4  # rows beyond the tokenizer may hold anything
    wanted_PV = torch.log_softmax(logits_PV[:, :11] / temperature, dim=-1)
    got_PV = log_probs(logits_PV.clone(), temperature, 11)
    torch.testing.assert_close(got_PV[:, :11], wanted_PV)
    assert (got_PV[:, 11:].exp() == 0).all()
    assert (
        got_PV[:, 11:].exp() * got_PV[:, 11:] == 0
    ).all()  # not NaN, which would spoil the entropy


def test_sampled_tokens_follow_the_distribution():
    # Catches: a cumulative sum of something else than probabilities; ids shifted by one; one
    # uniform number used for all rows.
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
def test_extreme_uniform_numbers_sample_possible_ids(uniform):
    # Catches: right=True -> False, which samples id 0 at 0.0 even if it is impossible; the
    # factor `cumulative_RV[:, -1:]` dropped, so that a sum below 1 samples the last row of the
    # head.
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


def test_first_tokens_follow_the_distribution_of_the_model():
    # Catches: one uniform number for all answers to a prompt; no temperature in Decoder.step.
    model, prompt, draws = random_model(vocab_size=17), [3, 1, 4, 1, 5], 4000
    completions = run(
        model, [prompt], num_answers=draws, max_gen_len=1, vocab_size=13, stop_ids=frozenset([2])
    )
    with torch.no_grad():
        probs = torch.softmax(
            model(torch.tensor([prompt]))[0, -1, :13].double() / TEMPERATURE, dim=0
        ).tolist()
    counts = torch.bincount(
        torch.tensor([s.token_ids[0] for s in completions]), minlength=17
    ).tolist()
    assert sum(counts[13:]) == 0
    statistic, threshold = chi_square(counts, probs + [0] * 4)
    assert statistic < threshold


def test_ids_beyond_the_tokenizer_are_never_sampled():
    # Catches: the number of rows of the head passed as vocab_size.
    model = random_model()
    with torch.no_grad():
        model.lm_head.weight[VOCAB:] *= 1000
    completions = run(model, seed=1)
    assert max(max(s.token_ids) for s in completions) < VOCAB
    assert all(math.isfinite(x) and x > -50 for s in completions for x in s.logprobs)


def test_log_probabilities_and_entropy_equal_those_of_a_full_forward_pass():
    # Catches: `prompt[:-1]` -> `prompt` in prefill, so that the last token is cached twice; no
    # temperature; the entropy summed instead of averaged; `lengths_R + 2 * active_R`.
    model = random_model()
    completions = run(model)
    for i, s in enumerate(completions):
        prompt = PROMPTS[i // NUM_ANSWERS]
        with torch.no_grad():
            logits_SV = model(torch.tensor([prompt + s.token_ids]))[0, len(prompt) - 1 : -1, :VOCAB]
        logprobs_SV = torch.log_softmax(logits_SV / TEMPERATURE, dim=-1)
        wanted_S = logprobs_SV.gather(1, torch.tensor(s.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(s.logprobs), wanted_S, rtol=0, atol=1e-4)
        assert s.entropy == pytest.approx(
            -(logprobs_SV.exp() * logprobs_SV).sum(1).mean().item(), abs=1e-4
        )


def test_every_stop_id_ends_an_answer_and_so_does_the_budget():
    # Catches: `lengths_R + 1 >= ` -> `lengths_R >= `; only one stop id checked; is_finished also
    # for answers that ran out of budget.
    completions = run(num_answers=40)
    for s in completions:
        assert not STOP_IDS & set(s.token_ids[:-1])
        assert s.is_finished == (s.token_ids[-1] in STOP_IDS)
        assert len(s.token_ids) == MAX_GEN_LEN or s.is_finished
        assert 1 <= len(s.token_ids) == len(s.logprobs) <= MAX_GEN_LEN
    assert {s.token_ids[-1] for s in completions if s.is_finished} == STOP_IDS
    assert any(s.is_finished and len(s.token_ids) == MAX_GEN_LEN for s in completions)
    assert any(not s.is_finished for s in completions)


def test_without_stop_ids_only_the_budget_ends_an_answer():
    completions = run(stop_ids=frozenset(), max_gen_len=5)
    assert all(len(s.token_ids) == 5 and not s.is_finished for s in completions)


# --- scheduling


@pytest.mark.parametrize("slots", [1, 3, 7, 15])
def test_the_cache_budget_does_not_change_what_is_sampled(slots):
    # Catches: uniform numbers taken by slot; a slot that keeps the length of its former answer;
    # answers_R not moved together with the cache.
    every, few = RecordingProgress(), RecordingProgress()
    wanted = run(progress=every)
    budget = slots * SLOT_BYTES + SLOT_BYTES // 2
    got = run(cache_bytes=budget, progress=few)
    assert (slots_of(budget), slots_of(None)) == (slots, 15)
    assert_same_completions(got, wanted)
    tokens = sum(len(s.token_ids) for s in got)
    assert (
        few.counts["slot_steps"] == every.counts["slot_steps"] == tokens
    )  # no step for an answer that has ended


@pytest.mark.parametrize("slots", [1, 4, 15])
def test_generate_samples_what_generate_one_samples(slots):
    # Catches: a uniform number of another answer or position; the wrong token fed back.
    model, generator = random_model(), torch.Generator().manual_seed(0)
    uniforms_AG = torch.rand((len(PROMPTS) * NUM_ANSWERS + 1, MAX_GEN_LEN + 1), generator=generator)
    completions = run(model, cache_bytes=slots * SLOT_BYTES)
    assert len(completions) == 15
    for i, sample in enumerate(completions):
        assert (
            list(generate_one(model, PROMPTS[i // NUM_ANSWERS], SAMPLING, uniforms_AG[i]))
            == sample.token_ids
        )


def test_answers_do_not_depend_on_the_other_prompts():
    # Catches: one mask, that of the longest sequence, for all slots.
    wanted = run()
    for count in (1, 2):  # the first prompts keep their random numbers
        got = run(prompts=PROMPTS[:count])
        assert_same_completions(got, wanted[: count * NUM_ANSWERS])


def test_prefill_in_batches_gives_the_same(monkeypatch):
    # Catches: `extend(slots, ...)` -> `extend(slice(len(batch)), ...)` in prefill.
    wanted = run()
    monkeypatch.setattr(module, "PREFILL_TOKENS", 120)
    got = run()
    assert_same_completions(got, wanted)


@pytest.mark.parametrize(("interval", "round_to"), [(5, 4), (8, 8), (1, 4), (5, 1)])
@pytest.mark.parametrize("slots", [1, 3, 6, 15])
def test_rare_refills_and_rounded_batches_change_nothing(interval, round_to, slots, monkeypatch):
    # The schedule of CUDA, on the CPU. Catches: an ended answer that grows (`lengths_R + active_R`
    # -> `+ 1`) or resumes (`~active_R | ` dropped); a cache that is too short; gaps filled with
    # slots that have ended themselves.
    def fixed(value):  # a property overrides what __init__ assigns
        return property(lambda self: value, lambda self, assigned: None)

    class EagerGraphs:
        def step(self, decoder, slots):
            decoder.step(slots)

    names = {"interval": fixed(interval), "graphs": fixed(EagerGraphs())}
    seldom = type("Seldom", (module.Decoder,), names)
    wanted = run()
    monkeypatch.setattr(module, "Decoder", seldom)
    monkeypatch.setattr(module, "round_up_slots", lambda n: -(-n // round_to) * round_to)
    seen = RecordingProgress()
    got = run(cache_bytes=slots * SLOT_BYTES, progress=seen)
    assert_same_completions(got, wanted)
    slot_steps = seen.counts["slot_steps"]
    assert sum(len(s.token_ids) for s in got) < slot_steps or (interval == 1 and slots == 1)
    if slots % round_to == 0:
        assert slot_steps % (interval * round_to) == 0


@pytest.mark.parametrize("slots", [2, 15])
def test_progress_counts_prompts_and_finished_answers(slots):
    # Catches: `return len(ended) - alive` -> `return len(ended)`.
    seen = RecordingProgress()
    run(cache_bytes=slots * SLOT_BYTES, progress=seen)
    assert seen.phases == [("prefill", 5), ("decode", 15)]
    for name, total in seen.phases:
        assert sum(amount for part, amount in seen.updates if part == name) == total
    assert min(amount for _, amount in seen.updates) == 0


def test_the_generator_decides_what_is_sampled():
    assert_same_completions(run(), run())
    assert [s.token_ids for s in run(seed=1)] != [s.token_ids for s in run()]


def test_generate_leaves_no_gradient():
    model = random_model()
    run(model)
    assert all(p.grad is None for p in model.parameters())


# --- errors


def test_an_empty_prompt_is_an_error():
    with pytest.raises(ValueError, match="no tokens"):
        run(prompts=[[1, 2], []])


def test_a_prompt_that_is_too_long_is_an_error_that_says_what_fits():
    # Catches: `>` -> `>=`.
    prompt = random_tokens(500, vocab_size=VOCAB).tolist()
    with pytest.raises(
        ValueError,
        match=r"prompt 0 has 500 tokens; with an answer of max_gen_len=13 .*=512; .*max_gen_len=12",
    ):
        run(prompts=[prompt], max_gen_len=13)
    completions = run(prompts=[prompt], max_gen_len=12)
    assert len(completions) == NUM_ANSWERS


@pytest.mark.parametrize("cache_bytes", [0, SLOT_BYTES - 1])
def test_a_budget_too_small_for_one_answer_is_an_error(cache_bytes):
    with pytest.raises(
        ValueError, match=rf"cannot hold one answer: .* 82 tokens and take {SLOT_BYTES:,}"
    ):
        run(cache_bytes=cache_bytes)
    assert slots_of(SLOT_BYTES) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("slots", [1, 6, 15])
def test_cuda_samples_what_the_cpu_samples(slots):
    # Would catch: a CUDA graph replayed for another shape, or replayed without advancing
    # cache.longest.
    wanted = run()
    got = run(random_model().cuda(), cache_bytes=slots * SLOT_BYTES)
    assert_same_completions(got, wanted)


def test_the_cache_is_freed_without_the_garbage_collector(monkeypatch):
    # Catches: a reference cycle in Decoder, which would keep its cache during the update.
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
