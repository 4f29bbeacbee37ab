"""A saved model loads where this package is not installed, and its code is the package's own."""

import ast
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor, pipeline

from sf_mllm import (
    SFLlavaForConditionalGeneration,
    SFLlavaProcessor,
    SparseFormerImageProcessor,
    SparseFormerModel,
    register_auto_classes,
)
from sf_mllm import remote_code as remote_code_module
from sf_mllm.assets import resolve_demo
from sf_mllm.errors import InputError
from sf_mllm.inference.loading import load_model
from sf_mllm.remote_code import AUTO_CLASSES, bundle
from sf_mllm.training.model_directory import write_model_directory
from tests.tiny_vlm import make_encoder, make_image, make_image_processor, make_sf_llava

QUESTIONS = ["<image>\nWhat colour is the square?", "Is it green?", "Compare <image> with <image>, please"]
GENERATE = {"max_new_tokens": 8, "do_sample": False}
# What a user of transformers has, and our modules therefore may import.
PLAIN = {"torch", "transformers", "huggingface_hub", "typing_extensions", "numpy"} | sys.stdlib_module_names

STRANGER = """
import sys
for name in ("sf_mllm", "open_clip", "timm", "peft", "accelerate", "omegaconf", "datasets", "webdataset"):
    sys.modules[name] = None  # importing it raises
import torch
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoProcessor, pipeline

torch.set_num_threads(1)
given = torch.load(sys.argv[1], weights_only=False)
trust = {"trust_remote_code": True}
found = {}
for name, directory in given["models"].items():
    model = AutoModelForImageTextToText.from_pretrained(directory, **trust).eval()
    processor = AutoProcessor.from_pretrained(directory, **trust)
    inputs = processor(images=given["images"], text=given["prompts"][name], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits
    ask = pipeline("image-text-to-text", model=directory, **trust)
    options = {"return_full_text": False, "generate_kwargs": dict(given["generate"])}  # pipelines write into it
    found[name] = {
        "inputs": dict(inputs),
        "logits": logits,
        "answers": [ask(text=chat, **options)[0]["generated_text"] for chat in given["chats"]],
        "batch": [r[0]["generated_text"] for r in ask(text=given["chats"][1:], batch_size=2, **options)],
        "one_class": type(AutoConfig.from_pretrained(directory, **trust)) is type(model.config)
        and type(model.config.vision_config) is type(model.model.vision_tower.config)
        and type(model.model) is type(AutoModel.from_pretrained(directory, **trust)),
    }
from_hub = AutoModelForImageTextToText.from_pretrained("someone/tiny", **trust)
with torch.no_grad():
    found["hub"] = from_hub(**AutoProcessor.from_pretrained("someone/tiny", **trust)(
        images=given["images"], text=given["prompts"]["tiny"], padding=True, return_tensors="pt")).logits
model.save_pretrained(given["resaved"])
processor.save_pretrained(given["resaved"])
again = AutoModelForImageTextToText.from_pretrained(given["resaved"], **trust)
with torch.no_grad():
    found["resaved"] = again(**inputs).logits
encoder = AutoModel.from_pretrained(given["encoder"], **trust).eval()
pixels = AutoImageProcessor.from_pretrained(given["encoder"], **trust)(given["images"], return_tensors="pt")
with torch.no_grad():
    found["encoder"] = dict(encoder(**pixels))
torch.save(found, sys.argv[2])
"""


def chat(text: str, *images) -> list[dict]:
    return [
        {"role": "user", "content": [*({"type": "image", "image": i} for i in images), {"type": "text", "text": text}]}
    ]


CHATS = [
    chat("How many objects are there?"),
    chat("What colour is the square?", make_image(0)),
    chat("Compare the first picture with the second one, please: how many?", make_image(1), make_image(2)),
]
IMAGES = [make_image(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def directories(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    write_model_directory(folder / "tiny", *make_sf_llava("qwen3", tied=True))
    write_model_directory(folder / "demo", *load_model("demo:sf_llava", device="cpu", dtype="float32"))
    write_model_directory(folder / "encoder", make_encoder(), make_image_processor())
    return folder


def prompts_of(processor) -> list[str]:
    return [
        processor.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        for question in QUESTIONS
    ]


@pytest.fixture(scope="module")
def stranger(directories):
    """What a fresh process without this package makes of the directories."""
    register_auto_classes()
    models = {name: str(directories / name) for name in ("demo", "tiny")}
    given = {
        "models": models,
        "prompts": {name: prompts_of(AutoProcessor.from_pretrained(path)) for name, path in models.items()},
        "images": IMAGES,
        "chats": CHATS,
        "generate": GENERATE,
        "encoder": str(directories / "encoder"),
        "resaved": str(directories / "resaved"),
    }
    torch.save(given, directories / "given.pt")
    # As the hub library keeps a repository that it fetched.
    repository, commit = directories / "hub" / "models--someone--tiny", "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(directories / "tiny", repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    environment = os.environ | {
        "HF_MODULES_CACHE": str(directories / "modules"),
        "HF_HUB_CACHE": str(directories / "hub"),
        "HF_HUB_OFFLINE": "1",
    }
    arguments = [str(directories / "given.pt"), str(directories / "found.pt")]
    result = subprocess.run(
        [sys.executable, "-c", STRANGER, *arguments],
        cwd=directories,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return torch.load(directories / "found.pt", weights_only=False)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the other process: sums are split by threads
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["tiny", "demo"])
def test_a_stranger_gets_the_same_inputs_logits_and_answers(stranger, directories, name):
    register_auto_classes()
    model = AutoModelForImageTextToText.from_pretrained(directories / name).eval()
    processor = AutoProcessor.from_pretrained(directories / name)
    assert type(model) is SFLlavaForConditionalGeneration and type(processor) is SFLlavaProcessor
    inputs = processor(images=IMAGES, text=prompts_of(processor), padding=True, return_tensors="pt")
    found = stranger[name]
    assert inputs.keys() == found["inputs"].keys()
    for key, tensor in inputs.items():
        assert torch.equal(tensor, found["inputs"][key]), key
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, found["logits"])
    ask = pipeline("image-text-to-text", model=str(directories / name))
    options = {"return_full_text": False, "generate_kwargs": dict(GENERATE)}
    assert [ask(text=chat, **options)[0]["generated_text"] for chat in CHATS] == found["answers"]
    assert found["batch"] == found["answers"][1:]
    assert any(found["answers"])


def test_no_configuration_exists_as_two_classes(stranger):
    assert stranger["tiny"]["one_class"] and stranger["demo"]["one_class"]


def test_a_repository_on_the_hub_loads_as_a_directory_does(stranger):
    assert torch.equal(stranger["hub"], stranger["tiny"]["logits"])


def test_what_a_stranger_saves_loads_for_strangers_and_here(stranger, directories):
    assert torch.equal(stranger["resaved"], stranger["tiny"]["logits"])
    model, processor = load_model(directories / "resaved", device="cpu", dtype="float32")
    inputs = processor(images=IMAGES, text=prompts_of(processor), padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model(**inputs).logits, stranger["resaved"])
    write_model_directory(directories / "without", model, processor, remote_code=False)
    assert not list((directories / "without").glob("*.py"))
    for path in (directories / "without").glob("*.json"):
        assert "auto_map" not in path.read_text(), path


def test_a_stranger_gets_the_same_tokens_from_the_encoder(stranger, directories):
    encoder = SparseFormerModel.from_pretrained(directories / "encoder").eval()
    pixels = SparseFormerImageProcessor.from_pretrained(directories / "encoder")(IMAGES, return_tensors="pt")
    with torch.no_grad():
        output = encoder(**pixels)
    assert output.keys() == stranger["encoder"].keys()
    for name, tensor in output.items():
        assert torch.equal(tensor, stranger["encoder"][name]), name


def test_where_the_package_is_registered_its_classes_are_used_even_with_trust(directories):
    register_auto_classes()
    path = directories / "tiny"
    model = AutoModelForImageTextToText.from_pretrained(path, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    assert type(model) is SFLlavaForConditionalGeneration
    assert type(processor) is SFLlavaProcessor
    assert type(processor.image_processor) is SparseFormerImageProcessor


def test_the_chat_never_runs_code_beside_weights(directories, tmp_path, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("the user was asked"))
    write_model_directory(tmp_path / "ours", *make_sf_llava())
    (tmp_path / "ours" / "modeling_sf_llava.py").write_text("raise SystemExit('was run')")
    model, _ = load_model(tmp_path / "ours", device="cpu")
    assert type(model) is SFLlavaForConditionalGeneration

    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config | {"model_type": "of_somebody_else"}))
    with pytest.raises(InputError, match="contains custom code"):
        load_model(tmp_path / "ours", device="cpu")


@pytest.mark.parametrize("model_type", AUTO_CLASSES)
def test_a_bundle_needs_nothing_but_transformers_and_holds_what_the_auto_classes_name(model_type):
    tree = ast.parse(bundle(AUTO_CLASSES[model_type].values()))
    imported = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module])
    }
    assert imported <= PLAIN
    classes = {node.name for node in tree.body if isinstance(node, ast.ClassDef)}
    assert {name.rpartition(".")[2] for name in AUTO_CLASSES[model_type].values()} <= classes


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write modules of a small package in our package's place."""
    monkeypatch.setattr(remote_code_module, "_ROOT", tmp_path)

    def write(**modules: str) -> None:
        for name, source in modules.items():
            (tmp_path / f"{name}.py").write_text(source)

    return write


LOW = """\
'Low.'
import math
from math import pi as PI

# Why two.
TWO = 2
'Twice one.'
THREE = 3


def area(r):
    return PI * r**TWO * math.sqrt(1)  # of a circle


def unused():
    return THREE
"""
HIGH = """\
from typing import TYPE_CHECKING

from sf_mllm.low import area

if TYPE_CHECKING:
    from sf_mllm.absent import Nothing


class Base:
    pass


class Disc(Base):
    r = 3.0

    @classmethod
    def make(cls) -> "Nothing":
        from sf_mllm.absent import make

        return make()

    def area(self):
        return area(self.r)
"""


def test_a_bundle_holds_what_is_used_in_working_order(package):
    package(low=LOW, high=HIGH)
    source = bundle(["sf_mllm.high.Disc"])
    assert "# Why two.\nTWO = 2\n'Twice one.'\n" in source and "# of a circle" in source
    for absent in ("THREE", "unused", "sf_mllm.absent", "classmethod", "def make", "TYPE_CHECKING", "'Low.'"):
        assert absent not in source
    names: dict = {}
    exec(source, names)
    assert names["Disc"]().area() == pytest.approx(28.274333882308138)


TWO_NAMES = "from sf_mllm.b import g\nX = 1\n\n\ndef f():\n    return X, g()\n"
TWO_IMPORTS = "from math import X\nfrom sf_mllm.b import g\n\n\ndef f():\n    return X, g()\n"
B_DEFINES = "X = 1\n\n\ndef g():\n    return X\n"
B_IMPORTS = "from cmath import X\n\n\ndef g():\n    return X\n"


@pytest.mark.parametrize(
    ("modules", "reason"),
    [
        ({"a": TWO_NAMES, "b": B_DEFINES}, r"'X' means one thing in sf_mllm\.a and another in sf_mllm\.b; rename one"),
        ({"a": TWO_NAMES, "b": B_IMPORTS}, "'X' means one thing"),
        ({"a": TWO_IMPORTS, "b": B_IMPORTS}, "'X' means one thing"),
        ({"a": "from sf_mllm.b import g as h\nf = h\n", "b": "g = 1\n"}, "line 1: import 'h' under its own name"),
        ({"a": "from sf_mllm.b import g\nf = g\n", "b": "h = 1\n"}, "line 1: import 'g' under its own name"),
        ({"a": "import sf_mllm.b\nf = 1\n", "b": ""}, "line 1: an import of this kind"),
        ({"a": "from __future__ import annotations\nf = 1\n"}, "line 1: an import of this kind"),
        ({"a": "f = 1\nprint(f)\n"}, "line 2: only definitions can be bundled"),
    ],
)
def test_what_would_break_in_one_file_is_refused(package, modules, reason):
    package(**modules)
    with pytest.raises(RuntimeError, match=reason):
        bundle(["sf_mllm.a.f"])


def test_the_shipped_model_holds_no_copy_of_the_code():
    """It would grow old beside the package it is installed with."""
    assert not [name for name in os.listdir(resolve_demo("demo:sf_llava")) if name.endswith(".py")]
