"""How fast one policy-gradient step is, and how much memory it takes.

    uv run bench/update.py 0.5B 4 8 64
    uv run bench/update.py 3B 32 8 1024 --mean 437 --device cuda --recompute-layers 36 --offload

Utilisation is the time that the necessary products would take at the rate of a large product,
divided by the time taken. The necessary work is 6 FLOP per weight and token, with each prompt run
once and the head applied to response tokens only.
"""

import time

from common import body_and_head, matrix_rate, peak_gib, random_model, work_parser

from bench.synthetic import random_episodes
from grpo import update_policy
from harness.console import Progress
from optimizer import AdamW


def main() -> None:
    parser = work_parser()
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--recompute-layers", type=int, default=0)
    parser.add_argument("--offload", action="store_true")
    args = parser.parse_args()
    model = random_model(args)
    optimizer = AdamW(model.parameters(), lr=1e-6, offload=args.offload)
    episodes = random_episodes(
        args.questions,
        args.answers,
        args.prompt,
        args.length,
        mean=args.mean,
        vocab_size=model.config.vocab_size,
    )
    responses = sum(len(e.response_token_ids) for e in episodes)
    body, head = body_and_head(model.config)
    needed = 6 * body * (responses + args.questions * args.prompt) + 6 * head * responses
    fixed = 2 * sum(p.nbytes for p in model.parameters())
    if optimizer.streamed is None:
        fixed += sum(tensor.nbytes for tensor in optimizer.state.values())
    flops = matrix_rate(args.device, model.head_weight_VE.dtype)
    for _ in range(args.repeat):
        start, progress = time.perf_counter(), Progress("update")
        update_policy(
            model,
            optimizer,
            episodes,
            max_grad_norm=1.0,
            skip_unfinished=False,
            micro_batch_tokens=args.micro_batch_tokens,
            recompute_layers=args.recompute_layers,
            progress=progress,
        )
        seconds, peak = time.perf_counter() - start, peak_gib(args.device)
        gradient, optimizing = progress.seconds["gradient"], progress.seconds["optimizer"]
        print(
            f"{seconds:6.2f} s: gradient {gradient:.2f}, optimizer {optimizing:.2f}; "
            f"{responses / seconds:7.1f} response tokens/s, "
            f"{progress.counts['gradient']} tokens run; "
            f"utilisation of the gradient {needed / flops / gradient:.0%}; peak {peak:.2f} GiB, "
            f"{peak - fixed / 2**30:.2f} above weights, gradient and optimizer state"
        )


if __name__ == "__main__":
    main()
