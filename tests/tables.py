"""The tables of which Qwen2.5 fits on which GPU, as planned. Tests compare the pages with them.

uv run python -m tests.tables     prints both tables
"""

import contextlib

from harness.config import load_config
from harness.plan import PROMPT_TOKENS, PUBLISHED, Plan, find_shape, make_plan

USABLE_GIB = {24: 22.5, 48: 42.5, 80: 78.0, 141: 139.0}  # by the GB that a GPU is sold with


def what_fits_on_one_card() -> str:
    """For each GPU and model: where the optimizer state is, answers at once, recomputed layers."""
    sizes = list(PUBLISHED)[:5]
    lines = ["| GPU | " + " | ".join(sizes) + " |", "| ---: |" + " --- |" * len(sizes)]
    for gb in USABLE_GIB:
        cells = dict.fromkeys(sizes, "no")
        for offload, place in ((True, "CPU"), (False, "GPU")):  # the GPU, if the state fits there
            for size, plan in plans_that_fit("config.yaml", gb, offload).items():
                cells[size] = f"{place}: {plan.cache_slots} answers, {plan.recompute_layers} layers"
        lines.append(f"| {gb} GB | " + " | ".join(cells[size] for size in sizes) + " |")
    return "\n".join(lines)


def largest_that_fit(path: str = "config.yaml") -> str:
    """The largest model that a number of GPUs can train, with the smallest micro-batches."""
    tokens = load_config(path).training.max_gen_len + PROMPT_TOKENS
    lines = [
        "| GPUs | optimizer state | " + " | ".join(f"{gb} GB each" for gb in USABLE_GIB) + " |"
    ]
    lines.append("| ---: | --- |" + " ---: |" * len(USABLE_GIB))
    for cards in (1, 2, 4, 8):
        for offload, place in ((False, "on the GPUs"), (True, "in CPU memory")):
            cells = []
            for gb in USABLE_GIB:
                overrides = [f"training.micro_batch_tokens={tokens}"]
                sizes = plans_that_fit(path, gb, offload, overrides, cards=cards)
                cells.append(list(sizes)[-1] if sizes else "none")
            lines.append(f"| {cards} | {place} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plans_that_fit(
    path: str, gb: int, offload: bool, overrides: list[str] = (), *, cards: int = 1
) -> dict[str, Plan]:
    """The plan for each model that fits, the smallest model first."""
    settings = [f"model.memory_gib={USABLE_GIB[gb]}", f"optimizer.offload={str(offload).lower()}"]
    config, plans = load_config(path, [*settings, *overrides]), {}
    for size in PUBLISHED:
        with contextlib.suppress(ValueError):
            plans[size] = make_plan(config, find_shape(f"Qwen2.5-{size}"), cards=cards)
    return plans


if __name__ == "__main__":
    print(f"{what_fits_on_one_card()}\n\n{largest_that_fit()}")
