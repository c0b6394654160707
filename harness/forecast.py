"""What a step of the configured run will take on this machine, from a few of its layers and as much of its work as is needed."""

import math
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import median

import torch

from data_types import Episode, Reward
from generate import Decoder, Sampling, prefill
from grpo import update_policy
from harness import cpu
from harness.config import Config
from harness.console import PhaseWatch
from harness.made_up import random_model, random_questions
from harness.plan import Plan, num_weights
from optimizer import AdamW
from packing import pack_rows
from qwen2_model import Qwen2Config, Transformer

PROMPT_TOKENS = 140  # about what Countdown's prompts have
CPU_SECONDS = 3  # that a CPU may take for a measurement; where it would take longer, less is measured and the rest is reckoned
ROOM = 128  # tokens that a decoder may draw while it is measured


@dataclass(frozen=True)
class Work:
    """What a step has to do, in one process."""

    episodes: list[Episode]
    questions: int
    steps: int  # of decoding
    slots: float  # in use in a step, on average
    length: float  # of the longest answer in use, on average over the slots and steps
    tokens: int  # of all rows of the update, prompts included

    @property
    def responses(self) -> int:
        return sum(len(episode.response_token_ids) for episode in self.episodes)


def seconds_of_a_step(config: Config, shape: Qwen2Config, layers: list[int], plan: Plan, *, cards: int = 1) -> dict[str, float]:
    """Seconds of each part of a step, carried over to the whole model from as many layers as each of `layers` says."""
    work = work_of_a_step(config, shape, plan, cards)
    measured = [measure(config, replace(shape, num_hidden_layers=count), work) for count in layers]
    parts = carry_over(measured, layers, shape.num_hidden_layers, plan.checkpoint_layers)
    return parts | {"optimizer": parts["optimizer"] / cards}


def assumptions(config: Config) -> str:
    """Of what nobody knows yet."""
    longest = config.training.max_gen_len
    return (f"assumed: prompts of {PROMPT_TOKENS} tokens, answers that may end at any token, after {longest // 2} on average, or "
            f"are cut off at {longest}, all learnt from; not counted: rewards, evaluations, checkpoints")


def work_of_a_step(config: Config, shape: Qwen2Config, plan: Plan, cards: int = 1) -> Work:
    training, rng = config.training, random.Random(0)
    questions, group = -(-training.num_questions_per_batch // cards), training.batch_size // training.num_questions_per_batch
    answers, longest = questions * group, training.max_gen_len
    lengths = [min(longest, 1 + int(-longest / 2 * math.log(1 - (i + 0.5) / answers))) for i in range(answers)]
    rng.shuffle(lengths)
    prompts = [q.prompt_token_ids for q in random_questions(questions, PROMPT_TOKENS, shape.vocab_size)]
    episodes = [Episode(i // group, prompts[i // group], [rng.randrange(shape.vocab_size) for _ in range(n)], [0.0] * n, True, "",
                        Reward(float(i % 2), {})) for i, n in enumerate(lengths)]  # fmt: skip
    tokens = sum(len(row.tokens_S) for row in pack_rows(episodes, [1.0] * answers, training.micro_batch_tokens))
    steps, slots, length = decoding(lengths, plan.cache_rows)
    return Work(episodes, questions, steps, slots, length, tokens)


def decoding(lengths: list[int], slots: int) -> tuple[int, float, float]:
    """Steps of a rollout in which an answer that waits takes the slot of one that has ended; slots in use, on average; length
    of the longest answer in use, which is as far as all are read, on average over slots and steps.
    """
    waiting, in_use, steps, row_steps, read = deque(lengths), [], 0, 0, 0
    while waiting or in_use:
        while waiting and len(in_use) < slots:
            in_use.append((0, waiting.popleft()))
        steps += 1
        row_steps += len(in_use)
        read += len(in_use) * max(drawn for drawn, _ in in_use)
        in_use = [(drawn + 1, length) for drawn, length in in_use if drawn + 1 < length]
    return steps, row_steps / steps, read / row_steps


def carry_over(measured: list[dict[str, float]], layers: list[int], wanted: int, run_twice: int) -> dict[str, float]:
    """From the seconds with few layers and with more, along a straight line, to those with as many as are wanted.

    A layer that is run twice takes a third more of the gradient: forward 1, backward 2, forward again 1.
    """
    (few, many), (fewer, more), parts = measured, layers, {}
    for name in many:
        a_layer = max(0.0, many[name] - few[name]) / max(1, more - fewer)
        parts[name] = many[name] + a_layer * (wanted - more + (run_twice / 3 if name == "gradient" else 0))
    return parts


# ---------------------------------------------------------------- measured


def measure(config: Config, shape: Qwen2Config, work: Work) -> dict[str, float]:
    """Seconds of each part of a step, if the model had no more layers than `shape`."""
    dtype = getattr(torch, config.model.dtype)
    affordable = 10**9  # tokens, or slots times steps
    if config.model.device == "cpu":
        affordable = int(CPU_SECONDS * cpu.operations_per_second(dtype) / (8 * num_weights(shape)))
    model = random_model(shape, device=config.model.device, dtype=dtype)
    return _measure_rollout(model, work, affordable) | _measure_update(config, model, work, affordable)


@torch.inference_mode()
def _measure_rollout(model: Transformer, work: Work, affordable: int) -> dict[str, float]:
    slots = max(1, min(round(work.slots), affordable))
    questions = max(1, min(work.questions, affordable // PROMPT_TOKENS, slots))
    prompts, length = [episode.prompt_token_ids for episode in work.episodes[:questions]], round(work.length)
    with cpu.packed_for_decoding(model, slots):
        prefill_seconds = _seconds_of(lambda: prefill(model, prompts))
        num_answers = -(-slots // questions)
        decoder = Decoder(
            model, prompts, prefill(model, prompts), Sampling(length + ROOM, 1.0, model.config.vocab_size, frozenset()),
            num_answers=num_answers, uniforms_AG=torch.rand(questions * num_answers + 1, length + ROOM + 1), slots=slots,
        )  # fmt: skip
        decoder.lengths_A[:-1] += length  # as in the middle of a rollout: so many columns are read
        decoder.cache.lengths_B += length
        decoder.cache.span += length
        decode_seconds = _seconds_of(decoder.decode) / decoder.interval
    return {"prefill": prefill_seconds / questions * work.questions, "decode": decode_seconds * work.steps * work.slots / slots}


def _measure_update(config: Config, model: Transformer, work: Work, affordable: int) -> dict[str, float]:
    """On one row, of so many tokens as a row of the run has, or as a CPU can afford; as many of them are response tokens, which
    alone go through the head.
    """
    room, share = min(config.training.micro_batch_tokens, affordable), work.responses / work.tokens
    prompt = random_questions(1, max(1, round(room * (1 - share))), model.config.vocab_size)[0].prompt_token_ids
    left, chosen = max(2, round(room * share)), []
    longest = left // 2  # two at least, which can be compared
    for episode in work.episodes:
        ids = episode.response_token_ids[: min(longest, left)]
        chosen.append(replace(episode, question_id=0, prompt_token_ids=prompt, response_token_ids=ids,
                              response_logprobs=[0.0] * len(ids)))  # fmt: skip
        left -= len(ids)
        if not left:
            break
    optimizer = AdamW(model.parameters(), lr=1e-6, offload=config.optimizer.offload)
    for _ in range(2):  # the first warms up
        watch = PhaseWatch("check")
        update_policy(model, optimizer, chosen, max_grad_norm=1.0, skip_unfinished=False, watch=watch,
                      micro_batch_tokens=config.training.micro_batch_tokens)  # fmt: skip
    gradient_seconds = watch.seconds["gradient"] / watch.counts["tokens_run"]
    return {"gradient": gradient_seconds * work.tokens, "optimizer": watch.seconds["optimizer"]}


def _seconds_of(work: Callable[[], object]) -> float:
    """Median of up to nine runs, after one that warms up."""
    times = []
    while len(times) < 10 and (len(times) < 3 or sum(times) < CPU_SECONDS):
        _wait()
        clock = time.perf_counter()
        work()
        _wait()
        times.append(time.perf_counter() - clock)
    return median(times[1:])


def _wait() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
