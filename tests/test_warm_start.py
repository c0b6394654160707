"""The small base model: its traces, its tokenizer, Muon, supervised training and the command."""

import inspect
import json
import random
import re
from collections import Counter
from fractions import Fraction
from itertools import groupby, islice

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import warm_start
from countdown_task import render_prompt, reward_function
from qwen2_model import Transformer
from tokenizer import Tokenizer
from warm_start import (
    MAX_FIRST,
    MAX_SECOND,
    all_attempts,
    example_groups,
    make_trace,
    muon_step,
    new_model,
    orthogonalise,
)

EQUATION = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


def random_problem(rng: random.Random) -> tuple[list[int], int]:
    """Three numbers, zeros and equal ones included, and a target that some attempt reaches."""
    numbers = [rng.randint(0, 10) for _ in range(3)]
    first_steps = [first for pair in all_attempts(numbers) for first in pair]
    values = {second.value for first in first_steps for second in first.second_steps}
    return numbers, rng.choice(sorted(values))


@pytest.fixture(scope="module")
def traces() -> list[tuple[list[int], int, str]]:
    """(numbers, target, trace): five traces for each of 400 problems."""
    rng = random.Random(0)
    traces = []
    for _ in range(400):
        numbers, target = random_problem(rng)
        for _ in range(5):
            traces.append((numbers, target, make_trace(all_attempts(numbers), target, rng)))
    return traces


def first_steps_of(trace: str) -> list[str]:
    return re.findall(r"\n (\d+ [-+*/] \d+ = \d+)", trace)


# ---------------------------------------------------------------- traces


def evaluate(a: str, operator: str, b: str) -> Fraction:
    x, y = Fraction(a), Fraction(b)
    if operator == "/":
        return x / y
    return {"+": x + y, "-": x - y, "*": x * y}[operator]


def test_every_equation_is_correct_and_uses_each_number_once(traces):
    # Catches: `order` reversed; `third` replaced by `left`; `value <= largest` dropped.
    for numbers, _, trace in traces:
        for line in trace.split("</think>")[0].split("\n")[1:]:
            first, *seconds = EQUATION.findall(line)
            third = Counter(numbers) - Counter([int(first[0]), int(first[2])])
            assert third.total() == 1, (numbers, line)
            assert evaluate(*first[:3]) == int(first[3]) <= MAX_FIRST, (numbers, line)
            for a, operator, b, value in seconds:
                assert evaluate(a, operator, b) == int(value) <= MAX_SECOND, (numbers, line)
                assert Counter([int(a), int(b)]) == third + Counter([int(first[3])]), line


def test_every_verdict_is_true_and_success_ends_the_trace(traces):
    # Catches: `success` negated; a trace that goes on after a success.
    for _, target, trace in traces:
        verdicts = re.findall(r"= (\d+), want (\d+): (yes|no)", trace)
        for value, want, verdict in verdicts:
            assert int(want) == target
            assert (int(value) == target) == (verdict == "yes")
        assert "yes" not in [verdict for _, _, verdict in verdicts[:-1]]
        assert ("I give up" in trace) == (verdicts[-1][2] == "no")


def test_the_answer_is_the_last_attempt(traces):
    # Catches: the parentheses around the first step dropped; the answer of another attempt.
    for numbers, target, trace in traces:
        reward = reward_function(trace, numbers, target)
        assert reward.parts == {"format": 1.0, "answer": float("yes" in trace)}, trace


def test_no_first_step_repeats(traces):
    # Catches: rng.sample -> rng.choices; `expression in known` not checked (equal numbers).
    for _, _, trace in traces:
        steps = first_steps_of(trace)
        assert len(steps) == len(set(steps)) >= 1


def test_a_pair_is_finished_before_the_next_one_starts(traces):
    # Catches: the first steps of all pairs shuffled together.
    for numbers, _, trace in traces:
        pairs = [[first.text for first in pair] for pair in all_attempts(numbers)]
        order = []
        for step in first_steps_of(trace):
            order.append(next(i for i, pair in enumerate(pairs) if step in pair))
        tried = [(pair, len(list(steps))) for pair, steps in groupby(order)]
        assert len({pair for pair, _ in tried}) == len(tried)
        assert all(count == len(pairs[pair]) for pair, count in tried[:-1])


def test_about_half_of_the_traces_give_up(traces):
    successes = sum("yes" in trace for _, _, trace in traces) / len(traces)
    assert 0.3 < successes < 0.6


# ---------------------------------------------------------------- tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    warm_start.make_tokenizer(directory)
    return Tokenizer.from_pretrained(directory)


def test_prompts_and_traces_consist_of_whole_numbers_and_phrases(tokenizer, traces):
    # Catches: a phrase left out of PHRASES; numbers only up to MAX_SECOND; a wrong prompt sentence.
    for numbers, target, trace in traces:
        answer = trace + "<|im_end|>"
        prompt = render_prompt({"numbers": numbers, "target": target}, tokenizer)
        for text in (prompt, answer):
            ids = tokenizer.encode(text)
            tokens = [tokenizer.decode([i]) for i in ids]
            assert "".join(tokens) == tokenizer.decode(ids) == text
            assert all(len(token) > 1 or token.isdigit() or token in "()\n" for token in tokens)
        assert [token for token in tokens if token.isdigit()] == re.findall(r"\d+", answer)
        assert ids[-1] in tokenizer.stop_ids


# ---------------------------------------------------------------- Muon


SHAPES = [(37, 11), (11, 37), (13, 13), (60, 20), (5, 97)]


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalise_changes_only_singular_values(shape):
    # Catches: the last digit of a coefficient; four or six steps; a tall matrix not transposed.
    a, b, c = inspect.signature(torch.optim.Muon).parameters["ns_coefficients"].default
    generator = torch.Generator().manual_seed(0)
    matrix = 100 * torch.randn(shape, generator=generator, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    assert values.min() > 0.6
    assert values.max() < 1.2
    wanted = left @ values.diag() @ right
    torch.testing.assert_close(orthogonalise(matrix), wanted, rtol=1e-9, atol=1e-9)
    in_float32 = orthogonalise(matrix.float()).double()
    torch.testing.assert_close(in_float32, wanted, rtol=1e-4, atol=1e-4)


def test_a_zero_gradient_stays_zero():
    # Catches: `.clamp(min=1e-7)` dropped, which gives 0 / 0.
    assert not orthogonalise(torch.zeros(3, 5)).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_muon_steps_equal_torchs(shape):
    # Catches: MUON_MOMENTUM changed; no Nesterov momentum; `** 0.5` or `max` dropped; the sign.
    # torch.optim.Muon iterates in bf16, which is off by up to 2 %.
    generator = torch.Generator().manual_seed(0)
    ours = nn.Parameter(torch.randn(shape, generator=generator))
    theirs = nn.Parameter(ours.detach().clone())
    buffer, reference = torch.zeros(shape), torch.optim.Muon([theirs], weight_decay=0.0)
    for step in range(5):
        before = ours.detach().clone()
        theirs.data.copy_(before)
        ours.grad = (1 + step) * torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        reference.param_groups[0]["lr"] = 0.1 / (1 + step)
        reference.step()
        muon_step([ours], [buffer], lr=0.1 / (1 + step))
        assert (ours - theirs).norm() < 0.035 * (theirs - before).norm()


# ---------------------------------------------------------------- training and the command


def test_a_supervised_step_descends_the_mean_loss_of_all_trace_tokens(tokenizer, traces):
    # Catches: a step of either optimizer left out, or its sign; prompts trained; a mean per trace;
    # learning rates that rise from 0.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = new_model(tokenizer, hidden_size=32, num_layers=1)
    reference = Transformer(model.config)
    reference.load_state_dict(model.state_dict())
    problems = [{"numbers": numbers, "target": target} for numbers, target, _ in traces]
    groups = list(islice(example_groups(problems, tokenizer, random.Random(0)), 32))
    warm_start.train_supervised(model, tokenizer, iter(groups), steps=1)

    loss, count = torch.zeros(()), 0
    for prompt, answers in groups:
        start = len(tokenizer.encode(prompt))
        for answer in answers:
            ids = torch.tensor(tokenizer.encode(prompt + answer))
            logits_TV = reference(ids[None])[0, start - 1 : -1, : tokenizer.vocab_size]
            loss = loss + F.cross_entropy(logits_TV, ids[start:], reduction="sum")
            count += len(ids) - start
    (loss / count).backward()

    old, new = dict(reference.named_parameters()), dict(model.named_parameters())
    num_matrices = 0
    for name in new:
        gradient = old[name].grad
        assert (new[name].grad - gradient).norm() < 1e-3 * gradient.norm(), name
        step = (old[name] - new[name]).detach()
        assert (step * gradient).sum() > 0, name
        if step.ndim == 2 and "layers" in name:
            scale = max(1.0, step.shape[0] / step.shape[1]) ** 0.5
            largest = torch.linalg.svdvals(step).max() / scale
            assert largest == pytest.approx(warm_start.MUON_LEARNING_RATE, rel=0.25), name
            num_matrices += 1
    assert num_matrices == 7


def test_the_command_makes_a_model_that_loads(tmp_path, capsys):
    # Catches: a temporary directory left behind; made_for.json with other ids; a small vocab_size.
    out = tmp_path / "new/tiny"
    assert warm_start.main(["--out", str(out), "--steps", "1", "--seed", "3"]) == 0
    tokenizer = Tokenizer.from_pretrained(out)
    model = Transformer.from_pretrained(out, device="cpu", dtype=torch.float32)
    assert tokenizer.vocab_size <= model.config.vocab_size < tokenizer.vocab_size + 64
    made_for = json.loads((out / "made_for.json").read_text())
    prompt = render_prompt(made_for["problem"], tokenizer)
    assert made_for["prompt_token_ids"] == tokenizer.encode(prompt)
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
    assert str(out) in capsys.readouterr().out

    weights = (out / "model.safetensors").read_bytes()
    assert warm_start.main(["--out", str(out)]) == 2
    assert "exists; remove it" in capsys.readouterr().err
    assert (out / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["--steps", "0"], "--steps 0"), (["--out", "."], "exists"), (["--out", "/"], "exists")],
)
def test_bad_arguments_are_refused_in_one_line(arguments, message, tmp_path, capsys):
    assert warm_start.main(["--out", str(tmp_path / "tiny"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    # Catches: the model made in `out` itself instead of a temporary directory.
    def interrupt(matrices, momentum_buffers, *, lr):
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_start, "muon_step", interrupt)
    assert warm_start.main(["--out", str(tmp_path / "tiny"), "--steps", "1"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not list(tmp_path.iterdir())
