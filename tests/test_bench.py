"""Every benchmark runs on a CPU at a tiny shape."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.synthetic import random_episodes

ROOT = Path(__file__).parent.parent
TORCHRUN = "-m torch.distributed.run --standalone --nproc-per-node 2"


def run(arguments: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, *arguments.split()],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("bench/rollout.py tiny 2 3 5 --dtype float32 --repeat 1", "mean length 5"),
        ("bench/update.py tiny 2 3 5 --dtype float32 --repeat 1", "310 tokens run"),
        ("bench/processes.py tiny 2 3 5 --dtype float32 --repeat 1", "1 processes of"),
        (f"{TORCHRUN} bench/processes.py tiny 2 3 5 --dtype float32 --repeat 1", "2 processes of"),
        ("bench/bf16.py", "plain bf16"),
        ("bench/probe.py --tiny", "decides: LOGIT_CHUNK_BYTES"),
    ],
)
@pytest.mark.slow
def test_a_benchmark_runs_at_a_tiny_shape(command, shown):
    assert shown in run(command)


@pytest.mark.slow
def test_card_py_runs_without_a_gpu(tmp_path):
    report = tmp_path / "card.md"
    command = f"bench/card.py --device cpu --shape tiny --out {report} --scratch {tmp_path}"
    assert "13 results, 0 failed" in run(command, GRPO_ZERO="echo the seed system")
    text = report.read_text()
    assert "killed, as planned" in text
    assert "45 of 45 lines are equal" in text
    assert "the seed system" in text
    assert [path.name for path in tmp_path.iterdir()] == ["card.md"]  # no checkpoint is left


@pytest.mark.parametrize(("part", "results"), [("speed", 2), ("train-24GB", 3)])
@pytest.mark.slow
def test_a_part_of_card_py_needs_no_other(part, results, tmp_path):
    command = f"bench/card.py {part} --device cpu --shape tiny --out {tmp_path / 'card.md'}"
    assert f"{results} results, 0 failed" in run(command)


def test_lengths_are_geometric_and_cut_off():
    # Catches: `1 - (i + 0.5) / count` -> `(i + 0.5)`; min dropped.
    episodes = random_episodes(3, 100, 7, 50, mean=20, vocab_size=11)
    lengths = [len(e.response_token_ids) for e in episodes]
    assert [e.question_id for e in episodes] == [i // 100 for i in range(300)]
    assert (min(lengths), max(lengths)) == (1, 50)
    assert sum(n <= 14 for n in lengths) == pytest.approx(150, abs=10)  # the median is 20 ln 2
    episodes = random_episodes(1, 9, 7, 50, mean=None, vocab_size=11)
    assert {len(e.response_token_ids) for e in episodes} == {50}
