"""The speed-up from several ranks: wall-clock time of one rollout and one update, waiting included.

OMP_NUM_THREADS=1 uv run bench/processes.py 0.5B 8 16 48 --layers 8 --dtype float32
OMP_NUM_THREADS=1 uv run torchrun --nproc-per-node 2 \
    bench/processes.py 0.5B 8 16 48 --layers 8 --dtype float32
"""

import os
import time

import torch
from common import peak_gib, random_model, work_parser

from bench.synthetic import SyntheticTokenizer, random_episodes, random_questions, random_reward
from data_types import SingleProcess
from grpo import rollout, update_policy
from harness import cpu
from harness.distributed import Torchrun
from optimizer import AdamW


def main() -> None:
    args = work_parser().parse_args()
    world = Torchrun() if int(os.environ.get("WORLD_SIZE", 1)) > 1 else SingleProcess()
    model, num_answers = random_model(args), args.questions * args.answers
    optimizer = AdamW(model.parameters(), lr=1e-6, world=world)
    vocab_size = model.config.vocab_size
    questions = random_questions(args.questions, args.prompt, vocab_size)
    episodes = random_episodes(
        args.questions,
        args.answers,
        args.prompt,
        args.length,
        mean=args.mean,
        vocab_size=vocab_size,
    )
    learned_tokens = sum(len(e.response_token_ids) for e in episodes)
    state = sum(tensor.nbytes for tensor in optimizer.state.values())
    for _ in range(args.repeat):
        world.all_gather_objects(None)  # all ranks start together
        start = time.perf_counter()
        with cpu.packed_for_decoding(model, num_answers // world.size):
            rollout(
                model,
                SyntheticTokenizer(vocab_size),
                questions,
                num_answers=args.answers,
                max_gen_len=args.length,
                temperature=1.0,
                reward_function=random_reward(),
                generator=torch.Generator().manual_seed(0),
                world=world,
            )
        sampled = time.perf_counter()
        update_policy(
            model,
            optimizer,
            episodes,
            max_grad_norm=1.0,
            skip_unfinished=False,
            micro_batch_tokens=1024,
            world=world,
        )
        sampling, learning = sampled - start, time.perf_counter() - sampled
        if world.rank == 0:
            print(
                f"{world.size} processes of {torch.get_num_threads()} threads: "
                f"rollout {sampling:.2f} s, {num_answers * args.length / sampling:.1f} tokens/s; "
                f"update {learning:.2f} s, {learned_tokens / learning:.1f} tokens/s; "
                f"per rank: optimizer state {state / 2**30:.2f} GiB, "
                f"peak memory {peak_gib(args.device):.2f} GiB"
            )
    if world.size > 1:
        world.close()


if __name__ == "__main__":
    main()
