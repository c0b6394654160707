"""Rows of the update: the answers to a question stand behind one copy of their prompt, and rows have no padding.

    tokens     [ prompt 1 | answer 1a | answer 1b | answer 1c | prompt 2 | answer 2a | answer 2b ]
    positions    0 … 9      10 … 17     10 … 21     10 … 14     0 … 11     12 … 16     12 … 30

Every segment attends to itself causally; an answer also sees the whole of its prompt. That is exactly what each
(prompt, answer) would compute alone, but the prompt is run forward and backward once a group instead of once an answer.

Dimension key: S tokens of a row, P scored response tokens, G segments (prompts and answers), Q tokens of the longest segment,
               L tokens of the longest prompt, C >= L + Q keys, H query heads, K key heads, R = H / K, D head size.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from data_types import Episode
from qwen2_model import Attend, Qwen2Config, attend_folded

KEY_MULTIPLE = 16  # attention kernels copy a mask whose rows are not aligned


class Segment(NamedTuple):
    """A prompt or an answer within a row: where it stands, and the prompt that it sees (for a prompt: nothing)."""

    start: int
    length: int
    prompt_start: int
    prompt_length: int


@dataclass(frozen=True)
class Row:
    tokens_S: Tensor
    positions_S: Tensor
    segments: list[Segment]
    sources_P: Tensor  # the position whose hidden state predicts each response token
    targets_P: Tensor  # those tokens
    advantages_P: Tensor  # float32, of the answer each belongs to
    sampler_logprobs_P: Tensor  # float32
    question_ids: list[int]  # of the groups in the row

    def to(self, device: torch.device) -> "Row":
        moved = {
            name: v.to(device, non_blocking=True)
            for name, v in vars(self).items()
            if isinstance(v, Tensor)
        }
        return replace(self, **moved)

    def chunks(self, size: int) -> Iterator["Row"]:
        """The same row again and again, each time with other `size` of its scored response tokens."""
        names = [name for name in vars(self) if name.endswith("_P")]
        for tensors in zip(*(getattr(self, name).split(size) for name in names), strict=True):
            yield replace(self, **dict(zip(names, tensors, strict=True)))


def pack_rows(
    answers: Iterable[tuple[Episode, float]], micro_batch_tokens: int, multiple: int = 1
) -> Iterator[Row]:
    """Fill rows of at most micro_batch_tokens tokens, group by group; a group that does not fit goes on in the next row.

    A row holds at least one answer, with its advantage, however long. Rows are made about equally long: few large ones, none nearly
    empty, and, where answers are short enough, about a multiple of `multiple`, so that so many processes have as many each.
    """
    answers = sorted(answers, key=lambda answer: answer[0].question_id)
    prompts = {e.question_id: len(e.prompt_token_ids) for e, _ in answers}
    total = sum(prompts.values()) + sum(len(e.response_token_ids) for e, _ in answers)
    # Where processes wait for each other, shares are even only if the prompts are reckoned with that begin a row once more.
    again, count = max(prompts.values(), default=0) if multiple > 1 else 0, multiple
    while total + (count - 1) * again > count * micro_batch_tokens and count < len(answers):
        count += multiple
    limit = (total + (count - 1) * again) / count
    row, size, group = [], 0, None
    for e, advantage in answers:
        added = len(e.response_token_ids) + (e.question_id != group) * len(e.prompt_token_ids)
        if row and (size + added > micro_batch_tokens or size >= limit):
            yield _lay_out(row)
            row, size, added = [], 0, len(e.response_token_ids) + len(e.prompt_token_ids)
        row.append((e, advantage))
        size, group = size + added, e.question_id
    if row:
        yield _lay_out(row)


def _lay_out(answers: list[tuple[Episode, float]]) -> Row:
    tokens, segments, sources, targets, advantages, logprobs, group = [], [], [], [], [], [], None
    for episode, advantage in answers:
        prompt, response = episode.prompt_token_ids, episode.response_token_ids
        if episode.question_id != group:
            group, prompt_start = episode.question_id, len(tokens)
            segments.append(Segment(prompt_start, len(prompt), prompt_start, 0))
            tokens += prompt
        segments.append(Segment(len(tokens), len(response), prompt_start, len(prompt)))
        sources += [
            prompt_start + len(prompt) - 1,
            *range(len(tokens), len(tokens) + len(response) - 1),
        ]
        tokens += response
        targets += response
        advantages += [advantage] * len(response)
        logprobs += episode.response_logprobs
    positions = [segment.prompt_length + i for segment in segments for i in range(segment.length)]
    return Row(
        torch.tensor(tokens),
        torch.tensor(positions),
        segments,
        torch.tensor(sources),
        torch.tensor(targets),
        torch.tensor(advantages, dtype=torch.float32),
        torch.tensor(logprobs, dtype=torch.float32),
        sorted({episode.question_id for episode, _ in answers}),
    )


def attend_within(row: Row, config: Qwen2Config, dtype: torch.dtype) -> Attend:
    """The attention of a row: its segments side by side, each with its prompt's keys before its own.

    config, dtype: the model's. Segments of like length form a batch, so that a long one does not stretch them all.
    """
    device, R = row.tokens_S.device, config.num_attention_heads // config.num_key_value_heads
    batches: dict[int, list[Segment]] = {}
    for segment in row.segments:
        batches.setdefault(segment.length.bit_length(), []).append(segment)
    layouts, back_S, offset = [], torch.empty(len(row.tokens_S), dtype=torch.long), 0
    for batch in batches.values():
        own_GQ, keys_GC, visible_GQC, real_GQ = _lay_side_by_side(batch)
        bias_GQC = torch.zeros(visible_GQC.shape, dtype=dtype, device=device).masked_fill_(
            ~visible_GQC.to(device), -torch.inf
        )
        layouts.append((own_GQ.to(device), keys_GC.to(device), bias_GQC.repeat(1, R, 1)[:, None]))
        back_S[own_GQ[real_GQ]] = offset + real_GQ.flatten().nonzero()[:, 0]
        offset += own_GQ.numel()
    back_S = back_S.to(device)

    def attend(layer: int, q_1HSD: Tensor, k_1KSD: Tensor, v_1KSD: Tensor) -> Tensor:
        outputs = []
        for own_GQ, keys_GC, bias_G1XC in layouts:  # X = R * Q
            q_GHQD = q_1HSD[0][:, own_GQ].transpose(0, 1)
            k_GKCD, v_GKCD = (x[0][:, keys_GC].transpose(0, 1) for x in (k_1KSD, v_1KSD))
            out_GHQD = attend_folded(q_GHQD, k_GKCD, v_GKCD, bias_G1XC)
            outputs.append(out_GHQD.transpose(0, 1).flatten(1, 2)[None])
        return torch.cat(outputs, dim=2)[:, :, back_S]

    return attend


def _lay_side_by_side(segments: list[Segment]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where a batch of segments finds its queries (G, Q) and keys (G, C), which keys a query sees, which queries are real."""
    start_G1, length_G1, prompt_start_G1, prompt_length_G1 = torch.tensor(segments).T[:, :, None]
    steps_Q, steps_L = torch.arange(int(length_G1.max())), torch.arange(int(prompt_length_G1.max()))
    own_GQ = start_G1 + steps_Q.minimum(
        length_G1 - 1
    )  # behind a segment's end: its last token again, which nobody sees
    prompt_GL = prompt_start_G1 + steps_L.minimum((prompt_length_G1 - 1).clamp(min=0))
    sees_prompt_GQL = (steps_L < prompt_length_G1)[:, None].expand(-1, len(steps_Q), -1)
    sees_own_GQQ = (steps_Q <= steps_Q[:, None]).expand(len(segments), -1, -1)
    unseen = -(len(steps_L) + len(steps_Q)) % KEY_MULTIPLE
    keys_GC = F.pad(torch.cat((prompt_GL, own_GQ), dim=1), (0, unseen))
    visible_GQC = F.pad(torch.cat((sees_prompt_GQL, sees_own_GQQ), dim=2), (0, unseen))
    return own_GQ, keys_GC, visible_GQC, steps_Q < length_G1
