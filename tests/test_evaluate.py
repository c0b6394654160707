import itertools
import json
import re
import shutil
from pathlib import Path
from statistics import fmean

import pytest
import torch
from safetensors.torch import save_file

import evaluate
import plot
from data_types import Episode, Reward, UpdateStats
from harness.metrics import evaluation_metrics, step_metrics
from tests.helpers import sign
from tokenizer import Tokenizer
from warm_start import make_tokenizer, new_model

ROOT = Path(__file__).parent.parent
TASK = '''
from data_types import Reward

def load_problems(data):
    return [{"numbers": [0, 0]}], [{"numbers": [i] * (2 + i % 2)} for i in range(data.test_size)]

def render_prompt(problem, tokenizer):
    return f"Say something about {problem['numbers']}.\\n<think>"

def reward_function(response, numbers):
    """By chance: one half of the answers to two numbers, a third of those to three."""
    answer = float(sum(map(ord, response)) % len(numbers) == 0)
    return Reward(answer + 0.25, {"answer": answer})

def problem_kind(problem):
    return f"{len(problem['numbers'])} of them"
'''
CHANCE = (
    f"extends: {ROOT}/config.yaml\ntask: chance_task\nmodel:\n  device: cpu\n  dtype: float32\n"
)
PARSE = """
def parse_question(text):
    if not text.isdigit():
        raise ValueError(f'{text!r} is not a question; write a number, for example "7"')
    return {"numbers": [int(text), 1]}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two model directories with one tokenizer and different random weights."""
    directory = tmp_path_factory.mktemp("models")
    for name in ("first", "second"):
        make_tokenizer(directory / name)
        tokenizer = Tokenizer.from_pretrained(directory / name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(name))
            new_model(tokenizer, hidden_size=16, num_layers=1).save_pretrained(directory / name)
    return directory


@pytest.fixture
def chance_task(tmp_path, monkeypatch):
    """The config of a task whose answers succeed by chance, and the overrides that select it."""
    (tmp_path / "chance_task.py").write_text(TASK)
    (tmp_path / "asking_task.py").write_text(TASK + PARSE)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "chance.yaml").write_text(CHANCE)
    return [
        "--config",
        str(tmp_path / "chance.yaml"),
        "data.test_size=13",
        "training.max_gen_len=23",
    ]


def count_again(answers: list[dict], k: int) -> tuple[float, float]:
    """Success rate and pass@k, counted the long way: over every choice of k answers to each question."""
    questions = [
        [a["success"] for a in group]
        for _, group in itertools.groupby(answers, key=lambda a: a["question"])
    ]
    chosen = [
        fmean(any(choice) for choice in itertools.combinations(outcomes, k))
        for outcomes in questions
    ]
    return fmean(a["success"] for a in answers), fmean(chosen)


# ---------------------------------------------------------------- held-out questions


def test_the_report_agrees_with_a_count_over_its_own_json(models, chance_task, tmp_path, capsys):
    out = tmp_path / "report.json"
    assert (
        evaluate.main(
            [
                str(models / "first"),
                str(models / "second"),
                *chance_task,
                "--samples",
                "5",
                "--json",
                str(out),
            ]
        )
        == 0
    )
    shown, report = capsys.readouterr().out, json.loads(out.read_text())
    for model in report["models"]:
        answers = model["answers"]
        assert [a["question"] for a in answers] == [i for i in range(13) for _ in range(5)]
        assert all(
            a["success"]
            == (a["parts"]["answer"] == 1)
            == (sum(map(ord, a["text"])) % len(a["problem"]["numbers"]) == 0)
            for a in answers
        )
        for k in (1, 2, 4, 5):  # mutation: pass_at with k and samples swapped
            success, pass_at_k = count_again(answers, k)
            assert model["success"] == pytest.approx(success)
            assert model["pass_at"][str(k)] == pytest.approx(pass_at_k)
        assert model["by_kind"].keys() == {"2 of them", "3 of them"}
        for kind, part in model["by_kind"].items():  # mutation: group by question number instead
            of_size = [
                a["success"] for a in answers if len(a["problem"]["numbers"]) == int(kind[0])
            ]
            assert part["success"] == pytest.approx(fmean(of_size))
            assert part["questions"] == len(of_size) / 5 == {"2": 7, "3": 6}[kind[0]]
            assert f"{fmean(of_size):.1%} (" in shown
        assert model["mean_length"] == pytest.approx(fmean(a["length"] for a in answers))
        assert model["finished"] == pytest.approx(fmean(a["finished"] for a in answers))
        assert 0 < model["finished"] < 1, "the test wants answers of both kinds"
        assert f"{success:.1%} ({model['success_low']:.1%} … {model['success_high']:.1%})" in shown
    first, second = ([a["success"] for a in model["answers"]] for model in report["models"])
    differences = [sum(second[i : i + 5]) - sum(first[i : i + 5]) for i in range(0, 65, 5)]
    assert report["comparison"]["difference"] == pytest.approx(
        sum(differences) / 65
    )  # mutation: first minus second
    assert report["comparison"]["questions_better"] == sum(d > 0 for d in differences)
    assert f"p = {report['comparison']['p']:.2g}" in shown


def test_every_model_gets_the_same_random_numbers(models, chance_task, tmp_path, capsys):
    out = tmp_path / "report.json"
    assert (
        evaluate.main(
            [str(models / "first"), str(models / "first"), *chance_task, "--json", str(out)]
        )
        == 0
    )
    report = json.loads(out.read_text())
    assert report["models"][0] == report["models"][1]  # mutation: one generator for both models
    assert report["comparison"] == {
        "difference": 0.0,
        "questions_better": 0,
        "questions_worse": 0,
        "p": 1.0,
    }
    assert "difference +0.0%: better on 0 questions, worse on 0, p = 1 " in capsys.readouterr().out


@pytest.fixture
def run(models, chance_task, tmp_path):
    """A run of chance_task with three checkpoints."""
    for step, source in ((3, "first"), (20, "second"), (100, "second")):
        checkpoint = tmp_path / "run/checkpoints" / f"step-{step:06d}"
        shutil.copytree(models / source, checkpoint)
        place = {"step": step, "optimizer_steps": step, "log_sizes": {}, "config": {}}
        (checkpoint / "trainer.json").write_text(json.dumps(place))
        save_file({"exp_avg": torch.zeros(3)}, checkpoint / "optimizer.tensors")
        sign(checkpoint)
    (tmp_path / "run/config.yaml").write_text(CHANCE)
    return tmp_path / "run"


SHORT = ["data.test_size=2", "training.max_gen_len=3"]


def test_a_run_stands_for_its_newest_good_checkpoint_and_brings_its_config(run, models, capsys):
    # Catches: sizes compared instead of checksums; the run's config not looked for beside a checkpoint or another model.
    newest, middle, oldest = (run / "checkpoints" / f"step-{step:06d}" for step in (100, 20, 3))
    assert evaluate.main([str(run), *SHORT]) == 0
    assert str(newest) in capsys.readouterr().out
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    assert evaluate.main([str(run), *SHORT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"passing over {newest}: model.safetensors is damaged")
    assert str(middle) in "".join(lines[1:])
    assert evaluate.main([str(oldest), *SHORT]) == 0
    assert evaluate.main([str(models / "first"), str(run), *SHORT]) == 0


def test_a_damaged_checkpoint_that_is_named_is_refused(run, tmp_path, capsys):
    # Catches: check_files left out for a directory with a config.json.
    checkpoint = run / "checkpoints/step-000003"
    shutil.copytree(checkpoint, tmp_path / "copy")
    assert (
        evaluate.main([str(tmp_path / "copy"), "--config", str(run / "config.yaml"), *SHORT]) == 0
    )  # whatever its name
    (checkpoint / "generation_config.json").write_text('{"eos_token_id": [1]}')
    capsys.readouterr()
    assert evaluate.main([str(checkpoint), *SHORT]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {checkpoint} is damaged: generation_config.json is damaged")
    assert "remove complete.json if you changed the files yourself" in error
    assert error.count("\n") == 1
    (checkpoint / "complete.json").unlink()
    assert evaluate.main([str(checkpoint), *SHORT]) == 0


DATA = """
from pydantic import BaseModel

class Data(BaseModel):
    count: int

def load_problems(data):
    return [{"numbers": [0, 0]}], [{"numbers": [i, i]} for i in range(data.count)]
"""


@pytest.mark.parametrize(
    ("change", "code", "said"),
    [
        (
            lambda text: text.replace('"answer"', '"solved"'),
            0,
            'warning: no reward has a part "answer", so success cannot be counted',
        ),
        (
            lambda text: text.replace("for i in range(data.test_size)", "for i in ()"),
            2,
            "leaves no held-out problems",
        ),
        (lambda text: text.replace("numbers):", "number):"), 2, "reward_function cannot be called"),
        (lambda text: text + DATA, 0, "3 held-out questions"),
    ],
    ids=["no answer", "no problems", "other keys", "data of its own"],
)
def test_a_task_is_looked_at_as_in_training(
    change, code, said, models, tmp_path, monkeypatch, capsys
):
    # Catches: task.load_problems called as it is; success of 0 % where none can be counted; config.data.path of any task.
    name = f"changed_task_{code}_{len(said)}"
    (tmp_path / f"{name}.py").write_text(change(TASK))
    monkeypatch.syspath_prepend(str(tmp_path))
    data = "data={path: x, test_size: 3}" if DATA not in change(TASK) else "data.count=3"
    (tmp_path / "task.yaml").write_text(CHANCE.replace("chance_task", name))
    assert (
        evaluate.main(
            [
                str(models / "first"),
                "--config",
                str(tmp_path / "task.yaml"),
                "training.max_gen_len=5",
                data,
            ]
        )
        == code
    )
    assert said in "".join(capsys.readouterr())


# ---------------------------------------------------------------- one question


def test_ask_prints_whole_characters_one_after_another_and_the_verdict(
    models, chance_task, monkeypatch, capsys
):
    text = "né 🙂 \x1b[31m\u202e</think>"
    ids = Tokenizer.from_pretrained(models / "first").encode(text + "<|im_end|>")
    assert len(ids) > len(text), "the test wants characters that are spread over tokens"
    monkeypatch.setattr(evaluate, "generate_one", lambda *_, **__: iter(ids))
    pieces = []
    monkeypatch.setattr(
        "builtins.print", lambda *values, end="\n", **_: pieces.append(" ".join(values) + end)
    )
    assert (
        evaluate.main(
            [
                str(models / "first"),
                *chance_task,
                "task=asking_task",
                "training.max_gen_len=400",
                "--ask",
                "7",
            ]
        )
        == 0
    )
    shown = "".join(pieces)
    reward = 0.25 + (sum(map(ord, text)) % 2 == 0)
    assert shown.startswith(
        "<think>né 🙂 \\x1b[31m\\u202e</think>\n"
    )  # mutation: no printable(): a model writes to the terminal
    assert "\N{REPLACEMENT CHARACTER}" not in shown  # mutation: whole = answer
    assert shown.endswith(f"reward {reward:g} (answer {reward - 0.25:g})\n")
    assert len(pieces) > 20, "it comes as it is drawn"


def test_ask_says_when_an_answer_was_cut_off(models, chance_task, capsys):
    assert (
        evaluate.main(
            [
                str(models / "first"),
                *chance_task,
                "task=asking_task",
                "training.max_gen_len=1",
                "--ask",
                "7",
            ]
        )
        == 0
    )
    assert capsys.readouterr().out.endswith("; cut off after 1 tokens (training.max_gen_len)\n")


# ---------------------------------------------------------------- samples


def write_samples(run: Path) -> None:
    run.mkdir()
    with open(run / "samples.jsonl", "w") as file:
        for advantage, text in ((1.5, "good\n\x1b[2J"), (-0.5, "bad"), (0.0, "neither")):
            file.write(
                json.dumps(
                    {
                        "step": 7,
                        "kind": "best",
                        "question": "What?\n<think>",
                        "text": text,
                        "reward": 1.1,
                        "advantage": advantage,
                        "parts": {"answer": 1.0, "format": 0.0},
                        "length": 3,
                        "finished": advantage != 0,
                    }
                )
                + "\n"
            )


def test_samples_are_coloured_by_advantage_on_a_terminal_only(tmp_path, monkeypatch, capsys):
    write_samples(tmp_path / "run")
    assert evaluate.main([str(tmp_path / "run"), "--show"]) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    assert "good\n\\x1b[2J" in plain
    assert (
        "step 7, best: reward 1.1 (answer 1, format 0); advantage +1.50, 3 tokens\nWhat?" in plain
    )
    assert "advantage +0.00, 3 tokens, cut off" in plain
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert evaluate.main([str(tmp_path / "run"), "--show"]) == 0
    coloured = capsys.readouterr().out
    assert "\x1b[32mgood" in coloured
    assert "\x1b[31mbad" in coloured
    assert "\nneither" in coloured
    assert re.sub(r"\x1b\[[0-9]+m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert evaluate.main([str(tmp_path / "run"), "--show"]) == 0
    assert capsys.readouterr().out == plain


def test_samples_are_chosen_by_step_and_kind_and_a_question_stands_once(tmp_path, capsys):
    # Catches: `not in (None, sample.step)` -> `in …`; the question printed again for each of its answers.
    run = tmp_path / "run"
    write_samples(run)
    line = (run / "samples.jsonl").read_text().split("\n")[0]
    (run / "samples.jsonl").write_text(
        f"{line}\n{line}\n" + line.replace('"step": 7', '"step": 8').replace("best", "worst") + "\n"
    )
    for arguments, answers in (
        ([], 3),
        (["--step", "8"], 1),
        (["--kind", "best"], 2),
        (["--step", "7", "--kind", "best"], 2),
    ):
        assert evaluate.main([str(run), "--show", *arguments]) == 0
        shown = capsys.readouterr().out
        assert (shown.count("good"), shown.count("What?")) == (answers, 1)
    assert evaluate.main([str(run), "--show", "--step", "9"]) == 2
    assert "holds no sample of that step and kind" in capsys.readouterr().err


DAMAGED_LINES = {
    "a list": "[1]",
    "a number": "1",
    "null": "null",
    "no JSON": "{",
    "no step": "{}",
    "a step that is a word": '{"step": "x"}',
    "a step too long": '{"step": 1' + 30 * "0" + "}",
    "digits without end": '{"step": ' + 5000 * "1" + "}",
    "a part of a wrong type": '{"step": 1, "parts": [1], "reward": [], "eval/success": "much"}',
    "too deep": 99999 * "[",
}


@pytest.mark.parametrize("line", DAMAGED_LINES.values(), ids=DAMAGED_LINES)
def test_a_damaged_log_is_named_with_its_line(line, tmp_path, capsys):
    # Catches: `ValidationError` not caught; json.loads in place of parse_json.
    for name, main, arguments in (
        ("samples", evaluate.main, ["--show"]),
        ("metrics", plot.main, []),
    ):
        (tmp_path / f"{name}.jsonl").write_text(line + "\n")
        assert main([str(tmp_path), *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: {tmp_path / name}.jsonl, line 1")
        assert error.count("\n") == 1


def test_a_torn_last_line_is_passed_over(tmp_path, capsys):
    run = tmp_path / "run"
    write_samples(run)
    with open(run / "samples.jsonl", "a") as file:
        file.write('{"step": 8, "ki')
    assert evaluate.main([str(run), "--show"]) == 0
    shown = capsys.readouterr().out
    assert "passing over the last line, which is torn" in shown
    assert "neither" in shown


def test_temperature_0_takes_the_likeliest_token(models, chance_task, capsys):
    # Catches: `max(temperature, GREEDY)` -> `1.0`; the temperature not recorded.
    out = models / "greedy.json"
    assert (
        evaluate.main(
            [
                str(models / "first"),
                *chance_task,
                "--temperature",
                "0",
                "--samples",
                "3",
                "--json",
                str(out),
            ]
        )
        == 0
    )
    assert "greedy" in capsys.readouterr().out
    report = json.loads(out.read_text())
    assert (report["temperature"], report["task"]) == (0.0, "chance_task")
    texts = [answer["text"] for answer in report["models"][0]["answers"]]
    assert all(len(set(texts[i : i + 3])) == 1 for i in range(0, len(texts), 3))


# ---------------------------------------------------------------- errors, names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "neither a model directory .* nor a run"),
        (["nowhere", "--show"], "samples.jsonl does not exist; wanted the directory of a run"),
        (["{model}", "--temperature", "-1"], "--temperature -1.0: wanted 0 or more"),
        (["{model}", "{model}", "{model}"], "3 models were given"),
        (["{model}", "{model}", "--ask", "7"], "2 models were given"),
        (["{model}", "--samples", "0"], "at least 1"),
        (["{model}", "--json", "nowhere/report.json"], "there is no directory nowhere"),
        (["{model}", "--ask", "7"], "task=chance_task has no parse_question"),
        (
            ["{model}", "task=asking_task", "--ask", "what?"],
            "'what\\?' is not a question; write a number",
        ),
        (
            ["{model}", "task=asking_task", "training.max_gen_len=2047", "--ask", "7"],
            "training.max_gen_len=20",
        ),
        (["{model}", "data.tset_size=3"], "did you mean data.test_size"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(
    arguments, message, models, chance_task, capsys
):
    arguments = [argument.format(model=models / "first") for argument in arguments]
    assert evaluate.main([arguments[0], *chance_task, *arguments[1:]]) == 2
    shown = capsys.readouterr()
    assert re.search(message, shown.err)
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert not shown.out


def test_a_missing_gpu_is_named(models, chance_task, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert evaluate.main([str(models / "first"), *chance_task, "model.device=cuda"]) == 2
    assert "add model.device=cpu" in capsys.readouterr().err


def test_every_metric_stands_in_the_docs():
    text = (ROOT / "docs" / "metrics.md").read_text()
    episodes = [
        Episode(0, [1], [2], [-1.0], True, "", Reward(r, {"answer": r, "format": r, "error": r}))
        for r in (0.0, 1.0)
    ]
    stats = UpdateStats(loss=0.0, grad_norm=0.0, num_tokens=2, skipped="a reason")
    names = {
        *step_metrics(episodes, stats, learning_rate=1e-3, num_answers=2),
        *evaluation_metrics(episodes),
    }
    assert len(names) > 25
    assert not {name for name in names if f"| `{name}`" not in text and f", `{name}`" not in text}
