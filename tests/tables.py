"""Tables that show which Qwen2.5 fits on which GPU, by the plan. Tests compare the pages with them.

uv run python -m tests.tables     prints both tables
"""

import contextlib

from harness.config import load_config
from harness.plan import PROMPT_TOKENS, PUBLISHED, Plan, find_shape, make_plan

# By the memory that a GPU is sold with: the GiB that can be used, and the dtype. A T4 has 16 GB and
# no bfloat16.
GPUS = {
    "16 GB, float32": (14.0, "float32"),
    "24 GB": (22.5, "bfloat16"),
    "48 GB": (42.5, "bfloat16"),
    "80 GB": (78.0, "bfloat16"),
    "141 GB": (139.0, "bfloat16"),
}


def what_fits_on_one_card() -> str:
    """For each GPU and model: where the optimizer state is, answers at once, recomputed layers."""
    sizes = list(PUBLISHED)[:5]
    lines = ["| GPU | " + " | ".join(sizes) + " |", "| ---: |" + " --- |" * len(sizes)]
    for gpu in GPUS:
        cells = dict.fromkeys(sizes, "no")
        for offload, place in ((True, "CPU"), (False, "GPU")):  # the GPU, if the state fits there
            for size, plan in plans_that_fit("config.yaml", gpu, offload).items():
                cells[size] = f"{place}: {plan.cache_slots} answers, {plan.recompute_layers} layers"
        lines.append(f"| {gpu} | " + " | ".join(cells[size] for size in sizes) + " |")
    return "\n".join(lines)


def largest_that_fit(path: str = "config.yaml") -> str:
    """The largest model that a number of GPUs can train, with the smallest micro-batches."""
    tokens = load_config(path).training.max_gen_len + PROMPT_TOKENS
    gpus = [gpu for gpu, (_, dtype) in GPUS.items() if dtype == "bfloat16"]
    lines = ["| GPUs | optimizer state | " + " | ".join(f"{gpu} each" for gpu in gpus) + " |"]
    lines.append("| ---: | --- |" + " ---: |" * len(gpus))
    for cards in (1, 2, 4, 8):
        for offload, place in ((False, "on the GPUs"), (True, "in CPU memory")):
            cells = []
            for gpu in gpus:
                overrides = [f"training.micro_batch_tokens={tokens}"]
                sizes = plans_that_fit(path, gpu, offload, overrides, cards=cards)
                cells.append(list(sizes)[-1] if sizes else "none")
            lines.append(f"| {cards} | {place} | {' | '.join(cells)} |")
    return "\n".join(lines)


def plans_that_fit(
    path: str, gpu: str, offload: bool, overrides: list[str] = (), *, cards: int = 1
) -> dict[str, Plan]:
    """The plan for each model that fits, the smallest model first."""
    gib, dtype = GPUS[gpu]
    settings = [f"model.memory_gib={gib}", f"model.dtype={dtype}"]
    settings.append(f"optimizer.offload={str(offload).lower()}")
    config, plans = load_config(path, [*settings, *overrides]), {}
    for size in PUBLISHED:
        with contextlib.suppress(ValueError):
            plans[size] = make_plan(config, find_shape(f"Qwen2.5-{size}"), cards=cards)
    return plans


if __name__ == "__main__":
    print(f"{what_fits_on_one_card()}\n\n{largest_that_fit()}")
