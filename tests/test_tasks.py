"""Finding a task by name, and surviving its reward function."""

import math
import signal
import time
from types import SimpleNamespace

import pytest

import countdown_task
from data_types import Question, Reward
from harness.tasks import guard_reward, load_task, make_question

PROBLEM = {"numbers": [3, 5, 7], "target": 22}

# ---------------------------------------------------------------- load_task


def test_a_task_is_found_by_name():
    assert load_task("countdown_task") is countdown_task


def write_module(directory, name: str, text: str) -> None:
    path = directory.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


COMPLETE = "".join(f"def {f}(*args, **kwargs): ...\n" for f in ("load_problems", "render_prompt", "reward_function"))


def test_a_task_may_lie_in_a_package(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write_module(tmp_path, "package_of_tasks.inner.some_task", COMPLETE)
    assert load_task("package_of_tasks.inner.some_task").__name__ == "package_of_tasks.inner.some_task"


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("no_such_task", ["task='no_such_task'", "without the .py"]),
        ("countdown_task.py", ["task='countdown_task.py'", "without the .py"]),
        ("tests/countdown_task", ["task='tests/countdown_task'", "not a module name", "countdown_task.py"]),
        ("countdown-task", ["task='countdown-task'", "not a module name"]),
        ("", ["task=''", "not a module name"]),
        (".countdown_task", ["not a module name"]),
        ("countdown_task.", ["not a module name"]),
        ("a task", ["not a module name"]),
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
    write_module(tmp_path, "task_with_a_dependency", "import a_package_that_is_not_installed\n" + COMPLETE)
    with pytest.raises(ValueError, match=r"task='task_with_a_dependency'.*a_package_that_is_not_installed"):
        load_task("task_with_a_dependency")


def test_a_question_is_what_the_task_renders():
    task = SimpleNamespace(render_prompt=lambda problem, tokenizer: f"{tokenizer.name}: {problem['target']}?")
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


HANGING = [sleeps, loops, loops_and_swallows, sleeps_and_swallows, matches_for_ever]
FAILING = [raises, recurses, returns_a_number, returns_nothing, returns_a_text_as_total, takes_other_keywords]


def test_a_reward_passes_through_untouched():
    seen = []

    def reward_function(response, **problem):
        seen.append((response, problem))
        return expected

    for expected in (Reward(1.1, {"format": 1.0}), Reward(1, {}), Reward(-math.inf, {}), Reward(math.nan, {})):
        for errors in ("stop", "zero"):
            assert guard_reward(reward_function, timeout=5.0, errors=errors)("an answer", **PROBLEM) is expected
    assert seen == [("an answer", PROBLEM)] * 8


# Catches: _TimeUp made an Exception; the timer not started; Exception left out of the except.
@pytest.mark.parametrize("reward_function", HANGING + FAILING)
def test_a_failing_reward_counts_zero_where_errors_are_zero(reward_function):
    start = time.perf_counter()
    reward = guard_reward(reward_function, timeout=0.1, errors="zero")("an answer", **PROBLEM)
    assert reward == Reward(0.0, {"error": 1.0})
    assert time.perf_counter() - start < 3
    if reward_function in HANGING:
        assert time.perf_counter() - start >= 0.1


@pytest.mark.parametrize("reward_function", HANGING + FAILING)
def test_a_failing_reward_ends_the_run_where_errors_stop_it(reward_function):
    start = time.perf_counter()
    with pytest.raises(ValueError, match="the reward function") as caught:
        guard_reward(reward_function, timeout=0.1, errors="stop")("an answer", **PROBLEM)
    assert time.perf_counter() - start < 3
    message = str(caught.value)
    assert str(PROBLEM) in message
    assert "'an answer'" in message
    assert "training.reward_errors=zero" in message
    assert caught.value.__suppress_context__
    if reward_function in HANGING:
        assert "took over 0.1 s" in message


def test_the_line_that_raised_is_named():
    with pytest.raises(ValueError, match="ZeroDivisionError") as caught:
        guard_reward(raises, timeout=5.0, errors="stop")("an answer", **PROBLEM)
    assert f"{__file__}:{raises.__code__.co_firstlineno + 1}" in str(caught.value)


def test_a_long_answer_does_not_flood_the_message():
    with pytest.raises(ValueError, match="the reward function") as caught:
        guard_reward(raises, timeout=5.0, errors="stop")("x" * 100_000, numbers=[3] * 100_000, target=22)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_wish_to_stop_is_no_error(stop):
    def reward_function(response, **problem):
        raise stop

    with pytest.raises(stop):
        guard_reward(reward_function, timeout=5.0, errors="zero")("an answer", **PROBLEM)


# Catches: setitimer(…, 0.0) or the restoring of the handler left out of _time_limit.
@pytest.mark.parametrize("reward_function", [raises, sleeps, lambda response, **problem: Reward(1.0, {})])
def test_nothing_of_the_alarm_is_left_behind(reward_function):
    def handler(signum, frame):
        raise AssertionError("an alarm of the guard rang after it had returned")

    previous = signal.signal(signal.SIGALRM, handler)
    try:
        guard_reward(reward_function, timeout=0.05, errors="zero")("an answer", **PROBLEM)
        assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)
        time.sleep(0.06)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, previous)


def test_each_answer_has_its_own_time():
    guarded = guard_reward(lambda response, **problem: time.sleep(0.06) or Reward(1.0, {}), timeout=0.5, errors="stop")
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
    guarded = guard_reward(lambda response, **problem: Reward(1.0, parts), timeout=5.0, errors="zero")
    assert guarded("an answer", **PROBLEM) == Reward(0.0, {"error": 1.0})
