"""The tokenizer against transformers' on the real Qwen2.5 files, and its errors on a small one made here."""

import json
import random
import shutil
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import CONFIG
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as FastTokenizer

from countdown_task import RESPONSE_PREFIX, SYSTEM_MESSAGE, render_prompt
from published_format import write_config
from tokenizer import Tokenizer
from warm_start import all_attempts, make_tokenizer, make_trace

QWEN = Path(__file__).parent.parent / "../shared/qwen2.5-tokenizer"
needs_qwen = pytest.mark.skipif(not QWEN.exists(), reason="../shared/qwen2.5-tokenizer is not here")

TEXTS = {
    "empty": "",
    "words": "The quick brown fox doesn't jump over 13 lazy dogs.",
    "white space": "  two  spaces\n\n\tand a tab \r\n and trailing   ",
    "numbers": "3 + 5 = 8, 8 * 71 = 568; 1234567890 / 0.5e-3",
    "tags": "<think>\n3 * (5 + 7)</think>\n<answer>3 * (5 + 7)</answer>",
    "special tokens": "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><|fim_prefix|><tool_call>",
    "halves of special tokens": "<|im_end <|im_end|| |endoftext|>",
    "languages": "Größe, naïveté, 思维链, Привет, こんにちは, مرحبا, नमस्ते",
    "emoji": "🤔👨‍👩‍👧‍👦🇩🇪 ok",
    "composed and decomposed": "é e\u0301 ﬁ Å",
    "control characters": "a\0b\x07c\u200bd\u202ee\ufeff",
}


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    return Tokenizer.from_pretrained(QWEN)


@pytest.fixture(scope="module")
def reference():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(QWEN)


# ---------------------------------------------------------------- the real files, against transformers


# Catches: add_special_tokens or a normaliser of our own changing the ids.
@needs_qwen
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_ids_and_text_are_those_of_transformers(qwen, reference, text):
    ids = qwen.encode(text)
    assert ids == reference(text)["input_ids"]
    assert qwen.decode(ids) == reference.decode(ids)
    assert all(type(i) is int for i in ids)


# Catches: skip_special_tokens=True in decode; cleaned-up white space.
@needs_qwen
def test_decode_keeps_everything(qwen, reference):
    for text in TEXTS.values():
        if (
            "e\u0301" not in text and "\u0301" not in text
        ):  # the tokenizer itself composes these (NFC)
            assert qwen.decode(qwen.encode(text)) == text
    for ids in (
        [151645],
        [151643, 151644],
        [0, 151664, 5],
        list(range(0, 151665, 997)),
        [97, 222, 30],
        [],
    ):
        assert qwen.decode(ids) == reference.decode(ids)


@needs_qwen
def test_bytes_that_are_no_utf_8_decode_to_the_replacement_character(qwen, reference):
    ids = qwen.encode("𓀀")  # a hieroglyph: rare enough to be spelled out in bytes
    assert len(ids) > 1
    assert qwen.decode(ids[:1]) == reference.decode(ids[:1]) == "\ufffd"


@needs_qwen
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "Hi!"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": '  1 < 2 & "so" {{ on }}\n\n'},
        ],
        [{"role": "system", "content": ""}, {"role": "user", "content": "思"}],
        [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        [
            {"role": "user", "content": "a"},
            {"role": "system", "content": "late"},
            {"role": "tool", "content": "9"},
        ],
    ],
    ids=["user", "system and user", "empty system", "turns", "late system, tool"],
)
def test_the_chat_is_rendered_like_transformers_renders_it(qwen, reference, messages):
    # Catches: add_generation_prompt=False.
    assert qwen.render_chat(messages) == reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


# Catches: system and user message swapped, RESPONSE_PREFIX left out, the numbers not in their order.
@needs_qwen
def test_the_countdown_prompt_is_transformers_rendering_and_the_opened_answer(qwen, reference):
    prompt = render_prompt({"numbers": [44, 19, 35], "target": 98}, qwen)
    turns = [turn.split("\n", 1) for turn in prompt.split("<|im_start|>")[1:]]
    assert [role for role, _ in turns] == ["system", "user", "assistant"]
    messages = [
        {"role": role, "content": text.removesuffix("<|im_end|>\n")} for role, text in turns[:2]
    ]
    rendered = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == rendered + RESPONSE_PREFIX
    assert prompt.endswith("<think>")
    assert messages[0]["content"] == SYSTEM_MESSAGE
    assert "[44, 19, 35]" in messages[1]["content"]
    assert "98" in messages[1]["content"]
    assert qwen.encode(prompt) == reference(prompt)["input_ids"]


@needs_qwen
def test_the_ids_that_end_an_answer_and_the_size_of_the_vocabulary(qwen, reference):
    assert qwen.stop_ids == frozenset({151645, 151643})
    assert qwen.pad_id == reference.pad_token_id == 151643
    assert qwen.vocab_size == len(reference) == 151665
    assert qwen.decode([151645, 151643]) == "<|im_end|><|endoftext|>"


# Catches: a file left out of FILES.
@needs_qwen
def test_what_is_saved_is_the_same_tokenizer(qwen, tmp_path):
    qwen.save_pretrained(tmp_path / "new/directory")
    again = Tokenizer.from_pretrained(tmp_path / "new/directory")
    text = "".join(TEXTS.values())
    assert again.encode(text) == qwen.encode(text)
    assert again.render_chat(MESSAGES) == qwen.render_chat(MESSAGES)
    assert (again.stop_ids, again.pad_id, again.vocab_size) == (
        qwen.stop_ids,
        qwen.pad_id,
        qwen.vocab_size,
    )
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "new/directory" / name).read_bytes() == (QWEN / name).read_bytes()


# ---------------------------------------------------------------- what a checkpoint holds, in transformers


@pytest.fixture(scope="module", params=["tiny", pytest.param("qwen2.5", marks=needs_qwen)])
def checkpoint(request, tmp_path_factory) -> Path:
    """A tokenizer that we saved beside a Qwen2 config, from which transformers takes its own idea of what the tokenizer does."""
    source, directory = QWEN, tmp_path_factory.mktemp("checkpoint")
    if request.param == "tiny":
        source = directory / "source"
        make_tokenizer(source)
    Tokenizer.from_pretrained(source).save_pretrained(directory / "saved")
    write_config(directory / "saved/config.json", asdict(CONFIG), torch.float32)
    return directory / "saved"


def test_a_checkpoints_tokenizer_is_the_same_in_transformers(checkpoint):
    # Catches: a normaliser of our own in make_tokenizer, which transformers replaces; an added token that takes the white space
    # around it; a chat template that only we can render.
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer.from_pretrained(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    rng = random.Random(0)
    for numbers in ([3, 5, 7], [10, 10, 1], [0, 99, 100], [44, 19, 35, 7]):
        prompt = render_prompt({"numbers": numbers, "target": 22}, ours)
        messages = [
            {"role": "system", "content": SYSTEM_MESSAGE},
            {"role": "user", "content": prompt.split("user\n", 1)[1].split("<|im_end|>", 1)[0]},
        ]
        assert (
            theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            + RESPONSE_PREFIX
            == prompt
        )
        pairs = all_attempts(numbers[:3])
        answer = make_trace(pairs, pairs[0][0][1][0][2], rng) + "<|im_end|>"
        for text in (prompt, answer, prompt + answer, answer.replace("; ", ";  "), answer.upper()):
            ids = ours.encode(text)
            assert ids == theirs(text)["input_ids"], text
            assert ours.decode(ids) == theirs.decode(ids) == text
    for text in TEXTS.values():
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids)
    assert ours.vocab_size == len(theirs)
    assert ours.pad_id == theirs.pad_token_id
    assert theirs.eos_token_id in ours.stop_ids


# ---------------------------------------------------------------- a small one

TEMPLATE = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[assistant:{% endif %}"
MESSAGES = [{"role": "system", "content": "calm"}, {"role": "user", "content": "hi"}]
END, PAD, START = 256, 257, 258  # after the 256 bytes


def write_tokenizer(
    directory: Path, *, generation: dict | None = None, drop: tuple[str, ...] = (), **changes
) -> Path:
    """One token a byte and three special ones. changes: of tokenizer_config.json; drop: its keys to leave out."""
    fast = FastTokenizer(
        models.BPE(
            vocab={c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))},
            merges=[],
        )
    )
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    fast.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<end>", "<pad>", "<start>")]
    )
    directory.mkdir(parents=True, exist_ok=True)
    fast.save(str(directory / "tokenizer.json"))
    settings = {
        "chat_template": TEMPLATE,
        "eos_token": "<end>",
        "pad_token": "<pad>",
        "bos_token": None,
    } | changes
    settings = {k: v for k, v in settings.items() if k not in drop}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def test_a_small_tokenizer(tmp_path):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path))
    ids = tokenizer.encode("hé<end> <pad>")
    assert len(ids) == 6  # h, two bytes of é, <end>, a space, <pad>
    assert (ids[3], ids[5]) == (END, PAD)
    assert tokenizer.decode(ids) == "hé<end> <pad>"
    assert tokenizer.decode(ids[:2]) == "h\ufffd"
    assert tokenizer.vocab_size == 259
    assert tokenizer.render_chat(MESSAGES) == "[system:calm][user:hi][assistant:"
    assert Tokenizer.from_pretrained(str(tmp_path)).encode("hi") == tokenizer.encode("hi")


STOPS = {  # generation_config.json, changes of tokenizer_config.json -> stop ids
    "a list": ({"eos_token_id": [END, PAD]}, {}, {END, PAD}),
    "a list of one": ({"eos_token_id": [START]}, {}, {START}),
    "an int": ({"eos_token_id": START}, {}, {START}),
    "id 0 as an int": ({"eos_token_id": 0}, {}, {0}),
    "no generation_config.json": (None, {}, {END}),
    "eos_token as a dict": (None, {"eos_token": {"content": "<start>", "special": True}}, {START}),
    "null": ({"eos_token_id": None}, {}, {END}),
    "nothing about it": ({"temperature": 0.7}, {}, {END}),
}


# Catches: `ids is None` turned into `not ids` (id 0); the eos_token preferred to generation_config.json.
@pytest.mark.parametrize(("generation", "changes", "wanted"), STOPS.values(), ids=STOPS)
def test_the_ids_that_end_an_answer(tmp_path, generation, changes, wanted):
    tokenizer = Tokenizer.from_pretrained(
        write_tokenizer(tmp_path, generation=generation, **changes)
    )
    assert tokenizer.stop_ids == frozenset(wanted)
    assert isinstance(tokenizer.stop_ids, frozenset)


@pytest.mark.parametrize(
    ("generation", "changes"),
    [
        ({"eos_token_id": 259}, {}),
        ({"eos_token_id": ["<end>"]}, {}),
        ({"eos_token_id": "<end>"}, {}),
        ({"eos_token_id": []}, {}),
        ({"eos_token_id": True}, {}),
        ({"eos_token_id": 256.0}, {}),
        ({"eos_token_id": [[256]]}, {}),
        ({"eos_token_id": [10**30]}, {}),
        ({"eos_token_id": {"id": 256}}, {}),
        (None, {"eos_token": "<nowhere>"}),
        (None, {"eos_token": None}),
    ],
    ids=[
        "beyond the vocabulary",
        "text in a list",
        "text",
        "empty list",
        "true",
        "a float",
        "a list in a list",
        "a huge number",
        "an object",
        "eos_token unknown",
        "no eos_token",
    ],
)
def test_ids_that_the_tokenizer_lacks_are_refused(tmp_path, generation, changes):
    with pytest.raises(ValueError, match=r"(?s)stop ids.*eos_token_id") as caught:
        Tokenizer.from_pretrained(write_tokenizer(tmp_path, generation=generation, **changes))
    assert str(tmp_path) in str(caught.value)


def test_padding_has_an_id_even_where_none_is_published(tmp_path):
    assert Tokenizer.from_pretrained(write_tokenizer(tmp_path / "pad")).pad_id == PAD
    as_dict = write_tokenizer(tmp_path / "dict", pad_token={"content": "<start>"})
    assert Tokenizer.from_pretrained(as_dict).pad_id == START
    for i, changes in enumerate(
        [{"pad_token": None}, {"drop": ("pad_token",)}, {"pad_token": "<nowhere>"}]
    ):
        assert (
            Tokenizer.from_pretrained(write_tokenizer(tmp_path / str(i), **changes)).pad_id == END
        )


def test_a_published_truncation_or_padding_is_that_of_its_training_and_not_ours(tmp_path):
    # Catches: no_truncation or no_padding left out: the end of a prompt is dropped without a word.
    fast = FastTokenizer.from_file(str(write_tokenizer(tmp_path) / "tokenizer.json"))
    fast.enable_truncation(5)
    fast.enable_padding(length=20, pad_id=PAD, pad_token="<pad>")
    fast.save(str(tmp_path / "tokenizer.json"))
    assert (
        Tokenizer.from_pretrained(tmp_path).decode(
            Tokenizer.from_pretrained(tmp_path).encode("a prompt")
        )
        == "a prompt"
    )


def test_a_tokenizer_that_fails_on_a_text_is_named(tmp_path):
    # Catches: the bare Exception of the library let through.
    write_tokenizer(tmp_path)
    FastTokenizer(models.WordLevel({"<end>": 0}, unk_token="<unknown>")).save(
        str(tmp_path / "tokenizer.json")
    )
    with pytest.raises(
        ValueError, match=r"the tokenizer fails on 'hi'.*fetch the model again"
    ) as caught:
        Tokenizer.from_pretrained(tmp_path).encode("hi")
    assert str(tmp_path) in str(caught.value)


# ---------------------------------------------------------------- chat templates


def test_the_template_of_its_own_file_takes_precedence(tmp_path):
    write_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_text("{{ messages[1].content }}!")
    assert Tokenizer.from_pretrained(tmp_path).render_chat(MESSAGES) == "hi!"
    write_tokenizer(tmp_path, drop=("chat_template",))
    assert Tokenizer.from_pretrained(tmp_path).render_chat(MESSAGES) == "hi!"


def test_a_template_is_given_the_special_tokens_and_what_transformers_gives(tmp_path):
    template = (
        "{{ eos_token }}|{{ pad_token }}|{{ bos_token }}|{{ messages[1] | tojson }}|{{ tools is none }}|"
        "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    )
    directory = write_tokenizer(tmp_path, chat_template=template, eos_token={"content": "<end>"})
    wanted = '<end>|<pad>||{"role": "user", "content": "hi"}|True|013'
    assert Tokenizer.from_pretrained(directory).render_chat(MESSAGES) == wanted


# Catches: trim_blocks or lstrip_blocks left out: a block's line leaves no white space behind.
def test_lines_that_hold_only_a_block_vanish(tmp_path):
    template = "{% for m in messages %}\n  {% if m.role == 'user' %}\n  {{ m.content }}\n  {% endif %}\n{% endfor %}\nend"
    assert (
        Tokenizer.from_pretrained(write_tokenizer(tmp_path, chat_template=template)).render_chat(
            MESSAGES
        )
        == "  hi\nend"
    )


HOSTILE_TEMPLATES = {
    "every class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a class through a filter": "{{ (messages | attr('__class__')).mro() }}",
    "through an index": "{{ messages['__class__'].mro() }}",
    "through format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "globals of a macro": "{% macro f() %}{% endmacro %}{{ f.__init__.__globals__ }}",
    "globals of a filter": "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "appending": "{{ messages.append(1) }}",
    "clearing": "{{ messages.clear() }}",
    "changing a message": "{{ messages[0].update({'role': 'x'}) }}",
    "popping a key": "{{ messages[0].pop('role') }}",
    "an endless range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "its own error": "{{ raise_exception('roles must alternate') }}",
    "an unknown function": "{{ nothing_of_the_kind() }}",
    "an unknown key of an unknown key": "{{ messages[7].content.text }}",
    "a wrong type": "{{ messages + 1 }}",
    "division by zero": "{{ 1 / 0 }}",
    "a file": "{% include '/etc/hostname' %}",
}


# Catches: ImmutableSandboxedEnvironment turned into SandboxedEnvironment (appending, clearing, …) or into Environment.
@pytest.mark.parametrize("template", HOSTILE_TEMPLATES.values(), ids=HOSTILE_TEMPLATES)
def test_a_template_that_reaches_out_or_fails_is_refused(tmp_path, template):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, chat_template=template))
    messages = [dict(m) for m in MESSAGES]
    with pytest.raises(ValueError, match="chat template fails") as caught:
        tokenizer.render_chat(messages)
    assert str(tmp_path) in str(caught.value)
    assert messages == MESSAGES


ENDLESS_TEMPLATES = {
    "loops in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "loops over one range": "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% endfor %}{% endfor %}",
    "loops over a text": "{% set t = 'x' | center(99999) %}{% for i in t %}{% for j in t %}{% endfor %}{% endfor %}",
    "a loop that writes": "{% for i in range(99999) %}{{ 'x' | center(9999) }}{% endfor %}",
    "a macro that calls itself": "{% macro f() %}{% for i in range(9) %}{{ f() }}{% endfor %}{% endmacro %}{{ f() }}",
    "filler": "{{ lipsum(n=10000000) }}",
    "a power": "{{ 10 ** 10 ** 10 }}",
    "a product": "{{ 'x' * 10000000000 }}",
    "products of products": "{% set n = namespace(x=7) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
}


# Catches: the lines not counted, or those of the template alone; the characters not counted; * and ** left to jinja2.
@pytest.mark.parametrize("template", ENDLESS_TEMPLATES.values(), ids=ENDLESS_TEMPLATES)
def test_a_template_without_an_end_is_cut_off(tmp_path, template):
    start, before = time.perf_counter(), sys.gettrace()
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(ValueError, match="chat template fails"):
        tokenizer.render_chat(MESSAGES)
    assert time.perf_counter() - start < 10
    assert sys.gettrace() is before


REACHING_TEMPLATES = {
    "a class": "{{ messages.__class__ }}",
    "through a filter": "{{ messages | attr('__class__') }}",
    "through an index": "{{ messages['__class__'] }}",
    "through format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
}


@pytest.mark.parametrize("template", REACHING_TEMPLATES.values(), ids=REACHING_TEMPLATES)
def test_a_template_that_looks_outside_is_refused(tmp_path, template):
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path, chat_template=template))
    with pytest.raises(ValueError, match="chat template fails"):
        tokenizer.render_chat(MESSAGES)


def test_a_template_is_told_by_its_own_error(tmp_path):
    tokenizer = Tokenizer.from_pretrained(
        write_tokenizer(tmp_path, chat_template="{{ raise_exception('roles must alternate') }}")
    )
    with pytest.raises(ValueError, match="roles must alternate"):
        tokenizer.render_chat(MESSAGES)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}",
        "{{ messages",
        "{% nonsense %}",
        "{{ messages | nonsense }}",
        "{{ " + "(" * 5000,
        "{% for m in messages %}" * 50 + "{% endfor %}" * 50,
    ],
)
def test_a_template_that_does_not_parse_is_refused_at_once(tmp_path, template):
    with pytest.raises(ValueError, match="chat template does not parse") as caught:
        Tokenizer.from_pretrained(write_tokenizer(tmp_path, chat_template=template))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"drop": ("chat_template",)}, {"chat_template": None}, {"chat_template": 3}]
)
def test_a_model_without_a_template_is_refused(tmp_path, changes):
    with pytest.raises(ValueError, match=r"no chat template.*Instruct"):
        Tokenizer.from_pretrained(write_tokenizer(tmp_path, **changes))


# ---------------------------------------------------------------- damaged and missing files

FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
DAMAGE = {
    "empty": b"",
    "cut": b'{"version": "1.0", "mod',
    "no JSON": b"<html>\n<h1>404</h1>\n</html>\n",
    "a list": b"[1, 2]",
    "a number": b"3",
    "null": b"null",
    "no UTF-8": b'{"a": "\xff\xfe"}',
    "nested without end": b'{"a":' * 10**5,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, damage):
    write_tokenizer(tmp_path, generation={"eos_token_id": END})
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(ValueError, match=r"fetch the model again") as caught:
        Tokenizer.from_pretrained(tmp_path)
    message = str(caught.value)
    assert str(tmp_path / name) in message
    assert "\n" not in message


@pytest.mark.parametrize("name", FILES[:2])
def test_a_missing_file_is_named(tmp_path, name):
    write_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


# Catches: a file left out of FILES; files rewritten instead of copied.
def test_saving_copies_every_published_file_as_it_was(tmp_path):
    old, new = (
        write_tokenizer(
            tmp_path / "old", generation={"eos_token_id": [END, PAD], "unknown": [1.50]}
        ),
        tmp_path / "a/b",
    )
    published = {
        "chat_template.jinja": "{{ messages[0].content }}\n",
        "vocab.json": "{ }",
        "merges.txt": "#version: 0.2\n",
        "special_tokens_map.json": "{\n}",
        "added_tokens.json": "{}\n",
    }
    for name, text in published.items():
        (old / name).write_text(text)
    (old / "model.safetensors").write_bytes(b"weights are saved elsewhere")
    tokenizer = Tokenizer.from_pretrained(old)
    tokenizer.save_pretrained(new)
    assert {f.name for f in new.iterdir()} == {*FILES, *published}
    assert all(f.read_bytes() == (old / f.name).read_bytes() for f in new.iterdir())
    again = Tokenizer.from_pretrained(new)
    assert again.render_chat(MESSAGES) == tokenizer.render_chat(MESSAGES) == "calm"
    assert again.encode("hé<end>") == tokenizer.encode("hé<end>")
    assert again.stop_ids == {END, PAD}


def test_a_tokenizer_is_saved_even_when_the_directory_it_was_read_from_is_gone(tmp_path):
    # A resumed run reads its tokenizer from a checkpoint, which keep_checkpoints removes while the run goes on.
    tokenizer = Tokenizer.from_pretrained(write_tokenizer(tmp_path / "step-000100"))
    shutil.rmtree(tmp_path / "step-000100")
    tokenizer.save_pretrained(tmp_path / "step-000300")
    assert Tokenizer.from_pretrained(tmp_path / "step-000300").encode("hi") == tokenizer.encode(
        "hi"
    )


def test_a_tokenizer_can_be_saved_where_it_was_read(tmp_path):
    Tokenizer.from_pretrained(write_tokenizer(tmp_path)).save_pretrained(tmp_path)


def test_a_negative_id_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"stop ids"):
        Tokenizer.from_pretrained(write_tokenizer(tmp_path, generation={"eos_token_id": [END, -1]}))
