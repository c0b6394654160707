"""What a run will need of the card's memory, part by part, before anything is loaded.

Weights, gradients and optimizer state are given by the model. The KV cache of the rollout and the activations of the
update share what is left: the cache takes as many rows at once as fit, and as few layers as possible are run twice.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from gpu import CHECK_INTERVAL, GRAPHS_KEPT, IN_TRANSIT, free_bytes
from grpo import LOGIT_CHUNK_BYTES
from harness.config import Config
from harness.cpu import packs_for_decoding
from optimizer import PIECE, AdamW
from qwen2_model import KVCache, Qwen2Config

GIB = 2**30
PROMPT_TOKENS = 256  # allowed for a prompt; the task's own are not known yet
CONTEXT_BYTES = GIB // 2  # CUDA context, library workspaces, fragmentation
RESERVE_BYTES = GIB  # left alone where model.memory_gib does not say what may be used
STEP_BUFFERS = (
    4  # of the size of float32 logits: two of a decode step as it is, two of its recordings
)
GRAPH_BYTES = (
    2**16
)  # of the driver for a kernel of a graph, "up until CUDA 12.4 and driver 550" (PyTorch, CUDAGraph Trees)
CHUNK_BUFFERS = 1.5  # of the loss: a chunk's logits, in whose place all else is done, and their gradient in the weights' dtype
UPDATE_BUFFERS = 8  # float32 temporaries of a piece of the optimizer step
TRANSIT = 2**23  # elements that several processes share at once

# hidden, intermediate, layers, heads, key heads (in Qwen2Config's order), tied: to plan before a model is downloaded
PUBLISHED = {
    "0.5B": (896, 4864, 24, 14, 2, True),
    "1.5B": (1536, 8960, 28, 12, 2, True),
    "3B": (2048, 11008, 36, 16, 2, True),
    "7B": (3584, 18944, 28, 28, 4, False),
    "14B": (5120, 13824, 48, 40, 8, False),
    "32B": (5120, 27648, 64, 40, 8, False),
    "72B": (8192, 29568, 80, 64, 8, False),
}


@dataclass(frozen=True)
class Plan:
    rollout: dict[str, float]  # bytes of each part at the peak
    update: dict[str, float]
    budget: float  # bytes that may be used
    host: float  # bytes of page-locked CPU memory
    cache_bytes: int  # for grpo.rollout
    evaluation_cache_bytes: (
        int  # the same less the prompts of the held-out questions, which are prefilled all at once
    )
    checkpoint_layers: int  # for grpo.update_policy
    cache_rows: int

    @property
    def needed(self) -> float:  # bytes
        return max(sum(self.rollout.values()), sum(self.update.values()))

    def table(self) -> str:
        columns = [part | {"total": sum(part.values())} for part in (self.rollout, self.update)]
        lines = [f"{'GiB':42}{'rollout':>9}{'update':>9}"]
        for name in dict.fromkeys([*self.rollout, *self.update, "total"]):
            cells = (
                f"{column[name] / GIB:9.2f}" if name in column else f"{'-':>9}"
                for column in columns
            )
            lines.append(f"{name:42}{''.join(cells)}")
        lines.append(
            f"to use: {self.budget / GIB:.2f}"
            + (f"; page-locked CPU memory: {self.host / GIB:.2f}" if self.host else "")
        )
        return "\n".join(lines)


def make_plan(
    config: Config, shape: Qwen2Config, *, cards: int = 1, held_out: int | None = None
) -> Plan:
    """What each of so many cards needs, or of so many processes; held_out: how many questions, None: data.test_size.

    Raises ValueError naming the settings that would make the run fit, if it does not.
    """
    training, device, dtype = (
        config.training,
        config.model.device,
        getattr(torch, config.model.dtype),
    )
    questions = -(-training.num_questions_per_batch // cards)  # of a step, of one process
    answers = questions * (training.batch_size // training.num_questions_per_batch)
    budget = (
        config.model.memory_gib * GIB if config.model.memory_gib else _free_budget(device, cards)
    )
    weights = num_weights(shape) * dtype.itemsize
    state = num_weights(shape) * AdamW.state_bytes_per_weight(dtype) / cards
    offloaded = config.optimizer.offload and device == "cuda"
    fixed = {"weights": weights, "optimizer state": 0 if offloaded else state}
    if device == "cuda":
        fixed["CUDA context and workspaces"] = CONTEXT_BYTES

    token_bytes, longest = (
        KVCache.bytes_per_token(shape, dtype),
        PROMPT_TOKENS + training.max_gen_len,
    )
    row_bytes, prompt_bytes = token_bytes * longest, token_bytes * PROMPT_TOKENS
    ahead = token_bytes * CHECK_INTERVAL  # columns of tokens drawn before somebody looks
    more_rows = longest / training.max_gen_len  # have room where prompts are shorter than planned
    step_bytes = STEP_BUFFERS * 4 * shape.vocab_size * more_rows  # of a row
    rollout = fixed | {"prompts": prompt_bytes * questions}
    if device == "cuda":
        rollout["graphs of the decode step"] = GRAPHS_KEPT * GRAPH_BYTES * step_kernels(shape)
    if packs_for_decoding(device, dtype):
        rollout["weights, packed for decoding"] = weights
    cache_rows = int(
        min(answers, (budget - sum(rollout.values())) // (row_bytes + ahead + step_bytes))
    )
    rows = max(cache_rows, 1)
    rollout["decode step"] = rows * step_bytes
    rollout[f"KV cache, {rows} of {answers} rows at once"] = rows * (row_bytes + ahead)
    if held_out is None:
        held_out = getattr(config.data, "test_size", 0)  # a task may have other keys
    more_prompts = prompt_bytes * max(0, -(-held_out // cards) - questions)

    piece = min(PIECE[device], num_weights(shape))
    in_transit = IN_TRANSIT * piece * AdamW.state_bytes_per_weight(dtype) if offloaded else 0
    update = fixed | {
        "gradients": weights,
        "loss chunk": CHUNK_BUFFERS * LOGIT_CHUNK_BYTES[device],
        "optimizer temporaries": in_transit + UPDATE_BUFFERS * 4 * piece,
    }
    if cards > 1:
        update["pieces in transit to other cards"] = 2 * 4 * min(TRANSIT, num_weights(shape))
    tokens = max(training.micro_batch_tokens, longest)  # a row holds one answer, however long
    update["attention mask"] = tokens * mask_bytes_per_token(config, shape)
    for checkpoint_layers in range(shape.num_hidden_layers + 1):
        activations = tokens * activation_bytes_per_token(shape, dtype, checkpoint_layers, device)
        if sum(update.values()) + activations <= budget:
            break
    update[f"activations, {checkpoint_layers} of {shape.num_hidden_layers} layers run twice"] = (
        activations
    )
    plan = Plan(
        rollout,
        update,
        budget,
        state if offloaded else 0,
        rows * row_bytes,
        max(row_bytes, rows * row_bytes - more_prompts),
        checkpoint_layers,
        cache_rows,
    )
    if cache_rows < 1 or sum(update.values()) > budget:
        setting = f"model.memory_gib={config.model.memory_gib or 'null'}"
        raise ValueError(
            f"the run does not fit into {budget / GIB:.2f} GiB ({setting}):\n{plan.table()}\n"
            + _remedy(config, shape, plan)
        )
    return plan


def _free_budget(device: str, cards: int) -> float:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "model.memory_gib=null stands for what is free on the card, but no CUDA device is here; "
            "say what the card has, for example model.memory_gib=43.5"
        )
    return (free_bytes(torch.device(device)) - RESERVE_BYTES) / (
        cards if device == "cpu" else 1
    )  # they share this machine's


def activation_bytes_per_token(
    shape: Qwen2Config, dtype: torch.dtype, checkpoint_layers: int, device: str = "cpu"
) -> float:
    """What the backward pass needs of the forward pass, bytes a token of a micro-batch."""
    b, E, I = dtype.itemsize, shape.hidden_size, shape.intermediate_size
    # Each norm keeps its input: the kernel of a card as it is, on a CPU in float32 and the normalised value beside it.
    norms = 2 * b * E if device == "cuda" else 2 * (4 * E + 4 * E)
    attention = b * (
        4 * E + 4 * shape.num_key_value_heads * shape.head_dim
    )  # input, queries, result twice; keys, values
    mlp = b * (E + 3 * I)  # input, gate, up, silu(gate) * up
    layer = norms + attention + mlp
    # With half a layer for gradients in flight. When the first layer is run again, those that are kept whole have been freed.
    layers = max(
        shape.num_hidden_layers - checkpoint_layers + 0.5, 1.5 if checkpoint_layers else 0.0
    )
    return (
        layers * layer + checkpoint_layers * b * E + 6 * b * E
    )  # embedding, final norm, scored hidden states and their gradient


def mask_bytes_per_token(config: Config, shape: Qwen2Config) -> int:
    heads_per_key = shape.num_attention_heads // shape.num_key_value_heads
    return (
        heads_per_key
        * (PROMPT_TOKENS + config.training.max_gen_len)
        * getattr(torch, config.model.dtype).itemsize
    )


def step_kernels(shape: Qwen2Config) -> int:
    """Kernels of a decode step, at most."""
    return 32 * shape.num_hidden_layers + 64


def num_weights(shape: Qwen2Config) -> int:
    E, I, KD = (
        shape.hidden_size,
        shape.intermediate_size,
        shape.num_key_value_heads * shape.head_dim,
    )
    layer = 2 * E * E + E + 2 * (E * KD + KD) + 3 * E * I + 2 * E
    return (
        shape.num_hidden_layers * layer
        + E
        + shape.vocab_size * E * (1 if shape.tie_word_embeddings else 2)
    )


def find_shape(model_path: str) -> Qwen2Config:
    """The model's shape: of the directory or, before it is downloaded, of the published model of that name."""
    path = Path(model_path)
    size = next(
        (size for size in PUBLISHED if f"qwen2.5-{size}".lower() in path.name.lower()), None
    )
    if path.exists():
        return Qwen2Config.from_json(path / "config.json")
    if size is None:
        raise FileNotFoundError(absent_model(path))
    *sizes, tied = PUBLISHED[size]
    return Qwen2Config(
        151936 if tied else 152064,
        *sizes,
        max_position_embeddings=32768,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=tied,
    )


def absent_model(path: Path) -> str:
    return f"model.path={path} does not exist; " + (
        f"fetch it with\n  uv run hf download Qwen/{path.name} --local-dir {path}"
        if path.name.startswith("Qwen2.5-")
        else "name a directory with a model, or make a small one: uv run warm_start.py"
    )


def _remedy(config: Config, shape: Qwen2Config, plan: Plan) -> str:
    missing = plan.needed - plan.budget
    per_token = activation_bytes_per_token(
        shape, getattr(torch, config.model.dtype), shape.num_hidden_layers, config.model.device
    ) + mask_bytes_per_token(config, shape)
    tokens = int(config.training.micro_batch_tokens - missing / per_token) // 256 * 256
    if plan.cache_rows >= 1 and tokens >= config.training.max_gen_len + PROMPT_TOKENS:
        return f"set training.micro_batch_tokens={tokens}"
    if not config.optimizer.offload and config.model.device == "cuda":
        return "set optimizer.offload=true, which keeps the optimizer state in CPU memory"
    return (
        f"raise model.memory_gib by {missing / GIB:.1f} on a larger card, or take a smaller model"
    )
