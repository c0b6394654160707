"""The small base model: its traces are right, honest and well-formed, its tokenizer spells them in whole words, Muon is torch's."""

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


def value(a: int, operation: str, b: int) -> Fraction:
    return {
        "+": Fraction(a + b),
        "-": Fraction(a - b),
        "*": Fraction(a * b),
        "/": Fraction(a, b) if b else None,
    }[operation]


def problems(count: int):
    """Numbers and a target that some attempt reaches; zeros and equal numbers included."""
    rng = random.Random(0)
    while count:
        numbers = [rng.randint(0, 10) for _ in range(3)]
        reached = sorted(
            {v for pair in all_attempts(numbers) for _, seconds in pair for _, _, v in seconds}
        )
        yield numbers, rng.choice(reached)
        count -= 1


@pytest.fixture(scope="module")
def traces():
    rng = random.Random(1)
    return [(n, t, make_trace(all_attempts(n), t, rng)) for n, t in problems(400) for _ in range(5)]


def first_steps(trace: str) -> list[str]:
    return re.findall(r"\n (\d+ [-+*/] \d+ = \d+)", trace)


# --- what it imitates


def test_every_equation_is_right_and_uses_each_number_once(traces):
    # Catches: `difference` with the wrong sign; the third number mistaken for one of the first two; `value <= largest` dropped.
    for numbers, _, trace in traces:
        for line in trace.split("</think>")[0].split("\n")[1:]:
            first, *others = EQUATION.findall(line)
            left = Counter(numbers) - Counter([int(first[0]), int(first[2])])
            assert sum(left.values()) == 1, (numbers, line)
            for (a, operation, b, result), largest in (
                (first, MAX_FIRST),
                *((other, MAX_SECOND) for other in others),
            ):
                assert value(int(a), operation, int(b)) == int(result) <= largest, (numbers, line)
            for a, _, b, _ in others:
                assert Counter([int(a), int(b)]) == left + Counter([int(first[3])]), (numbers, line)


def test_every_verdict_is_honest_and_the_last_decides(traces):
    # Catches: `yes` where the value is not the target; a trace that goes on after a hit.
    for _, target, trace in traces:
        verdicts = re.findall(r"= (\d+), want (\d+): (yes|no)", trace)
        assert all(
            int(want) == target and (int(got) == target) == (verdict == "yes")
            for got, want, verdict in verdicts
        )
        assert "yes" not in [verdict for _, _, verdict in verdicts[:-1]]
        assert ("I give up" in trace) == (verdicts[-1][2] == "no")


def test_the_answer_is_the_last_attempt_and_scores_as_the_verdict_says(traces):
    # Catches: the parentheses around the first step dropped; the answer of another attempt.
    for numbers, target, trace in traces:
        reward = reward_function(trace, numbers, target)
        assert reward.parts == {"format": 1.0, "answer": float("yes" in trace)}, trace


def test_no_first_step_comes_twice(traces):
    # Catches: rng.sample -> rng.choices; `not in known` dropped, which shows where two numbers are equal.
    for _, _, trace in traces:
        firsts = first_steps(trace)
        assert len(firsts) == len(set(firsts)) >= 1


def test_a_pair_is_tried_to_its_end_before_the_next(traces):
    # Catches: the first steps of all pairs shuffled together.
    for numbers, _, trace in traces:
        steps = [[first for first, _ in pair] for pair in all_attempts(numbers)]
        order = [
            next(i for i, pair in enumerate(steps) if first in pair) for first in first_steps(trace)
        ]
        tried = [(pair, len(list(times))) for pair, times in groupby(order)]
        assert len({pair for pair, _ in tried}) == len(tried)
        assert all(times == len(steps[pair]) for pair, times in tried[:-1])


def test_a_base_model_gives_up_more_often_than_not(traces):
    hits = sum("yes" in trace for _, _, trace in traces) / len(traces)
    assert 0.3 < hits < 0.6


# --- its tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tiny") / "model"
    warm_start.make_tokenizer(directory)
    return Tokenizer.from_pretrained(directory)


def test_prompts_and_traces_are_spelled_in_words(tokenizer, traces):
    # Catches: a phrase left out of PHRASES; numbers only up to MAX_SECOND; a sentence of the prompt cut in another place.
    for numbers, target, trace in traces:
        prompt = render_prompt({"numbers": numbers, "target": target}, tokenizer)
        for text in (prompt, trace + "<|im_end|>"):
            ids = tokenizer.encode(text)
            assert tokenizer.decode(ids) == text
            words = [tokenizer.decode([i]) for i in ids]
            assert all(len(word) > 1 or word.isdigit() or word in "()\n" for word in words)
            if text != prompt:
                assert [word for word in words if word.isdigit()] == re.findall(r"\d+", text)
        assert tokenizer.encode(trace + "<|im_end|>")[-1] in tokenizer.stop_ids


# --- Muon


SHAPES = [(37, 11), (11, 37), (13, 13), (60, 20), (5, 97)]


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalise_moves_singular_values_as_torchs_coefficients_do(shape):
    # Catches: any coefficient changed in its last digit; four or six steps; a tall matrix not turned.
    a, b, c = inspect.signature(torch.optim.Muon).parameters["ns_coefficients"].default
    matrix = 100 * torch.randn(
        shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = a * values + b * values**3 + c * values**5
    assert values.min() > 0.6
    assert values.max() < 1.2
    torch.testing.assert_close(
        orthogonalise(matrix), left @ values.diag() @ right, rtol=1e-9, atol=1e-9
    )
    torch.testing.assert_close(
        orthogonalise(matrix.float()).double(), left @ values.diag() @ right, rtol=1e-4, atol=1e-4
    )


def test_a_gradient_of_zeros_moves_nothing():
    # Catches: `.clamp(min=1e-7)` dropped: 0 / 0.
    assert not orthogonalise(torch.zeros(3, 5)).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_steps_are_those_of_torchs_muon(shape):
    # Catches: the momentum's 0.95; Nesterov's step left out; `** 0.5` or `max` in the scale; the sign.
    # torch iterates in bf16, which is off by up to 2 %.
    generator = torch.Generator().manual_seed(0)
    ours = nn.Parameter(torch.randn(shape, generator=generator))
    theirs = nn.Parameter(ours.detach().clone())
    average, reference = torch.zeros(shape), torch.optim.Muon([theirs], weight_decay=0.0)
    for step in range(5):
        before = ours.detach().clone()
        theirs.data.copy_(before)
        ours.grad = (1 + step) * torch.randn(shape, generator=generator)
        theirs.grad = ours.grad.clone()
        reference.param_groups[0]["lr"] = 0.1 / (1 + step)
        reference.step()
        muon_step([ours], [average], lr=0.1 / (1 + step))
        assert (ours - theirs).norm() < 0.035 * (theirs - before).norm()


# --- the command


def test_a_supervised_step_goes_against_the_gradient_of_the_mean_loss(tokenizer, traces):
    # Catches: either optimizer's step left out, or its sign; prompts trained too; a mean per trace; rates that rise from 0.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = new_model(tokenizer, hidden_size=32, num_layers=1)
    plain = Transformer(model.config)
    plain.load_state_dict(model.state_dict())
    examples = [{"numbers": numbers, "target": target} for numbers, target, _ in traces]
    groups = list(islice(example_groups(examples, tokenizer, random.Random(0)), 32))
    warm_start.train_supervised(model, tokenizer, iter(groups), steps=1)
    loss, count = 0.0, 0
    for prompt, responses in groups:
        for response in responses:
            start, ids = len(tokenizer.encode(prompt)), tokenizer.encode(prompt + response)
            logits_TV = plain(torch.tensor([ids]))[0, start - 1 : -1, : tokenizer.vocab_size]
            loss = loss + F.cross_entropy(logits_TV, torch.tensor(ids[start:]), reduction="sum")
            count += len(ids) - start
    (loss / count).backward()
    matrices = []
    for (name, parameter), start in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (parameter.grad - start.grad).norm() < 1e-3 * start.grad.norm(), name
        step = (start - parameter).detach()
        assert (step * start.grad).sum() > 0, name
        if step.ndim == 2 and "layers" in name:
            values = torch.linalg.svdvals(step) / max(1.0, step.shape[0] / step.shape[1]) ** 0.5
            assert values.max() == pytest.approx(warm_start.LEARNING_RATE_MATRICES, rel=0.25), name
            matrices.append(name)
    assert len(matrices) == 7


def test_the_command_makes_a_model_that_loads(tmp_path, capsys):
    # Catches: the partial directory left behind; a model of another vocabulary than its tokenizer; made_for.json with other ids.
    out = tmp_path / "new/tiny"
    assert warm_start.main(["--out", str(out), "--steps", "1", "--seed", "3"]) == 0
    tokenizer = Tokenizer.from_pretrained(out)
    model = Transformer.from_pretrained(out, device="cpu", dtype=torch.float32)
    assert tokenizer.vocab_size <= model.config.vocab_size < tokenizer.vocab_size + 64
    made_for = json.loads((out / "made_for.json").read_text())
    assert made_for["prompt_token_ids"] == tokenizer.encode(
        render_prompt(made_for["problem"], tokenizer)
    )
    assert [path.name for path in out.parent.iterdir()] == ["tiny"]
    assert str(out) in capsys.readouterr().out
    assert warm_start.main(["--out", str(out)]) == 2
    assert "exists" in capsys.readouterr().err
    assert (
        Transformer.from_pretrained(out, device="cpu", dtype=torch.float32).config == model.config
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--steps", "0"], "--steps 0"), (["--out", "."], "exists"), (["--out", "/"], "exists")],
)
def test_what_cannot_be_made_is_said_in_one_line(arguments, said, tmp_path, capsys):
    assert warm_start.main(["--out", str(tmp_path / "tiny"), *arguments]) == 2
    message = capsys.readouterr().err
    assert said in message
    assert message.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_an_interrupted_run_leaves_nothing_behind(tmp_path, monkeypatch, capsys):
    # Catches: the model made in place instead of aside.
    def interrupt(matrices, averages, *, lr):
        raise KeyboardInterrupt

    monkeypatch.setattr(warm_start, "muon_step", interrupt)
    assert warm_start.main(["--out", str(tmp_path / "tiny"), "--steps", "1"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not list(tmp_path.iterdir())
