"""How much of each small update survives in bf16: 500 steps of AdamW on a known regression.

    uv run bench/bf16.py

The weights start at the scale of a language model (standard deviation 0.02), each 0.002 away from
its answer. That is further than 500 steps can go, so an exact optimizer moves each weight by about
learning rate x steps. The gradient is taken at the weights that the model sees. Errors are
distances to the float32 run, relative to the distance that it moved.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from optimizer import AdamW, join_bits

STEPS, SIZE, BATCH = 500, 256, 64
OURS, STOCHASTIC, PLAIN = "bf16 + 16 low bits", "bf16, stochastic rounding", "plain bf16"


def main() -> None:
    print(f"{'learning rate':14}{'stored as':26}{'error, stored':>16}{'error, seen':>16}")
    for lr in (1e-6, 1e-5):
        start, exact, _ = train(lr, "float32")
        for kind in (OURS, STOCHASTIC, PLAIN):
            _, stored, seen = train(lr, kind)
            errors = [(w - exact).norm() / (exact - start).norm() for w in (stored, seen)]
            print(f"{lr:<14g}{kind:26}{errors[0]:16.2%}{errors[1]:16.2%}")


def train(lr: float, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the first weights, the last as stored, and the last as a model sees them: float32."""
    generator = torch.Generator().manual_seed(0)
    start = (0.02 * torch.randn(SIZE, SIZE, generator=generator)).bfloat16().float()
    answer = start + 0.002 * torch.randn(SIZE, SIZE, generator=generator).sign()
    weight = nn.Parameter(start.clone() if kind == "float32" else start.bfloat16())
    # Stochastic rounding updates a float32 copy in each step and then throws it away.
    updated = nn.Parameter(start.clone()) if kind == STOCHASTIC else weight
    if kind == OURS:
        optimizer = AdamW([weight], lr=lr)
    else:
        optimizer = torch.optim.AdamW([updated], lr=lr, weight_decay=0.0)
    for _ in range(STEPS):
        inputs = torch.randn(BATCH, SIZE, generator=generator)
        error = inputs @ (weight.detach().float() - answer)
        updated.data.copy_(weight.detach())
        updated.grad = (inputs.T @ error / BATCH).to(updated.dtype)
        optimizer.step()
        if kind == STOCHASTIC:
            noise = torch.randint(0, 1 << 16, (SIZE, SIZE), generator=generator, dtype=torch.int32)
            bits = (updated.detach().view(torch.int32) + noise) & ~0xFFFF
            weight.data.copy_(bits.view(torch.float32))
    seen = weight.detach().float()
    if kind != OURS:
        return start, seen, seen
    low_bits = optimizer.state["low_bits"].view_as(weight)
    return start, join_bits(weight.detach(), low_bits), seen


if __name__ == "__main__":
    main()
