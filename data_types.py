"""The data types that the files share, and the defaults for `world` and `progress`.

Token ids are plain Python lists here. Tensors, padding and devices appear once a batch is built.
"""

import itertools
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Question:
    """A question as the model sees it, and what its task needs to score an answer."""

    prompt: str  # the rendered chat, including the beginning of the answer (Countdown: "<think>")
    prompt_token_ids: list[int]
    problem: dict[str, Any]  # passed to the task's reward function as keyword arguments


@dataclass(frozen=True)
class Reward:
    total: float  # the advantage is computed from this
    parts: dict[str, float]  # for the metrics, each 0.0 or 1.0; "answer" counts as success


@dataclass(frozen=True)
class Episode:
    """One sampled answer with its reward. It never changes; its advantage is a separate value."""

    question_id: int  # answers with the same id form a group, even if two questions are equal
    prompt_token_ids: list[int]
    response_token_ids: list[int]  # including the stop token, if one was sampled
    response_logprobs: list[float]  # log π of each response token as the sampler saw it, nats
    is_finished: bool  # a stop token was sampled before the length budget ran out
    text: str  # the response without its stop token
    reward: Reward
    entropy: float = 0.0  # of the sampling distribution, mean over the response tokens, nats


@dataclass(frozen=True)
class UpdateStats:
    """What one policy-gradient step did."""

    loss: float
    grad_norm: float  # before clipping
    num_tokens: int  # kept response tokens: the denominator of the loss
    # |log π of the trainer - log π of the sampler|, nats, over the trained tokens
    logprob_diff_mean: float = 0.0
    logprob_diff_max: float = 0.0
    skipped: str = ""  # why the optimizer took no step; empty if it took one
    broken_questions: list[int] = field(default_factory=list)  # ids that led to a non-finite number


class SingleProcess:
    """A world of one process, where every collective operation is a no-op.

    harness/distributed.py has the version for several processes. Each process is a rank, and all
    ranks call the collectives in the same order.
    """

    rank, size = 0, 1

    def shards(self, total: int, multiple: int = 1) -> list[slice]:
        """Split `total` items into one slice per rank.

        All slices have the same length, a multiple of `multiple`. Only the last ones may be
        shorter, or empty.
        """
        length = -(-total // (self.size * multiple)) * multiple
        starts = [min(rank * length, total) for rank in range(self.size + 1)]
        return [slice(start, end) for start, end in itertools.pairwise(starts)]

    def all_gather_objects(self, value: Any) -> list[Any]:
        """Return the values of all ranks, ordered by rank."""
        return [value]

    def reduce_scatter(self, flat: Tensor, shards: list[slice]) -> Tensor:
        """Sum a flat tensor over all ranks. Return this rank's shard of the sum, a view of `flat`.

        The rest of `flat` is undefined afterwards.
        """
        return flat

    def all_gather(self, flat: Tensor, shards: list[slice]) -> None:
        """Fill in the shards of a flat tensor that the other ranks hold."""


class NoProgress:
    """Ignores progress reports. harness/console.py has the version with progress bars."""

    def phase(self, name: str, total: int) -> AbstractContextManager:
        """Enter one phase of the work, for example "decode", which has `total` units to do."""
        return nullcontext()

    def update(self, n: int = 0, **counts: int) -> None:
        """Report n more finished units, and other counts by name.

        It may raise to stop the work (Ctrl-C). It is called only where nothing is half done.
        """
