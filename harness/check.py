"""train.py --check: within a minute, on this machine, what would otherwise show after hours.

A few layers of the configured shape, with random weights, take a step, are saved and go on; what must agree is compared, and
what a step takes is measured and carried over to all layers and all answers. It needs neither model nor data.
"""

import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from data_types import Episode, UpdateStats
from flat import flat_weights, norm, zero_gradient
from generate import seeded_generator
from gpu import GraphedStep, free_bytes
from grpo import episode_advantages, rollout, row_loss, update_policy
from harness.card import describe
from harness.checkpoint import Place, checkpoint_path, read_checkpoint, save_checkpoint
from harness.config import Config
from harness.console import duration, say
from harness.forecast import assumptions, seconds_of_a_step
from harness.made_up import AnyTokenizer, random_model, random_questions, random_reward
from harness.plan import GIB, Plan, make_plan, num_weights
from optimizer import AdamW
from packing import pack_rows
from qwen2_model import Qwen2Config, Transformer

LAYERS = 4  # at most, and half as many: the difference is what a layer takes
QUESTIONS, ANSWERS, PROMPT, LENGTH = (
    2,
    4,
    32,
    24,
)  # of the step: short enough that a graph, once recorded, is replayed
VOCABULARY, WIDER = (
    8192,
    {torch.bfloat16: torch.float32, torch.float32: torch.float64},
)  # of what the CPU computes again
# With random weights: log-probabilities (mean difference, nats); gradient (norm of the difference over its own).
BOUNDS = {torch.bfloat16: (0.05, 0.1), torch.float32: (1e-3, 1e-3)}
RESUMED = {"cpu": 0.0, "cuda": 1e-2}  # a card sums in any order

Comparison = tuple[str, float, float]  # what is compared, how far it is apart, how far it may be


def check(config: Config, shape: Qwen2Config, plan: Plan, *, cards: int = 1) -> str:
    """Say what is found and, if all agrees, the verdict; else return it. Raises ValueError or NotSaved where there is no room."""
    most, wrong = min(LAYERS, shape.num_hidden_layers), []
    layers = [max(1, most // 2), most]
    fewer, more = (replace(shape, num_hidden_layers=count) for count in layers)
    say(describe(config.model.device))
    _check_room(config, fewer, more)
    comparisons = [_compare_with_cpu(config, fewer), _step_save_and_go_on(config, fewer, plan)]
    if config.model.device == "cuda":
        comparisons.append(_step_save_and_go_on(config, fewer, plan, graphs=True))
    for what, found, bound in chain(*comparisons):
        agrees = found <= bound  # which nan is not
        say(f"{what}: {found:.2g}, at most {bound:g}: {'agrees' if agrees else 'DOES NOT AGREE'}")
        if not agrees:
            wrong.append(f"{what} ({found:.2g}, at most {bound:g})")
    parts = seconds_of_a_step(config, shape, layers, plan, cards=cards)
    say(
        f"a step, carried over from {layers[0]} and {most} to {shape.num_hidden_layers} layers: "
        + ", ".join(f"{name} {seconds:.3g} s" for name, seconds in parts.items())
        + f"; {assumptions(config)}"
    )
    total, steps = sum(parts.values()), config.training.max_steps
    expected = (
        f"about {total:.{0 if total >= 10 else 1}f} s a step, {duration(total * steps)} for {steps:,} steps, "
        "if answers get as long as assumed"
    )
    if wrong:
        return f"check: what must agree does not: {'; '.join(wrong)}; else {expected}"
    say(f"check: all agrees; {expected}")
    return ""


def _check_room(config: Config, fewer: Qwen2Config, more: Qwen2Config) -> None:
    """Raises ValueError if there is no memory for the few layers: on the device, and for what is saved and read again."""
    dtype, whatever_is_free = (
        getattr(torch, config.model.dtype),
        config.model.model_copy(update={"memory_gib": None}),
    )
    try:
        make_plan(config.model_copy(update={"model": whatever_is_free}), more)
    except ValueError as error:
        raise ValueError(
            f"--check runs {more.num_hidden_layers} layers, and for these, too, memory is short: {error}"
        ) from None
    host = (
        3 * num_weights(fewer) * (dtype.itemsize + AdamW.state_bytes_per_weight(dtype))
    )  # unbroken, read, going on
    if (free := free_bytes(torch.device("cpu"))) < host:
        raise ValueError(
            f"--check takes {host / GIB:.1f} GiB of CPU memory to save and resume; free some: {free / GIB:.1f} are"
        )


def _sample(config: Config, model: Transformer) -> list[Episode]:
    size = model.config.vocab_size
    return rollout(
        model,
        AnyTokenizer(size),
        random_questions(QUESTIONS, PROMPT, size),
        num_answers=ANSWERS,
        max_gen_len=LENGTH,
        temperature=config.training.temperature,
        reward_function=random_reward(),
        generator=seeded_generator(config.training.seed, "check"),
    )


def _compare_with_cpu(config: Config, shape: Qwen2Config) -> Iterator[Comparison]:
    """Log-probabilities and gradient, as the device has them, against the CPU's in a wider type."""
    dtype, piece = (
        getattr(torch, config.model.dtype),
        replace(shape, vocab_size=min(shape.vocab_size, VOCABULARY)),
    )
    model = random_model(piece, device=config.model.device, dtype=dtype)
    reference = random_model(piece, device="cpu", dtype=WIDER[dtype])
    flat_weights(reference.parameters()).copy_(flat_weights(model.parameters()))
    episodes, results = _sample(config, model), []
    (row,) = pack_rows(zip(episodes, episode_advantages(episodes), strict=True), 10**9)
    for m in (model, reference):
        gradient, own_row = zero_gradient(m.parameters()), row.to(m.head_weight_VE.device)
        loss, logprobs_P = row_loss(
            m, own_row, 1, temperature=config.training.temperature, vocab_size=piece.vocab_size
        )
        loss.backward()
        results.append((logprobs_P.cpu(), gradient.to("cpu", WIDER[dtype])))
    (ours_P, gradient), (theirs_P, wanted) = results
    (apart, off), against = BOUNDS[dtype], f"against the CPU's in {WIDER[dtype]}"
    for who, logprobs_P in (("sampler", row.sampler_logprobs_P), ("trainer", ours_P)):
        yield (
            f"log-probabilities of the {who} {against}",
            float((logprobs_P - theirs_P).abs().mean()),
            apart,
        )
    yield f"gradient {against}", _difference(gradient, wanted), off


def _step_save_and_go_on(
    config: Config, shape: Qwen2Config, plan: Plan, *, graphs: bool = False
) -> Iterator[Comparison]:
    """Two steps, the second once without a break and once from the checkpoint of the first."""
    kind, dtype, device = (
        "with CUDA graphs: " if graphs else "",
        getattr(torch, config.model.dtype),
        config.model.device,
    )

    def update(model: Transformer, optimizer: AdamW) -> UpdateStats:
        return update_policy(
            model,
            optimizer,
            episodes,
            max_grad_norm=config.training.max_grad_norm,
            skip_unfinished=False,
            temperature=config.training.temperature,
            micro_batch_tokens=config.training.micro_batch_tokens,
            checkpoint_layers=min(plan.checkpoint_layers, shape.num_hidden_layers),
        )

    if device == "cuda":
        GraphedStep.works = graphs
    model = random_model(shape, device=device, dtype=dtype)
    optimizer = AdamW(model.parameters(), lr=1e-6, offload=config.optimizer.offload)
    episodes = _sample(config, model)
    if graphs:
        yield "CUDA graphs that could not be recorded", float(not GraphedStep.works), 0.0
    yield (
        f"{kind}log-probabilities of sampler and trainer",
        update(model, optimizer).logprob_diff_mean,
        BOUNDS[dtype][0],
    )
    place, on_its_disk = (
        Place(step=1, optimizer_steps=0, log_sizes={}, config={}),
        Path(config.output_dir).absolute().parents,
    )
    with tempfile.TemporaryDirectory(
        prefix=".check-", dir=next(path for path in on_its_disk if path.exists())
    ) as directory:
        save_checkpoint(
            Path(directory), model, AnyTokenizer(shape.vocab_size), optimizer, place, keep=None
        )
        update(model, optimizer)
        unbroken = _state(model, optimizer)
        del model, optimizer  # the card has room for one
        place, state = read_checkpoint(path := checkpoint_path(Path(directory), 1))
        model = Transformer.from_pretrained(path, device=device, dtype=dtype)
    optimizer = AdamW(model.parameters(), lr=1e-6, offload=config.optimizer.offload)
    optimizer.load_state_dict({"steps": place.optimizer_steps, **state})
    update(model, optimizer)
    for name, resumed in _state(model, optimizer).items():
        yield (
            f"{kind}{name}, resumed against unbroken",
            _difference(resumed, unbroken[name]),
            RESUMED[device],
        )


def _state(model: Transformer, optimizer: AdamW) -> dict[str, Tensor]:
    """All that a step leaves behind, on the CPU."""
    return {
        name: t.float().cpu()
        for name, t in {"weights": flat_weights(model.parameters()), **optimizer.state}.items()
    }


def _difference(a: Tensor, b: Tensor) -> float:
    return (
        norm(a - b) / norm(b) if norm(b) else math.nan
    )  # which does not agree: there is nothing to compare
