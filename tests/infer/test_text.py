"""Text while it comes: joined pieces are the whole text, characters are whole, stop texts are found."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from t5style.corpus.vocabulary import ByteVocabulary, TokenizerVocabulary
from t5style.infer.text import TextStream

BYTES = ByteVocabulary(extra_ids=5)


def metaspace() -> TokenizerVocabulary:
    """A vocabulary that spells spaces in its pieces and unknown characters in bytes, as LLaMA's does."""
    tokenizers = pytest.importorskip("tokenizers")
    pieces = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581", "\u2581a", "a", "b", "\u2581\u2581", "ab", "."]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.Unigram([(piece, -1.0) for piece in pieces], 2, byte_fallback=True)
    )
    decoders = tokenizers.decoders
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return TokenizerVocabulary(tokenizer.to_str().encode())


def pieces_of(vocabulary, ids, stop=()):
    stream, pieces = TextStream(vocabulary, stop), []
    for token in ids:
        if stream.push(token):
            break
        pieces.append(stream.piece())
    stream.finish()
    return [*pieces, stream.piece()], stream


@pytest.mark.parametrize("vocabulary", [BYTES, "metaspace"], ids=["bytes", "metaspace"])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_joined_pieces_are_the_text(vocabulary, data):
    vocabulary = metaspace() if vocabulary == "metaspace" else vocabulary
    characters = st.text(st.sampled_from("ab. é€😀\u2581"), max_size=8).map(vocabulary.encode)
    token = st.integers(0, vocabulary.vocab_size - 1).map(lambda token: [token])
    ids = np.concatenate([[], *data.draw(st.lists(characters | token, max_size=12))]).astype(int).tolist()
    # The tokenizers library reads all bytes of a run as unknown if one is.
    assume(vocabulary is BYTES or "\ufffd" not in vocabulary.decode(ids))
    pieces, stream = pieces_of(vocabulary, ids)
    assert "".join(pieces) == stream.text == vocabulary.decode(ids)
    stop = data.draw(
        st.lists(st.text(st.sampled_from("ab. é"), min_size=1, max_size=3), min_size=1, max_size=2)
    )
    whole = stream.text
    found = any(text in whole for text in stop)
    pieces, stream = pieces_of(vocabulary, ids, stop)
    if not found:
        assert "".join(pieces) == whole
        assert stream.stopped is None
    else:
        assert stream.stopped is not None
        assert "".join(pieces) == stream.text
        # Cut before a stop text; several may be whole after the same token, then before the first of them.
        after = vocabulary.decode(ids[: stream.stopped])
        assert stream.text == after[: min(after.find(text) for text in stop if text in after)]
        before = vocabulary.decode(ids[: stream.stopped - 1]).rstrip("\ufffd")
        assert not any(text in before for text in stop)


def test_half_characters_and_beginnings_of_stop_texts_are_held_back():
    ids = BYTES.encode("a€b<end")
    stream, pieces = TextStream(BYTES, ["<end>"]), []
    for token in ids:
        stream.push(token)
        pieces.append(stream.piece())
    assert pieces == ["a", "", "", "€", "b", "", "", "", ""]
    assert stream.push(BYTES.encode(">")[0])
    assert (stream.piece(), stream.text, stream.stopped) == ("", "a€b", 10)
    pieces, stream = pieces_of(BYTES, ids, ["<end>"])
    assert pieces[-1] == "<end"  # nothing came any more: it was no stop text
    pieces, _ = pieces_of(BYTES, BYTES.encode("a€")[:-1])
    assert pieces == ["a", "", "", "\ufffd"]


def test_a_long_text_costs_as_much_per_token_as_a_short_one(monkeypatch):
    longest = 0
    decode = BYTES.decode

    def counted(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids)

    monkeypatch.setattr(BYTES, "decode", counted)
    pieces_of(BYTES, BYTES.encode("wörter " * 50))
    assert longest < 12
