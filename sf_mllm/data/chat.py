"""Conversations to token ids and labels, through the chat template of any tokenizer.

A template is treated as a black box: it is rendered once with the real answers and once with a marker in the place of
each answer, which gives the exact characters that the assistant has to say. The tokenizer's offsets turn characters
into tokens. No template has to know about training (`{% generation %}` blocks are neither needed nor used).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from sf_mllm.constants import IGNORE_INDEX, IMAGE_TOKEN
from sf_mllm.data.messages import Message
from sf_mllm.errors import InputError

# Private-use characters around a number: no template trims, splits or changes the case of these.
_MARKER = "\ue000{}\ue001"

# Templates of text models print list content as a Python repr, drop it or fail. This prelude runs before the template
# and turns each list into one string, an image being a placeholder on a line of its own, as in LLaVA's data.
_FLATTEN_PRELUDE = (
    "{%- set flat = namespace(messages=[]) %}"
    "{%- for message in messages %}"
    "{%- if message['content'] is string %}"
    "{%- set flat.messages = flat.messages + [message] %}"
    "{%- else %}"
    "{%- set joined = namespace(text='') %}"
    "{%- for part in message['content'] %}"
    "{%- if part['type'] == 'image' %}{%- set joined.text = joined.text + '" + IMAGE_TOKEN + "\n' %}"
    "{%- elif part['type'] == 'text' %}{%- set joined.text = joined.text + part['text'] %}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- set flat.messages = flat.messages + [dict(message, content=joined.text)] %}"
    "{%- endif %}"
    "{%- endfor %}"
    "{%- set messages = flat.messages %}"
)


@dataclass(frozen=True)
class EncodedConversation:
    """Token ids [T] and labels [T], aligned position by position; `IGNORE_INDEX` where nothing is learnt."""

    input_ids: list[int]
    labels: list[int]

    def truncated(self, max_length: int) -> "EncodedConversation":
        """Return the first `max_length` tokens."""
        return EncodedConversation(self.input_ids[:max_length], self.labels[:max_length])

    @property
    def num_supervised(self) -> int:
        """Tokens that carry loss; the first position never does, as nothing predicts it."""
        return sum(label != IGNORE_INDEX for label in self.labels[1:])


def accept_image_content(template: str) -> str:
    """Return the chat template extended so that message content may be a list of image and text parts.

    String content renders as before. Extending twice changes nothing.
    """
    return template if template.startswith(_FLATTEN_PRELUDE) else _FLATTEN_PRELUDE + template


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], *, image_seq_length: int
) -> EncodedConversation:
    """Tokenise a conversation; labels cover what the model has to say: each answer and the token that ends it.

    White space between the generation prompt and an answer is the model's to say too: after "ASSISTANT:" the answer
    "7" of a SentencePiece tokenizer starts with a token for the blank alone.

    Args:
        tokenizer: fast tokenizer with a chat template.
        messages: turns as `data.messages` gives them; at least one is the assistant's.
        image_seq_length: visual tokens an image takes; each `<image>` becomes that many.

    Returns:
        Ids equal to what the processor makes of the same text at inference time, and their labels.

    Raises:
        InputError: the template refuses the conversation, alters an answer, or ends an answer without a special token.
    """
    pieces, answers = _split_at_answers(tokenizer, messages)
    blank = _blank_before_answers(tokenizer, messages, pieces[0])
    placeholder = IMAGE_TOKEN * image_seq_length
    text, spans = "", []
    for index, piece in enumerate(pieces):
        if index > 0:
            start = len(text) - (len(blank) if pieces[index - 1].endswith(blank) else 0)
            text += answers[index - 1]
            spans.append((start, len(text) + _stop_length(tokenizer, piece)))
        text += piece.replace(IMAGE_TOKEN, placeholder)

    # The rule of transformers' processors: special tokens are added unless the template has written them.
    bos = tokenizer.bos_token
    encoded = tokenizer(
        text, add_special_tokens=bos is None or not text.startswith(bos), return_offsets_mapping=True, verbose=False
    )
    input_ids = np.asarray(encoded["input_ids"])
    starts, ends = np.asarray(encoded["offset_mapping"]).T
    labels = np.full_like(input_ids, IGNORE_INDEX)
    for start, end in spans:
        inside = np.flatnonzero((ends > start) & (starts < end))
        # contiguous from first to last: a token of zero width (a bare SentencePiece space) belongs to the answer too
        labels[inside[0] : inside[-1] + 1] = input_ids[inside[0] : inside[-1] + 1]
    return EncodedConversation(input_ids.tolist(), labels.tolist())


def stop_token(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the special token with which the chat template ends an assistant turn.

    Raises:
        InputError: the tokenizer has no chat template, or the template ends turns without a special token.
    """
    pieces, _ = _split_at_answers(tokenizer, [Message("user", "Hello"), Message("assistant", "Hello")])
    return pieces[1].lstrip()[: _stop_length(tokenizer, pieces[1].lstrip())]


def _split_at_answers(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[list[str], list[str]]:
    """Return the rendered text around the answers (one piece more than answers) and the answers."""
    if not tokenizer.is_fast:
        raise InputError(
            f"Tokenizer '{tokenizer.name_or_path}' is a slow one, which cannot tell where its tokens lie in the text; "
            "convert it to a fast tokenizer (tokenizer.json)."
        )
    if not tokenizer.chat_template:
        raise InputError(
            f"Tokenizer '{tokenizer.name_or_path}' has no chat template; "
            "name one for it (chat_template: vicuna, or the path of a .jinja file)."
        )
    answers = [message.text.strip() for message in messages if message.role == "assistant"]
    markers = [_MARKER.format(index) for index in range(len(answers))]
    real, marked = iter(answers), iter(markers)
    text = _render(tokenizer, [(m.role, next(real) if m.role == "assistant" else m.text) for m in messages])
    rest = _render(tokenizer, [(m.role, next(marked) if m.role == "assistant" else m.text) for m in messages])
    pieces = []
    for marker in markers:
        piece, found, rest = rest.partition(marker)
        pieces.append(piece)
        if not found:
            raise InputError("The chat template leaves out an answer, so it cannot be learnt; use another template.")
    pieces.append(rest)
    rebuilt = pieces[0] + "".join(answer + piece for answer, piece in zip(answers, pieces[1:], strict=True))
    if rebuilt != text:
        raise InputError(
            "The chat template alters an answer (some remove what looks like reasoning), so labels would not match it; "
            "change the answer or use another template."
        )
    return pieces, answers


def _blank_before_answers(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], before: str) -> str:
    """Return the white space that the template writes between the generation prompt and an answer.

    Args:
        tokenizer: its chat template is asked for the generation prompt of the first answer.
        messages: the conversation.
        before: what the template renders before the first answer of the conversation.
    """
    asked = [(message.role, message.text) for message in messages]
    first_answer = [role for role, _ in asked].index("assistant")
    prompt = _render(tokenizer, asked[:first_answer], add_generation_prompt=True)
    blank = before.removeprefix(prompt)  # nothing is removed where the template writes something else, as Qwen3 does
    return blank if blank.isspace() else ""


def _render(
    tokenizer: PreTrainedTokenizerBase, turns: list[tuple[str, str]], *, add_generation_prompt: bool = False
) -> str:
    conversation: list[dict[str, Any]] = [{"role": role, "content": content} for role, content in turns]
    try:
        rendered = tokenizer.apply_chat_template(
            conversation, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    except TemplateError as error:
        raise InputError(f"The chat template refuses the conversation: {error}.") from error
    assert isinstance(rendered, str)
    return rendered


def _stop_length(tokenizer: PreTrainedTokenizerBase, following: str) -> int:
    """Characters from the end of an answer to the end of the special token after it, white space included."""
    stop_start = len(following) - len(following.lstrip())
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    stops = [token for token in special.union(tokenizer.all_special_tokens) if following.startswith(token, stop_start)]
    if not stops:
        raise InputError(
            "The chat template ends an answer without a special token, so the model could never learn to stop; "
            "use a template that writes one, for example eos_token."
        )
    return stop_start + max(map(len, stops))
