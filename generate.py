"""Sampling: prompts of token ids in, sampled token ids out.

generate_one is the algorithm: run the prompt, sample a token, run that token, and so on until a
stop token or the length limit. generate does the same for many answers at once and samples the same
tokens. It runs each prompt once for all of its answers (prefill), decodes the answers side by side
(Decoder.step), and gives the slot of an answer that has ended to a waiting answer (refill_slots).

An answer is decoded in a slot of the KV cache; the memory budget decides how many slots there are.
Each random number belongs to an answer and a position, not to a slot. So neither the memory budget
nor the number of processes changes what is sampled, up to rounding: in bf16 a product may round
differently for another number of slots.

Dimension key: N prompts, A answers, R slots, P positions, G response tokens at most, V vocabulary,
               L tokens.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data_types import NoProgress, SingleProcess
from gpu import CHECK_INTERVAL, GraphedStep, free_bytes, round_up_slots
from qwen2_model import KVCache, Qwen2Config, Transformer

MASKED = -1e30  # logit of an id that is never sampled; finite, because 0 * -inf is NaN
PREFILL_TOKENS = 8192  # prompts run in batches of about this many tokens


@dataclass(frozen=True)
class SamplingParams:
    max_gen_len: int  # response tokens; every answer has this budget, whatever its prompt's length
    temperature: float
    vocab_size: int  # entries of the tokenizer; further rows of the head are never sampled
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class Completion:
    """One sampled answer."""

    token_ids: list[int]  # including the stop token, if one was sampled
    logprobs: list[float]  # log π of each token, nats
    entropy: float  # of the sampling distribution, mean over the tokens, nats
    is_finished: bool  # a stop token was sampled within the budget


def seeded_generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """A random generator that depends on these three values and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ---------------------------------------------------------------- one token


def scale_and_mask_(logits_PV: Tensor, temperature: float, vocab_size: int) -> Tensor:
    """Divide logits by the temperature and mask the ids beyond the tokenizer, in place.

    logits_PV: float32 or float64. The softmax of the result is the policy π, in sampling and in
    training: both call this function.
    """
    if temperature != 1.0:
        logits_PV.div_(temperature)
    logits_PV[:, vocab_size:].fill_(MASKED)
    return logits_PV


def sample_tokens(
    logprobs_RV: Tensor, uniform_R: Tensor, vocab_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sample one id per row: the first one at which the cumulative probability exceeds uniform_R.

    uniform_R: in [0, 1). One uniform number per row takes a sixth of the time of torch.multinomial,
    which draws one number per entry.
    Returns ids, their log-probabilities and the entropies, each (R,).
    """
    probs_RV = logprobs_RV.exp()
    entropy_R = -torch.einsum("rv,rv->r", probs_RV, logprobs_RV)
    cumulative_RV = probs_RV.cumsum_(dim=-1)
    threshold_R1 = uniform_R[:, None] * cumulative_RV[:, -1:]  # the sum is only about 1
    ids_R1 = torch.searchsorted(cumulative_RV, threshold_R1, right=True)
    ids_R1.clamp_(max=vocab_size - 1)  # a parallel cumsum is not quite monotone at its end
    return ids_R1[:, 0], logprobs_RV.gather(1, ids_R1)[:, 0], entropy_R


@torch.inference_mode()
def generate_one(
    model: Transformer, prompt: list[int], params: SamplingParams, uniforms_G: Tensor
) -> Iterator[int]:
    """Sample one answer, token by token, including the stop token. Read this version first."""
    head_VE = model.head_weight_VE
    max_len = len(prompt) + params.max_gen_len
    cache = KVCache(
        model.config, batch_size=1, max_len=max_len, device=head_VE.device, dtype=head_VE.dtype
    )
    tokens_1L = torch.tensor([prompt], device=head_VE.device)
    for uniform_1 in uniforms_G[: params.max_gen_len].to(head_VE.device).split(1):
        logits_1V = model.next_token_logits(tokens_1L, cache)
        logits_1V = scale_and_mask_(logits_1V, params.temperature, params.vocab_size)
        logprobs_1V = torch.log_softmax(logits_1V, dim=-1)
        ids_1, _, _ = sample_tokens(logprobs_1V, uniform_1, params.vocab_size)
        yield int(ids_1)
        if int(ids_1) in params.stop_ids:
            return
        tokens_1L = ids_1[:, None]


# ---------------------------------------------------------------- many answers at once


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    num_answers: int,
    generator: torch.Generator,
    cache_bytes: int | None = None,
    world: SingleProcess = SingleProcess(),
    progress: NoProgress = NoProgress(),
) -> list[Completion]:
    """Sample num_answers answers to each prompt. Answer j to prompt i is item i * num_answers + j.

    cache_bytes: memory for the KV cache; None: what is free. Answers that do not fit wait for a
    slot. Each rank returns the answers to its shard of the prompts, with the random numbers that a
    single process would use. Raises ValueError for an empty prompt, a prompt too long for the
    model, or a budget too small for one answer.
    """
    for i, prompt in enumerate(prompts):
        check_length(model.config, len(prompt), params.max_gen_len, f"prompt {i}")
    # Every rank draws the table of all answers, so the samples do not depend on the ranks. The
    # extra row is for the dummy answer of the Decoder.
    num_uniforms = len(prompts) * num_answers + 1, params.max_gen_len + 1
    uniforms_AG = torch.rand(num_uniforms, generator=generator)
    shard = world.shards(len(prompts))[world.rank]
    prompts = prompts[shard]
    if not prompts:  # more ranks than prompts
        return []
    answers = len(prompts) * num_answers
    uniforms_AG = uniforms_AG[shard.start * num_answers :][: answers + 1]
    slots = count_slots(model, prompts, params, answers=answers, cache_bytes=cache_bytes)
    with progress.phase("prefill", len(prompts)):
        prompt_cache = prefill(model, prompts, progress)
    with progress.phase("decode", answers):
        decoder = Decoder(
            model, prompts, prompt_cache, params, num_answers, uniforms_AG, slots=slots
        )
        while decoder.in_use:
            slot_steps = decoder.decode()
            progress.update(decoder.refill_slots(), slot_steps=slot_steps)
        return decoder.completions()


def check_length(config: Qwen2Config, prompt_tokens: int, max_gen_len: int, name: str) -> None:
    """Raise ValueError, naming the prompt, if it is empty or leaves no room for an answer."""
    if not prompt_tokens:
        raise ValueError(f"{name} has no tokens; an answer continues at least one token")
    limit = config.max_position_embeddings
    room = limit - prompt_tokens
    if room < max_gen_len:
        remedy = f"set training.max_gen_len={room}" if room > 0 else "shorten the prompt"
        raise ValueError(
            f"{name} has {prompt_tokens} tokens; with an answer of max_gen_len={max_gen_len} "
            f"it exceeds the model's max_position_embeddings={limit}; {remedy}"
        )


def count_slots(
    model: Transformer,
    prompts: list[list[int]],
    params: SamplingParams,
    *,
    answers: int,
    cache_bytes: int | None,
) -> int:
    """How many answers are decoded at once: as many as the memory for the KV cache holds."""
    head_VE = model.head_weight_VE
    longest = max(map(len, prompts)) + params.max_gen_len
    slot_bytes = KVCache.bytes_per_token(model.config, head_VE.dtype) * longest
    if cache_bytes is None:
        # Besides its cache, a slot needs two float32 rows of vocab_size during a decode step.
        step_bytes = 8 * model.config.vocab_size
        free = int(0.9 * free_bytes(head_VE.device))
        cache_bytes = free * slot_bytes // (slot_bytes + step_bytes)
    if cache_bytes < slot_bytes:
        raise ValueError(
            f"a KV cache of {cache_bytes:,} bytes cannot hold one answer: prompt and answer have "
            f"up to {longest} tokens and take {slot_bytes:,}; raise the budget or lower max_gen_len"
        )
    return min(cache_bytes // slot_bytes, answers)


def prefill(
    model: Transformer, prompts: list[list[int]], progress: NoProgress = NoProgress()
) -> KVCache:
    """Run the prompts. Slot i of the returned cache holds prompt i without its last token.

    Decoding an answer starts with this last token.
    """
    head_VE = model.head_weight_VE
    prefixes = [prompt[:-1] for prompt in prompts]
    longest = max(1, *map(len, prefixes))
    cache = KVCache(
        model.config,
        batch_size=len(prompts),
        max_len=longest,
        device=head_VE.device,
        dtype=head_VE.dtype,
    )
    batch_size = max(1, PREFILL_TOKENS // longest)
    for start in range(0, len(prompts), batch_size):
        batch = prefixes[start : start + batch_size]
        slots = slice(start, start + len(batch))
        padded = [prefix + [0] * (longest - len(prefix)) for prefix in batch]
        positions_NL, attention = cache.extend(slots, longest)
        model.hidden_states(torch.tensor(padded, device=head_VE.device), positions_NL, attention)
        cache.lengths_B[slots] = torch.tensor([len(p) for p in batch], device=head_VE.device)
        progress.update(len(batch))
    return cache


class Decoder:
    """The answers of a rollout, and the slots in which they are decoded.

    Slots 0 … in_use - 1 decode one answer each. The other slots hold a finished dummy answer, the
    last row of each table. It pads the batch to a size for which a CUDA graph exists.
    """

    def __init__(
        self,
        model: Transformer,
        prompts: list[list[int]],
        prompt_cache: KVCache,
        params: SamplingParams,
        num_answers: int,
        uniforms_AG: Tensor,
        *,
        slots: int,
    ):
        device, dtype = model.head_weight_VE.device, model.head_weight_VE.dtype
        self.model, self.params = model, params
        self.prompt_cache, self.num_answers = prompt_cache, num_answers
        self.graphs = GraphedStep() if device.type == "cuda" else None
        # On CUDA, checking which answers have ended makes the host wait, so check rarely.
        self.interval = CHECK_INTERVAL if device.type == "cuda" else 1
        answers, G = len(prompts) * num_answers, params.max_gen_len
        max_len = max(map(len, prompts)) + G + self.interval
        self.cache = KVCache(
            model.config, batch_size=slots, max_len=max_len, device=device, dtype=dtype
        )
        self.is_stop_V = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
        self.is_stop_V[sorted(params.stop_ids)] = True
        # One row per answer, and one for the dummy. ids_AG starts with the prompt's last token.
        self.uniforms_AG = uniforms_AG.to(device)
        self.ids_AG = torch.zeros((answers + 1, G + 2), dtype=torch.long, device=device)
        last_tokens_N = torch.tensor([p[-1] for p in prompts], device=device)
        self.ids_AG[:-1, 0] = last_tokens_N.repeat_interleave(num_answers)
        self.logprobs_AG = torch.zeros((answers + 1, G + 1), device=device)
        self.entropies_AG = torch.zeros_like(self.logprobs_AG)
        self.lengths_A = torch.zeros(answers + 1, dtype=torch.long, device=device)
        self.ended_A = torch.zeros(answers + 1, dtype=torch.bool, device=device)
        self.ended_A[-1] = True
        # Per slot: which answer it decodes.
        self.answers_R = torch.full((slots,), answers, device=device)
        self.waiting_A = torch.arange(answers, device=device)
        self.in_use = 0
        self.refill_slots()

    def refill_slots(self) -> int:
        """Fill the slots of ended answers with live ones, and admit waiting answers after them.

        Returns the number of answers that have ended since the last call.
        """
        ended = self.ended_A[self.answers_R[: self.in_use]].tolist()
        alive = ended.count(False)
        gaps = [slot for slot in range(alive) if ended[slot]]
        movers = [slot for slot in range(alive, self.in_use) if not ended[slot]]
        if gaps:
            gaps_R, movers_R = self.answers_R.new_tensor(gaps), self.answers_R.new_tensor(movers)
            self.cache.copy_slots(self.cache, movers_R, gaps_R, self.cache.longest)
            self.answers_R[gaps_R] = self.answers_R[movers_R]
        room = len(self.answers_R) - alive
        admitted_R, self.waiting_A = self.waiting_A[:room], self.waiting_A[room:]
        self.in_use = alive + len(admitted_R)
        if len(admitted_R):
            slots, prompts_R = slice(alive, self.in_use), admitted_R // self.num_answers
            columns = self.prompt_cache.max_len
            self.cache.copy_slots(self.prompt_cache, prompts_R, slots, columns)
            self.answers_R[slots] = admitted_R
        self.answers_R[self.in_use :] = len(self.ended_A) - 1  # the dummy
        lengths_R = self.cache.lengths_B[: self.in_use]
        self.cache.longest = int(lengths_R.max()) if self.in_use else 0
        return len(ended) - alive

    def decode(self) -> int:
        """Sample the next tokens of all slots in use. Returns slots x decode steps."""
        if self.graphs is None:
            self.step(self.in_use)
            return self.in_use
        slots = min(round_up_slots(self.in_use), len(self.answers_R))
        for _ in range(self.interval):
            self.graphs.step(self, slots)
        return slots * self.interval

    def step(self, slots: int) -> None:
        """Sample a token in each of the first `slots` slots. No host-device synchronisation."""
        answers_R = self.answers_R[:slots]
        lengths_R, active_R = self.lengths_A[answers_R], ~self.ended_A[answers_R]
        tokens_R = self.ids_AG[answers_R, lengths_R]
        logits_RV = self.model.next_token_logits(tokens_R[:, None], self.cache, active_B=active_R)
        scale_and_mask_(logits_RV, self.params.temperature, self.params.vocab_size)
        logprobs_RV = torch.log_softmax(logits_RV, dim=-1, out=logits_RV)
        uniform_R = self.uniforms_AG[answers_R, lengths_R]
        ids_R, logprobs_R, entropies_R = sample_tokens(
            logprobs_RV, uniform_R, self.params.vocab_size
        )
        # An answer that has ended is decoded until the next refill. What it samples is written
        # after its last token, and its length stays the same.
        self.ids_AG[answers_R, lengths_R + 1] = ids_R
        self.logprobs_AG[answers_R, lengths_R] = logprobs_R
        self.entropies_AG[answers_R, lengths_R] = entropies_R
        self.lengths_A[answers_R] = lengths_R + active_R
        is_last_R = self.is_stop_V[ids_R] | (lengths_R + 1 >= self.params.max_gen_len)
        self.ended_A[answers_R] = ~active_R | is_last_R

    def completions(self) -> list[Completion]:
        ids, lengths = self.ids_AG[:, 1:].tolist(), self.lengths_A[:-1].tolist()
        logprobs, entropies = self.logprobs_AG.tolist(), self.entropies_AG.tolist()
        completions = []
        for a, length in enumerate(lengths):
            token_ids = ids[a][:length]
            entropy = sum(entropies[a][:length]) / length
            is_finished = token_ids[-1] in self.params.stop_ids
            completions.append(Completion(token_ids, logprobs[a][:length], entropy, is_finished))
        return completions
