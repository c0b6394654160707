"""What a step of the configured run will take on this machine, from a few of its layers and as much of its work as is needed."""

from collections import deque
from dataclasses import replace

import torch

from data_types import Episode
from grpo import rollout, update_policy
from harness import cpu
from harness.config import Config
from harness.console import PhaseWatch
from harness.made_up import (
    AnyTokenizer,
    random_episodes,
    random_model,
    random_questions,
    random_reward,
)
from harness.plan import Plan, num_weights
from optimizer import AdamW
from packing import pack_rows
from qwen2_model import Qwen2Config

PROMPT_TOKENS = 140  # about what Countdown's prompts have
CPU_SECONDS = (
    3  # that a CPU may take for a measurement, about; where it would take longer, less is measured
)
STEPS = 64  # of decoding, at most: after about so many a card records its graph anew


def assumptions(config: Config) -> str:
    """Of what nobody knows yet."""
    longest = config.training.max_gen_len
    return (
        f"assumed: prompts of {PROMPT_TOKENS} tokens, answers that may end at any token, after {longest // 2} on average, or "
        f"are cut off at {longest}, all learnt from; not counted: rewards, evaluations, checkpoints"
    )


def seconds_of_a_step(
    config: Config, shape: Qwen2Config, layers: list[int], plan: Plan, *, cards: int = 1
) -> dict[str, float]:
    """Seconds of each part of a step, along a straight line from fewer layers and from more, as `layers` says, to all of them.

    A layer that is run twice takes a third more of the gradient: forward 1, backward 2, forward again 1.
    """
    (fewer, more), parts = layers, {}
    few, many = (
        measure(config, replace(shape, num_hidden_layers=count), plan, cards) for count in layers
    )
    for name in many:
        a_layer = max(0.0, many[name] - few[name]) / max(1, more - fewer)
        again = plan.checkpoint_layers / 3 if name == "gradient" else 0
        parts[name] = many[name] + a_layer * (shape.num_hidden_layers - more + again)
    return parts | {"optimizer": parts["optimizer"] / cards}


def measure(config: Config, shape: Qwen2Config, plan: Plan, cards: int) -> dict[str, float]:
    """Seconds of each part of a step, if the model had no more layers than `shape`.

    A smaller step is taken: as many slots decode as on average in the whole one, behind a prompt as long as what they read there,
    and a row of the update is run. Its seconds, by its tokens, are those of the whole.
    """
    training = config.training
    questions, answers = (
        -(-training.num_questions_per_batch // cards),
        training.batch_size // training.num_questions_per_batch,
    )

    def episodes(questions: int, prompt_len: int, longest: int) -> list[Episode]:
        return random_episodes(
            questions, answers, prompt_len, longest, mean=longest // 2, vocab_size=shape.vocab_size
        )

    whole = episodes(questions, PROMPT_TOKENS, training.max_gen_len)
    lengths = [len(episode.response_token_ids) for episode in whole]
    rows = [
        len(row.tokens_S)
        for row in pack_rows([(e, 1.0) for e in whole], training.micro_batch_tokens)
    ]
    affordable = 10**9  # tokens of an update; of decoding four times as many take as long
    if config.model.device == "cpu":
        speed = cpu.operations_per_second(getattr(torch, config.model.dtype))
        affordable = int(CPU_SECONDS * speed / (8 * num_weights(shape)))
    some = max(1, questions // len(rows))  # questions, whose answers make about a row
    share = min(
        1.0, affordable / sum(rows) * questions / some
    )  # of prompts and answers alike: only these go through the head
    prompt_len = round(share * (sum(rows) - sum(lengths)) / questions)
    row = episodes(some, max(1, prompt_len), max(1, round(share * training.max_gen_len)))
    slots, columns = decoding(lengths, plan.cache_rows)
    slots = max(1, min(round(slots), affordable))
    steps = max(1, min(STEPS, training.max_gen_len, 2 * affordable // slots))
    prompt_len = min(
        PROMPT_TOKENS + round(columns) - steps // 2, shape.max_position_embeddings - steps
    )
    watch = take_a_step(config, shape, row, prompt_len=prompt_len, slots=slots, steps=steps)
    return {
        "prefill": watch.seconds["prefill"] / prompt_len * questions * PROMPT_TOKENS,
        "decode": watch.seconds["decode"] / (slots * steps) * sum(lengths),
        "gradient": watch.seconds["gradient"] / watch.counts["tokens_run"] * sum(rows),
        "optimizer": watch.seconds["optimizer"],
    }


def take_a_step(
    config: Config,
    shape: Qwen2Config,
    row: list[Episode],
    *,
    prompt_len: int,
    slots: int,
    steps: int,
) -> PhaseWatch:
    """Decode and, from other episodes, learn: twice, where the first time warms up. Returns what was seen the second time."""
    model = random_model(
        shape, device=config.model.device, dtype=getattr(torch, config.model.dtype)
    )
    optimizer = AdamW(model.parameters(), lr=1e-6, offload=config.optimizer.offload)
    for _ in range(2):
        watch = PhaseWatch("check")
        with cpu.packed_for_decoding(model, slots):
            rollout(
                model,
                AnyTokenizer(shape.vocab_size),
                random_questions(1, prompt_len, shape.vocab_size),
                num_answers=slots,
                max_gen_len=steps,
                temperature=1.0,
                reward_function=random_reward(),
                generator=torch.Generator(),
                watch=watch,
            )
        update_policy(
            model,
            optimizer,
            row,
            max_grad_norm=1.0,
            skip_unfinished=False,
            watch=watch,
            micro_batch_tokens=config.training.micro_batch_tokens,
        )
    return watch


def decoding(lengths: list[int], slots: int) -> tuple[float, float]:
    """Slots in use in a step of decoding, on average, where an answer that waits takes the slot of one that has ended; and the
    length of the longest answer in use, which is as far as all are read, on average over slots and steps.
    """
    in_use, waiting, step, read = [], deque(lengths), 0, 0
    while waiting or in_use:
        while waiting and len(in_use) < slots:
            in_use.append((step, step + waiting.popleft()))
        read += len(in_use) * (step - in_use[0][0])  # the first has been there longest
        step += 1
        in_use = [(start, end) for start, end in in_use if end > step]
    return sum(lengths) / step, read / sum(lengths)
