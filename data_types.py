"""The values that cross file borders. Token ids are plain Python lists: padding and devices begin where a batch is built."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any


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
    entropy: float = 0.0  # mean over the response tokens of the sampling distribution's entropy, nats


@dataclass(frozen=True)
class UpdateStats:
    """What one policy-gradient step did."""

    loss: float
    grad_norm: float  # before clipping
    num_tokens: int  # kept response tokens: the denominator of the loss
    logprob_diff_mean: float = 0.0  # |log-probability of the trainer - of the sampler| over the tokens that were run, nats
    logprob_diff_max: float = 0.0
    skipped: str = ""  # why the optimizer made no step; empty when it did
    broken_questions: list[int] = field(default_factory=list)  # question ids behind a number that is not finite
    weights_changed: float = 0.0  # share of the weights whose stored value changed
    weights_changed_fp32: float = 0.0  # share that would have changed had all weights been stored in float32


class Watch:
    """Looks on while the algorithm works. This one sees nothing; a run's own draws bars, takes times and hears signals."""

    def part(self, name: str, total: int) -> AbstractContextManager:
        """Entered around a part of the work: "prefill", "decode", "reward", "gradient", "optimizer"; total: what is to be done."""
        return nullcontext()

    def advance(self, amount: int = 0, **counts: int) -> None:
        """So much more of the part is done, and so much more of each count. May raise: nothing is half-done at this moment."""


UNWATCHED = Watch()
