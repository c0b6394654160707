"""Micro-batches hold each response token once, and each answer sees what it would see alone."""

from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from helpers import CONFIG, episode, random_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from data_types import Episode
from packing import _pad_segments, pack_micro_batches, packed_attention

H, K, D = 10, 2, 6
SHAPE = replace(CONFIG, num_attention_heads=H, num_key_value_heads=K)


def make_batch(groups: list[tuple[int, list[int]]]) -> list[tuple[Episode, float]]:
    """(episode, advantage) pairs in which no two tokens are equal.

    groups: (length of the prompt, lengths of the answers) per question.
    """
    counter, episodes = iter(range(10**6)), []
    for question_id, (prompt_length, lengths) in enumerate(groups):
        prompt = [next(counter) for _ in range(prompt_length)]
        for length in lengths:
            response = [next(counter) for _ in range(length)]
            e = episode(question_id, prompt, response, 0.0)
            episodes.append(replace(e, response_logprobs=[-t / 7 for t in response]))
    return [(e, 1.0 + i) for i, e in enumerate(episodes)]


GROUPS = [(7, [3, 5, 1]), (1, [11, 2]), (13, [4])]
lengths = st.integers(1, 17)
groups = st.lists(
    st.tuples(lengths, st.lists(lengths, min_size=1, max_size=5)), min_size=1, max_size=5
)


@settings(deadline=None)
@given(groups, st.integers(1, 80), st.randoms())
def test_micro_batches_hold_each_response_token_once(groups, micro_batch_tokens, random):
    # Catches: `prompt_start + len(prompt) - 1` -> `len(tokens) - 1`, which is right for the first
    # answer only; a last micro-batch that is not yielded; `s.prompt_length + i` -> `i`.
    answers = make_batch(groups)
    micro_batches = list(
        pack_micro_batches(random.sample(answers, len(answers)), micro_batch_tokens)
    )
    by_token = {t: (e, n, a) for e, a in answers for n, t in enumerate(e.response_token_ids)}
    scored = Counter()
    for micro_batch in micro_batches:
        tokens, positions = micro_batch.tokens_S.tolist(), micro_batch.positions_S.tolist()
        assert sum(r.length for r in micro_batch.segments) == len(tokens) == len(positions)
        assert len(tokens) == len(set(tokens))  # no prompt appears twice
        for source, target, advantage, logprob in zip(
            micro_batch.logit_positions_P.tolist(),
            micro_batch.targets_P.tolist(),
            micro_batch.advantages_P.tolist(),
            micro_batch.sampler_logprobs_P.tolist(),
            strict=True,
        ):
            scored[target] += 1
            e, n, wanted = by_token[target]
            before = (e.prompt_token_ids + e.response_token_ids)[len(e.prompt_token_ids) + n - 1]
            assert tokens[source] == before
            assert positions[source] == len(e.prompt_token_ids) + n - 1
            assert advantage == wanted
            assert logprob == pytest.approx(-target / 7)
            assert tokens[tokens.index(target)] == target
            assert positions[tokens.index(target)] == len(e.prompt_token_ids) + n
            start = tokens.index(e.prompt_token_ids[0])
            assert tokens[start : start + len(e.prompt_token_ids)] == e.prompt_token_ids
            assert positions[start : start + len(e.prompt_token_ids)] == list(
                range(len(e.prompt_token_ids))
            )
        assert (
            len(tokens) <= micro_batch_tokens
            or sum(r.prompt_length > 0 for r in micro_batch.segments) == 1
        )
    assert scored == Counter(by_token.keys())


def test_a_micro_batch_is_laid_out_as_the_picture_shows():
    # Catches: `Segment(prompt_start, len(prompt), prompt_start, 0)` -> `..., len(prompt))`; a
    # prompt that is one token short for its answers.
    answers = make_batch([(3, [2, 4]), (2, [1])])
    (micro_batch,) = pack_micro_batches(answers, 100)
    assert micro_batch.tokens_S.tolist() == list(range(12))
    assert micro_batch.positions_S.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2]
    assert micro_batch.logit_positions_P.tolist() == [2, 3, 2, 5, 6, 7, 10]
    assert micro_batch.targets_P.tolist() == [3, 4, 5, 6, 7, 8, 11]
    assert micro_batch.advantages_P.tolist() == [1, 1, 2, 2, 2, 2, 3]
    assert [(r.start, r.length, r.prompt_start, r.prompt_length) for r in micro_batch.segments] == [
        (0, 3, 0, 0),
        (3, 2, 0, 3),
        (5, 4, 0, 3),
        (9, 2, 9, 0),
        (11, 1, 9, 2),
    ]


def test_micro_batches_have_about_the_same_length():
    # Catches: `size >= limit` dropped, which gives 100, 100 and 22 tokens instead of 3 times 74.
    answers = make_batch([(1, [1] * 219)])
    sizes = [len(micro_batch.tokens_S) for micro_batch in pack_micro_batches(answers, 100)]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 5


def visible_SS(micro_batch, episodes) -> torch.Tensor:
    """Which keys each query sees if every (prompt, answer) is alone. Tokens are unique."""
    tokens = micro_batch.tokens_S.tolist()
    context = {}  # token -> the tokens that it sees
    for e in episodes:
        for sequence in (e.prompt_token_ids, e.prompt_token_ids + e.response_token_ids):
            for n, token in enumerate(sequence):
                context[token] = set(sequence[: n + 1])
    return torch.tensor([[key in context[query] for key in tokens] for query in tokens])


def dense_attention(q_1HSD, k_1KSD, v_1KSD, visible_SS):
    k_1HSD, v_1HSD = (t.repeat_interleave(H // K, dim=1) for t in (k_1KSD, v_1KSD))
    scores_1HSS = q_1HSD @ k_1HSD.transpose(2, 3) / D**0.5
    return scores_1HSS.masked_fill(~visible_SS, -torch.inf).softmax(dim=-1) @ v_1HSD


def random_qkv(tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [
        torch.randn(1, heads, tokens, D, generator=generator, dtype=torch.float64)
        for heads in (H, K, K)
    ]


def assert_same_attention(attention, micro_batch, episodes):
    S = len(micro_batch.tokens_S)
    qkv = [t.requires_grad_() for t in random_qkv(S)]
    weights_1HSD = torch.randn(
        1, H, S, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    wanted_1HSD, got_1HSD = (
        dense_attention(*qkv, visible_SS(micro_batch, episodes)),
        attention(0, *qkv),
    )
    torch.testing.assert_close(got_1HSD, wanted_1HSD, rtol=1e-6, atol=1e-6)
    wanted = torch.autograd.grad((wanted_1HSD * weights_1HSD).sum(), qkv)
    got = torch.autograd.grad((got_1HSD * weights_1HSD).sum(), qkv)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(groups, st.integers(1, 80))
def test_packed_attention_equals_dense_attention(groups, micro_batch_tokens):
    # Catches: `steps_L < prompt_length_G1` -> `<=`; `steps_Q <= ...` -> `<`; query heads grouped by
    # `h % K` instead of `h // R`; every answer given the first prompt.
    answers = make_batch(groups)
    for micro_batch in pack_micro_batches(answers, micro_batch_tokens):
        assert_same_attention(
            packed_attention(micro_batch, SHAPE, torch.float64),
            micro_batch,
            [e for e, _ in answers],
        )


@torch.no_grad()
@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 31, 1000])
def test_packed_logits_equal_those_of_each_answer_alone(micro_batch_tokens):
    # Catches: positions of an answer that start at 0, which attention alone cannot show.
    model = random_model()
    prompts = [random_tokens(n, seed=n).tolist() for n in (5, 1, 11)]
    episodes = [
        episode(q, prompts[q], random_tokens(n, seed=50 + n).tolist(), 0.0)
        for q, n in [(0, 3), (1, 7), (0, 13), (2, 2), (1, 1)]
    ]
    got = {}
    for micro_batch in pack_micro_batches(
        [(e, float(i)) for i, e in enumerate(episodes)], micro_batch_tokens
    ):
        attention = packed_attention(micro_batch, model.config, torch.float32)
        logits_SV = model.logits(
            model.hidden_states(
                micro_batch.tokens_S[None], micro_batch.positions_S[None], attention
            )[0]
        )
        for i in range(5):
            mine_P = micro_batch.advantages_P == i
            if mine_P.any():
                got[i] = logits_SV[micro_batch.logit_positions_P[mine_P]]
    for i, e in enumerate(episodes):
        wanted = model(torch.tensor([e.prompt_token_ids + e.response_token_ids]))[
            0, len(e.prompt_token_ids) - 1 : -1
        ]
        torch.testing.assert_close(got[i], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_packed_attention_on_cuda_equals_the_cpu():
    # Would catch: a mask or an index left on the CPU.
    answers = make_batch([(131, [40, 90]), (5, [7])])
    (micro_batch,) = pack_micro_batches(answers, 999)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, len(micro_batch.tokens_S), 64, generator=generator)
        for heads in (H, K, K)
    )
    wanted = packed_attention(micro_batch, SHAPE, torch.float32)(0, q, k, v)
    got = packed_attention(micro_batch.to(torch.device("cuda")), SHAPE, torch.float32)(
        0, q.cuda(), k.cuda(), v.cuda()
    )
    torch.testing.assert_close(got.cpu(), wanted, rtol=2e-2, atol=2e-2)


def test_masks_are_aligned_for_attention_kernels():
    # Catches: `padding = -(...) % KEY_MULTIPLE` -> `padding = 0`.
    answers = make_batch(GROUPS)
    (micro_batch,) = pack_micro_batches(answers, 999)
    keys = []
    with patch(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda q, k, v, attn_mask: keys.append(attn_mask.shape[-1]) or q,
    ):
        packed_attention(micro_batch, SHAPE, torch.float64)(
            0, *random_qkv(len(micro_batch.tokens_S))
        )
    assert keys
    assert all(count % 16 == 0 for count in keys)


def test_padding_repeats_no_token():
    # Catches: padding with one token again and again, whose gradient a GPU adds up one by one.
    answers = make_batch([(40, [1] + [2, 3] * 50), (3, [2, 3])])
    (micro_batch,) = pack_micro_batches(answers, 999)
    total = len(micro_batch.tokens_S)
    short = [segment for segment in micro_batch.segments if segment.length in (2, 3)]
    queries_GQ, keys_GC, _, _ = _pad_segments(short, total)
    assert all(len(set(row)) == len(row) for row in queries_GQ.tolist())
    assert all(max(Counter(row).values()) <= 2 for row in keys_GC.tolist())  # prompt and own
    padding_G = keys_GC[:, -1]
    assert max(Counter(padding_G.tolist()).values()) <= 2


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_several_ranks_get_even_shares(ranks):
    # Catches: `repeated` left out: one of two ranks got 4 micro-batches and the other 3.
    episodes = [episode(q, [1] * 140, [2] * 32, 0.0) for q in range(8) for _ in range(16)]
    sizes = [
        len(micro_batch.tokens_S)
        for micro_batch in pack_micro_batches([(e, 1.0) for e in episodes], 1024, ranks)
    ]
    assert max(sizes) <= 1024
    shares = [sum(sizes[rank::ranks]) for rank in range(ranks)]  # as update_policy assigns them
    assert max(shares) < 1.08 * sum(shares) / ranks
