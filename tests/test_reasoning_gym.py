"""reasoning-gym as a task. Most tests need the package and skip where it is not installed."""

import importlib.util
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from data_types import Reward
from examples import reasoning_gym_task as task
from harness.config import load_config

ROOT = Path(__file__).parent.parent
needs_package = pytest.mark.skipif(
    importlib.util.find_spec("reasoning_gym") is None, reason="reasoning-gym is not installed"
)

ONE_DIGIT = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}


def make_data(dataset="chain_sum", **changes) -> task.Data:
    return task.Data(**{"dataset": dataset, "test_size": 11, "train_size": 50} | changes)


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)  # the import fails
    task.reasoning_gym.cache_clear()
    with pytest.raises(ValueError, match=r"needs the package reasoning-gym .* --group gym"):
        task.load_problems(make_data())
    task.reasoning_gym.cache_clear()


def test_data_needs_a_dataset():
    with pytest.raises(ValidationError, match="dataset"):
        task.Data(test_size=3)


@needs_package
@pytest.mark.parametrize("dataset", ["chain_sum", "spell_backward", "gsm_symbolic"])
def test_the_verifier_scores_its_own_answers(dataset):
    # Catches: the first answer block scored instead of the last; the format ignored.
    _, test = task.load_problems(make_data(dataset))
    for problem in test:
        right = f"<answer>{problem['entry']['answer']}</answer>"
        everything = Reward(1.1, {"format": 1.0, "answered": 1.0, "answer": 1.0})
        assert task.reward_function(f"I think that\n{right}\n", **problem) == everything
        twice = task.reward_function(f"<answer>no idea</answer> {right}", **problem)
        assert (twice.total, twice.parts["format"]) == (1.0, 0.0)
        late = task.reward_function(f"{right} is it", **problem)
        assert (late.total, late.parts["format"]) == (1.0, 0.0)
        nothing = task.reward_function("no idea", **problem)
        assert nothing == Reward(0.0, {"format": 0.0, "answered": 0.0, "answer": 0.0})


@needs_package
def test_held_out_problems_are_never_trained_on():
    # Catches: `not in self.held_out` dropped. Sums of two one-digit numbers repeat soon.
    data = make_data(chain_sum=ONE_DIGIT, test_size=60)
    train, test = task.load_problems(data)
    held_out = {problem["entry"]["question"] for problem in test}
    assert len(held_out) == 60
    trained = train[: len(train) // 2]
    assert len(trained) == 25
    assert not held_out & {problem["entry"]["question"] for problem in trained}
    assert trained[3] == train[3]


@needs_package
def test_parameters_of_the_dataset_are_data_keys():
    _, test = task.load_problems(
        make_data(chain_sum={"min_terms": 5, "max_terms": 5}, gcd={"max_value": 9})
    )
    assert {problem["entry"]["metadata"]["num_terms"] for problem in test} == {5}
    first = [problem["entry"] for problem in task.load_problems(make_data(seed=1))[1]]
    assert first != [problem["entry"] for problem in task.load_problems(make_data(seed=2))[1]]


class PlainChat:
    def render_chat(self, messages):
        return " ".join(f"[{message['role']}] {message['content']}" for message in messages)


def test_an_example_is_shown_as_an_earlier_turn():
    # Catches: the example left out, or put behind the question.
    entry = {"question": "4 + 7 =", "answer": "11"}
    plain = task.render_prompt(make_data().problem(entry), PlainChat())
    data = make_data(example=["2 + 3 =", "2 + 3 = 5 <answer>5</answer>"])
    shown = task.render_prompt(data.problem(entry), PlainChat())
    rule = task.SYSTEM_MESSAGE
    example = f"[user] 2 + 3 =\n{rule} [assistant] 2 + 3 = 5 <answer>5</answer>"
    assert plain == f"[system] {rule} [user] 4 + 7 =\n{rule}"
    assert shown == f"[system] {rule} {example} [user] 4 + 7 =\n{rule}"


@needs_package
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": "chain_some"}, "rejects data.dataset=chain_some"),
        ({"chain_sum": {"max_term": 3}}, "rejects data.dataset=chain_sum with .*max_term"),
        ({"chain_sum": {"min_terms": 9, "max_terms": 3}}, "rejects data.dataset=chain_sum with"),
        ({"max_terms": 3}, r"data.max_terms: .* data.chain_sum.max_terms"),
        ({"chain_sum": ONE_DIGIT, "test_size": 999}, "only .* different problems"),
    ],
)
def test_a_wrong_setting_is_named(changes, message):
    with pytest.raises(ValueError, match=message):
        task.load_problems(make_data(**changes))


def test_the_config_for_a_cpu_loads_without_the_package():
    config = load_config(ROOT / "config_cpu.yaml")
    assert config.data.dataset == "chain_sum"
    assert config.data.model_extra["chain_sum"]["max_digits"] == 2


@needs_package
def test_the_config_for_a_cpu_gives_problems():
    # Catches: parameters of chain_sum given to another dataset.
    for dataset in ("chain_sum", "gcd"):
        config = load_config(ROOT / "config_cpu.yaml", [f"data.dataset={dataset}"])
        train, test = task.load_problems(config.data)
        assert len(test) == config.data.test_size
        assert train[0]["dataset"] == dataset
    config = load_config(ROOT / "config_cpu.yaml", ["data.chain_sum.max_terms=2"])
    _, test = task.load_problems(config.data)
    assert {problem["entry"]["metadata"]["num_terms"] for problem in test} == {2}
