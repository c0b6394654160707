"""Finding a task by name, and surviving its reward function."""

import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import countdown_task
from data_types import Question, Reward
from harness.tasks import guard_reward, load_problems, load_task, make_question

PROBLEM = {"numbers": [3, 5, 7], "target": 22}

# ---------------------------------------------------------------- load_task


def test_a_task_is_found_by_name():
    assert load_task("countdown_task") is countdown_task


def write_module(directory, name: str, text: str) -> None:
    path = directory.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


COMPLETE = "".join(
    f"def {f}(*args, **kwargs): ...\n"
    for f in ("load_problems", "render_prompt", "reward_function")
)


def test_a_task_may_lie_in_a_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write_module(tmp_path, "package_of_tasks.inner.some_task", COMPLETE)
    assert (
        load_task("package_of_tasks.inner.some_task").__name__ == "package_of_tasks.inner.some_task"
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("no_such_task", ["task='no_such_task'", "without the .py"]),
        ("countdown_task.py", ["task='countdown_task.py'", "without the .py"]),
        (
            "tests/countdown_task",
            ["task='tests/countdown_task'", "not a module name", "countdown_task.py"],
        ),
        ("countdown-task", ["task='countdown-task'", "not a module name"]),
        ("", ["task=''", "not a module name"]),
        (".countdown_task", ["not a module name"]),
        ("countdown_task.", ["not a module name"]),
        ("a task", ["not a module name"]),
        ("os.path", ["task='os.path' lacks load_problems"]),
        ("../countdown_task", ["not a module name"]),
        ("json.tool.x", ["task='json.tool.x'"]),
        ("train", ["task='train' lacks load_problems"]),
        ("json", ["task='json'", "load_problems, render_prompt, reward_function", "tasks.py"]),
    ],
)
def test_a_task_that_is_none_is_refused(name, wanted):
    with pytest.raises(ValueError, match="task=") as caught:
        load_task(name)
    assert [part for part in wanted if part not in str(caught.value)] == []


@pytest.mark.parametrize("function", ["load_problems", "render_prompt", "reward_function"])
def test_what_a_task_lacks_is_named(tmp_path, monkeypatch, function):
    monkeypatch.syspath_prepend(tmp_path)
    write_module(tmp_path, f"task_lacking_{function}", COMPLETE.replace(function, "other"))
    write_module(tmp_path, f"task_shadowing_{function}", COMPLETE + f"{function} = 3\n")
    for kind in ("lacking", "shadowing"):
        with pytest.raises(ValueError, match=rf"task='task_{kind}_{function}' lacks {function};"):
            load_task(f"task_{kind}_{function}")


def test_what_a_task_cannot_import_is_named(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write_module(
        tmp_path, "task_with_a_dependency", "import a_package_that_is_not_installed\n" + COMPLETE
    )
    with pytest.raises(
        ValueError, match=r"task='task_with_a_dependency'.*a_package_that_is_not_installed"
    ):
        load_task("task_with_a_dependency")


# Catches: "it must be a Python file in this directory" for whatever goes wrong in an import.
@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        (
            "missing",
            "import a_package_that_is_not_installed",
            "No module named 'a_package_that_is_not_installed'",
        ),
        ("absent", "from json import no_such_name", "cannot import name 'no_such_name'"),
        ("unwritten", "def f(:", "SyntaxError"),
        ("undefined", "print(no_such_name)", "NameError"),
        ("leaving", "raise SystemExit(0)", "SystemExit"),
    ],
)
def test_a_task_that_is_there_and_fails_is_told_where(tmp_path, monkeypatch, name, line, reason):
    monkeypatch.syspath_prepend(tmp_path)
    write_module(tmp_path, f"task_{name}", f"import math\n{line}\n{COMPLETE}")
    with pytest.raises(ValueError, match=f"task='task_{name}'") as caught:
        load_task(f"task_{name}")
    assert reason in str(caught.value)
    assert f"({tmp_path}/task_{name}.py:2)" in str(caught.value)
    assert "in this directory" not in str(caught.value)


def one_key(response, key):
    return Reward(1.0, {})


@pytest.mark.parametrize(
    ("train", "test", "reward_function", "wanted"),
    [
        ([], [{"key": 1}], one_key, ["leaves no training problems"]),
        ([{"key": 1}], [], one_key, ["leaves no held-out problems"]),
        (
            [{"key": 1, "response": "x"}],
            [{"key": 1}],
            one_key,
            ["'response': 'x'", "multiple values for argument 'response'"],
        ),
        ([{"key": 1}], [{"other": 1}], one_key, ["held-out problem {'other': 1}", "'key'"]),
        ([{3: 1}], [{"key": 1}], one_key, ["training problem {3: 1}", "must be strings"]),
        (["key"], [{"key": 1}], one_key, ["training problem 'key'", "mapping"]),
    ],
)
def test_problems_that_cannot_be_used_are_named_at_the_start(train, test, reward_function, wanted):
    task = SimpleNamespace(
        __name__="some_task",
        load_problems=lambda data: (train, test),
        reward_function=reward_function,
    )
    with pytest.raises(ValueError, match="task='some_task'") as caught:
        load_problems(task, None)
    assert [part for part in wanted if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    "found",
    [None, 3, ([{"key": 1}],), ([{"key": 1}], iter([{"key": 1}]))],
    ids=["nothing", "a number", "one", "an iterator"],
)
def test_problems_that_are_not_two_sequences_are_named(found):
    task = SimpleNamespace(
        __name__="some_task", load_problems=lambda data: found, reward_function=one_key
    )
    with pytest.raises(
        ValueError, match=r"task='some_task': load_problems returned .*; wanted two lists"
    ):
        load_problems(task, None)


@pytest.mark.parametrize("line", ["Data = 3", "class Data: pass"])
def test_keys_that_pydantic_does_not_know_are_named(line, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    name = f"task_with_data_of_{len(line)}"
    write_module(tmp_path, name, COMPLETE + line)
    with pytest.raises(ValueError, match=f"task='{name}': its Data must be a pydantic BaseModel"):
        load_task(name)


def test_any_key_will_do_that_the_reward_function_takes():
    def reward_function(response, /, **problem):
        return Reward(float(problem == expected), {})

    expected = {"response": 1, "self": 2, "problem": 3, "timeout": 4, "args": 5}
    both = [expected], [expected]
    task = SimpleNamespace(
        __name__="some_task", load_problems=lambda data: both, reward_function=reward_function
    )
    assert load_problems(task, None) == both
    assert guard_reward(reward_function, timeout=5.0, errors="stop")(
        "an answer", **expected
    ) == Reward(1.0, {})


def test_a_question_is_what_the_task_renders():
    task = SimpleNamespace(
        render_prompt=lambda problem, tokenizer: f"{tokenizer.name}: {problem['target']}?"
    )
    tokenizer = SimpleNamespace(name="words", encode=lambda text: [len(text), 7])
    assert make_question(task, PROBLEM, tokenizer) == Question("words: 22?", [10, 7], PROBLEM)


# ---------------------------------------------------------------- guard_reward


def raises(response, **problem):
    return Reward(1 / 0, {})


FOR_EVER = 5.0  # seconds: what hangs gives up at last, lest a broken guard hang the tests


def sleeps(response, **problem):
    time.sleep(FOR_EVER)
    return Reward(1.0, {})


def loops(response, **problem):
    end = time.monotonic() + FOR_EVER
    while time.monotonic() < end:
        pass
    return Reward(1.0, {})


def loops_and_swallows(response, **problem):
    end = time.monotonic() + FOR_EVER
    while time.monotonic() < end:
        try:
            loops(response)
        except Exception:
            continue
    return Reward(1.0, {})


def sleeps_and_swallows(response, **problem):
    try:
        time.sleep(FOR_EVER)
    except Exception:
        return Reward(1.0, {})


def matches_for_ever(response, **problem):
    import re

    return Reward(float(bool(re.match("(a|a)*b", "a" * 60))), {})


def recurses(response, **problem):
    return recurses(response, **problem)


def returns_a_number(response, **problem):
    return 1.0


def returns_nothing(response, **problem):
    pass


def returns_a_text_as_total(response, **problem):
    return Reward("1.0", {})


def takes_other_keywords(response, question):
    return Reward(1.0, {})


def loops_and_swallows_all(response, **problem):
    end = time.monotonic() + FOR_EVER
    while time.monotonic() < end:
        try:
            loops(response)
        except BaseException:
            continue
    return Reward(1.0, {})


def blocks_signals(response, **problem):
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP})
    return sleeps(response)


def sums_in_c(response, **problem):
    return Reward(float(sum(range(10**9)) > 0), {})


def stops_its_process(response, **problem):
    os.kill(os.getpid(), signal.SIGSTOP)


def exits(response, **problem):
    sys.exit(0)


def exits_at_once(response, **problem):
    os._exit(0)


def asks_to_stop(response, **problem):
    raise KeyboardInterrupt


def is_killed(response, **problem):
    os.kill(os.getpid(), signal.SIGKILL)


def kills_its_group(response, **problem):
    os.killpg(0, signal.SIGKILL)


def eats_memory(response, **problem):
    return Reward(
        float(len([bytes(10**9) for _ in range(6)])), {}
    )  # of zeros, which the kernel does not lay out


def returns_too_much(response, **problem):
    return Reward(1e300, {})


def returns_a_part_too_much(response, **problem):
    return Reward(1.0, {"answer": -1e7})


def returns_a_huge_integer(response, **problem):
    return Reward(10**400, {})


def returns_no_text_as_a_parts_name(response, **problem):
    return Reward(1.0, {("answer",): 1.0})


def returns_an_escape_as_a_parts_name(response, **problem):
    return Reward(1.0, {"\x1b[2J": 1.0})


def returns_half_a_character_as_a_parts_name(response, **problem):
    return Reward(1.0, {"\ud800": 1.0})


def closes_all_files(response, **problem):
    os.closerange(0, 1000)
    return Reward(1.0, {})


def forks_and_hangs(response, **problem):
    os.fork()
    time.sleep(FOR_EVER)


HANGING = [
    sleeps,
    loops,
    loops_and_swallows,
    sleeps_and_swallows,
    matches_for_ever,
    loops_and_swallows_all,
    blocks_signals,
    sums_in_c,
    stops_its_process,
    forks_and_hangs,
]
ENDING = [exits_at_once, is_killed, kills_its_group, closes_all_files]
FAILING = [
    raises,
    recurses,
    returns_a_number,
    returns_nothing,
    returns_a_text_as_total,
    takes_other_keywords,
    exits,
    asks_to_stop,
    eats_memory,
    returns_too_much,
    returns_a_part_too_much,
    returns_a_huge_integer,
    returns_no_text_as_a_parts_name,
    returns_an_escape_as_a_parts_name,
    returns_half_a_character_as_a_parts_name,
    *ENDING,
]


@pytest.mark.parametrize("errors", ["stop", "zero"])
@pytest.mark.parametrize(
    "reward",
    [
        Reward(1.1, {"format": 1.0}),
        Reward(1, {}),
        Reward(-math.inf, {}),
        Reward(math.nan, {"answer": math.nan}),
        Reward(1e6, {}),
    ],
    ids=repr,
)
def test_a_reward_passes_through_untouched(reward, errors, tmp_path):
    def reward_function(response, **problem):
        (tmp_path / "seen").write_text(repr((response, problem)))
        return reward

    returned = guard_reward(reward_function, timeout=5.0, errors=errors)("an answer", **PROBLEM)
    assert [returned.total, *returned.parts.values()] == pytest.approx(
        [reward.total, *reward.parts.values()], rel=0, nan_ok=True
    )
    assert returned.parts.keys() == reward.parts.keys()
    assert (tmp_path / "seen").read_text() == repr(("an answer", PROBLEM))


@pytest.mark.parametrize(
    "number",
    [np.float32(0.5), np.float64(0.5), np.int64(1), np.bool_(True), np.float32(np.nan)],
    ids=repr,
)
def test_a_number_of_numpy_is_a_number(number):
    # Catches: isinstance(number, int | float), which np.float32 is not.
    reward = guard_reward(
        lambda response: Reward(number, {"answer": number}), timeout=5.0, errors="stop"
    )("an answer")
    assert type(reward.total) is type(reward.parts["answer"]) is float
    assert [reward.total, reward.parts["answer"]] == pytest.approx(
        [float(number)] * 2, rel=0, nan_ok=True
    )


# Catches: the worker not killed at the timeout; EOFError of a worker that ends the keeper; Exception for BaseException in _serve.
@pytest.mark.parametrize("reward_function", HANGING + FAILING)
def test_a_failing_reward_counts_zero_where_errors_are_zero(reward_function):
    start = time.perf_counter()
    timeout = 0.1 if reward_function in HANGING else 2.0
    reward = guard_reward(reward_function, timeout=timeout, errors="zero")("an answer", **PROBLEM)
    assert reward == Reward(0.0, {"error": 1.0})
    assert time.perf_counter() - start < 3
    if reward_function in HANGING:
        assert time.perf_counter() - start >= 0.1


@pytest.mark.parametrize("reward_function", HANGING + FAILING)
def test_a_failing_reward_ends_the_run_where_errors_stop_it(reward_function):
    start = time.perf_counter()
    timeout = 0.1 if reward_function in HANGING else 2.0
    with pytest.raises(ValueError, match="the reward function") as caught:
        guard_reward(reward_function, timeout=timeout, errors="stop")("an answer", **PROBLEM)
    assert time.perf_counter() - start < 3
    message = str(caught.value)
    assert str(PROBLEM) in message
    assert "'an answer'" in message
    assert "training.reward_errors=zero" in message
    assert caught.value.__context__ is None
    if reward_function in HANGING:
        assert "took over 0.1 s" in message
    if reward_function in (exits, asks_to_stop):
        assert "raised SystemExit(0)" in message or "raised KeyboardInterrupt()" in message
    if reward_function in ENDING:
        assert "ended its process with code" in message


@pytest.mark.parametrize("reward_function", [sleeps, is_killed, raises])
def test_after_a_failure_the_next_answer_is_scored_as_ever(reward_function):
    # Catches: the pipe of the worker that was killed used on, which gives an answer the reward of another.
    def either(response, **problem):
        return Reward(float(response), {}) if response else reward_function(response)

    guarded = guard_reward(either, timeout=0.5, errors="zero")
    assert [guarded(text, **PROBLEM).total for text in ("3", "", "5", "", "7")] == [
        3.0,
        0.0,
        5.0,
        0.0,
        7.0,
    ]


def test_the_line_that_raised_is_named():
    with pytest.raises(ValueError, match="ZeroDivisionError") as caught:
        guard_reward(raises, timeout=5.0, errors="stop")("an answer", **PROBLEM)
    assert f"{__file__}:{raises.__code__.co_firstlineno + 1}" in str(caught.value)


def test_a_long_answer_does_not_flood_the_message():
    with pytest.raises(ValueError, match="the reward function") as caught:
        guard_reward(raises, timeout=5.0, errors="stop")(
            "x" * 100_000, numbers=[3] * 100_000, target=22
        )
    assert len(str(caught.value)) < 2000


def test_a_problem_that_the_task_changes_is_whole_for_the_next_answer():
    def reward_function(response, numbers, target):
        numbers.append(len(numbers))
        return Reward(float(len(numbers)), {})

    problem = {"numbers": [3, 5, 7], "target": 22}
    guarded = guard_reward(reward_function, timeout=5.0, errors="stop")
    assert [guarded("an answer", **problem).total for _ in range(3)] == [4.0] * 3
    assert problem == {"numbers": [3, 5, 7], "target": 22}


def test_a_problem_that_cannot_be_sent_is_named():
    with pytest.raises(ValueError, match=r"cannot be sent its problem.*pickle") as caught:
        guard_reward(one_key, timeout=5.0, errors="stop")("an answer", key=lambda: 3)
    assert "'an answer'" in str(caught.value)


def test_a_copy_that_the_task_forks_scores_nothing():
    # Catches: the comparison of process ids in _serve; each answer would have its reward twice.
    def reward_function(response, number):
        os.fork()
        return Reward(number, {})

    guarded = guard_reward(reward_function, timeout=5.0, errors="stop")
    assert [guarded("an answer", number=i).total for i in range(20)] == list(range(20))


def test_what_a_task_prints_is_shown_at_once_and_steers_no_terminal(capfd):
    def reward_function(response):
        print(f"scoring\n{response}")
        os._exit(0)

    assert guard_reward(reward_function, timeout=5.0, errors="zero")("\x1b[2Jan answer") == Reward(
        0.0, {"error": 1.0}
    )
    assert capfd.readouterr().out == "scoring\n\\x1b[2Jan answer\n"


# ---------------------------------------------------------------- the process


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def holds(pid: int, path: Path) -> bool:
    return any(
        os.path.realpath(descriptor) == str(path)
        for descriptor in Path(f"/proc/{pid}/fd").iterdir()
    )


def wait_for(condition) -> bool:
    end = time.monotonic() + 10
    while not condition() and time.monotonic() < end:
        time.sleep(0.01)
    return condition()


def start_run(directory: Path, act) -> list[int]:
    """The processes of a run that scores an answer and then waits: its own, the keeper and the worker, which has begun to act."""

    def reward_function(response):
        (directory / "partial").write_text(f"{os.getppid()} {os.getpid()}")
        (directory / "partial").rename(directory / "pids")
        act()
        (directory / "done").touch()
        return Reward(1.0, {})

    run = os.fork()
    if run == 0:
        try:
            os.setsid()
            for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(signum, signal.SIG_DFL)
            lock = os.open(directory, os.O_RDONLY)
            score = guard_reward(reward_function, timeout=100.0, errors="stop", closes=[lock])
            score("an answer")
            time.sleep(100)
        finally:
            os._exit(1)
    assert wait_for((directory / "pids").exists)
    return [run, *map(int, (directory / "pids").read_text().split())]


# Catches: the run's end of the pipe left open in the keeper; the run not waited for beside the worker; setsid left out (SIGKILL
# of the group).
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("act", [lambda: None, lambda: sum(range(10**11))], ids=["idle", "hung"])
def test_the_worker_ends_when_the_run_does(act, end, tmp_path):
    run, *others = start_run(tmp_path, act)
    os.killpg(run, end)
    os.waitpid(run, 0)
    assert wait_for(lambda: not any(map(is_running, others)))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_no_process_ends_by_what_a_terminal_sends_or_keeps_open_what_it_is_told_to_close(tmp_path):
    def act():
        for signum in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
            for pid in (os.getpid(), os.getppid()):
                os.kill(pid, signum)

    run, *others = start_run(tmp_path, act)
    assert wait_for((tmp_path / "done").exists)
    time.sleep(0.05)
    assert all(map(is_running, others))
    assert [holds(pid, tmp_path) for pid in (run, *others)] == [True, False, False]
    os.kill(run, signal.SIGKILL)
    os.waitpid(run, 0)


def test_what_the_task_started_ends_with_its_worker(tmp_path):
    def reward_function(response):
        child = subprocess.Popen(["sleep", "100"])
        (tmp_path / "pid").write_text(str(child.pid))
        return sleeps(response)

    assert guard_reward(reward_function, timeout=0.5, errors="zero")("an answer").parts == {
        "error": 1.0
    }
    pid = int((tmp_path / "pid").read_text())
    assert wait_for(lambda: not is_running(pid))


def test_a_keeper_that_was_killed_is_said():
    guarded = guard_reward(
        lambda response: os.kill(os.getppid(), signal.SIGKILL) or time.sleep(1),
        timeout=0.2,
        errors="zero",
    )
    with pytest.raises(ChildProcessError, match="was killed"):
        guarded("an answer")


# Catches: a close() that does nothing; the pipe held by something that outlives the guard.
@pytest.mark.parametrize("close", [True, False])
def test_the_processes_go_with_the_guard(close):
    guarded = guard_reward(
        lambda response: Reward(1.0, {"own": os.getpid() / 1e5, "keeper": os.getppid() / 1e5}),
        timeout=5.0,
        errors="stop",
    )
    pids = [round(part * 1e5) for part in guarded("an answer").parts.values()]
    assert all(map(is_running, pids))
    if close:
        guarded.close()
    else:
        del guarded
    assert wait_for(lambda: not any(map(is_running, pids)))


def test_each_answer_has_its_own_time():
    guarded = guard_reward(
        lambda response, **problem: time.sleep(0.06) or Reward(1.0, {}), timeout=0.5, errors="stop"
    )
    assert [guarded("an answer", **PROBLEM).total for _ in range(10)] == [1.0] * 10


@pytest.mark.parametrize("reward_function", [sleeps, loops, returns_a_number])
def test_the_reward_functions_own_file_is_named(reward_function):
    with pytest.raises(ValueError, match="the reward function") as caught:
        guard_reward(reward_function, timeout=0.05, errors="stop")("an answer", **PROBLEM)
    assert f"({__file__}:" in str(caught.value)


def test_the_tasks_line_is_named_where_a_library_raises():
    def reward_function(response, **problem):
        return Reward(math.fsum(__import__("fractions").Fraction(c) for c in response), {})

    with pytest.raises(ValueError, match="Invalid literal") as caught:
        guard_reward(reward_function, timeout=5.0, errors="stop")("an answer", **PROBLEM)
    assert f"({__file__}:" in str(caught.value)


@pytest.mark.parametrize("parts", [None, [1.0], {"answer": "yes"}, {"answer": None}])
def test_parts_that_are_no_numbers_are_no_reward(parts):
    guarded = guard_reward(
        lambda response, **problem: Reward(1.0, parts), timeout=5.0, errors="zero"
    )
    assert guarded("an answer", **PROBLEM) == Reward(0.0, {"error": 1.0})
