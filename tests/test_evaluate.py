"""evaluate.py, run as a command on small random models."""

import itertools
import json
import re
import shutil
from pathlib import Path
from statistics import fmean

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as FastTokenizer

import evaluate
from tests.helpers import add_checksums
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
    """Chance decides: half of the answers to two numbers succeed, a third of those to three."""
    answer = float(sum(map(ord, response)) % len(numbers) == 0)
    return Reward(answer + 0.25, {"answer": answer})

def problem_kind(problem):
    return f"{len(problem['numbers'])} of them"
'''
PARSE = """
def parse_question(text):
    if not text.isdigit():
        raise ValueError(f'{text!r} is not a question; write a number, for example "7"')
    return {"numbers": [int(text), 1]}
"""
CONFIG = (
    f"extends: {ROOT}/config.yaml\ntask: chance_task\nmodel:\n  device: cpu\n  dtype: float32\n"
)
ASK = ["task=asking_task", "--ask", "7"]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two model directories with one tokenizer and different random weights."""
    directory = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "second")):
        make_tokenizer(directory / name)
        tokenizer = Tokenizer.from_pretrained(directory / name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            new_model(tokenizer, hidden_size=16, num_layers=1).save_pretrained(directory / name)
    return directory


@pytest.fixture
def chance_task(tmp_path, monkeypatch):
    """Options that select a task whose answers succeed by chance."""
    (tmp_path / "chance_task.py").write_text(TASK)
    (tmp_path / "asking_task.py").write_text(TASK + PARSE)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "chance.yaml").write_text(CONFIG)
    config = str(tmp_path / "chance.yaml")
    return ["--config", config, "data.test_size=13", "training.max_gen_len=23"]


def scored(*arguments, report: Path) -> dict:
    """Run the command; return the report that it writes."""
    assert evaluate.main([*map(str, arguments), "--json", str(report)]) == 0
    return json.loads(report.read_text())


# ---------------------------------------------------------------- held-out questions


def pass_at_k_by_hand(answers: list[dict], k: int) -> float:
    """The share of all choices of k answers that contain a success, averaged over questions."""
    groups = itertools.groupby(answers, key=lambda a: a["question"])
    questions = [[a["success"] for a in group] for _, group in groups]
    return fmean(fmean(map(any, itertools.combinations(q, k))) for q in questions)


def success_of(answers: list[dict]) -> float:
    return fmean(a["success"] for a in answers)


# Catches: pass_at_k with k and samples swapped; episodes grouped by another question's kind.
def test_the_report_follows_from_the_answers_in_it(models, chance_task, tmp_path, capsys):
    report = scored(
        models / "first",
        models / "second",
        *chance_task,
        "--samples",
        5,
        report=tmp_path / "report.json",
    )
    shown = capsys.readouterr().out
    for model in report["models"]:
        answers = model["answers"]
        assert [a["question"] for a in answers] == [i for i in range(13) for _ in range(5)]
        for answer in answers:
            succeeds = sum(map(ord, answer["text"])) % len(answer["problem"]["numbers"]) == 0
            assert answer["success"] == (answer["parts"]["answer"] == 1) == succeeds
        assert model["success"] == pytest.approx(success_of(answers))
        for k in (1, 2, 4, 5):
            assert model["pass_at"][str(k)] == pytest.approx(pass_at_k_by_hand(answers, k))
        assert model["by_kind"].keys() == {"2 of them", "3 of them"}
        for kind, part in model["by_kind"].items():
            of_kind = [a for a in answers if len(a["problem"]["numbers"]) == int(kind[0])]
            assert part["success"] == pytest.approx(success_of(of_kind))
            assert part["questions"] == len(of_kind) / 5 == {"2": 7, "3": 6}[kind[0]]
            assert f"{success_of(of_kind):.1%} (" in shown
        assert model["mean_length"] == pytest.approx(fmean(a["length"] for a in answers))
        assert model["finished"] == pytest.approx(fmean(a["finished"] for a in answers))
        assert 0 < model["finished"] < 1, "the test needs finished and unfinished answers"
        interval = f"({model['success_low']:.1%} … {model['success_high']:.1%})"
        assert f"{success_of(answers):.1%} {interval}" in shown
    first, second = (success_of(model["answers"]) for model in report["models"])
    assert report["comparison"]["difference"] == pytest.approx(second - first)
    assert f"p = {report['comparison']['p']:.2g}" in shown


# Catches: one generator shared by both models.
def test_every_model_gets_the_same_random_numbers(models, chance_task, tmp_path, capsys):
    model = models / "first"
    report = scored(model, model, *chance_task, report=tmp_path / "report.json")
    assert report["models"][0] == report["models"][1]
    equal = {"difference": 0.0, "questions_better": 0, "questions_worse": 0, "p": 1.0}
    assert report["comparison"] == equal
    assert (
        "difference +0.0 points: better on 0 questions, worse on 0, p = 1 "
        in capsys.readouterr().out
    )


# Catches: max(self.temperature, GREEDY) -> 1.0; the temperature not recorded.
def test_temperature_0_takes_the_likeliest_token(models, chance_task, tmp_path, capsys):
    options = ["--temperature", 0, "--samples", 3]
    report = scored(models / "first", *chance_task, *options, report=tmp_path / "report.json")
    assert "greedy" in capsys.readouterr().out
    assert (report["temperature"], report["task"]) == (0.0, "chance_task")
    texts = [answer["text"] for answer in report["models"][0]["answers"]]
    assert all(len(set(texts[i : i + 3])) == 1 for i in range(0, len(texts), 3))


# ---------------------------------------------------------------- runs and checkpoints


@pytest.fixture
def run(models, chance_task, tmp_path):
    """A run of chance_task with three checkpoints."""
    for step, source in ((3, "first"), (20, "second"), (100, "second")):
        checkpoint = tmp_path / "run/checkpoints" / f"step-{step:06d}"
        shutil.copytree(models / source, checkpoint)
        state = {"step": step, "optimizer_steps": step, "log_sizes": {}, "config": {}}
        (checkpoint / "trainer.json").write_text(json.dumps(state))
        save_file({"exp_avg": torch.zeros(3)}, checkpoint / "optimizer.tensors")
        add_checksums(checkpoint)
    (tmp_path / "run/config.yaml").write_text(CONFIG)
    return tmp_path / "run"


SHORT = ["data.test_size=2", "training.max_gen_len=3"]


# Catches: sizes compared instead of checksums; the run's config not used for its checkpoint or for
# another model beside it.
def test_a_run_means_its_newest_good_checkpoint_and_its_config(run, models, capsys):
    newest, middle, oldest = (run / "checkpoints" / f"step-{step:06d}" for step in (100, 20, 3))
    assert evaluate.main([str(run), *SHORT]) == 0
    assert str(newest) in capsys.readouterr().out
    weights = bytearray((newest / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (newest / "model.safetensors").write_bytes(weights)
    assert evaluate.main([str(run), *SHORT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"skipping {newest}: model.safetensors is damaged")
    assert str(middle) in "".join(lines[1:])
    assert evaluate.main([str(oldest), *SHORT]) == 0
    assert evaluate.main([str(models / "first"), str(run), *SHORT]) == 0


# Catches: check_files left out for a directory that has a config.json.
def test_a_damaged_checkpoint_is_refused(run, tmp_path, capsys):
    checkpoint = run / "checkpoints/step-000003"
    shutil.copytree(checkpoint, tmp_path / "copy")
    config = ["--config", str(run / "config.yaml")]
    assert evaluate.main([str(tmp_path / "copy"), *config, *SHORT]) == 0  # its name is not checked
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


# Catches: task.load_problems called in place of load_problems; no warning about UNCOUNTED.
@pytest.mark.parametrize(
    ("name", "source", "data", "code", "message"),
    [
        ("no_answer", TASK.replace('"answer"', '"solved"'), "test_size", 0, "warning: no reward"),
        (
            "empty",
            TASK.replace("range(data.test_size)", "()"),
            "test_size",
            2,
            "0 held-out problems",
        ),
        ("other_keys", TASK.replace("numbers):", "x):"), "test_size", 2, "cannot be called"),
        ("own_data", TASK + DATA, "count", 0, "3 held-out questions"),
    ],
    ids=["no answer", "no problems", "other keys", "its own data section"],
)
def test_a_task_is_checked_as_in_training(
    name, source, data, code, message, models, tmp_path, monkeypatch, capsys
):
    (tmp_path / f"{name}_task.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "task.yaml").write_text(CONFIG.replace("chance_task", f"{name}_task"))
    config = ["--config", str(tmp_path / "task.yaml")]
    changes = ["training.max_gen_len=5", f"data={{{data}: 3, path: x}}"]
    if data == "count":
        changes[1] = "data={count: 3}"
    assert evaluate.main([str(models / "first"), *config, *changes]) == code
    assert message in "".join(capsys.readouterr())


# Catches: only train.py compares the tokenizer with the model, so that a prompt or a stop token
# beyond the embedding is an IndexError.
@pytest.mark.parametrize("options", [SHORT, ASK], ids=["score", "ask"])
def test_a_tokenizer_with_tokens_that_the_model_lacks_is_refused(
    options, models, chance_task, tmp_path, capsys
):
    shutil.copytree(models / "first", tmp_path / "added")
    fast = FastTokenizer.from_file(str(tmp_path / "added/tokenizer.json"))
    rows = json.loads((tmp_path / "added/config.json").read_text())["vocab_size"]
    fast.add_special_tokens([f"<more {i}>" for i in range(rows)])
    fast.save(str(tmp_path / "added/tokenizer.json"))
    assert evaluate.main([str(tmp_path / "added"), *chance_task, *options]) == 2
    assert f"but the model only {rows} rows; resize" in capsys.readouterr().err


HOSTILE = "\\x1b[31m\\u202e"


# Catches: the table printed as it is.
def test_kinds_of_problems_are_printed_without_control_characters(
    models, chance_task, tmp_path, capsys
):
    (tmp_path / "hostile_kind_task.py").write_text(TASK.replace("of them", HOSTILE))
    arguments = [*SHORT, "task=hostile_kind_task"]
    directories = [str(models / "first"), str(models / "second")]
    assert evaluate.main([*directories, *chance_task, *arguments]) == 0
    shown = capsys.readouterr().out
    assert "  2 \\x1b[31m\\u202e, 1 questions" in shown
    assert "difference" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)


# ---------------------------------------------------------------- one question


# Catches: the end of the prompt printed as it is.
def test_ask_prints_the_prompt_without_control_characters(models, chance_task, tmp_path, capsys):
    (tmp_path / "hostile_prompt_task.py").write_text(TASK.replace("<think>", HOSTILE) + PARSE)
    arguments = ["task=hostile_prompt_task", "--ask", "7", "training.max_gen_len=1"]
    assert evaluate.main([str(models / "first"), *chance_task, *arguments]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("\\x1b[31m\\u202e")
    assert all(c.isprintable() or c == "\n" for c in shown)


# Catches: complete = answer (broken characters are printed); printable left out.
def test_ask_prints_an_answer_by_whole_characters_and_its_reward(
    models, chance_task, monkeypatch, capsys
):
    text = "né 🙂 \x1b[31m\u202e</think>"
    ids = Tokenizer.from_pretrained(models / "first").encode(text + "<|im_end|>")
    assert len(ids) > len(text), "the test needs a character that several tokens make up"
    monkeypatch.setattr(evaluate, "generate_one", lambda *_, **__: iter(ids))
    pieces = []
    monkeypatch.setattr(
        "builtins.print", lambda *values, end="\n", **_: pieces.append(" ".join(values) + end)
    )
    arguments = [str(models / "first"), *chance_task, *ASK, "training.max_gen_len=400"]
    assert evaluate.main(arguments) == 0
    shown = "".join(pieces)
    reward = 0.25 + (sum(map(ord, text)) % 2 == 0)
    assert shown.startswith("<think>né 🙂 \\x1b[31m\\u202e</think>\n")
    assert "\N{REPLACEMENT CHARACTER}" not in shown
    assert shown.endswith(f"reward {reward:g} (answer {reward - 0.25:g})\n")
    assert len(pieces) > 20, "the answer is printed while it is generated"


def test_ask_takes_the_likeliest_tokens_unless_a_temperature_is_given(models, chance_task, capsys):
    # Catches: the default of an evaluation, temperature 1.
    arguments = [str(models / "first"), *chance_task, *ASK]
    shown = []
    for options in ([], ["--temperature", "0"], ["--temperature", "1"]):
        for seed in (1, 2):
            assert evaluate.main([*arguments, f"training.seed={seed}", *options]) == 0
            shown.append(capsys.readouterr().out)
    assert len(set(shown[:4])) == 1
    assert len(set(shown)) == 3


def test_ask_says_that_an_answer_was_cut_off(models, chance_task, capsys):
    arguments = [str(models / "first"), *chance_task, *ASK, "training.max_gen_len=1"]
    assert evaluate.main(arguments) == 0
    assert capsys.readouterr().out.endswith("; cut off after 1 tokens (training.max_gen_len)\n")


# ---------------------------------------------------------------- samples


def sample(**changes) -> dict:
    return {
        "step": 7,
        "kind": "best",
        "question": "What?\n<think>",
        "text": "good",
        "reward": 1.1,
        "advantage": 1.5,
        "parts": {"answer": 1.0, "format": 0.0},
        "length": 3,
        "finished": True,
    } | changes


def write_samples(run: Path, *samples: dict) -> str:
    (run / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return str(run)


def test_samples_are_coloured_by_advantage_on_a_terminal(tmp_path, monkeypatch, capsys):
    run = write_samples(
        tmp_path,
        sample(text="good\n\x1b[2J"),
        sample(text="bad", advantage=-0.5),
        sample(text="neither", advantage=0.0, finished=False),
    )
    assert evaluate.main([run, "--show"]) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain
    assert "good\n\\x1b[2J" in plain
    header = "step 7, best: reward 1.1 (answer 1, format 0); advantage +1.50, 3 tokens\nWhat?"
    assert header in plain
    assert "advantage +0.00, 3 tokens, cut off" in plain
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert evaluate.main([run, "--show"]) == 0
    coloured = capsys.readouterr().out
    for text in ("\x1b[32mgood", "\x1b[31mbad", "\nneither"):
        assert text in coloured
    assert re.sub(r"\x1b\[[0-9]+m", "", coloured) == plain
    monkeypatch.setenv("NO_COLOR", "1")
    assert evaluate.main([run, "--show"]) == 0
    assert capsys.readouterr().out == plain


# Catches: a filter inverted; the question printed with each of its answers.
def test_samples_are_chosen_by_step_and_kind(tmp_path, capsys):
    run = write_samples(tmp_path, sample(), sample(), sample(step=8, kind="worst"))
    for options, answers in (
        ([], 3),
        (["--step", "8"], 1),
        (["--kind", "best"], 2),
        (["--step", "7", "--kind", "best"], 2),
    ):
        assert evaluate.main([run, "--show", *options]) == 0
        shown = capsys.readouterr().out
        assert (shown.count("good"), shown.count("What?")) == (answers, 1)
    assert evaluate.main([run, "--show", "--step", "9"]) == 2
    assert "has no sample of that step and kind" in capsys.readouterr().err


def test_a_number_that_was_not_finite_is_shown_as_nan(tmp_path, capsys):
    run = write_samples(tmp_path, sample(reward=None, advantage=None, parts={"answer": None}))
    assert evaluate.main([run, "--show"]) == 0
    assert "reward nan (answer nan); advantage +nan, 3 tokens" in capsys.readouterr().out


def test_a_damaged_sample_is_one_line(tmp_path, capsys):
    run = write_samples(tmp_path, sample(length=-1))
    assert evaluate.main([run, "--show"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {run}/samples.jsonl, line 1")
    assert error.count("\n") == 1


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "neither a model directory .* nor a run"),
        (["nowhere", "--show"], "samples.jsonl does not exist; wanted the directory of a run"),
        (["{model}", "--temperature", "-1"], "--temperature -1.0: wanted 0 or more"),
        (["{model}", "--temperature", "nan"], "--temperature nan: wanted 0 or more"),
        (["{model}", "{model}", "{model}"], "3 models were given"),
        (["{model}", "{model}", "--ask", "7"], "2 models were given"),
        (["{model}", "--ask", "7", "--samples", "2"], "--samples and --json need held-out"),
        (["{model}", "--samples", "0"], "at least 1"),
        (["{model}", "--json", "nowhere/report.json"], "directory nowhere does not exist"),
        (["{model}", "--ask", "7"], "task=chance_task has no parse_question"),
        (["{model}", "task=asking_task", "--ask", "what?"], "'what\\?' is not a question"),
        (["{model}", *ASK, "training.max_gen_len=2047"], "max_gen_len=20"),
        (["{model}", "data.tset_size=3"], "data.test_size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_user_error_is_one_line_and_exit_code_2(arguments, message, models, chance_task, capsys):
    arguments = [argument.format(model=models / "first") for argument in arguments]
    assert evaluate.main([arguments[0], *chance_task, *arguments[1:]]) == 2
    shown = capsys.readouterr()
    assert re.search(message, shown.err)
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert not shown.out


def test_the_home_directory_is_expanded(models, chance_task, tmp_path, monkeypatch, capsys):
    _, config, *overrides = chance_task
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(models / "first", tmp_path / "model")
    config = f"--config=~/{Path(config).relative_to(tmp_path)}"
    assert evaluate.main(["~/model", config, *overrides, "--json=~/report.json"]) == 0
    assert (tmp_path / "report.json").exists()


def test_a_missing_gpu_is_an_error_with_the_way_out(models, chance_task, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert evaluate.main([str(models / "first"), *chance_task, "model.device=cuda"]) == 2
    assert "model.device=cpu" in capsys.readouterr().err
