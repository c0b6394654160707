"""A real pretrained model: the same ids and text as transformers, and it learns.

It runs where a directory with one is given:

    REAL_MODEL=DIR uv run pytest -m slow tests/test_real_model.py
"""

import os
from types import SimpleNamespace

import pytest
import torch

from data_types import Reward
from generate import SamplingParams, generate_one, seeded_generator
from grpo import make_question, rollout, update_policy
from optimizer import AdamW
from qwen2_model import Transformer
from tokenizer import Tokenizer

DIRECTORY = os.environ.get("REAL_MODEL")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not DIRECTORY, reason="REAL_MODEL names no directory with a model"),
]

CHATS = [
    [{"role": "user", "content": "What is 12 + 30? Answer with the number."}],
    [
        {"role": "system", "content": "You are terse."},
        {"role": "user", "content": "Wie heißt die Hauptstadt von 日本? 🤔"},
        {"role": "assistant", "content": " Tokyo\n"},
        {"role": "user", "content": "<|im_start|> and </answer>:\n\n  def f(x):\n\treturn x**2"},
    ],
]
GREEDY = 1e-6
MAX_GEN_LEN = 48
STEPS, QUESTIONS, ANSWERS, HELD_OUT = 5, 6, 8, 32


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_pretrained(DIRECTORY)


@pytest.fixture(scope="module")
def model() -> Transformer:
    return Transformer.from_pretrained(DIRECTORY, device="cpu", dtype=torch.float32)


def reference_tokenizer(directory: str):
    """tokenizer.json as it is; AutoTokenizer replaces its pre-tokenizer by that of Qwen2."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(directory)


def greedy_ids(model: Transformer, tokenizer: Tokenizer, text: str) -> list[int]:
    params = SamplingParams(MAX_GEN_LEN, GREEDY, tokenizer.vocab_size, tokenizer.stop_ids)
    uniforms = torch.full((MAX_GEN_LEN,), 0.5)
    return list(generate_one(model, tokenizer.encode(text), params, uniforms))


def reference_greedy_ids(directory: str, text: str) -> list[int]:
    """The same by transformers."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    encode = reference_tokenizer(directory)
    ids = encode(text, return_tensors="pt", add_special_tokens=False).input_ids
    # Defaults, so that no repetition penalty of generation_config.json applies.
    reference.generation_config.update(repetition_penalty=1.0, top_p=None, top_k=None)
    with torch.no_grad():
        output = reference.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=MAX_GEN_LEN,
            do_sample=False,
            temperature=None,
        )
    return output[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("messages", CHATS)
def test_prompt_ids_and_greedy_answer_equal_those_of_transformers(model, tokenizer, messages):
    # Catches: rope_theta ignored; a stop id of generation_config.json ignored.
    reference = reference_tokenizer(DIRECTORY)
    text = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert tokenizer.render_chat(messages) == text
    assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False)
    ids = greedy_ids(model, tokenizer, text)
    assert ids == reference_greedy_ids(DIRECTORY, text)
    assert tokenizer.decode(ids) == reference.decode(ids)


def render_prompt(problem: dict, tokenizer: Tokenizer) -> str:
    contents = [("system", "Write the final answer between <answer> and </answer>.")]
    if problem["example"]:
        contents += [("user", "What is 2 + 3?"), ("assistant", "<answer>5</answer>")]
    contents += [("user", f"What is {problem['a']} + {problem['b']}?")]
    return tokenizer.render_chat([{"role": role, "content": text} for role, text in contents])


def reward_function(response: str, a: int, b: int, example: bool) -> Reward:
    """For the format alone, in parts, so that a model that never gets all of it can start."""
    tags = float(response.count("<answer>") == 1) + float(response.count("</answer>") == 1)
    ends = float(response.rstrip().endswith("</answer>"))
    return Reward((tags + ends) / 3, {"answer": float(tags + ends == 3)})


def test_five_steps_raise_the_format_reward_and_transformers_reads_the_result(
    model, tokenizer, tmp_path
):
    # Measured: see bench/LOG.md. Catches: the sign of the loss turned; a checkpoint with the
    # weights from before the update.
    task = SimpleNamespace(render_prompt=render_prompt)
    optimizer = AdamW(model.parameters(), lr=1e-5, betas=(0.9, 0.99))

    def answers(problems, num_answers, generator):
        questions = [make_question(task, problem, tokenizer) for problem in problems]
        return rollout(
            model,
            tokenizer,
            questions,
            num_answers=num_answers,
            max_gen_len=MAX_GEN_LEN,
            temperature=1.0,
            reward_function=reward_function,
            generator=generator,
        )

    def mean_reward(episodes):
        return sum(episode.reward.total for episode in episodes) / len(episodes)

    # Show the example only if the reward is near 0 without it: a model of 135 M weights never uses
    # the tags alone, and one of 0.5 B weights always does with an example.
    for example in (False, True):
        held_out = [{"a": 11 + i, "b": 71 - i, "example": example} for i in range(HELD_OUT)]
        before = mean_reward(answers(held_out, 1, seeded_generator(1, "evaluation")))
        if before > 0.05:
            break
    assert before < 0.8, "the untrained model uses the tags already, so it has nothing to learn"
    for step in range(STEPS):
        problems = [
            {"a": 13 * i + step, "b": 7 * i + 31, "example": example} for i in range(QUESTIONS)
        ]
        stats = update_policy(
            model,
            optimizer,
            answers(problems, ANSWERS, seeded_generator(1, "rollout", step)),
            max_grad_norm=1.0,
            skip_unfinished=False,
            vocab_size=tokenizer.vocab_size,
            micro_batch_tokens=1024,
        )
        assert stats.logprob_diff_max < 1e-3, "trainer and sampler compute different policies"
    after = mean_reward(answers(held_out, 1, seeded_generator(1, "evaluation")))
    print(f"format reward, example={example}: {before:.3f} -> {after:.3f}")
    assert after > before + 0.1

    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    text = render_prompt(held_out[0], tokenizer)
    assert greedy_ids(model, tokenizer, text) == reference_greedy_ids(str(tmp_path), text)
