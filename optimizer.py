"""AdamW (Loshchilov & Hutter, arXiv:1711.05101) whose small updates survive bf16 weights.

A bf16 weight has 8 significant bits. An update of 1e-6 to a weight above 0.0005 is less than half
of its last bit and would be rounded away, step after step. So each bf16 weight is stored with 16
more bits, low_bits. Together they are a float32 master weight:

    bits of the master = (bits of the bf16 weight << 16) + low_bits,     -32768 <= low_bits <= 32767

The bf16 weight is the master rounded to nearest, and all arithmetic is in float32. The low bits
cost 2 bytes per weight, where a separate float32 copy would cost 4.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from data_types import SingleProcess
from flat import ALIGNMENT, are_views, flatten, gather_gradient
from gpu import StreamedState

# Weights updated at a time. This bounds the float32 temporaries; on a CPU they fit in its cache.
PIECE = {"cpu": 2**18, "cuda": 2**21}


class AdamW:
    """step() and zero_grad() as in torch.optim. Equal to torch.optim.AdamW on float32 weights.

    params: all float32 or all bfloat16. They become views of one flat tensor.
    offload: keep the state in page-locked CPU memory and stream it through the GPU in pieces. The
    results are the same. No effect if the weights are on the CPU.
    world: each rank keeps the state of its shard, updates that shard from its shard of the
    gradient, and gets the rest of the weights from the others (ZeRO stage 1, arXiv:1910.02054).

    weights_changed is the share of the weights whose stored value changed in the last step;
    weights_changed_fp32 is the share whose float32 master changed.
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
        world: SingleProcess = SingleProcess(),
    ):
        self.params, self.world = list(params), world
        self.lr, self.betas, self.eps, self.weight_decay = lr, betas, eps, weight_decay
        self.steps, self.weights_changed, self.weights_changed_fp32 = 0, 0.0, 0.0
        param_dtypes = {p.dtype for p in self.params}
        if param_dtypes not in ({torch.float32}, {torch.bfloat16}):
            names = ", ".join(sorted(map(str, param_dtypes)))
            raise ValueError(f"parameters of {names}; wanted all float32 or all bfloat16")
        state_dtypes = {"exp_avg": torch.float32, "exp_avg_sq": torch.float32}
        if param_dtypes == {torch.bfloat16}:
            state_dtypes["low_bits"] = torch.int16
        self.weights = flatten(self.params)
        self.shards = world.shards(len(self.weights), ALIGNMENT)
        self.shard = self.shards[world.rank]
        size = self.shard.stop - self.shard.start
        offload = offload and self.weights.is_cuda
        device = "cpu" if offload else self.weights.device
        self.state = {
            name: torch.zeros(size, dtype=dtype, device=device)
            for name, dtype in state_dtypes.items()
        }
        self.streamed = None
        if offload:
            self.streamed = StreamedState(list(self.state.values()), self.weights.device)

    @staticmethod
    def state_bytes_per_weight(dtype: torch.dtype) -> int:
        return 10 if dtype == torch.bfloat16 else 8

    @torch.no_grad()
    def step(self) -> None:
        """Update the weights from their .grad; a missing .grad counts as 0. All ranks call it."""
        if not are_views(self.params, self.weights):
            raise ValueError(
                "the weights have moved since AdamW was created; move the model before creating it"
            )
        self.steps += 1
        weights, gradient = self.weights[self.shard], gather_gradient(self.params)[self.shard]
        size = PIECE[weights.device.type]
        pieces = [slice(i, min(i + size, len(weights))) for i in range(0, len(weights), size)]
        changed = torch.zeros(2, device=weights.device)
        for piece, state in zip(pieces, self._state_pieces(pieces), strict=True):
            changed += self._update(weights[piece], gradient[piece], *state)
        self.world.all_gather(self.weights, self.shards)
        counts = torch.tensor(self.world.all_gather_objects(changed.tolist())).sum(dim=0)
        shares = counts / sum(p.numel() for p in self.params)
        self.weights_changed, self.weights_changed_fp32 = shares.tolist()

    def zero_grad(self) -> None:
        for p in self.params:
            p.grad = None

    def state_dict(self) -> dict:
        """The number of steps, and the state of this rank's shard."""
        return {"steps": self.steps, **self.state}

    def load_state_dict(self, saved: dict) -> None:
        """Raises ValueError if the saved state belongs to another model or dtype."""
        found = {name: (t.shape, t.dtype) for name, t in saved.items() if name != "steps"}
        wanted = {name: (t.shape, t.dtype) for name, t in self.state.items()}
        if found != wanted:
            raise ValueError(
                f"the saved optimizer state has {found}, but this model needs {wanted}; "
                "it belongs to another model or dtype"
            )
        self.steps = saved["steps"]
        for name, tensor in self.state.items():
            tensor.copy_(saved[name])

    def _state_pieces(self, pieces: list[slice]) -> Iterator[list[Tensor]]:
        if self.streamed is not None:
            return self.streamed.pieces(pieces)
        return ([tensor[piece] for tensor in self.state.values()] for piece in pieces)

    def _update(
        self,
        weight: Tensor,
        grad: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        low_bits: Tensor | None = None,
    ) -> Tensor:
        """Update one piece in place. Returns how many weights changed, as stored and in float32."""
        beta1, beta2 = self.betas
        grad = grad.float()
        exp_avg.lerp_(grad, 1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
        denominator = (exp_avg_sq.sqrt() / (1 - beta2**self.steps) ** 0.5).add_(self.eps)
        step_size = self.lr / (1 - beta1**self.steps)
        master = weight if low_bits is None else join_bits(weight, low_bits)
        updated = master * (1 - self.lr * self.weight_decay)
        updated.addcdiv_(exp_avg, denominator, value=-step_size)
        changed_fp32 = torch.count_nonzero(updated != master)
        if low_bits is None:
            weight.copy_(updated)
            return torch.stack((changed_fp32, changed_fp32))
        rounded, new_low_bits = split_bits(updated)
        changed = torch.count_nonzero(rounded != weight)
        low_bits.copy_(new_low_bits)
        weight.copy_(rounded)
        return torch.stack((changed, changed_fp32))


def join_bits(weight: Tensor, low_bits: Tensor) -> Tensor:
    """The float32 master weight of a bf16 weight and its 16 low bits."""
    return ((weight.view(torch.int16).int() << 16) + low_bits.int()).view(torch.float32)


def split_bits(master: Tensor) -> tuple[Tensor, Tensor]:
    """The bf16 weight nearest to a float32 master, and the int16 low bits that join_bits needs."""
    bits = master.view(torch.int32)
    high = (bits + 0x8000) >> 16
    return high.to(torch.int16).view(torch.bfloat16), (bits - (high << 16)).to(torch.int16)
