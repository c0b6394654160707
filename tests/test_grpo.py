"""Advantages against values worked by hand, whole updates against a loop from the equation."""

import math
import statistics
from dataclasses import replace
from functools import cache

import pytest
import torch
from helpers import (
    RecordingProgress,
    episode,
    random_model,
    random_tokens,
    reference_model,
    write_word_tokenizer,
)
from hypothesis import given
from hypothesis import strategies as st

import grpo
from countdown_task import render_prompt
from data_types import Episode, Question, Reward
from generate import SamplingParams, generate_one
from grpo import (
    episode_advantages,
    group_advantages,
    rollout,
    token_logprobs,
    update_policy,
)
from optimizer import AdamW
from qwen2_model import Transformer
from tokenizer import Tokenizer

TEMPERATURE, VOCAB = 0.7, 89  # the head has 101 rows


class Recorder:
    """An optimizer that keeps the gradient and leaves the weights alone."""

    def __init__(self, model):
        self.model, self.gradient = model, None

    def step(self):
        self.gradient = {n: p.grad.clone() for n, p in self.model.named_parameters()}

    def zero_grad(self):
        self.model.zero_grad()


# --- advantages


def test_advantages_by_hand():
    # Catches: correction=0 -> 1; eps 1e-4 -> 1e-8; the mean of the batch instead of the group.
    rewards_NM = torch.tensor([[1.0, 0.0, 0.0, 0.0], [3.0, 5.0, 3.0, 5.0]])
    std = math.sqrt(3) / 4  # of (1, 0, 0, 0) about 1/4: sqrt((9/16 + 3/16) / 4)
    wanted = [
        [0.75 / (std + 1e-4), *[-0.25 / (std + 1e-4)] * 3],
        [-1 / 1.0001, 1 / 1.0001, -1 / 1.0001, 1 / 1.0001],
    ]
    advantages_NM = group_advantages(rewards_NM)
    assert advantages_NM.dtype == torch.float32
    torch.testing.assert_close(advantages_NM, torch.tensor(wanted), rtol=1e-6, atol=0)
    assert group_advantages(rewards_NM, eps=1.0)[1, 1] == 0.5


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.1, 1 / 3, -7.7, 1e-30])
@pytest.mark.parametrize("answers", [2, 3, 7, 8, 1000])
def test_equal_rewards_give_advantages_of_exactly_0(reward, answers):
    # Catches: masked_fill dropped. The mean that torch computes of 8 times 0.1 is not 0.1.
    equal, unequal = [reward] * answers, [0.0] * (answers - 1) + [1.0]
    assert torch.equal(group_advantages(torch.tensor([equal])), torch.zeros(1, answers))
    advantages_NM = group_advantages(torch.tensor([equal, unequal]))
    assert torch.equal(advantages_NM[0], torch.zeros(answers))
    assert (advantages_NM[1] != 0).all()  # the other group keeps its advantages


@given(st.lists(st.sampled_from([0.0, 0.1, 1.0, 1.1]), min_size=2, max_size=17))
def test_advantages_equal_the_statistics_module(rewards):
    # Catches: the median instead of the mean; correction=0 -> 1.
    mean, std = statistics.fmean(rewards), statistics.pstdev(rewards)
    wanted = (
        [(r - mean) / (std + 1e-4) for r in rewards]
        if len(set(rewards)) > 1
        else [0.0] * len(rewards)
    )
    assert group_advantages(torch.tensor([rewards]))[0].tolist() == pytest.approx(
        wanted, rel=1e-5, abs=1e-5
    )


@pytest.mark.parametrize("shape", [(3, 1), (3, 0), (3,)])
def test_a_group_of_one_is_an_error(shape):
    with pytest.raises(ValueError, match="at least 2 answers"):
        group_advantages(torch.zeros(shape))


def test_groups_follow_question_ids_in_any_order():
    # Catches: groups by prompt, which would merge the questions 5 and 2.
    episodes = [
        episode(q, [1, 2], [3], r)
        for q, r in [(5, 1.0), (2, 0.0), (5, 1.0), (2, 0.0), (7, 0.0), (7, 2.0)]
    ]
    assert episode_advantages(episodes) == pytest.approx([0, 0, 0, 0, -1 / 1.0001, 1 / 1.0001])


# --- the gradient of an update


def batch(ragged: bool) -> list[Episode]:
    """Five groups of 2 to 5 answers, not in order.

    One group has equal rewards, two have equal prompts, and some answers are cut off.
    """
    plan = [
        (0, 1.1),
        (3, 0.0),
        (1, 0.1),
        (0, 0.0),
        (4, 1.0),
        (2, 1.0),
        (1, 0.1),
        (0, 0.1),
        (3, 1.0),
        (2, 0.0),
        (4, 0.0),
        (0, 0.0),
        (1, 0.1),
        (2, 0.0),
        (0, 1.0),
        (4, 0.1),
    ]
    prompts = [
        random_tokens(n, seed=n).tolist()
        for n in ((11, 1, 5, 11, 17) if ragged else (7, 7, 7, 7, 7))
    ]
    prompts[3] = prompts[0]
    episodes = []
    for i, (q, reward) in enumerate(plan):
        length = 1 + 5 * i % 13 if ragged else 5
        response = random_tokens(length, seed=100 + i, vocab_size=VOCAB).tolist()
        episodes.append(episode(q, prompts[q], response, reward, finished=i % 4 != 3))
    return episodes


@cache
def naive_gradient(
    tied: bool, ragged: bool, skip_unfinished: bool, temperature=TEMPERATURE, vocab_size=VOCAB
):
    """The loss as in the equation, one episode at a time, with transformers and autograd."""
    model, episodes = reference_model(random_model(tied=tied)), batch(ragged)
    mask = [0 if skip_unfinished and not e.is_finished else 1 for e in episodes]
    num_tokens = sum(m * len(e.response_token_ids) for m, e in zip(mask, episodes, strict=True))
    total = 0.0
    for m, e in zip(mask, episodes, strict=True):
        group = [other.reward.total for other in episodes if other.question_id == e.question_id]
        advantage = (e.reward.total - statistics.fmean(group)) / (statistics.pstdev(group) + 1e-4)
        if len(set(group)) == 1:
            advantage = 0.0
        tokens = e.prompt_token_ids + e.response_token_ids
        logits_SV = model(torch.tensor([tokens])).logits[0, :, :vocab_size] / temperature
        logprobs_SV = torch.log_softmax(logits_SV, dim=-1)
        for t in range(len(e.prompt_token_ids), len(tokens)):
            total = total - m * advantage * logprobs_SV[t - 1, tokens[t]] / num_tokens
    total.backward()
    return total.item(), num_tokens, {n: p.grad for n, p in model.named_parameters()}


def assert_same_gradient(got: dict, wanted: dict):
    largest = max(g.norm() for g in wanted.values())
    assert set(got) == set(wanted)
    for name, gradient in wanted.items():
        difference = (got[name] - gradient).norm()
        if name.endswith(
            "k_proj.bias"
        ):  # a shift of all keys cancels in the softmax: the true gradient is 0
            assert difference < 1e-6 * largest, name
        else:
            assert gradient.norm() > 1e-4 * largest, (
                name
            )  # otherwise the next line compares rounding errors
            assert difference < 1e-5 * gradient.norm(), name


@pytest.mark.parametrize("skip_unfinished", [False, True], ids=["all", "finished"])
@pytest.mark.parametrize("ragged", [False, True], ids=["equal lengths", "ragged"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize(
    ("micro_batch_tokens", "chunk_tokens", "recompute_layers"),
    [(1, 1000, 0), (29, 1000, 0), (47, 7, 2), (8192, 3, 0), (8192, 1000, 3)],
)
def test_update_gradient_equals_a_naive_loop(
    micro_batch_tokens, chunk_tokens, recompute_layers, tied, ragged, skip_unfinished, monkeypatch
):
    # Catches: num_tokens counted over `answers` instead of `kept`, or per micro-batch; advantages
    # computed after the filter; `/ ctx.temperature` dropped; `logits_PV[:, vocab_size:] = MASKED`
    # dropped; logit_positions_P off by one; positions of an answer that start at 0; an answer that
    # does not see its prompt; a chunk that overwrites the gradient of earlier chunks.
    monkeypatch.setitem(grpo.LOGIT_CHUNK_BYTES, "cpu", chunk_tokens * 4 * 101)
    model = random_model(tied=tied)
    recorder = Recorder(model)
    stats = update_policy(
        model,
        recorder,
        batch(ragged),
        max_grad_norm=math.inf,
        skip_unfinished=skip_unfinished,
        temperature=TEMPERATURE,
        vocab_size=VOCAB,
        micro_batch_tokens=micro_batch_tokens,
        recompute_layers=recompute_layers,
    )
    loss, num_tokens, gradient = naive_gradient(tied, ragged, skip_unfinished)
    assert_same_gradient(recorder.gradient, gradient)
    assert stats.loss == pytest.approx(loss, rel=1e-5)
    assert stats.num_tokens == num_tokens
    assert stats.grad_norm == pytest.approx(
        math.sqrt(sum(g.square().sum().item() for g in gradient.values())), rel=1e-5
    )
    assert not stats.skipped


def test_defaults_are_temperature_1_and_the_whole_head():
    # Catches: temperature=1.0 -> 0.7 in the signature of update_policy.
    model = random_model()
    recorder = Recorder(model)
    update_policy(model, recorder, batch(True), max_grad_norm=math.inf, skip_unfinished=False)
    assert_same_gradient(
        recorder.gradient, naive_gradient(False, True, False, temperature=1.0, vocab_size=101)[2]
    )


def test_one_optimizer_step_is_taken_and_the_gradient_is_freed():
    # Catches: optimizer.step() for every micro-batch; optimizer.zero_grad() dropped.
    model, before = random_model(), random_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    update_policy(
        model,
        optimizer,
        batch(True),
        max_grad_norm=math.inf,
        skip_unfinished=False,
        temperature=TEMPERATURE,
        vocab_size=VOCAB,
        micro_batch_tokens=29,
    )
    gradient = naive_gradient(False, True, False)[2]
    for (name, after), start in zip(model.named_parameters(), before.parameters(), strict=True):
        assert after.grad is None
        torch.testing.assert_close(start - after, gradient[name], rtol=1e-3, atol=1e-6)


def test_clipping_scales_the_gradient_and_reports_the_norm_before():
    # Catches: `parameter.grad.mul_` dropped; the norm computed after clipping.
    model = random_model()
    recorder = Recorder(model)
    stats = update_policy(
        model,
        recorder,
        batch(True),
        max_grad_norm=0.125,
        skip_unfinished=False,
        temperature=TEMPERATURE,
        vocab_size=VOCAB,
    )
    gradient = naive_gradient(False, True, False)[2]
    norm = math.sqrt(sum(g.square().sum().item() for g in gradient.values()))
    assert stats.grad_norm == pytest.approx(norm, rel=1e-5)
    assert norm > 0.25
    assert_same_gradient(recorder.gradient, {n: g * 0.125 / norm for n, g in gradient.items()})


def test_progress_counts_each_prompt_once_per_group():
    # Catches: the prompt packed again for every answer.
    model, seen = random_model(), RecordingProgress()
    episodes = [episode(q, [1] * 5, [2] * 3, r) for q in (0, 1) for r in (0.0, 1.0, 1.0)]
    update_policy(
        model, Recorder(model), episodes, max_grad_norm=1.0, skip_unfinished=False, progress=seen
    )
    assert seen.phases == [("gradient", 28), ("optimizer", 1)]
    assert seen.updates == [("gradient", 2 * (5 + 3 * 3))]


@pytest.mark.parametrize(
    ("change", "skip_unfinished", "reason"),
    [
        (lambda e: replace(e, is_finished=False), True, "no answer is finished"),
        (lambda e: replace(e, reward=Reward(0.1, {})), False, "advantage 0"),
        (
            lambda e: replace(e, is_finished=e.question_id == 1),
            True,
            "advantage 0",
        ),  # the group with equal rewards
    ],
)
def test_without_anything_to_learn_the_step_is_skipped(change, skip_unfinished, reason):
    # Catches: `if not answers` dropped. AdamW would move the weights by decay and momentum.
    model, before = random_model(), random_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    update = {"max_grad_norm": 1.0, "temperature": TEMPERATURE, "vocab_size": VOCAB}
    update_policy(
        model, optimizer, batch(True), skip_unfinished=False, **update
    )  # now there is momentum
    before.load_state_dict(model.state_dict())
    episodes = [change(e) for e in batch(True)]
    stats = update_policy(model, optimizer, episodes, skip_unfinished=skip_unfinished, **update)
    assert reason in stats.skipped
    assert (stats.loss, stats.grad_norm) == (0.0, 0.0)
    assert stats.num_tokens == sum(
        len(e.response_token_ids) for e in episodes if e.is_finished or not skip_unfinished
    )
    for after, start in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(after, start)
    assert {int(s["step"]) for s in optimizer.state.values()} == {1}


def test_equal_questions_with_different_ids_stay_two_groups():
    # Catches: groups.setdefault(tuple(episode.prompt_token_ids), ...).
    prompt = [4, 5, 6]
    episodes = [episode(q, prompt, [7, 8, 9], float(q)) for q in (0, 1, 0, 1)]
    model = random_model()
    stats = update_policy(
        model, Recorder(model), episodes, max_grad_norm=1.0, skip_unfinished=False
    )
    assert "advantage 0" in stats.skipped


# --- numbers that are not finite


def assert_no_step(model, episodes, **changes):
    """Run an update that must leave weights, gradients and optimizer alone; return its stats."""
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    stats = update_policy(
        model, optimizer, episodes, max_grad_norm=1.0, skip_unfinished=False, **changes
    )
    assert not optimizer.state
    assert all(p.grad is None for p in model.parameters())
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    return stats


@pytest.mark.parametrize(
    "damage",
    [
        lambda e: replace(e, reward=Reward(math.nan, {})),
        lambda e: replace(e, reward=Reward(math.inf, {})),
        lambda e: replace(e, response_logprobs=[*e.response_logprobs[:-1], -math.inf]),
    ],
)
def test_a_non_finite_episode_skips_the_step_and_is_named(damage):
    # Catches: only rewards or only log-probabilities checked; a loss of 0 in the stats.
    episodes = batch(True)
    episodes[9] = damage(episodes[9])
    stats = assert_no_step(random_model(), episodes)
    assert "not finite" in stats.skipped
    assert stats.broken_questions == [2]
    assert all(
        map(
            math.isnan,
            (stats.loss, stats.grad_norm, stats.logprob_diff_mean, stats.logprob_diff_max),
        )
    )


def test_non_finite_weights_skip_the_step_and_name_the_question():
    # Catches: the check after optimizer.step(); all questions named instead of one.
    model = random_model()
    episodes = [
        episode(q, [90 + q, 1, 2], [3, 4, 5 + j], float(j)) for q in (3, 5, 7) for j in range(2)
    ]
    with torch.no_grad():
        model.model.embed_tokens.weight[95] = math.nan  # a token that only question 5 has
    stats = assert_no_step(model, episodes, micro_batch_tokens=9)
    assert "not finite" in stats.skipped
    assert stats.broken_questions == [5]
    assert math.isnan(stats.loss)


def test_a_gradient_of_0_skips_the_step(monkeypatch):
    # Catches: optimizer.step() on zeros, which moves the weights by momentum.
    plain = grpo.policy_logprobs
    monkeypatch.setattr(grpo, "policy_logprobs", lambda *a, **k: 0.0 * plain(*a, **k))
    stats = assert_no_step(random_model(), batch(True))
    assert stats.skipped == "the gradient is 0"
    assert (stats.loss, stats.grad_norm) == (0.0, 0.0)


def test_a_non_finite_gradient_skips_the_step():
    # Catches: only the loss checked.
    model = random_model()
    model.model.norm.weight.register_hook(lambda gradient: gradient * math.inf)
    stats = assert_no_step(model, batch(True))
    assert "not finite" in stats.skipped
    assert stats.broken_questions == [0, 2, 3, 4]  # one of those that were run
    assert math.isfinite(stats.loss)  # reported as computed
    assert not math.isfinite(stats.grad_norm)


def test_an_interrupted_update_leaves_nothing_for_the_next():
    # Catches: `zero_gradient` dropped.
    model = random_model()
    recorder = Recorder(model)

    class Interrupting(RecordingProgress):
        def update(self, n=0, **counts):
            raise KeyboardInterrupt

    update = {
        "max_grad_norm": math.inf,
        "skip_unfinished": False,
        "temperature": TEMPERATURE,
        "vocab_size": VOCAB,
    }
    with pytest.raises(KeyboardInterrupt):
        update_policy(
            model, recorder, batch(True), micro_batch_tokens=29, progress=Interrupting(), **update
        )
    assert recorder.gradient is None
    update_policy(model, recorder, batch(True), **update)
    assert_same_gradient(recorder.gradient, naive_gradient(False, True, False)[2])


# --- log-probabilities of tokens

TARGETS_P = torch.tensor([0, 3, 10, 3, 9, 1, 1])


def hidden_and_head(dtype=torch.float64) -> list[torch.Tensor]:
    """7 tokens, hidden size 5, a head of 13 rows for a vocabulary of 11."""
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(n, 5, generator=generator, dtype=torch.float64) for n in (7, 13)]
    return [x.to(dtype).requires_grad_() for x in tensors]


def plain_logprobs(hidden_PE, head_VE, temperature=0.6):
    logits_PV = (hidden_PE @ head_VE.t())[:, :11] / temperature
    return torch.log_softmax(logits_PV, dim=-1)[torch.arange(7), TARGETS_P]


def chunked_logprobs(hidden_PE, head_VE, temperature=0.6):
    return token_logprobs(hidden_PE, head_VE, TARGETS_P, temperature=temperature, vocab_size=11)


@pytest.mark.parametrize("chunk_tokens", [1, 3, 100])
def test_token_logprobs_pass_gradcheck(chunk_tokens, monkeypatch):
    # Catches: `mul_(-grad_C1)` -> `mul_(grad_C1)`; `/ ctx.temperature` dropped; a chunk that
    # overwrites what earlier chunks added to the gradient of the head.
    monkeypatch.setitem(grpo.LOGIT_CHUNK_BYTES, "cpu", chunk_tokens * 4 * 13)
    hidden_PE, head_VE = hidden_and_head()
    assert torch.autograd.gradcheck(chunked_logprobs, (hidden_PE, head_VE))
    wanted_P = plain_logprobs(hidden_PE, head_VE)
    torch.testing.assert_close(chunked_logprobs(hidden_PE, head_VE), wanted_P)


def test_large_chunks_are_multiples_of_128_tokens(monkeypatch):
    # Catches: a chunk of 263 tokens, for which a GPU computes three tiles of 128.
    monkeypatch.setitem(grpo.LOGIT_CHUNK_BYTES, "cpu", 263 * 4 * 13)
    head_VE = torch.empty(13, 5)
    assert [c.stop - c.start for c in grpo._chunks(600, head_VE)] == [256, 256, 88]
    first = next(grpo._chunks(600, torch.empty(40, 5)))
    assert first == slice(0, 85)


def test_token_logprobs_are_an_ordinary_expression():
    # Catches: a gradient that is computed in forward, or added to .grad on the side.
    weight_P = torch.linspace(-2, 3, 7, dtype=torch.float64)

    def loss(logprobs_P):  # not linear in the log-probabilities
        return (weight_P * logprobs_P.exp()).sum() * 3 + logprobs_P.square().mean()

    inputs = hidden_and_head()
    wanted = torch.autograd.grad(loss(plain_logprobs(*inputs)), inputs)
    for tensor in inputs:
        tensor.grad = torch.full_like(tensor, 5.0)
    with torch.no_grad():
        chunked_logprobs(*inputs)
    loss(chunked_logprobs(*inputs)).backward()
    for tensor, gradient in zip(inputs, wanted, strict=True):
        torch.testing.assert_close(tensor.grad - 5.0, gradient)


@pytest.mark.parametrize("chunk_bytes", [1, 10**6])
def test_token_logprobs_of_a_bf16_head_are_computed_in_float32(chunk_bytes, monkeypatch):
    # On CUDA the product returns float32. Catches: softmax in bf16; `max(1, ...)` -> `max(0, ...)`
    # where the logits of one token exceed a chunk.
    monkeypatch.setitem(grpo.LOGIT_CHUNK_BYTES, "cpu", chunk_bytes)
    monkeypatch.setattr(
        grpo, "head_logits", lambda hidden, weight: hidden.float() @ weight.float().t()
    )
    hidden_PE, head_VE = hidden_and_head(torch.bfloat16)
    weight_P = torch.linspace(-2, 3, 7)
    logprobs_P = chunked_logprobs(hidden_PE, head_VE)
    (weight_P * logprobs_P).sum().backward()
    exact = [x.detach().double().requires_grad_() for x in (hidden_PE, head_VE)]
    wanted_P = plain_logprobs(*exact)
    (weight_P * wanted_P).sum().backward()
    assert logprobs_P.dtype == torch.float32
    torch.testing.assert_close(logprobs_P.double(), wanted_P, rtol=1e-5, atol=1e-5)
    for x, x_exact in zip((hidden_PE, head_VE), exact, strict=True):
        assert float((x.grad.double() - x_exact.grad).norm() / x_exact.grad.norm()) < 0.01


# --- rollout and update together


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    directory = tmp_path_factory.mktemp("words")
    return Tokenizer.from_pretrained(
        write_word_tokenizer(directory, size=VOCAB, stop_ids=[7, 31, 40, 41, 50, 60])
    )


def sample_episodes(
    model,
    tokenizer,
    *,
    temperature=0.8,
    reward=lambda text, **problem: Reward(float(len(text) % 3), {}),
):
    prompts = [random_tokens(n, seed=n, vocab_size=VOCAB).tolist() for n in (3, 11, 1)]
    questions = [
        Question("", prompt, {"numbers": [len(prompt)], "target": prompt[0]}) for prompt in prompts
    ]
    episodes = rollout(
        model,
        tokenizer,
        questions,
        num_answers=5,
        max_gen_len=23,
        temperature=temperature,
        reward_function=reward,
        generator=torch.Generator().manual_seed(0),
    )
    return questions, episodes


def test_rollout_scores_every_answer_in_order(tokenizer):
    # Catches: `i // num_answers` -> `i % len(questions)`; the stop token left in the text; the last
    # token cut from unfinished answers too.
    calls = []

    def reward(text, *, numbers, target):
        calls.append((text, numbers, target))
        return Reward(len(calls) / 7, {"format": 1.0})

    questions, episodes = sample_episodes(random_model(), tokenizer, reward=reward)
    assert [e.question_id for e in episodes] == [0] * 5 + [1] * 5 + [2] * 5
    for i, e in enumerate(episodes):
        assert e.prompt_token_ids == questions[i // 5].prompt_token_ids
        assert calls[i] == (
            e.text,
            questions[i // 5].problem["numbers"],
            questions[i // 5].problem["target"],
        )
        assert e.reward == Reward((i + 1) / 7, {"format": 1.0})
        assert e.is_finished == (e.response_token_ids[-1] in tokenizer.stop_ids)
        said = e.response_token_ids[:-1] if e.is_finished else e.response_token_ids
        assert e.text.split() == [f"w{t}" for t in said]
        assert len(e.response_logprobs) == len(e.response_token_ids)
        assert e.entropy > 0
    assert {e.is_finished for e in episodes} == {True, False}


def test_rollout_reports_its_phases(tokenizer):
    # Catches: rewards computed outside their phase.
    seen = RecordingProgress()
    questions = [Question("", [1, 2, 3], {})]
    episodes = rollout(
        random_model(),
        tokenizer,
        questions,
        num_answers=5,
        max_gen_len=7,
        temperature=1.0,
        reward_function=lambda text: Reward(0.0, {}),
        generator=torch.Generator().manual_seed(0),
        progress=seen,
    )
    assert seen.phases == [("prefill", 1), ("decode", 5), ("reward", 5)]
    assert seen.counts["slot_steps"] == sum(len(e.response_token_ids) for e in episodes)
    assert [amount for part, amount in seen.updates if part == "reward"] == [1] * 5


def test_sampler_and_trainer_agree_on_log_probabilities(tokenizer):
    # Catches: temperature or vocabulary mask applied by one of them only; a shift by one.
    model = random_model()
    _, episodes = sample_episodes(model, tokenizer)
    update = {
        "max_grad_norm": 1.0,
        "skip_unfinished": False,
        "vocab_size": VOCAB,
        "micro_batch_tokens": 50,
    }
    stats = update_policy(model, Recorder(model), episodes, temperature=0.8, **update)
    assert 0 < stats.logprob_diff_mean <= stats.logprob_diff_max < 1e-4
    mismatched = update_policy(model, Recorder(model), episodes, temperature=1.0, **update)
    assert mismatched.logprob_diff_mean > 0.1


def test_logprob_difference_has_its_mean_and_maximum():
    # Catches: `.abs()` dropped.
    model = random_model()
    episodes = [episode(0, [1, 2], [3, 4, 5], 0.0), episode(0, [1, 2], [6, 7], 1.0)]
    logprobs = []
    for e in episodes:
        tokens = e.prompt_token_ids + e.response_token_ids
        logprobs_SV = torch.log_softmax(model(torch.tensor([tokens]))[0].detach(), dim=-1)
        logprobs.append([logprobs_SV[t - 1, tokens[t]].item() for t in range(2, len(tokens))])
    shifts = [[0.25, -0.5, 0.0], [1.0, -2.0]]
    episodes = [
        replace(e, response_logprobs=[a + b for a, b in zip(x, y, strict=True)])
        for e, x, y in zip(episodes, logprobs, shifts, strict=True)
    ]
    stats = update_policy(
        model, Recorder(model), episodes, max_grad_norm=1.0, skip_unfinished=False
    )
    assert stats.logprob_diff_mean == pytest.approx(3.75 / 5, abs=1e-5)
    assert stats.logprob_diff_max == pytest.approx(2.0, abs=1e-5)


# --- from training to transformers


def test_a_trained_checkpoint_decodes_the_same_in_transformers(base_model, tmp_path):
    # Catches: weights saved as before the steps; another rope_theta; a stop id left out.
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = Tokenizer.from_pretrained(base_model)
    model = Transformer.from_pretrained(base_model, device="cpu", dtype=torch.float32)
    optimizer, generator = AdamW(model.parameters(), lr=1e-2), torch.Generator().manual_seed(0)
    prompts = [
        render_prompt({"numbers": [n, 5, 7], "target": 10 + n}, tokenizer) for n in range(1, 6)
    ]
    questions = [Question(prompt, tokenizer.encode(prompt), {}) for prompt in prompts]
    for _ in range(2):
        episodes = rollout(
            model,
            tokenizer,
            questions,
            num_answers=4,
            max_gen_len=13,
            temperature=1.0,
            generator=generator,
            reward_function=lambda text: Reward(float(len(text)), {}),
        )
        stats = update_policy(
            model,
            optimizer,
            episodes,
            max_grad_norm=1.0,
            skip_unfinished=False,
            vocab_size=tokenizer.vocab_size,
        )
        assert not stats.skipped
        assert optimizer.weights_changed > 0.9
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)

    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    their_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert set(theirs.generation_config.eos_token_id) == tokenizer.stop_ids
    rows_without_a_token = list(range(tokenizer.vocab_size, model.config.vocab_size))
    greedy = SamplingParams(29, 1e-5, tokenizer.vocab_size, tokenizer.stop_ids)
    untrained = Transformer.from_pretrained(base_model, device="cpu", dtype=torch.float32)
    for prompt, question in zip(prompts, questions, strict=True):
        given = their_tokenizer(prompt, return_tensors="pt")
        wanted_1S = theirs.generate(
            **given, do_sample=False, max_new_tokens=29, suppress_tokens=rows_without_a_token
        )
        wanted = wanted_1S[0, len(question.prompt_token_ids) :].tolist()
        got, before = (
            list(generate_one(m, question.prompt_token_ids, greedy, torch.full((29,), 0.5)))
            for m in (model, untrained)
        )
        assert got == wanted
        assert tokenizer.decode(got) == their_tokenizer.decode(wanted)
        assert got != before
