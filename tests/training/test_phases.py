"""Align, then instruct: what trains, what is handed on, what is refused, and how a killed run goes on."""

import json
import shutil
from unittest.mock import Mock

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlavaConfig, modeling_utils

from sf_mllm.errors import InputError
from sf_mllm.inference.loading import load_model
from sf_mllm.training.instruct import run as instruct_run
from sf_mllm.vlm.adapters import trained_projector
from sf_mllm.vlm.fingerprints import Fingerprints, fingerprint, fingerprint_decoder
from sf_mllm.vlm.projector_files import load_projector
from tests.tiny_vlm import make_decoder, make_encoder, make_image, make_sf_llava
from tests.training.tiny_instruct import ALIGN, KilledError, make_config, steps_of

STEPS = {"max_steps": 20, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def aligned(parts, tmp_path_factory):
    """Run folder of a finished align run."""
    folder = tmp_path_factory.mktemp("runs") / "align"
    instruct_run.run_instruct(make_config(parts, folder, train=STEPS, **ALIGN))
    return folder


def saved_projector(folder):
    return load_file(folder / "projector" / "projector.safetensors")


def test_align_trains_the_projector_and_nothing_else(aligned, parts):
    losses = [loss for _, loss in steps_of(aligned)]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    start, _ = instruct_run.build_model(make_config(parts, aligned, train=STEPS, **ALIGN))
    before = start.unload().state_dict()
    after = load_file(aligned / "model" / "model.safetensors")
    projector = "model.multi_modal_projector."
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed == {name for name in after if name.startswith(projector)}
    assert len(changed) == 4
    for name, weight in saved_projector(aligned).items():
        assert torch.equal(weight, after[projector + name]), name


def test_an_align_run_leaves_its_projector_and_a_model_that_answers(aligned, parts):
    assert sorted(path.name for path in aligned.iterdir() if path.is_dir()) == ["checkpoints", "model", "projector"]
    assert sorted(path.name for path in (aligned / "projector").iterdir()) == [
        "fingerprints.json",
        "projector.safetensors",
    ]
    model, processor = load_model(aligned, device="cpu")
    prompt = processor.apply_chat_template(
        [{"role": "user", "content": "<image>\nWhat colour is the square?"}], add_generation_prompt=True
    )
    inputs = processor(images=[make_image(3)], text=[prompt], return_tensors="pt")
    assert model.generate(**inputs, max_new_tokens=3).shape[1] > inputs["input_ids"].shape[1]
    assert (aligned / "model" / "chat_template.jinja").is_file()
    # A checkpoint holds what trains, not the frozen model again.
    checkpoint = load_file(aligned / "checkpoints" / "checkpoint-20" / "adapter_model.safetensors")
    assert len(checkpoint) == 4 and all("multi_modal_projector" in name for name in checkpoint)
    record = json.loads((aligned / "run.json").read_text())
    assert (record["parameters_of_adapters"], record["parameters_of_projector"]) == (0, 32 * 48 + 48 + 48 * 48 + 48)


@pytest.mark.parametrize("place", ["", "projector"])
def test_instruct_starts_from_the_aligned_projector(aligned, parts, tmp_path, place):
    model, _ = instruct_run.build_model(make_config(parts, tmp_path / "run", projector=aligned / place))
    start = trained_projector(model).state_dict()
    expected = saved_projector(aligned)
    assert start.keys() == expected.keys()
    for name, weight in start.items():
        assert torch.equal(weight, expected[name]), name
    anew, _ = instruct_run.build_model(make_config(parts, tmp_path / "run"))
    assert not torch.equal(trained_projector(anew).state_dict()["linear_1.weight"], expected["linear_1.weight"])
    # The adapters start alike with and without it.
    adapters = {name: weight for name, weight in anew.named_parameters() if "lora_A" in name}
    same = dict(model.named_parameters())
    assert adapters and all(torch.equal(weight, same[name]) for name, weight in adapters.items())


def test_both_phases_in_a_row_and_what_they_record(aligned, parts, tmp_path):
    config = make_config(parts, tmp_path / "instruct", projector=aligned)
    instruct_run.run_instruct(config)
    folders = ("adapter", "projector")
    records = [json.loads((tmp_path / "instruct" / name / "fingerprints.json").read_text()) for name in folders]
    base = json.loads((aligned / "projector" / "fingerprints.json").read_text())
    assert records == [base, base]
    assert json.loads((tmp_path / "instruct" / "run.json").read_text())["fingerprints"] == base
    assert base["tokens_per_image"] == 6 and base["encoder"] == fingerprint(make_encoder(drop_path_rate=0.2))
    # The model says what is in it: the same encoder, a decoder that the adapters changed.
    model, _ = load_model(tmp_path / "instruct", device="cpu")
    assert model.config.fingerprints == base | {"decoder": fingerprint_decoder(model.model.language_model)}
    assert model.config.fingerprints["decoder"] != base["decoder"]
    first_loss, aligned_losses = steps_of(tmp_path / "instruct")[0][1], [loss for _, loss in steps_of(aligned)]
    assert first_loss < aligned_losses[0]


def test_a_killed_align_run_resumes_and_ends_with_the_same_weights(parts, tmp_path, kill_after_step):
    undisturbed = instruct_run.run_instruct(make_config(parts, tmp_path / "whole", **ALIGN))
    kill_after_step(3)  # one step after the checkpoint of step 2
    with pytest.raises(KilledError):
        instruct_run.run_instruct(make_config(parts, tmp_path / "killed", **ALIGN))
    kill_after_step(None)
    resumed = instruct_run.run_instruct(make_config(parts, tmp_path / "killed", **ALIGN))
    expected, actual = load_file(undisturbed / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert expected.keys() == actual.keys()
    for name in expected:
        assert torch.equal(actual[name], expected[name]), name
    assert steps_of(tmp_path / "killed") == steps_of(tmp_path / "whole")


def test_a_run_that_finds_other_parts_on_resuming_is_refused(parts, tmp_path, kill_after_step):
    shutil.copytree(parts / "decoder", tmp_path / "decoder")
    config = make_config(parts, tmp_path / "run", decoder=tmp_path / "decoder")
    kill_after_step(3)
    with pytest.raises(KilledError):
        instruct_run.run_instruct(config)
    kill_after_step(None)
    weights = load_file(tmp_path / "decoder" / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"] *= -1
    save_file(weights, tmp_path / "decoder" / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"run' belongs to another decoder .*or start a new run in another output_dir"):
        instruct_run.run_instruct(config)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens_per_image": 576}, "an encoder of 576 tokens an image, and the one here gives 6; give the encoder"),
        ({"encoder": "0" * 64}, r"another encoder \(fingerprint 00000000, here [0-9a-f]{8}\); give the encoder"),
        ({"decoder": "0" * 64}, r"another decoder \(fingerprint 00000000, here [0-9a-f]{8}\); give the decoder"),
        ({"vocabulary": "0" * 64}, r"another tokenizer \(fingerprint 00000000, .*\); give the tokenizer"),
        ({"chat_template": "0" * 64}, r"another chat template \(fingerprint 00000000, .*\); give the chat template"),
    ],
)
def test_a_projector_of_other_parts_is_refused(aligned, parts, tmp_path, changes, reason):
    shutil.copytree(aligned / "projector", tmp_path / "projector")
    file = tmp_path / "projector" / "fingerprints.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    config = make_config(parts, tmp_path / "run", projector=tmp_path / "projector")
    expected = f"The projector in '.*projector' belongs to {reason} that it was made with, or set projector: null"
    with pytest.raises(InputError, match=expected):
        instruct_run.build_model(config)


def test_real_other_parts_are_refused(aligned, parts, tmp_path):
    """Each part changed in the files that a run names, not in what was recorded."""
    for part in ("encoder", "decoder"):
        shutil.copytree(parts / part, tmp_path / part)
    make_encoder(num_latents=7).save_pretrained(tmp_path / "encoder")
    weights = make_decoder(vocab_size=len(load_model(aligned, device="cpu")[1].tokenizer), tied=True)
    with torch.no_grad():
        weights.model.layers[1].self_attn.q_proj.weight.neg_()
    weights.save_pretrained(tmp_path / "decoder")
    for changes, reason in (
        ({"encoder": tmp_path / "encoder"}, "an encoder of 6 tokens an image, and the one here gives 8"),
        ({"decoder": tmp_path / "decoder"}, "another decoder"),
        ({"chat_template": "vicuna"}, "another chat template"),
    ):
        with pytest.raises(InputError, match=f"The projector in .* belongs to {reason}"):
            instruct_run.build_model(make_config(parts, tmp_path / "run", projector=aligned, **changes))


def test_an_aligned_projector_fits_its_encoder_in_any_precision(aligned, parts, tmp_path):
    changes = {"projector": aligned, "dtype": "bfloat16"}
    instruct_run.build_model(make_config(parts, tmp_path / "run", encoder=aligned / "model", **changes))


def test_what_holds_no_projector_is_refused(aligned, parts, tmp_path):
    model, _ = make_sf_llava()
    (tmp_path / "llava").mkdir()
    LlavaConfig(image_seq_length=576).save_pretrained(tmp_path / "llava")
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").touch()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "empty").mkdir()
    shutil.copytree(aligned / "projector", tmp_path / "cut")
    (tmp_path / "cut" / "projector.safetensors").write_bytes(b"cut")
    shutil.copytree(aligned / "projector", tmp_path / "unknown")
    (tmp_path / "unknown" / "fingerprints.json").unlink()
    for path, reason in (
        ("nowhere", "Projector directory '.*nowhere' does not exist; give the folder of an earlier run"),
        ("llava", "holds a 'llava' model of 576 tokens an image, whose projector reads another kind of vision encoder"),
        ("unfinished", "has no projector yet; finish that run first"),
        ("damaged", "holds a damaged config.json and no projector"),
        ("empty", "holds no projector"),
        ("unknown", "has no fingerprints.json, which says what it belongs to"),
    ):
        with pytest.raises(InputError, match=reason) as caught:
            load_projector(model, tmp_path / path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="holds a whole model; its projector lies in the run folder above it"):
        load_projector(model, aligned / "model")
    aligned_model, _ = instruct_run.build_model(make_config(parts, tmp_path / "run"))
    with pytest.raises(InputError, match="cut' cannot be loaded: "):
        load_projector(aligned_model.unload(), tmp_path / "cut")


@pytest.mark.parametrize("changes", [{}, ALIGN], ids=["instruct", "align"])
def test_activation_checkpointing_changes_no_loss(parts, tmp_path, monkeypatch, changes):
    """The gradients of the projector come through the frozen decoder, recomputed or not; every third row is text."""
    counter = Mock(side_effect=modeling_utils.checkpoint)
    monkeypatch.setattr(modeling_utils, "checkpoint", counter)
    losses = []
    for name, options in (("plain", {}), ("checkpointed", {"gradient_checkpointing": True})):
        assert counter.call_count == 0
        train = {"max_steps": 3, "per_device_train_batch_size": 1} | options
        instruct_run.run_instruct(make_config(parts, tmp_path / name, train=train, **changes))
        losses.append(torch.tensor(steps_of(tmp_path / name)))
        weights = saved_projector(tmp_path / name)
    assert counter.call_count >= 2 * 2 * 3  # layers x accumulated batches x steps
    torch.testing.assert_close(losses[0], losses[1])
    for name, weight in saved_projector(tmp_path / "plain").items():
        torch.testing.assert_close(weight, weights[name])


def test_the_model_is_uploaded_when_it_is_written_and_when_a_complete_run_is_asked_to(parts, tmp_path, monkeypatch):
    uploads = []
    monkeypatch.setattr(instruct_run, "push_to_hub", lambda folder, name: uploads.append((folder, name)))
    config = make_config(parts, tmp_path / "run", train={"max_steps": 1}, **ALIGN)
    instruct_run.run_instruct(config)
    assert uploads == []
    config.save.push_to_hub = "owner/captions"
    instruct_run.run_instruct(config)
    assert uploads == [(tmp_path / "run" / "model", "owner/captions")]
    config.output_dir, config.save.push_to_hub = str(tmp_path / "another"), "no_owner"
    with pytest.raises(InputError, match="no_owner"):
        instruct_run.run_instruct(config)


def test_a_rate_for_the_projector_beside_no_other_rate_is_refused(parts, tmp_path):
    with pytest.raises(InputError, match=r"projector_learning_rate=0\.1 has no meaning with lora: null"):
        make_config(parts, tmp_path / "run", **ALIGN | {"projector_learning_rate": 0.1})


def test_the_adapter_says_what_it_belongs_to(parts, tmp_path):
    run = tmp_path / "run"
    instruct_run.run_instruct(make_config(parts, run, train={"max_steps": 1}))
    model, _ = instruct_run.build_model(make_config(parts, run, train={"max_steps": 1}))
    record = Fingerprints.from_record(json.loads((run / "adapter" / "fingerprints.json").read_text()))
    assert isinstance(model, PeftModel)
    assert record == Fingerprints.from_record(model.get_base_model().config.fingerprints)
    assert None not in record.to_record().values()
