"""Micro-batches of the update: the answers to a question share one copy of their prompt.

    tokens     [ prompt 1 | answer 1a | answer 1b | answer 1c | prompt 2 | answer 2a | answer 2b ]
    positions    0 … 9      10 … 17     10 … 21     10 … 14     0 … 11     12 … 16     12 … 30

Each segment attends to itself causally, and an answer also attends to all of its prompt. The result
is exactly what each (prompt, answer) pair would give on its own, but a prompt is run once per
question instead of once per answer, and there is no padding between segments.

Dimension key: S tokens of a micro-batch, P response tokens in it, G segments (prompts and answers),
               Q tokens of the longest segment, L tokens of the longest prompt, C >= L + Q keys,
               H query heads, K key heads, R = H / K, D head size.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from data_types import Episode
from qwen2_model import AttentionFunction, Qwen2Config, grouped_query_attention

KEY_MULTIPLE = 16  # attention kernels copy a mask whose rows are not aligned to this


class Segment(NamedTuple):
    """A prompt or an answer in a micro-batch. A prompt has prompt_length 0: it sees only itself."""

    start: int
    length: int
    prompt_start: int
    prompt_length: int


@dataclass(frozen=True)
class MicroBatch:
    """The input of one forward and backward pass.

    The logits at logit_positions_P[p] predict the response token targets_P[p]. That position is the
    one before the token; for the first token of an answer, it is the end of the answer's prompt.
    Prompt tokens are never targets.
    """

    tokens_S: Tensor
    positions_S: Tensor
    segments: list[Segment]
    logit_positions_P: Tensor
    targets_P: Tensor
    advantages_P: Tensor  # float32: the advantage of the answer that each token belongs to
    sampler_logprobs_P: Tensor  # float32, nats
    question_ids: list[int]

    def to(self, device: torch.device | str) -> "MicroBatch":
        tensors = {name: x for name, x in vars(self).items() if isinstance(x, Tensor)}
        return replace(
            self, **{name: x.to(device, non_blocking=True) for name, x in tensors.items()}
        )


def pack_micro_batches(
    answers: Iterable[tuple[Episode, float]], micro_batch_tokens: int, multiple: int = 1
) -> Iterator[MicroBatch]:
    """Pack (episode, advantage) pairs into micro-batches of at most micro_batch_tokens tokens.

    A group that does not fit continues in the next micro-batch, which repeats its prompt. A
    micro-batch holds at least one answer with its prompt, however long. All micro-batches have
    about the same length, and their number is close to a multiple of `multiple`, the number of
    ranks.
    """
    answers = sorted(answers, key=lambda answer: answer[0].question_id)
    limit = _even_length(answers, micro_batch_tokens, multiple)
    batch, size, group = [], 0, None
    for episode, advantage in answers:
        prompt, response = len(episode.prompt_token_ids), len(episode.response_token_ids)
        added = response if episode.question_id == group else prompt + response
        if batch and (size + added > micro_batch_tokens or size >= limit):
            yield _lay_out(batch)
            batch, size, added = [], 0, prompt + response
        batch.append((episode, advantage))
        size, group = size + added, episode.question_id
    if batch:
        yield _lay_out(batch)


def _even_length(
    answers: list[tuple[Episode, float]], micro_batch_tokens: int, multiple: int
) -> float:
    """The length at which a micro-batch is full, so that all of them get about the same length."""
    prompts = {e.question_id: len(e.prompt_token_ids) for e, _ in answers}
    total = sum(prompts.values()) + sum(len(e.response_token_ids) for e, _ in answers)
    # Each micro-batch after the first may have to repeat a prompt. One process can ignore this, but
    # several ranks, which wait for each other, only share the work evenly if they allow for it.
    repeated = max(prompts.values(), default=0) if multiple > 1 else 0
    count = multiple
    while total + (count - 1) * repeated > count * micro_batch_tokens and count < len(answers):
        count += multiple
    return (total + (count - 1) * repeated) / count


def _lay_out(answers: list[tuple[Episode, float]]) -> MicroBatch:
    tokens, segments, logit_positions, targets, advantages, logprobs = [], [], [], [], [], []
    group = None
    for episode, advantage in answers:
        prompt, response = episode.prompt_token_ids, episode.response_token_ids
        if episode.question_id != group:
            group, prompt_start = episode.question_id, len(tokens)
            segments.append(Segment(prompt_start, len(prompt), prompt_start, 0))
            tokens += prompt
        start = len(tokens)
        segments.append(Segment(start, len(response), prompt_start, len(prompt)))
        # The shift by one: the last prompt token predicts response[0], response[i - 1] response[i].
        prompt_end = prompt_start + len(prompt) - 1
        logit_positions += [prompt_end, *range(start, start + len(response) - 1)]
        tokens += response
        targets += response
        advantages += [advantage] * len(response)
        logprobs += episode.response_logprobs
    return MicroBatch(
        tokens_S=torch.tensor(tokens),
        positions_S=torch.tensor([s.prompt_length + i for s in segments for i in range(s.length)]),
        segments=segments,
        logit_positions_P=torch.tensor(logit_positions),
        targets_P=torch.tensor(targets),
        advantages_P=torch.tensor(advantages, dtype=torch.float32),
        sampler_logprobs_P=torch.tensor(logprobs, dtype=torch.float32),
        question_ids=sorted({episode.question_id for episode, _ in answers}),
    )


def packed_attention(
    micro_batch: MicroBatch, config: Qwen2Config, dtype: torch.dtype
) -> AttentionFunction:
    """Attention within a micro-batch: each segment sees its prompt and, causally, itself.

    config and dtype are the model's. Segments of similar length are run as one batch, so that a
    long segment does not pad all the others.
    """
    device = micro_batch.tokens_S.device
    heads_per_key = config.num_attention_heads // config.num_key_value_heads
    batches: dict[int, list[Segment]] = {}
    for segment in micro_batch.segments:
        batches.setdefault(segment.length.bit_length(), []).append(segment)
    layouts, offset = [], 0
    order_S = torch.empty(len(micro_batch.tokens_S), dtype=torch.long)
    for batch in batches.values():
        queries_GQ, keys_GC, visible_GQC, is_real_GQ = _pad_segments(batch, len(order_S))
        bias_GQC = torch.zeros(visible_GQC.shape, dtype=dtype, device=device)
        bias_GQC.masked_fill_(~visible_GQC.to(device), -torch.inf)
        bias_G1XC = bias_GQC.repeat(1, heads_per_key, 1)[:, None]  # X = R * Q
        layouts.append((queries_GQ.to(device), keys_GC.to(device), bias_G1XC))
        order_S[queries_GQ[is_real_GQ]] = offset + is_real_GQ.flatten().nonzero()[:, 0]
        offset += queries_GQ.numel()
    order_S = order_S.to(device)

    def attention(layer: int, q_1HSD: Tensor, k_1KSD: Tensor, v_1KSD: Tensor) -> Tensor:
        outputs = []
        for queries_GQ, keys_GC, bias_G1XC in layouts:
            q_GHQD = q_1HSD[0][:, queries_GQ].transpose(0, 1)
            k_GKCD = k_1KSD[0][:, keys_GC].transpose(0, 1)
            v_GKCD = v_1KSD[0][:, keys_GC].transpose(0, 1)
            out_GHQD = grouped_query_attention(q_GHQD, k_GKCD, v_GKCD, bias_G1XC)
            outputs.append(out_GHQD.transpose(0, 1).flatten(1, 2)[None])
        return torch.cat(outputs, dim=2)[:, :, order_S]

    return attention


def _pad_segments(segments: list[Segment], total: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Lay segments of a micro-batch of `total` tokens side by side, padded to the longest.

    Returns the positions in the micro-batch of the queries (G, Q) and of the keys (G, C), which
    keys each query sees (G, Q, C), and which queries are real (G, Q).
    """
    start_G1, length_G1, prompt_start_G1, prompt_length_G1 = torch.tensor(segments).T[:, :, None]
    Q, L = int(length_G1.max()), int(prompt_length_G1.max())
    C = -(-(L + Q) // KEY_MULTIPLE) * KEY_MULTIPLE
    steps_Q, steps_L, steps_K = torch.arange(Q), torch.arange(L), torch.arange(C - L)
    # Padding takes the tokens that follow. No query sees them and nobody reads their results. To
    # repeat one token instead would be slow: the backward pass of an index on a GPU adds up equal
    # indices one after another.
    queries_GQ = (start_G1 + steps_Q) % total
    prompt_keys_GL = (prompt_start_G1 + steps_L) % total
    own_keys_GK = (start_G1 + steps_K) % total
    sees_prompt_GQL = (steps_L < prompt_length_G1)[:, None].expand(-1, Q, -1)
    sees_own_GQK = (steps_K <= steps_Q[:, None]).expand(len(segments), -1, -1)
    keys_GC = torch.cat((prompt_keys_GL, own_keys_GK), dim=1)
    visible_GQC = torch.cat((sees_prompt_GQL, sees_own_GQK), dim=2)
    return queries_GQ, keys_GC, visible_GQC, steps_Q < length_G1
