"""Sampling: prompts of token ids in, sampled token ids out.

generate_one is the algorithm: run the prompt, then draw a token and run it, until one stops. generate does the same for
many answers at once and draws the same tokens: every prompt is run once for all its answers (prefill), answers share decode
steps (step), and an answer that has ended makes room for one that waits (turn_over).

An answer being decoded stands in a slot of the KV cache; there are as many slots as the cache budget allows. Random numbers
belong to the answer and the position, not to the slot, so neither the budget nor who decodes beside it changes what is drawn.

Dimension key: A answers asked for, R slots in use, G response tokens at most, V vocabulary, N prompts, L prompt tokens.
"""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from data_types import UNWATCHED, Watch
from gpu import CHECK_INTERVAL, GraphedStep, free_bytes, row_bucket
from qwen2_model import KVCache, Qwen2Config, Transformer

IMPOSSIBLE = (
    -1e30
)  # logit of an id that must not be drawn; finite, because 0 * log 0 is asked for in the entropy
PREFILL_TOKENS = 8192  # prompts go through the model in batches of about so many tokens


@dataclass(frozen=True)
class Sampling:
    """What is the same for every token of a rollout."""

    max_gen_len: (
        int  # response tokens; every answer has the same budget, whatever its prompt's length
    )
    temperature: float
    vocab_size: int  # entries of the tokenizer; the head has more rows, which must not be drawn
    stop_ids: frozenset[int]


@dataclass(frozen=True)
class Sample:
    token_ids: list[int]  # the stop token, if one was drawn, is the last
    logprobs: list[float]  # of each token, nats
    entropy: float  # mean over the tokens of the sampling distribution's entropy, nats
    is_finished: bool  # drew a stop token within the budget


def seeded_generator(seed: int, purpose: str, step: int = 0) -> torch.Generator:
    """Random numbers that depend on these three and on nothing else."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{step}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


# ---------------------------------------------------------------- one answer


def log_probs(logits_PV: Tensor, temperature: float, vocab_size: int) -> Tensor:
    """Log-probabilities (P, V), float32, of the sampling distribution. The sampler and the loss both call this.

    Ids from vocab_size on are rows of the head without a token: they get probability 0. In the place of the logits: nothing in
    memory is larger.
    """
    assert logits_PV.dtype in (torch.float32, torch.float64)
    if temperature != 1.0:
        logits_PV.div_(temperature)
    logits_PV[:, vocab_size:] = IMPOSSIBLE
    return torch.log_softmax(logits_PV, dim=-1, out=logits_PV)


def draw(log_probs_RV: Tensor, uniform_R: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one id a row: the smallest whose cumulative probability exceeds the row's uniform number in [0, 1).

    One uniform a row instead of one exponential an entry, as torch.multinomial draws: a sixth of the time.
    Returns ids, their log-probabilities and the entropies, each (R,).
    """
    probs_RV = log_probs_RV.exp()
    entropy_R = -torch.einsum("rv,rv->r", probs_RV, log_probs_RV)
    cdf_RV = probs_RV.cumsum_(dim=-1)
    ids_R1 = torch.searchsorted(cdf_RV, uniform_R[:, None] * cdf_RV[:, -1:], right=True)
    ids_R1.clamp_(
        max=vocab_size - 1
    )  # a parallel sum need not be monotone: its last steps may reach past the last token
    return ids_R1[:, 0], log_probs_RV.gather(1, ids_R1)[:, 0], entropy_R


@torch.inference_mode()
def generate_one(
    model: Transformer, prompt: list[int], sampling: Sampling, uniforms_G: Tensor
) -> Iterator[int]:
    """Sample one answer, token by token; the stop token, if one is drawn, is the last. The version to read first."""
    device, dtype = model.head_weight_VE.device, model.head_weight_VE.dtype
    cache = KVCache(
        model.config,
        batch_size=1,
        max_len=len(prompt) + sampling.max_gen_len,
        device=device,
        dtype=dtype,
    )
    tokens_1L = torch.tensor([prompt], device=device)
    for uniform_1 in uniforms_G[: sampling.max_gen_len].to(device).split(1):
        logits_1V = model.next_token_logits(tokens_1L, cache)
        ids_1, _, _ = draw(
            log_probs(logits_1V, sampling.temperature, sampling.vocab_size),
            uniform_1,
            sampling.vocab_size,
        )
        yield int(ids_1)
        if int(ids_1) in sampling.stop_ids:
            return
        tokens_1L = ids_1[:, None]


# ---------------------------------------------------------------- many answers at once


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    num_answers: int,
    generator: torch.Generator,
    cache_bytes: int | None = None,
    watch: Watch = UNWATCHED,
) -> list[Sample]:
    """Sample num_answers answers to each prompt; answer j of prompt i is item i * num_answers + j.

    Of several processes (watch.processes) each answers its own part of the prompts, with the random numbers that one would use.
    cache_bytes: what the KV cache may take; None: what memory is free. Answers that do not fit wait for others to end.
    Raises ValueError for an empty prompt, one too long for the model, or a budget in which no answer fits.
    """
    # Of each answer, and of one more: see Decoder. The whole table, so that what is drawn does not depend on who draws it.
    uniforms_AG = torch.rand(
        (len(prompts) * num_answers + 1, sampling.max_gen_len + 1), generator=generator
    )
    own = watch.processes.parts_of(len(prompts))[watch.processes.rank]
    prompts, answers = prompts[own], (own.stop - own.start) * num_answers
    if not prompts:
        return []  # fewer prompts than processes
    uniforms_AG = uniforms_AG[own.start * num_answers :][: answers + 1]
    slots = count_slots(model, prompts, sampling, answers=answers, cache_bytes=cache_bytes)
    with watch.part("prefill", len(prompts)):
        prefilled = prefill(model, prompts, watch)
    with watch.part("decode", answers):
        decoder = Decoder(
            model,
            prompts,
            prefilled,
            sampling,
            num_answers=num_answers,
            uniforms_AG=uniforms_AG,
            slots=slots,
        )
        while decoder.in_use:
            row_steps = decoder.decode()
            watch.advance(decoder.turn_over(), row_steps=row_steps)
        return decoder.samples()


def count_slots(
    model: Transformer,
    prompts: list[list[int]],
    sampling: Sampling,
    *,
    answers: int,
    cache_bytes: int | None,
) -> int:
    """How many answers are decoded at once: what fits into the budget of the KV cache."""
    config, weight, longest = model.config, model.head_weight_VE, max(map(len, prompts))
    for tokens in (longest, min(map(len, prompts))):
        check_length(config, tokens, sampling.max_gen_len)
    row_bytes = KVCache.bytes_per_token(config, weight.dtype) * (longest + sampling.max_gen_len)
    if (
        cache_bytes is None
    ):  # what is free, less what a decode step needs for a row beside its cache: twice V in float32
        cache_bytes = (
            int(0.9 * free_bytes(weight.device)) * row_bytes // (row_bytes + 8 * config.vocab_size)
        )
    if cache_bytes < row_bytes:
        raise ValueError(
            f"a cache of {cache_bytes:,} bytes holds no row: one of {longest} + {sampling.max_gen_len} tokens takes "
            f"{row_bytes:,}; raise the budget, or lower max_gen_len"
        )
    return min(cache_bytes // row_bytes, answers)


def check_length(config: Qwen2Config, prompt_tokens: int, max_gen_len: int) -> None:
    """Raises ValueError where a prompt is empty, or has with its longest answer more tokens than the model has positions."""
    if not prompt_tokens:
        raise ValueError("a prompt has no tokens; every answer continues at least one")
    if (room := config.max_position_embeddings - prompt_tokens) < max_gen_len:
        remedy = f"set training.max_gen_len={room}" if room > 0 else "shorten the prompt"
        raise ValueError(
            f"a prompt of {prompt_tokens} tokens and answers of up to {max_gen_len} exceed the model's "
            f"{config.max_position_embeddings} positions (max_position_embeddings); {remedy}"
        )


def prefill(model: Transformer, prompts: list[list[int]], watch: Watch = UNWATCHED) -> KVCache:
    """Keys and values of each prompt but its last token, which is the first one that an answer decodes."""
    dtype, device = model.head_weight_VE.dtype, model.head_weight_VE.device
    longest = max(2, *map(len, prompts)) - 1
    prefilled = KVCache(
        model.config, batch_size=len(prompts), max_len=longest, device=device, dtype=dtype
    )
    per_pass = max(1, PREFILL_TOKENS // longest)
    for first in range(0, len(prompts), per_pass):
        rows = slice(first, first + per_pass)
        part = [p[:-1] for p in prompts[rows]]
        prefilled.span = 0  # of these rows
        positions_NL, attend = prefilled.extend(rows, longest)
        model.hidden_states(
            torch.tensor([p + [0] * (longest - len(p)) for p in part], device=device),
            positions_NL,
            attend,
        )
        prefilled.lengths_B[rows] = torch.tensor([len(p) for p in part], device=device)
        watch.advance(len(part))
    return prefilled


class Decoder:
    """The answers of a rollout, and the slots 0..in_use-1 in which as many of them as fit are decoded."""

    def __init__(self, model, prompts, prefilled, sampling, *, num_answers, uniforms_AG, slots):
        device = model.head_weight_VE.device
        answers, G = len(prompts) * num_answers, sampling.max_gen_len
        on_cuda = device.type == "cuda"
        self.interval, self.round_up = (CHECK_INTERVAL, row_bucket) if on_cuda else (1, int)
        self.model, self.prefilled, self.sampling, self.num_answers = (
            model,
            prefilled,
            sampling,
            num_answers,
        )
        self.cache = KVCache(
            model.config,
            batch_size=slots,
            max_len=max(map(len, prompts)) + G + self.interval,
            device=device,
            dtype=model.head_weight_VE.dtype,
        )
        self.is_stop_V = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
        self.is_stop_V[torch.tensor(sorted(sampling.stop_ids), dtype=torch.long, device=device)] = (
            True
        )
        # Of each answer, and of one more that is nobody's: it stands in slots that only fill up a multiple, and has ended.
        self.uniforms_AG = uniforms_AG.to(device)
        self.ids_AG = torch.zeros(
            (answers + 1, G + 2), dtype=torch.long, device=device
        )  # the first: the prompt's last token
        self.ids_AG[:-1, 0] = torch.tensor(
            [p[-1] for p in prompts], device=device
        ).repeat_interleave(num_answers)
        self.logprobs_AG, self.entropies_AG = torch.zeros((2, answers + 1, G + 1), device=device)
        self.lengths_A = torch.zeros(answers + 1, dtype=torch.long, device=device)  # tokens drawn
        self.ended_A = torch.zeros(answers + 1, dtype=torch.bool, device=device)
        self.ended_A[-1] = True
        self.answers_R = torch.full((slots,), answers, device=device)  # which answer a slot decodes
        self.in_use, self.waiting_A = 0, torch.arange(answers, device=device)
        # Neither knows the decoder: a reference back would keep cache and graphs alive until the garbage collector runs.
        self.step = GraphedStep() if on_cuda else Decoder._step
        self.turn_over()

    def turn_over(self) -> int:
        """The last slots take the places of those that have ended, and waiting answers come behind. Returns how many ended."""
        ended = self.ended_A[self.answers_R[: self.in_use]].tolist()
        alive = ended.count(False)
        holes = [slot for slot in range(alive) if ended[slot]]
        movers = [slot for slot in range(alive, self.in_use) if not ended[slot]]
        if holes:
            holes_R, movers_R = self.answers_R.new_tensor(holes), self.answers_R.new_tensor(movers)
            self.cache.copy_rows(self.cache, movers_R, holes_R, self.cache.span)
            self.answers_R[holes_R] = self.answers_R[movers_R]
        room = len(self.answers_R) - alive
        admitted_R, self.waiting_A = self.waiting_A[:room], self.waiting_A[room:]
        self.in_use = alive + len(admitted_R)
        if len(admitted_R):
            slots = slice(alive, self.in_use)
            self.cache.copy_rows(
                self.prefilled,
                admitted_R // self.num_answers,
                slots,
                self.prefilled.keys_LBKCD.shape[3],
            )
            self.answers_R[slots] = admitted_R
        self.answers_R[self.in_use :] = len(self.ended_A) - 1  # nobody's
        self.cache.span = int(self.cache.lengths_B[: self.in_use].max()) if self.in_use else 0
        return len(ended) - alive

    def decode(self) -> int:
        """Draw the next token of every slot in use, `interval` times over. Returns the number of slots times steps."""
        rows = min(self.round_up(self.in_use), len(self.answers_R))
        for _ in range(self.interval):
            self.step(self, rows)
        return rows * self.interval

    def _step(self, rows: int) -> None:
        """One token for the first `rows` slots. Nothing here asks the device anything."""
        answers_R = self.answers_R[:rows]
        lengths_R, active_R = self.lengths_A[answers_R], ~self.ended_A[answers_R]
        tokens_R = self.ids_AG[answers_R, lengths_R]
        logits_RV = self.model.next_token_logits(tokens_R[:, None], self.cache, active_B=active_R)
        log_probs_RV = log_probs(logits_RV, self.sampling.temperature, self.sampling.vocab_size)
        ids_R, logprobs_R, entropies_R = draw(
            log_probs_RV, self.uniforms_AG[answers_R, lengths_R], self.sampling.vocab_size
        )
        # An answer that has ended goes on being decoded until somebody looks: behind its last token, and does not grow.
        self.ids_AG[answers_R, lengths_R + 1] = ids_R
        self.logprobs_AG[answers_R, lengths_R] = logprobs_R
        self.entropies_AG[answers_R, lengths_R] = entropies_R
        self.lengths_A[answers_R] = lengths_R + active_R
        self.ended_A[answers_R] = (
            ~active_R | self.is_stop_V[ids_R] | (lengths_R + 1 >= self.sampling.max_gen_len)
        )

    def samples(self) -> list[Sample]:
        lengths, ids = self.lengths_A[:-1].tolist(), self.ids_AG[:, 1:].tolist()
        logprobs, entropies = self.logprobs_AG.tolist(), self.entropies_AG.tolist()
        return [
            Sample(
                ids[a][:n],
                logprobs[a][:n],
                sum(entropies[a][:n]) / n,
                ids[a][n - 1] in self.sampling.stop_ids,
            )
            for a, n in enumerate(lengths)
        ]
