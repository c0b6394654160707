"""The Qwen2.5 decoder: RMSNorm, grouped-query attention, rotary positions, SwiGLU.

Parameter names mirror the published checkpoints, so loading is a loop over names. A layer does not
know which attention it runs: it passes (layer index, q, k, v) to a function. Plain causal
attention, the KV cache of the sampler and the packed micro-batches of the update are three such
functions.

Dimension key: B sequences, S or T tokens, E hidden size, I intermediate size, V rows of the
               vocabulary matrix, H query heads, K key heads, D head size, C cached positions,
               Q = H / K * S, P any tokens, U distinct tokens. L counts the layers of the cache and,
               in next_token_logits, the new tokens.
"""

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flat import allocate
from published_format import find_weights, read_config, read_weights, write_config, write_weights

# (layer index, q_BHSD, k_BKSD, v_BKSD) -> out_BHSD
AttentionFunction = Callable[[int, Tensor, Tensor, Tensor], Tensor]

KEY_BLOCK = 64  # the cache is read in multiples of this, so decode steps have few shapes


@dataclass(frozen=True)
class Qwen2Config:
    vocab_size: int  # rows of the embedding and of the head; the tokenizer has fewer entries
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @classmethod
    def from_json(cls, path: str | Path) -> "Qwen2Config":
        """Read a published config.json, in the spelling of transformers 4 or 5.

        Raises FileNotFoundError, or ValueError naming the setting that is damaged or unsupported.
        """
        published = read_config(Path(path))
        return cls(**{name: getattr(published, name) for name in cls.__dataclass_fields__})


# ---------------------------------------------------------------- layers


class Recompute(torch.autograd.Function):
    """Activation checkpointing (arXiv:1604.06174): keep only the input, and run again in backward.

    torch.utils.checkpoint does the same, but importing it loads the compiler: 4 s, 150 MB.
    """

    @staticmethod
    def forward(ctx, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(x)
        return function(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x = ctx.saved_tensors[0].detach().requires_grad_()
        with torch.enable_grad():
            out = ctx.function(x)
        out.backward(grad)
        return None, x.grad


class SwiGLU(torch.autograd.Function):
    """silu(gate) * up (Shazeer, arXiv:2002.05202).

    It keeps only its two inputs for the backward pass. Autograd alone would also keep silu(gate),
    which makes the activations of a layer 16 to 23 % larger.
    """

    @staticmethod
    def forward(ctx, gate_BSI: Tensor, up_BSI: Tensor) -> Tensor:
        ctx.save_for_backward(gate_BSI, up_BSI)
        return F.silu(gate_BSI) * up_BSI

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BSI: Tensor) -> tuple[Tensor, Tensor]:
        gate_BSI, up_BSI = ctx.saved_tensors
        grad_gate_BSI = torch.ops.aten.silu_backward(grad_BSI * up_BSI, gate_BSI)
        return grad_gate_BSI, grad_BSI * F.silu(gate_BSI)


def rotate(x_BHSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """Rotary position embedding (arXiv:2104.09864), in the half-split layout of the checkpoints."""
    first, second = x_BHSD.chunk(2, dim=-1)
    return x_BHSD * cos_BSD[:, None] + torch.cat((-second, first), dim=-1) * sin_BSD[:, None]


class Attention(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        E, D = config.hidden_size, config.head_dim
        H, K = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = D
        self.q_proj = nn.Linear(E, H * D, bias=True)
        self.k_proj = nn.Linear(E, K * D, bias=True)
        self.v_proj = nn.Linear(E, K * D, bias=True)
        self.o_proj = nn.Linear(H * D, E, bias=False)

    def forward(
        self,
        x_BSE: Tensor,
        rope: tuple[Tensor, Tensor],
        layer: int,
        attention: AttentionFunction,
    ) -> Tensor:
        B, S, _ = x_BSE.shape
        q_BHSD = self.q_proj(x_BSE).view(B, S, -1, self.head_dim).transpose(1, 2)
        k_BKSD = self.k_proj(x_BSE).view(B, S, -1, self.head_dim).transpose(1, 2)
        v_BKSD = self.v_proj(x_BSE).view(B, S, -1, self.head_dim).transpose(1, 2)
        out_BHSD = attention(layer, rotate(q_BHSD, *rope), rotate(k_BKSD, *rope), v_BKSD)
        return self.o_proj(out_BHSD.transpose(1, 2).reshape(B, S, -1))


class MLP(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        E, I = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(E, I, bias=False)
        self.up_proj = nn.Linear(E, I, bias=False)
        self.down_proj = nn.Linear(I, E, bias=False)

    def forward(self, x_BSE: Tensor) -> Tensor:
        return self.down_proj(SwiGLU.apply(self.gate_proj(x_BSE), self.up_proj(x_BSE)))


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x_BSE: Tensor,
        rope: tuple[Tensor, Tensor],
        layer: int,
        attention: AttentionFunction,
    ) -> Tensor:
        x_BSE = x_BSE + self.self_attn(self.input_layernorm(x_BSE), rope, layer, attention)
        return x_BSE + self.mlp(self.post_attention_layernorm(x_BSE))


# ---------------------------------------------------------------- attention

# On compute capability 9 and 10 PyTorch would prefer cuDNN, which builds a plan for each new shape
# (public reports: 0.4 s), and packed micro-batches always have new shapes.
torch.backends.cuda.enable_cudnn_sdp(False)


def causal_attention(layer: int, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BHSD, k_BKSD, v_BKSD, is_causal=True, enable_gqa=True)


def grouped_query_attention(
    q_BHSD: Tensor, k_BKCD: Tensor, v_BKCD: Tensor, bias_B1QC: Tensor
) -> Tensor:
    """Attention with the query heads that share a key head laid one after another, Q = H / K * S.

    Each key is read once instead of H / K times, and kernels that accept no mask together with
    grouped heads can still be used. The bias is added to the scores: 0, or -inf where a query does
    not see a key.
    """
    B, K, _, D = k_BKCD.shape
    q_BKQD = q_BHSD.reshape(B, K, -1, D)
    out_BKQD = F.scaled_dot_product_attention(q_BKQD, k_BKCD, v_BKCD, attn_mask=bias_B1QC)
    return out_BKQD.reshape(q_BHSD.shape)


class KVCache:
    """Keys and values of the tokens so far: one slot per sequence, each with its own length.

    Slot b holds the tokens of its sequence in columns 0 … lengths_B[b] - 1. Later columns are
    masked.
    """

    def __init__(
        self,
        config: Qwen2Config,
        *,
        batch_size: int,
        max_len: int,
        device: torch.device | str,
        dtype: torch.dtype,
    ):
        L, K, D = config.num_hidden_layers, config.num_key_value_heads, config.head_dim
        # Zeros, not empty: attention multiplies masked values by 0, and 0 * NaN is NaN.
        self.keys_LBKCD = torch.zeros((L, batch_size, K, max_len, D), device=device, dtype=dtype)
        self.values_LBKCD = torch.zeros_like(self.keys_LBKCD)
        self.lengths_B = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.max_len = max_len
        self.longest = 0  # upper bound of the lengths, known without a host-device synchronisation
        self.heads_per_key = config.num_attention_heads // K
        self.indices = torch.arange(max(batch_size, max_len), device=device)

    @staticmethod
    def bytes_per_token(config: Qwen2Config, dtype: torch.dtype) -> int:
        K, D = config.num_key_value_heads, config.head_dim
        return 2 * config.num_hidden_layers * K * D * dtype.itemsize

    def copy_slots(
        self, source: "KVCache", source_slots: Tensor, slots: Tensor | slice, columns: int
    ) -> None:
        """Copy the first `columns` positions of source_slots in `source` into `slots` here."""
        for mine, other in (
            (self.keys_LBKCD, source.keys_LBKCD),
            (self.values_LBKCD, source.values_LBKCD),
        ):
            # One layer at a time, which bounds the temporary copy that the indexing makes.
            for mine_BKCD, other_BKCD in zip(mine, other, strict=True):
                mine_BKCD[slots, :, :columns] = other_BKCD[source_slots, :, :columns]
        self.lengths_B[slots] = source.lengths_B[source_slots]

    def columns(self, num_tokens: int) -> int:
        """How many columns a pass over num_tokens more tokens reads."""
        needed = self.longest + num_tokens
        return min(-(-needed // KEY_BLOCK) * KEY_BLOCK, self.max_len)

    def extend(self, slots: slice, num_tokens: int) -> tuple[Tensor, AttentionFunction]:
        """Prepare a pass over num_tokens more tokens in each of these slots.

        Returns the positions of the tokens (B, num_tokens), and an attention function that stores
        their keys and values and lets each of them see all earlier tokens of its slot. After the
        pass, the caller must add to lengths_B and longest.
        """
        if self.longest + num_tokens > self.max_len:
            raise ValueError(
                f"the KV cache has max_len={self.max_len} and {self.longest} tokens are used; "
                f"{num_tokens} more need max_len={self.longest + num_tokens}"
            )
        columns = self.columns(num_tokens)
        positions_BS = self.lengths_B[slots, None] + self.indices[:num_tokens]
        slots_B1 = self.indices[: len(positions_BS), None]  # counted from the start of the slice
        is_later_BSC = self.indices[:columns] > positions_BS[:, :, None]
        bias_BSC = self.keys_LBKCD.new_zeros(is_later_BSC.shape)
        bias_BSC.masked_fill_(is_later_BSC, -torch.inf)
        bias_B1QC = bias_BSC.repeat(1, self.heads_per_key, 1)[:, None]

        def attention(layer: int, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
            keys_BKCD, values_BKCD = self.keys_LBKCD[layer, slots], self.values_LBKCD[layer, slots]
            keys_BKCD[slots_B1, :, positions_BS] = k_BKSD.transpose(1, 2)
            values_BKCD[slots_B1, :, positions_BS] = v_BKSD.transpose(1, 2)
            keys_BKCD, values_BKCD = keys_BKCD[:, :, :columns], values_BKCD[:, :, :columns]
            return grouped_query_attention(q_BHSD, keys_BKCD, values_BKCD, bias_B1QC)

        return positions_BS, attention


# ---------------------------------------------------------------- the model


def head_logits(hidden_PE: Tensor, head_VE: Tensor) -> Tensor:
    """Logits (P, V) of the vocabulary head.

    On CUDA, without autograd, the product of bf16 matrices returns its float32 accumulator. A CPU
    cannot do this: its logits are rounded to the dtype of the weights, in sampling and in training.
    """
    if hidden_PE.is_cuda and hidden_PE.dtype != torch.float32 and not torch.is_grad_enabled():
        return torch.mm(hidden_PE, head_VE.t(), out_dtype=torch.float32)
    return torch.mm(hidden_PE, head_VE.t())


class Transformer(nn.Module):
    """Qwen2.5 for causal language modelling, with the names and shapes of published checkpoints."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        weight_VE = torch.empty(config.vocab_size, config.hidden_size)
        if not weight_VE.is_meta:  # on the meta device, normal_ imports 900 modules: 5 s, 150 MB
            nn.init.normal_(weight_VE)
        layers = (DecoderLayer(config) for _ in range(config.num_hidden_layers))
        modules = {
            "embed_tokens": nn.Embedding.from_pretrained(weight_VE, freeze=False),
            "layers": nn.ModuleList(layers),
            "norm": nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
        }
        self.model = nn.ModuleDict(modules)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @property
    def head_weight_VE(self) -> nn.Parameter:
        if self.lm_head is None:
            return self.model.embed_tokens.weight
        return self.lm_head.weight

    def embed(self, tokens_BS: Tensor) -> Tensor:
        """Token embeddings (B, S, E).

        In training, each distinct token is looked up once, cast to float32 and then repeated, so
        that the gradients of its occurrences are summed in float32. Summed one by one in bf16, the
        gradient of a tied embedding was off by 11 % instead of 1.4 %.
        """
        weight_VE = self.model.embed_tokens.weight
        if not torch.is_grad_enabled():
            return F.embedding(tokens_BS, weight_VE)
        ids_U, index_BS = tokens_BS.unique(return_inverse=True)
        rows_UE = F.embedding(ids_U, weight_VE)
        wide_UE = rows_UE.to(torch.promote_types(rows_UE.dtype, torch.float32))
        return F.embedding(index_BS, wide_UE).to(weight_VE.dtype)

    def hidden_states(
        self,
        tokens_BS: Tensor,
        positions_BS: Tensor,
        attention: AttentionFunction,
        *,
        recompute_layers: int = 0,
    ) -> Tensor:
        """Hidden states (B, S, E) after the last norm, in the dtype of the weights.

        The first recompute_layers layers keep only their input and run again in the backward pass.
        """
        x_BSE = self.embed(tokens_BS)
        rope = self._rope(positions_BS, x_BSE.dtype)
        for i, layer in enumerate(self.model.layers):
            run = functools.partial(layer, rope=rope, layer=i, attention=attention)
            x_BSE = Recompute.apply(run, x_BSE) if i < recompute_layers else run(x_BSE)
        return self.model.norm(x_BSE)

    def _rope(self, positions_BS: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosine and sine (B, S, D) of the rotation angles, computed in float32."""
        D = self.config.head_dim
        exponents = torch.arange(0, D, 2, device=positions_BS.device).float() / D
        angles_BSD = positions_BS[:, :, None].float() * self.config.rope_theta**-exponents
        angles_BSD = angles_BSD.repeat(1, 1, 2)
        return angles_BSD.cos().to(dtype), angles_BSD.sin().to(dtype)

    def logits(self, hidden_PE: Tensor) -> Tensor:
        return head_logits(hidden_PE, self.head_weight_VE)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V), float32, causal: padding on the right changes nothing before it."""
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        positions_BT = positions_BT.expand_as(tokens_BT)
        hidden_BTE = self.hidden_states(tokens_BT, positions_BT, causal_attention)
        return self.logits(hidden_BTE.flatten(0, 1)).float().view(*tokens_BT.shape, -1)

    def next_token_logits(
        self, tokens_BL: Tensor, cache: KVCache, *, active_B: Tensor | None = None
    ) -> Tensor:
        """Append L tokens to the first B slots of the cache; return the logits (B, V) of the next.

        The logits are float32. Where active_B is False, the slot keeps its length, so its new
        tokens are forgotten and its logits have no meaning.
        """
        B, L = tokens_BL.shape
        positions_BL, attention = cache.extend(slice(B), L)
        hidden_BLE = self.hidden_states(tokens_BL, positions_BL, attention)
        cache.lengths_B[:B] += L if active_B is None else L * active_B
        cache.longest += L
        return self.logits(hidden_BLE[:, -1]).float()

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: torch.device | str, dtype: torch.dtype
    ) -> "Transformer":
        """Load a published checkpoint, one tensor at a time, into flat weights on the device.

        Raises FileNotFoundError for a missing file, and ValueError naming what is damaged, missing,
        unexpected or of the wrong shape.
        """
        with torch.device("meta"):
            model = cls(Qwen2Config.from_json(Path(directory, "config.json")))
        shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
        files = find_weights(Path(directory), shapes)
        allocate(model, device=device, dtype=dtype)
        read_weights(files, {name: weight.detach() for name, weight in model.named_parameters()})
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write config.json and model.safetensors (shards and an index above 5 GB)."""
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        weights = {name: weight.detach() for name, weight in self.named_parameters()}
        write_weights(directory, weights)
        write_config(directory / "config.json", asdict(self.config), self.head_weight_VE.dtype)
