"""What the README tells people to type must work."""

import re
import shlex
from pathlib import Path

import open_clip
import pytest
import torch
import yaml

from sf_mllm import SparseFormerModel
from sf_mllm.bench.arguments import parse_arguments as parse_bench_arguments
from sf_mllm.bench.towers import find_tower
from sf_mllm.cli.arguments import parse_arguments
from sf_mllm.cli.chat import COMMANDS
from sf_mllm.config import load_run_config
from sf_mllm.training.bootstrap.config import BootstrapConfig
from sf_mllm.training.instruct.config import InstructConfig
from sf_mllm.training.instruct.sources import parse_sources
from sf_mllm.training.merge.__main__ import main as merge
from tests.tiny_vlm import make_encoder, make_image, make_image_processor

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    lines = "".join(blocks("bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_links_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)]+)\)", README) if not target.startswith("https://")]
    assert len(targets) > 8
    assert [target for target in targets if not (ROOT / target.partition("#")[0]).exists()] == []


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_command_exists(words, monkeypatch):
    if words[0] == "bash":
        assert (ROOT / words[1]).is_file()
        if len(words) > 2:
            stage_one = {"bootstrap_clip.sh": BootstrapConfig, "reinforce.sh": BootstrapConfig}
            schema = (stage_one | {"finetune_llava.sh": InstructConfig})[Path(words[1]).name]
            load_run_config(schema, ROOT / words[2], [word for word in words[3:] if word != "--report"])
    elif words[0] in ("torchrun", "accelerate"):
        start = words.index("-m")
        schema = {"sf_mllm.training.bootstrap": BootstrapConfig, "sf_mllm.training.instruct": InstructConfig}
        load_run_config(schema[words[start + 1]], ROOT / words[start + 2], words[start + 3 :])
        assert all((ROOT / word).is_file() for word in words[:start] if word.startswith("configs/"))
    elif words[:3] == ["python", "-m", "sf_mllm.training.check_data"]:
        load_run_config(InstructConfig, ROOT / words[3], words[4:])
    elif words[:3] == ["python", "-m", "sf_mllm.training.merge"]:
        requests = []
        monkeypatch.setattr("sf_mllm.training.merge.run.run_merge", requests.append)
        assert merge(words[3:]) == 0 and requests[0].output == "merged"
    elif words[:3] == ["python", "-m", "sf_mllm.bench"]:
        options = parse_bench_arguments(words[3:])
        for name in getattr(options, "towers", ()):
            assert Path(name).parts[0] == "runs" or find_tower(name)
    else:
        assert words[:3] == ["python", "-m", "sf_mllm.cli"]
        assert parse_arguments(words[3:]).image == "photo.jpg"


def test_mixture_of_the_example_is_a_configuration():
    (example,) = blocks("yaml")
    data = yaml.safe_load(example)["data"]
    first, second, third = parse_sources(data["conversations"], data["image_root"])
    assert (first.weight, second.weight, third.weight) == (1, 2, 0.5) and second.licence == "CC BY 4.0"
    assert {source.image_root for source in (first, second, third)} == {"/data/images"}


def test_every_chat_command_is_named():
    assert [name for name in COMMANDS if name not in README and name != "/help"] == []


def test_encoder_example_runs(tmp_path, monkeypatch):
    encoder = make_encoder()
    encoder.save_pretrained(tmp_path / "runs/eye/encoder")
    make_image_processor().save_pretrained(tmp_path / "runs/eye/encoder")
    make_image(0).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    code = next(block for block in blocks("python") if "from_pretrained" in block)
    names: dict = {}
    with torch.no_grad():
        exec(code, names)
    output = names["output"]
    assert output.pooler_output.shape == (1, encoder.config.projection_size)
    assert output.last_hidden_state.shape == (1, encoder.config.num_tokens, encoder.config.hidden_size)
    assert output.rois[:, -1].shape == (1, encoder.config.num_latents, 4)


def test_quantised_examples_run(tmp_path, monkeypatch):
    pytest.importorskip("torchao")
    make_encoder().save_pretrained(tmp_path / "runs/eye/encoder")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
    by_function, by_transformers = (
        {"SparseFormerModel": SparseFormerModel, "encoder": SparseFormerModel.from_pretrained("runs/eye/encoder")}
        for _ in range(2)
    )
    exec(next(block for block in blocks("python") if "quantize_cortex" in block), by_function)
    exec(next(block for block in blocks("python") if "TorchAoConfig" in block), by_transformers)
    pixel_values = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        first, second = (names["encoder"](pixel_values) for names in (by_function, by_transformers))
        plain = SparseFormerModel.from_pretrained("runs/eye/encoder")(pixel_values)
    assert not torch.equal(first.last_hidden_state, plain.last_hidden_state)
    # Up to 0.17 torchao's default rounds differently from what `quantize_cortex` asks for.
    assert (first.last_hidden_state - second.last_hidden_state).norm() < 0.02 * plain.last_hidden_state.norm()


def test_teacher_of_the_example_is_published():
    name, tag = re.findall(r'create_model\("([^"]+)", pretrained="([^"]+)"\)', README)[0]
    assert (name, tag) in open_clip.list_pretrained()
