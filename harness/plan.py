"""The memory plan of a run: the bytes of each part at its peak, computed before anything is loaded.

The model determines weights, gradient and optimizer state. What the budget leaves goes to the KV
cache during the rollout and to activations during the update: the plan decodes as many answers at
once as fit and recomputes as few layers as possible.
"""

import math
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
PROMPT_TOKENS = 256  # assumed length of a prompt: the plan is made before any prompt is known
CONTEXT_BYTES = GIB // 2  # CUDA context, library workspaces, fragmentation
NCCL_BYTES = GIB  # buffers of NCCL, which connects the GPUs of several ranks
RESERVE_BYTES = GIB  # left free if model.memory_gib is null
# A decode step holds two buffers of the size of its float32 logits. Eager steps and recorded steps
# (CUDA graphs) have separate memory pools.
STEP_BUFFERS = 4
# Device memory per kernel of a graph, up to CUDA 12.4 and driver 550 (PyTorch, "CUDAGraph Trees").
GRAPH_BYTES = 2**16
CHUNK_BUFFERS = 1.5  # float32 logits of a chunk of the loss, and their gradient in bf16
UPDATE_BUFFERS = 8  # float32 temporaries of a piece of the optimizer step
# Per token of a micro-batch: the queries of attention, padded to equal lengths, and its keys, as
# each answer copies its prompt's. For geometric lengths with means of 128 to 1,024 tokens; shorter
# answers to long prompts can need a few percent more than the plan (bench/LOG.md).
QUERIES_PER_TOKEN, KEYS_PER_TOKEN = 1.35, 2.5
TRANSIT = 2**23  # elements that the ranks exchange in one collective call

# hidden size, intermediate size, layers, heads, key heads (the order of Qwen2Config), tied head:
# enough to plan before a model is downloaded.
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
    """What one rank needs. All sizes are in bytes."""

    rollout: dict[str, float]  # parts that are in memory together at the rollout's peak
    evaluation: dict[str, float]  # the same at the peak of an evaluation
    update: dict[str, float]  # the same at the update's peak
    budget: float
    pinned_bytes: float  # CPU memory for offloaded optimizer state
    cache_bytes: int  # KV cache budget for grpo.rollout
    evaluation_cache_bytes: int  # the same for an evaluation, which holds other prompts
    cache_slots: int  # answers decoded at once in the rollout; 0 if not even one fits
    recompute_layers: int  # for grpo.update_policy

    @property
    def needed(self) -> float:
        return max(sum(parts.values()) for parts in (self.rollout, self.evaluation, self.update))

    @property
    def fits(self) -> bool:
        return self.needed <= self.budget

    def table(self) -> str:
        parts = self.rollout, self.evaluation, self.update
        columns = [part | {"total": sum(part.values())} for part in parts]
        lines = [f"{'GiB':42}{'rollout':>12}{'evaluation':>12}{'update':>12}"]
        for name in dict.fromkeys([*self.rollout, *self.evaluation, *self.update, "total"]):
            cells = [f"{c[name] / GIB:12.2f}" if name in c else f"{'-':>12}" for c in columns]
            lines.append(f"{name:42}{''.join(cells)}")
        pinned = f"; pinned CPU memory: {self.pinned_bytes / GIB:.2f}" if self.pinned_bytes else ""
        return "\n".join([*lines, f"budget: {self.budget / GIB:.2f}{pinned}"])


def make_plan(
    config: Config, shape: Qwen2Config, *, cards: int = 1, held_out: int | None = None
) -> Plan:
    """Plan the memory of one of `cards` ranks.

    held_out: number of evaluation questions (default: data.test_size, if the task has that key).
    Raises ValueError if the run does not fit, with the table and settings with which it fits.
    """
    if held_out is None:
        held_out = getattr(config.data, "test_size", 0)
    gib, device = config.model.memory_gib, config.model.device
    budget = gib * GIB if gib else _free_budget(device, cards)
    plan = _plan(config, shape, cards, held_out, budget)
    if not plan.fits:
        raise ValueError(
            f"the run does not fit into {budget / GIB:.2f} GiB (model.memory_gib={gib or 'null'}):"
            f"\n{plan.table()}\n{_remedy(config, shape, cards, held_out, plan)}"
        )
    return plan


def _plan(config: Config, shape: Qwen2Config, cards: int, held_out: int, budget: float) -> Plan:
    training, dtype = config.training, getattr(torch, config.model.dtype)
    questions = math.ceil(training.num_questions_per_batch / cards)
    num_answers = questions * (training.batch_size // training.num_questions_per_batch)
    rollout, cache_slots = _rollout_parts(config, shape, cards, questions, num_answers, budget)
    held_out = max(1, math.ceil(held_out / cards))
    evaluation, slots = _rollout_parts(config, shape, cards, held_out, held_out, budget)
    update, recompute_layers = _update_parts(config, shape, cards, budget)
    slot_bytes = KVCache.bytes_per_token(shape, dtype) * (PROMPT_TOKENS + training.max_gen_len)
    return Plan(
        rollout,
        evaluation,
        update,
        budget,
        pinned_bytes=_state_bytes(shape, dtype, cards) if _offloads(config) else 0,
        cache_bytes=max(cache_slots, 1) * slot_bytes,
        evaluation_cache_bytes=max(slots, 1) * slot_bytes,
        cache_slots=cache_slots,
        recompute_layers=recompute_layers,
    )


def _fixed_parts(config: Config, shape: Qwen2Config, cards: int) -> dict[str, float]:
    """What stays in memory throughout the run."""
    dtype = getattr(torch, config.model.dtype)
    state = 0 if _offloads(config) else _state_bytes(shape, dtype, cards)
    parts = {"weights": num_weights(shape) * dtype.itemsize, "optimizer state": state}
    if config.model.device == "cuda":
        parts["CUDA context and workspaces"] = CONTEXT_BYTES
        if cards > 1:
            parts["NCCL buffers"] = NCCL_BYTES
    return parts


def _rollout_parts(
    config: Config,
    shape: Qwen2Config,
    cards: int,
    questions: int,
    num_answers: int,
    budget: float,
) -> tuple[dict[str, float], int]:
    """The parts of the rollout, and how many answers the budget lets it decode at once."""
    dtype, longest = getattr(torch, config.model.dtype), PROMPT_TOKENS + config.training.max_gen_len
    parts, token_bytes = _fixed_parts(config, shape, cards), KVCache.bytes_per_token(shape, dtype)
    parts["prompts"] = questions * PROMPT_TOKENS * token_bytes
    if config.model.device == "cuda":
        parts["graphs of the decode step"] = GRAPHS_KEPT * GRAPH_BYTES * step_kernels(shape)
    if packs_for_decoding(config.model.device, dtype):
        parts["weights, packed for decoding"] = parts["weights"]

    # Answers run on for up to CHECK_INTERVAL tokens before the host sees that they have ended.
    slot_bytes = token_bytes * (longest + CHECK_INTERVAL)
    # If prompts are shorter than assumed, the same cache holds more answers, with their logits.
    more_slots = longest / config.training.max_gen_len
    step_bytes = STEP_BUFFERS * 4 * shape.vocab_size * more_slots
    free = budget - sum(parts.values())
    cache_slots = max(0, min(num_answers, int(free // (slot_bytes + step_bytes))))
    slots = max(cache_slots, 1)
    parts["decode step"] = slots * step_bytes
    parts[f"KV cache, {slots} of {num_answers} answers at once"] = slots * slot_bytes
    return parts, cache_slots


def _update_parts(
    config: Config, shape: Qwen2Config, cards: int, budget: float
) -> tuple[dict[str, float], int]:
    """The parts of the update, and how many layers it must recompute to stay within the budget."""
    device, dtype = config.model.device, getattr(torch, config.model.dtype)
    parts = _fixed_parts(config, shape, cards)
    piece = min(PIECE[device], num_weights(shape))
    in_transit = IN_TRANSIT * piece * AdamW.state_bytes_per_weight(dtype)
    head = shape.vocab_size * shape.hidden_size * dtype.itemsize
    parts |= {
        "gradient": parts["weights"],
        "gradient of the head from one micro-batch": head,
        "chunk of logits": CHUNK_BUFFERS * LOGIT_CHUNK_BYTES[device],
        "optimizer temporaries": UPDATE_BUFFERS * 4 * piece
        + (in_transit if _offloads(config) else 0),
    }
    if cards > 1:
        parts["exchange between ranks"] = 2 * 4 * min(TRANSIT, num_weights(shape))
    # A micro-batch holds at least one answer, however long.
    tokens = max(config.training.micro_batch_tokens, PROMPT_TOKENS + config.training.max_gen_len)
    parts["attention mask"] = tokens * mask_bytes_per_token(config, shape)

    # At the end of the backward pass the activations are gone, but the embedding's gradient exists.
    # If the head is tied to the embedding, the head's gradient is kept until then, too.
    waiting = head - parts["chunk of logits"] - parts["attention mask"]
    embedding = waiting if shape.tie_word_embeddings else 0
    for recompute_layers in range(shape.num_hidden_layers):
        activations = activation_bytes_per_token(shape, dtype, recompute_layers, device)
        activation_bytes = max(tokens * activations, embedding)
        if sum(parts.values()) + activation_bytes <= budget:
            break
    name = f"activations, {recompute_layers} of {shape.num_hidden_layers} layers recomputed"
    return parts | {name: activation_bytes}, recompute_layers


def _free_budget(device: str, cards: int) -> float:
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "model.memory_gib=null plans with the memory that is free on the GPU, but there is no "
            "CUDA device; say what may be used, for example model.memory_gib=22.5 on a 24 GB card"
        )
    ranks = cards if device == "cpu" else 1  # ranks on CPUs share one machine's memory
    return (free_bytes(torch.device(device)) - RESERVE_BYTES) / ranks


def _offloads(config: Config) -> bool:
    return config.optimizer.offload and config.model.device == "cuda"


def _state_bytes(shape: Qwen2Config, dtype: torch.dtype, cards: int) -> float:
    return num_weights(shape) * AdamW.state_bytes_per_weight(dtype) / cards


def activation_bytes_per_token(
    shape: Qwen2Config, dtype: torch.dtype, recompute_layers: int, device: str = "cpu"
) -> float:
    """Bytes that the forward pass keeps for the backward pass, per token of a micro-batch."""
    b, E, I = dtype.itemsize, shape.hidden_size, shape.intermediate_size
    # A norm keeps its input. On a CPU it is in float32, with the normalised value beside it.
    norms = 2 * b * E if device == "cuda" else 2 * (4 * E + 4 * E)
    # Attention keeps its input, queries, keys, values and its result, padded and not. The MLP keeps
    # its input, gate, up and silu(gate) * up.
    keys = KEYS_PER_TOKEN * shape.num_key_value_heads * shape.head_dim
    attention = b * (2 * E + 2 * QUERIES_PER_TOKEN * E + 2 * keys)
    mlp = b * (E + 3 * I)
    # Half a layer more for gradients in flight. Whole layers are freed before the backward pass
    # reaches the recomputed ones, which are alive one at a time.
    layers = max(shape.num_hidden_layers - recompute_layers + 0.5, 1.5 if recompute_layers else 0.0)
    # The last term is the embedding, the final norm, the scored hidden states and their gradient.
    return layers * (norms + attention + mlp) + recompute_layers * b * E + 6 * b * E


def mask_bytes_per_token(config: Config, shape: Qwen2Config) -> int:
    heads_per_key = shape.num_attention_heads // shape.num_key_value_heads
    longest = PROMPT_TOKENS + config.training.max_gen_len
    return heads_per_key * longest * getattr(torch, config.model.dtype).itemsize


def step_kernels(shape: Qwen2Config) -> int:
    """An upper bound for the number of kernels in a decode step."""
    return 32 * shape.num_hidden_layers + 64


def num_weights(shape: Qwen2Config) -> int:
    E, I = shape.hidden_size, shape.intermediate_size
    KD = shape.num_key_value_heads * shape.head_dim
    layer = 2 * E * E + E + 2 * (E * KD + KD) + 3 * E * I + 2 * E
    matrices = 1 if shape.tie_word_embeddings else 2
    return shape.num_hidden_layers * layer + E + matrices * shape.vocab_size * E


def find_shape(model_path: str) -> Qwen2Config:
    """Read a model directory's shape, or look up a published model that is not downloaded yet."""
    path = Path(model_path)
    if path.exists():
        return Qwen2Config.from_json(path / "config.json")
    for size, (*sizes, tied) in PUBLISHED.items():
        if f"qwen2.5-{size}".lower() in path.name.lower():
            return Qwen2Config(
                151936 if tied else 152064,
                *sizes,
                max_position_embeddings=32768,
                rms_norm_eps=1e-6,
                rope_theta=1e6,
                tie_word_embeddings=tied,
            )
    raise FileNotFoundError(absent_model(path))


def absent_model(path: Path) -> str:
    if path.name.startswith("Qwen2.5-"):
        command = f"uv run hf download Qwen/{path.name} --local-dir {path}"
        return f"model.path={path} does not exist; download it with\n  {command}"
    return (
        f"model.path={path} does not exist; name a directory that holds a model, or make a small "
        "one with\n  uv run warm_start.py\nOnly Qwen2.5 can be planned before it is downloaded; "
        f"known sizes: {', '.join(PUBLISHED)}"
    )


def _remedy(config: Config, shape: Qwen2Config, cards: int, held_out: int, plan: Plan) -> str:
    """Settings with which the run fits. Each suggestion has been tried."""

    now, longest = config.training.micro_batch_tokens, PROMPT_TOKENS + config.training.max_gen_len
    step = max(256, now // 32)
    for offload in (config.optimizer.offload, True):
        for tokens in (now, *range(now - step, longest, -step), longest):
            settings = {}
            if offload != config.optimizer.offload:
                settings["optimizer.offload"] = "true"
            if longest <= tokens < now:
                settings["training.micro_batch_tokens"] = tokens
            training = config.training.model_copy(update={"micro_batch_tokens": min(tokens, now)})
            optimizer = config.optimizer.model_copy(update={"offload": offload})
            changed = config.model_copy(update={"training": training, "optimizer": optimizer})
            if settings and _plan(changed, shape, cards, held_out, plan.budget).fits:
                return "set " + " and ".join(f"{key}={value}" for key, value in settings.items())
    fewer = [held_out >> shift for shift in range(1, held_out.bit_length())]
    for n in fewer if hasattr(config.data, "test_size") else []:
        if _plan(config, shape, cards, n, plan.budget).fits:
            return f"set data.test_size={n}"
    reserve = RESERVE_BYTES if config.model.memory_gib is None else 0
    needed = math.ceil(100 * (plan.needed + reserve) / GIB) / 100
    if config.model.memory_gib is None:
        return f"{needed:.2f} GiB of free memory would be enough; otherwise use a smaller model"
    return f"set model.memory_gib={needed:.2f} if that much is available, or use a smaller model"
