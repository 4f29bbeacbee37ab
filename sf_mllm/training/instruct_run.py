"""Stage two from configuration to model directory, step by step."""

import logging
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import Trainer, set_seed

from sf_mllm.data.collate import ConversationCollator
from sf_mllm.training.arguments import make_training_arguments
from sf_mllm.training.instruct_config import InstructConfig
from sf_mllm.training.instruct_data import prepare_data
from sf_mllm.training.instruct_parts import join, load_decoder, load_encoder
from sf_mllm.training.instruct_results import save_results, show_answers
from sf_mllm.training.instruct_trainer import InstructTrainer
from sf_mllm.training.progress import report_progress
from sf_mllm.training.run_folder import RunFolder
from sf_mllm.training.split_weights import gather_trained_weights, has_split_weights, whole_weights
from sf_mllm.vlm.adapters import PROJECTOR, add_adapters
from sf_mllm.vlm.processing_sf_llava import SFLlavaProcessor

logger = logging.getLogger(__name__)

_SHOWN_ANSWERS = 5


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
        with whole_weights(arguments):
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
        weights = gather_trained_weights(model)
        if trainer.is_world_process_zero():
            with whole_weights(arguments):
                if has_split_weights(model):
                    model, _ = build_model(config)
                    model.load_state_dict(weights, strict=False)
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


def _chat_hint(model_directory: Path) -> str:
    return f"Chat with it: python -m sf_mllm.cli --model {model_directory}"
