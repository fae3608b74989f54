"""Token ids with a meaning to decoding."""

from __future__ import annotations

import dataclasses

from t5style.corpus.vocabulary import Vocabulary


@dataclasses.dataclass(frozen=True)
class TokenIds:
    """Ids with a meaning to decoding.

    pad: fills what is no token.
    eos: ends an answer; several may do so, none means that only max_new_tokens ends it.
    start: what the decoder of an encoder-decoder starts with.
    prefix: what stands before the text of a decoder-only prompt; None for nothing.
    """

    pad: int = 0
    eos: tuple[int, ...] = (1,)
    start: int = 0
    prefix: int | None = None


def token_ids(vocabulary: Vocabulary) -> TokenIds:
    """The ids that models trained here use: the decoder starts with the vocabulary's bos, which for T5 is
    pad.
    """
    return TokenIds(
        pad=vocabulary.pad_id, eos=(vocabulary.eos_id,), start=vocabulary.bos_id, prefix=vocabulary.bos_id
    )
