"""A conversation with a model: its messages, what of them fits into the context, answers piece by piece."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np

from t5style.infer.answers import Completion
from t5style.infer.chat_template import ChatTemplate
from t5style.infer.chat_tokens import stop_tokens, tokenize
from t5style.infer.model import Model
from t5style.infer.settings import Settings
from t5style.run_dir import UserError


@dataclasses.dataclass
class Prompt:
    """What the model reads for an answer, and how long that may be.

    Attributes:
      ids: int32 [length].
      new: at most so many new tokens.
      left_out: messages that no longer fitted, the oldest ones.
    """

    ids: np.ndarray
    new: int
    left_out: int = 0


class Conversation:
    """Messages so far, without the system's.

    Where they outgrow the model's context, the oldest are left out, an exchange at a time, so that half of
    the context or `max_new_tokens`, whichever is less, stays free for the answer. The system's message is
    never left out, nor the last one.

    Attributes:
      model, template: who answers; without a template each text is completed by itself.
      messages: `{"role", "content"}` each, in order, the user's and the assistant's.
      system: the system's message, which stands before them; None for none.
      settings: of every answer; number n (from 0) has the seed `settings.seed + n`.
      answered: answers so far.
      escape: special tokens that messages spell out are text (chat_tokens.tokenize).
    """

    def __init__(
        self,
        model: Model,
        template: ChatTemplate | None,
        settings: Settings,
        system: str | None = None,
        escape: bool = True,
    ) -> None:
        self.model, self.template, self.settings = model, template, settings
        self.system, self.escape = system, escape
        self.messages: list[dict[str, str]] = []
        self.answered = 0
        self._ends = dict.fromkeys(model.ids.eos if settings.stop_tokens is None else settings.stop_tokens)
        if template is not None:
            self._ends |= dict.fromkeys(stop_tokens(model.text_vocabulary(), template))

    def reset(self) -> None:
        """Forgets the messages, not the system's."""
        self.messages.clear()

    def all_messages(self) -> list[dict[str, str]]:
        """With the system's."""
        head = [] if self.system is None else [{"role": "system", "content": self.system}]
        return head + self.messages

    def prompt(self, text: str) -> Prompt:
        """What the model would read to answer `text` now.

        Raises:
          UserError: the text alone does not fit, or the template refuses it.
        """
        most = self.settings.max_new_tokens
        limit = self.model.config.context_length
        free = 0 if self.model.encoder_decoder else 1  # an answer's least room in the context
        if self.template is None:
            ids = self.model.prompt_ids(text, 0)
            left_out, fits = 0, limit is None or len(ids) + free <= limit
        else:
            head, messages = len(self.all_messages()) - len(self.messages), self.all_messages()
            messages.append({"role": "user", "content": text})
            room = None if limit is None else limit - (min(most, limit // 2) if free else 0)
            left_out = 0
            ids = self._ids(messages)
            while room is not None and len(ids) > room and len(messages) > head + 1:
                count = next(
                    (i + 1 for i, m in enumerate(messages[head:]) if m["role"] == "assistant"),
                    len(messages) - head - 1,
                )
                del messages[head : head + count]
                left_out += count
                ids = self._ids(messages)
            fits = limit is None or len(ids) + free <= limit
        if not fits:
            raise UserError(
                f"that are {len(ids)} tokens, but the model reads only {limit}, its answer included: "
                "say it shorter"
            )
        return Prompt(ids, most if limit is None or not free else min(most, limit - len(ids)), left_out)

    def _ids(self, messages: list[dict[str, str]]) -> np.ndarray:
        assert self.template is not None
        return tokenize(
            self.model.text_vocabulary(),
            self.template,
            messages,
            add_generation_prompt=True,
            assistant_mask=False,
            escape=self.escape,
        ).ids

    def answer(self, prompt: Prompt) -> Answering:
        """Begins the answer to a prompt."""
        settings = dataclasses.replace(
            self.settings,
            max_new_tokens=prompt.new,
            seed=self.settings.seed + self.answered,
            stop_tokens=tuple(self._ends),
        )
        return Answering(self.model, prompt, settings)

    def keep(self, text: str, answer: str) -> None:
        """Adds an exchange to the messages."""
        self.answered += 1
        if self.template is not None:
            self.messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]


class Answering(Iterator[str]):
    """Pieces of an answer; `text` is what came so far.

    Attributes:
      settings: with which it is answered.
      prompt: to which.
    """

    def __init__(self, model: Model, prompt: Prompt, settings: Settings) -> None:
        self.prompt, self.settings = prompt, settings
        self.text = ""
        self._stream = model.stream(prompt.ids, settings=settings)

    def __next__(self) -> str:
        piece = next(self._stream)
        self.text += piece
        return piece

    def told(self) -> dict[str, Any]:
        """What is known of it: for the transcript."""
        try:
            completion: Completion | None = self._stream.completion
        except ValueError:  # it was stopped
            completion = None
        return {
            "finish_reason": "interrupted" if completion is None else completion.finish_reason,
            "prompt_tokens": len(self.prompt.ids),
            "new_tokens": None if completion is None else len(completion.tokens),
            "left_out": self.prompt.left_out,
            "seed": self.settings.seed,
            "temperature": self.settings.temperature,
        }
