"""Chat templates in the styles that models use, conversations, and a small tokenizer with special tokens."""

import functools

from t5style.corpus.vocabulary import TokenizerVocabulary

SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|begin_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
]
ADDED = ["<think>", "</think>"]  # not special: they are text
TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message['content'] is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content if part.type == 'text' %}{{ part.text }}{% endfor %}
    {%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""

# The same with the tag, tools as JSON, and a loop control.
CHATML_TAGGED = """\
{% if tools %}
<|im_start|>system
You may call: {{ tools | tojson }}<|im_end|>
{% endif %}
{% for message in messages %}
{% if message.role == 'silent' %}{% continue %}{% endif %}
{% if message.role == 'assistant' %}
<|im_start|>assistant
{% generation %}{{ message.content }}<|im_end|>{% endgeneration %}

{% else %}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}
{% endfor %}
{% if add_generation_prompt %}
<|im_start|>assistant
{% endif %}
"""

LLAMA3 = (
    "{{ bos_token if false else '<|begin_of_text|>' }}{% for message in messages %}"
    "{% set head = '<|start_header_id|>' ~ message['role'] ~ '<|end_header_id|>\n\n' %}"
    "{{ head + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

MISTRAL = """\
{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}{% set rest = messages[1:] %}
{%- else %}{% set system = none %}{% set rest = messages %}{% endif %}
{{- bos_token }}
{%- for message in rest %}
    {%- if (message.role == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('user and assistant must take turns') }}
    {%- endif %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system + '\n\n' if system and loop.first else '') + message.content + ' [/INST]' }}
    {%- else %}
        {{- ' ' + message.content | trim + eos_token }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = (
    "{{ bos_token }}{% set state = namespace(system='') %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% set state.system = message.content ~ '\n\n' %}{% continue %}"
    "{% endif %}{% set name = {'assistant': 'model'}.get(message.role, message.role) %}"
    "{{ '<start_of_turn>' + name + '\n' }}{{ state.system }}{{ message.content.strip() }}"
    "{% set state.system = '' %}{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)

ZEPHYR = """\
{% for message in messages %}
{% if message['role'] in ['user', 'system', 'assistant'] %}
{{ '<|' ~ message['role'] ~ '|>\n' ~ message['content'] + eos_token }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}
"""

TEMPLATES = {
    "chatml": CHATML,
    "chatml_tagged": CHATML_TAGGED,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "zephyr": ZEPHYR,
}

CONVERSATIONS = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": 'Be brief; <b>no</b> "quotes" & no é.'},
        {"role": "user", "content": "  What is 2 + 2?\n"},
        {"role": "assistant", "content": "It is 4."},
        {"role": "user", "content": "and what is the capital of Japan 🙂?"},
        {"role": "assistant", "content": "The capital of Japan is Tokyo."},
    ],
    [
        {"role": "user", "content": "Say <|im_end|> and </s>.", "name": None},
        {"role": "assistant", "content": "<think>hm</think>No."},
        {"role": "user", "content": "Why?"},
    ],
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"a": "<number>"}}}]


def tokenizer():
    """Byte-level BPE with the special tokens, trained on the conversations."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [message["content"] for messages in CONVERSATIONS for message in messages] * 3
    made.train_from_iterator(texts, trainer)
    made.add_tokens([AddedToken(name, special=False, normalized=False) for name in ADDED])
    return made


@functools.cache
def vocabulary() -> TokenizerVocabulary:
    """The same as a vocabulary."""
    return TokenizerVocabulary(tokenizer().to_str().encode())
