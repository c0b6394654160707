"""The GSM8K example: its reward, its data, and a model that trains on it."""

import json
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
import train
from examples import gsm8k_task
from grpo import make_question, rollout
from harness.rewards import load_task
from qwen2_model import Transformer
from tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
ROWS = [
    {
        "question": f"Ann has {i} apples and buys {i}: how many?",
        "answer": f"{i} + {i}\n#### {2 * i}",
    }
    for i in range(11)
]


def write_rows(path: Path, rows: list) -> SimpleNamespace:
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return SimpleNamespace(path=str(path), test_size=3)


# ---------------------------------------------------------------- reward


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("18", "18"),
        (" 18\n", "18"),
        ("18.0", "18"),
        ("18.", "18"),
        ("-3", "-3"),
        ("+3", "3"),
        ("$1,234.50", "1234.5"),
        ("-$5", "-5"),
        ("$ 7", "7"),
        ("0.1", "0.1"),
        ("1,234,567", "1234567"),
        ("007", "7"),
    ],
)
def test_a_number_is_read_exactly(text, number):
    assert gsm8k_task.parse_number(text) == Decimal(number)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "$",
        "eighteen",
        "18 apples",
        "1,23",
        "1,2345",
        ",5",
        "1.2.3",
        "1e3",
        "inf",
        "nan",
        "١٨",
        "½",
        "--3",
        "9" * 31,
        "1/2",
        "1_000",
        "$$5",
    ],
)
def test_anything_else_is_none(text):
    assert gsm8k_task.parse_number(text) is None


@pytest.mark.parametrize(
    ("response", "answer", "format"),
    [
        ("9 + 9 = 18</think>\n<answer>18</answer>", 1, 1),
        ("</think><answer>$18.00</answer>  \n", 1, 1),
        # Catches: float() instead of Decimal().
        ("</think> <answer>18.000000000000000000000000000001</answer>", 0, 1),
        ("</think> <answer>17</answer>", 0, 1),
        ("</think> <answer>17</answer> no, <answer>18</answer>", 1, 0),
        ("</think> so <answer>18</answer>", 1, 0),
        ("</think> <answer>18</answer> done", 1, 0),
        ("<think></think> <answer>18</answer>", 1, 0),
        ("</think> </think> <answer>18</answer>", 1, 0),
        ("<answer>18</answer>", 0, 0),  # an answer inside the thinking does not count
        ("<answer>18</answer></think>", 0, 0),
        ("</think> <answer>18", 0, 0),
        ("</think> 18</answer>", 0, 0),
        ("18", 0, 0),
        ("", 0, 0),
        ("</think>" + "<answer>" * 10_000, 0, 0),
    ],
)
def test_the_reward_of_responses_scored_by_hand(response, answer, format):
    reward = gsm8k_task.reward_function(response, question="?", number=Decimal(18))
    assert reward.parts == {"answer": answer, "format": format}
    assert reward.total == pytest.approx(answer + 0.1 * format)


# ---------------------------------------------------------------- problems


def test_the_last_rows_are_held_out_and_never_trained_on(tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [ROWS[9], *ROWS[:8], "", *ROWS[8:]])
    training, test = gsm8k_task.load_problems(data)
    assert [p["number"] for p in test] == [16, 18, 20]
    # Row 9 is in both parts, so it is only held out.
    assert [p["number"] for p in training] == list(range(0, 16, 2))


@pytest.mark.parametrize("answer", [42, 42.0, "42", "41 + 1 = 42\n#### 42", "#### $42.0"])
def test_an_answer_may_be_a_number_or_end_in_one(answer, tmp_path):
    data = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"question": "6 * 7?", "answer": answer}])
    assert gsm8k_task.load_problems(data)[1][-1] == {"question": "6 * 7?", "number": Decimal(42)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "rows.jsonl, line 12, is not valid JSON"),
        ("7", "rows.jsonl, line 12, must be a JSON object, not int"),
        ({"question": "?"}, "rows.jsonl, line 12: answer missing"),
        (
            {"question": "?", "answer": "many"},
            "line 12: the answer 'many' does not end in a number",
        ),
        ({"question": 5, "answer": "5"}, "line 12"),
    ],
)
def test_a_row_that_is_not_a_problem_is_named(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        gsm8k_task.load_problems(write_rows(tmp_path / "rows.jsonl", [*ROWS, row]))


def test_a_file_that_is_missing_or_too_small_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.jsonl does not exist; download"):
        gsm8k_task.load_problems(SimpleNamespace(path=str(tmp_path / "nothing.jsonl"), test_size=3))
    with pytest.raises(
        ValueError, match=r"rows\.jsonl has 3 problems, and data\.test_size=3 leaves none"
    ):
        gsm8k_task.load_problems(write_rows(tmp_path / "rows.jsonl", ROWS[:3]))


def test_a_question_may_contain_stop_tokens_and_tags(tmp_path, base_model):
    # Catches: a prompt cut at a stop token; tags in the question taken for the answer's.
    question = "Ann says <|im_end|></think>\n<answer>18</answer> and {braces}: how many?"
    data = write_rows(tmp_path / "rows.jsonl", [*ROWS, {"question": question, "answer": "18"}])
    problem = gsm8k_task.load_problems(data)[1][-1]
    tokenizer = Tokenizer.from_pretrained(base_model)
    asked = make_question(gsm8k_task, problem, tokenizer)
    assert question in asked.prompt
    assert tokenizer.decode(asked.prompt_token_ids) == asked.prompt
    assert gsm8k_task.reward_function("no idea</think>", **problem).total == 0
    model = Transformer.from_pretrained(base_model, device="cpu", dtype=torch.float32)
    drawn = rollout(
        model,
        tokenizer,
        [asked],
        num_answers=8,
        max_gen_len=9,
        temperature=1.0,
        reward_function=gsm8k_task.reward_function,
        generator=torch.Generator().manual_seed(0),
    )
    assert {len(e.response_token_ids) for e in drawn} - {1}


# ---------------------------------------------------------------- a whole run


def test_gsm8k_is_a_task():
    assert load_task("examples.gsm8k_task") is gsm8k_task


@pytest.mark.usefixtures("own_signals")
def test_a_model_trains_on_it_from_the_command_line_to_the_evaluation(base_model, tmp_path, capsys):
    write_rows(tmp_path / "rows.jsonl", ROWS)
    run = tmp_path / "run"
    arguments = [
        f"--config={ROOT / 'examples/config_gsm8k.yaml'}",
        f"output_dir={run}",
        f"model.path={base_model}",
        "model.device=cpu",
        "model.dtype=float32",
        f"data.path={tmp_path / 'rows.jsonl'}",
        "data.test_size=3",
        "training.max_steps=2",
        "training.batch_size=8",
        "training.num_questions_per_batch=4",
        "training.max_gen_len=29",
        "training.skip_unfinished_episodes=false",
    ]
    assert train.main(arguments) == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r for r in records if "reward" in r]
    evaluations = [r for r in records if "eval/success" in r]
    assert [r["step"] for r in steps] == [1, 2]
    assert {"rewards/answer", "rewards/format"} <= steps[0].keys()
    assert [r["eval/questions"] for r in evaluations] == [3, 3]
    # From the checkpoint and the run's config, evaluate.py repeats the run's last evaluation.
    # Catches: a different purpose passed to seeded_generator.
    capsys.readouterr()
    assert evaluate.main([str(run), "--json", str(tmp_path / "report.json")]) == 0
    [model] = json.loads((tmp_path / "report.json").read_text())["models"]
    for name in ("success", "success_low", "success_high", "reward", "mean_length", "finished"):
        assert model[name] == evaluations[-1][f"eval/{name}"]
