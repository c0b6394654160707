"""Whatever is done to a file, the programs say what is wrong with it in a message and an exit code, or do without it.

Hypothesis damages what a model, a configuration and a finished run consist of. A traceback is an exception here.
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
SECONDS = 60  # beyond, it hangs

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
    raise AssertionError(f"no end after {SECONDS} s")


def outcome(main, arguments: list[str]) -> tuple[int, str]:
    """Exit code and output; a failure must have said one thing."""
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
    """The same with one thing in it, however deep, replaced, left out or doubled."""
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


# ---------------------------------------------------------------- a model and a configuration


@fuzz(500)
@given(st.data())
def test_a_model_that_somebody_changed_trains_or_is_refused(base_model, data):
    name = data.draw(
        st.sampled_from(
            [
                "config.json",
                "tokenizer.json",
                "tokenizer_config.json",
                "generation_config.json",
                "model.safetensors.index.json",
                "made_for.json",
            ]
        )
    )
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
    [
        *"[]{}:,-?!&*|>'\"%@#~<= \n\t",
        "\0",
        "\ud800",
        "é",
        "extends: ",
        "1e3",
        "\n  ",
        "null",
        "<<: ",
    ]
)


@fuzz(2000)
@given(st.data())
def test_a_configuration_that_somebody_changed_is_planned_or_refused(data):
    with tempfile.TemporaryDirectory() as directory:
        path, text = Path(directory) / "config.yaml", json.dumps(data.draw(changed(RAW)))
        for piece in data.draw(st.just([]) | st.lists(PIECES, max_size=3)):
            where = data.draw(st.integers(0, len(text)))
            text = text[:where] + piece + text[where + data.draw(st.integers(0, 3)) :]
        path.write_bytes(text.encode(errors="surrogatepass"))
        override = f"{data.draw(st.sampled_from(['data', 'training.seed', 'a.b', 'task', '']))}={data.draw(WORDS)}"
        outcome(
            train.main,
            ["--config", str(path), "--plan", *([override] if data.draw(st.booleans()) else [])],
        )


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


def damage(data, run: Path, file: Path) -> None:
    content, kind = (
        file.read_bytes(),
        data.draw(st.sampled_from(["flip", "cut", "remove", "swap", "JSON", "no file"])),
    )
    if kind == "flip" and content:
        place = data.draw(st.integers(0, 8 * len(content) - 1))
        file.write_bytes(
            content[: place // 8]
            + bytes([content[place // 8] ^ 1 << place % 8])
            + content[place // 8 + 1 :]
        )
    elif kind == "cut":
        os.truncate(file, data.draw(st.integers(0, max(0, len(content) - 1))))
    elif kind == "swap":
        other = data.draw(
            st.sampled_from(sorted(path for path in run.rglob("*") if path.is_file()))
        )
        file.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "JSON":
        file.write_text(json.dumps(data.draw(VALUES)) + "\n")
    else:
        file.unlink()
        if kind == "no file":
            data.draw(st.sampled_from([os.mkdir, os.mkfifo, lambda path: os.symlink(path, path)]))(
                file
            )


@fuzz(250)
@given(st.data())
def test_a_damaged_run_goes_on_from_what_is_good_or_says_what_is_wrong(finished, data):
    with tempfile.TemporaryDirectory() as directory:
        run = Path(shutil.copytree(finished, Path(directory) / "run"))
        whole = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        damage(data, run, data.draw(st.sampled_from(sorted(whole))))
        wrong = {path for path in whole if not path.is_file() or path.read_bytes() != whole[path]}
        main, arguments = data.draw(
            st.sampled_from(
                [
                    (
                        train.main,
                        [
                            *SMALL,
                            f"output_dir={run}",
                            "--resume",
                            "training.max_steps=4",
                            "training.max_gen_len=12",
                        ],
                    ),
                    (evaluate.main, [str(run), "training.max_gen_len=12"]),
                    (plot.main, [str(run)]),
                    (evaluate.main, [str(run), "--show"]),
                ]
            )
        )
        code, said = outcome(main, arguments)
        if code == 0 and main is not plot.main and "--show" not in arguments:
            newest = run / "checkpoints/step-000003"
            assert ("passing over" in said) == any(path.parent == newest for path in wrong)


NAMES = st.sampled_from(
    [
        "reward",
        "eval/success",
        "eval/success_low",
        "eval/success_high",
        "completions/mean_length",
        "entropy",
    ]
)
METRICS = st.fixed_dictionaries(
    {"step": st.integers(0, 9)}, optional={"skipped": VALUES}
) | st.fixed_dictionaries({"step": VALUES})


@fuzz(150)
@given(
    st.lists(
        st.tuples(METRICS, st.dictionaries(NAMES, NUMBERS | st.none() | VALUES, max_size=4)),
        max_size=4,
    )
)
def test_any_log_is_drawn_or_its_line_named(lines):
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "metrics.jsonl").write_text(
            "".join(json.dumps(a | b) + "\n" for a, b in lines)
        )
        outcome(plot.main, [directory])
