"""Checkpoints and configs as others publish them: loaded, saved, and refused if damaged."""

import json
import math
from dataclasses import asdict

import pytest
import torch
from helpers import CONFIG, random_model, random_tokens, reference_model
from safetensors.torch import load_file, save_file

import published_format
import qwen2_model
from qwen2_model import Qwen2Config, Transformer

TIED = pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])


def assert_close(got, wanted, tolerance=1e-4):
    torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


# --- load and save


def assert_same_logits(directory, model):
    tokens_BT = random_tokens(2, 23)
    loaded = Transformer.from_pretrained(directory, device="cpu", dtype=torch.float32)
    assert loaded.config == model.config
    with torch.no_grad():
        assert torch.equal(loaded(tokens_BT), model(tokens_BT))


@TIED
@pytest.mark.parametrize("shard_bytes", [10**9, 30_000], ids=["one file", "shards"])
@torch.no_grad()
def test_saved_models_load_in_transformers_and_here(tied, shard_bytes, tmp_path, monkeypatch):
    # Catches: rope_theta saved as 10000; tie_word_embeddings left out; an incomplete index.
    from transformers import Qwen2ForCausalLM

    monkeypatch.setattr(published_format, "MAX_SHARD_BYTES", shard_bytes)
    model = random_model(tied=tied)
    model.save_pretrained(tmp_path / "model")
    reference, report = Qwen2ForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float32, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens_BT = random_tokens(2, 23)
    assert_close(model(tokens_BT), reference(tokens_BT).logits)
    assert_same_logits(tmp_path / "model", model)


def test_shards_respect_the_size_limit_and_the_index_lists_all(tmp_path, monkeypatch):
    # Catches: `> MAX_SHARD_BYTES` -> `>= 0`; total_size in elements.
    monkeypatch.setattr(published_format, "MAX_SHARD_BYTES", 30_000)
    model = random_model()
    model.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())
    assert set(index["weight_map"]) == {n for n, _ in model.named_parameters()}
    assert (
        sorted(set(index["weight_map"].values()))
        == files
        == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)]
    )
    for file in files:
        assert sum(t.nbytes for t in load_file(tmp_path / file).values()) <= 30_000
    assert len(files) < 12  # of 38 tensors


@TIED
@pytest.mark.parametrize("shard_size", ["1GB", "30KB"], ids=["one file", "shards"])
@torch.no_grad()
def test_models_saved_by_transformers_load_here(tied, shard_size, tmp_path):
    # Catches: sharded checkpoints refused.
    model = random_model(tied=tied)
    reference_model(model).save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "30KB")
    assert_same_logits(tmp_path, model)


def test_the_dtype_is_saved(tmp_path):
    # Catches: `name = str(dtype)...` -> `"float32"`.
    from transformers import AutoModelForCausalLM

    random_model().bfloat16().save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16
    assert (
        Transformer.from_pretrained(
            tmp_path, device="cpu", dtype=torch.float32
        ).head_weight_VE.dtype
        == torch.float32
    )


def test_a_tied_checkpoint_may_contain_its_embedding_twice(tmp_path):
    # Catches: `name != "lm_head.weight"` dropped.
    model = random_model(tied=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(
        tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
        tmp_path / "model.safetensors",
    )
    assert_same_logits(tmp_path, model)


def test_a_tied_checkpoint_with_another_head_is_refused(tmp_path):
    # Catches: the copy not compared, so that a trained head is dropped without a word.
    model = random_model(tied=True)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    other = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors | {"lm_head.weight": other}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"ties the head .* set tie_word_embeddings to false"):
        Transformer.from_pretrained(tmp_path, device="cpu", dtype=torch.float32)


def test_a_single_file_beside_an_index_of_other_files_is_refused(tmp_path, monkeypatch):
    # Catches: one of the two chosen without a word.
    model = random_model()
    model.save_pretrained(tmp_path)
    single = (tmp_path / "model.safetensors").read_bytes()
    monkeypatch.setattr(published_format, "MAX_SHARD_BYTES", 30_000)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(single)
    with pytest.raises(ValueError, match=r"has both model.safetensors and model.safetensors.index"):
        Transformer.from_pretrained(tmp_path, device="cpu", dtype=torch.float32)


def test_rotary_frequencies_in_a_checkpoint_are_ignored(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(3)}
    save_file(tensors | extra, tmp_path / "model.safetensors")
    assert_same_logits(tmp_path, model)


def test_saved_files_have_the_mode_of_the_umask(tmp_path):
    # Catches: chmod dropped; the library alone makes the weights readable by their owner only.
    random_model().save_pretrained(tmp_path)
    (tmp_path / "plain").touch()
    assert (tmp_path / "model.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


# --- configs


@pytest.fixture
def saved(tmp_path):
    random_model().save_pretrained(tmp_path)
    return tmp_path


def load_error(directory, kind=ValueError) -> str:
    with pytest.raises(kind) as caught:
        Transformer.from_pretrained(directory, device="cpu", dtype=torch.float32)
    message = str(caught.value)
    assert "\n" not in message
    assert str(directory) in message
    return message


def published(**changes) -> dict:
    """A config.json as transformers 4 writes it; None removes a key."""
    raw = (
        asdict(CONFIG)
        | {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "sliding_window": 131072,
            "max_window_layers": 28,
            "use_sliding_window": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "transformers_version": "4.43.1",
        }
        | changes
    )
    return {k: v for k, v in raw.items() if v is not None}


def read(tmp_path, raw) -> Qwen2Config:
    (tmp_path / "config.json").write_text(json.dumps(raw))
    return Qwen2Config.from_json(tmp_path / "config.json")


YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0}
OTHER_ROPE = {"rope_type": "default", "rope_theta": 1e6}
NEW_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0}, "rope_theta": None}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        NEW_ROPE
        | {
            "torch_dtype": None,
            "dtype": "bfloat16",
            "layer_types": ["full_attention"] * 3,
            "sliding_window": None,
        },
        {"rope_scaling": {"type": "default"}},
        {"head_dim": 6},
    ],
    ids=["transformers 4", "transformers 5", "unscaled", "head_dim"],
)
def test_configs_of_transformers_4_and_5_are_read(changes, tmp_path):
    # Catches: `AliasPath("rope_parameters", "rope_theta")` dropped.
    assert read(tmp_path, published(**changes)) == CONFIG


def test_defaults_of_published_configs(tmp_path):
    # Catches: tie_word_embeddings=True by default; some 72B configs leave it out.
    config = read(
        tmp_path, published(tie_word_embeddings=None, num_key_value_heads=None, eos_token_id=None)
    )
    assert config.tie_word_embeddings is False
    assert config.num_key_value_heads == CONFIG.num_attention_heads
    assert config.eos_token_id is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen3"}, "model_type='qwen3'"),
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_scaling={'type': 'yarn'"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2.0}},
            "rope_scaling={'rope_type': 'linear'",
        ),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling={'factor': 4.0}"),
        (NEW_ROPE | {"rope_parameters": YARN}, "rope_parameters={'rope_type': 'yarn'"),
        (
            NEW_ROPE | {"rope_parameters": {"full_attention": YARN}},
            "rope_parameters={'full_attention'",
        ),
        (
            NEW_ROPE | {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
            "layer_types=['full_attention', ",
        ),
        (
            {"architectures": ["Qwen2ForSequenceClassification"]},
            "architectures=['Qwen2ForSequenceClassification']",
        ),
        (
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            "quantization_config={'quant_method': 'gptq'",
        ),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"head_dim": 8}, "head_dim=8"),
        ({"hidden_size": None, "rms_norm_eps": None}, "lacks hidden_size, rms_norm_eps; "),
        ({"hidden_size": None, "model_type": "gpt2"}, "model_type='gpt2'"),
        ({"rope_theta": None}, "lacks rope_theta"),
        # transformers 4 takes the first, transformers 5 the second
        ({"rope_parameters": OTHER_ROPE}, "rope_theta is both 1000 and 1e+06"),
        ({"rope_scaling": OTHER_ROPE}, "rope_theta is both 1000 and 1e+06"),
    ],
)
def test_unsupported_settings_are_refused_by_name(changes, named, tmp_path):
    # Catches: any field of PublishedConfig or Rope dropped.
    with pytest.raises(ValueError, match=r"config\.json") as caught:
        read(tmp_path, published(**changes))
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("root", ["", "models--Qwen--Qwen2.5-0.5B/"])
def test_a_directory_that_is_no_model_but_leads_to_one_is_explained(root, tmp_path):
    # Catches: "fetch the model again" for a model that lies there in another form.
    (tmp_path / f"{root}snapshots/0a1b").mkdir(parents=True)
    with pytest.raises(
        FileNotFoundError, match=rf"a cache of downloads: use .*{root}snapshots/0a1b"
    ):
        Qwen2Config.from_json(tmp_path / "config.json")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="a LoRA adapter: merge it") as caught:
        Qwen2Config.from_json(tmp_path / "config.json")
    assert "fetch" not in str(caught.value)


def test_a_missing_or_damaged_config_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json does not exist"):
        Qwen2Config.from_json(tmp_path / "config.json")
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ValueError, match=r"config\.json is not valid JSON"):
        Qwen2Config.from_json(tmp_path / "config.json")


NO_NUMBER = ["1e-6", [1e-6], {}, True, math.nan, math.inf, -1.0, 0, 0.0]
NO_SIZE = ["5", [5], 5.0, True, 0, -5, 10**30]
DAMAGED = {
    "num_attention_heads": [
        *NO_SIZE,
        7,
        20,
        120,
    ],  # 60 / 20 = 3: rotary positions need an even head size
    "num_key_value_heads": [*NO_SIZE, 3, 20],
    "rms_norm_eps": NO_NUMBER,
    "rope_theta": NO_NUMBER,
    "tie_word_embeddings": ["false", 0, []],
    "eos_token_id": ["2", 2.0, True, -1, 10**30, {"id": 2}, [2, "3"], [[2]]],
    "vocab_size": NO_SIZE,
    "num_hidden_layers": [*NO_SIZE, 10**6],
    "quantization_config": [{}, "fp8"],
    "architectures": ["Qwen2ForCausalLM", ["Qwen2ForCausalLM", "Other"]],
    "layer_types": ["full_attention"],
    "rope_parameters": [[], "default"],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_invalid_settings_are_named_with_their_value(name, tmp_path):
    # Catches: strict=True dropped; the bound of a field dropped; a divisibility check dropped.
    for value in DAMAGED[name]:
        with pytest.raises(ValueError, match=r"config\.json") as caught:
            read(tmp_path, published(**{name: value}))
        assert f"{name}={value!r}" in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 10**5,
        '{"a":' * 10**5,
        '{"vocab_size": ' + "1" * 10**4 + "}",
        '{"model_type": "\\ud800"}',
    ],
    ids=["lists", "objects", "digits", "half a character"],
)
def test_json_that_breaks_the_parser_is_named_in_one_line(text, saved):
    # Catches: RecursionError not caught in parse_json; a lone surrogate accepted.
    for name in ("model.safetensors.index.json", "config.json"):
        (saved / name).write_text(text)
        message = load_error(saved)
        assert f"{name} is not valid JSON" in message
        assert len(message) < 500


# --- damaged checkpoints


def test_missing_and_unexpected_tensors_are_named(saved):
    # Catches: missing tensors not checked, which leaves weights at 0.
    tensors = load_file(saved / "model.safetensors")
    tensors["model.layers.1.self_attn.q_norm.weight"] = tensors.pop(
        "model.layers.1.self_attn.q_proj.bias"
    )
    save_file(tensors, saved / "model.safetensors")
    message = load_error(saved)
    assert "missing model.layers.1.self_attn.q_proj.bias" in message
    assert "unexpected model.layers.1.self_attn.q_norm.weight" in message


def test_a_tensor_of_the_wrong_shape_is_named(saved):
    # Catches: the shape check dropped; copy_ would broadcast a bias of one element.
    tensors = load_file(saved / "model.safetensors")
    tensors["model.layers.2.self_attn.k_proj.bias"] = torch.zeros(1)
    save_file(tensors, saved / "model.safetensors")
    message = load_error(saved)
    assert (
        "model.layers.2.self_attn.k_proj.bias has shape (1,), config.json implies (12,)" in message
    )


@pytest.mark.parametrize("damage", ["truncated", "text", "empty"])
def test_a_damaged_file_is_named(damage, saved):
    path = saved / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(
        {"truncated": whole[: len(whole) // 2], "text": b"<html>not found</html>", "empty": b""}[
            damage
        ]
    )
    assert "model.safetensors is damaged" in load_error(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {
            "vocab_size": 10**6,
            "hidden_size": 65_500,
            "intermediate_size": 10**6,
            "num_hidden_layers": 300,
        },
        {"num_hidden_layers": 1000},
    ],
    ids=["every size", "layers"],
)
def test_impossible_sizes_are_refused_before_memory_is_allocated(changes, saved, monkeypatch):
    # Catches: `allocate` before `find_weights` in from_pretrained.
    monkeypatch.setattr(qwen2_model, "allocate", lambda *_, **__: pytest.fail("memory allocated"))
    (saved / "config.json").write_text(json.dumps(published(**changes)))
    assert "config.json" in load_error(saved)


@pytest.mark.parametrize(
    "damaged",
    [
        torch.ones(12, dtype=torch.int8),
        torch.ones(12, dtype=torch.bool),
        torch.ones(12, dtype=torch.complex64),
        torch.full((12,), 1e300, dtype=torch.float64),
        torch.full((12,), math.nan),
        torch.full((12,), -math.inf),
    ],
    ids=["int8", "bool", "complex", "beyond float32", "NaN", "infinite"],
)
def test_a_tensor_of_the_wrong_kind_is_named(damaged, saved):
    # Catches: `is_floating_point` dropped; `isfinite` checked before the conversion.
    name = "model.layers.2.self_attn.k_proj.bias"
    save_file(load_file(saved / "model.safetensors") | {name: damaged}, saved / "model.safetensors")
    assert f"model.safetensors: {name} " in load_error(saved)


def test_missing_files_are_named(saved, monkeypatch):
    (saved / "model.safetensors").unlink()
    assert "model.safetensors does not exist" in load_error(saved, FileNotFoundError)
    monkeypatch.setattr(published_format, "MAX_SHARD_BYTES", 30_000)
    random_model().save_pretrained(saved)
    shard = sorted(saved.glob("*.safetensors"))[1]
    shard.unlink()
    assert f"{shard.name} does not exist" in load_error(saved, FileNotFoundError)
    for content in (
        "[]",
        "{",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
    ):
        (saved / "model.safetensors.index.json").write_text(content)
        assert "model.safetensors.index.json" in load_error(saved)
