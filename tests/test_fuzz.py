"""Damaged files: every program either works without the file or exits with one clear message.

Hypothesis changes the files of a model, a config and a finished run. An exception fails the test.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import evaluate
import plot
import train
from harness.config import load_config

ROOT = Path(__file__).parent.parent
TINY = str(ROOT / "config_tiny.yaml")
SMALL = [
    "--config",
    TINY,
    "training.batch_size=4",
    "training.num_questions_per_batch=2",
    "training.max_gen_len=12",
    "training.micro_batch_tokens=300",
    "data.test_size=2",
    "task=tests.letters_task",
    "training.ckpt_save_interval=1",
    "training.keep_checkpoints=2",
    "training.reward_timeout=5.0",
]
SECONDS = 300  # a safety net: a program that takes longer hangs

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("own_signals", "one_thread")]

WORDS = st.text("ab1_.<|>/é\0\n\x1b\u202e", max_size=6) | st.sampled_from(
    [
        "nan",
        "../x",
        "model.safetensors",
        "false",
        "content",
        "special",
        "<|im_end|>",
        "\ud800",
        "[" * 99999,
        "1" * 5000,
        "a" * 4999,
    ]
)
NUMBERS = st.integers(-3, 300) | st.sampled_from([10**9, -(10**30), 10**400]) | st.floats()
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)


def fuzz(examples: int):
    return settings(
        max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )


def hang(*_):
    raise AssertionError(f"the program is still running after {SECONDS} s")


def outcome(main, arguments: list[str]) -> tuple[int, str]:
    """Run a program; return its exit code and output. A failure must print exactly one error."""
    out, err = io.StringIO(), io.StringIO()
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(arguments)
    finally:
        signal.alarm(0)
    message = err.getvalue()
    assert code in (0, 1, 2)
    assert (code == 0) == (message.count("error: ") == 0), message
    assert message.startswith("error: ") or not code
    assert "\x1b" not in message + out.getvalue()
    assert len(message) < 20_000
    return code, out.getvalue() + message


@st.composite
def changed(draw, value):
    """The value with one entry at any depth replaced or removed."""
    if isinstance(value, dict | list) and value and draw(st.integers(0, 9)):
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = draw(st.sampled_from(keys[:40] if isinstance(keys, list) else keys[:9]))
        value = value.copy()
        if draw(st.integers(0, 9)):
            value[key] = draw(changed(value[key]))
        else:
            del value[key]
        return value
    return draw(VALUES)


# ---------------------------------------------------------------- a model and a config


MODEL_FILES = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "model.safetensors.index.json",
    "made_for.json",
]


@fuzz(500)
@given(st.data())
def test_a_changed_model_trains_or_is_refused(base_model, data):
    name = data.draw(st.sampled_from(MODEL_FILES))
    with tempfile.TemporaryDirectory() as directory:
        model = Path(shutil.copytree(base_model, Path(directory) / "model"))
        original = {
            "weight_map": {"a": "model.safetensors"},
            "task": "tests.letters_task",
            "prompt_token_ids": [1],
            "problem": {"numbers": [3], "target": 3},
        }
        if (model / name).exists():
            original = json.loads((model / name).read_text())
        (model / name).write_text(json.dumps(data.draw(changed(original))))
        code, _ = outcome(
            train.main,
            [*SMALL, f"output_dir={directory}/run", f"model.path={model}", "training.max_steps=1"],
        )
        assert code == 0 or not (Path(directory) / "run/checkpoints").exists()


RAW = load_config(TINY).model_dump()
PIECES = st.sampled_from(
    [*"[]{}:,-?!&*|>'\"%@#~<= \n\t\0\ud800é", "extends: ", "1e3", "\n  ", "null", "<<: "]
)
KEYS = st.sampled_from(["data", "training.seed", "a.b", "task", ""])


@fuzz(2000)
@given(st.data())
def test_a_changed_config_gives_a_plan_or_is_refused(data):
    with tempfile.TemporaryDirectory() as directory:
        path, text = Path(directory) / "config.yaml", json.dumps(data.draw(changed(RAW)))
        for piece in data.draw(st.just([]) | st.lists(PIECES, max_size=3)):
            where = data.draw(st.integers(0, len(text)))
            text = text[:where] + piece + text[where + data.draw(st.integers(0, 3)) :]
        path.write_bytes(text.encode(errors="surrogatepass"))
        overrides = [f"{data.draw(KEYS)}={data.draw(WORDS)}"] if data.draw(st.booleans()) else []
        outcome(train.main, ["--config", str(path), "--plan", *overrides])


# ---------------------------------------------------------------- a finished run


@pytest.fixture(scope="session")
def finished(base_model, tmp_path_factory):
    directory = tmp_path_factory.mktemp("fuzz") / "run"
    assert (
        train.main(
            [*SMALL, f"output_dir={directory}", f"model.path={base_model}", "training.max_steps=3"]
        )
        == 0
    )
    return directory


def link_to_itself(path: Path) -> None:
    os.symlink(path, path)


def damage(data, run: Path, file: Path) -> None:
    content = file.read_bytes()
    kind = data.draw(st.sampled_from(["flip", "cut", "remove", "swap", "JSON", "no file"]))
    if kind == "flip" and content:
        byte, bit = divmod(data.draw(st.integers(0, 8 * len(content) - 1)), 8)
        flipped = bytearray(content)
        flipped[byte] ^= 1 << bit
        file.write_bytes(flipped)
    elif kind == "cut":
        os.truncate(file, data.draw(st.integers(0, max(0, len(content) - 1))))
    elif kind == "swap":
        files = sorted(path for path in run.rglob("*") if path.is_file())
        other = data.draw(st.sampled_from(files))
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "JSON":
        file.write_text(json.dumps(data.draw(VALUES)) + "\n")
    else:
        file.unlink()
        if kind == "no file":
            make = data.draw(st.sampled_from([os.mkdir, os.mkfifo, link_to_itself]))
            make(file)


@fuzz(250)
@given(st.data())
def test_a_damaged_run_continues_from_good_files_or_says_what_is_wrong(finished, data):
    with tempfile.TemporaryDirectory() as directory:
        run = Path(shutil.copytree(finished, Path(directory) / "run"))
        whole = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        damage(data, run, data.draw(st.sampled_from(sorted(whole))))
        wrong = {path for path in whole if not path.is_file() or path.read_bytes() != whole[path]}
        resume = [*SMALL, f"output_dir={run}", "--resume", "training.max_steps=4"]
        programs = [
            (train.main, resume),
            (evaluate.main, [str(run), "training.max_gen_len=12"]),
            (plot.main, [str(run)]),
            (evaluate.main, [str(run), "--show"]),
        ]
        main, arguments = data.draw(st.sampled_from(programs))
        code, output = outcome(main, arguments)
        if code == 0 and main is not plot.main and "--show" not in arguments:
            newest = run / "checkpoints/step-000003"
            assert ("skipping" in output) == any(path.parent == newest for path in wrong)


EVALUATION = ["eval/success", "eval/success_low", "eval/success_high"]
NAMES = st.sampled_from(["reward", *EVALUATION, "completions/mean_length", "entropy"])
METRICS = st.fixed_dictionaries(
    {"step": st.integers(0, 9)}, optional={"skipped": VALUES}
) | st.fixed_dictionaries({"step": VALUES})


@fuzz(150)
@given(st.lists(st.tuples(METRICS, st.dictionaries(NAMES, VALUES, max_size=4)), max_size=4))
def test_any_log_is_plotted_or_its_bad_line_is_named(lines):
    with tempfile.TemporaryDirectory() as directory:
        log = "".join(json.dumps(step | metrics) + "\n" for step, metrics in lines)
        (Path(directory) / "metrics.jsonl").write_text(log)
        outcome(plot.main, [directory])
