"""The tokenizer against transformers on the real Qwen2.5 files, and its errors on a small one."""

import json
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers import CONFIG, write_word_tokenizer
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors
from tokenizers import Tokenizer as FastTokenizer
from transformers import AutoTokenizer

import countdown_task
from countdown_task import RESPONSE_PREFIX, SYSTEM_MESSAGE, render_prompt
from examples import gsm8k_task
from published_format import write_config
from tokenizer import FILES, Tokenizer
from warm_start import make_tokenizer

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
    "a trace": "\n 3 + 5 = 8; 8 + 7 = 15, want 6: no, I give up</think>\n<answer>8</answer>",
    "a trace in other white space": "\n  3 + 5 = 8;  8 + 7 = 15 , WANT 6: no",
}


# ---------------------------------------------------------------- against transformers


@pytest.fixture(scope="module", params=["tiny", pytest.param("qwen2.5", marks=needs_qwen)])
def saved(request, tmp_path_factory) -> Path:
    """A tokenizer saved by us, beside a Qwen2 config.json as in a checkpoint.

    transformers replaces the normalizer and pre-tokenizer of a tokenizer in such a directory.
    """
    directory = tmp_path_factory.mktemp("checkpoint")
    source = QWEN
    if request.param == "tiny":
        source = directory / "source"
        make_tokenizer(source)
    Tokenizer.from_pretrained(source).save_pretrained(directory / "saved")
    config = asdict(CONFIG) | {"eos_token_id": None, "vocab_size": 151_936}
    write_config(directory / "saved/config.json", config, torch.float32)
    return directory / "saved"


@pytest.fixture(scope="module")
def tokenizer(saved) -> Tokenizer:
    return Tokenizer.from_pretrained(saved)


@pytest.fixture(scope="module")
def reference(saved):
    return AutoTokenizer.from_pretrained(saved)


# Catches: skip_special_tokens=True; another normalizer in make_tokenizer; an added token that
# swallows the white space around it.
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_ids_and_text_equal_transformers(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference(text)["input_ids"]
    assert all(type(i) is int for i in ids)
    assert tokenizer.decode(ids) == reference.decode(ids)
    if "\u0301" not in text:  # both tokenizers compose this accent with its letter (NFC)
        assert tokenizer.decode(ids) == text


def test_any_ids_decode_as_in_transformers(tokenizer, reference):
    for ids in (
        list(range(0, tokenizer.vocab_size, 97)),
        [97, 222, 30],
        [tokenizer.vocab_size - 1],
    ):
        assert tokenizer.decode(ids) == reference.decode(ids)
    hieroglyph = tokenizer.encode("𓀀")  # so rare that every vocabulary spells it in bytes
    assert tokenizer.decode(hieroglyph[:1]) == "\ufffd"


CHATS = {
    "user": [{"role": "user", "content": "Hi!"}],
    "system and user": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": '  1 < 2 & "so" {{ on }}\n\n'},
    ],
    "empty system message": [
        {"role": "system", "content": ""},
        {"role": "user", "content": "思"},
    ],
    "several turns": [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "c"},
    ],
    "late system message, tool": [
        {"role": "user", "content": "a"},
        {"role": "system", "content": "late"},
        {"role": "tool", "content": "9"},
    ],
}


# Catches: add_generation_prompt=False.
@pytest.mark.parametrize("messages", CHATS.values(), ids=CHATS)
def test_chats_render_as_in_transformers(tokenizer, reference, messages):
    assert tokenizer.render_chat(messages) == reference.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True
    )


# Catches: system and user message swapped; RESPONSE_PREFIX left out; the numbers reordered.
def test_the_countdown_prompt_is_a_chat_and_the_start_of_the_answer(tokenizer, reference):
    prompt = render_prompt({"numbers": [44, 19, 35], "target": 98}, tokenizer)
    question = prompt.split("user\n", 1)[1].split("<|im_end|>", 1)[0]
    assert "[44, 19, 35]" in question
    assert "98" in question
    messages = [
        {"role": "system", "content": SYSTEM_MESSAGE},
        {"role": "user", "content": question},
    ]
    chat = reference.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == chat + RESPONSE_PREFIX
    assert prompt.endswith("<think>")
    assert tokenizer.encode(prompt) == reference(prompt)["input_ids"]


def test_vocabulary_and_stop_ids_agree_with_transformers(tokenizer, reference):
    assert tokenizer.vocab_size == len(reference)
    ends = {reference.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|endoftext|>")}
    assert tokenizer.stop_ids == ends
    assert reference.eos_token_id in ends


# ---------------------------------------------------------------- a small tokenizer

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    "{% if add_generation_prompt %}[assistant:{% endif %}"
)
MESSAGES = [{"role": "system", "content": "calm"}, {"role": "user", "content": "hi"}]
END, PAD, START = 256, 257, 258  # special tokens after the 256 bytes


def write_tokenizer(directory: Path, *, generation: dict | None = None, **changes) -> Path:
    """Write a tokenizer with one token per byte and three special tokens.

    generation: generation_config.json, if any. changes: settings of tokenizer_config.json.
    """
    vocab = {byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    fast = FastTokenizer(models.BPE(vocab=vocab, merges=[]))
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    special = [AddedToken(t, special=True, normalized=False) for t in ("<end>", "<pad>", "<start>")]
    fast.add_special_tokens(special)
    directory.mkdir(parents=True, exist_ok=True)
    fast.save(str(directory / "tokenizer.json"))
    settings = {"chat_template": TEMPLATE, "eos_token": "<end>", "bos_token": None} | changes
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def load(directory: Path, **changes) -> Tokenizer:
    return Tokenizer.from_pretrained(write_tokenizer(directory, **changes))


def test_a_small_tokenizer_encodes_decodes_and_renders(tmp_path):
    tokenizer = load(tmp_path)
    ids = tokenizer.encode("hé<end> <pad>")
    assert len(ids) == 6  # h, two bytes of é, <end>, a space, <pad>
    assert (ids[3], ids[5]) == (END, PAD)
    assert tokenizer.decode(ids) == "hé<end> <pad>"
    assert tokenizer.decode(ids[:2]) == "h\ufffd"
    assert tokenizer.vocab_size == 259
    assert tokenizer.render_chat(MESSAGES) == "[system:calm][user:hi][assistant:"
    assert Tokenizer.from_pretrained(str(tmp_path)).encode("hi") == tokenizer.encode("hi")


@pytest.mark.parametrize(
    ("render", "problem"),
    [
        (countdown_task.render_prompt, {"numbers": [3, 5], "target": 8}),
        (gsm8k_task.render_prompt, {"question": "How many?"}),
    ],
)
def test_a_template_that_opens_the_thinking_is_not_opened_again(tmp_path, render, problem):
    template = "{{ messages[-1].content }}<assistant><think>\n"  # as in the R1 distillations
    prompt = render(problem, load(tmp_path, chat_template=template))
    _, answer = prompt.split("<assistant>")
    assert answer.strip() == "<think>"


STOPS = {  # generation_config.json, changes of tokenizer_config.json, config.json -> stop ids
    "a list": ({"eos_token_id": [END, PAD]}, {}, {}, {END, PAD}),
    "an int": ({"eos_token_id": START}, {"eos_token": "<start>"}, {}, {START}),
    "id 0": ({"eos_token_id": 0}, {"eos_token": None}, {}, {0}),
    "no generation_config.json": (None, {}, {}, {END}),
    "eos_token as an object": (None, {"eos_token": {"content": "<start>"}}, {}, {START}),
    "eos_token_id is null": ({"eos_token_id": None}, {}, {"eos_token_id": None}, {END}),
    "no eos_token_id": ({"temperature": 0.7}, {}, {}, {END}),
    "an empty list": ({"eos_token_id": []}, {}, {}, {END}),
    "an eos_token that is no token": ({"eos_token_id": PAD}, {"eos_token": "<no>"}, {}, {PAD}),
    "only config.json": (None, {"eos_token": None}, {"eos_token_id": [END, PAD]}, {END, PAD}),
    "a text token in a later file": ({"eos_token_id": END}, {}, {"eos_token_id": 5}, {END}),
    "no ids in a later file": ({"eos_token_id": END}, {}, {"eos_token_id": [[PAD], "2"]}, {END}),
    "an unknown id in a later file": ({"eos_token_id": END}, {}, {"eos_token_id": 10**6}, {END}),
    "the first names all": ({"eos_token_id": [END, PAD]}, {}, {"eos_token_id": PAD}, {END, PAD}),
}
CONFLICTS = {  # the same, with files that disagree
    "the tokenizer": ({"eos_token_id": PAD}, {}, {}, {PAD, END}),
    "config.json": ({"eos_token_id": END}, {}, {"eos_token_id": [END, PAD]}, {END, PAD}),
    "all three": ({"eos_token_id": START}, {}, {"eos_token_id": PAD}, {START, PAD, END}),
    "without the first": (None, {}, {"eos_token_id": PAD}, {PAD, END}),
}


# Catches: `ids` -> `ids and ids[0]`, which loses id 0; only the first file read.
@pytest.mark.parametrize(
    ("generation", "changes", "config", "wanted"),
    (STOPS | CONFLICTS).values(),
    ids=STOPS | CONFLICTS,
)
def test_stop_ids_are_all_that_any_file_names(tmp_path, generation, changes, config, wanted):
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load(tmp_path, generation=generation, **changes).stop_ids == frozenset(wanted)


# Catches: a conflict reported for the published models, whose config.json names one of two ids.
def test_files_that_disagree_about_stop_ids_are_named(tmp_path):
    for is_conflict, cases in ((False, STOPS), (True, CONFLICTS)):
        for i, (generation, changes, config, _) in enumerate(cases.values()):
            directory = tmp_path / f"{is_conflict}{i}"
            directory.mkdir()
            (directory / "config.json").write_text(json.dumps(config))
            tokenizer = load(directory, generation=generation, **changes)
            assert bool(tokenizer.stop_conflict) == is_conflict
    assert tokenizer.stop_conflict == (
        "answers end at <end><pad> (config.json: <pad>; tokenizer_config.json: <end>)"
    )


BAD_STOPS = {
    "beyond the vocabulary": ({"eos_token_id": 259}, {}),
    "negative": ({"eos_token_id": [END, -1]}, {}),
    "text": ({"eos_token_id": "<end>"}, {}),
    "text in a list": ({"eos_token_id": ["<end>"]}, {}),
    "an empty list": ({"eos_token_id": []}, {"eos_token": None}),
    "true": ({"eos_token_id": True}, {}),
    "a float": ({"eos_token_id": 256.0}, {}),
    "a list in a list": ({"eos_token_id": [[256]]}, {}),
    "an object": ({"eos_token_id": {"id": 256}}, {}),
    "an unknown eos_token": (None, {"eos_token": "<nowhere>"}),
    "no eos_token": (None, {"eos_token": None}),
    "a number as eos_token": (None, {"eos_token": 256}),
}


@pytest.mark.parametrize(("generation", "changes"), BAD_STOPS.values(), ids=BAD_STOPS)
def test_stop_ids_that_are_not_ids_of_the_tokenizer_are_refused(tmp_path, generation, changes):
    with pytest.raises(ValueError, match=r"(?s)stop ids.*eos_token_id") as caught:
        load(tmp_path, generation=generation, **changes)
    assert str(tmp_path) in str(caught.value)


def test_published_truncation_and_padding_are_switched_off(tmp_path):
    # Catches: no_truncation or no_padding left out, which silently cuts or pads prompts.
    fast = FastTokenizer.from_file(str(write_tokenizer(tmp_path) / "tokenizer.json"))
    fast.enable_truncation(5)
    fast.enable_padding(length=20, pad_id=PAD, pad_token="<pad>")
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer.from_pretrained(tmp_path)
    assert tokenizer.decode(tokenizer.encode("a prompt")) == "a prompt"


def test_encoding_adds_no_special_tokens(tmp_path):
    # Catches: add_special_tokens=True; the chat template writes these tokens already.
    fast = FastTokenizer.from_file(str(write_tokenizer(tmp_path) / "tokenizer.json"))
    fast.post_processor = processors.TemplateProcessing(
        single="<start> $A", special_tokens=[("<start>", START)]
    )
    fast.save(str(tmp_path / "tokenizer.json"))
    assert fast.encode("hi").ids[0] == START
    assert START not in Tokenizer.from_pretrained(tmp_path).encode("hi")


def test_a_text_on_which_the_tokenizer_fails_is_named(tmp_path):
    # Catches: `except Exception` -> `except ValueError`; tokenizers raises a bare Exception.
    write_tokenizer(tmp_path)
    fast = FastTokenizer(models.WordLevel({"<end>": 0}, unk_token="<unknown>"))
    fast.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(ValueError, match=r"fails on 'hi'.*fetch the model again") as caught:
        Tokenizer.from_pretrained(tmp_path).encode("hi")
    assert str(tmp_path) in str(caught.value)


def test_a_panic_of_the_tokenizer_is_named(tmp_path):
    # Catches: `except BaseException` -> `except Exception`; a panic in Rust is no Exception.
    path = write_word_tokenizer(tmp_path, size=7, stop_ids=[2]) / "tokenizer.json"
    split = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated"}
    changes = {"pre_tokenizer": split | {"invert": False}}
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=r"fails on 'aaaa.*fetch the model again"):
        Tokenizer.from_pretrained(tmp_path).encode(40 * "a" + "b")


# ---------------------------------------------------------------- chat templates


def test_chat_template_jinja_takes_precedence(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("{{ messages[1].content }}!")
    assert load(tmp_path).render_chat(MESSAGES) == "hi!"
    assert load(tmp_path, chat_template=None).render_chat(MESSAGES) == "hi!"


def test_of_several_named_templates_the_default_is_taken(tmp_path):
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    assert load(tmp_path, chat_template=templates).render_chat(MESSAGES) == "yes"


FEATURES = {
    "special tokens": "{{ eos_token }}|{{ bos_token }}|{{ pad_token is defined }}",
    "no tools": "{{ tools is none }}",
    "tojson": "{{ messages[1] | tojson }}{{ {'a': 'é<'} | tojson(indent=2) }}",
    "break and continue": "{% for i in range(9) %}{% if i == 2 %}{% continue %}{% endif %}"
    "{% if i == 4 %}{% break %}{% endif %}{{ i }}{% endfor %}",
    "white space around blocks": "{% for m in messages %}\n  {% if m.role == 'user' %}\n"
    "  {{ m.content }}\n  {% endif %}\n{% endfor %}\nend",
    "generation": "{% set x = 1 %}{% for m in messages %}\n{% generation %}\n{% set x = 2 %}"
    "{{ m.content }}\n{% endgeneration %}\n{{ x }}{% endfor %}",
    "namespace": "{% set n = namespace(x=1) %}{% for m in messages %}{% set n.x = n.x + 1 %}"
    "{% endfor %}{{ n.x }}",
    "date": "{{ strftime_now('100%%') }}",
    "attribute of Python": "[{{ messages.__class__ }}]",
}


# Catches: trim_blocks, lstrip_blocks, loopcontrols or tojson left out; nodes.Scope left out.
@pytest.mark.parametrize("template", FEATURES.values(), ids=FEATURES)
def test_features_of_templates_work_as_in_transformers(tmp_path, template):
    tokenizer = load(tmp_path, chat_template=template, tokenizer_class="PreTrainedTokenizerFast")
    reference = AutoTokenizer.from_pretrained(tmp_path)
    wanted = reference.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True)
    assert tokenizer.render_chat(MESSAGES) == wanted


HOSTILE_TEMPLATES = {
    "every class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a class through a filter": "{{ (messages | attr('__class__')).mro() }}",
    "a class through an index": "{{ messages['__class__'].mro() }}",
    "a class through format": "{{ '{0.__class__.__mro__}'.format(1) }}",
    "globals of a macro": "{% macro f() %}{% endmacro %}{{ f.__init__.__globals__ }}",
    "globals of a built-in": "{{ cycler.__init__.__globals__.os.popen('true').read() }}",
    "appending a message": "{{ messages.append(1) }}",
    "removing the messages": "{{ messages.clear() }}",
    "changing a message": "{{ messages[0].update({'role': 'x'}) }}",
    "a range of 10**9": "{% for i in range(10 ** 9) %}{% endfor %}",
    "its own error": "{{ raise_exception('roles must alternate') }}",
    "an unknown function": "{{ nothing_of_the_kind() }}",
    "an unknown key of an unknown key": "{{ messages[7].content.text }}",
    "a wrong type": "{{ messages + 1 }}",
    "division by zero": "{{ 1 / 0 }}",
    "a file": "{% include '/etc/hostname' %}",
}


# Catches: ImmutableSandboxedEnvironment -> SandboxedEnvironment, or -> Environment.
@pytest.mark.parametrize("template", HOSTILE_TEMPLATES.values(), ids=HOSTILE_TEMPLATES)
def test_a_template_that_fails_or_leaves_the_sandbox_is_refused(tmp_path, template):
    tokenizer = load(tmp_path, chat_template=template)
    messages = [dict(message) for message in MESSAGES]
    with pytest.raises(ValueError, match="chat template fails") as caught:
        tokenizer.render_chat(messages)
    assert str(tmp_path) in str(caught.value)
    assert ("roles must alternate" in template) == ("roles must alternate" in str(caught.value))
    assert messages == MESSAGES


MALFORMED_TEMPLATES = {
    "an open block": "{% for m in messages %}",
    "an open expression": "{{ messages",
    "an open generation block": "{% generation %}",
    "an unknown tag": "{% nonsense %}",
    "an unknown filter": "{{ messages | nonsense }}",
    "5,000 parentheses": "{{ " + "(" * 5000,
    "50 loops in one another": "{% for m in messages %}" * 50 + "{% endfor %}" * 50,
}


@pytest.mark.parametrize("template", MALFORMED_TEMPLATES.values(), ids=MALFORMED_TEMPLATES)
def test_a_malformed_template_is_refused_when_the_tokenizer_is_loaded(tmp_path, template):
    with pytest.raises(ValueError, match="chat template does not parse") as caught:
        load(tmp_path, chat_template=template)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("template", [None, 3, [], [{"name": "rag", "template": "x"}]])
def test_a_model_without_a_template_is_refused(tmp_path, template):
    with pytest.raises(ValueError, match=r"no chat template.*Instruct"):
        load(tmp_path, chat_template=template)


# ---------------------------------------------------------------- files

CONFIGS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
DAMAGE = {
    "empty": b"",
    "cut": b'{"version": "1.0", "mod',
    "HTML": b"<html>\n<h1>404</h1>\n</html>\n",
    "a list": b"[1, 2]",
    "null": b"null",
    "not UTF-8": b'{"a": "\xff\xfe"}',
    "100,000 objects in one another": b'{"a":' * 10**5,
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_damaged_file_is_named_in_one_line(tmp_path, name, damage):
    write_tokenizer(tmp_path, generation={"eos_token_id": END})
    (tmp_path / name).write_bytes(damage)
    with pytest.raises(ValueError, match=r"fetch the model again") as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("template", [["x"], [{"name": "default"}]])
def test_a_damaged_list_of_templates_is_named(tmp_path, template):
    with pytest.raises(ValueError, match="chat_template is damaged") as caught:
        load(tmp_path, chat_template=template)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("name", CONFIGS[:2])
def test_a_missing_file_is_named(tmp_path, name):
    write_tokenizer(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError) as caught:
        Tokenizer.from_pretrained(tmp_path)
    assert str(tmp_path / name) in str(caught.value)


# Catches: a file left out of FILES; a file rewritten instead of copied.
def test_saving_copies_every_published_file(tmp_path):
    generation = {"eos_token_id": [END, PAD], "unknown": [1.50]}
    old = write_tokenizer(tmp_path / "old", generation=generation)
    published = {
        "chat_template.jinja": "{{ messages[0].content }}\n",
        "vocab.json": "{ }",
        "merges.txt": "#version: 0.2\n",
        "special_tokens_map.json": "{\n}",
        "added_tokens.json": "{}\n",
    }
    for name, text in published.items():
        (old / name).write_text(text)
    (old / "model.safetensors").write_bytes(b"the model saves its weights itself")
    tokenizer, new = Tokenizer.from_pretrained(old), tmp_path / "new/directory"
    tokenizer.save_pretrained(new)
    assert {file.name for file in new.iterdir()} == {*CONFIGS, *published} == set(FILES)
    assert all(file.read_bytes() == (old / file.name).read_bytes() for file in new.iterdir())
    again = Tokenizer.from_pretrained(new)
    assert again.render_chat(MESSAGES) == tokenizer.render_chat(MESSAGES) == "calm"
    assert again.encode("hé<end>") == tokenizer.encode("hé<end>")
    assert again.stop_ids == {END, PAD}


def test_a_tokenizer_can_be_saved_after_its_directory_is_deleted(tmp_path):
    # A resumed run reads its tokenizer from a checkpoint, which keep_checkpoints deletes later.
    tokenizer = load(tmp_path / "step-000100")
    shutil.rmtree(tmp_path / "step-000100")
    tokenizer.save_pretrained(tmp_path / "step-000300")
    again = Tokenizer.from_pretrained(tmp_path / "step-000300")
    assert again.encode("hi") == tokenizer.encode("hi")


# Catches: the links of a downloaded directory followed, so that a private file is published.
def test_a_link_out_of_the_directory_is_refused(tmp_path):
    write_tokenizer(tmp_path / "model")
    (tmp_path / "private").write_text("a secret")
    for target in ("../private", tmp_path / "private"):
        link = tmp_path / "model/vocab.json"
        link.symlink_to(target)
        with pytest.raises(ValueError, match=r"vocab.json is a link to .*/private, outside"):
            Tokenizer.from_pretrained(tmp_path / "model")
        link.unlink()
    (tmp_path / "model/special_tokens_map.json").symlink_to("tokenizer_config.json")
    tokenizer = Tokenizer.from_pretrained(tmp_path / "model")
    (tmp_path / "link").symlink_to("model")  # a link to the whole directory is the user's own
    assert Tokenizer.from_pretrained(tmp_path / "link").stop_ids == tokenizer.stop_ids


# Catches: every link refused. The hub's cache consists of links.
def test_the_links_of_the_hubs_cache_are_followed(tmp_path):
    cache = tmp_path / "hub/models--a--b"
    snapshot, blobs = cache / "snapshots/0a1b", cache / "blobs"
    published = write_tokenizer(tmp_path / "published")
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for number, file in enumerate(sorted(published.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
    (tmp_path / "elsewhere").symlink_to("hub")
    for directory in (snapshot, tmp_path / "elsewhere/models--a--b/snapshots/0a1b"):
        Tokenizer.from_pretrained(directory).save_pretrained(tmp_path / "new")
        for file in published.iterdir():
            assert not (tmp_path / "new" / file.name).is_symlink()
            assert (tmp_path / "new" / file.name).read_bytes() == file.read_bytes()
