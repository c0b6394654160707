"""Finding a task by name, and surviving what its reward function does."""

import os
import signal
import subprocess
import sys
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import pytest

import countdown_task
import train
from data_types import Reward
from harness.rewards import JUNK, isolated_reward, load_problems, load_task
from qwen2_model import Transformer
from tests import misbehaving_task

ROOT = Path(__file__).parent.parent
NEVER = 120.0  # seconds: a safety net for what must not happen

# ---------------------------------------------------------------- load_task


def write_module(directory: Path, name: str, text: str) -> None:
    path = directory.joinpath(*name.split(".")).with_suffix(".py")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


FUNCTIONS = ("load_problems", "render_prompt", "reward_function")
COMPLETE = "".join(f"def {name}(*args, **kwargs): ...\n" for name in FUNCTIONS)


def test_a_task_is_found_by_name(tmp_path, monkeypatch):
    assert load_task("countdown_task") is countdown_task
    monkeypatch.syspath_prepend(tmp_path)
    write_module(tmp_path, "package_of_tasks.inner.some_task", COMPLETE)
    assert load_task("package_of_tasks.inner.some_task").__name__.endswith("inner.some_task")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("no_such_task", ["task='no_such_task'", "leave out the .py"]),
        ("countdown_task.py", ["task='countdown_task.py'", "leave out the .py"]),
        ("tests/countdown_task", ["not a module name", "countdown_task.py"]),
        ("../countdown_task", ["not a module name"]),
        ("countdown-task", ["not a module name"]),
        ("a task", ["not a module name"]),
        ("", ["task=''", "not a module name"]),
        (".countdown_task", ["not a module name"]),
        ("countdown_task.", ["not a module name"]),
        ("os.path", ["task='os.path' lacks load_problems"]),
        ("json.tool.x", ["task='json.tool.x'"]),
        ("json", ["load_problems, render_prompt, reward_function", "rewards.py"]),
    ],
)
def test_a_name_that_is_not_a_task_is_refused(name, expected):
    with pytest.raises(ValueError, match="task=") as caught:
        load_task(name)
    assert [part for part in expected if part not in str(caught.value)] == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_missing_function_is_named(tmp_path, monkeypatch, function):
    monkeypatch.syspath_prepend(tmp_path)
    write_module(tmp_path, f"task_lacking_{function}", COMPLETE.replace(function, "other"))
    write_module(tmp_path, f"task_shadowing_{function}", COMPLETE + f"{function} = 3\n")
    for kind in ("lacking", "shadowing"):
        with pytest.raises(ValueError, match=rf"task='task_{kind}_{function}' lacks {function};"):
            load_task(f"task_{kind}_{function}")


# Catches: "put its file in this directory" for everything that can go wrong in an import.
@pytest.mark.parametrize(
    ("name", "line", "reason"),
    [
        ("missing", "import not_installed", "No module named 'not_installed'"),
        ("absent", "from json import no_such_name", "cannot import name 'no_such_name'"),
        ("unwritten", "def f(:", "SyntaxError"),
        ("undefined", "print(no_such_name)", "NameError"),
        ("leaving", "raise SystemExit(0)", "SystemExit"),
    ],
)
def test_the_line_at_which_an_import_fails_is_named(tmp_path, monkeypatch, name, line, reason):
    monkeypatch.syspath_prepend(tmp_path)
    write_module(tmp_path, f"task_{name}", f"import math\n{line}\n{COMPLETE}")
    with pytest.raises(ValueError, match=f"task='task_{name}'") as caught:
        load_task(f"task_{name}")
    assert reason in str(caught.value)
    assert f"({tmp_path}/task_{name}.py:2)" in str(caught.value)
    assert "in this directory" not in str(caught.value)


@pytest.mark.parametrize(("name", "line"), [("number", "Data = 3"), ("plain", "class Data: pass")])
def test_a_data_class_that_pydantic_cannot_check_is_named(name, line, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    write_module(tmp_path, f"task_with_data_{name}", COMPLETE + line)
    with pytest.raises(ValueError, match=f"{name}': Data must be a pydantic BaseModel"):
        load_task(f"task_with_data_{name}")


# ---------------------------------------------------------------- load_problems


def task_of(loaded, reward_function=lambda response, key: Reward(1.0, {})) -> SimpleNamespace:
    return SimpleNamespace(
        __name__="some_task", load_problems=lambda data: loaded, reward_function=reward_function
    )


@pytest.mark.parametrize(
    ("train", "test", "expected"),
    [
        ([], [{"key": 1}], ["has 0 training and 1 held-out problems"]),
        ([{"key": 1}], [], ["has 1 training and 0 held-out problems"]),
        (
            [{"key": 1, "response": "x"}],
            [{"key": 1}],
            ["'response': 'x'", "multiple values for argument 'response'"],
        ),
        ([{"key": 1}], [{"other": 1}], ["held-out problem {'other': 1}", "'key'"]),
        ([{3: 1}], [{"key": 1}], ["training problem {3: 1}", "must be strings"]),
        (["key"], [{"key": 1}], ["training problem 'key'", "mapping"]),
    ],
)
def test_problems_that_the_reward_function_cannot_take_are_named(train, test, expected):
    with pytest.raises(ValueError, match="task='some_task'") as caught:
        load_problems(task_of((train, test)), None)
    assert [part for part in expected if part not in str(caught.value)] == []


@pytest.mark.parametrize(
    "loaded",
    [None, 3, ([{"key": 1}],), ([{"key": 1}], iter([{"key": 1}]))],
    ids=["nothing", "a number", "one list", "an iterator"],
)
def test_problems_that_are_not_two_sequences_are_named(loaded):
    with pytest.raises(ValueError, match=r"'some_task': load_problems returned .* must return two"):
        load_problems(task_of(loaded), None)


def test_a_generator_of_problems_is_named_without_an_address():
    with pytest.raises(ValueError, match="load_problems returned <generator object") as caught:
        load_problems(task_of(problem for problem in ()), None)
    assert "0x" not in str(caught.value)


# ---------------------------------------------------------------- a task with bugs

WORDS = """
from data_types import Reward

def load_problems(data):
    return [{"word": "ab"}], [{"word": "cd"}]

def render_prompt(problem, tokenizer):
    return tokenizer.render_chat([{"role": "user", "content": problem["word"]}])

def right_answer(problem):
    return problem["word"][::-1]

def reward_function(response, word):
    return Reward(float(response == word[::-1]), {"answer": float(response == word[::-1])})
"""
CHAT = 'tokenizer.render_chat([{"role": "user", "content": problem["word"]}])'
BUGS = {  # name -> (text, its replacement, what the message says)
    "attribute": (
        'return [{"word": "ab"}]',
        "return data.words",
        ["load_problems raised AttributeError", "py:5", "declare data.words in a class Data"],
    ),
    "value": ('return [{"word": "ab"}]', 'return int("ab")', ['ValueError("invalid lit', "py:5"]),
    "message": (
        'return [{"word"',
        'raise ValueError("no data")\n    return [{"word"',
        ["': no data"],
    ),
    "messages": (CHAT, CHAT[22:-1], ["render_prompt returned [{'role'", "tokenizer.render_chat("]),
    "empty": (CHAT, '""', ["render_prompt returned ''"]),
    "key": ('content": problem["word"]', 'content": problem["text"]', ["KeyError('text')", "py:8"]),
    "chat": (
        CHAT,
        'tokenizer.render_chat("hi")',
        ["fails on 'hi'", 'a list of {"role", "content"}'],
    ),
    "number": ("Reward(float(r", "0.5, (float(r", ["returned (0.5, (", 'Reward(x, {"answer": x})']),
    "library": (
        'content": problem["word"]',
        'content": __import__("json").loads(problem["word"])',
        ["render_prompt raised JSONDecodeError", "py:8"],
    ),
    "index": (
        "    return Reward(",
        "    response.split()[0]\n    return Reward(",
        ["IndexErr", "py:14"],
    ),
    "right": (
        'problem["word"][::-1]',
        'problem["answer"]',
        ["right_answer raised KeyErr", "py:11"],
    ),
}


def write_task(directory: Path, monkeypatch, name: str, text: str) -> list[str]:
    """Write a task. Returns the arguments of train.py that select it."""
    monkeypatch.syspath_prepend(directory)
    monkeypatch.setattr(Transformer, "from_pretrained", None)  # nothing here may load a model
    write_module(directory, name, text)
    arguments = [f"output_dir={directory}/run", f"task={name}", "training.reward_timeout=120"]
    arguments += ["data={path: x, test_size: 1}", "model.device=cpu", "model.dtype=float32"]
    return ["--config", str(ROOT / "config.yaml"), *arguments, "model.path=models/tiny"]


# Catches: a bug blamed on the model ("fetch the model again"), or shown without its line.
@pytest.mark.usefixtures("own_signals")
@pytest.mark.parametrize("name", BUGS)
def test_a_bug_in_a_task_is_named_before_a_model_is_loaded(name, tmp_path, monkeypatch, capsys):
    bug, replacement, expected = BUGS[name]
    assert bug in WORDS
    arguments = write_task(
        tmp_path, monkeypatch, f"task_{name}", WORDS.replace(bug, replacement, 1)
    )
    for option in ([], ["--try-task"]):
        assert train.main([*arguments, *option]) == 2
        error = capsys.readouterr().err
        assert [part for part in [f"task_{name}", *expected] if part not in error] == []
        assert error.count("\n") == 1
        assert "fetch the model" not in error
        assert ("reward_errors" in error) == (
            name == "index"
        )  # only this one depends on the answer
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("own_signals")
def test_a_task_can_be_tried_without_a_model(tmp_path, monkeypatch, capsys):
    # Catches: only training problems; right_answer left out; an output directory made.
    assert train.main([*write_task(tmp_path, monkeypatch, "task_words", WORDS), "--try-task"]) == 0
    out = capsys.readouterr().out
    for word in ("ab", "cd"):
        assert (
            f"{{'word': '{word}'}}\n<|im_start|>user\n{word}<|im_end|>\n<|im_start|>assistant"
            in out
        )
    assert out.count("an empty answer: reward 0 (answer 0)\n") == 2
    assert out.count(f"the answer {JUNK!r}: reward 0 (answer 0)\n") == 2
    assert out.count("a right answer: reward 1 (answer 1)\n") == 2
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------- isolated_reward


@pytest.fixture(scope="module")
def shared_reward():
    """One worker for all tests, replaced as often as the tests break it."""
    forkserver._forkserver._stop()  # that of test_distributed.py does not ignore signals
    reward = isolated_reward("tests.misbehaving_task", timeout=NEVER, errors="stop")
    yield reward
    reward.close()


@pytest.fixture
def reward(shared_reward):
    shared_reward.timeout, shared_reward.errors = NEVER, "stop"
    return shared_reward


def line_of(function) -> str:
    return f"{misbehaving_task.__file__}:{function.__code__.co_firstlineno + 1}"


@pytest.mark.parametrize("total", [1.1, 1, -0.5, 1e6, float("inf"), float("-inf"), float("nan")])
def test_a_reward_passes_through_unchanged(total, reward):
    returned = reward("an answer", act="good", total=total)
    assert [returned.total, returned.parts["answer"]] == pytest.approx(
        [total] * 2, rel=0, nan_ok=True
    )


# Catches: isinstance(number, int | float), which np.float32 is not.
@pytest.mark.parametrize("kind", ["float32", "float64", "int64", "bool_"])
def test_a_numpy_number_is_a_number(kind, reward):
    returned = reward("an answer", act="returns_numpy", kind=kind)
    assert returned == Reward(1.0, {"answer": 1.0})
    assert type(returned.total) is type(returned.parts["answer"]) is float


def test_a_problem_may_have_any_key(reward):
    keys = {"response": 1, "self": 2, "problem": 3, "timeout": 4, "args": 5}
    assert reward("an answer", act="compares", **keys).total == 1.0


HANGING = [
    "sleeps",
    "loops",
    "swallows_every_exception",
    "matches_forever",
    "blocks_signals",
    "stops_its_process",
    "forks_and_hangs",
]
ENDING = {
    "exits_at_once": "exit code 3",
    "is_killed": "exit code -9",
    "kills_its_group": "exit code -9",
    "closes_all_files": "ended its process",
}
FAILING = {
    "raises": "raised ZeroDivisionError('division by zero')",
    "recurses": "raised RecursionError",
    "exits": "raised SystemExit(0)",
    "raises_keyboard_interrupt": "raised KeyboardInterrupt()",
    "takes_other_keys": "raised TypeError",
    "returns_a_float": 'returned 0.5; write return Reward(x, {"answer": x}) with a number x',
    "returns_nothing": 'returned None; write return Reward(x, {"answer": x})',
} | ({"allocates_too_much": "raised MemoryError"} if sys.platform == "linux" else {})


# Catches: the worker left alive at the timeout; its pipe used again, which gives an answer the
# reward of the one before; Exception for BaseException in _serve; EOFError not caught.
@pytest.mark.parametrize("act", [*HANGING, *ENDING, *FAILING])
def test_an_answer_whose_reward_fails_scores_zero_or_stops_the_run(act, reward):
    for errors in ("stop", "zero"):
        reward.errors, reward.timeout = errors, 0.1 if act in HANGING else NEVER
        if errors == "zero":
            assert reward("an answer", act=act) == Reward(0.0, {"error": 1.0})
        else:
            with pytest.raises(ValueError, match="the reward function") as caught:
                reward("an answer", act=act)
            message, expected = str(caught.value), (ENDING | FAILING).get(act)
            assert (expected or "took longer than 0.1 s") in message
            assert "training.reward_timeout" in message or act not in HANGING
            assert f"{misbehaving_task.__file__}:" in message
            assert f"{{'act': '{act}'}}" in message
            assert "'an answer'" in message
            # Not the remedy where the return value is wrong, which it is for every answer.
            assert ("training.reward_errors=zero" in message) == ("returned" not in message)
        reward.timeout = NEVER
        assert reward("an answer", act="good", total=7.0).total == 7.0


@pytest.mark.parametrize(
    ("act", "values"),
    [
        ("good", {"total": "1.0"}),
        ("good", {"total": 1e300}),
        ("good", {"total": 10**400}),
        ("returns_parts", {"parts": None}),
        ("returns_parts", {"parts": [1.0]}),
        ("returns_parts", {"parts": {"answer": "yes"}}),
        ("returns_parts", {"parts": {"answer": None}}),
        ("returns_parts", {"parts": {"answer": -1e7}}),
        ("returns_parts", {"parts": {("answer",): 1.0}}),
        ("returns_parts", {"parts": {"\x1b[2J": 1.0}}),
        ("returns_parts", {"parts": {"\ud800": 1.0}}),
    ],
)
def test_a_reward_whose_values_cannot_be_used_is_named(act, values, reward):
    with pytest.raises(ValueError, match="the reward function r") as caught:
        reward("an answer", act=act, **values)
    assert "\x1b" not in str(caught.value)
    reward.errors = "zero"
    assert reward("an answer", act=act, **values) == Reward(0.0, {"error": 1.0})


def test_the_line_in_the_task_is_named_even_if_a_library_raises(reward):
    for act in (misbehaving_task.raises, misbehaving_task.raises_in_a_library):
        with pytest.raises(ValueError, match="raised") as caught:
            reward("an answer", act=act.__name__)
        assert f"({line_of(act)})" in str(caught.value)


def test_a_long_answer_does_not_flood_the_message(reward):
    with pytest.raises(ValueError, match="the reward function") as caught:
        reward("x" * 100_000, act="raises", numbers=[3] * 100_000)
    assert len(str(caught.value)) < 2000


def test_a_task_that_changes_its_problem_changes_a_copy(reward):
    problem = {"act": "extends_the_numbers", "numbers": [3, 5, 7]}
    assert [reward("an answer", **problem).total for _ in range(3)] == [4.0] * 3
    assert problem["numbers"] == [3, 5, 7]


def test_a_problem_that_cannot_be_pickled_is_named(reward):
    with pytest.raises(ValueError, match=r"could not be sent the problem.*pickle") as caught:
        reward("an answer", act="good", key=lambda: 3)
    assert "'an answer'" in str(caught.value)


# Catches: a worker kept after Ctrl-C, whose pending reply would score the next answer.
def test_an_interrupted_call_leaves_no_reply_behind(reward, monkeypatch):
    def interrupt(timeout):
        raise KeyboardInterrupt

    reward("an answer", act="good")
    monkeypatch.setattr(reward._connection, "poll", interrupt)
    with pytest.raises(KeyboardInterrupt):
        reward("an answer", act="good", total=3.0)
    assert reward("an answer", act="good", total=5.0).total == 5.0


# Catches: the comparison of process ids in _serve, without which every answer is scored twice.
def test_a_copy_that_the_task_forks_scores_nothing(reward):
    assert [reward("an answer", act="forks", total=i).total for i in range(20)] == list(range(20))


# ---------------------------------------------------------------- processes


def is_running(pid: int) -> bool:
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return status.stdout.strip()[:1] not in ("", "Z")


def wait_for(condition) -> None:
    end = time.monotonic() + NEVER
    while not condition():
        assert time.monotonic() < end, "the event did not happen"
        time.sleep(0.02)


def processes(reward: Reward) -> list[int]:
    return [round(reward.parts[name] * 1e5) for name in ("worker", "server")]


def test_a_worker_and_the_server_ignore_the_signals_of_a_terminal(reward):
    pids = processes(reward("an answer", act="tells_its_processes"))
    reward("an answer", act="signals_itself_and_the_server")
    assert processes(reward("an answer", act="tells_its_processes")) == pids
    assert all(map(is_running, pids))


def test_a_program_that_the_task_starts_does_not_ignore_signals(reward):
    assert reward("an answer", act="terminates_a_program").total == 1.0


def test_a_program_that_the_task_starts_ends_with_the_worker(reward, tmp_path):
    file, reward.errors = tmp_path / "pid", "zero"
    reward("an answer", act="leaves_a_program_running", file=str(file))
    wait_for(lambda: not is_running(int(file.read_text())))


def test_a_new_worker_starts_even_if_the_server_was_killed(reward):
    old = processes(reward("an answer", act="tells_its_processes"))
    assert reward("an answer", act="kills_the_server").total == 1.0
    reward.errors = "zero"
    assert reward("an answer", act="is_killed").total == 0.0
    new = processes(reward("an answer", act="tells_its_processes"))
    assert not set(old) & set(new)


def test_closing_ends_the_worker():
    reward = isolated_reward("tests.misbehaving_task", timeout=NEVER, errors="stop")
    worker, _ = processes(reward("an answer", act="tells_its_processes"))
    reward.close()
    wait_for(lambda: not is_running(worker))
    reward.close()


# Catches: another process that holds the run's end of the pipe.
def test_a_worker_ends_when_the_run_closes_its_end_of_the_pipe():
    reward = isolated_reward("tests.misbehaving_task", timeout=NEVER, errors="stop")
    worker, _ = processes(reward("an answer", act="tells_its_processes"))
    reward._connection.close()  # as the kernel does when the run is killed
    wait_for(lambda: not is_running(worker))
    reward.close()


TASK = """
import os
from data_types import Reward

def load_problems(data): ...
def render_prompt(problem, tokenizer): ...

def reward_function(response, hang=False):
    print(f"scoring\\n{response}")
    with open("partial", "w") as file:
        file.write(f"{os.getppid()} {os.getpid()}")
    os.rename("partial", "hanging" if hang else "idle")
    return Reward(float(sum(range(10**12)) if hang else 1), {})
"""
RUN = """
import sys
from harness.rewards import isolated_reward

if __name__ == "__main__":
    reward = isolated_reward("own_task", timeout=1.0, errors="stop")
    reward("\\x1b[2Jan answer")
    reward.timeout = 600.0  # the worker itself still goes by the first value
    if "hang" in sys.argv:
        reward("an answer", hang=True)
"""


def start_run(directory: Path, *arguments: str) -> subprocess.Popen:
    """A program that scores answers, with a task from the current directory."""
    (directory / "own_task.py").write_text(TASK)
    (directory / "run.py").write_text(RUN)
    return subprocess.Popen(
        [sys.executable, "run.py", *arguments],
        cwd=directory,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


# Catches: `atexit` left out: the program would wait for its worker forever.
def test_output_is_shown_at_once_and_a_program_ends_without_closing(tmp_path):
    run = start_run(tmp_path)
    output, _ = run.communicate(timeout=NEVER)
    assert output == "scoring\n\\x1b[2Jan answer\n"
    assert run.returncode == 0


# Catches: setitimer left out of _serve.
def test_a_worker_that_hangs_does_not_outlive_a_run_that_is_killed(tmp_path):
    run = start_run(tmp_path, "hang")
    wait_for((tmp_path / "hanging").exists)
    run.send_signal(signal.SIGKILL)
    run.communicate(timeout=NEVER)  # also waits until every process has closed its output
    pids = map(int, (tmp_path / "hanging").read_text().split())
    wait_for(lambda: not any(map(is_running, pids)))
