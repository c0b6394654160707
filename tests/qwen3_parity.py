"""variants/qwen3.patch against transformers' Qwen3, in float32.

pytest does not collect this file by itself. With the patch applied, run

    uv run pytest tests/qwen3_parity.py

The sizes are those of helpers.py, but the heads have 14 dimensions, so that the 10 of them together
are larger than the hidden size.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CONFIG, episode, random_model, random_tokens
from test_grpo import TEMPERATURE, VOCAB, Recorder, assert_same_gradient, batch
from test_variants import answer_logprobs, expected_loss
from transformers import AutoModelForCausalLM, Qwen3ForCausalLM

from generate import SamplingParams, generate
from grpo import update_policy
from harness.plan import num_weights
from published_format import read_json
from qwen2_model import Qwen2Config, Transformer

HEAD_DIM = 14
TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def save_and_load(model: Transformer, directory: Path) -> Qwen3ForCausalLM:
    """The model in transformers' implementation, which reads what save_pretrained wrote."""
    model.save_pretrained(directory)
    reference, report = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(reference) is Qwen3ForCausalLM
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return reference


def assert_close(got: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


@TIED
@torch.no_grad()
def test_logits_equal_transformers(tied, tmp_path):
    # Catches: q_norm or k_norm dropped; a norm after the rotation; `eps=` dropped; bias=True;
    # head_dim not written to config.json.
    model = random_model(tied=tied, head_dim=HEAD_DIM)
    tokens_BT = random_tokens(3, 71)
    logits_BTV = model(tokens_BT)
    assert logits_BTV.std() > 1  # a comparison of near-constants would prove nothing
    assert_close(save_and_load(model, tmp_path)(tokens_BT).logits, logits_BTV)


@TIED
@torch.no_grad()
def test_a_model_saved_by_transformers_loads(tied, tmp_path):
    model = random_model(tied=tied, head_dim=HEAD_DIM)
    save_and_load(model, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    loaded = Transformer.from_pretrained(tmp_path / "theirs", device="cpu", dtype=torch.float32)
    assert loaded.config == model.config
    assert loaded.config.tie_word_embeddings == tied
    tokens_BT = random_tokens(2, 23)
    assert torch.equal(loaded(tokens_BT), model(tokens_BT))


@torch.no_grad()
def test_answers_decoded_with_the_cache_have_the_log_probabilities_of_transformers(tmp_path):
    # Catches: a key that is stored before it is normalised.
    model = random_model(head_dim=HEAD_DIM)
    reference = save_and_load(model, tmp_path)
    prompts = [random_tokens(n, seed=n, vocab_size=VOCAB).tolist() for n in (5, 1, 59, 17)]
    params = SamplingParams(23, TEMPERATURE, VOCAB, frozenset([7, 31, 40]))
    generator = torch.Generator().manual_seed(0)
    completions = generate(model, prompts, params, num_answers=3, generator=generator)
    for i, completion in enumerate(completions):
        answer = episode(0, prompts[i // 3], completion.token_ids, 0.0)
        assert_close(torch.tensor(completion.logprobs), answer_logprobs(reference, answer))


@TIED
def test_update_gradient_equals_a_loop_with_transformers(tied, tmp_path):
    # Catches: the gradient of q_norm.weight or k_norm.weight lost.
    model, episodes = random_model(tied=tied, head_dim=HEAD_DIM), batch(True)
    reference, recorder = save_and_load(model, tmp_path), Recorder(model)
    update_policy(
        model,
        recorder,
        episodes,
        max_grad_norm=math.inf,
        skip_unfinished=True,
        temperature=TEMPERATURE,
        vocab_size=VOCAB,
        micro_batch_tokens=47,
        recompute_layers=1,
    )
    kept = [i for i, e in enumerate(episodes) if e.is_finished]
    expected_loss("grpo", episodes, kept, reference, None).backward()
    wanted = {name: parameter.grad for name, parameter in reference.named_parameters()}
    assert_same_gradient(recorder.gradient, wanted)


@TIED
def test_weights_are_counted(tied):
    # Catches: hidden_size taken for the size of all heads; the weights of the norms forgotten.
    model = random_model(tied=tied, head_dim=HEAD_DIM)
    assert num_weights(model.config) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen2"}, "model_type='qwen2'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"head_dim": 13}, "head_dim=13"),
        ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ],
)
def test_unsupported_settings_are_refused_by_name(changes, named, tmp_path):
    random_model(head_dim=HEAD_DIM).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(read_json(path) | changes))
    with pytest.raises(ValueError, match=named):
        Qwen2Config.from_json(path)


def test_a_run_takes_two_steps(base_model, tmp_path):
    command = [sys.executable, "train.py", "--config", "config_tiny.yaml"]
    command += [f"model.path={base_model}", f"output_dir={tmp_path}/run", "training.max_steps=2"]
    command += ["training.batch_size=16", "training.num_questions_per_batch=4", "data.test_size=4"]
    subprocess.run([*command, "training.max_gen_len=16"], check=True)
    saved = Transformer.from_pretrained(
        max((tmp_path / "run" / "checkpoints").iterdir()), device="cpu", dtype=torch.float32
    )
    assert saved.config.head_dim == CONFIG.head_dim == 128  # the default of Qwen3
