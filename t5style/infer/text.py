"""Tokens to text while they come: whole characters only, and cut where a stop text begins."""

from __future__ import annotations

from collections.abc import Sequence

from t5style.corpus.vocabulary import Vocabulary

_UNFINISHED = "\ufffd"  # what bytes read as that are no character, or not yet


class TextStream:
    """The text of an answer, token by token.

    Joined, the pieces are the vocabulary's text of all tokens, up to the stop text (where bytes are no text
    at all, it may have more U+FFFD). What may still become another character, or a stop text, is held back.

    Attributes:
      text: so far, cut where a stop text begins.
      stopped: after how many tokens a stop text was whole; None: there was none.
    """

    def __init__(self, vocabulary: Vocabulary, stop: Sequence[str] = ()) -> None:
        self._vocabulary, self._stop = vocabulary, tuple(stop)
        self._longest = max(map(len, self._stop), default=1)
        self.text = ""
        self.stopped: int | None = None
        self._ids: list[int] = []
        # Decoding starts where a piece that is settled began, so that each costs the same: what stands before
        # a token can change its text (spaces, bytes), what stands before two does not.
        self._begin = self._border = 0
        self._given = 0  # characters of the text from `begin` on that are in `text`
        self._handed = 0

    def push(self, token: int) -> bool:
        """Adds a token; whether a stop text is whole now. After one, tokens change nothing."""
        if self.stopped is not None:
            return True
        self._ids.append(token)
        whole = self._vocabulary.decode(self._ids[self._begin :])
        # Some tokenizers read a whole run of bytes as unknown while its last character is unfinished.
        if len(whole) > self._given and not whole.endswith(_UNFINISHED):
            self._add(whole[self._given :])
            self._begin, self._border = self._border, len(self._ids)
            self._given = len(self._vocabulary.decode(self._ids[self._begin :]))
        return self.stopped is not None

    def finish(self) -> None:
        """No token comes any more: what was held back of a character is text."""
        if self.stopped is None:
            whole = self._vocabulary.decode(self._ids[self._begin :])
            self._add(whole[self._given :])
            self._stop = ()

    def piece(self) -> str:
        """The text since the last call, without what may be the beginning of a stop text."""
        end = len(self.text)
        if self.stopped is None and self._stop:
            ends = (
                size
                for stop in self._stop
                for size in range(min(len(stop) - 1, end), 0, -1)
                if self.text.endswith(stop[:size])
            )
            end -= max(ends, default=0)
        end = max(end, self._handed)
        piece, self._handed = self.text[self._handed : end], end
        return piece

    def _add(self, piece: str) -> None:
        if not piece:
            return
        before = max(len(self.text) - self._longest + 1, 0)
        self.text += piece
        found = [at for stop in self._stop if (at := self.text.find(stop, before)) >= 0]
        if found:
            self.text, self.stopped = self.text[: min(found)], len(self._ids)
