"""The Qwen2.5 decoder, by hand: RMSNorm, grouped-query attention, rotary positions, SwiGLU.

Parameter names mirror the published checkpoints, so loading is a loop over names. The layers never know which
attention they are in: they hand (layer, q, k, v) to an `attend` function. Plain causal attention, the KV cache of
the sampler and the shared-prompt rows of the update are three such functions over the same weights.

Dimension key: B sequences, S tokens, E hidden size, V rows of the vocabulary head, D head size,
               H query heads, K key/value heads, R = H / K query heads per key head, C cached positions.
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

Attend = Callable[
    [int, Tensor, Tensor, Tensor], Tensor
]  # (layer, q_BHSD, k_BKSD, v_BKSD) -> out_BHSD

SPAN = 64  # cached positions are read in multiples of this, so that a decode step has few distinct shapes


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

        Raises FileNotFoundError, or ValueError naming the setting that is damaged or that this model does not implement.
        """
        published = read_config(Path(path))
        return cls(**{name: getattr(published, name) for name in cls.__dataclass_fields__})


class RunTwice(torch.autograd.Function):
    """Activation checkpointing (arXiv:1604.06174): keep a function's inputs alone, and run it again for their gradients.

    torch.utils.checkpoint does the same, but loads the compiler, 4 s and 150 MB.
    """

    @staticmethod
    def forward(ctx, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
        ctx.function = function
        ctx.save_for_backward(*inputs)
        return function(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        inputs = [x.detach().requires_grad_() for x in ctx.saved_tensors]
        with torch.enable_grad():
            out = ctx.function(*inputs)
        out.backward(grad)
        return None, *(x.grad for x in inputs)


def rotate(x_BHSD: Tensor, cos_BSD: Tensor, sin_BSD: Tensor) -> Tensor:
    """Rotary position embedding (RoFormer, arXiv:2104.09864), in the half-split layout of the published weights."""
    first, second = x_BHSD.chunk(2, dim=-1)
    return x_BHSD * cos_BSD[:, None] + torch.cat((-second, first), dim=-1) * sin_BSD[:, None]


class Attention(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        self.q_proj = nn.Linear(size, config.num_attention_heads * self.head_dim, bias=True)
        self.k_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim, bias=True)
        self.v_proj = nn.Linear(size, config.num_key_value_heads * self.head_dim, bias=True)
        self.o_proj = nn.Linear(config.num_attention_heads * self.head_dim, size, bias=False)

    def forward(
        self, x_BSE: Tensor, rope: tuple[Tensor, Tensor], layer: int, attend: Attend
    ) -> Tensor:
        B, S, _ = x_BSE.shape
        q_BHSD, k_BKSD, v_BKSD = (
            project(x_BSE).view(B, S, -1, self.head_dim).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_BHSD = attend(layer, rotate(q_BHSD, *rope), rotate(k_BKSD, *rope), v_BKSD)
        return self.o_proj(out_BHSD.transpose(1, 2).reshape(B, S, -1))


def swiglu(gate_BSI: Tensor, up_BSI: Tensor) -> Tensor:
    """SwiGLU (Shazeer, arXiv:2002.05202)."""
    return F.silu(gate_BSI) * up_BSI


class MLP(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x_BSE: Tensor) -> Tensor:
        # Autograd would keep silu(gate) beside gate, up and their product, 16 to 23 % more for a layer.
        return self.down_proj(RunTwice.apply(swiglu, self.gate_proj(x_BSE), self.up_proj(x_BSE)))


class DecoderLayer(nn.Module):
    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self, x_BSE: Tensor, rope: tuple[Tensor, Tensor], layer: int, attend: Attend
    ) -> Tensor:
        x_BSE = x_BSE + self.self_attn(self.input_layernorm(x_BSE), rope, layer, attend)
        return x_BSE + self.mlp(self.post_attention_layernorm(x_BSE))


def attend_causally(layer: int, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q_BHSD, k_BKSD, v_BKSD, is_causal=True, enable_gqa=True)


def attend_folded(q_BHSD: Tensor, k_BKCD: Tensor, v_BKCD: Tensor, bias_B1QC: Tensor) -> Tensor:
    """Attention with the query heads that share a key head folded into the query length, Q = R * S: (B, K, Q, D) against
    (B, K, C, D) reads each key once instead of R times, and lets a mask be used with kernels that refuse grouped heads.
    """
    q_BKQD = q_BHSD.reshape(len(q_BHSD), k_BKCD.shape[1], -1, q_BHSD.shape[3])
    return F.scaled_dot_product_attention(q_BKQD, k_BKCD, v_BKCD, attn_mask=bias_B1QC).reshape(
        q_BHSD.shape
    )


class KVCache:
    """Keys and values of the tokens seen so far, one row a sequence, each row with its own length.

    The object is a local of whoever samples; no module holds one. Row b's tokens stand at columns 0..lengths_B[b]-1,
    and what stands beyond is never read.
    """

    def __init__(
        self, config: Qwen2Config, *, batch_size: int, max_len: int, device, dtype: torch.dtype
    ):
        shape = (
            config.num_hidden_layers,
            batch_size,
            config.num_key_value_heads,
            max_len,
            config.head_dim,
        )
        # Zeros, because attention multiplies what it masks by 0, and 0 * NaN is NaN.
        self.keys_LBKCD = torch.zeros(shape, device=device, dtype=dtype)
        self.values_LBKCD = torch.zeros(shape, device=device, dtype=dtype)
        self.lengths_B = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.indices = torch.arange(
            max(batch_size, max_len), device=device
        )  # of rows and of columns, made once for all steps
        self.heads_per_key = config.num_attention_heads // config.num_key_value_heads
        self.span = 0  # upper bound of the lengths, known without asking the device

    @staticmethod
    def bytes_per_token(config: Qwen2Config, dtype: torch.dtype) -> int:
        return (
            2
            * config.num_hidden_layers
            * config.num_key_value_heads
            * config.head_dim
            * dtype.itemsize
        )

    def copy_rows(
        self, source: "KVCache", source_rows: Tensor, rows: Tensor | slice, columns: int
    ) -> None:
        """Let `rows` here hold what `source_rows` hold there, `columns` positions of it."""
        for target_LBKCD, origin_LBKCD in (
            (self.keys_LBKCD, source.keys_LBKCD),
            (self.values_LBKCD, source.values_LBKCD),
        ):
            for target_BKCD, origin_BKCD in zip(
                target_LBKCD, origin_LBKCD, strict=True
            ):  # a layer at a time: a copy comes between
                target_BKCD[rows, :, :columns] = origin_BKCD[source_rows, :, :columns]
        self.lengths_B[rows] = source.lengths_B[source_rows]

    def columns(self, num_tokens: int) -> int:
        """How many positions a pass over `num_tokens` more will read."""
        return min(-(-(self.span + num_tokens) // SPAN) * SPAN, self.keys_LBKCD.shape[3])

    def extend(self, rows: slice, num_tokens: int) -> tuple[Tensor, Attend]:
        """Make room for `num_tokens` more in these rows: their positions, and the attention over all."""
        max_len = self.keys_LBKCD.shape[3]
        if self.span + num_tokens > max_len:
            raise ValueError(
                f"the KV cache holds {max_len} tokens a row, {self.span} are used and {num_tokens} more do "
                f"not fit; make it with max_len={self.span + num_tokens}"
            )
        columns = self.columns(num_tokens)
        self.span += num_tokens
        positions_BS = self.lengths_B[rows, None] + self.indices[:num_tokens]
        rows_B1 = self.indices[: len(positions_BS), None]  # within the slice
        hidden_BSC = self.indices[:columns] > positions_BS[:, :, None]
        bias_BSC = self.keys_LBKCD.new_zeros(hidden_BSC.shape).masked_fill_(hidden_BSC, -torch.inf)
        bias_B1QC = bias_BSC.repeat(1, self.heads_per_key, 1)[:, None]

        def attend(layer: int, q_BHSD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor) -> Tensor:
            keys_BKCD, values_BKCD = self.keys_LBKCD[layer, rows], self.values_LBKCD[layer, rows]
            keys_BKCD[rows_B1, :, positions_BS] = k_BKSD.transpose(1, 2)
            values_BKCD[rows_B1, :, positions_BS] = v_BKSD.transpose(1, 2)
            return attend_folded(
                q_BHSD, keys_BKCD[:, :, :columns], values_BKCD[:, :, :columns], bias_B1QC
            )

        return positions_BS, attend


class Transformer(nn.Module):
    """Qwen2.5 for causal language modelling, with the names and shapes of the published checkpoints."""

    def __init__(self, config: Qwen2Config):
        super().__init__()
        self.config = config
        weight_VE = torch.empty(config.vocab_size, config.hidden_size)
        if (
            not weight_VE.is_meta
        ):  # drawing on the meta device imports nine hundred modules: 5 s and 150 MB
            nn.init.normal_(weight_VE)
        self.model = nn.ModuleDict(
            {
                "embed_tokens": nn.Embedding.from_pretrained(weight_VE, freeze=False),
                "layers": nn.ModuleList(
                    DecoderLayer(config) for _ in range(config.num_hidden_layers)
                ),
                "norm": nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps),
            }
        )
        self.lm_head = (
            None
            if config.tie_word_embeddings
            else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        )

    @property
    def head_weight_VE(self) -> nn.Parameter:
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def embed(self, tokens_BS: Tensor) -> Tensor:
        weight_VE = self.model.embed_tokens.weight
        if weight_VE.grad is None or not torch.is_grad_enabled():
            return F.embedding(tokens_BS, weight_VE)
        # To a gradient that stands already only the rows of these tokens are added, not a whole matrix around them; each row
        # once, summed in float32: added in bf16 token by token, a tied embedding's gradient was off by 11 %, so by 1.4 %.
        ids_U, places_BS = tokens_BS.unique(return_inverse=True)
        return F.embedding(places_BS, F.embedding(ids_U, weight_VE, sparse=True).float()).to(
            weight_VE.dtype
        )

    def hidden_states(
        self, tokens_BS: Tensor, positions_BS: Tensor, attend: Attend, *, checkpoint_layers: int = 0
    ) -> Tensor:
        """Final hidden states (B, S, E), after the last norm, in the weights' dtype.

        checkpoint_layers: so many layers keep only their input for the backward pass and are run again there.
        """
        D = self.config.head_dim
        frequencies_D = self.config.rope_theta ** -(
            torch.arange(0, D, 2, device=tokens_BS.device).float() / D
        )
        angles_BSD = (positions_BS[:, :, None].float() * frequencies_D).repeat(1, 1, 2)
        x_BSE = self.embed(tokens_BS)
        rope = angles_BSD.cos().to(x_BSE.dtype), angles_BSD.sin().to(x_BSE.dtype)
        for i, layer in enumerate(self.model.layers):
            run = functools.partial(layer, rope=rope, layer=i, attend=attend)
            x_BSE = RunTwice.apply(run, x_BSE) if i < checkpoint_layers else run(x_BSE)
        return self.model.norm(x_BSE)

    def logits(self, hidden_PE: Tensor, out: Tensor | None = None) -> Tensor:
        """Vocabulary logits (P, V), as the product gives them; into `out`, if it is given.

        On CUDA, without autograd, it accumulates and returns float32 whatever the weights' dtype. The CPU has no such
        product: there the logits of a bf16 model are bf16, the same in sampling and in training.
        """
        if hidden_PE.is_cuda and hidden_PE.dtype != torch.float32 and not torch.is_grad_enabled():
            return torch.mm(hidden_PE, self.head_weight_VE.t(), out_dtype=torch.float32, out=out)
        return torch.mm(hidden_PE, self.head_weight_VE.t(), out=out)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Logits (B, T, V) in float32, causal; padding on the right changes nothing to its left."""
        positions_BT = torch.arange(tokens_BT.shape[1], device=tokens_BT.device).expand_as(
            tokens_BT
        )
        hidden_BTE = self.hidden_states(tokens_BT, positions_BT, attend_causally)
        return self.logits(hidden_BTE.flatten(0, 1)).float().view(*tokens_BT.shape, -1)

    def next_token_logits(
        self, tokens_BL: Tensor, cache: KVCache, *, active_B: Tensor | None = None
    ) -> Tensor:
        """Append L tokens to each row of the cache and return the logits (B, V), float32, of what comes next.

        active_B: False leaves a row as it was, and its logits without meaning. B may be less than the cache's rows: the
        first B take part.
        """
        B, L = tokens_BL.shape
        positions_BL, attend = cache.extend(slice(B), L)
        hidden_BLE = self.hidden_states(tokens_BL, positions_BL, attend)
        cache.lengths_B[:B] += L if active_B is None else L * active_B
        return self.logits(hidden_BLE[:, -1]).float()

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, device, dtype: torch.dtype) -> "Transformer":
        """Load a published checkpoint: one tensor at a time into weights that already stand, flat, on the device.

        Raises FileNotFoundError for a missing file, ValueError naming what is damaged, missing, unexpected or misshapen.
        """
        with torch.device("meta"):
            model = cls(Qwen2Config.from_json(Path(directory, "config.json")))
        shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
        files = find_weights(Path(directory), shapes)
        allocate(model, device=device, dtype=dtype)
        read_weights(
            files, {name: parameter.detach() for name, parameter in model.named_parameters()}
        )
        return model

    def save_pretrained(self, directory: str | Path) -> None:
        """Write model.safetensors (or shards of at most 5 GB and their index) and config.json in the published format."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        write_weights(
            Path(directory),
            {name: parameter.detach() for name, parameter in self.named_parameters()},
        )
        write_config(Path(directory, "config.json"), asdict(self.config), self.head_weight_VE.dtype)
