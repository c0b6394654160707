"""The small base model of config_tiny.yaml, made from nothing in a minute or two: `uv run train.py` calls this once.

It plays the part that pretraining plays for Qwen2.5-3B: afterwards the model writes the format, calculates and judges
its own attempts honestly, but gives up too early to win often. That last habit is what GRPO then changes.

The traces it imitates try what two of the numbers give, with each use of the third, in random order; most give up:

     3 + 5 = 8; 8 + 7 = 15, want 6: no; 8 - 7 = 1, want 6: no
     7 - 5 = 2; 2 + 3 = 5, want 6: no, I give up</think>
    <answer>(7 - 5) + 3</answer>

They come from training questions only. Writing the target beside the value makes the verdict a comparison of
neighbours: without it the model said "yes" to one wrong value in six. A first step stands once for all that follow from
it, so that not trying the same again takes a memory of nine first steps instead of thirty attempts.
"""

import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Regex, decoders, pre_tokenizers, trainers
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import BPE

import countdown_task
from data_types import Episode, Reward
from grpo import accumulate_gradient, zero_gradient
from harness.config import Config
from packing import pack_rows
from qwen2_model import Qwen2Config, Transformer
from tokenizer import Tokenizer

CHAT_TEMPLATE = (
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
MAX_VALUE = 50  # attempts whose value leaves 0..MAX_VALUE are not written: every number stays one token
PERSISTENT_SHARE = 0.2  # of the traces: they go on until they hit
GIVE_UP = 0.45  # probability, in the others, of giving up after a failing attempt
LEARNING_RATE_MATRICES = 0.02  # Muon
LEARNING_RATE_OTHERS = 1e-2  # AdamW
TRACES_PER_QUESTION = 2
MICRO_BATCH_TOKENS = 2048


def make_base_model(config: Config, *, progress: Callable[[int, float], None]) -> None:
    """Write a tokenizer and a trained tiny Qwen2 into config.model.path, in the published format.

    progress(step, loss) is called after every step. The directory appears only when it is whole.
    """
    warm, data = config.warm_start, config.data
    problems, _ = countdown_task.load_problems(data)
    directory = Path(config.model.path)
    aside = directory.with_name(directory.name + ".partial")
    shutil.rmtree(aside, ignore_errors=True)
    rng = random.Random(warm.seed)
    groups = example_groups(problems, rng)
    make_tokenizer(aside, [prompt + trace for prompt, traces in (next(groups) for _ in range(100)) for trace in traces])
    tokenizer = Tokenizer.from_pretrained(aside)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(warm.seed)
        model = new_model(warm, tokenizer)
    train_supervised(model, tokenizer, example_groups(problems, rng), steps=warm.steps,
                     questions_per_step=warm.batch_size // TRACES_PER_QUESTION, progress=progress)
    model.save_pretrained(aside)
    aside.rename(directory)


def example_groups(problems, rng: random.Random) -> Iterator[tuple[str, list[str]]]:
    """Endless (prompt, traces) over random training problems."""
    render = _PromptRenderer()
    while True:
        problem = problems[rng.randrange(len(problems))]
        attempts = all_attempts(problem["numbers"])
        if any(value == problem["target"] for group in attempts.values() for _, _, value in group):
            traces = [make_trace(attempts, problem["target"], rng) + "<|im_end|>" for _ in range(TRACES_PER_QUESTION)]
            yield countdown_task.render_prompt(problem, render), traces


class _PromptRenderer:
    """Renders the chat template before there is a tokenizer to hold it."""

    def render_chat(self, messages: list[dict[str, str]]) -> str:
        turns = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
        return turns + "<|im_start|>assistant\n"


def make_trace(attempts: dict[str, list[tuple[str, str, int]]], target: int, rng: random.Random) -> str:
    """A response: attempts in random order of their first steps, until one hits or the trace gives up."""
    give_up = 0.0 if rng.random() < PERSISTENT_SHARE else GIVE_UP
    text = ""
    for first in rng.sample(list(attempts), len(attempts)):
        text += f"\n {first}"
        for answer, second, value in attempts[first]:
            text += f"; {second}, want {target}: {'yes' if value == target else 'no'}"
            gives_up = value != target and rng.random() < give_up
            if value == target or gives_up:
                return f"{text}{', I give up' if gives_up else ''}</think>\n<answer>{answer}</answer>"
    raise AssertionError("no attempt hits")


def all_attempts(numbers: list[int]) -> dict[str, list[tuple[str, str, int]]]:
    """The ways to combine three numbers in whole steps: first step -> (expression, second step, value) of each."""
    attempts = {}
    for i, j, k in ((0, 1, 2), (0, 2, 1), (1, 2, 0)):
        for inner, inner_value in _results(str(numbers[i]), numbers[i], str(numbers[j]), numbers[j]):
            attempts[f"{inner} = {inner_value}"] = [
                (outer.replace("?", f"({inner})"), f"{outer.replace('?', str(inner_value))} = {value}", value)
                for outer, value in _results("?", inner_value, str(numbers[k]), numbers[k])
            ]
    return attempts


def _results(a: str, a_value: int, b: str, b_value: int) -> Iterator[tuple[str, int]]:
    """The ways to combine two numbers whose result is a whole number of 0..MAX_VALUE, as (text, value)."""
    if b_value > a_value:
        large, small, difference = b, a, b_value - a_value
    else:
        large, small, difference = a, b, a_value - b_value
    candidates = [(f"{a} + {b}", a_value + b_value), (f"{large} - {small}", difference), (f"{a} * {b}", a_value * b_value)]
    low, high = sorted((a_value, b_value))
    if low and high % low == 0:
        candidates.append((f"{large} / {small}", high // low))
    return ((text, value) for text, value in candidates if value <= MAX_VALUE)


def make_tokenizer(directory: Path, texts: list[str]) -> None:
    """A byte-level BPE whose merges run as long as the texts repeat: a fixed sentence is one token, and so is a number."""
    fast = FastTokenizer(BPE())
    digits = pre_tokenizers.Split(Regex("[0-9]+"), "isolated")
    fast.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    fast.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=20, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )  # fmt: skip
    numbers = [" ".join(map(str, range(MAX_VALUE + 1)))] * 50  # each number often enough to become a token
    fast.train_from_iterator([*texts, *numbers], trainer)
    directory.mkdir(parents=True)
    fast.save(str(directory / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
                "chat_template": CHAT_TEMPLATE, "clean_up_tokenization_spaces": False}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    stop_ids = [fast.token_to_id("<|im_end|>"), fast.token_to_id("<|endoftext|>")]
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": stop_ids}) + "\n")


def new_model(warm, tokenizer: Tokenizer) -> Transformer:
    """A freshly initialised Qwen2 of the configured shape, in float32 on the CPU."""
    shape = Qwen2Config(
        vocab_size=-(-tokenizer.vocab_size // 64) * 64, hidden_size=warm.hidden_size, intermediate_size=3 * warm.hidden_size,
        num_hidden_layers=warm.num_layers, num_attention_heads=warm.num_heads, num_key_value_heads=max(1, warm.num_heads // 2),
        max_position_embeddings=2048, rms_norm_eps=1e-6, rope_theta=10_000.0, tie_word_embeddings=True,
        eos_token_id=min(tokenizer.stop_ids),
    )  # fmt: skip
    model = Transformer(shape)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.zeros_(parameter)
        elif parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def train_supervised(model: Transformer, tokenizer: Tokenizer, groups: Iterator[tuple[str, list[str]]], *, steps: int,
                     questions_per_step: int, progress: Callable[[int, float], None]) -> None:
    """Maximum likelihood of the traces: the policy gradient of answers that all have advantage 1.

    Muon for the layers' matrices, AdamW for the rest, rates falling linearly to 0.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if not any(p is m for m in matrices)]
    optimizers = [
        torch.optim.Muon(matrices, lr=LEARNING_RATE_MATRICES, weight_decay=0.0),
        torch.optim.AdamW(others, lr=LEARNING_RATE_OTHERS, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    schedulers = [torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.0, total_iters=steps) for o in optimizers]
    for step in range(steps):
        episodes = []
        for question_id in range(questions_per_step):
            prompt, responses = next(groups)
            prompt_ids = tokenizer.encode(prompt)
            for response in responses:
                ids = tokenizer.encode(response)
                episodes.append(Episode(question_id, prompt_ids, ids, [0.0] * len(ids), True, response, Reward(1.0, {})))
        num_tokens, loss = sum(len(e.response_token_ids) for e in episodes), 0.0
        zero_gradient(model)
        for row in pack_rows(episodes, [1.0] * len(episodes), MICRO_BATCH_TOKENS):
            row_loss, _ = accumulate_gradient(model, row, num_tokens=num_tokens, temperature=1.0, vocab_size=tokenizer.vocab_size)
            loss += float(row_loss)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            scheduler.step()
        progress(step, loss)
