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


def main() -> None:
    print(f"{'learning rate':14}{'stored as':26}{'error of what is stored':>24}{'of what the model sees':>24}")
    for lr in (1e-6, 1e-5):
        exact, start = train(lr, "float32")
        for kind in ("bf16 + 16 low bits", "bf16, stochastic rounding", "plain bf16"):
            (stored, seen), _ = train(lr, kind)
            travelled = (exact[0] - start).norm()
            errors = [(weight - exact[0]).norm() / travelled for weight in (stored, seen)]
            print(f"{lr:<14g}{kind:26}{errors[0]:24.2%}{errors[1]:24.2%}")


def train(lr: float, kind: str) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor]:
    """((weights with whatever completes them, weights as the model sees them), where they began), in float32."""
    generator = torch.Generator().manual_seed(0)
    start = (0.02 * torch.randn(SIZE, SIZE, generator=generator)).bfloat16().float()
    answer = start + 0.002 * torch.randn(SIZE, SIZE, generator=generator).sign()
    weight = nn.Parameter(start.clone() if kind == "float32" else start.bfloat16())
    master = nn.Parameter(start.clone())  # of stochastic rounding: thrown away after every step
    if kind == "bf16 + 16 low bits":
        optimizer = AdamW([weight], lr=lr)
    else:
        optimizer = torch.optim.AdamW([master if "stochastic" in kind else weight], lr=lr, weight_decay=0.0)
    for _ in range(STEPS):
        inputs = torch.randn(BATCH, SIZE, generator=generator)
        error = inputs @ (weight.detach().float() - answer)
        gradient = inputs.T @ error / BATCH
        if "stochastic" in kind:
            master.data.copy_(weight.detach())
            master.grad = gradient
            optimizer.step()
            noise = torch.randint(0, 1 << 16, master.shape, generator=generator, dtype=torch.int32)
            bits = (master.detach().view(torch.int32) + noise) & ~0xFFFF
            weight.data.copy_(bits.view(torch.float32))
        else:
            weight.grad = gradient.to(weight.dtype)
            optimizer.step()
    seen = weight.detach().float()
    if kind == "bf16 + 16 low bits":
        return (join_bits(weight.detach(), optimizer.state["low"].view_as(weight)), seen), start
    return (seen, seen), start


if __name__ == "__main__":
    main()
