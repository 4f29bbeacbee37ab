"""Stage two from configuration to model directory, step by step."""

import dataclasses
import logging
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor
from transformers import Trainer, set_seed

from sf_mllm.data.collate import ConversationCollator
from sf_mllm.training.arguments import make_training_arguments
from sf_mllm.training.hub import check_repository_name, push_to_hub
from sf_mllm.training.instruct.attention import without_cudnn_attention
from sf_mllm.training.instruct.config import InstructConfig
from sf_mllm.training.instruct.data import prepare_data
from sf_mllm.training.instruct.parts import load_parts
from sf_mllm.training.instruct.quantization import refuse_split_quantized_weights
from sf_mllm.training.instruct.results import save_results, show_answers
from sf_mllm.training.instruct.split_weights import gather_trained_weights, has_split_weights, whole_weights
from sf_mllm.training.instruct.trainer import InstructTrainer
from sf_mllm.training.processes import check_processes, check_strategy
from sf_mllm.training.progress import report_progress
from sf_mllm.training.run_folder import RunFolder, is_main_process
from sf_mllm.vlm.adapters import PROJECTOR, add_adapters, fingerprints_of, train_projector_alone
from sf_mllm.vlm.fingerprints import Fingerprints
from sf_mllm.vlm.processing_sf_llava import SFLlavaProcessor
from sf_mllm.vlm.projector_files import find_projector, load_projector

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
        _upload(model_directory, config)
        return model_directory
    if config.save.push_to_hub is not None:
        check_repository_name(config.save.push_to_hub)
    arguments = make_training_arguments(config.train, run.checkpoints, config.seed)
    check_strategy(arguments, may_split_weights=True)
    check_processes(run, arguments)
    if config.quantization is not None:
        refuse_split_quantized_weights(arguments)
    with run.recording(), without_cudnn_attention():
        with whole_weights(arguments):
            model, processor = build_model(config)
        record_fingerprints(run, model)
        training, held_out, counts = prepare_data(config, run, processor, arguments)
        trainer = InstructTrainer(
            projector_learning_rate=(
                arguments.learning_rate if config.projector_learning_rate is None else config.projector_learning_rate
            ),
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
                merged: Any = save_results(make_whole(model, weights, config), processor, config.save, run.path)
                # The 4-bit decoder answers for itself: the whole one may not fit beside it.
                answering: Any = merged.to(arguments.device) if config.quantization is None else model
                show_answers(answering, processor, held_out.conversations[:_SHOWN_ANSWERS])
    trainer.accelerator.end_training()
    logger.info("Saved the model in %s. %s", model_directory, _chat_hint(model_directory))
    _upload(model_directory, config)
    return model_directory


def build_model(config: InstructConfig) -> tuple[PeftModel, SFLlavaProcessor]:
    """Load and join the parts and add what trains; the same seed gives the same start."""
    if config.projector is not None:
        find_projector(config.projector)  # a mistyped path shows before a large decoder is read
    model, processor = load_parts(config)
    if config.projector is not None:
        load_projector(model, config.projector)
    if config.lora is None:
        return train_projector_alone(model), processor
    set_seed(config.seed)  # the adapters start alike whether or not a projector was drawn and replaced
    lora = config.lora
    return add_adapters(model, rank=lora.rank, alpha=lora.alpha, dropout=lora.dropout), processor


def make_whole(model: PeftModel, weights: dict[str, Tensor], config: InstructConfig) -> PeftModel:
    """Return a trained model with every weight whole and unquantised; where one is not, its parts are read again.

    So what 4-bit weights trained is merged into the decoder as it is on disk, and keeps no error of quantisation.

    Args:
        model: as trained.
        weights: what trained, by parameter name (`gather_trained_weights`).
        config: of the run.
    """
    if config.quantization is None and not has_split_weights(model):
        return model
    if config.quantization is not None:
        logger.info("Reading the decoder again: the adapters are merged into its weights on disk, not into 4-bit ones.")
    whole, _ = build_model(dataclasses.replace(config, projector=None, quantization=None))
    loaded = whole.load_state_dict(weights, strict=False)  # the frozen weights are there already
    assert not loaded.unexpected_keys
    return whole


def record_fingerprints(run: RunFolder, model: PeftModel) -> None:
    """Record which parts the run trains on; a resumed run must find the same ones.

    Raises:
        InputError: another encoder, decoder or tokenizer lies where the run began with one.
    """
    here = fingerprints_of(model)
    Fingerprints.from_record(run.record.get("fingerprints")).refuse_other(
        here, owner=f"Run folder '{run.path}'", otherwise="start a new run in another output_dir"
    )
    run.update_record(fingerprints=here.to_record())


def log_plan(run: RunFolder, trainer: Trainer, model: PeftModel, data: dict[str, int]) -> None:
    """Say and record what will happen."""
    trained = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    config: Any = model.get_base_model().config
    arguments = trainer.args
    plan = {
        "parameters": model.get_nb_trainable_parameters()[1],  # which knows that 4-bit weights are packed
        "parameters_of_projector": sum(count for name, count in trained.items() if PROJECTOR in name),
        "parameters_of_adapters": sum(count for name, count in trained.items() if PROJECTOR not in name),
        "tokens_per_image": config.image_seq_length,
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


def _upload(model_directory: Path, config: InstructConfig) -> None:
    if config.save.push_to_hub is not None and is_main_process():
        logger.info("Uploaded to %s", push_to_hub(model_directory, config.save.push_to_hub))
