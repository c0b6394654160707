"""Sampling: prompts of token ids in, sampled token ids out.

The pyramid, top to bottom: generate -> prefill every prompt once -> decode rows until all have ended (step: one token
of every row; sample: one draw a row; turn_over: ended rows leave, waiting rows take their places).

A row is one answer in the making; it stands in a slot of the KV cache. There are as many slots as the cache budget
allows. Random numbers belong to the answer and the position, not to the slot, so that neither the budget nor the
moment at which rows move changes what is drawn.

Dimension key: A answers asked for, R rows in slots, G response tokens at most, V vocabulary, N prompts, L prompt tokens.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from qwen2_model import KVCache, Transformer, packed_for_decoding

IMPOSSIBLE = -1e30  # logit of an id that must not be drawn; finite, because 0 * log 0 is asked for in the entropy
PREFILL_TOKENS = 8192  # prompts go through the model in batches of about so many tokens
CUDA_CHECK_INTERVAL = 8  # decode steps between two looks at which rows have ended: a look waits for the device
CUDA_ROW_MULTIPLE = 8  # rows are decoded in multiples of this, so that few graphs are recorded


@dataclass(frozen=True)
class Sample:
    token_ids: list[int]  # the stop token, if one was drawn, is the last
    logprobs: list[float]  # of each token, nats
    entropy: float  # mean over the tokens of the sampling distribution's entropy, nats
    is_finished: bool  # drew a stop token within the budget


@dataclass
class GenerateStats:
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    tokens: int = 0  # drawn, in answers
    row_steps: int = 0  # rows x decode steps computed; the excess over `tokens` was wasted on ended rows
    slots: int = 0  # rows that fitted into the cache at once


def log_probs(logits_PV: Tensor, temperature: float, vocab_size: int) -> Tensor:
    """Log-probabilities (P, V), float32, of the sampling distribution. The sampler and the loss both call this.

    Ids from vocab_size on are rows of the head without a token: they get probability 0. Overwrites logits_PV.
    """
    assert logits_PV.dtype in (torch.float32, torch.float64)
    if temperature != 1.0:
        logits_PV.div_(temperature)
    logits_PV[:, vocab_size:] = IMPOSSIBLE
    return F.log_softmax(logits_PV, dim=-1)


def sample(log_probs_RV: Tensor, uniform_R: Tensor, vocab_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw one id a row by inverting the cumulative distribution at uniform_R in [0, 1).

    One uniform a row instead of one exponential an entry, as torch.multinomial draws: a sixth of the time.
    Returns ids, their log-probabilities and the entropies, each (R,).
    """
    probs_RV = log_probs_RV.exp()
    entropy_R = -torch.einsum("rv,rv->r", probs_RV, log_probs_RV)
    cdf_RV = probs_RV.cumsum_(dim=-1)
    ids_R1 = torch.searchsorted(cdf_RV, uniform_R[:, None] * cdf_RV[:, -1:], right=True)
    ids_R1.clamp_(max=vocab_size - 1)  # a parallel sum need not be monotone: its last steps may reach past the last token
    return ids_R1[:, 0], log_probs_RV.gather(1, ids_R1)[:, 0], entropy_R


@torch.inference_mode()
def generate(
    model: Transformer,
    prompts: list[list[int]],
    *,
    num_answers: int,
    max_gen_len: int,
    temperature: float,
    vocab_size: int,
    stop_ids: frozenset[int],
    generator: torch.Generator,
    cache_bytes: int | None = None,
    progress: Callable[[int, int], None] = lambda ended, tokens: None,
) -> tuple[list[Sample], GenerateStats]:
    """Sample num_answers answers to each prompt; answer j of prompt i is item i * num_answers + j.

    cache_bytes: what the KV cache may take; None: what memory is free. Rows that do not fit wait for others to end.
    progress(ended answers, tokens decoded so far) is called whenever rows are looked at.
    Raises ValueError for an empty prompt, one too long for the model, or a budget in which no row fits.
    """
    config, weight = model.config, model.head_weight_VE
    longest = max(map(len, prompts))
    if not min(map(len, prompts)):
        raise ValueError("a prompt has no tokens; every answer continues at least one")
    if longest + max_gen_len > config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise ValueError(f"a prompt of {longest} tokens and answers of up to {max_gen_len} exceed the model's {limit} positions; "
                         f"lower max_gen_len to {limit - longest}")
    stats = GenerateStats()
    row_bytes = KVCache.bytes_per_token(config, weight.dtype) * (longest + max_gen_len)
    answers = len(prompts) * num_answers
    clock = time.perf_counter()
    with packed_for_decoding(model, answers):
        prefilled = prefill(model, prompts)
        if weight.is_cuda:
            torch.cuda.synchronize()
        stats.prefill_seconds = time.perf_counter() - clock
        if cache_bytes is None:  # what is free, less what a decode step needs for a row beside its cache: four times V in float32
            cache_bytes = int(0.9 * free_bytes(weight.device)) * row_bytes // (row_bytes + 16 * config.vocab_size)
        stats.slots = min(cache_bytes // row_bytes, answers)
        if stats.slots < 1:
            raise ValueError(f"a cache of {cache_bytes:,} bytes holds no row: one of {longest} + {max_gen_len} tokens takes "
                             f"{row_bytes:,}; raise the budget, or lower max_gen_len")
        clock = time.perf_counter()
        decoder = _Decoder(model, prompts, prefilled, num_answers=num_answers, max_gen_len=max_gen_len, temperature=temperature,
                           vocab_size=vocab_size, stop_ids=stop_ids, generator=generator, slots=stats.slots)
        while decoder.turn_over():
            decoder.decode()
            progress(decoder.num_ended, decoder.row_steps)
    samples = decoder.samples()
    stats.decode_seconds = time.perf_counter() - clock
    stats.tokens, stats.row_steps = sum(len(s.token_ids) for s in samples), decoder.row_steps
    return samples, stats


def prefill(model: Transformer, prompts: list[list[int]]) -> KVCache:
    """Keys and values of each prompt but its last token, which is the first one that a row decodes."""
    dtype, device = model.head_weight_VE.dtype, model.head_weight_VE.device
    longest = max(2, *map(len, prompts)) - 1
    prefilled = KVCache(model.config, batch_size=len(prompts), max_len=longest, device=device, dtype=dtype)
    per_pass = max(1, PREFILL_TOKENS // longest)
    for first in range(0, len(prompts), per_pass):
        part = [p[:-1] for p in prompts[first : first + per_pass]]
        tokens_NL = torch.tensor([p + [0] * (longest - len(p)) for p in part], device=device)
        cache = KVCache(model.config, batch_size=len(part), max_len=longest, device=device, dtype=dtype)
        positions_NL, attend = cache.extend(len(part), longest)
        model.hidden_states(tokens_NL, positions_NL, attend)
        cache.lengths_B += torch.tensor([len(p) for p in part], device=device)
        rows = torch.arange(len(part), device=device)
        prefilled.copy_rows(cache, rows, first + rows, longest)
    return prefilled


def free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    with open("/proc/meminfo") as f:
        return next(1024 * int(line.split()[1]) for line in f if line.startswith("MemAvailable"))


class _Decoder:
    """The rows being decoded. Slots 0..num_rows-1 hold rows; what stands in the slots beyond is not looked at."""

    def __init__(self, model, prompts, prefilled, *, num_answers, max_gen_len, temperature, vocab_size, stop_ids, generator, slots):
        device = model.head_weight_VE.device
        answers = len(prompts) * num_answers
        on_cuda = device.type == "cuda"
        self.interval, self.row_multiple = (CUDA_CHECK_INTERVAL, CUDA_ROW_MULTIPLE) if on_cuda else (1, 1)
        self.model, self.prefilled, self.prompts = model, prefilled, prompts
        self.num_answers, self.max_gen_len, self.temperature, self.vocab_size = num_answers, max_gen_len, temperature, vocab_size
        self.cache = KVCache(model.config, batch_size=slots, max_len=max(map(len, prompts)) + max_gen_len + self.interval,
                             device=device, dtype=model.head_weight_VE.dtype)
        self.stop_ids = stop_ids
        self.is_stop_V = torch.zeros(model.config.vocab_size, dtype=torch.bool, device=device)
        self.is_stop_V[torch.tensor(sorted(stop_ids), dtype=torch.long, device=device)] = True
        # One column more than the budget, because an ended row goes on writing behind its last token until it is looked
        # at; one row more than there are answers, for the slots that fill up a multiple.
        shape = answers + 1, max_gen_len + 1
        self.uniforms_AG = torch.rand(shape, generator=generator).to(device)
        self.ids_AG = torch.zeros(shape, dtype=torch.long, device=device)
        self.logprobs_AG = torch.zeros(shape, device=device)
        self.entropies_AG = torch.zeros(shape, device=device)
        self.lengths_A = torch.zeros(answers + 1, dtype=torch.long, device=device)  # tokens drawn
        self.answers_R = torch.full((slots,), answers, device=device)  # which answer a slot decodes
        self.tokens_R = torch.zeros(slots, dtype=torch.long, device=device)  # its newest token, not yet in the cache
        self.active_R = torch.zeros(slots, dtype=torch.bool, device=device)  # whether it has not ended
        self.waiting = list(range(answers))
        self.num_rows = self.num_ended = self.row_steps = 0
        # Neither knows the decoder: a reference back would keep cache and graphs alive until the garbage collector runs.
        self.step = _GraphedStep() if on_cuda else _Decoder._step

    def turn_over(self) -> bool:
        """Give the slots of ended rows to waiting ones or, when none waits, to the last rows. False: all have ended."""
        ended = (~self.active_R[: self.num_rows]).nonzero()[:, 0].tolist()
        self.num_ended += len(ended)
        free = ended + list(range(self.num_rows, len(self.active_R)))
        admitted, self.waiting = self.waiting[: len(free)], self.waiting[len(free) :]
        if admitted:
            self._admit(admitted, free[: len(admitted)])
            self.num_rows = max(self.num_rows, free[len(admitted) - 1] + 1)
        holes = ended[len(admitted) :]
        if holes:
            kept = self.num_rows - len(holes)
            self._move(sorted(set(range(kept, self.num_rows)) - set(holes)), [hole for hole in holes if hole < kept])
            self.active_R[kept : self.num_rows] = False
            self.answers_R[kept : self.num_rows] = len(self.ids_AG) - 1  # nobody's answer
            self.num_rows = kept
        self.cache.span = int(self.cache.lengths_B[: self.num_rows].max()) if self.num_rows else 0
        return self.num_rows > 0

    def decode(self) -> None:
        """Draw the next token of every row, `interval` times over."""
        rows = min(-(-self.num_rows // self.row_multiple) * self.row_multiple, len(self.active_R))
        for _ in range(self.interval):
            self.step(self, rows)
            self.row_steps += rows

    def _step(self, rows: int) -> None:
        """One token for the first `rows` slots. Nothing here asks the device anything."""
        active_R, answers_R = self.active_R[:rows], self.answers_R[:rows]
        logits_RV = self.model.next_token_logits(self.tokens_R[:rows, None], self.cache, lengths_B=active_R.long())
        columns_R = self.lengths_A[answers_R]
        uniform_R = self.uniforms_AG[answers_R, columns_R]
        ids_R, logprobs_R, entropies_R = sample(
            log_probs(logits_RV, self.temperature, self.vocab_size), uniform_R, self.vocab_size
        )
        self.ids_AG[answers_R, columns_R] = ids_R
        self.logprobs_AG[answers_R, columns_R] = logprobs_R
        self.entropies_AG[answers_R, columns_R] = entropies_R
        self.lengths_A[answers_R] = columns_R + active_R
        self.tokens_R[:rows] = ids_R
        active_R &= ~self.is_stop_V[ids_R] & (columns_R + 1 < self.max_gen_len)

    def _admit(self, answers: list[int], slots: list[int]) -> None:
        device = self.active_R.device
        prompts = [answer // self.num_answers for answer in answers]
        last_tokens = [self.prompts[prompt][-1] for prompt in prompts]
        prompts_R, slots_R = torch.tensor(prompts, device=device), torch.tensor(slots, device=device)
        self.cache.copy_rows(self.prefilled, prompts_R, slots_R, self.prefilled.keys_LBKCD.shape[3])
        self.tokens_R[slots_R] = torch.tensor(last_tokens, device=device)
        self.answers_R[slots_R] = torch.tensor(answers, device=device)
        self.active_R[slots_R] = True

    def _move(self, sources: list[int], targets: list[int]) -> None:
        sources_R, targets_R = (torch.tensor(s, dtype=torch.long, device=self.active_R.device) for s in (sources, targets))
        self.cache.copy_rows(self.cache, sources_R, targets_R, self.cache.span)
        for state_R in (self.tokens_R, self.answers_R, self.active_R):
            state_R[targets_R] = state_R[sources_R]

    def samples(self) -> list[Sample]:
        lengths, ids = self.lengths_A[:-1].tolist(), self.ids_AG.tolist()
        logprobs, entropies = self.logprobs_AG.tolist(), self.entropies_AG.tolist()
        return [
            Sample(ids[a][:n], logprobs[a][:n], sum(entropies[a][:n]) / n, ids[a][n - 1] in self.stop_ids)
            for a, n in enumerate(lengths)
        ]


class _GraphedStep:
    """Decoder._step as a CUDA graph: one launch instead of some thousand.

    A graph is bound to one number of rows and of cached columns. The first step of a new shape runs as it is, which
    also lets the libraries allocate what they need; the second is recorded; from then on the recording is replayed.
    """

    def __init__(self):
        self.graphs, self.pool = {}, torch.cuda.graph_pool_handle()

    def __call__(self, decoder: _Decoder, rows: int) -> None:
        cache = decoder.cache
        shape = rows, cache.columns(1)
        graph = self.graphs.get(shape)
        if shape not in self.graphs:
            self.graphs[shape] = None
            decoder._step(rows)
        elif graph is None:
            self.graphs[shape] = graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                decoder._step(rows)  # recorded, not run
            graph.replay()
        else:
            graph.replay()
            cache.span += 1
