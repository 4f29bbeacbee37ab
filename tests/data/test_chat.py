import pytest
from tokenizers.processors import TemplateProcessing

from sf_mllm.constants import IGNORE_INDEX
from sf_mllm.data.chat import accept_image_content, encode_conversation, stop_token
from sf_mllm.data.chat_templates import load_chat_template
from sf_mllm.data.messages import Message
from sf_mllm.errors import InputError
from tests.tiny_text import STOPS, TEMPLATES, make_tokenizer

ONE_TURN = [Message("user", "<image>\nWhat colour is the square?"), Message("assistant", "green")]
THREE_TURNS = [
    *ONE_TURN,
    Message("user", "How many objects?  "),
    Message("assistant", "3 objects:\n\na star, é and 日本"),
    Message("user", "Is it green?"),
    Message("assistant", "green"),
]
IMAGE_SEQ_LENGTH = 5


def supervised_runs(encoded):
    """Ids of each contiguous stretch of labels."""
    runs, previous = [], IGNORE_INDEX
    for label in encoded.labels:
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                runs.append([])
            runs[-1].append(label)
        previous = label
    return runs


@pytest.mark.parametrize("sentencepiece", [False, True], ids=["byte_level", "sentencepiece"])
@pytest.mark.parametrize("messages", [ONE_TURN, THREE_TURNS], ids=["one_turn", "three_turns"])
@pytest.mark.parametrize("family", TEMPLATES)
def test_labels_are_the_answers_and_their_stop_tokens(family, messages, sentencepiece):
    tokenizer = make_tokenizer(family, sentencepiece=sentencepiece)
    encoded = encode_conversation(tokenizer, messages, image_seq_length=IMAGE_SEQ_LENGTH)

    answers = [message.text for message in messages if message.role == "assistant"]
    decoded = [tokenizer.decode(run) for run in supervised_runs(encoded)]
    # after "ASSISTANT:" the first token of an answer carries the space before it
    assert [text.lstrip(" ") for text in decoded] == [answer + STOPS[family] for answer in answers]
    assert len(encoded.labels) == len(encoded.input_ids)
    assert all(label in (IGNORE_INDEX, token) for token, label in zip(encoded.input_ids, encoded.labels, strict=True))


@pytest.mark.parametrize("family", TEMPLATES)
def test_each_image_takes_its_tokens_and_none_is_learnt(family):
    tokenizer = make_tokenizer(family)
    messages = [Message("user", "Compare <image> with <image>, please."), Message("assistant", "yes")]
    encoded = encode_conversation(tokenizer, messages, image_seq_length=IMAGE_SEQ_LENGTH)
    image_id = tokenizer.convert_tokens_to_ids("<image>")
    assert encoded.input_ids.count(image_id) == 2 * IMAGE_SEQ_LENGTH
    assert image_id not in encoded.labels


@pytest.mark.parametrize("sentencepiece", [False, True], ids=["byte_level", "sentencepiece"])
@pytest.mark.parametrize("answer", ["green", "7", "日本"])
@pytest.mark.parametrize("family", [name for name in TEMPLATES if name != "qwen3"])
def test_what_stands_before_an_answer_is_the_generation_prompt(family, answer, sentencepiece):
    """Else a token that the model has to say itself, such as the bare blank of "ASSISTANT: 7", would not be learnt."""
    tokenizer = make_tokenizer(family, sentencepiece=sentencepiece)
    encoded = encode_conversation(tokenizer, [ONE_TURN[0], Message("assistant", answer)], image_seq_length=1)
    first_label = next(i for i, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": ONE_TURN[0].text}], add_generation_prompt=True, tokenize=False
    )
    assert encoded.input_ids[:first_label] == tokenizer(prompt, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("family", TEMPLATES)
def test_stop_token_is_found(family):
    assert stop_token(make_tokenizer(family)) == STOPS[family].strip()


@pytest.mark.parametrize("family", TEMPLATES)
def test_list_content_renders_as_text_with_placeholders(family):
    tokenizer = make_tokenizer(family)
    parts = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour is the square?"}]}]
    plain = [{"role": "user", "content": "<image>\nWhat colour is the square?"}]
    rendered = tokenizer.apply_chat_template(parts, tokenize=False, add_generation_prompt=True)
    assert rendered == tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
    assert rendered.count("<image>\nWhat colour") == 1


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_prelude_leaves_text_conversations_as_they_were(family):
    tokenizer = make_tokenizer(family)
    conversation = [{"role": message.role, "content": message.text} for message in THREE_TURNS]
    extended = tokenizer.apply_chat_template(conversation, tokenize=False)
    tokenizer.chat_template = TEMPLATES[family]
    assert extended == tokenizer.apply_chat_template(conversation, tokenize=False)


def test_extending_a_template_twice_changes_nothing():
    once = accept_image_content(TEMPLATES["llama3"])
    assert accept_image_content(once) == once


def test_bos_is_added_once_as_at_inference():
    tokenizer = make_tokenizer("qwen2.5")  # writes no bos itself
    without = encode_conversation(tokenizer, ONE_TURN, image_seq_length=1)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    with_bos = encode_conversation(tokenizer, ONE_TURN, image_seq_length=1)
    assert with_bos.input_ids == [tokenizer.bos_token_id, *without.input_ids]
    assert with_bos.labels == [IGNORE_INDEX, *without.labels]

    tokenizer.chat_template = TEMPLATES["mistral"]  # writes bos itself
    encoded = encode_conversation(tokenizer, ONE_TURN, image_seq_length=1)
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1


def test_truncation_counts_what_is_left_to_learn():
    encoded = encode_conversation(make_tokenizer(), ONE_TURN, image_seq_length=IMAGE_SEQ_LENGTH)
    first_label = next(i for i, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    assert encoded.truncated(first_label).num_supervised == 0
    assert encoded.truncated(first_label + 1).num_supervised == 1
    assert encoded.truncated(10_000) == encoded


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}", "without a special token"),
        ("{% for m in messages %}{{ m['content'] | upper + eos_token }}{% endfor %}", "alters an answer"),
        ("{% for m in messages if m['role'] == 'user' %}{{ m['content'] + eos_token }}{% endfor %}", "leaves out"),
        ("{{ raise_exception('no chat today') }}", "refuses the conversation: no chat today"),
        (None, "has no chat template"),
    ],
)
def test_templates_that_cannot_teach_are_refused(template, expected):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(InputError, match=expected):
        encode_conversation(tokenizer, ONE_TURN, image_seq_length=1)


def test_named_templates_and_files_load(tmp_path):
    assert load_chat_template("vicuna") == TEMPLATES["vicuna"]
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    assert load_chat_template(str(tmp_path / "own.jinja")) == "{{ messages }}"
    with pytest.raises(InputError, match="Did you mean 'vicuna'"):
        load_chat_template("vicuna2")
    with pytest.raises(InputError, match="neither a file nor"):
        load_chat_template("{{ messages }}" * 500)  # longer than a file name can be


def test_vicuna_renders_as_fastchat_does():
    tokenizer = make_tokenizer("vicuna")
    conversation = [{"role": message.role, "content": message.text} for message in THREE_TURNS[:4]]
    assert tokenizer.apply_chat_template(conversation, tokenize=False) == (
        "<s>A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: <image>\nWhat colour is the square? ASSISTANT: "
        "green</s>USER: How many objects? ASSISTANT: 3 objects:\n\na star, é and 日本</s>"
    )
