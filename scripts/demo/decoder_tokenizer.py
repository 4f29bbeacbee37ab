"""The tokenizer of the demo decoder: words of scenes are one token each, anything else is written in bytes."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from scripts.demo.decoder_data import SceneConversations
from sf_mllm.constants import IMAGE_TOKEN
from sf_mllm.data.chat import accept_image_content
from sf_mllm.data.scenes.domains import DOMAINS

VOCABULARY_SIZE = 704
PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] not in ['user', 'assistant'] %}"
    "{{ raise_exception('this small model knows user and assistant turns only') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(seed: int, conversations: int = 1000) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on scenes of every domain; it can write any text."""
    core = Tokenizer(models.BPE())
    # A space goes before each turn, so that a word is the same token at the start of an answer and inside a text.
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, USER, ASSISTANT, END, IMAGE_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (
        message.text
        for domain in DOMAINS
        for messages in SceneConversations(seed, domain).read(torch.arange(conversations))
        for message in messages
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[USER, ASSISTANT, IMAGE_TOKEN],
        chat_template=accept_image_content(CHAT_TEMPLATE),
        model_max_length=2048,
    )
