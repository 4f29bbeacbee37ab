"""Chat templates by name, for decoders whose tokenizer brings none."""

import os.path
from pathlib import Path

from sf_mllm.errors import InputError, nearest

# Vicuna v1.1 and later, whose tokenizer holds no template: a system sentence, then "USER: ... ASSISTANT: ...</s>".
_VICUNA = (
    "{{ bos_token }}"
    "{% if messages[0]['role'] == 'system' %}"
    "{% set system = messages[0]['content'] %}{% set turns = messages[1:] %}"
    "{% else %}"
    '{% set system = "A chat between a curious user and an artificial intelligence assistant. '
    "The assistant gives helpful, detailed, and polite answers to the user's questions.\" %}{% set turns = messages %}"
    "{% endif %}"
    "{{ system + ' ' }}"
    "{% for message in turns %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' + message['content'].strip() + ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' + message['content'].strip() + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

CHAT_TEMPLATES = {"vicuna": _VICUNA}


def load_chat_template(name_or_path: str) -> str:
    """Return a template of `CHAT_TEMPLATES` by name, or the text of a Jinja file.

    Raises:
        InputError: neither such a name nor such a file.
    """
    if name_or_path in CHAT_TEMPLATES:
        return CHAT_TEMPLATES[name_or_path]
    if os.path.isfile(name_or_path):  # Path.is_file raises where a name is too long, as a template in its place is
        return Path(name_or_path).read_text(encoding="utf-8")
    raise InputError(
        f"Chat template '{name_or_path}' is neither a file nor one of {', '.join(CHAT_TEMPLATES)}."
        f"{nearest(name_or_path, CHAT_TEMPLATES)}"
    )
