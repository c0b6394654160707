"""What is left of small updates in bf16: a regression with a known answer, 500 steps of AdamW, four ways to store weights.

    uv run bench/bf16.py

Weights start at the size of a language model's (std 0.02) and have 0.002 to go each, more than 500 steps can cover, so
that a faithful optimizer travels about learning rate x steps. The gradient is taken at the weights as the model would
see them. Distances are to the float32 run, in percent of the way that it travelled.
"""

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from optimizer import AdamW, join_bits

STEPS, SIZE, BATCH = 500, 256, 64
OURS, STOCHASTIC, PLAIN = "bf16 + 16 low bits", "bf16, stochastic rounding", "plain bf16"


def main() -> None:
    print(
        f"{'learning rate':14}{'stored as':26}{'error of what is stored':>24}{'of what the model sees':>24}"
    )
    for lr in (1e-6, 1e-5):
        start, exact, _ = train(lr, "float32")
        for kind in (OURS, STOCHASTIC, PLAIN):
            errors = [
                (weight - exact).norm() / (exact - start).norm() for weight in train(lr, kind)[1:]
            ]
            print(f"{lr:<14g}{kind:26}{errors[0]:24.2%}{errors[1]:24.2%}")


def train(lr: float, kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Weights as they begin; in the end as stored, with whatever completes them, and as the model sees them. In float32."""
    generator = torch.Generator().manual_seed(0)
    start = (0.02 * torch.randn(SIZE, SIZE, generator=generator)).bfloat16().float()
    answer = start + 0.002 * torch.randn(SIZE, SIZE, generator=generator).sign()
    weight = nn.Parameter(start.clone() if kind == "float32" else start.bfloat16())
    master = (
        nn.Parameter(start.clone()) if kind == STOCHASTIC else weight
    )  # if not the weight, thrown away after every step
    optimizer = (
        AdamW([weight], lr=lr)
        if kind == OURS
        else torch.optim.AdamW([master], lr=lr, weight_decay=0.0)
    )
    for _ in range(STEPS):
        inputs = torch.randn(BATCH, SIZE, generator=generator)
        error = inputs @ (weight.detach().float() - answer)
        master.data.copy_(weight.detach())
        master.grad = (inputs.T @ error / BATCH).to(master.dtype)
        optimizer.step()
        if kind == STOCHASTIC:
            noise = torch.randint(0, 1 << 16, master.shape, generator=generator, dtype=torch.int32)
            bits = (master.detach().view(torch.int32) + noise) & ~0xFFFF
            weight.data.copy_(bits.view(torch.float32))
    seen = weight.detach().float()
    return (
        start,
        join_bits(weight.detach(), optimizer.state["low"].view_as(weight))
        if kind == OURS
        else seen,
        seen,
    )


if __name__ == "__main__":
    main()
