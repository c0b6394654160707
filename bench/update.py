"""How fast one policy-gradient step is, and what it needs of memory.

    uv run bench/update.py 0.5B 4 8 64
    uv run bench/update.py 3B 32 8 1024 --mean 437 --device cuda --checkpoint-layers 36 --offload

Utilisation counts the products that cannot be avoided (6 FLOP a weight and token, the head on response tokens only,
each prompt once) over the rate that the machine reaches on a large product.
"""

import random
import time

import torch
from common import matrix_rate, peak_bytes, random_model, synchronize, work_parser

from data_types import Episode, Reward
from grpo import update_policy
from harness.console import PhaseWatch
from harness.plan import num_weights
from optimizer import AdamW


def main() -> None:
    parser = work_parser()
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--checkpoint-layers", type=int, default=0)
    parser.add_argument("--offload", action="store_true")
    args = parser.parse_args()
    dtype = getattr(torch, args.dtype)
    model = random_model(args.shape, layers=args.layers, device=args.device, dtype=dtype)
    optimizer = AdamW(model.parameters(), lr=1e-6, offload=args.offload)
    episodes = random_episodes(args, model.config.vocab_size)
    head = model.config.vocab_size * model.config.hidden_size
    body = num_weights(model.config) - head * (1 if model.config.tie_word_embeddings else 2)
    responses = sum(len(e.response_token_ids) for e in episodes)
    needed = 6 * body * (responses + args.questions * args.prompt) + 6 * head * responses
    state = 0 if optimizer.offloaded else sum(t.nbytes for t in optimizer.state.values())
    standing = 2 * sum(p.nbytes for p in model.parameters()) + state
    flops = matrix_rate(args.device, dtype)
    print(f"{args.device}: {flops / 1e9:,.0f} GFLOP/s {args.dtype}; torch {torch.__version__}, {torch.get_num_threads()} threads")
    for _ in range(args.repeat):
        synchronize(args.device)
        start = time.perf_counter()
        watch = PhaseWatch("update")
        update_policy(model, optimizer, episodes, max_grad_norm=1.0, skip_unfinished=False, watch=watch,
                      micro_batch_tokens=args.micro_batch_tokens, checkpoint_layers=args.checkpoint_layers)
        synchronize(args.device)
        seconds = time.perf_counter() - start
        print(f"{seconds:6.2f} s: gradient {watch.seconds['gradient']:.2f}, optimizer {watch.seconds['optimizer']:.2f}; "
              f"{responses / seconds:7.1f} response tokens/s, {watch.counts['tokens_run']} tokens run; utilisation of the gradient "
              f"{needed / flops / watch.seconds['gradient']:.0%}; peak {peak_bytes(args.device) / 2**30:.2f} GiB, "
              f"{(peak_bytes(args.device) - standing) / 2**30:.2f} above weights, gradients and optimizer state")


def random_episodes(args, vocab_size: int) -> list[Episode]:
    rng = random.Random(0)
    prompts = [[rng.randrange(vocab_size) for _ in range(args.prompt)] for _ in range(args.questions)]
    episodes = []
    for i in range(args.questions * args.answers):
        length = min(args.length, 1 + int(rng.expovariate(1 / args.mean))) if args.mean else args.length
        ids = [rng.randrange(vocab_size) for _ in range(length)]
        question, reward = i // args.answers, Reward(rng.random(), {})
        episodes.append(Episode(question, prompts[question], ids, [0.0] * length, True, "", reward))
    return episodes


if __name__ == "__main__":
    main()
