import json
import shutil

import pytest
import torch
import transformers
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from sf_mllm import SFLlavaForConditionalGeneration, register_auto_classes
from sf_mllm.config import dump_run_config, load_run_config
from sf_mllm.inference.loading import load_model
from sf_mllm.training.instruct import run as instruct_run
from sf_mllm.training.instruct.config import InstructConfig, SaveConfig
from sf_mllm.training.instruct.parts import load_parts
from sf_mllm.training.instruct.results import save_results, write_merged_model
from sf_mllm.training.merge import __main__ as merge
from sf_mllm.training.merge import run as merge_run
from sf_mllm.training.model_directory import write_model_directory
from sf_mllm.training.run_folder import RunFolder
from sf_mllm.vlm.adapters import add_adapters, fingerprints_of, save_adapters, trained_projector
from tests.tiny_text import make_tokenizer
from tests.tiny_vlm import make_decoder, make_encoder, make_image, make_image_processor

QUESTIONS = ["<image>\nWhat colour is the square?", "How many objects?", "Compare <image> with <image>, please"]
IMAGES = [make_image(seed) for seed in range(3)]


# Merged weights are rounded once more than a product with the update beside it; measured: 1.1e-5 at logits up to 10.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def load_base(folder):
    return load_parts(InstructConfig(output_dir="", encoder=str(folder / "encoder"), decoder=str(folder / "decoder")))


def adapted_model(folder, seed):
    """The base with an adapter and a projector that change its answers, as training would have made them."""
    base, processor = load_base(folder)
    model = add_adapters(base, rank=4, alpha=8, dropout=0.1)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.05 * torch.randn(parameter.shape, generator=generator)
    return model.eval(), processor


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    make_encoder().save_pretrained(folder / "encoder")
    make_image_processor().save_pretrained(folder / "encoder")
    tokenizer = make_tokenizer()
    make_decoder(vocab_size=len(tokenizer), tied=True).save_pretrained(folder / "decoder")
    tokenizer.save_pretrained(folder / "decoder")
    return folder


@pytest.fixture(scope="module")
def run(parts, tmp_path_factory):
    """A run folder: the configuration, the adapter at its end, one of a checkpoint before, and the model."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    save = SaveConfig(dtype="float32", max_shard_size="300KB")
    config = InstructConfig(
        output_dir=str(folder), encoder=str(parts / "encoder"), decoder=str(parts / "decoder"), save=save
    )
    config.data.conversations = "rows.json"
    config.train = {"max_steps": 4}
    folder.mkdir()
    dump_run_config(config, folder / "config.yaml")
    adapted_model(parts, seed=1)[0].save_pretrained(folder / "checkpoints" / "checkpoint-2")
    model, processor = adapted_model(parts, seed=2)
    RunFolder(folder).update_record(fingerprints=fingerprints_of(model).to_record())
    save_adapters(model, folder / "adapter")
    write_merged_model(folder / "model", model, processor, save)
    return folder


@pytest.fixture(scope="module")
def merged(run, tmp_path_factory):
    output = tmp_path_factory.mktemp("merged") / "out"
    assert merge.main([str(run), str(output)]) == 0
    return output


def batch_of(processor):
    prompts = [
        processor.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in QUESTIONS
    ]
    return prompts, processor(images=IMAGES, text=prompts, padding=True, return_tensors="pt")


def refusal(capsys, *arguments) -> str:
    assert merge.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_merging_a_run_gives_the_directory_that_the_run_left(run, merged):
    left = {path.name: path.read_bytes() for path in (run / "model").iterdir()}
    assert {path.name: path.read_bytes() for path in merged.iterdir()} == left
    assert sum(name.endswith(".safetensors") for name in left) > 1  # save.max_shard_size of the run
    assert "modeling_sf_llava.py" in left


def test_adapter_on_its_base_equals_the_merged_model(parts, run, merged):
    register_auto_classes()
    model = AutoModelForImageTextToText.from_pretrained(merged).eval()
    processor = AutoProcessor.from_pretrained(merged)
    base, _ = load_base(parts)
    _, batch = batch_of(processor)
    with torch.no_grad():
        logits = model(**batch).logits
        without = base.eval()(**batch).logits
        adapted = PeftModel.from_pretrained(base, run / "adapter").eval()(**batch).logits
    torch.testing.assert_close(logits, adapted, **CLOSE)
    assert (logits - without).abs().max() > 0.1


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.23"),
    reason="transformers 5.17 wraps the projector before it reads the base's weights, and the strict load refuses that",
)
def test_an_adapter_directory_loads_by_the_auto_class_where_it_names_its_base(parts, run, merged, tmp_path):
    register_auto_classes()
    base, processor = load_base(parts)
    write_model_directory(tmp_path / "base", base, processor)
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    adapted = AutoModelForImageTextToText.from_pretrained(tmp_path / "adapter").eval()
    model = AutoModelForImageTextToText.from_pretrained(merged).eval()
    _, batch = batch_of(processor)
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, adapted(**batch).logits, **CLOSE)


def test_a_merged_model_answers_alike_alone_in_a_batch_with_and_without_a_cache(merged):
    model, processor = load_model(merged, device="cpu")
    prompts, batch = batch_of(processor)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "output_logits": True}
    cached = model.generate(**batch, **options, return_dict_in_generate=True)
    uncached = model.generate(**batch, **options, return_dict_in_generate=True, use_cache=False)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits))
    for row, (prompt, images) in enumerate(zip(prompts, [IMAGES[:1], None, IMAGES[1:]], strict=True)):
        inputs = processor(images=images, text=[prompt], return_tensors="pt")
        alone = model.generate(**inputs, **options, return_dict_in_generate=True)
        torch.testing.assert_close(torch.cat(alone.logits), torch.stack(cached.logits)[:, row])


def test_a_checkpoint_is_merged_by_the_configuration_of_its_run_and_the_options(parts, run, tmp_path):
    source, output = run / "checkpoints" / "checkpoint-2", tmp_path / "out"
    options = ["--dtype", "bfloat16", "--max-shard-size", "5GB", "--no-remote-code"]
    assert merge.main([str(source), str(output), *options]) == 0
    assert {path.name for path in output.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "processor_config.json"),
        *("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"),
    }
    expected = adapted_model(parts, seed=1)[0].merge_and_unload().state_dict()
    weights = load_file(output / "model.safetensors")
    assert weights.keys() | {"lm_head.weight"} == expected.keys()
    for name, weight in weights.items():
        is_coordinate = name.endswith(".rois")
        assert torch.equal(weight, expected[name] if is_coordinate else expected[name].bfloat16()), name
    assert isinstance(load_model(output, device="cpu", dtype="bfloat16")[0], SFLlavaForConditionalGeneration)


def test_an_adapter_alone_is_merged_into_the_parts_that_are_given(parts, run, merged, tmp_path):
    shutil.copytree(run / "adapter", tmp_path / "adapter")
    given = ["--encoder", str(parts / "encoder"), "--decoder", str(parts / "decoder"), "--dtype", "float32"]
    assert merge.main([str(tmp_path / "adapter"), str(tmp_path / "out"), *given]) == 0
    expected: dict = {}
    for file in merged.glob("*.safetensors"):
        expected |= load_file(file)
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights.keys() == expected.keys()
    for name, weight in weights.items():
        assert torch.equal(weight, expected[name]), name


def test_upload_comes_after_writing_and_a_bad_name_before_all_work(run, tmp_path, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(merge_run, "push_to_hub", lambda *call: calls.append((*call, call[0].is_dir())))
    assert "names no owner" in refusal(capsys, run, tmp_path / "out", "--push-to-hub", "mine")
    assert not (tmp_path / "out").exists()
    assert merge.main([str(run), str(tmp_path / "out"), "--push-to-hub", "some/one"]) == 0
    assert calls == [(tmp_path / "out", "some/one", True)]


def test_what_cannot_be_merged_is_said_in_one_sentence(parts, run, tmp_path, capsys):
    out = tmp_path / "out"
    alone = shutil.copytree(run / "adapter", tmp_path / "adapter")
    assert "lies in no run folder" in (error := refusal(capsys, alone, out))
    assert "give --decoder and --encoder" in error
    assert "does not exist; give a run folder" in refusal(capsys, tmp_path / "nowhere", out)
    assert "holds no adapter" in refusal(capsys, parts, out)
    assert "exists already" in refusal(capsys, run, parts)
    assert "dtype 'float61' is unknown" in refusal(capsys, run, out, "--dtype", "float61")
    assert "is no size" in refusal(capsys, run, out, "--max-shard-size", "big")
    assert "Encoder directory 'nowhere' does not exist" in refusal(capsys, run, out, "--encoder", "nowhere")

    unfinished = tmp_path / "unfinished"
    shutil.copytree(run, unfinished, ignore=shutil.ignore_patterns("adapter", "model"))
    assert f"give a checkpoint of it, such as {unfinished}/checkpoints/checkpoint-2" in refusal(capsys, unfinished, out)
    assert not out.exists()


def test_parts_that_an_adapter_was_not_trained_on_are_refused(parts, run, tmp_path, capsys):
    tokenizer = make_tokenizer()
    make_decoder("qwen2", vocab_size=len(tokenizer)).save_pretrained(tmp_path / "decoder")
    tokenizer.save_pretrained(tmp_path / "decoder")
    make_encoder(num_latents=7).save_pretrained(tmp_path / "encoder")
    make_image_processor().save_pretrained(tmp_path / "encoder")
    for source in (run, run / "checkpoints" / "checkpoint-2"):
        error = refusal(capsys, source, tmp_path / "out", "--decoder", tmp_path / "decoder")
        assert "belongs to another decoder (fingerprint " in error
        error = refusal(capsys, source, tmp_path / "out", "--encoder", tmp_path / "encoder")
        assert "belongs to an encoder of 6 tokens an image, and the one here gives 8" in error
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_is_refused(run, tmp_path, capsys):
    damaged = shutil.copytree(run, tmp_path / "damaged")
    file = damaged / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    lost = next(iter(sorted(weights)))
    save_file({name: weight for name, weight in weights.items() if name != lost}, file, {"format": "pt"})
    error = refusal(capsys, damaged, tmp_path / "out")
    assert "is not complete: 1 weights are missing" in error and lost in error
    file.write_bytes(b"")
    assert "cannot be loaded" in refusal(capsys, damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_projector_of_a_run_without_adapters_is_merged(parts, run, tmp_path):
    align = tmp_path / "align"
    align.mkdir()
    config = load_run_config(InstructConfig, run / "config.yaml", ["lora=null", "save.max_shard_size=5GB"])
    dump_run_config(config, align / "config.yaml")
    model, processor = instruct_run.build_model(config)
    projector = trained_projector(model)
    for parameter in projector.parameters():
        parameter.data += 0.1
    expected = {name: parameter.clone() for name, parameter in projector.state_dict().items()}
    save_results(model, processor, config.save, align)
    assert merge.main([str(align), str(tmp_path / "out")]) == 0
    left = {path.name: path.read_bytes() for path in (align / "model").iterdir()}
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == left
    weights = load_file(tmp_path / "out" / "model.safetensors")
    for name, weight in expected.items():
        assert torch.equal(weights[f"model.multi_modal_projector.{name}"], weight), name
