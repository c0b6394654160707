"""Several processes, on gloo and this machine: the same numbers as one, checkpoints for any number, and no way out that hangs."""

import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from data_types import ALONE, Watch
from flat import flat_gradient, flat_weights
from generate import Sampling, generate
from grpo import update_policy
from harness.checkpoint import read_checkpoint
from harness.plan import make_plan
from optimizer import AdamW
from tests.helpers import episode, random_model, random_tokens
from tests.tables import largest_that_fit

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["tests.test_parallel", "harness.parallel"])


def _one_of_several(work, rank: int, size: int, port: int, results) -> None:
    from harness.parallel import Processes

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
    }
    processes = Processes()
    results.put((rank, work(processes)))
    processes.share([])  # the first holds the store
    processes.close()


def in_processes(size: int, work) -> list:
    """What `work` returns in each of so many processes, as plain Python values."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    results = CONTEXT.Queue()
    started = [
        CONTEXT.Process(target=_one_of_several, args=(work, rank, size, port, results))
        for rank in range(size)
    ]
    for process in started:
        process.start()
    found = dict(results.get(timeout=60) for _ in started)
    for process in started:
        process.join(60)
        assert process.exitcode == 0
    return [found[rank] for rank in range(size)]


class Shared(Watch):
    def __init__(self, processes):
        self.processes = processes


# ---------------------------------------------------------------- the same numbers


def a_step(processes, *, spoiled: int | None = None) -> dict:
    """Two updates from episodes of uneven lengths."""
    model, watch = random_model(), Shared(processes)
    optimizer = AdamW(model.parameters(), lr=1e-3, eps=1e-4, weight_decay=0.1, processes=processes)
    stats = []
    for step in range(2):
        seed = 100 * step
        episodes = [
            episode(
                q,
                random_tokens(5 + q, seed=q).tolist(),
                random_tokens(3 + 7 * j + q, seed=seed + 10 * q + j).tolist(),
                j,
            )
            for q in range(5)
            for j in range(3)
        ]
        if spoiled == processes.rank:
            watch.advance = lambda amount, **counts: next(model.parameters()).grad.fill_(torch.nan)
        stats.append(
            update_policy(
                model,
                optimizer,
                episodes,
                max_grad_norm=0.5,
                skip_unfinished=False,
                micro_batch_tokens=60,
                watch=watch,
            )
        )
    return {
        "weights": flat_weights(model.parameters()).tolist(),
        "grad_norm": [s.grad_norm for s in stats],
        "stats": [(s.loss, s.num_tokens, s.logprob_diff_mean, s.logprob_diff_max) for s in stats],
        "changed": [s.weights_changed for s in stats],
        "skipped": [s.skipped for s in stats],
        "state": sum(t.nbytes for t in optimizer.state.values()),
    }


def nan_in_the_last(processes) -> dict:
    return a_step(processes, spoiled=processes.size - 1)


@pytest.mark.parametrize("size", [2, 3])
def test_an_update_is_that_of_one_process(size):
    # Catches: the gradient averaged instead of summed; the norm of the own part for that of the whole; the weights not gathered.
    alone, several = a_step(ALONE), in_processes(size, a_step)
    for one in several:
        assert one["weights"] == several[0]["weights"]  # of all processes, to the bit
        assert one["weights"] == pytest.approx(alone["weights"], abs=1e-6)
        assert one["grad_norm"] == pytest.approx(alone["grad_norm"], rel=1e-5)
        assert one["changed"] == pytest.approx(alone["changed"], abs=1e-3)
        for ours, theirs in zip(one["stats"], alone["stats"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
    share = alone["state"] / size
    assert all(one["state"] <= share + 2 * 4 * 64 for one in several)
    assert sum(one["state"] for one in several) == alone["state"]


def test_nan_in_one_gradient_stops_the_step_of_all():
    # Catches: the guard on the own part of the gradient alone.
    untouched = flat_weights(random_model().parameters()).tolist()
    for one in in_processes(2, nan_in_the_last):
        assert one["skipped"] == ["the loss or the gradient is not finite"] * 2
        assert one["weights"] == untouched


def drawn(processes) -> list:
    prompts = [random_tokens(4 + i, seed=i).tolist() for i in range(5)]
    samples = generate(
        random_model(),
        prompts,
        Sampling(23, 1.0, 97, frozenset({2, 3})),
        num_answers=3,
        generator=torch.Generator().manual_seed(1),
        watch=Shared(processes),
    )
    return processes.share([sample.token_ids for sample in samples])


@pytest.mark.parametrize("size", [3, 7])
def test_the_answers_do_not_depend_on_the_number_of_processes(size):
    # Catches: a table of the own questions alone; seven processes with five questions that wait for two forever.
    assert in_processes(size, drawn) == [drawn(ALONE)] * size


def sums(processes) -> list:
    """In bf16, where 256 + 1 is 256: the sum of one 256 and many 1 tells in which precision it was taken."""
    flat = torch.full((200,), 256.0 if processes.rank == 0 else 1.0, dtype=torch.bfloat16)
    return processes.reduce_scatter(flat, processes.parts_of(200, 64)).tolist()


def test_a_gradient_is_summed_in_float32():
    # Catches: the buffer in the gradient's own type.
    assert [number for part in in_processes(3, sums) for number in part] == [258.0] * 200


def test_one_process_has_no_other(monkeypatch):
    # Catches: Processes() made whatever WORLD_SIZE says.
    source = "import train; from torch import distributed as d; train.main(['--plan', '--config', 'config_tiny.yaml']); "
    source += "assert not d.is_initialized()"
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, env=environment, check=True, capture_output=True
    )
    flat = torch.arange(7.0)
    assert ALONE.reduce_scatter(flat, [slice(0, 7)]) is flat
    assert flat_gradient(random_model().parameters()).count_nonzero() == 0


# ---------------------------------------------------------------- the plan


def test_the_table_of_what_fits_is_what_the_plan_says():
    # Catches: the optimizer's state not divided by the cards.
    assert largest_that_fit(str(ROOT / "config.yaml")) in (ROOT / "docs/scaling.md").read_text()


def test_a_plan_for_several_cards_divides_what_they_share():
    from harness.config import load_config
    from harness.plan import find_shape

    config, shape = load_config(ROOT / "config.yaml"), find_shape("Qwen2.5-3B")
    one, four = make_plan(config, shape), make_plan(config, shape, cards=4)
    assert one.update["optimizer state"] == 4 * four.update["optimizer state"]
    assert one.update["gradients"] == four.update["gradients"]
    assert one.rollout["prompts"] == 4 * four.rollout["prompts"]
    assert four.cache_rows == 64


# ---------------------------------------------------------------- whole runs, by the launcher

SMALL = [
    "training.batch_size=12",
    "training.num_questions_per_batch=4",
    "training.max_gen_len=24",
    "training.max_steps=6",
    "training.eval_interval=3",
    "training.ckpt_save_interval=2",
    "training.micro_batch_tokens=300",
    "training.skip_unfinished_episodes=false",
    "data.test_size=5",
    "task=tests.letters_task",
]
RESUME = "--resume"


def launch(
    size: int, directory: Path, model: Path, *arguments: str, options=(), **environment: str
) -> subprocess.Popen:
    train = [
        "train.py",
        "--config",
        "config_tiny.yaml",
        f"output_dir={directory}",
        f"model.path={model}",
        *SMALL,
        *arguments,
    ]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(size),
        *options,
        *train,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def output_of(process: subprocess.Popen, *, code: int | None = 0) -> str:
    output = process.communicate(timeout=120)[0]
    assert code is None or process.returncode == code, output
    return output


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def weights_and_state(directory: Path) -> list:
    from safetensors.torch import load_file

    path = directory / "checkpoints/step-000006"
    return [
        torch.cat([t.flatten() for _, t in sorted(load_file(path / "model.safetensors").items())]),
        *(read_checkpoint(path)[1][name] for name in ("exp_avg", "exp_avg_sq")),
    ]


@pytest.fixture(scope="module")
def alone(base_model, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("alone") / "run"
    output_of(launch(1, directory, base_model))
    return directory


def assert_close(directory: Path, reference: Path) -> None:
    for ours, theirs in zip(metrics(directory), metrics(reference), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=2e-5), (
                name,
                ours["step"],
            )
    for ours, theirs in zip(
        weights_and_state(directory), weights_and_state(reference), strict=True
    ):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_runs_of_two_and_of_three_processes_are_the_run_of_one(base_model, alone, tmp_path):
    for size in (2, 3):
        output = output_of(launch(size, tmp_path / str(size), base_model))
        assert output.count("step 6:") == 1, output  # one process writes
        assert_close(tmp_path / str(size), alone)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(base_model, alone, tmp_path):
    # Catches: the parts put together in the order of their names' hashes; the part of a rank taken by the old number.
    for size, steps in ((2, 2), (1, 4), (3, 6)):
        output_of(launch(size, tmp_path / "run", base_model, f"training.max_steps={steps}", RESUME))
    written = {path.name for path in (tmp_path / "run/checkpoints/step-000006").glob("optimizer*")}
    assert written == {f"optimizer-0000{rank}-of-00003.tensors" for rank in (1, 2, 3)}
    ours = [m for m in metrics(tmp_path / "run") if "loss" in m]
    theirs = [m for m in metrics(alone) if "loss" in m]
    assert [m["reward"] for m in ours] == pytest.approx([m["reward"] for m in theirs], abs=1e-6)
    for mine, other in zip(
        weights_and_state(tmp_path / "run"), weights_and_state(alone), strict=True
    ):
        assert torch.allclose(mine, other, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_run_of_two_resumes_to_the_bit(base_model, tmp_path):
    output_of(launch(2, tmp_path / "unbroken", base_model))
    for steps in (2, 4, 6):  # at an end there is one evaluation more
        output_of(launch(2, tmp_path / "run", base_model, f"training.max_steps={steps}", RESUME))
    for mine, other in zip(
        weights_and_state(tmp_path / "run"), weights_and_state(tmp_path / "unbroken"), strict=True
    ):
        assert torch.equal(mine, other)


# ---------------------------------------------------------------- ways out

TROUBLE = '''
"""The letters task, where something happens to one process at a step of its own counting."""
import os, signal
import torch
import grpo
from tests.letters_task import *
from tests import letters_task
calls, updates, RANK, LAUNCHER = 0, [], os.getpid(), os.getppid()  # rewards are computed in another process

who, what, once = (os.environ[name] for name in ("WHO", "WHAT", "ONCE"))

def is_its_turn():
    return os.environ["RANK"] == who and not os.path.exists(once)

def zero_gradient(parameters, plain=grpo.zero_gradient):
    updates.append(what)
    if len(updates) == 3 and what == "memory" and is_its_turn():
        open(once, "w").close()
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    return plain(parameters)

grpo.zero_gradient = zero_gradient

def reward_function(response, **problem):
    global calls
    calls += 1
    if calls == 20 and is_its_turn() and what != "memory":
        open(once, "w").close()
        if what == "kill":
            os.kill(RANK, signal.SIGKILL)
        if what == "launcher":
            os.kill(LAUNCHER, signal.SIGTERM)
        if what == "term":
            os.kill(RANK, signal.SIGTERM)
        if what == "raise":
            raise RuntimeError("planted")
    return letters_task.reward_function(response, **problem)
'''


def own_lines(output: str) -> list[str]:
    """What the run itself says of its end."""
    return [line for line in output.splitlines() if re.match(r"(error: )?rank \d", line)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "who", "said"),
    [
        ("kill", 1, "error: rank 1 died without a word"),
        ("kill", 0, "error: rank 0 died without a word"),
        ("raise", 1, "rank 1: error: the reward function raised RuntimeError('planted')"),
        ("term", 1, "rank 1: interrupted"),
        ("launcher", 0, "interrupted"),
        ("memory", 1, "memory is full in the update"),
    ],
)
def test_what_ends_one_process_ends_all_with_one_message(what, who, said, base_model, tmp_path):
    # Catches: a process that fails without telling (the others wait for half an hour); each telling for itself.
    (tmp_path / "trouble_task.py").write_text(TROUBLE)
    environment = {
        "WHAT": what,
        "WHO": str(who),
        "ONCE": str(tmp_path / "once"),
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
    }
    arguments = ["task=trouble_task", "training.ckpt_save_interval=1"]
    process, clock = (
        launch(2, tmp_path / "run", base_model, *arguments, **environment),
        time.monotonic(),
    )
    while not (tmp_path / "once").exists():
        time.sleep(0.05)
        assert time.monotonic() - clock < 60
    clock = time.monotonic()
    output = output_of(process, code=None)
    assert time.monotonic() - clock < 20
    assert process.returncode != 0
    told = own_lines(output)
    assert len(told) == 1, output
    assert said in told[0]
    newest = sorted((tmp_path / "run/checkpoints").glob("step-*"))[-1]
    read_checkpoint(newest)
    assert not list((tmp_path / "run/checkpoints").glob(".partial*"))


@pytest.mark.slow
def test_a_log_that_the_first_process_cannot_open_ends_all_with_one_message(base_model, tmp_path):
    # Catches: the others, for whom the run has begun, meet to save it, and the first is not there.
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    output = output_of(launch(2, tmp_path / "run", base_model), code=None)
    assert len(told := own_lines(output)) == 1, output
    assert "metrics.jsonl" in told[0]
    assert set(re.findall(r"exitcode *: (-?\d+)", output)) <= {"2", "-15"}, (
        output
    )  # the launcher ends who is slower


@pytest.mark.slow
def test_the_launcher_starts_again_and_the_run_is_the_same(base_model, tmp_path):
    # Catches: --resume that refuses where there is no run yet.
    (tmp_path / "trouble_task.py").write_text(TROUBLE)
    environment = {
        "WHAT": "kill",
        "WHO": "1",
        "ONCE": str(tmp_path / "once"),
        "PYTHONPATH": f"{ROOT}:{tmp_path}",
    }
    for name in ("killed", "unbroken"):  # in the second the trouble has been
        output = output_of(
            launch(
                2,
                tmp_path / name,
                base_model,
                "task=trouble_task",
                "training.ckpt_save_interval=1",
                RESUME,
                options=["--max-restarts", "1"],
                **environment,
            )
        )
        assert "holds no run yet: starting one" in output
    assert (tmp_path / "killed/metrics.jsonl").read_bytes() == (
        tmp_path / "unbroken/metrics.jsonl"
    ).read_bytes()
    for mine, other in zip(
        weights_and_state(tmp_path / "killed"),
        weights_and_state(tmp_path / "unbroken"),
        strict=True,
    ):
        assert torch.equal(mine, other)
