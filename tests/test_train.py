"""Whole runs: they resume exactly, survive damage, signals and errors, and name what is missing."""

import contextlib
import errno
import gc
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import stat
import subprocess
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import generate
import grpo
import train
from data_types import Reward
from harness import checkpoint, run
from qwen2_model import Transformer
from tests import letters_task
from tests.helpers import add_checksums
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
SMALL = [
    "training.batch_size=12",
    "training.num_questions_per_batch=4",
    "training.max_gen_len=24",
    "training.max_steps=6",
    "training.eval_interval=3",
    "training.ckpt_save_interval=2",
    "training.micro_batch_tokens=300",
    "training.max_skipped_steps=2",
    "training.skip_unfinished_episodes=false",
    "training.warmup_steps=3",
    "data.test_size=5",
    "task=tests.letters_task",
]
ANSWERS, HELD_OUT = 12, 5  # rewards per step and per evaluation
TRIED = 4  # rewards before the model is loaded
SPINS = "GOMP_SPINCOUNT"
NEVER = "training.ckpt_save_interval=100"

# With one thread, as in the other processes, sums are taken in the same order.
pytestmark = pytest.mark.usefixtures("own_signals", "one_thread")


def command(output_dir, model, *overrides) -> list[str]:
    config = ["--config", str(ROOT / "config_tiny.yaml")]
    return [*config, f"output_dir={output_dir}", f"model.path={model}", *SMALL, *overrides]


def saved(directory: Path) -> list[str]:
    return sorted(path.name for path in (directory / "checkpoints").iterdir())


def records(directory: Path, key: str = "reward") -> list[dict]:
    found = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [record for record in found if key in record]


class Planted:
    """Calls a function, and changes its result at the given calls."""

    def __init__(self, function, change, calls):
        self.function, self.change, self.calls, self.count = function, change, calls, 0

    def __call__(self, *args, **kwargs):
        self.count += 1
        result = self.function(*args, **kwargs)
        return self.change(result) if self.count in self.calls else result

    def close(self):
        self.function.close()


@contextlib.contextmanager
def planted(change, *calls: int, name: str = "reward"):
    """Change the results of the reward function (or of another of the task's) at these calls."""
    isolated_reward = run.isolated_reward

    def planted_reward(*args, **kwargs):
        return Planted(isolated_reward(*args, **kwargs), change, calls)

    with pytest.MonkeyPatch.context() as patch:
        if name == "reward":
            patch.setattr(run, "isolated_reward", planted_reward)
        else:
            patch.setattr(letters_task, name, Planted(getattr(letters_task, name), change, calls))
        yield


def reward_call(step: int, answer: int = 7) -> int:
    """The call that scores an answer of a step of SMALL, which evaluates before steps 1 and 4."""
    return TRIED + HELD_OUT * (1 + (step > 3)) + ANSWERS * (step - 1) + answer


# ---------------------------------------------------------------- threads


@pytest.mark.skipif(sys.platform != "linux", reason="only GNU's OpenMP prints its settings")
@pytest.mark.parametrize("program", ["train", "evaluate", "warm_start"])
def test_waiting_threads_spin_briefly_unless_told_otherwise(program):
    # Catches: the variable set after torch is imported, which is too late.
    for given, wanted in (({}, 1000), ({SPINS: "7"}, 7)):
        environment = {name: value for name, value in os.environ.items() if name != SPINS}
        environment |= {"OMP_DISPLAY_ENV": "verbose"} | given
        command = [sys.executable, "-c", f"import {program}"]
        shown = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True
        ).stderr
        assert f"GOMP_SPINCOUNT = '{wanted}'" in shown


# ---------------------------------------------------------------- killed runs

# Imports torch once, then forks a process for each run. A run can be told to kill itself when it is
# about to open, rename or remove a file of its output directory for the n-th time: between these
# moments, the time of the kill makes no difference to what is left on the disk.
SERVER = """
import json, os, signal, sys, torch
import tests.letters_task, torch.utils.tensorboard, train

def watch_files(directory, kill_at, count_file):
    count = 0
    def hook(event, args):
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            if isinstance(args[0], (str, os.PathLike)) and str(args[0]).startswith(directory):
                count += 1
                if count == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(hook)
    return lambda: open(count_file, "w").write(str(count))

print("ready", flush=True)
for line in sys.stdin:
    arguments, threads, out, err, directory, kill_at, count_file = json.loads(line)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(threads)
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(signum, signal.SIG_DFL)
        for path, descriptor in ((out, 1), (err, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
        sys.stdout.reconfigure(line_buffering=True)
        write_count = watch_files(directory, kill_at, count_file)
        code = train.main(arguments)
        sys.stdout.flush()
        write_count()
        os._exit(code)
    print(child, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def processes(tmp_path_factory):
    """Runs train.py in processes of their own, one at a time."""
    tasks = tmp_path_factory.mktemp("tasks")
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{tasks}", "PYTHONUNBUFFERED": ""}
    with subprocess.Popen(
        [sys.executable, "-c", SERVER],
        cwd=ROOT,
        env=environment,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as server:
        assert server.stdout.readline() == "ready\n"

        def start(
            arguments, *, threads=1, out=tasks / "out", err=tasks / "out", kill_at=0
        ) -> SimpleNamespace:
            for name in ("out", "err", "count"):
                (tasks / name).unlink(missing_ok=True)
            directory = next(a for a in arguments if a.startswith("output_dir="))
            directory = directory.removeprefix("output_dir=")
            order = [arguments, threads, str(out), str(err), directory, kill_at]
            print(json.dumps([*order, str(tasks / "count")]), file=server.stdin, flush=True)
            pid = int(server.stdout.readline())
            return SimpleNamespace(pid=pid, wait=lambda: int(server.stdout.readline()))

        def finish(arguments, **kwargs) -> int:
            """Returns how often the run opened, renamed or removed a file."""
            code = start(arguments, **kwargs).wait()
            assert code == 0, (tasks / "out").read_text()
            return int((tasks / "count").read_text())

        yield SimpleNamespace(start=start, finish=finish, tasks=tasks)
        server.stdin.close()


def assert_same_run(directory: Path, reference: Path) -> None:
    for name in ("metrics.jsonl", "samples.jsonl"):
        assert (directory / name).read_bytes() == (reference / name).read_bytes(), name
    last = saved(reference)[-1]
    ours, theirs = directory / "checkpoints" / last, reference / "checkpoints" / last
    assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
    our_state, our_tensors = checkpoint.read_checkpoint(ours)
    their_state, their_tensors = checkpoint.read_checkpoint(theirs)
    assert our_state.optimizer_steps == their_state.optimizer_steps
    assert our_tensors.keys() == their_tensors.keys() == {"exp_avg", "exp_avg_sq"}
    assert all(torch.equal(our_tensors[name], their_tensors[name]) for name in our_tensors)


@pytest.fixture(scope="session")
def unbroken(base_model, tmp_path_factory, processes):
    directory = tmp_path_factory.mktemp("unbroken") / "run"
    num_files = processes.finish(command(directory, base_model))
    return SimpleNamespace(directory=directory, num_files=num_files)


def kill_and_resume(processes, arguments, directory: Path, *, kills: int, num_files: int) -> None:
    rng, resume = random.Random(kills), []
    for _ in range(kills):
        processes.start([*arguments, *resume], kill_at=rng.randrange(1, num_files)).wait()
        resume = ["--resume"] if (directory / "config.yaml").exists() else []
    processes.finish([*arguments, *resume])


def test_a_killed_run_equals_an_unbroken_one(base_model, unbroken, processes, tmp_path):
    # Catches: saving the checkpoint after the evaluation; an evaluation that draws from the
    # rollout's generator.
    arguments, directory = command(tmp_path / "run", base_model), tmp_path / "run"
    kill_and_resume(processes, arguments, directory, kills=5, num_files=unbroken.num_files)
    assert_same_run(directory, unbroken.directory)


@pytest.mark.slow
def test_a_run_killed_twenty_times_equals_an_unbroken_one(base_model, processes, tmp_path):
    longer = ["training.max_steps=60", "training.ckpt_save_interval=1", "training.eval_interval=2"]
    num_files = processes.finish(command(tmp_path / "reference", base_model, *longer))
    arguments, directory = command(tmp_path / "run", base_model, *longer), tmp_path / "run"
    kill_and_resume(processes, arguments, directory, kills=20, num_files=num_files // 4)
    assert_same_run(directory, tmp_path / "reference")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one thread adds in one order anyway")
def test_two_runs_with_one_seed_are_equal_with_two_threads(base_model, processes, tmp_path):
    # Catches: `set_deterministic_debug_mode` removed. At this size two threads add the gradients of
    # the answers' first tokens to the end of their prompt, in the order in which they arrive.
    settings = [
        "training.max_steps=5",
        "training.num_questions_per_batch=1",
        "training.batch_size=300",
        "training.max_gen_len=10",
        "training.micro_batch_tokens=9000",
    ]
    for name in ("one", "other"):
        processes.finish(command(tmp_path / name, base_model, *settings), threads=2)
    assert_same_run(tmp_path / "one", tmp_path / "other")


# ---------------------------------------------------------------- signals and errors


# Catches: log sizes taken at the save instead of after the step, which doubles the evaluation.
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_the_finished_steps_and_resuming_doubles_nothing(
    signum, base_model, unbroken, tmp_path, capsys
):
    directory = tmp_path / "run"
    with planted(lambda reward: os.kill(os.getpid(), signum) or reward, reward_call(step=4)):
        assert train.main(command(directory, base_model, NEVER)) == 128 + signum
    error = capsys.readouterr().err
    assert error.startswith("interrupted\n")
    assert "step-000003 is saved; continue with the same command and --resume" in error
    assert saved(directory) == ["step-000003"]
    assert train.main([*command(directory, base_model), "--resume"]) == 0
    assert "note: training.ckpt_save_interval changes from 100 to 2" in capsys.readouterr().out
    assert_same_run(directory, unbroken.directory)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(directory / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("metrics/reward")] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in board.Scalars("eval/success")] == [0, 3, 6]


def test_a_signal_during_the_update_saves_the_steps_before_it(base_model, tmp_path, monkeypatch):
    # Catches: an interrupted update taken for one that failed.
    def send_signal(micro_batches):
        os.kill(os.getpid(), signal.SIGTERM)
        return micro_batches

    pack = Planted(grpo.pack_micro_batches, send_signal, [3])
    monkeypatch.setattr(grpo, "pack_micro_batches", pack)
    assert train.main(command(tmp_path / "run", base_model, NEVER)) == 128 + signal.SIGTERM
    assert saved(tmp_path / "run") == ["step-000002"]


def test_a_second_signal_ends_the_process_but_a_second_hangup_does_not():
    signals = run.Signals()
    signals.check()
    os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGHUP)
    with pytest.raises(run.Interrupted):
        signals.check()
    assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL


# Catches: `is not signal.SIG_IGN` removed; the ignored signals reset by the first one.
def test_a_signal_that_is_ignored_at_the_start_stays_ignored():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    signals = run.Signals()
    os.kill(os.getpid(), signal.SIGHUP)
    signals.check()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(run.Interrupted):
        signals.check()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.fixture
def sleeping(base_model, processes, tmp_path):
    """A run whose reward function has been called and sleeps."""
    started = tmp_path / "started"
    os.mkfifo(started)
    (processes.tasks / "sleeping_task.py").write_text(
        "import time\nfrom countdown_task import Data, load_problems, render_prompt\n"
        "def reward_function(response, **problem):\n"
        f"    open({str(started)!r}, 'w').close()\n    time.sleep(10**6)\n"
    )
    settings = ["task=sleeping_task", "training.reward_timeout=60"]
    process = processes.start(command(tmp_path / "run", base_model, *settings))
    open(started).close()  # returns when the reward function opens it
    return process


def test_one_signal_ends_a_run_that_waits_for_a_reward(sleeping):
    # Catches: the answer of the worker awaited in one piece.
    os.kill(sleeping.pid, signal.SIGTERM)
    assert sleeping.wait() == 128 + signal.SIGTERM


def test_a_second_ctrl_c_ends_a_run_at_once(sleeping):
    with contextlib.suppress(ProcessLookupError):  # two signals at once may arrive as one
        while True:
            os.kill(sleeping.pid, signal.SIGINT)
            os.sched_yield()
    assert sleeping.wait() == -signal.SIGINT


def fail(_):
    raise ValueError("planted")


# Catches: saving on signals only.
@pytest.mark.parametrize(
    ("name", "change", "call", "message"),
    [
        ("reward", fail, reward_call(step=3), "planted"),
        (
            "render_prompt",
            lambda prompt: prompt + "x" * 2500,
            HELD_OUT + 2 * 4 + 3,
            "max_position_embeddings",
        ),
    ],
)
def test_an_error_outside_the_update_saves_the_finished_steps(
    name, change, call, message, base_model, tmp_path, capsys
):
    with planted(change, call, name=name):
        assert train.main(command(tmp_path / "run", base_model, NEVER)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "step-000002 is saved" in error
    assert saved(tmp_path / "run") == ["step-000002"]


def test_an_error_in_the_update_leaves_the_last_checkpoint(
    base_model, tmp_path, monkeypatch, capsys
):
    # Catches: weights saved although the optimizer may have changed half of them.
    monkeypatch.setattr(train, "update_policy", Planted(train.update_policy, fail, [4]))
    assert train.main(command(tmp_path / "run", base_model)) == 2
    assert saved(tmp_path / "run") == ["step-000002"]
    assert "the steps after 2 are lost" in capsys.readouterr().err


def test_running_out_of_memory_shows_the_plan(base_model, tmp_path, monkeypatch, capsys):
    def run_out(_):
        raise torch.OutOfMemoryError("Tried to allocate 2.00 GiB\nand more")

    monkeypatch.setattr(train, "update_policy", Planted(train.update_policy, run_out, [3]))
    assert train.main(command(tmp_path / "run", base_model)) == 1
    error = capsys.readouterr().err
    assert "out of memory in the update (Tried to allocate 2.00 GiB)" in error
    assert "KV cache" in error


def test_running_out_of_memory_before_there_is_a_plan_is_one_line(base_model, tmp_path, capsys):
    def run_out(_):
        raise MemoryError

    with planted(run_out, 1, name="load_problems"):
        assert train.main(command(tmp_path / "run", base_model)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory in the preparation (MemoryError);")


def test_an_unforeseen_error_keeps_its_traceback_and_the_finished_steps(
    base_model, tmp_path, capsys
):
    def bug(_):
        raise ZeroDivisionError("planted")

    with planted(bug, reward_call(step=3)), pytest.raises(ZeroDivisionError, match="planted"):
        train.main(command(tmp_path / "run", base_model, NEVER))
    assert "step-000002 is saved" in capsys.readouterr().err


# Catches: the check of the directory removed, so that the run succeeds and names a checkpoint that
# is gone; config.yaml not written with the checkpoint, so that there is no run to resume.
@pytest.mark.parametrize(
    ("step", "call"),
    [(4, reward_call(step=4)), (6, 2 * HELD_OUT + 6 * ANSWERS + 3)],
    ids=["in a step", "in the last evaluation"],
)
def test_a_removed_directory_is_made_again_for_the_weights(
    step, call, base_model, tmp_path, capsys
):
    directory, arguments = tmp_path / "run", command(tmp_path / "run", base_model)
    with planted(lambda reward: shutil.rmtree(directory) or reward, call):
        assert train.main(arguments) == 1
    error = capsys.readouterr().err
    assert "was removed or replaced" in error
    assert f"step-{step:06d} is saved" in error
    assert train.main([*arguments, "--resume"]) == 0
    assert [r["step"] for r in records(directory)] == list(range(step + 1, 7))


def test_a_directory_that_another_run_may_use_is_left_alone(base_model, tmp_path, capsys):
    def replace_directory(reward):
        (tmp_path / "run").rename(tmp_path / "moved")
        (tmp_path / "run").mkdir()
        return reward

    with planted(replace_directory, reward_call(step=4)):
        assert train.main(command(tmp_path / "run", base_model)) == 1
    error = capsys.readouterr().err
    assert "the steps after 2 are lost" in error
    assert "may belong to another run" in error
    assert list((tmp_path / "run").iterdir()) == []
    assert train.main([*command(tmp_path / "moved", base_model), "--resume"]) == 0


def test_the_reward_process_ends_with_the_run(base_model, tmp_path):
    # Catches: close() left to the garbage collector.
    closed = []
    gc.disable()
    try:
        with planted(None), pytest.MonkeyPatch.context() as patch:
            patch.setattr(Planted, "close", lambda self: closed.append(self.function.close()))
            assert train.main(command(tmp_path / "run", base_model, "training.max_steps=1")) == 0
    finally:
        gc.enable()
    assert len(closed) == 1


def test_a_closed_pipe_ends_the_run_with_its_weights_saved(base_model, processes, tmp_path):
    pipe, errors = tmp_path / "pipe", processes.tasks / "err"
    os.mkfifo(pipe)
    arguments = command(tmp_path / "run", base_model, NEVER, "training.max_steps=1000")
    process = processes.start(arguments, out=pipe, err=errors)
    with open(pipe) as reader:
        while reader.readline().split()[:1] != ["2"]:
            pass
    assert process.wait() == 1
    [name] = saved(tmp_path / "run")
    assert errors.read_text() == (
        f"error: [Errno 32] Broken pipe\n{tmp_path}/run/checkpoints/{name} is saved; "
        "continue with the same command and --resume\n"
    )
    # Catches: the step counted before its log is on disk; then the resumed run lacks its lines.
    last = int(name.removeprefix("step-")) + 1
    processes.finish([*arguments, "--resume", f"training.max_steps={last}"])
    assert [r["step"] for r in records(tmp_path / "run")] == list(range(1, last + 1))


# Catches: the weights saved although the log of their step is incomplete.
@pytest.mark.parametrize(("interval", "call"), [(2, 0), (2, 1), (100, 2)])
def test_a_step_whose_log_cannot_be_written_is_not_saved(
    interval, call, base_model, unbroken, tmp_path, capsys
):
    def full_disk(_):
        raise OSError(28, "No space left on device")

    # Three files are written in a step, two in an evaluation and one with a checkpoint.
    plain, calls = run.RunLog.write, 2 * 2 + 3 * 3 + (interval == 2) + 1 + call  # of step 4
    arguments = command(tmp_path / "run", base_model, f"training.ckpt_save_interval={interval}")
    with pytest.MonkeyPatch.context() as patch:
        write = Planted(lambda *args: None, full_disk, [calls])
        patch.setattr(run.RunLog, "write", lambda *args: write() or plain(*args))
        assert train.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: [Errno 28] No space left on device")
    assert ("step-000002 is saved" in error) == (interval == 2)
    assert "the steps after" in error
    resume = [*command(tmp_path / "run", base_model), "--resume"]
    assert train.main(resume) == 0
    assert_same_run(tmp_path / "run", unbroken.directory)


def test_a_log_removed_during_the_run_goes_on_and_the_run_succeeds(base_model, tmp_path, capsys):
    # Catches: metrics.jsonl read at the end.
    log = tmp_path / "run/metrics.jsonl"
    with planted(lambda reward: log.unlink() or reward, reward_call(step=5)):
        assert train.main(command(tmp_path / "run", base_model)) == 0
    log.unlink()
    output = capsys.readouterr().out
    assert f"warning: another program changed {log}" in output
    assert [line[:14] for line in output.splitlines()[-3:-1]] == [
        "after step 0, ",
        "after step 6, ",
    ]


@contextlib.contextmanager
def largest_file(size: int):
    """Let no file grow beyond this many bytes, as if the disk were full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores the signal SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# Catches: SafetensorError not caught; `finally: _remove(partial)` removed; a second attempt to
# save, which reports the full disk twice.
@pytest.mark.parametrize("full", ["log", "model.safetensors", "optimizer.tensors"])
def test_a_full_disk_keeps_the_last_checkpoint(full, finished, capsys):
    directory, arguments = finished
    [events] = (directory / "tensorboard").iterdir()
    size = events.stat().st_size + 1000
    if full != "log":
        size = (directory / "checkpoints/step-000004" / full).stat().st_size - 1000
    with largest_file(size):
        assert train.main(arguments) == 1
    first, lost, kept = capsys.readouterr().err.splitlines()
    if full == "log":
        assert first.startswith("error: [Errno 27] File too large")
        assert lost.startswith("the steps after 4 are lost: the checkpoint of step 5 could not be")
    else:
        assert first.startswith("error: the checkpoint of step 6 could not be written")
        assert full in first
        assert lost == "the steps after 4 are lost"
    assert kept.startswith(f"{directory}/checkpoints/step-000004 is saved")
    assert saved(directory) == ["step-000002", "step-000004"]
    assert train.main(arguments) == 0


def test_checkpoints_removed_during_a_save_are_made_again(base_model, tmp_path, capsys):
    # Catches: no second attempt after a save that failed.
    plain, calls = Tokenizer.save_pretrained, []

    def save_pretrained(self, directory):
        calls.append(directory)
        if len(calls) == 2:  # the checkpoint of step 4
            shutil.rmtree(tmp_path / "run/checkpoints")
        else:
            plain(self, directory)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tokenizer, "save_pretrained", save_pretrained)
        assert train.main(command(tmp_path / "run", base_model)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the checkpoint of step 4 could not be written")
    assert "step-000004 is saved" in error
    assert saved(tmp_path / "run") == ["step-000004"]


def test_a_file_system_that_cannot_sync_a_directory_is_no_error(base_model, tmp_path, monkeypatch):
    def refuse_directories(descriptor, plain=os.fsync):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        plain(descriptor)

    monkeypatch.setattr(os, "fsync", refuse_directories)
    assert train.main(command(tmp_path / "run", base_model, "training.max_steps=2")) == 0
    assert saved(tmp_path / "run") == ["step-000002"]


# ---------------------------------------------------------------- checkpoints


@pytest.fixture(scope="session")
def finished_run(base_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished") / "run"
    assert train.main(command(directory, base_model, "training.max_steps=4")) == 0
    return directory


@pytest.fixture
def finished(finished_run, base_model, tmp_path):
    """A run that ended at step 4 with checkpoints 2 and 4, and arguments that take it to step 6."""
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run", [*command(tmp_path / "run", base_model), "--resume"]


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1000] ^= 4
    file.write_bytes(content)


def copy_step_2(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-000002"), path)


def unequal_shards(path: Path) -> None:
    state = load_file(path / "optimizer.tensors")
    (path / "optimizer.tensors").unlink()
    save_file(state, path / "optimizer-00001-of-00002.tensors")
    save_file({"exp_avg": state["exp_avg"]}, path / "optimizer-00002-of-00002.tensors")


NORM = "model.norm.weight"
DAMAGE = {  # found by the checksums
    "truncated weights": (
        lambda p: os.truncate(p / "model.safetensors", 1000),
        "model.safetensors is damaged",
    ),
    "a flipped bit": (
        lambda p: flip_a_bit(p / "model.safetensors"),
        "model.safetensors is damaged",
    ),
    "zeros": (
        lambda p: (p / "optimizer.tensors").write_bytes(bytes(5000)),
        "optimizer.tensors is damaged",
    ),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json is missing"),
    "not complete": (lambda p: (p / "complete.json").unlink(), "complete.json does not exist"),
    "a file outside": (
        lambda p: edit_json(p / "complete.json", **{"../x": "0"}),
        "'../x', which is not a plain file name",
    ),
}
for text in ("[]", "3", "null", "{}", '{"trainer.json"', "[" * 100_000, '{"config.json": 1}'):
    DAMAGE[f"checksums {text[:9]}"] = (
        lambda p, text=text: (p / "complete.json").write_text(text),
        "complete.json",
    )
SIGNED_DAMAGE = {  # with checksums that fit
    "a copy": (copy_step_2, "it is a copy of step 2"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "it has no weights"),
    "not finite": (
        lambda p: edit_weights(p, lambda t: t[NORM].fill_(math.nan)),
        f"{NORM} has values that are not finite",
    ),
    "no optimizer state": (
        lambda p: (p / "optimizer.tensors").unlink(),
        "complete.json lacks optimizer.tensors",
    ),
    "a missing shard": (
        lambda p: (p / "optimizer.tensors").rename(p / "optimizer-00001-of-00002.tensors"),
        "not the complete set of optimizer shards",
    ),
    "unequal shards": (unequal_shards, "the shards of the optimizer state do not belong together"),
    "noise": (
        lambda p: (p / "optimizer.tensors").write_bytes(b"noise" * 99),
        "optimizer.tensors is damaged",
    ),
    "negative log size": (
        lambda p: edit_json(p / "trainer.json", log_sizes={"metrics.jsonl": -1}),
        "trainer.json: log_sizes",
    ),
}
for text in ("[]", "3", "null", "{}", '{"step": 4}', "[" * 100_000, "{" * 100):
    SIGNED_DAMAGE[f"state {text[:9]}"] = (
        lambda p, text=text: (p / "trainer.json").write_text(text),
        "trainer.json",
    )
for step in ("4", -4, 4.0, True, None, [4]):
    SIGNED_DAMAGE[f"step {step!r}"] = (
        lambda p, step=step: edit_json(p / "trainer.json", step=step),
        "trainer.json: step",
    )


# Catches: sizes instead of checksums; complete.json assumed to be an object; the step not compared
# with the directory's name.
@pytest.mark.parametrize("kind", [*DAMAGE, *SIGNED_DAMAGE])
def test_a_damaged_checkpoint_is_skipped_with_one_line(kind, finished_run, tmp_path, capsys):
    checkpoints = shutil.copytree(finished_run / "checkpoints", tmp_path / "checkpoints")
    damage, reason = (DAMAGE | SIGNED_DAMAGE)[kind]
    damage(checkpoints / "step-000004")
    if kind in SIGNED_DAMAGE:
        add_checksums(checkpoints / "step-000004")
    path, state, _ = checkpoint.newest_good(checkpoints)
    assert (path, state.step) == (checkpoints / "step-000002", 2)
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"skipping {checkpoints}/step-000004: ")
    assert reason in line


def test_a_run_goes_back_to_the_newest_good_checkpoint(finished, capsys):
    # Catches: counting the damaged newer checkpoint among those to keep.
    directory, arguments = finished
    one = [*arguments, "training.keep_checkpoints=1", "training.ckpt_save_interval=1"]
    weights = directory / "checkpoints/step-000004/model.safetensors"
    os.truncate(weights, 1000)
    assert train.main([*one, "training.max_steps=3"]) == 0
    assert f"resuming from {directory}/checkpoints/step-000002" in capsys.readouterr().out
    assert [r["step"] for r in records(directory)] == [1, 2, 3]
    assert saved(directory) == ["step-000003", "step-000004"]
    assert train.main([*one, "training.max_steps=4"]) == 0  # takes the place of the damaged one
    assert saved(directory) == ["step-000004"]
    checkpoint.read_checkpoint(directory / "checkpoints/step-000004")
    os.truncate(weights, 1000)
    assert train.main(arguments) == 2
    assert "every checkpoint" in capsys.readouterr().err
    shutil.rmtree(directory / "checkpoints/step-000004")
    assert train.main([*arguments, "training.max_steps=1"]) == 0  # from the beginning
    assert saved(directory) == ["step-000001"]


def test_room_is_checked_before_writing(finished, monkeypatch, capsys):
    _, arguments = finished
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda path: usage._replace(free=10_000))
    assert train.main(arguments) == 1
    error = capsys.readouterr().err
    assert "the checkpoint of step 6 could not be written" in error
    assert "not enough disk space: 0.06 GB needed, 0.00 GB free" in error


def test_partial_checkpoints_are_removed_and_nothing_else(finished, tmp_path):
    # Catches: rmtree for a file; a link followed to its target; int() of any name.
    directory, arguments = finished
    inside = directory / "checkpoints"
    (inside / ".partial-000005").mkdir()
    (inside / ".partial-000006").mkdir()
    (inside / ".partial-file").write_text("")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/precious").write_text("")
    (inside / ".partial-link").symlink_to(tmp_path / "elsewhere")
    (inside / ".partial-nowhere").symlink_to(tmp_path / "nowhere")
    (inside / "step-zzz").mkdir()
    (inside / "step-000005").write_text("")
    (inside / "step-000006").symlink_to(tmp_path / "elsewhere")
    assert train.main(arguments) == 0
    assert saved(directory) == ["step-000004", "step-000005", "step-000006", "step-zzz"]
    assert (tmp_path / "elsewhere/precious").exists()
    checkpoint.read_checkpoint(inside / "step-000006")


def test_checkpoints_are_ordered_by_number(tmp_path):
    good = ["step-000003", "step-000020", "step-999999", "step-1000000"]
    for name in [*reversed(good), "step-zzz", "step-", "step-3", "step-٠٠٠٠٠٧"]:
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.checkpoints(tmp_path)] == good


def test_a_checkpoint_is_a_model_directory_without_code(finished_run):
    # Catches: the optimizer state in a file that vLLM takes for weights; a pickle.
    path = finished_run / "checkpoints/step-000004"
    assert [file.name for file in path.glob("*.safetensors")] == ["model.safetensors"]
    sums = json.loads((path / "complete.json").read_text())
    assert {file.name for file in path.iterdir()} == {*sums, "complete.json"}
    assert all(int(sums[name], 16) == zlib.crc32((path / name).read_bytes()) for name in sums)
    pickles = (b"PK", b"\x80\x02", b"\x80\x04")
    assert not [file for file in path.iterdir() if file.read_bytes()[:2] in pickles]


def test_logs_that_lost_their_end_are_cut_to_whole_lines(finished, capsys):
    directory, arguments = finished
    log = directory / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    (directory / "samples.jsonl").unlink()
    assert train.main(arguments) == 0
    assert [r["step"] for r in records(directory)] == [1, 2, 5, 6]
    log.write_bytes(b"\0" * 50 + b"\n")
    assert train.main(arguments) == 2
    assert f"{log}, line 1, is not valid JSON" in capsys.readouterr().err


# ---------------------------------------------------------------- what may be resumed


def test_two_runs_cannot_share_a_directory(finished, base_model, tmp_path, capsys):
    # Catches: a lock on a file in the directory, which could be removed.
    directory, arguments = finished
    lock = run.OutputLock(directory)
    assert train.main(arguments) == 2
    (tmp_path / "files").mkdir()
    for path in directory.iterdir():
        path.rename(tmp_path / "files" / path.name)
    assert train.main(command(directory, base_model)) == 2
    for path in (tmp_path / "files").iterdir():
        path.rename(directory / path.name)
    assert capsys.readouterr().err.count("in use by another run") == 2
    lock.release()
    assert train.main(arguments) == 0


def test_the_weights_are_those_of_the_checkpoint_whatever_model_is_named(finished, capsys):
    directory, arguments = finished
    before = (directory / "checkpoints/step-000004/model.safetensors").read_bytes()
    assert train.main([*arguments, "model.path=elsewhere", "training.max_steps=4"]) == 0
    assert "to 'elsewhere', but the weights are those of the checkpoint" in capsys.readouterr().out
    assert (directory / "checkpoints/step-000004/model.safetensors").read_bytes() == before


def test_a_run_without_a_checkpoint_starts_over_from_its_own_model(finished, tmp_path, capsys):
    # Catches: the model of --config.
    directory, _ = finished
    before = (directory / "metrics.jsonl").read_text()
    shutil.rmtree(directory / "checkpoints")
    other = tmp_path / "other.yaml"
    other.write_text(f"extends: {ROOT}/config_tiny.yaml\nmodel: {{path: absent}}\n")
    arguments = ["--config", str(other), "--resume", f"output_dir={directory}"]
    assert train.main([*arguments, "model.path=elsewhere"]) == 2
    assert "model.path=elsewhere does not exist" in capsys.readouterr().err
    assert train.main(arguments) == 0
    assert "no checkpoint yet: starting over" in capsys.readouterr().out
    assert (directory / "metrics.jsonl").read_text() == before


def test_a_run_in_which_nothing_was_trained_starts_over_by_itself(base_model, tmp_path, capsys):
    # Catches: "holds a run" after a Ctrl-C in the first evaluation; the old config used.
    with planted(lambda reward: os.kill(os.getpid(), signal.SIGINT) or reward, TRIED + 1):
        assert train.main(command(tmp_path / "run", base_model)) == 130
    assert (tmp_path / "run/config.yaml").exists()
    assert train.main(command(tmp_path / "run", base_model, "training.max_steps=1")) == 0
    assert "holds a run without a training step: starting over" in capsys.readouterr().out
    assert [record["step"] for record in records(tmp_path / "run")] == [1]
    assert "max_steps: 1" in (tmp_path / "run/config.yaml").read_text()


def test_the_logs_of_a_trained_run_are_kept_even_if_its_checkpoints_are_gone(finished, capsys):
    # Catches: every run without a checkpoint started over.
    directory, arguments = finished
    shutil.rmtree(directory / "checkpoints")
    before = (directory / "metrics.jsonl").read_text()
    assert train.main([argument for argument in arguments if argument != "--resume"]) == 2
    assert "holds a run; add --resume" in capsys.readouterr().err
    assert (directory / "metrics.jsonl").read_text() == before


def test_a_finished_run_says_what_to_raise(finished, capsys):
    # Catches: a second final evaluation; config.yaml rewritten.
    directory, arguments = finished
    assert train.main([*arguments, "training.max_steps=4"]) == 0  # evaluates if it has not yet
    before = {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert train.main([*arguments, "training.max_steps=4", "training.temperature=0.5"]) == 0
    out = capsys.readouterr().out
    assert f"{directory} is finished; to train on, raise training.max_steps=4\n" in out
    assert {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()} == before


def test_a_run_is_never_overwritten(finished, base_model, capsys):
    directory, _ = finished
    assert train.main(command(directory, base_model)) == 2
    assert "add --resume to continue it" in capsys.readouterr().err
    assert train.main([*command(directory / "elsewhere", base_model), "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"output_dir={directory}/elsewhere of {ROOT}/config_tiny.yaml holds no run" in error
    assert "--config" in error
    assert not (directory / "elsewhere").exists()


@pytest.mark.parametrize(
    "change",
    ["data.max_number=9", "training.seed=2", "training.batch_size=16", "task=countdown_task"],
)
def test_a_change_that_makes_it_another_run_is_refused(change, finished, capsys):
    directory, arguments = finished
    for _ in ("from a checkpoint", "from the beginning"):
        assert train.main([*arguments, change]) == 2
        assert change.split("=")[0] in capsys.readouterr().err
        shutil.rmtree(directory / "checkpoints", ignore_errors=True)


def test_a_resumed_run_uses_its_own_config(finished, tmp_path, capsys):
    # Catches: the file of --config taken for the run's; output_dir kept although the run was moved.
    directory, _ = finished
    other = tmp_path / "other.yaml"
    other.write_text(
        f"extends: {ROOT}/config_tiny.yaml\noutput_dir: {directory}\ntask: countdown_task\n"
    )
    assert train.main(["--resume", "--config", str(other), "training.max_steps=5"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note")]
    assert [note.split()[1] for note in notes] == ["output_dir", "training.max_steps"]
    assert [r["step"] for r in records(directory)] == [1, 2, 3, 4, 5]
    assert f"output_dir: {directory}" in (directory / "config.yaml").read_text()


def test_the_warm_up_continues_in_a_resumed_run(finished):
    # Catches: warmup_steps counted from the step of the resume.
    directory, arguments = finished
    assert train.main([*arguments, "training.warmup_steps=5"]) == 0
    rates = [record["learning_rate"] for record in records(directory)]
    assert rates == pytest.approx([3e-4 * share for share in (1 / 3, 2 / 3, 1, 1, 1, 1)])


@pytest.mark.parametrize("name", ["file", "file/run"])
def test_an_output_directory_that_cannot_be_made_is_named(name, base_model, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main(command(tmp_path / name, base_model)) == 2
    message = f"error: output_dir={tmp_path / name} cannot be made or opened ("
    assert capsys.readouterr().err.startswith(message)


def test_a_directory_without_permission_is_named(base_model, tmp_path, monkeypatch, capsys):
    # Catches: only FileExistsError caught. Simulated, because root may write everywhere.
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", "x")

    monkeypatch.setattr(os, "mkdir", refuse)
    assert train.main(command(tmp_path / "run", base_model)) == 2
    message = f"error: output_dir={tmp_path}/run cannot be made or opened (Permission denied)"
    assert capsys.readouterr().err.startswith(message)


def test_a_run_beyond_max_steps_is_refused_before_anything_changes(finished, capsys):
    directory, arguments = finished
    before = (directory / "config.yaml").read_bytes()
    assert train.main([*arguments, "training.max_steps=3"]) == 2
    message = "error: the run is at step 4, beyond training.max_steps=3; raise it\n"
    assert capsys.readouterr().err == message
    assert (directory / "config.yaml").read_bytes() == before
    assert len(records(directory)) == 4


def test_less_memory_gives_the_same_answers(finished_run, base_model, tmp_path, monkeypatch):
    # Catches: random numbers that belong to the slot instead of the answer.
    make_plan, count_slots, slots = run.make_plan, generate.count_slots, []

    def small_plan(*args, **kwargs):
        return replace(make_plan(*args, **kwargs), cache_bytes=3 * 128 * (24 + 24))

    def recorded_count(*args, **kwargs):
        slots.append(count_slots(*args, **kwargs))
        return slots[-1]

    monkeypatch.setattr(run, "make_plan", small_plan)
    monkeypatch.setattr(generate, "count_slots", recorded_count)
    assert train.main(command(tmp_path / "run", base_model, "training.max_steps=2")) == 0
    ours = (tmp_path / "run/samples.jsonl").read_text().splitlines()
    theirs = (finished_run / "samples.jsonl").read_text().splitlines()[: len(ours)]
    assert [json.loads(a)["text"] for a in ours] == [json.loads(b)["text"] for b in theirs]
    assert slots[1:3] == [3, 3]


# ---------------------------------------------------------------- the machine and the console


def test_a_stream_that_is_not_utf_8_shows_escapes(base_model, tmp_path, monkeypatch):
    # Catches: a fault at the first Δ.
    stream = io.TextIOWrapper(io.BytesIO(), encoding="latin-1")
    monkeypatch.setattr(sys, "stdout", stream)
    assert train.main(command(tmp_path / "run", base_model, "training.max_steps=1")) == 0
    stream.flush()
    assert b"\\u0394logp" in stream.buffer.getvalue()


def test_a_world_size_that_is_left_over_is_ignored(base_model, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("RANK", raising=False)
    assert train.main(command(tmp_path / "run", base_model, "training.max_steps=1")) == 0


def test_a_file_system_without_locks_is_reported(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    run.OutputLock(tmp_path).release()
    assert f"{tmp_path} cannot be locked (No locks available)" in capsys.readouterr().out


def test_a_model_that_gets_worse_is_noticed_and_the_best_checkpoint_named(
    base_model, tmp_path, monkeypatch, capsys
):
    # Catches: the intervals swapped; the last checkpoint called the best.
    answers, plain = iter([60, 80, 10]), train.rollout

    def rollout(*args, num_answers, **kwargs):
        episodes = plain(*args, num_answers=num_answers, **kwargs)
        if num_answers > 1:
            return episodes
        good = next(answers)
        rewards = [Reward(1.0, {"answer": float(e.question_id < good)}) for e in episodes]
        return [replace(e, reward=r) for e, r in zip(episodes, rewards, strict=True)]

    monkeypatch.setattr(train, "rollout", rollout)
    settings = ["data.test_size=100", "training.eval_interval=2", "training.max_steps=4"]
    assert train.main(command(tmp_path / "run", base_model, *settings)) == 0
    output = capsys.readouterr().out
    assert output.count("warning: that is less than after step 0") == 1
    last = output.splitlines()[-1]
    assert last.startswith(f"{tmp_path}/run/checkpoints/step-000002 did best: 80.0%")


# ---------------------------------------------------------------- values that are not finite


def run_with(base_model, directory, *overrides) -> tuple[int, list[dict]]:
    code = train.main(command(directory, base_model, "training.max_steps=4", *overrides))
    weights = load_file(directory / "checkpoints" / saved(directory)[-1] / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())
    return code, records(directory)


def nan_reward(reward: Reward) -> Reward:
    return Reward(math.nan, reward.parts)


def test_a_nan_reward_skips_the_step_and_names_the_question(base_model, tmp_path):
    with planted(nan_reward, reward_call(step=2)):
        code, steps = run_with(base_model, tmp_path / "run")
    assert code == 0
    assert steps[1]["skipped"] == "a reward or a sampled log-probability is not finite"
    assert steps[1]["skipped_questions"] == [2]
    assert all("not finite" not in s.get("skipped", "") for s in (steps[0], *steps[2:]))


def test_a_nan_logit_skips_the_step(base_model, tmp_path, monkeypatch):
    def spoil(logits):
        logits[0, 3] = math.nan
        return logits

    plain = Planted(Transformer.logits, spoil, [40])

    def logits(self, *args, **kwargs):
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Transformer, "logits", logits)
    code, steps = run_with(base_model, tmp_path / "run")
    assert code == 0
    assert sum("not finite" in s.get("skipped", "") for s in steps) == 1


def test_too_many_skipped_steps_in_a_row_end_the_run(base_model, tmp_path, monkeypatch, capsys):
    plain = train.AdamW

    def with_hook(params, **kwargs):
        params = list(params)
        params[3].register_hook(lambda grad: grad * math.nan)
        return plain(params, **kwargs)

    monkeypatch.setattr(train, "AdamW", with_hook)
    code, steps = run_with(base_model, tmp_path / "run")
    assert code == 1
    assert len(steps) == 2  # training.max_skipped_steps
    for step in steps:
        assert step["skipped"] == "the loss or the gradient is not finite"
        assert step["skipped_questions"]
    error = capsys.readouterr().err
    assert "2 steps in a row were skipped" in error
    assert "step-000002 is saved" in error


# Catches: weights checked only when they are saved; the step counted before they are checked.
@pytest.mark.parametrize("interval", [1, 100])
def test_weights_that_are_not_finite_are_never_saved(
    interval, base_model, tmp_path, monkeypatch, capsys
):
    def spoil(stats):
        optimizers[0].params[2].data[0] = math.inf
        return stats

    def remember(*args, **kwargs):
        optimizers.append(plain(*args, **kwargs))
        return optimizers[0]

    plain, optimizers = train.AdamW, []
    arguments = command(tmp_path / "run", base_model, f"training.ckpt_save_interval={interval}")
    with monkeypatch.context() as patch:
        patch.setattr(train, "AdamW", remember)
        patch.setattr(train, "update_policy", Planted(train.update_policy, spoil, [3]))
        assert train.main(arguments) == 1
    error = capsys.readouterr().err
    assert "step 3 made weights that are not finite" in error
    assert "lower training.learning_rate" in error
    if interval == 1:
        assert saved(tmp_path / "run") == ["step-000001", "step-000002"]
        assert "step-000002 is saved" in error
        assert train.main([*arguments, "--resume"]) == 0
    else:
        assert "the steps after 0 are lost" in error
        assert "is saved" not in error
        assert not (tmp_path / "run/checkpoints").exists()


def test_no_checkpoint_is_removed_after_a_skipped_step(base_model, tmp_path):
    # Catches: `keep` that ignores skipped_in_a_row.
    settings = ["training.keep_checkpoints=1", "training.ckpt_save_interval=1"]
    arguments = command(tmp_path / "run", base_model, *settings)
    with planted(nan_reward, reward_call(step=3)):
        assert train.main([*arguments, "training.max_steps=3"]) == 0
    assert saved(tmp_path / "run") == ["step-000002", "step-000003"]
    assert train.main([*arguments, "training.max_steps=4", "--resume"]) == 0
    assert saved(tmp_path / "run") == ["step-000004"]


# ---------------------------------------------------------------- what is written about a run


def test_docs_explain_every_number_of_a_run(finished_run):
    text = (ROOT / "docs/metrics.md").read_text()
    logs = [(finished_run / name).read_text() for name in ("metrics.jsonl", "timings.jsonl")]
    names = {name for log in logs for line in log.splitlines() for name in json.loads(line)}
    assert len(names) > 35
    names -= {"step"}
    assert not {name for name in names if f"| `{name}`" not in text and f", `{name}`" not in text}


# ---------------------------------------------------------------- damaged or missing input

MODEL_DAMAGE = {
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "model.safetensors"),
    "truncated weights": (
        lambda p: os.truncate(p / "model.safetensors", 3000),
        "model.safetensors",
    ),
    "missing tensor": (lambda p: edit_weights(p, lambda t: t.pop(NORM)), NORM),
    "wrong shape": (lambda p: edit_weights(p, lambda t: t.update({NORM: torch.zeros(3)})), NORM),
    "missing shard": (
        lambda p: (p / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}'
        ),
        "model-2.safetensors",
    ),
    "no config": (lambda p: (p / "config.json").unlink(), "config.json"),
    "truncated config": (lambda p: os.truncate(p / "config.json", 40), "config.json"),
    "other model": (lambda p: edit_json(p / "config.json", model_type="llama"), "model_type"),
    "larger vocabulary": (
        lambda p: edit_json(p / "config.json", vocab_size=9999),
        "embed_tokens",
    ),
    "no tokenizer": (lambda p: (p / "tokenizer.json").unlink(), "tokenizer.json"),
    "truncated tokenizer": (lambda p: os.truncate(p / "tokenizer.json", 100), "tokenizer.json"),
    "hostile template": (
        lambda p: edit_json(
            p / "tokenizer_config.json", chat_template="{{ ''.__class__.__mro__ }}"
        ),
        "template",
    ),
    "unknown stop id": (
        lambda p: edit_json(p / "generation_config.json", eos_token_id=[99999]),
        "stop ids",
    ),
}


@pytest.mark.parametrize("kind", MODEL_DAMAGE)
def test_a_damaged_model_is_a_one_line_error_and_leaves_nothing_behind(
    kind, base_model, tmp_path, capsys
):
    damage, name = MODEL_DAMAGE[kind]
    model = shutil.copytree(base_model, tmp_path / "model")
    damage(model)
    assert train.main(command(tmp_path / "run", model)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert name in error
    assert str(model) in error
    assert not (tmp_path / "run").exists()


DATA_DAMAGE = {
    "not there": (None, "does not exist"),
    "empty": ("", "no rows"),
    "not JSON": ('{"nums": [1, 2], "target": 3}\n{"nums": [1', "line 2"),
    "other keys": ('{"numbers": [1, 2], "goal": 3}', "nums"),
    "floats": ('{"nums": [1.5, 2], "target": 3}', "line 1"),
    "too few": ('{"nums": [1, 2], "target": 3}', "data.test_size"),
}


@pytest.mark.parametrize("kind", DATA_DAMAGE)
def test_a_damaged_data_set_is_an_error_without_a_traceback(kind, base_model, tmp_path, capsys):
    text, reason = DATA_DAMAGE[kind]
    path = tmp_path / "data.jsonl"
    if text is not None:
        path.write_text(text)
    assert train.main(command(tmp_path / "run", base_model, f"data.path={path}")) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert "Traceback" not in error
    assert reason in error
    assert str(path) in error
    assert not (tmp_path / "run").exists()


# Catches: an error for the first missing thing only; a remedy for something that is not missing.
def test_everything_missing_is_named_with_its_remedy(tmp_path, monkeypatch, capsys):
    (tmp_path / "run").mkdir()
    data = f"data.path={tmp_path / 'Countdown-Tasks-3to4'}"
    arguments = command(tmp_path / "run", tmp_path / "Qwen2.5-3B-Instruct", data)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train.main([*arguments, "model.device=cuda"]) == 2
    error = capsys.readouterr().err
    assert "model.device=cuda, but" in error
    assert "uv run train.py --config config_tiny.yaml" in error
    model = f"Qwen/Qwen2.5-3B-Instruct --local-dir {tmp_path}/Qwen2.5-3B-Instruct"
    assert f"hf download {model}" in error
    assert "hf download Jiayi-Pan/Countdown-Tasks-3to4" in error
    assert list((tmp_path / "run").iterdir()) == []  # existed before, so it stays
    others = [f"model.path={tmp_path}/none", f"data.path={tmp_path}/foo.jsonl"]
    assert train.main([*arguments, *others]) == 2
    error = capsys.readouterr().err
    assert f"model.path={tmp_path}/none does not exist" in error
    assert f"{tmp_path}/foo.jsonl does not exist" in error
    assert "hf download" not in error
    assert "config_tiny.yaml" not in error


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        ({"prompt_token_ids": [1]}, 2, "made for another prompt or tokenizer; remove it and make"),
        ({"problem": {}}, 2, "made for another prompt or tokenizer"),
        ({"task": "sums"}, 0, "made for task=sums and has learned nothing about tests.letters_ta"),
        ({}, 0, ""),
    ],
    ids=["prompt", "problem", "task", "neither"],
)
def test_a_model_made_for_something_else_is_noticed(
    change, code, message, base_model, tmp_path, capsys
):
    # Catches: `== made_for["prompt_token_ids"]` -> `!= …`; the two messages swapped.
    model = shutil.copytree(base_model, tmp_path / "model")
    problem = {"numbers": [3, 5, 7], "target": 22}
    tokenizer = Tokenizer.from_pretrained(model)
    ids = tokenizer.encode(letters_task.render_prompt(problem, tokenizer))
    made_for = {"task": "tests.letters_task", "problem": problem, "prompt_token_ids": ids}
    (model / "made_for.json").write_text(json.dumps(made_for | change))
    assert train.main(command(tmp_path / "run", model, "training.max_steps=1")) == code
    output = "".join(capsys.readouterr())
    assert message in output
    assert message or "made for" not in output


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("config", "gib"), [("config.yaml", 42.5), ("config_24GB.yaml", 22.5), ("config_16GB.yaml", 14)]
)
def test_the_shipped_plans_fit_their_cards_and_recompute_nothing(config, gib, capsys):
    command = ["--config", str(ROOT / config), "--plan", f"model.memory_gib={gib}"]
    assert train.main(command) == 0
    output = capsys.readouterr().out
    totals = next(line.split()[1:] for line in output.splitlines() if line.startswith("total"))
    assert all(float(total) <= gib for total in totals)
    assert "activations, 0 of" in output


def test_a_plan_takes_the_number_of_cards_and_overrides(capsys):
    # Catches: an override after --plan taken for the number of cards.
    command = ["--config", str(ROOT / "config.yaml"), "--plan"]
    tables = []
    for arguments in (["2"], ["2", "training.max_gen_len=512"], ["training.max_gen_len=512"]):
        assert train.main([*command, *arguments]) == 0
        tables.append(capsys.readouterr().out)
    assert len(set(tables)) == 3
    for cards in ("0", "-1", "two"):
        assert train.main([*command[:2], f"--plan={cards}"]) == 2
        assert "wanted the number of GPUs" in capsys.readouterr().err
