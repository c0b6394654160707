"""The values that cross file borders. Token ids are plain Python lists: padding and devices begin where a batch is built."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Question:
    """One question as the model sees it, and what its task needs to score an answer."""

    prompt: str  # the rendered chat, up to and including the opened "<think>"
    prompt_token_ids: list[int]
    problem: dict[str, Any]  # handed to the task's reward function by keyword


@dataclass(frozen=True)
class Reward:
    total: float  # what the advantage is computed from
    parts: dict[str, float]  # what it is made of, for the metrics; each 0.0 or 1.0


@dataclass(frozen=True)
class Episode:
    """One sampled answer. Nothing here is changed after the rollout; the advantage is a separate value."""

    question_id: int  # answers with the same id form a group, even where two questions read alike
    prompt_token_ids: list[int]
    response_token_ids: list[int]  # the stop token, if one was drawn, is the last
    response_logprobs: list[float]  # of each response token, in nats, as the sampler computed it
    is_finished: bool  # drew a stop token within its budget
    text: str  # the response as text, without its stop token
    reward: Reward
    entropy: float = (
        0.0  # mean over the response tokens of the sampling distribution's entropy, nats
    )


@dataclass(frozen=True)
class UpdateStats:
    """What one policy-gradient step did."""

    loss: float
    grad_norm: float  # before clipping
    num_tokens: int  # kept response tokens: the denominator of the loss
    logprob_diff_mean: float = (
        0.0  # |log-probability of the trainer - of the sampler| over the tokens that were run, nats
    )
    logprob_diff_max: float = 0.0
    skipped: str = ""  # why the optimizer made no step; empty when it did
    broken_questions: list[int] = field(
        default_factory=list
    )  # question ids behind a number that is not finite
    weights_changed: float = 0.0  # share of the weights whose stored value changed
    weights_changed_fp32: float = (
        0.0  # share that would have changed had all weights been stored in float32
    )


class Alone:
    """The processes that share the work of a step, where there is one: each of the three ways in which they meet is the identity.

    harness/parallel.py has several. All of them meet in the same order, and from what was shared all decide alike.
    """

    rank, size = 0, 1

    def parts_of(self, total: int, multiple: int = 1) -> list[slice]:
        """Everybody's part of `total` things: as many for each process, in multiples, and for the last what is left."""
        share = -(-total // (self.size * multiple)) * multiple
        return [
            slice(min(rank * share, total), min((rank + 1) * share, total))
            for rank in range(self.size)
        ]

    def share(self, items: list) -> list:
        """The items of all processes, in the order of their ranks."""
        return items

    def reduce_scatter(self, flat: Tensor, parts: list[slice]) -> Tensor:
        """The own part of the sum of everybody's flat tensor, in its place there; what lies beside it has no meaning any more."""
        return flat

    def all_gather(self, flat: Tensor, parts: list[slice]) -> None:
        """Complete a flat tensor, of which each process holds its own part."""


ALONE = Alone()


class Watch:
    """Looks on while the algorithm works. This one sees nothing; a run's own draws bars, takes times and hears signals."""

    processes: Alone = ALONE  # which share the work that is watched

    def part(self, name: str, total: int) -> AbstractContextManager:
        """Entered around a part of the work: "prefill", "decode", "reward", "gradient", "optimizer"; total: what is to be done."""
        return nullcontext()

    def advance(self, amount: int = 0, **counts: int) -> None:
        """So much more of the part is done, and so much more of each count. May raise: nothing is half-done at this moment."""


UNWATCHED = Watch()
