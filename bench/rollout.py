"""How fast answers are sampled, and how close that is to what the machine allows.

    uv run bench/rollout.py 0.5B 4 8 64                 4 questions x 8 answers x 64 tokens
    uv run bench/rollout.py 0.5B 4 8 300 --mean 100     geometric lengths of mean 100, at most 300
    uv run bench/rollout.py 3B 32 8 1024 --mean 437 --device cuda

Random weights give a nearly uniform distribution over the vocabulary, so with vocab_size / mean
stop ids the lengths are geometric. The floor is the time that the machine takes to read the weights
and the cache, or to multiply, whichever is longer, at the rates of a large copy and product.
"""

import torch
from common import body_and_head, copy_rate, matrix_rate, peak_gib, random_model, work_parser

from bench.synthetic import SyntheticTokenizer, random_questions, random_reward
from grpo import rollout
from harness import cpu
from harness.console import Progress
from qwen2_model import KVCache, Transformer


def main() -> None:
    parser = work_parser()
    parser.add_argument("--cache-gib", type=float, help="budget of the KV cache")
    args = parser.parse_args()
    rates = matrix_rate(args.device, getattr(torch, args.dtype)), copy_rate(args.device)
    model = random_model(args)
    vocab_size = model.config.vocab_size
    num_stop_ids = vocab_size // args.mean if args.mean else 0
    tokenizer = SyntheticTokenizer(vocab_size, frozenset(range(num_stop_ids)))
    questions = random_questions(args.questions, args.prompt, vocab_size)
    for _ in range(args.repeat):
        progress = Progress("rollout")
        with cpu.packed_for_decoding(model, args.questions * args.answers):
            episodes = rollout(
                model,
                tokenizer,
                questions,
                num_answers=args.answers,
                max_gen_len=args.length,
                temperature=1.0,
                reward_function=random_reward(),
                generator=torch.Generator().manual_seed(0),
                cache_bytes=int(args.cache_gib * 2**30) if args.cache_gib else None,
                progress=progress,
            )
        lengths = [len(e.response_token_ids) for e in episodes]
        floors = floor_seconds(model, args.prompt, args.questions, lengths, *rates)
        prefill, decode = progress.seconds["prefill"], progress.seconds["decode"]
        seconds, tokens = prefill + decode, sum(lengths)
        print(
            f"prefill {prefill:6.2f} s (floor {floors[0]:.2f})  "
            f"decode {decode:6.2f} s (floor {floors[1]:.2f})  "
            f"{tokens / seconds:7.1f} tokens/s, {sum(floors) / seconds:.0%} of the floor's; "
            f"mean length {tokens / len(lengths):.0f}, "
            f"decode waste {1 - tokens / progress.counts['slot_steps']:.1%}, "
            f"peak memory {peak_gib(args.device):.2f} GiB"
        )


def floor_seconds(
    model: Transformer,
    prompt: int,
    questions: int,
    lengths: list[int],
    flops: float,
    bandwidth: float,
) -> tuple[float, float]:
    """The minimum time to prefill and to decode, from the machine's FLOP/s and bytes/s."""
    dtype, (body, head) = model.head_weight_VE.dtype, body_and_head(model.config)
    token_bytes = KVCache.bytes_per_token(model.config, dtype)
    prefill, decode = 2 * body * prompt * questions / flops, 0.0
    for step in range(max(lengths)):
        answers = sum(n > step for n in lengths)
        cached = token_bytes * (prompt + step) * answers
        reading = ((body + head) * dtype.itemsize + cached) / bandwidth
        decode += max(reading, 2 * (body + head) * answers / flops)
    return prefill, decode


if __name__ == "__main__":
    main()
