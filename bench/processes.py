"""How much faster several processes are than one: the same rollout and update, by the clock on the wall, waiting included.

OMP_NUM_THREADS=1 uv run bench/processes.py 0.5B 8 16 48 --layers 8 --dtype float32
OMP_NUM_THREADS=1 uv run torchrun --nproc-per-node 2 bench/processes.py 0.5B 8 16 48 --layers 8 --dtype float32
"""

import os
import time

import torch
from common import peak_gib, random_model, work_parser

from data_types import ALONE
from grpo import rollout, update_policy
from harness import cpu
from harness.console import PhaseWatch
from harness.made_up import AnyTokenizer, random_episodes, random_questions, random_reward
from harness.parallel import Processes
from optimizer import AdamW


def main() -> None:
    args = work_parser().parse_args()
    processes = Processes() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ALONE
    model, rows = random_model(args), args.questions * args.answers
    optimizer, vocab_size = (
        AdamW(model.parameters(), lr=1e-6, processes=processes),
        model.config.vocab_size,
    )
    questions = random_questions(args.questions, args.prompt, vocab_size)
    episodes = random_episodes(
        args.questions,
        args.answers,
        args.prompt,
        args.length,
        mean=args.mean,
        vocab_size=vocab_size,
    )
    tokens, state = rows * args.length, sum(t.nbytes for t in optimizer.state.values())
    for _ in range(args.repeat):
        processes.share([])  # all begin together
        clock, watch = time.perf_counter(), PhaseWatch("step", processes=processes)
        with cpu.packed_for_decoding(model, rows // processes.size):
            rollout(
                model,
                AnyTokenizer(vocab_size),
                questions,
                num_answers=args.answers,
                max_gen_len=args.length,
                temperature=1.0,
                reward_function=random_reward(),
                generator=torch.Generator().manual_seed(0),
                watch=watch,
            )
        sampled = time.perf_counter()
        update_policy(
            model,
            optimizer,
            episodes,
            max_grad_norm=1.0,
            skip_unfinished=False,
            micro_batch_tokens=1024,
            watch=watch,
        )
        learned = time.perf_counter()
        if processes.rank == 0:
            print(
                f"{processes.size} processes of {torch.get_num_threads()} threads: rollout {sampled - clock:.2f} s, "
                f"{tokens / (sampled - clock):.1f} tokens/s; update {learned - sampled:.2f} s, "
                f"{tokens / (learned - sampled):.1f} tokens/s; in each: optimizer state {state / 2**30:.2f} GiB, peak memory "
                f"{peak_gib(args.device):.2f} GiB"
            )
    if processes.size > 1:
        processes.close()


if __name__ == "__main__":
    main()
