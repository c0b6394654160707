"""Several ranks, over gloo on this machine, give the results of one process, and never hang."""

import json
import multiprocessing
import os
import re
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch

from data_types import SingleProcess
from flat import flatten
from generate import SamplingParams, generate
from grpo import update_policy
from harness.checkpoint import NotSaved, TrainerState, read_checkpoint, save_checkpoint
from harness.config import load_config
from harness.plan import find_shape, make_plan
from optimizer import AdamW
from tests.helpers import (
    RecordingProgress,
    episode,
    random_model,
    random_tokens,
    write_word_tokenizer,
)
from tests.tables import largest_that_fit
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["harness.distributed", "tests.helpers", "generate"])


def run_rank(work, rank: int, size: int, port: int):
    from harness.distributed import Torchrun

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size)}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    world = Torchrun()
    result = work(world)
    world.all_gather_objects(None)  # rank 0 holds the store
    world.close()
    return result


def run_ranks(size: int, work) -> list:
    """Call work(world) in `size` processes. Returns what it returns, by rank."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    # The calls wait for each other, so each of them gets a process of its own.
    with ProcessPoolExecutor(size, mp_context=CONTEXT) as pool:
        ranks = [pool.submit(run_rank, work, rank, size, port) for rank in range(size)]
        return [rank.result() for rank in ranks]


# ---------------------------------------------------------------- the same numbers


class NanGradient(RecordingProgress):
    """Makes the gradient of one micro-batch NaN."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def update(self, n=0, **counts):
        next(self.model.parameters()).grad.fill_(torch.nan)


def two_steps(world, *, nan_rank: int | None = None) -> dict:
    """Two updates from episodes of uneven lengths."""
    model = random_model()
    optimizer = AdamW(model.parameters(), lr=1e-3, eps=1e-4, weight_decay=0.1, world=world)
    progress = NanGradient(model) if world.rank == nan_rank else RecordingProgress()
    found = {"stats": [], "changed": [], "skipped": []}
    for step in range(2):
        episodes = [
            episode(
                q,
                random_tokens(5 + q, seed=q).tolist(),
                random_tokens(3 + 7 * j + q, seed=100 * step + 10 * q + j).tolist(),
                j,
            )
            for q in range(5)
            for j in range(3)
        ]
        stats = update_policy(
            model,
            optimizer,
            episodes,
            max_grad_norm=0.5,
            skip_unfinished=False,
            micro_batch_tokens=60,
            world=world,
            progress=progress,
        )
        found["stats"].append(
            (
                stats.loss,
                stats.grad_norm,
                stats.num_tokens,
                stats.logprob_diff_mean,
                stats.logprob_diff_max,
            )
        )
        found["changed"].append(optimizer.weights_changed)
        found["skipped"].append(stats.skipped)
    state_bytes = sum(tensor.nbytes for tensor in optimizer.state.values())
    return found | {"weights": flatten(model.parameters()).tolist(), "state_bytes": state_bytes}


def nan_on_the_last_rank(world) -> dict:
    return two_steps(world, nan_rank=world.size - 1)


@pytest.mark.parametrize("size", [2, 3])
def test_an_update_equals_that_of_a_single_process(size):
    # Catches: the gradient averaged instead of summed; the norm of a shard taken for that of the
    # whole gradient; the weights not gathered.
    single, ranks = two_steps(SingleProcess()), run_ranks(size, two_steps)
    for rank in ranks:
        assert rank["weights"] == ranks[0]["weights"]  # bit for bit
        assert rank["weights"] == pytest.approx(single["weights"], abs=1e-6)
        assert rank["changed"] == pytest.approx(single["changed"], abs=1e-3)
        for ours, theirs in zip(rank["stats"], single["stats"], strict=True):
            assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)
        assert rank["state_bytes"] <= single["state_bytes"] / size + 2 * 4 * 64
    assert sum(rank["state_bytes"] for rank in ranks) == single["state_bytes"]


def test_nan_in_the_gradient_of_one_rank_skips_the_step_on_all():
    # Catches: only the local shard of the gradient checked.
    untouched = flatten(random_model().parameters()).tolist()
    for rank in run_ranks(2, nan_on_the_last_rank):
        assert rank["skipped"] == ["the loss or the gradient is not finite"] * 2
        assert rank["weights"] == untouched


def sample(world) -> list:
    prompts = [random_tokens(4 + i, seed=i).tolist() for i in range(5)]
    completions = generate(
        random_model(),
        prompts,
        SamplingParams(23, 1.0, 97, frozenset({2, 3})),
        num_answers=3,
        generator=torch.Generator().manual_seed(1),
        world=world,
    )
    ranks = world.all_gather_objects([completion.token_ids for completion in completions])
    return [token_ids for rank in ranks for token_ids in rank]


@pytest.mark.parametrize("size", [3, 7])
def test_the_answers_do_not_depend_on_the_number_of_ranks(size):
    # Catches: random numbers drawn for the local questions alone; ranks without a question (there
    # are 5) that wait forever.
    assert run_ranks(size, sample) == [sample(SingleProcess())] * size


def sum_in_bf16(world) -> list:
    """In bf16, 256 + 1 is 256."""
    flat = torch.full((200,), 256.0 if world.rank == 0 else 1.0, dtype=torch.bfloat16)
    return world.reduce_scatter(flat, world.shards(200, 64)).tolist()


def test_gradients_are_summed_in_float32():
    # Catches: a buffer of the gradient's own dtype.
    assert [value for shard in run_ranks(3, sum_in_bf16) for value in shard] == [258.0] * 200


def fail_on_rank_1(world) -> tuple:
    from harness.distributed import RankFailure

    try:
        if world.rank == 1:
            world.fail("planted", 7)
        while True:
            world.check()
    except RankFailure as failure:
        return failure.reason, failure.exit_code, failure.is_signal


def test_a_failure_reaches_a_rank_between_two_collectives():
    # Catches: check() that does not look for failures.
    assert run_ranks(2, fail_on_rank_1) == [("rank 1: planted", 7, False)] * 2


def fail_with_rank(world) -> str:
    from harness.distributed import RankFailure

    with pytest.raises(RankFailure) as caught:
        world.fail("planted", [130, 2, 1][world.rank])
    return caught.value.reason


def test_an_error_comes_before_a_signal():
    assert run_ranks(3, fail_with_rank) == ["rank 1: planted"] * 3


def test_a_single_process_does_not_initialise_torch_distributed():
    # Catches: Torchrun() made whatever WORLD_SIZE says.
    source = (
        "import train; from torch import distributed; "
        "train.main(['--plan', '--config', 'config_tiny.yaml']); "
        "assert not distributed.is_initialized()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "WORLD_SIZE"}
    command = [sys.executable, "-c", source]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
    flat = torch.arange(7.0)
    assert SingleProcess().reduce_scatter(flat, [slice(0, 7)]) is flat


# ---------------------------------------------------------------- the plan


def test_the_table_of_what_fits_is_what_the_plan_says():
    # Catches: the optimizer state not divided by the number of cards.
    assert largest_that_fit(str(ROOT / "config.yaml")) in (ROOT / "docs/scaling.md").read_text()


def test_a_plan_for_several_cards_divides_what_they_share():
    config = load_config(ROOT / "config.yaml", ["model.memory_gib=48"])
    shape = find_shape("Qwen2.5-3B")
    one, four = make_plan(config, shape), make_plan(config, shape, cards=4)
    assert one.update["optimizer state"] == 4 * four.update["optimizer state"]
    assert one.update["gradient"] == four.update["gradient"]
    assert one.rollout["prompts"] == 4 * four.rollout["prompts"]
    assert four.cache_slots == 64


# ---------------------------------------------------------------- whole runs, started by torchrun

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
    size: int,
    directory: Path,
    model: Path,
    *arguments: str,
    options=(),
    program="train.py",
    **environment: str,
) -> tuple[int, str]:
    """Returns the exit code and the output, stdout and stderr together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
    command += [*options, program, "--config", "config_tiny.yaml", *SMALL]
    command += [f"output_dir={directory}", f"model.path={model}", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | environment
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    return done.returncode, done.stdout


def launch_well(*args, **kwargs) -> str:
    code, output = launch(*args, **kwargs)
    assert code == 0, output
    return output


def metrics(directory: Path) -> list[dict]:
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def weights_and_state(directory: Path) -> list:
    from safetensors.torch import load_file

    path = directory / "checkpoints/step-000006"
    weights = sorted(load_file(path / "model.safetensors").items())
    state = read_checkpoint(path)[1]
    flat = torch.cat([tensor.flatten() for _, tensor in weights])
    return [flat, state["exp_avg"], state["exp_avg_sq"]]


def assert_close(directory: Path, reference: Path) -> None:
    for ours, theirs in zip(metrics(directory), metrics(reference), strict=True):
        assert ours.keys() == theirs.keys()
        for name in ours:
            expected = pytest.approx(theirs[name], rel=1e-3, abs=2e-5)
            assert ours[name] == expected, (name, ours["step"])
    assert_close_weights(directory, reference)


def assert_close_weights(directory: Path, reference: Path) -> None:
    ours, theirs = weights_and_state(directory), weights_and_state(reference)
    for our_tensor, their_tensor in zip(ours, theirs, strict=True):
        assert torch.allclose(our_tensor, their_tensor, rtol=1e-3, atol=1e-5)


def assert_equal_weights(directory: Path, reference: Path) -> None:
    ours, theirs = weights_and_state(directory), weights_and_state(reference)
    assert all(map(torch.equal, ours, theirs))


@pytest.fixture(scope="module")
def single(base_model, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("single") / "run"
    launch_well(1, directory, base_model)
    return directory


@pytest.mark.slow
def test_runs_of_two_and_three_ranks_equal_the_run_of_one(base_model, single, tmp_path):
    for size in (2, 3):
        output = launch_well(size, tmp_path / str(size), base_model)
        assert output.count("step 6:") == 1, output  # only rank 0 prints
        assert_close(tmp_path / str(size), single)


@pytest.mark.slow
def test_a_run_resumes_with_another_number_of_ranks(base_model, single, tmp_path):
    # Catches: the shards joined in the order in which complete.json names them; a rank's shard cut
    # by the old number of ranks.
    for size, steps in ((2, 2), (1, 4), (3, 6)):
        max_steps = f"training.max_steps={steps}"
        launch_well(size, tmp_path / "run", base_model, max_steps, RESUME)
    written = {path.name for path in (tmp_path / "run/checkpoints/step-000006").glob("optimizer*")}
    assert written == {f"optimizer-0000{rank}-of-00003.tensors" for rank in (1, 2, 3)}
    ours, theirs = (
        [m["reward"] for m in metrics(directory) if "loss" in m]
        for directory in (tmp_path / "run", single)
    )
    assert ours == pytest.approx(theirs, abs=1e-6)
    assert_close_weights(tmp_path / "run", single)


@pytest.mark.slow
def test_a_run_of_two_ranks_resumes_bit_for_bit(base_model, tmp_path):
    launch_well(2, tmp_path / "unbroken", base_model)
    for steps in (2, 4, 6):  # each run ends with one more evaluation, so only weights are compared
        launch_well(2, tmp_path / "run", base_model, f"training.max_steps={steps}", RESUME)
    assert_equal_weights(tmp_path / "run", tmp_path / "unbroken")


# ---------------------------------------------------------------- every way to end

TROUBLE = '''
"""The letters task, in which one rank gets into trouble at step 3."""
import os, signal
import torch
import grpo
from tests.letters_task import *
from tests import letters_task

rank, what, once = (os.environ[name] for name in ("FAILING_RANK", "WHAT", "ONCE"))
prompts, updates = 0, 0

def is_due():
    if os.environ["RANK"] != rank or os.path.exists(once):
        return False
    open(once, "w").close()
    return True

def zero_gradient(parameters, plain=grpo.zero_gradient):
    global updates
    updates += 1
    if updates == 3 and what == "memory" and is_due():
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
    return plain(parameters)

grpo.zero_gradient = zero_gradient

def reduce_scatter(*args, plain=torch.distributed.reduce_scatter_tensor):
    if updates == 3 and what == "collective" and is_due():
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB")
    return plain(*args)

torch.distributed.reduce_scatter_tensor = reduce_scatter

def render_prompt(problem, tokenizer):
    global prompts
    prompts += 1
    # 2 that are tried at the start, 5 held-out questions, 4 that the ranks compare, 4 in each step
    if prompts == 2 + 5 + 4 + 2 * 4 + 2 and what not in ("memory", "collective") and is_due():
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "launcher":
            os.kill(os.getppid(), signal.SIGTERM)
        if what == "term":
            os.kill(os.getpid(), signal.SIGTERM)
        if what == "error":
            raise ValueError("planted")
        if what == "bug":
            raise ZeroDivisionError("planted")
    return letters_task.render_prompt(problem, tokenizer)
'''


# The second rank differs from the first in one thing.
APART = """
import os, sys
import torch, train
from tests import letters_task

arguments, what = sys.argv[1:], os.environ["WHAT"]
if os.environ["RANK"] == "1":
    if what == "config":
        arguments.append("training.learning_rate=0.002")
    if what == "prompts":
        plain = letters_task.render_prompt
        letters_task.render_prompt = lambda *args: "Hello! " + plain(*args)
    if what == "weights":
        load = train.Transformer.from_pretrained
        def load_other(*args, **kwargs):
            model = load(*args, **kwargs)
            next(model.parameters()).data[3, 5] += 1e-3
            return model
        train.Transformer.from_pretrained = load_other
    if what == "directory":
        arguments.append(f"output_dir={os.environ['OTHER']}")
if __name__ == "__main__":  # not in the process that scores answers
    sys.exit(train.main(arguments))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("config", "training.learning_rate is 0.0003 on rank 0 and 0.002 on rank 1"),
        ("prompts", "checksum of the first prompts is "),
        ("weights", "sum of the weights' bits is "),
        ("directory", "is not the same directory on ranks 0 and 1"),
    ],
)
def test_ranks_that_differ_end_before_the_first_step(what, message, base_model, tmp_path):
    # Catches: the ranks not compared; a message that is not the same on all ranks.
    (tmp_path / "apart.py").write_text(APART)
    environment = {"WHAT": what, "OTHER": str(tmp_path / "other")}
    program = str(tmp_path / "apart.py")
    code, output = launch(2, tmp_path / "run", base_model, program=program, **environment)
    assert code != 0
    [line] = messages(output)
    assert line.startswith("rank 0: error: ")
    assert message in line
    assert not (tmp_path / "run").exists()


def save_to_two_disks(directory: Path, world) -> str:
    model = random_model()
    tokenizer = Tokenizer.from_pretrained(write_word_tokenizer(directory, size=7, stop_ids=[2]))
    optimizer = AdamW(model.parameters(), lr=1e-3, world=world)
    state = TrainerState(step=3, optimizer_steps=3, log_sizes={}, config={})
    with pytest.raises(NotSaved) as caught:
        save_checkpoint(directory / str(world.rank), model, tokenizer, optimizer, state, keep=1)
    return str(caught.value)


def test_a_checkpoint_without_the_part_of_a_rank_is_not_completed(tmp_path):
    # Catches: complete.json written although a file that it names is on another disk.
    for message in run_ranks(2, partial(save_to_two_disks, tmp_path)):
        assert "optimizer-00002-of-00002.tensors of another rank is not in" in message
        assert "all ranks must see one output_dir" in message
    assert [list((tmp_path / rank).iterdir()) for rank in ("0", "1")] == [[], []]


def messages(output: str) -> list[str]:
    """What the run itself says about its end."""
    return [line for line in output.splitlines() if re.match(r"(error: )?rank \d", line)]


def trouble(tmp_path: Path, what: str, rank: int) -> dict[str, str]:
    """The environment of a run in which this happens once."""
    (tmp_path / "trouble_task.py").write_text(TROUBLE)
    environment = {"WHAT": what, "FAILING_RANK": str(rank), "ONCE": str(tmp_path / "once")}
    return environment | {"PYTHONPATH": f"{ROOT}:{tmp_path}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "rank", "message"),
    [
        ("kill", 1, "error: rank 1 crashed or was killed"),
        ("kill", 0, "error: rank 0 crashed or was killed"),
        ("error", 1, "rank 1: error: planted"),
        ("bug", 1, "rank 1: error: ZeroDivisionError('planted')"),
        ("memory", 1, "rank 1: error: out of memory in the update"),
        ("collective", 1, "error: rank 1 ran out of memory while it exchanged data"),
    ],
)
def test_an_error_of_one_rank_ends_all_and_leaves_the_last_checkpoint(
    what, rank, message, base_model, tmp_path
):
    # Catches: a rank that fails without telling the others, which then wait for half an hour; more
    # than one rank that reports it.
    settings = ["task=trouble_task", "training.ckpt_save_interval=1"]
    environment = trouble(tmp_path, what, rank)
    code, output = launch(2, tmp_path / "run", base_model, *settings, **environment)
    assert code != 0
    [line] = messages(output)
    assert line.startswith(message), output
    checkpoints = sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir())
    assert checkpoints == ["step-000001", "step-000002"]
    read_checkpoint(tmp_path / "run/checkpoints/step-000002")


@pytest.mark.slow
@pytest.mark.parametrize(("what", "message"), [("term", "rank 1: interrupted"), ("launcher", "")])
def test_a_signal_to_one_rank_saves_the_finished_steps_of_all(what, message, base_model, tmp_path):
    # Catches: a signal treated like an error.
    settings = ["task=trouble_task", "training.ckpt_save_interval=100"]
    environment = trouble(tmp_path, what, 1)
    code, output = launch(2, tmp_path / "run", base_model, *settings, **environment)
    assert code != 0
    [line] = messages(output)
    assert line.endswith("interrupted")
    assert message in line
    assert "step-000002 is saved" in output
    read_checkpoint(tmp_path / "run/checkpoints/step-000002")


@pytest.mark.slow
def test_a_log_that_rank_0_cannot_open_ends_all_with_one_message(base_model, tmp_path):
    (tmp_path / "run/metrics.jsonl").mkdir(parents=True)
    _, output = launch(2, tmp_path / "run", base_model)
    [line] = messages(output)
    assert "metrics.jsonl" in line
    # torchrun terminates the slower rank with SIGTERM.
    assert set(re.findall(r"exitcode *: (-?\d+)", output)) <= {"2", "-15"}, output


@pytest.mark.slow
def test_a_run_that_torchrun_restarts_is_the_same_run(base_model, tmp_path):
    # Catches: --resume refused if there is no run yet; old entries of the store taken for new ones.
    settings = ["task=trouble_task", "training.ckpt_save_interval=1", RESUME]
    options = ["--max-restarts", "1"]
    environment = trouble(tmp_path, "kill", 1)
    for name in ("killed", "unbroken"):  # the trouble comes only once, in the first run
        output = launch_well(
            2, tmp_path / name, base_model, *settings, options=options, **environment
        )
        assert "holds no run yet: starting one" in output
    log = "metrics.jsonl"
    assert (tmp_path / "killed" / log).read_bytes() == (tmp_path / "unbroken" / log).read_bytes()
    assert_equal_weights(tmp_path / "killed", tmp_path / "unbroken")
