"""Makes golden/chat.json: what transformers' apply_chat_template gives for the templates of the tests.

python tests/infer/make_golden_chat.py   (needs transformers and tokenizers)
"""

import json
import pathlib

from tests.infer import chat_templates as t

FILE = pathlib.Path(__file__).parent / "golden" / "chat.json"


def cases(fast):
    """Text and ids by template and conversation; masks where the template has the tag; ids with escapes."""
    for name, template in t.TEMPLATES.items():
        for number, messages in enumerate(t.CONVERSATIONS):
            tools = t.TOOLS if name == "chatml_tagged" and number == 1 else None
            for prompt in (False, True):
                common = {"chat_template": template, "add_generation_prompt": prompt, "tools": tools}
                tagged = name == "chatml_tagged"
                out = fast.apply_chat_template(
                    messages, return_dict=True, return_assistant_tokens_mask=tagged, **common
                )
                yield {
                    "template": name,
                    "conversation": number,
                    "add_generation_prompt": prompt,
                    "tools": tools,
                    "text": fast.apply_chat_template(messages, tokenize=False, **common),
                    "ids": out["input_ids"],
                    "mask": out["assistant_masks"] if tagged else None,
                }


def fast():
    """transformers' tokenizer on top of the tests'."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=t.tokenizer(), **t.TOKENS)


if __name__ == "__main__":
    tokenizer = fast()
    content = {"tokenizer": json.loads(t.tokenizer().to_str()), "cases": list(cases(tokenizer))}
    FILE.write_text(json.dumps(content, ensure_ascii=False) + "\n")
