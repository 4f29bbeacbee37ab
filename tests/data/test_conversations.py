import pytest
import torch

from sf_mllm.constants import IGNORE_INDEX
from sf_mllm.data.collate import ConversationCollator
from sf_mllm.data.conversations import ConversationDataset
from sf_mllm.data.messages import Conversation, ImageFile, Message
from sf_mllm.errors import InputError
from tests.tiny_text import make_tokenizer
from tests.tiny_vlm import NUM_TOKENS, make_image, make_image_processor


@pytest.fixture
def conversations(tmp_path):
    images = []
    for index in range(2):
        images.append(ImageFile(tmp_path / f"{index}.png"))
        make_image(index).save(images[-1].path)
    turn = (Message("user", "<image>\nWhat colour is the square?"), Message("assistant", "green"))
    both = (Message("user", "<image> and <image>"), Message("assistant", "yes"))
    text = (Message("user", "How many objects are there?"), Message("assistant", "3 red objects"))
    return [Conversation("one", turn, (images[0],)), Conversation("two", both, (*images,)), Conversation("none", text)]


def make_dataset(conversations, max_length=200, template="qwen2.5"):
    return ConversationDataset(
        conversations,
        make_tokenizer(template),
        make_image_processor(),
        image_seq_length=NUM_TOKENS,
        max_length=max_length,
    )


def test_rows_hold_what_the_processor_makes_of_the_images(conversations):
    dataset = make_dataset(conversations)
    images = [make_image(index) for index in range(2)]
    expected = make_image_processor()(images, return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(dataset[1]["pixel_values"], expected, rtol=0, atol=0)
    assert dataset[2]["pixel_values"] is None
    image_id = dataset.tokenizer.convert_tokens_to_ids("<image>")
    assert [dataset[i]["input_ids"].count(image_id) for i in range(3)] == [NUM_TOKENS, 2 * NUM_TOKENS, 0]


def test_a_long_row_loses_its_end(conversations):
    whole, cut = make_dataset(conversations)[1], make_dataset(conversations, max_length=30)[1]
    assert len(whole["input_ids"]) > 30
    assert cut["input_ids"] == whole["input_ids"][:30] and cut["labels"] == whole["labels"][:30]


def test_batches_are_padded_on_the_right_and_images_stacked_in_order(conversations):
    dataset = make_dataset(conversations)
    rows = [dataset[index] for index in (2, 1, 0)]
    batch = ConversationCollator(pad_token_id=0)(rows)
    longest = max(len(row["input_ids"]) for row in rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["attention_mask"].shape == (3, longest)
    for index, row in enumerate(rows):
        length = len(row["input_ids"])
        assert batch["input_ids"][index].tolist() == row["input_ids"] + [0] * (longest - length)
        assert batch["labels"][index].tolist() == row["labels"] + [IGNORE_INDEX] * (longest - length)
        assert batch["attention_mask"][index].tolist() == [1] * length + [0] * (longest - length)
    torch.testing.assert_close(batch["pixel_values"], torch.cat([rows[1]["pixel_values"], rows[2]["pixel_values"]]))


def test_a_text_only_batch_has_no_images(conversations):
    dataset = make_dataset(conversations)
    assert "pixel_values" not in ConversationCollator(0)([dataset[2], dataset[2]])


def test_images_of_different_sizes_are_refused():
    rows = [{"input_ids": [1], "labels": [1], "pixel_values": torch.zeros(1, 3, size, 8)} for size in (8, 9)]
    with pytest.raises(ValueError, match=r"must have one size, got \[\(3, 8, 8\), \(3, 9, 8\)\]"):
        ConversationCollator(0)(rows)


def test_a_conversation_that_the_template_refuses_is_named(conversations):
    with_system = Conversation("strict", (Message("system", "Be brief."), *conversations[2].messages))
    with pytest.raises(
        InputError, match=r"Conversation 'strict': The chat template refuses .*System role not supported"
    ):
        make_dataset([with_system], template="gemma")[0]


def test_an_image_that_cannot_be_decoded_is_named_when_its_row_is_read(conversations):
    conversations[0].images[0].path.write_text("no image")
    with pytest.raises(InputError, match=r"0\.png"):
        make_dataset(conversations)[0]
