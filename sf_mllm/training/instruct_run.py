"""Stage two from configuration to model directory, step by step."""

import hashlib
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, set_seed

from sf_mllm.data.collate import ConversationCollator
from sf_mllm.data.conversations import ConversationDataset
from sf_mllm.data.image_io import open_image
from sf_mllm.data.messages import Conversation, read_llava_json
from sf_mllm.errors import InputError
from sf_mllm.training.arguments import make_training_arguments
from sf_mllm.training.instruct_config import InstructConfig, SaveConfig
from sf_mllm.training.instruct_parts import join, load_decoder, load_encoder
from sf_mllm.training.progress import report_progress
from sf_mllm.training.run_folder import RunFolder, write_directory_atomically
from sf_mllm.vlm.adapters import PROJECTOR, add_adapters, merge_adapters, trained_parameter_groups
from sf_mllm.vlm.build import cast_weights
from sf_mllm.vlm.modeling_sf_llava import SFLlavaForConditionalGeneration
from sf_mllm.vlm.processing_sf_llava import SFLlavaProcessor

logger = logging.getLogger(__name__)

_SHOWN_ANSWERS = 5
_MAX_NEW_TOKENS = 64
_MAX_PROCESSES = 16  # each takes about a GiB of memory, and a container may see more cores than it may use
_SCENES_PER_PROCESS = 2000  # fewer are drawn sooner than another process starts


class InstructTrainer(Trainer):
    """Trainer with a learning rate of its own for the projector."""

    def __init__(self, *, projector_learning_rate: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.projector_learning_rate = projector_learning_rate

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build the optimizer that the arguments name, over our parameter groups."""
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = trained_parameter_groups(
                model,
                learning_rate=self.args.learning_rate,
                projector_learning_rate=self.projector_learning_rate,
                weight_decay=self.args.weight_decay,
            )
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer


def run_instruct(config: InstructConfig) -> Path:
    """Train a model, or go on training it; return its directory.

    Raises:
        InputError: something that the configuration names cannot be used.
    """
    run = RunFolder.open(config, config.output_dir)
    model_directory = run.path / "model"
    if run.is_complete and model_directory.is_dir():
        logger.info("This run is complete; set another output_dir to train anew. %s", _chat_hint(model_directory))
        return model_directory
    arguments = make_training_arguments(config.train, run.checkpoints, config.seed)
    with run.recording():
        model, processor = build_model(config)
        training, held_out, counts = prepare_data(config, run, processor)
        trainer = InstructTrainer(
            projector_learning_rate=config.projector_learning_rate,
            model=model,
            args=arguments,
            train_dataset=training,
            eval_dataset=held_out,
            data_collator=ConversationCollator(processor.tokenizer.pad_token_id),
        )
        report_progress(trainer, run)
        log_plan(run, trainer, model, counts)
        trainer.train(resume_from_checkpoint=run.find_last_checkpoint())
        evaluation = trainer.evaluate()
        run.update_record(held_out_loss=evaluation["eval_loss"])
        if trainer.is_world_process_zero():
            merged: Any = save_results(model, processor, config.save, run.path)
            merged.to(arguments.device)
            show_answers(merged, processor, held_out.conversations[:_SHOWN_ANSWERS])
    trainer.accelerator.end_training()
    logger.info("Saved the model in %s. %s", model_directory, _chat_hint(model_directory))
    return model_directory


def build_model(config: InstructConfig) -> tuple[PeftModel, SFLlavaProcessor]:
    """Load and join the parts and add what trains; the same seed gives the same start."""
    dtype = getattr(torch, config.dtype)
    encoder, image_processor = load_encoder(config.encoder, dtype)
    decoder, tokenizer = load_decoder(config.decoder, dtype)
    set_seed(config.seed)
    model, processor = join(encoder, image_processor, decoder, tokenizer, config.chat_template)
    lora = config.lora
    return add_adapters(model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout), processor


def prepare_data(
    config: InstructConfig, run: RunFolder, processor: SFLlavaProcessor
) -> tuple[ConversationDataset, ConversationDataset, dict[str, int]]:
    """Read and check all conversations and split off the held-out ones at the end.

    Returns:
        Training data, held-out data, and the counts of both together.

    Raises:
        InputError: the file cannot be used, changed since the run began, or holds rows that teach nothing.
    """
    file, image_root = config.data.conversations, config.data.image_root
    if file == "scenes":
        file, image_root = draw_scenes(run.path / "scenes", config)
    conversations = read_llava_json(file, image_root)
    digest = hashlib.sha256(Path(file).read_bytes()).hexdigest()
    earlier = run.record.get("data")
    if earlier and earlier["sha256"] != digest:
        raise InputError(f"'{file}' changed since this run began; restore it or start a new run in another output_dir.")
    num_training = len(conversations) - config.data.held_out
    if num_training < 1:
        raise InputError(
            f"'{file}' holds {len(conversations)} conversations and data.held_out={config.data.held_out} of them are "
            "kept out of training, so none is left; lower data.held_out or add rows."
        )

    def dataset(rows: Sequence[Conversation]) -> ConversationDataset:
        return ConversationDataset(
            rows,
            processor.tokenizer,
            processor.image_processor,
            image_seq_length=processor.image_seq_length,
            max_length=config.data.max_length,
        )

    counts = dataset(conversations).check(workers=int(config.train.get("dataloader_num_workers", 0)))
    run.update_record(data={"conversations": file, "sha256": digest, "held_out": config.data.held_out, **counts})
    return dataset(conversations[:num_training]), dataset(conversations[num_training:]), counts


def draw_scenes(folder: Path, config: InstructConfig) -> tuple[str, str]:
    """Export the built-in scenes, unless they are there; return their JSON file and image folder."""
    from sf_mllm.data import scenes  # only runs on scenes need the renderer

    logger.info("Drawing %d scenes in %s", config.data.scenes_count, folder)
    count = config.data.scenes_count
    workers = min(os.cpu_count() or 1, _MAX_PROCESSES, 1 + count // _SCENES_PER_PROCESS)
    scenes.export_scenes(folder, count=count, seed=config.seed, workers=workers)
    return str(folder / scenes.CONVERSATIONS_FILE), str(folder / scenes.IMAGE_FOLDER)


def log_plan(run: RunFolder, trainer: Trainer, model: PeftModel, data: dict[str, int]) -> None:
    """Say and record what will happen."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    config: Any = model.get_base_model().config
    arguments = trainer.args
    plan = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "parameters_of_projector": sum(count for name, count in trained.items() if PROJECTOR in name),
        "parameters_of_adapters": sum(count for name, count in trained.items() if PROJECTOR not in name),
        "tokens_per_image": config.image_seq_length,
        "encoder_sha256": config.encoder_sha256,
        "global_batch_size": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
    }
    run.update_record(**plan)
    logger.info(
        "%d tokens an image; %.1fM parameters, of which %.2fM (projector) and %.2fM (adapters) train, on %s.",
        plan["tokens_per_image"],
        plan["parameters"] / 1e6,
        plan["parameters_of_projector"] / 1e6,
        plan["parameters_of_adapters"] / 1e6,
        arguments.device,
    )
    logger.info(
        "%d conversations with %d images, %.0f tokens each on average; batches of %d.",
        data["rows"],
        data["images"],
        data["tokens"] / data["rows"],
        plan["global_batch_size"],
    )


def save_results(
    model: PeftModel, processor: SFLlavaProcessor, save: SaveConfig, folder: Path
) -> SFLlavaForConditionalGeneration:
    """Write the adapter alone, then the merged model with all it needs; return the merged model in eval mode."""
    with write_directory_atomically(folder / "adapter") as temporary:
        model.save_pretrained(str(temporary))
        (temporary / "README.md").unlink(missing_ok=True)  # PEFT's empty form of a model card
    merged = cast_weights(merge_adapters(model), getattr(torch, save.dtype))
    merged.config.use_cache = True  # the Trainer switched it off for training
    with write_directory_atomically(folder / "model") as temporary:
        merged.save_pretrained(temporary, max_shard_size=save.max_shard_size)
        processor.save_pretrained(temporary)
    return merged.eval()


def show_answers(model: Any, processor: SFLlavaProcessor, conversations: Sequence[Conversation]) -> None:
    """Log what the model says to the first question of held-out conversations, beside what was expected."""
    logger.info("Answers to held-out questions:")
    for conversation in conversations:
        answer_index = [message.role for message in conversation.messages].index("assistant")
        asked = conversation.messages[:answer_index]
        prompt = processor.apply_chat_template(
            [{"role": message.role, "content": message.text} for message in asked],
            add_generation_prompt=True,
            tokenize=False,
        )
        num_images = sum(message.text.count(processor.image_token) for message in asked)
        images = [open_image(path) for path in conversation.image_paths[:num_images]]
        inputs = processor(images=images or None, text=[prompt], return_tensors="pt").to(model.device)
        output = model.generate(**inputs, max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        expected = conversation.messages[answer_index].text
        logger.info("  %s\n    -> %s   (expected: %s)", asked[-1].text.replace("\n", " "), answer, expected)


def _chat_hint(model_directory: Path) -> str:
    return f"Chat with it: python -m sf_mllm.cli --model {model_directory}"
