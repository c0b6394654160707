"""How fast one policy-gradient step is, and what it needs of memory.

    uv run bench/update.py 0.5B 4 8 64
    uv run bench/update.py 3B 32 8 1024 --mean 437 --device cuda --checkpoint-layers 36 --offload

Utilisation counts the products that cannot be avoided (6 FLOP a weight and token, the head on response tokens only,
each prompt once) over the rate that the machine reaches on a large product.
"""

import time

from common import body_and_head, matrix_rate, peak_gib, random_model, work_parser

from grpo import update_policy
from harness.console import PhaseWatch
from harness.made_up import random_episodes
from optimizer import AdamW


def main() -> None:
    parser = work_parser()
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--checkpoint-layers", type=int, default=0)
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
    responses, (body, head) = (
        sum(len(e.response_token_ids) for e in episodes),
        body_and_head(model.config),
    )
    needed = 6 * body * (responses + args.questions * args.prompt) + 6 * head * responses
    state = 0 if optimizer.offloaded else sum(t.nbytes for t in optimizer.state.values())
    standing = (2 * sum(p.nbytes for p in model.parameters()) + state) / 2**30
    flops = matrix_rate(args.device, model.head_weight_VE.dtype)
    for _ in range(args.repeat):
        start, watch = time.perf_counter(), PhaseWatch("update")
        update_policy(
            model,
            optimizer,
            episodes,
            max_grad_norm=1.0,
            skip_unfinished=False,
            watch=watch,
            micro_batch_tokens=args.micro_batch_tokens,
            checkpoint_layers=args.checkpoint_layers,
        )
        seconds = time.perf_counter() - start
        print(
            f"{seconds:6.2f} s: gradient {watch.seconds['gradient']:.2f}, optimizer {watch.seconds['optimizer']:.2f}; "
            f"{responses / seconds:7.1f} response tokens/s, {watch.counts['tokens_run']} tokens run; utilisation of the gradient "
            f"{needed / flops / watch.seconds['gradient']:.0%}; peak {peak_gib(args.device):.2f} GiB, "
            f"{peak_gib(args.device) - standing:.2f} above weights, gradients and optimizer state"
        )


if __name__ == "__main__":
    main()
