import json
import shutil

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor
from transformers.cache_utils import Cache

from sf_mllm import register_auto_classes
from sf_mllm.errors import InputError
from sf_mllm.training.instruct import __main__ as instruct
from sf_mllm.training.instruct import run as instruct_run
from sf_mllm.training.instruct.data import prepare_data
from sf_mllm.training.run_folder import RunFolder
from sf_mllm.vlm.adapters import trained_parameter_groups
from tests.tiny_vlm import make_image
from tests.training.tiny_instruct import KilledError, arguments_of, make_config, steps_of


def test_a_killed_run_resumes_and_ends_with_the_same_weights(parts, tmp_path, kill_after_step):
    undisturbed = instruct_run.run_instruct(make_config(parts, tmp_path / "whole"))

    config = make_config(parts, tmp_path / "killed")
    kill_after_step(3)  # one step after the checkpoint of step 2
    with pytest.raises(KilledError):
        instruct_run.run_instruct(config)
    assert not (tmp_path / "killed" / "model").exists()
    kill_after_step(None)
    resumed = instruct_run.run_instruct(config)

    expected, actual = load_file(undisturbed / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    assert steps_of(tmp_path / "killed") == steps_of(tmp_path / "whole")
    record = json.loads((tmp_path / "killed" / "run.json").read_text())
    assert record["outcome"] == "complete"
    assert [start["resumed_from"] for start in record["starts"]] == [None, "checkpoint-2"]


def test_attention_of_cudnn_is_off_while_a_run_trains(parts, tmp_path, monkeypatch):
    is_enabled = torch.backends.cuda.cudnn_sdp_enabled
    seen = []
    step = instruct_run.InstructTrainer.training_step
    monkeypatch.setattr(
        instruct_run.InstructTrainer, "training_step", lambda *args: seen.append(is_enabled()) or step(*args)
    )
    assert is_enabled()
    instruct_run.run_instruct(make_config(parts, tmp_path / "run", train={"max_steps": 2}))
    assert is_enabled() and seen and not any(seen)


def test_nothing_is_cached_while_a_run_trains_and_evaluates(parts, tmp_path, monkeypatch):
    made, init = [], Cache.__init__
    monkeypatch.setattr(
        Cache, "__init__", lambda cache, *args, **kwargs: made.append(cache) or init(cache, *args, **kwargs)
    )
    config = make_config(parts, tmp_path / "run", train={"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1})
    monkeypatch.setattr(instruct_run, "show_answers", lambda *args: None)  # which generates, with a cache
    instruct_run.run_instruct(config)
    assert not made


@pytest.fixture(scope="module")
def finished(parts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = make_config(parts, folder, train={"max_steps": 30})
    instruct_run.run_instruct(config)
    return folder, config


def test_training_lowers_the_loss_and_records_what_it_used(finished):
    folder, _ = finished
    losses = [loss for _, loss in steps_of(folder)]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    record = json.loads((folder / "run.json").read_text())
    assert record["data"]["rows"] == 12
    assert record["data"]["images"] == 12
    assert record["data"]["held_out"] == 3
    assert 0 < record["data"]["supervised_tokens"] < record["data"]["tokens"]
    assert record["tokens_per_image"] == 6
    assert record["held_out_loss"] > 0


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_held_out_loss_is_the_mean_over_tokens_whatever_the_batches(parts, tmp_path, batch_size):
    rows = json.loads((parts / "rows.json").read_text())
    for number, row in enumerate(rows):
        row["conversations"][1]["value"] = " and ".join(["red"] * (1 + number))  # answers of different lengths
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    settings = {"max_steps": 1, "per_device_eval_batch_size": batch_size}
    config = make_config(
        parts,
        tmp_path / "run",
        train=settings,
        **{"data.conversations": tmp_path / "rows.json", "data.image_root": parts},
    )
    directory = instruct_run.run_instruct(config)
    record = json.loads((tmp_path / "run" / "run.json").read_text())

    register_auto_classes()
    model = AutoModelForImageTextToText.from_pretrained(directory, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(directory)
    run = RunFolder(tmp_path / "run")
    _, held_out, _ = prepare_data(config, run, processor, arguments_of(config, run))
    losses, counts = [], []
    for row in held_out:
        tensors = {name: torch.as_tensor(row[name])[None] for name in ("input_ids", "labels")}
        with torch.no_grad():
            losses.append(model(**tensors, pixel_values=row["pixel_values"]).loss.item())
        counts.append(sum(label >= 0 for label in row["labels"][1:]))
    assert len(set(counts)) > 1  # else a mean over rows is the same
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    assert record["held_out_loss"] == pytest.approx(expected, rel=1e-5)


def test_the_directory_says_nothing_about_this_machine_and_generates_with_a_cache(finished):
    folder, _ = finished
    config = json.loads((folder / "model" / "config.json").read_text())
    assert config["dtype"] == config["text_config"]["dtype"] == config["vision_config"]["dtype"] == "float32"
    assert config.get("use_cache", True)
    assert sorted(path.name for path in (folder / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "fingerprints.json",
    ]
    for file in [*(folder / "model").glob("*.json"), *(folder / "adapter").glob("*.json")]:
        assert str(folder.parent.parent) not in file.read_text(), file


def test_only_projector_and_adapters_differ_from_the_parts(finished, parts):
    folder, _ = finished
    model = load_file(folder / "model" / "model.safetensors")
    encoder = load_file(parts / "encoder" / "model.safetensors")
    decoder = load_file(parts / "decoder" / "model.safetensors")
    for name, weight in encoder.items():
        assert torch.equal(model[f"model.vision_tower.{name}"], weight), name
    changed = {
        name
        for name, weight in decoder.items()
        if not torch.equal(model["model.language_model." + name.removeprefix("model.")], weight)
    }
    adapted = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert changed == {name for name in decoder if name.split(".")[-2] in adapted}
    assert "lm_head.weight" not in model  # tied, as in the decoder


def test_merged_model_equals_base_with_adapter(finished):
    folder, config = finished
    register_auto_classes()
    merged = AutoModelForImageTextToText.from_pretrained(folder / "model")
    processor = AutoProcessor.from_pretrained(folder / "model")
    base, _ = instruct_run.build_model(config)
    adapted = PeftModel.from_pretrained(base.unload(), folder / "adapter").eval()
    batch = processor(images=[make_image(7)], text=["<image>\nWhat colour is the square?"], return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch).logits, adapted(**batch).logits)


def test_a_finished_run_is_left_alone_and_another_configuration_is_refused(finished, parts):
    folder, config = finished
    before = (folder / "model" / "model.safetensors").stat().st_mtime_ns
    assert instruct_run.run_instruct(config) == folder / "model"
    assert (folder / "model" / "model.safetensors").stat().st_mtime_ns == before
    with pytest.raises(InputError, match=r"lora\.rank"):
        instruct_run.run_instruct(make_config(parts, folder, train={"max_steps": 30}, **{"lora.rank": 8}))


def test_code_beside_a_decoder_is_never_run_and_nobody_is_asked(parts, tmp_path, monkeypatch):
    decoder = tmp_path / "decoder"
    shutil.copytree(parts / "decoder", decoder)
    config = json.loads((decoder / "config.json").read_text())
    auto_map = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (decoder / "config.json").write_text(json.dumps(config | {"model_type": "unheard_of", "auto_map": auto_map}))
    (decoder / "code.py").write_text(f"open({str(tmp_path / 'was_here')!r}, 'w')")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    with pytest.raises(InputError, match="brings code of its own, which is never run"):
        instruct_run.build_model(make_config(parts, tmp_path / "run", decoder=decoder))
    assert not (tmp_path / "was_here").exists()


def test_a_decoder_with_missing_weights_is_refused(parts, tmp_path):
    shutil.copytree(parts / "decoder", tmp_path / "decoder")
    weights = load_file(tmp_path / "decoder" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights | {"left.over": torch.zeros(1)}, tmp_path / "decoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"do not fit a LlamaForCausalLM: 1 missing keys \(model\.norm\.weight\);"):
        instruct_run.build_model(make_config(parts, tmp_path / "run", decoder=tmp_path / "decoder"))


def test_rates_are_given_to_the_right_parameters(parts, tmp_path):
    config = make_config(parts, tmp_path / "run")
    model, _ = instruct_run.build_model(config)
    groups = trained_parameter_groups(model, learning_rate=1.0, projector_learning_rate=2.0, weight_decay=0.5)
    settings = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert settings.keys() == {id(p) for p in trained.values()}
    assert any("lora_A" in name for name in trained)
    for name, parameter in trained.items():
        assert "vision_tower" not in name
        assert "lora_" in name or "multi_modal_projector.modules_to_save" in name
        expected = (2.0 if "projector" in name else 1.0, 0.0 if name.endswith("bias") else 0.5)
        assert settings[id(parameter)] == expected, name


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"encoder": "nowhere"}, "Encoder directory 'nowhere' does not exist"),
        ({"encoder": "{parts}/decoder"}, "holds a 'llama' model, which is no SparseFormer"),
        ({"decoder": "{parts}/encoder"}, "Decoder '.*' cannot be loaded: "),
        ({"decoder": "./nowhere"}, "Decoder directory './nowhere' does not exist"),
        ({"decoder": "demo:sf_llava"}, "holds a 'sf_llava' model, which reads images already; give the text-only"),
        (
            {"data.max_length": 20},
            r"12 of 12 conversations cannot be trained on \(12 no answer within max_length\); mend .*, raise "
            r"data.max_length, .*: row 0 of '.*rows.json': it has \d+ tokens, of which max_length=20 keeps none of an "
            r"answer; row 1 .*; and 9 more",
        ),
        ({"data.held_out": 12}, "holds 12 conversations and data.held_out=12"),
        ({"data.conversations": "gone.json"}, "Instruction file 'gone.json' does not exist"),
        ({"chat_template": "vicunna"}, "Did you mean 'vicuna'"),
        ({"decoder": "."}, "Decoder '.' cannot be loaded: "),
    ],
)
def test_what_cannot_be_used_is_refused(parts, tmp_path, changes, reason):
    changes = {key: str(value).format(parts=parts) for key, value in changes.items()}
    with pytest.raises(InputError, match=reason):
        instruct_run.run_instruct(make_config(parts, tmp_path / "run", **changes))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_image_is_named_in_one_sentence(parts, tmp_path, workers):
    rows = json.loads((parts / "rows.json").read_text())
    (tmp_path / "broken.png").write_bytes((parts / "0.png").read_bytes()[:200])
    for row in rows:
        if row.get("image") == ["0.png"]:
            row["image"] = str(tmp_path / "broken.png")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    changes = {"data.conversations": tmp_path / "rows.json", "data.image_root": parts}
    config = make_config(parts, tmp_path / "run", train={"dataloader_num_workers": workers}, **changes)
    with pytest.raises(InputError) as caught:
        instruct_run.run_instruct(config)
    assert str(caught.value).startswith(f"Image file '{tmp_path}/broken.png' is damaged")
    assert "\n" not in str(caught.value)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["outcome"].startswith("failed: Image file")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "float16"}, "dtype 'float16' is unknown"),
        ({"save.dtype": "fp16"}, "Did you mean 'float16'"),
        ({"lora.rank": 0}, "lora.rank must be at least 1, got 0"),
        ({"lora.dropout": 1.0}, "lora.dropout must be at least 0 and below 1"),
        ({"save.max_shard_size": "15 potatoes"}, "save.max_shard_size '15 potatoes' is no size; .* 5GB or 500MB"),
        ({"save.max_shard_size": "GB"}, "is no size"),
        ({"data.scenes_count": 0}, "data.scenes_count must be at least 1"),
        ({"seed": -1}, "seed must be from 0 to 4294967295, got -1"),
    ],
)
def test_values_out_of_range_are_refused(parts, tmp_path, changes, reason):
    with pytest.raises(InputError, match=reason):
        make_config(parts, tmp_path / "run", **changes)


def test_the_command_reports_bad_input_in_one_line(tmp_path, capsys):
    for arguments in ([str(tmp_path / "none.yaml")], [], ["demo.yaml", "--fast"]):
        assert instruct.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and error.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b"[]", b"{"])
@pytest.mark.parametrize("file", ["encoder/config.json", "encoder/model.safetensors", "decoder/model.safetensors"])
def test_damaged_parts_are_refused(parts, tmp_path, file, content):
    part = file.split("/")[0]
    shutil.copytree(parts / part, tmp_path / part)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(InputError, match="cannot be loaded") as caught:
        instruct_run.run_instruct(make_config(parts, tmp_path / "run", **{part: str(tmp_path / part)}))
    assert str(tmp_path / part) in str(caught.value)


def test_a_first_start_that_failed_on_its_data_may_be_mended(parts, tmp_path):
    rows = json.loads((parts / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps([*rows, rows[0] | {"id": "more"}]))
    changes = {"data.conversations": tmp_path / "rows.json", "data.image_root": parts}
    config = make_config(parts, tmp_path / "run", **changes)
    run = RunFolder.open(config, config.output_dir)
    with pytest.raises(InputError), run.recording():
        prepare_data(config, run, instruct_run.build_model(config)[1], arguments_of(config, run))
        raise InputError("an image is damaged")
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    again = RunFolder.open(config, config.output_dir)
    prepare_data(config, again, instruct_run.build_model(config)[1], arguments_of(config, again))
