"""Synthetic models, questions, episodes and rewards: a run's work without downloads or data."""

import math
import random
from collections.abc import Callable

import torch

from data_types import Episode, Question, Reward
from flat import allocate
from qwen2_model import Qwen2Config, Transformer


class SyntheticTokenizer:
    """Allows every id below vocab_size, ends an answer at stop_ids and decodes to an empty text."""

    def __init__(self, vocab_size: int, stop_ids: frozenset[int] = frozenset()):
        self.vocab_size, self.stop_ids = vocab_size, stop_ids

    def decode(self, ids: list[int]) -> str:
        return ""


def random_model(shape: Qwen2Config, *, device: str, dtype: torch.dtype) -> Transformer:
    """Norm weights are 1, all others have standard deviation 0.02. The seed is fixed."""
    with torch.device("meta"):
        model = Transformer(shape)
    allocate(model, device=device, dtype=dtype)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.ones_(parameter)
        else:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def random_questions(count: int, prompt_len: int, vocab_size: int) -> list[Question]:
    rng = random.Random(0)
    prompts = [rng.choices(range(vocab_size), k=prompt_len) for _ in range(count)]
    return [Question("", prompt, {}) for prompt in prompts]


def random_episodes(
    questions: int,
    answers: int,
    prompt_len: int,
    longest: int,
    *,
    mean: int | None,
    vocab_size: int,
) -> list[Episode]:
    """`answers` random answers to each question, with random rewards.

    Their lengths are geometric with this mean, cut off at `longest`; if mean is None, all are
    `longest` tokens long. The lengths are quantiles, so their sum hardly varies with the count.
    """
    rng, count = random.Random(0), questions * answers
    lengths = [longest] * count
    if mean is not None:
        quantiles = [-math.log(1 - (i + 0.5) / count) for i in range(count)]
        lengths = [min(longest, 1 + int(mean * quantile)) for quantile in quantiles]
        rng.shuffle(lengths)
    episodes = []
    for question_id, question in enumerate(random_questions(questions, prompt_len, vocab_size)):
        for length in lengths[question_id * answers :][:answers]:
            episodes.append(
                Episode(
                    question_id=question_id,
                    prompt_token_ids=question.prompt_token_ids,
                    response_token_ids=rng.choices(range(vocab_size), k=length),
                    response_logprobs=[0.0] * length,
                    is_finished=True,
                    text="",
                    reward=Reward(rng.random(), {}),
                )
            )
    return episodes


def random_reward() -> Callable[[str], Reward]:
    rng = random.Random(0)
    return lambda text: Reward(rng.random(), {})
