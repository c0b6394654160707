"""Packed rows: every response token once, and each answer attends to what it would see alone."""

from collections import Counter
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from helpers import CONFIG, episode, random_model, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from data_types import Episode
from packing import packed_attention, pack_micro_batches

H, K, D = 10, 2, 6
SHAPE = replace(CONFIG, num_attention_heads=H, num_key_value_heads=K)


def make_batch(groups: list[tuple[int, list[int]]]) -> list[tuple[Episode, float]]:
    """Answers, with advantages; no two tokens are equal. groups: (tokens of the prompt, tokens of each answer)."""
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
def test_rows_cover_every_response_token_once(groups, micro_batch_tokens, random):
    # Catches: `prompt_start + len(prompt) - 1` -> `len(tokens) - 1` (right for the first answer only); a last row that is not
    # yielded; answer positions that begin at 0 (`segment.prompt_length + i` -> `i`).
    answers = make_batch(groups)
    rows = list(pack_micro_batches(random.sample(answers, len(answers)), micro_batch_tokens))
    by_token = {t: (e, n, a) for e, a in answers for n, t in enumerate(e.response_token_ids)}
    scored = Counter()
    for row in rows:
        tokens, positions = row.tokens_S.tolist(), row.positions_S.tolist()
        assert sum(r.length for r in row.segments) == len(tokens) == len(positions)
        assert len(tokens) == len(set(tokens))  # no prompt twice within a row
        for source, target, advantage, logprob in zip(
            row.logit_positions_P.tolist(),
            row.targets_P.tolist(),
            row.advantages_P.tolist(),
            row.sampler_logprobs_P.tolist(),
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
            len(tokens) <= micro_batch_tokens or sum(r.prompt_length > 0 for r in row.segments) == 1
        )
    assert scored == Counter(by_token.keys())


def test_one_row_is_laid_out_as_the_picture_shows():
    # Catches: `Segment(prompt_start, len(prompt), prompt_start, 0)` with the prompt's length for 0; an answer's prompt one short.
    answers = make_batch([(3, [2, 4]), (2, [1])])
    (row,) = pack_micro_batches(answers, 100)
    assert row.tokens_S.tolist() == list(range(12))
    assert row.positions_S.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 6, 0, 1, 2]
    assert row.logit_positions_P.tolist() == [2, 3, 2, 5, 6, 7, 10]
    assert row.targets_P.tolist() == [3, 4, 5, 6, 7, 8, 11]
    assert row.advantages_P.tolist() == [1, 1, 2, 2, 2, 2, 3]
    assert [(r.start, r.length, r.prompt_start, r.prompt_length) for r in row.segments] == [
        (0, 3, 0, 0),
        (3, 2, 0, 3),
        (5, 4, 0, 3),
        (9, 2, 9, 0),
        (11, 1, 9, 2),
    ]


def test_rows_are_about_equally_long():
    # Catches: `size >= limit` dropped: rows of 100, 100 and 22 tokens instead of three of 74.
    answers = make_batch([(1, [1] * 219)])
    sizes = [len(row.tokens_S) for row in pack_micro_batches(answers, 100)]
    assert len(sizes) == 3
    assert max(sizes) - min(sizes) <= 5


def visible_SS(row, episodes) -> torch.Tensor:
    """The rule, token by token: what each (prompt, answer) would see alone. Tokens are unique, so they say where they are from."""
    tokens = row.tokens_S.tolist()
    context = {}  # token -> the tokens that it may look at
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


def assert_same_attention(attend, row, episodes):
    S = len(row.tokens_S)
    qkv = [t.requires_grad_() for t in random_qkv(S)]
    weights_1HSD = torch.randn(
        1, H, S, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    wanted_1HSD, got_1HSD = dense_attention(*qkv, visible_SS(row, episodes)), attend(0, *qkv)
    torch.testing.assert_close(got_1HSD, wanted_1HSD, rtol=1e-6, atol=1e-6)
    wanted = torch.autograd.grad((wanted_1HSD * weights_1HSD).sum(), qkv)
    got = torch.autograd.grad((got_1HSD * weights_1HSD).sum(), qkv)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@settings(deadline=None, max_examples=40)
@given(groups, st.integers(1, 80))
def test_attention_side_by_side_equals_the_dense_rule(groups, micro_batch_tokens):
    # Catches: `steps_L < prompt_length_G1` -> `<=`; `steps_Q <= ...` -> `<`; key heads by `repeat` instead of
    # `repeat_interleave`; every answer given the row's first prompt.
    answers = make_batch(groups)
    for row in pack_micro_batches(answers, micro_batch_tokens):
        assert_same_attention(
            packed_attention(row, SHAPE, torch.float64), row, [e for e, _ in answers]
        )


@torch.no_grad()
@pytest.mark.parametrize("micro_batch_tokens", [1, 20, 31, 1000])
def test_packed_hidden_states_predict_what_each_answer_alone_predicts(micro_batch_tokens):
    # Catches: positions_S of an answer starting at 0 (attention alone cannot show it).
    model = random_model()
    prompts = [random_tokens(n, seed=n).tolist() for n in (5, 1, 11)]
    episodes = [
        episode(q, prompts[q], random_tokens(n, seed=50 + n).tolist(), 0.0)
        for q, n in [(0, 3), (1, 7), (0, 13), (2, 2), (1, 1)]
    ]
    got = {}
    for row in pack_micro_batches(
        [(e, float(i)) for i, e in enumerate(episodes)], micro_batch_tokens
    ):
        attend = packed_attention(row, model.config, torch.float32)
        logits_SV = model.logits(
            model.hidden_states(row.tokens_S[None], row.positions_S[None], attend)[0]
        )
        for i in range(5):
            mine_P = row.advantages_P == i
            if mine_P.any():
                got[i] = logits_SV[row.logit_positions_P[mine_P]]
    for i, e in enumerate(episodes):
        wanted = model(torch.tensor([e.prompt_token_ids + e.response_token_ids]))[
            0, len(e.prompt_token_ids) - 1 : -1
        ]
        torch.testing.assert_close(got[i], wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.gpu
def test_attention_on_cuda_equals_the_cpus():
    # Would catch: a mask or an index that still lies on the CPU.
    answers = make_batch([(131, [40, 90]), (5, [7])])
    (row,) = pack_micro_batches(answers, 999)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, len(row.tokens_S), 64, generator=generator) for heads in (H, K, K)
    )
    wanted = packed_attention(row, SHAPE, torch.float32)(0, q, k, v)
    got = packed_attention(row.to(torch.device("cuda")), SHAPE, torch.float32)(
        0, q.cuda(), k.cuda(), v.cuda()
    )
    torch.testing.assert_close(got.cpu(), wanted, rtol=2e-2, atol=2e-2)


def test_keys_come_in_multiples_that_kernels_read_without_copying():
    # Catches: `-(L + Q) % KEY_MULTIPLE` -> 0.
    answers = make_batch(GROUPS)
    (row,) = pack_micro_batches(answers, 999)
    keys = []
    with patch(
        "packing.F.scaled_dot_product_attention",
        lambda q, k, v, attn_mask: keys.append(attn_mask.shape[-1]) or q,
    ):
        packed_attention(row, SHAPE, torch.float64)(0, *random_qkv(len(row.tokens_S)))
    assert keys
    assert all(count % 16 == 0 for count in keys)


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_rows_of_several_processes_are_even_shares(processes):
    # Catches: `again` left out (of two processes one got 4 rows and the other 3: 18 % more work).
    episodes = [episode(q, [1] * 140, [2] * 32, 0.0) for q in range(8) for _ in range(16)]
    sizes = [
        len(row.tokens_S)
        for row in pack_micro_batches([(e, 1.0) for e in episodes], 1024, processes)
    ]
    assert max(sizes) <= 1024
    shares = [
        sum(sizes[rank::processes]) for rank in range(processes)
    ]  # as update_policy divides them
    assert max(shares) < 1.08 * sum(shares) / processes
