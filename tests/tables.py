"""The tables of what fits, in README.md and docs/scaling.md, as the plan computes them; tests hold the pages to them."""

import contextlib

from harness.config import load_config
from harness.plan import PROMPT_TOKENS, PUBLISHED, Plan, find_shape, make_plan

USABLE_GIB = {24: 22.5, 48: 42.5, 80: 78.0, 141: 139.0}  # of a card that is sold as so many GB


def what_fits_on_one_card() -> str:
    """README's table of where the optimizer's state of each Qwen2.5 stands, of rows decoded at once and of layers run twice."""
    sizes = list(PUBLISHED)[:5]
    lines = ["| card | " + " | ".join(sizes) + " |", "| ---: |" + " --- |" * len(sizes)]
    for gb in USABLE_GIB:
        plans = {
            size: f"{where}: {plan.cache_rows} rows, {plan.checkpoint_layers} layers"
            for offload, where in ((True, "CPU"), (False, "card"))
            for size, plan in published_plans("config.yaml", gb, offload).items()
        }
        lines.append(f"| {gb} GB | " + " | ".join(plans.get(size, "no") for size in sizes) + " |")
    return "\n".join(lines)


def largest_that_fit(path: str = "config.yaml") -> str:
    """A table of the largest Qwen2.5 that trains by a config on so many cards of such a size, in the least micro-batches."""
    least = [
        f"training.micro_batch_tokens={load_config(path).training.max_gen_len + PROMPT_TOKENS}"
    ]
    lines = [
        "| cards | optimizer state | " + " | ".join(f"{gb} GB each" for gb in USABLE_GIB) + " |"
    ]
    lines.append("| ---: | --- |" + " ---: |" * len(USABLE_GIB))
    for cards in (1, 2, 4, 8):
        for offload in (False, True):
            fitting = (
                list(published_plans(path, gb, offload, least, cards=cards)) for gb in USABLE_GIB
            )
            cells = (sizes[-1] if sizes else "none" for sizes in fitting)
            lines.append(
                f"| {cards} | {'in CPU memory' if offload else 'on the cards'} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def published_plans(
    path: str, gb: int, offload: bool, overrides: list[str] = (), *, cards: int = 1
) -> dict[str, Plan]:
    """Of each Qwen2.5 that trains on cards of so many GB, in ascending order."""
    config = load_config(
        path,
        [
            f"model.memory_gib={USABLE_GIB[gb]}",
            f"optimizer.offload={str(offload).lower()}",
            *overrides,
        ],
    )
    plans = {}
    for size in PUBLISHED:
        with contextlib.suppress(ValueError):
            plans[size] = make_plan(config, find_shape(f"Qwen2.5-{size}"), cards=cards)
    return plans
