"""What only a GPU can decide: short measurements, each with the decision that hangs on it.

    python bench/probe.py            the 3B shape on a GPU, in minutes
    python bench/probe.py --tiny     a tiny shape, to try the script; a CPU always gets it

Dimension key: S tokens of a micro-batch, P response tokens in it, R slots, V rows of the head,
               N blocks of W rows, C cached columns, T gathered keys, H query heads, K key heads,
               D head size, E hidden size, Q = H / K.
"""

import argparse
import time
from collections.abc import Callable
from itertools import accumulate

import torch
from common import copy_rate, random_model, typical_seconds
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import grpo
from bench.synthetic import random_episodes, random_questions
from flat import zero_gradient
from generate import Decoder, SamplingParams, prefill
from gpu import GraphedStep
from packing import MicroBatch, pack_micro_batches, packed_attention
from qwen2_model import KEY_BLOCK, AttentionFunction, Transformer, grouped_query_attention

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
SHOWN_KERNELS, BLOCK = 20, 128


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what only a GPU can decide.")
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, always used on a CPU")
    parser.set_defaults(device=DEVICE, dtype=str(DTYPE).removeprefix("torch."), layers=None)
    args = parser.parse_args()
    tiny = args.tiny or not ON_GPU
    args.shape = "tiny" if tiny else "3B"
    questions, columns, tokens, longest = (2, 64, 512, 60) if tiny else (32, 576, 2688, 1024)
    model, rate = random_model(args), copy_rate(DEVICE)
    probe_sampling(8 * questions, model.config.vocab_size)
    probe_decode_attention(model, 8 * questions, columns, rate)
    probe_decode_step(model, questions, columns, longest)
    zero_gradient(model.parameters())
    probe_cudnn(model, tokens, longest)
    micro_batch = random_micro_batch(model, tokens, longest)
    print_kernels("a micro-batch of the update", lambda: add_gradient(model, micro_batch))
    probe_update_attention(model, micro_batch)
    probe_loss(model, tokens, chunks=(32, 64) if tiny else (256, 384, 512, 1024))


def say(measured: str, decision: str) -> None:
    print(f"{measured}\n    decides: {decision}", flush=True)


def milliseconds(work: Callable[[], object]) -> float:
    return 1000 * typical_seconds(work, DEVICE)


def milliseconds_once(work: Callable[[], object]) -> float:
    """The first run of a shape, with everything that the libraries prepare for it."""
    if ON_GPU:
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if ON_GPU:
        torch.cuda.synchronize()
    return 1000 * (time.perf_counter() - start)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE, dtype=DTYPE)


def print_kernels(name: str, work: Callable[[], object]) -> None:
    """The kernels that take the most time; on a CPU, the operators."""
    work()
    with profile(
        activities=[ProfilerActivity.CUDA if ON_GPU else ProfilerActivity.CPU]
    ) as profiler:
        milliseconds_once(work)
    field = "self_device_time_total" if ON_GPU else "self_cpu_time_total"  # microseconds
    events = [(getattr(event, field), event.count, event.key) for event in profiler.key_averages()]
    total = sum(spent for spent, _, _ in events)
    say(
        f"{name}: {total / 1000:.1f} ms in kernels, most of it in",
        "a kernel above 10 % that is no matrix product is the next to be replaced",
    )
    for spent, count, key in sorted(events, reverse=True)[:SHOWN_KERNELS]:
        print(f"    {spent / total:6.1%} {spent / 1000:9.3f} ms {count:6} x  {key[:70]}")


def flash_attention(
    qkv: tuple[Tensor, Tensor, Tensor],
    starts: list[Tensor],
    longest: tuple[int, int],
    *,
    causal: bool = False,
    used: Tensor | None = None,
) -> Tensor:
    """Attention within sequences that lie one after another in tensors (tokens, heads, D).

    starts and longest: of the queries and of the keys. used: how many keys of each sequence count.
    """
    flash = torch.ops.aten._flash_attention_forward
    return flash(*qkv, *starts, *longest, 0.0, causal, False, seqused_k=used)[0]


def starts_of(lengths: list[int]) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), device=DEVICE, dtype=torch.int32)


# ---------------------------------------------------------------- the rollout


@torch.inference_mode()
def probe_sampling(slots: int, vocab_size: int) -> None:
    logprobs_RV = torch.randn(slots, vocab_size, device=DEVICE).log_softmax(dim=-1)
    probs_RV, buffer_RV = logprobs_RV.exp(), torch.empty_like(logprobs_RV)
    uniform_R1 = torch.rand(slots, 1, device=DEVICE)
    einsum = milliseconds(lambda: torch.einsum("rv,rv->r", probs_RV, logprobs_RV))
    plain = milliseconds(lambda: torch.mul(probs_RV, logprobs_RV, out=buffer_RV).sum(dim=-1))
    say(
        f"entropy of {slots} slots: einsum {einsum:.3f} ms, plain sum {plain:.3f} ms",
        "take the plain sum in sample_tokens if it is faster",
    )

    def one_level() -> Tensor:
        cumulative_RV = torch.cumsum(probs_RV, dim=-1, out=buffer_RV)
        return torch.searchsorted(cumulative_RV, uniform_R1 * cumulative_RV[:, -1:])

    def two_levels() -> Tensor:
        blocks_RNW = probs_RV.view(slots, -1, BLOCK)
        ends_RN = blocks_RNW.sum(dim=-1).cumsum(dim=-1)
        threshold_R1 = uniform_R1 * ends_RN[:, -1:]
        block_R1 = torch.searchsorted(ends_RN, threshold_R1)
        block_RW = blocks_RNW.take_along_dim(block_R1[:, :, None], dim=1)[:, 0]
        start_R1 = ends_RN.gather(1, block_R1) - block_RW.sum(dim=-1, keepdim=True)
        inside_R1 = torch.searchsorted(block_RW.cumsum(dim=-1), threshold_R1 - start_R1)
        return BLOCK * block_R1 + inside_R1

    equal = (one_level() == two_levels()).float().mean()
    one, two = milliseconds(one_level), milliseconds(two_levels)
    say(
        f"drawing ids: cumsum {one:.3f} ms, in two levels {two:.3f} ms, {equal:.0%} of ids equal",
        "take two levels if they save more than 5 % of a decode step",
    )


@torch.inference_mode()
def probe_decode_attention(model: Transformer, slots: int, columns: int, rate: float) -> None:
    config = model.config
    H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    q_RHD, k_RKCD, v_RKCD = random(slots, H, D), *random(2, slots, K, columns, D)
    lengths_R = torch.randint(columns * 3 // 4, columns + 1, (slots,), device=DEVICE).int()
    is_later_RC = torch.arange(columns, device=DEVICE) >= lengths_R[:, None]
    bias_R1QC = random(slots, 1, H // K, columns).zero_()
    bias_R1QC.masked_fill_(is_later_RC[:, None, None], -torch.inf)

    def masked() -> Tensor:
        return grouped_query_attention(q_RHD[:, :, None], k_RKCD, v_RKCD, bias_R1QC)[:, :, 0]

    time_masked = milliseconds(masked)
    share = 1000 * 2 * k_RKCD.nbytes / time_masked / rate
    flash_says = "no flash attention with lengths on a CPU"
    if ON_GPU:
        k_TKD, v_TKD = (x_RKCD.transpose(1, 2).flatten(0, 1) for x_RKCD in (k_RKCD, v_RKCD))
        starts = [starts_of([1] * slots), starts_of([columns] * slots)]

        def flash() -> Tensor:
            return flash_attention((q_RHD, k_TKD, v_TKD), starts, (1, columns), used=lengths_R)

        difference = (masked() - flash()).abs().max()
        flash_says = f"flash with lengths {milliseconds(flash):.3f} ms, off by {difference:.1e}"
    say(
        f"decode attention: masked {time_masked:.3f} ms, {share:.0%} of copy rate; {flash_says}",
        "take flash for decoding if masked is below 60 % and flash at least 1.5 times as fast",
    )


@torch.inference_mode()
def probe_decode_step(model: Transformer, questions: int, columns: int, longest: int) -> None:
    vocab_size, slots = model.config.vocab_size, 8 * questions
    prompts = [q.prompt_token_ids for q in random_questions(questions, 40, vocab_size)]
    params = SamplingParams(longest, 1.0, vocab_size, frozenset())
    uniforms_AG = torch.rand(slots + 1, longest + 1)
    decoder = Decoder(model, prompts, prefill(model, prompts), params, 8, uniforms_AG, slots=slots)

    def step(run: Callable[[Decoder, int], None] = Decoder.step) -> None:
        decoder.cache.longest = columns - 1
        decoder.cache.lengths_B.fill_(columns - 1)
        decoder.lengths_A.zero_()
        run(decoder, slots)

    print_kernels(f"a decode step, {slots} slots and {columns} columns", step)
    eager, graph_says = milliseconds(step), "no CUDA graphs on a CPU"
    if ON_GPU:
        graphs = GraphedStep()
        step(graphs.step)  # the first step of a shape is not recorded
        recording = milliseconds_once(lambda: step(graphs.step))
        replay = milliseconds(lambda: step(graphs.step))
        graph_says = f"as a graph {replay:.2f} ms, recording it {recording:.1f} ms"
    say(
        f"a decode step: {eager:.2f} ms; {graph_says}",
        f"raise KEY_BLOCK if a recording costs more than its {KEY_BLOCK - 2} steps or fewer save",
    )


# ---------------------------------------------------------------- the update


def random_micro_batch(model: Transformer, tokens: int, longest: int) -> MicroBatch:
    """Geometric lengths. Another longest answer gives a micro-batch of another shape."""
    mean, vocab_size = int(0.43 * longest), model.config.vocab_size
    episodes = random_episodes(8, 8, 140, longest, mean=mean, vocab_size=vocab_size)
    return next(pack_micro_batches([(e, 1.0) for e in episodes], tokens)).to(DEVICE)


def add_gradient(model: Transformer, micro_batch: MicroBatch) -> None:
    vocab_size = model.config.vocab_size
    logprobs_P = grpo.policy_logprobs(model, micro_batch, temperature=1.0, vocab_size=vocab_size)
    logprobs_P.sum().backward()


def probe_cudnn(model: Transformer, tokens: int, longest: int) -> None:
    add_gradient(model, random_micro_batch(model, tokens, longest))  # loads the libraries
    results = [] if ON_GPU else ["no cuDNN on a CPU"]
    for enabled in (False, True) if ON_GPU else (False,):
        torch.backends.cuda.enable_cudnn_sdp(enabled)
        unseen = [random_micro_batch(model, tokens, longest - i - 3 * enabled) for i in (1, 2, 3)]
        times = [milliseconds_once(lambda x=x: add_gradient(model, x)) for x in unseen]
        shown = ", ".join(f"{time:.0f}" for time in times)
        results.append(f"{'with' if enabled else 'without'} cuDNN {shown} ms")
    torch.backends.cuda.enable_cudnn_sdp(False)
    say(
        f"three micro-batches of unseen shapes: {'; '.join(results)}",
        "cuDNN attention stays off unless it is at least as fast here",
    )


def probe_update_attention(model: Transformer, micro_batch: MicroBatch) -> None:
    config, S = model.config, len(micro_batch.tokens_S)
    heads = config.num_attention_heads, *[config.num_key_value_heads] * 2
    qkv = [random(1, count, S, config.head_dim).requires_grad_() for count in heads]
    grad_1HSD = torch.randn_like(qkv[0])

    def time_both_ways(attention: AttentionFunction) -> float:
        return milliseconds(lambda: torch.autograd.grad(attention(0, *qkv), qkv, grad_1HSD))

    masked = packed_attention(micro_batch, config, DTYPE)
    flash_says = "no flash attention with lengths on a CPU"
    if ON_GPU:
        flash = packed_flash_attention(micro_batch)
        difference = (masked(0, *qkv) - flash(0, *qkv)).abs().max()
        flash_says = f"flash {time_both_ways(flash):.2f} ms, off by {difference:.1e}"
    say(
        f"attention of {S} tokens, both ways: masked {time_both_ways(masked):.2f} ms; {flash_says}",
        "take flash in the update if it is at least twice as fast",
    )


def packed_flash_attention(micro_batch: MicroBatch) -> AttentionFunction:
    """packed_attention without a mask: the keys of a segment are its prompt's and then its own."""
    keys, segments = [], micro_batch.segments
    for start, length, prompt_start, prompt_length in segments:
        keys += range(prompt_start, prompt_start + prompt_length)
        keys += range(start, start + length)
    keys_T = torch.tensor(keys, device=DEVICE)
    queries = [segment.length for segment in segments]
    keys = [segment.prompt_length + segment.length for segment in segments]
    starts, longest = [starts_of(queries), starts_of(keys)], (max(queries), max(keys))

    def attention(layer: int, q_1HSD: Tensor, k_1KSD: Tensor, v_1KSD: Tensor) -> Tensor:
        q_SHD, k_SKD, v_SKD = (x[0].transpose(0, 1) for x in (q_1HSD, k_1KSD, v_1KSD))
        qkv = q_SHD.contiguous(), k_SKD[keys_T], v_SKD[keys_T]
        return flash_attention(qkv, starts, longest, causal=True).transpose(0, 1)[None]

    return attention


def probe_loss(model: Transformer, tokens: int, *, chunks: tuple[int, ...]) -> None:
    head_VE, usual = model.head_weight_VE, grpo.LOGIT_CHUNK_BYTES[DEVICE]
    V, E = head_VE.shape
    hidden_PE = random(tokens, E).requires_grad_()
    targets_P = torch.randint(V, (tokens,), device=DEVICE)

    def gradient() -> None:
        rest = {"temperature": 1.0, "vocab_size": V}
        logprobs_P = grpo.token_logprobs(hidden_PE, head_VE, targets_P, **rest)
        torch.autograd.grad(logprobs_P.sum(), (hidden_PE, head_VE))

    results = []
    for chunk in chunks:
        grpo.LOGIT_CHUNK_BYTES[DEVICE] = 4 * V * chunk
        results.append(f"{chunk}: {milliseconds(gradient):.1f} ms")
    grpo.LOGIT_CHUNK_BYTES[DEVICE] = usual
    say(
        f"loss of {tokens} tokens in chunks of {', '.join(results)}",
        "LOGIT_CHUNK_BYTES becomes the fastest with which config.yaml still recomputes no layer",
    )


if __name__ == "__main__":
    main()
