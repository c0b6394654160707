"""How fast answers are sampled, and how near that is to what the machine allows.

    uv run bench/rollout.py 0.5B 4 8 64                     4 questions x 8 answers x 64 tokens
    uv run bench/rollout.py 0.5B 4 8 300 --mean 100         geometric lengths of mean 100, at most 300
    uv run bench/rollout.py 3B 32 8 1024 --mean 437 --device cuda

The model has random weights, whose distribution is nearly uniform: with V / mean stop ids, lengths come out geometric.
The floor is the time in which the machine could read the weights and the cache, or do the products, whichever takes
longer, at the rates that it reaches on a large copy and a large product.
"""

import torch
from common import copy_rate, matrix_rate, peak_bytes, random_model, synchronize, work_parser

from grpo import rollout
from harness import cpu
from harness.console import PhaseWatch
from harness.made_up import AnyTokenizer, random_questions, random_reward
from harness.plan import num_weights
from qwen2_model import KVCache


def main() -> None:
    parser = work_parser()
    parser.add_argument("--cache-gib", type=float, help="budget of the KV cache")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    flops, bandwidth = matrix_rate(args.device, dtype), copy_rate(args.device)
    print(f"{args.device}: {flops / 1e9:,.0f} GFLOP/s {args.dtype}, {bandwidth / 1e9:.1f} GB/s; torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads")
    model = random_model(args.shape, layers=args.layers, device=args.device, dtype=dtype)
    config = model.config
    stop_ids = frozenset(range(config.vocab_size // args.mean)) if args.mean else frozenset()
    tokenizer = AnyTokenizer(config.vocab_size, stop_ids)
    questions = random_questions(args.questions, args.prompt, config.vocab_size)
    for _ in range(args.repeat):
        watch = PhaseWatch("rollout")
        synchronize(args.device)
        with cpu.packed_for_decoding(model, args.questions * args.answers):
            episodes = rollout(
                model, tokenizer, questions, num_answers=args.answers, max_gen_len=args.length, temperature=1.0,
                reward_function=random_reward(), generator=torch.Generator().manual_seed(0), watch=watch,
                cache_bytes=int(args.cache_gib * 2**30) if args.cache_gib else None,
            )  # fmt: skip
        lengths = [len(e.response_token_ids) for e in episodes]
        prefill, decode = floor_seconds(config, dtype, args.prompt, args.questions, lengths, flops, bandwidth)
        seconds, row_steps = watch.seconds["prefill"] + watch.seconds["decode"], watch.counts["row_steps"]
        print(f"prefill {watch.seconds['prefill']:6.2f} s (floor {prefill:.2f})  "
              f"decode {watch.seconds['decode']:6.2f} s (floor {decode:.2f})  "
              f"{sum(lengths) / seconds:7.1f} tokens/s, {(prefill + decode) / seconds:.0%} of the floor's; "
              f"mean length {sum(lengths) / len(lengths):.0f}, wasted row-steps {1 - sum(lengths) / row_steps:.1%}, "
              f"peak memory {peak_bytes(args.device) / 2**30:.2f} GiB")


def floor_seconds(config, dtype, prompt, questions, lengths, flops, bandwidth) -> tuple[float, float]:
    head = config.vocab_size * config.hidden_size
    body = num_weights(config) - head * (1 if config.tie_word_embeddings else 2)
    prefill = 2 * body * prompt * questions / flops
    decode = 0.0
    for step in range(max(lengths)):
        rows = sum(n > step for n in lengths)
        cached = KVCache.bytes_per_token(config, dtype) * (prompt + step) * rows
        decode += max(((body + head) * dtype.itemsize + cached) / bandwidth, 2 * (body + head) * rows / flops)
    return prefill, decode


if __name__ == "__main__":
    main()
