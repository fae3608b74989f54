"""Constrained output: whatever a random model says is what was asked for; bad grammars are refused."""

import itertools
import json
import re

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from t5style.corpus.vocabulary import ByteVocabulary, CharacterVocabulary, TokenizerVocabulary
from t5style.infer import grammar
from t5style.infer.ids import TokenIds, token_ids
from t5style.infer.model import Model
from t5style.run_dir import UserError
from tests.infer import chat_templates, test_chat_template
from tests.infer.conftest import tiny

pytest.importorskip("llguidance", reason="llguidance (extra: grammar) is not installed")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", None]}, "maxItems": 3},
        "pet": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/pet"}]},
    },
    "required": ["name", "age", "pet"],
    "additionalProperties": False,
    "$defs": {
        "pet": {
            "type": "object",
            "properties": {"kind": {"const": "cat"}},
            "required": ["kind"],
            "additionalProperties": False,
        }
    },
}


def fits(value) -> bool:
    """The schema, written out."""
    return (
        isinstance(value, dict)
        and {"name", "age", "pet"} <= value.keys() <= {"name", "age", "tags", "pet"}
        and isinstance(value["name"], str)
        and len(value["name"]) <= 5
        and type(value["age"]) is int
        and 0 <= value["age"] <= 150
        and len(tags := value.get("tags", [])) <= 3
        and all(tag in ("a", "b", None) for tag in tags)
        and value["pet"] in (None, {"kind": "cat"})
    )


def walk(made, seed: int, limit: int = 400) -> list[int]:
    """Tokens chosen by chance, up to the end of sequence."""
    random = np.random.default_rng(seed)
    allowed = made()
    tokens: list[int] = []
    while len(tokens) < limit:
        mask = allowed(tuple(tokens))
        assert mask.shape == (made.vocab_size,)
        assert mask.dtype == bool
        assert mask.any()
        token = int(random.choice(np.flatnonzero(mask)))
        if token in made.eos:
            return tokens
        tokens.append(token)
    raise AssertionError(f"no end after {limit} tokens")


class Fake:
    """What `constraint` wants to know of a model."""

    def __init__(self, vocabulary, more: int = 3) -> None:
        self.vocabulary = vocabulary
        self.ids = token_ids(vocabulary)
        self.config = type("Config", (), {"vocab_size": vocabulary.vocab_size + more})

    def text_vocabulary(self):
        return self.vocabulary


@pytest.fixture(scope="module", params=["byte", "character", "sentencepiece", "byte_level"])
def fake(request, tmp_path_factory):
    text = "".join(m["content"] for messages in chat_templates.CONVERSATIONS for m in messages)
    if request.param == "byte":
        return Fake(ByteVocabulary(extra_ids=4))
    if request.param == "character":
        return Fake(CharacterVocabulary("".join(map(chr, range(32, 127)))))
    if request.param == "byte_level":
        return Fake(chat_templates.vocabulary())
    return Fake(test_chat_template.sentencepiece(tmp_path_factory.mktemp("spm"), text * 2))


# --------------------------------------------------------------------------------------------- what comes out


@pytest.mark.parametrize("seed", range(4))
def test_a_random_models_answers_are_json_of_the_schema(seed):
    model = tiny("decoder_only")
    made = grammar.constraint(model, json_schema=SCHEMA)
    answers = model.complete(
        ["a", "bcd"], max_new_tokens=200, temperature=2.0, seed=2 * seed, constraint=made
    )
    for answer in answers:
        assert answer.finish_reason == "stop"
        assert fits(json.loads(answer.text)), answer.text
        assert not set(answer.tokens) & {0, 1, 2, *range(259, 264)}


def test_a_constrained_request_leaves_the_others_of_its_batch_alone():
    model = tiny("decoder_only")
    made = grammar.constraint(model, regex="[ab]{3}")
    free = model.complete(["xy"], max_new_tokens=8, temperature=1.0, seed=7)
    both = model.complete(["xy", "xy"], max_new_tokens=8, temperature=1.0, seed=[7, 7], constraint=made)
    assert all(re.fullmatch("[ab]{3}", answer.text) for answer in both)
    assert free[0].text != both[0].text


@pytest.mark.parametrize("seed", range(10))
def test_any_vocabulary_writes_the_schema(fake, seed):
    tokens = walk(grammar.constraint(fake, json_schema=SCHEMA), seed)
    assert fits(json.loads(fake.vocabulary.decode(tokens)))
    pieces = grammar.token_bytes(fake.vocabulary)
    assert all(pieces[token] is not None for token in tokens)


PATTERNS = [r"[a-c]{2,5}\d", r"(yes|no)( sir)?", r"\d{4}-\d{2}-\d{2}", r"a?b?c?"]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_any_vocabulary_writes_the_pattern(fake, pattern):
    made = grammar.constraint(fake, regex=pattern)
    for seed in range(5):
        text = fake.vocabulary.decode(walk(made, seed))
        assert re.fullmatch(pattern, text), text


def test_a_grammar_is_kept_and_its_end_allowed_only_where_it_is_whole(fake):
    lark = 'start: "(" item ("," item)* ")"\nitem: /[a-d]/ | start\n'
    made = grammar.constraint(fake, lark=lark)
    ended = 0
    for seed in range(40):
        try:
            text = fake.vocabulary.decode(walk(made, seed, limit=150))
        except AssertionError:
            continue  # it nests without end now and then
        assert text.count("(") == text.count(")") > 0
        assert text == re.sub(r"[^(),a-d]", "", text)
        ended += 1
    assert ended > 10
    allowed = made()
    (opening,) = fake.vocabulary.encode("(")
    assert not allowed(())[list(made.eos)].any()
    assert not allowed((opening,))[list(made.eos)].any()
    whole = fake.vocabulary.encode("(a)")
    state = made()
    for count in range(len(whole)):
        state(tuple(whole[:count]))
    assert np.flatnonzero(state(tuple(whole))).tolist() == sorted(made.eos)


CHOICES = ["yes", "no", "not at all", "a.b*c\\d", "[x]", "line\nbreak", 'q"uote']


def test_choices_are_taken_literally():
    fake = Fake(ByteVocabulary())
    made = grammar.constraint(fake, choices=CHOICES)
    found = {fake.vocabulary.decode(walk(made, seed)) for seed in range(200)}
    assert found == set(CHOICES)


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=3)
)
def test_a_choice_is_one_of_the_choices(choices):
    fake = Fake(ByteVocabulary())
    made = grammar.constraint(fake, choices=choices)
    assert fake.vocabulary.decode(walk(made, 0)) in choices


def test_any_json_can_be_asked_for():
    fake = Fake(ByteVocabulary())
    state = grammar.constraint(fake, json_schema="{}")()
    text = json.dumps({"a": [1, None, {"é": 'x"'}]}, ensure_ascii=False)
    tokens = fake.vocabulary.encode(text)
    for count, token in enumerate(tokens):
        assert state(tuple(tokens[:count]))[token], text[:count]
    assert state(tuple(tokens))[fake.ids.eos[0]]


def test_special_tokens_are_never_allowed(fake):
    state = grammar.constraint(fake, regex="(?s:.*)")()
    special = [i for i, piece in enumerate(grammar.token_bytes(fake.vocabulary)) if piece is None]
    assert len(special) >= 3
    mask = state(())
    assert set(np.flatnonzero(mask)) & set(special) == set(fake.ids.eos)
    assert not mask[fake.vocabulary.vocab_size :].any()
    assert mask.sum() > 90


# -------------------------------------------------------------------------------------------- bytes of tokens


def test_bytes_of_tokens_are_what_they_decode_to(fake):
    pieces = grammar.token_bytes(fake.vocabulary)
    assert len(pieces) == fake.vocabulary.vocab_size
    text = "The capital of Japan is Tokyo. 2 + 2"
    ids = fake.vocabulary.encode(text)
    assert b"".join(pieces[token] for token in ids).decode() == text
    checked = 0
    for token, piece in enumerate(pieces):
        if piece is not None and (text := piece.decode(errors="ignore")).encode() == piece:
            assert fake.vocabulary.decode([token]) == text
            checked += 1
    assert checked > 90


def test_bytes_of_tokens_are_those_that_the_library_finds_itself():
    import llguidance

    vocabulary = chat_templates.vocabulary()
    theirs = llguidance.LLTokenizer(vocabulary.content.decode(), eos_token=[vocabulary.eos_id])
    for token, piece in enumerate(grammar.token_bytes(vocabulary)):
        if piece == b"\xff":
            continue  # no text has this byte; the library marks special tokens with it
        if piece is not None:
            assert theirs.decode_bytes([token]) == piece
        else:
            assert theirs.is_special_token(token)


def test_pieces_with_bytes_and_marks_for_spaces():
    import tokenizers

    words = [
        "<unk>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "\u2581",
        "a",
        "\u2581a",
        "\u2581b",
    ]
    made = tokenizers.Tokenizer(
        tokenizers.models.BPE(
            {word: i for i, word in enumerate(words)},
            [("\u2581", "a")],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    decoders = tokenizers.decoders
    made.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_special_tokens(["<unk>", "</s>"])
    vocabulary = TokenizerVocabulary(made.to_str().encode())
    pieces = grammar.token_bytes(vocabulary)
    assert pieces[:3] == [None, None, b"\0"]
    assert pieces[257:] == [b"\xff", b" ", b"a", b" a", b" b"]
    fake = Fake(vocabulary)
    assert vocabulary.decode(walk(grammar.constraint(fake, regex="é a{3}( a| b)"), 3)).startswith("é aaa ")


# ----------------------------------------------------------------------------------------------- bad requests


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({}, "give one of json_schema, regex, lark, choices, not none"),
        ({"regex": "a", "lark": "b"}, "not regex and lark"),
        ({"json_schema": {"type": "objekt"}}, r"json_schema '.*objekt.*': Invalid type: objekt"),
        ({"json_schema": {"if": {}}}, "Unimplemented keys"),
        ({"json_schema": '{"type": '}, "json_schema is not JSON"),
        ({"json_schema": {"const": object()}}, "not made of JSON values"),
        ({"regex": "a(b"}, r"regex 'a\(b': unclosed group"),
        ({"lark": 'start: "a" foo\n'}, "unknown name"),
        ({"lark": 'begin: "a"\n'}, "start"),
        ({"choices": []}, "list of texts"),
        ({"choices": "yes"}, "list of texts"),
        ({"choices": ["yes", ""]}, "list of texts"),
        ({"regex": "a", "eos": ()}, "no end of sequence"),
    ],
)
def test_a_bad_grammar_gives_one_sentence(fields, message):
    with pytest.raises(UserError, match=message) as error:
        grammar.constraint(Fake(ByteVocabulary()), **fields)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300


def test_a_token_that_was_not_allowed_is_an_error_and_not_an_answer():
    fake = Fake(ByteVocabulary())
    state = grammar.constraint(fake, regex="ab")()
    state(())
    with pytest.raises(UserError, match="cannot go on"):
        state((fake.vocabulary.encode("x")[0],))


def test_a_model_without_text_is_refused():
    model = tiny("decoder_only")
    bare = Model(model.config, model.params, None, TokenIds())
    with pytest.raises(ValueError, match="no tokenizer"):
        grammar.constraint(bare, regex="a")


def test_word_pieces_are_refused():
    import tokenizers

    made = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2, "[SEP]": 3}))
    made.decoder = tokenizers.decoders.WordPiece()
    with pytest.raises(UserError, match="joins tokens by WordPiece"):
        grammar.token_bytes(TokenizerVocabulary(made.to_str().encode()))


def test_states_do_not_share():
    made = grammar.constraint(Fake(ByteVocabulary()), regex="ab|cd")
    first, second = made(), made()
    a, c = (ByteVocabulary().encode(letter)[0] for letter in "ac")
    first(())
    first((a,))
    assert second(())[[a, c]].all()
    assert list(itertools.islice(np.flatnonzero(first((a,))), 2)) == ByteVocabulary().encode("b")
