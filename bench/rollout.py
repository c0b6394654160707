"""How fast answers are sampled, and how near that is to what the machine allows.

    uv run bench/rollout.py 0.5B 4 8 64                     4 questions x 8 answers x 64 tokens
    uv run bench/rollout.py 0.5B 4 8 300 --mean 100         geometric lengths of mean 100, at most 300
    uv run bench/rollout.py 3B 32 8 1024 --mean 437 --device cuda

The model has random weights, whose distribution is nearly uniform: with V / mean stop ids, lengths come out geometric.
The floor is the time in which the machine could read the weights and the cache, or do the products, whichever takes
longer, at the rates that it reaches on a large copy and a large product.
"""

import torch
from common import body_and_head, copy_rate, matrix_rate, peak_gib, random_model, work_parser

from grpo import rollout
from harness import cpu
from harness.console import PhaseWatch
from harness.made_up import AnyTokenizer, random_questions, random_reward
from qwen2_model import KVCache


def main() -> None:
    parser = work_parser()
    parser.add_argument("--cache-gib", type=float, help="budget of the KV cache")
    args = parser.parse_args()
    flops, bandwidth = matrix_rate(args.device, getattr(torch, args.dtype)), copy_rate(args.device)
    model = random_model(args)
    vocab_size = model.config.vocab_size
    tokenizer = AnyTokenizer(
        vocab_size, frozenset(range(vocab_size // args.mean if args.mean else 0))
    )
    questions = random_questions(args.questions, args.prompt, vocab_size)
    for _ in range(args.repeat):
        watch = PhaseWatch("rollout")
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
                watch=watch,
                cache_bytes=int(args.cache_gib * 2**30) if args.cache_gib else None,
            )
        lengths = [len(e.response_token_ids) for e in episodes]
        prefill, decode = floor_seconds(
            model, args.prompt, args.questions, lengths, flops, bandwidth
        )
        seconds, tokens = watch.seconds["prefill"] + watch.seconds["decode"], sum(lengths)
        print(
            f"prefill {watch.seconds['prefill']:6.2f} s (floor {prefill:.2f})  "
            f"decode {watch.seconds['decode']:6.2f} s (floor {decode:.2f})  "
            f"{tokens / seconds:7.1f} tokens/s, {(prefill + decode) / seconds:.0%} of the floor's; mean length "
            f"{tokens / len(lengths):.0f}, wasted row-steps {1 - tokens / watch.counts['row_steps']:.1%}, "
            f"peak memory {peak_gib(args.device):.2f} GiB"
        )


def floor_seconds(model, prompt, questions, lengths, flops, bandwidth) -> tuple[float, float]:
    dtype, (body, head) = model.head_weight_VE.dtype, body_and_head(model.config)
    prefill, decode = 2 * body * prompt * questions / flops, 0.0
    for step in range(max(lengths)):
        rows = sum(n > step for n in lengths)
        cached = KVCache.bytes_per_token(model.config, dtype) * (prompt + step) * rows
        decode += max(
            ((body + head) * dtype.itemsize + cached) / bandwidth, 2 * (body + head) * rows / flops
        )
    return prefill, decode


if __name__ == "__main__":
    main()
