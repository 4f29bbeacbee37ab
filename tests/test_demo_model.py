"""The model that ships: every part loads by its plain library, its size is bounded, and it answers."""

import json

import open_clip
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, pipeline

from eval.scene_qa import answer_from_images, held_out_questions, score
from sf_mllm import SFLlavaForConditionalGeneration, SFLlavaProcessor, SparseFormerModel, register_auto_classes
from sf_mllm.assets import DEMO_ROOT
from sf_mllm.vlm.fingerprints import fingerprint

MIB = 2**20
ASKED = ("color", "count", "shape")


@pytest.fixture(scope="module")
def model_and_processor():
    register_auto_classes()
    directory = DEMO_ROOT / "sf_llava"
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(directory)


@pytest.fixture(scope="module")
def example():
    with Image.open(DEMO_ROOT / "example.png") as image:
        return image.convert("RGB")


def test_sizes():
    sizes = {path: path.stat().st_size for path in DEMO_ROOT.rglob("*") if path.is_file()}
    assert sum(sizes.values()) <= 40 * MIB
    assert max(sizes.values()) < 16 * MIB
    assert {path.suffix for path, size in sizes.items() if size > MIB} == {".safetensors"}


def test_teacher_is_a_clip_of_plain_open_clip(example):
    clip, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{DEMO_ROOT / 'clip'}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{DEMO_ROOT / 'clip'}")
    with torch.no_grad():
        image = clip.encode_image(preprocess(example)[None])
        text = clip.encode_text(tokenizer(["a large red circle"]))
    assert image.shape == text.shape
    assert image.isfinite().all() and text.isfinite().all()


def test_decoder_is_a_plain_causal_language_model():
    decoder, report = AutoModelForCausalLM.from_pretrained(DEMO_ROOT / "decoder", output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokenizer = AutoTokenizer.from_pretrained(DEMO_ROOT / "decoder")
    turn = [{"role": "user", "content": "There is one red circle.\nHow many objects are there?"}]
    inputs = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    output = decoder.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert output[0, -1].item() in {decoder.generation_config.eos_token_id, tokenizer.eos_token_id}


def test_auto_classes_give_our_types_and_the_encoder_comes_out(model_and_processor):
    model, processor = model_and_processor
    assert isinstance(model, SFLlavaForConditionalGeneration) and isinstance(processor, SFLlavaProcessor)
    encoder = SparseFormerModel.from_pretrained(DEMO_ROOT / "sf_llava", dtype=torch.float32)
    assert fingerprint(encoder) == fingerprint(model.model.vision_tower)
    assert encoder.config.num_tokens == processor.image_seq_length


def test_answers_are_right(model_and_processor):
    asked = [item for item in held_out_questions(400) if item.question.type in ASKED][:60]
    results = {result.type: result for result in score(asked, answer_from_images(*model_and_processor, asked, 20))}
    assert results.keys() == {*ASKED, "mean"}
    assert results["mean"].samples == 60
    assert results["mean"].accuracy >= 0.9


def test_a_batch_equals_single_rows(model_and_processor, example):
    model, processor = model_and_processor
    images = [example, example.transpose(Image.Transpose.FLIP_LEFT_RIGHT), example.rotate(90)]
    questions = ["How many objects are there?", "Describe the image.", "Is there a red circle?"]
    prompts = [
        processor.apply_chat_template(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
            add_generation_prompt=True,
        )
        for question in questions
    ]

    def answers(images, prompts):
        inputs = processor(images=images, text=prompts, padding=True, return_tensors="pt")
        output = model.generate(**inputs, max_new_tokens=48, do_sample=False)
        return processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    single = [answers([image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]
    assert answers(images, prompts) == single
    assert len({len(answer) for answer in single}) > 1  # so that rows end at different steps


def test_pipeline_of_transformers(model_and_processor, example):
    model, processor = model_and_processor
    ask = pipeline("image-text-to-text", model=model, processor=processor)
    turns = [
        [{"role": "user", "content": [{"type": "image", "image": example}, {"type": "text", "text": question}]}]
        for question in ("How many objects are there?", "Describe the image.")
    ]
    options = {"return_full_text": False, "generate_kwargs": {"max_new_tokens": 48, "do_sample": False}}
    single = [ask(text=turn, **options)[0]["generated_text"] for turn in turns]
    assert single[0].strip().isdecimal()
    assert [row[0]["generated_text"] for row in ask(text=turns, batch_size=2, **options)] == single


def test_nothing_names_the_machine_it_was_made_on():
    for path in DEMO_ROOT.rglob("*.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        assert "_name_or_path" not in settings, path
        assert not any(isinstance(value, str) and value.startswith("/") for value in settings.values()), path
