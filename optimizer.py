"""AdamW (Loshchilov & Hutter, arXiv:1711.05101) whose small updates survive bf16 weights, on the GPU or in CPU memory.

A bf16 weight has 8 significant bits: a step of 1e-6 on a weight above 0.0004 is less than half its last bit and would
be rounded away, step after step. So each bf16 weight has 16 more bits here, `low`, that complete it to a float32 master:

    bits of the master = (bits of the bf16 weight << 16) + low,      -32768 <= low <= 32767

The bf16 weight is the master rounded to nearest, the arithmetic is that of float32, and the cost is 2 bytes a weight
instead of the 4 of a separate master.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from data_types import ALONE, Alone
from flat import ALIGNMENT, flat_gradient, flat_weights
from gpu import StreamedState

# Weights updated at a time: bounds the float32 temporaries, which fit into a CPU's cache, and what is in transit when offloaded.
PIECE = {"cpu": 2**18, "cuda": 2**21}


class AdamW:
    """step() and zero_grad() as in torch.optim; float32 moments; equal to torch.optim.AdamW where weights are float32.

    offload: keep moments and low bits in page-locked CPU memory and stream them through the GPU, fetching one piece
    while another is computed; the same arithmetic on the same device. Where the weights are on the CPU it changes nothing.
    processes: each has the state of its own part of the weights, updates that part by its part of the gradient, and gets the
    rest from the others (ZeRO stage 1, Rajbhandari et al., arXiv:1910.02054).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        offload: bool = False,
        processes: Alone = ALONE,
    ):
        self.params, self.processes = list(params), processes
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps = 0
        kinds = {p.dtype for p in self.params}
        if len(kinds) != 1 or not kinds <= {torch.float32, torch.bfloat16}:
            raise ValueError(
                f"weights of dtypes {sorted(map(str, kinds))}; wanted all float32 or all bfloat16"
            )
        dtypes = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
        if kinds == {torch.bfloat16}:
            dtypes["low"] = torch.int16
        weights = flat_weights(self.params)
        self.parts = processes.parts_of(len(weights), ALIGNMENT)
        self.own = self.parts[processes.rank]
        self.offloaded = offload and weights.is_cuda
        home = "cpu" if self.offloaded else weights.device
        self.state = {
            name: torch.zeros(self.own.stop - self.own.start, dtype=dtype, device=home)
            for name, dtype in dtypes.items()
        }
        self.streamed = (
            StreamedState(list(self.state.values()), weights.device) if self.offloaded else None
        )

    @staticmethod
    def state_bytes_per_weight(dtype: torch.dtype) -> int:
        return 10 if dtype == torch.bfloat16 else 8

    @torch.no_grad()
    def step(self) -> tuple[float, float]:
        """Update every weight by its .grad; a missing gradient counts as 0. Of several processes all call it together.

        Returns the share of the weights whose stored value changed, and the share that changed as float32.
        """
        self.steps += 1
        weights = flat_weights(self.params)
        own_weights, own_gradient = weights[self.own], flat_gradient(self.params)[self.own]
        size = PIECE[weights.device.type]
        places = [
            slice(start, min(start + size, len(own_weights)))
            for start in range(0, len(own_weights), size)
        ]
        changed = torch.zeros(2, device=weights.device)
        resident = ([tensor[place] for tensor in self.state.values()] for place in places)
        for place, state in zip(
            places, self.streamed.pieces(places) if self.offloaded else resident, strict=True
        ):
            changed += self._update(own_weights[place], own_gradient[place], *state)
        self.processes.all_gather(weights, self.parts)
        changed = torch.tensor(self.processes.share([changed.tolist()])).sum(dim=0)
        return tuple((changed / sum(p.numel() for p in self.params)).tolist())

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def state_dict(self) -> dict:
        """Of the own part of the weights."""
        return {"steps": self.steps, **self.state}

    def load_state_dict(self, saved: dict) -> None:
        """Raises ValueError if the saved state belongs to another model or dtype."""
        shapes = {name: (t.shape, t.dtype) for name, t in saved.items() if name != "steps"}
        expected = {name: (t.shape, t.dtype) for name, t in self.state.items()}
        if shapes != expected:
            raise ValueError(
                f"the saved optimizer state has {shapes}, this model needs {expected}; it belongs to another model"
            )
        self.steps = saved["steps"]
        for name, tensor in self.state.items():
            tensor.copy_(saved[name])

    def _update(
        self,
        weight: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        low: Tensor | None = None,
    ) -> Tensor:
        """Overwrites weight and state; returns how many weights changed as stored and as float32."""
        beta1, beta2 = self.betas
        grad = grad.float()
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        scale = (exp_avg_sq.sqrt() / (1 - beta2**self.steps) ** 0.5).add_(self.eps)
        master = weight if low is None else join_bits(weight, low)
        updated = (master * (1 - self.lr * self.weight_decay)).addcdiv_(
            exp_avg, scale, value=-self.lr / (1 - beta1**self.steps)
        )
        stored = exact = torch.count_nonzero(updated != master)
        if low is not None:
            updated, new_low = split_bits(updated)
            stored = torch.count_nonzero(updated != weight)
            low.copy_(new_low)
        weight.copy_(updated)
        return torch.stack((stored, exact))


def join_bits(weight: Tensor, low: Tensor) -> Tensor:
    """The float32 master of a bf16 weight and its 16 low bits."""
    return ((weight.view(torch.int16).int() << 16) + low.int()).view(torch.float32)


def split_bits(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 value nearest to a float32 master, and what join_bits needs beside it, as int16."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)
