"""A tiny run of stage two: its parts and conversations on disk, its configuration, and how it is killed."""

import json

from transformers import TrainerCallback

from sf_mllm.config import load_run_config
from sf_mllm.training.arguments import make_training_arguments
from sf_mllm.training.instruct.config import InstructConfig
from tests.tiny_text import make_tokenizer
from tests.tiny_vlm import make_decoder, make_encoder, make_image, make_image_processor

QUESTIONS = ["<image>\nWhat colour is the square?", "How many objects are there <image>", "Is it green?"]

ALIGN = {"lora": "null", "projector_learning_rate": "null"}
"""Changes that make a run an align run."""


def save_parts(folder):
    """Write encoder, decoder and 12 conversations: one image, two images in two turns, text only."""
    make_encoder(drop_path_rate=0.2).save_pretrained(folder / "encoder")
    make_image_processor().save_pretrained(folder / "encoder")
    tokenizer = make_tokenizer()
    make_decoder(vocab_size=len(tokenizer), tied=True).save_pretrained(folder / "decoder")
    tokenizer.save_pretrained(folder / "decoder")
    rows = []
    for index in range(12):
        make_image(index).save(folder / f"{index}.png")
        human = QUESTIONS[index % 3]
        turns = [{"from": "human", "value": human}, {"from": "gpt", "value": f"{index % 5} green"}]
        images = [f"{index}.png"] if "<image>" in human else []
        if index % 3 == 1:
            turns += [{"from": "human", "value": "<image> too?"}, {"from": "gpt", "value": "yes"}]
            images += ["0.png"]
        rows.append({"id": index, "conversations": turns} | ({"image": images} if images else {}))
    (folder / "rows.json").write_text(json.dumps(rows))


def make_config(parts, output_dir, **changes):
    train = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "cosine",
        "save_steps": 2,
        "logging_steps": 1,
    } | changes.pop("train", {})
    values = {
        "output_dir": output_dir,
        "encoder": parts / "encoder",
        "decoder": parts / "decoder",
        "projector_learning_rate": 1e-3,
        "lora.rank": 4,
        "lora.alpha": 8,
        "lora.dropout": 0.1,
        "data.conversations": parts / "rows.json",
        "data.held_out": 3,
        "data.max_length": 200,
        "save.dtype": "float32",
    } | changes
    file = parts / "config.yaml"
    file.write_text(json.dumps({"train": train}))
    return load_run_config(InstructConfig, file, [f"{key}={value}" for key, value in values.items()])


def arguments_of(config, run):
    return make_training_arguments(config.train, run.checkpoints, config.seed)


class KilledError(Exception):
    """Stands for a SIGKILL in the middle of a run."""


class KillAfterStep(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KilledError


def steps_of(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row["loss"]) for row in rows if "loss" in row]
