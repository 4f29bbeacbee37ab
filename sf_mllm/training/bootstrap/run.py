"""Stage one from configuration to encoder directory, step by step."""

import logging
from pathlib import Path

from torch import nn
from transformers import TrainingArguments

from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.encoder.weights_vit import InheritanceReport
from sf_mllm.ops.kernels import choose_kernels
from sf_mllm.training.arguments import make_training_arguments
from sf_mllm.training.bootstrap.config import BootstrapConfig, DataConfig
from sf_mllm.training.bootstrap.evaluation import describe_evaluation, measure_at_end, prepare_evaluation
from sf_mllm.training.bootstrap.images import loader_defaults, make_datasets, prepare_images
from sf_mllm.training.bootstrap.student import build_student
from sf_mllm.training.bootstrap.task import BootstrapTask
from sf_mllm.training.bootstrap.teachers import Teacher, load_teacher
from sf_mllm.training.bootstrap.trainer import BootstrapTrainer
from sf_mllm.training.model_directory import write_model_directory
from sf_mllm.training.processes import check_processes, check_strategy
from sf_mllm.training.progress import report_progress
from sf_mllm.training.reinforce.store_origin import open_stored_views
from sf_mllm.training.run_folder import RunFolder
from sf_mllm.training.step_times import describe_speed

logger = logging.getLogger(__name__)


def run_bootstrap(config: BootstrapConfig) -> Path:
    """Train an encoder, or go on training it; return its directory.

    Raises:
        InputError: something that the configuration names cannot be used.
    """
    run = RunFolder.open(config, config.output_dir)
    encoder_directory = run.path / "encoder"
    if run.is_complete and encoder_directory.is_dir():
        logger.info("This run is complete; its encoder is %s. Set another output_dir to train anew.", encoder_directory)
        return encoder_directory
    arguments = make_training_arguments(loader_defaults(config.train), run.checkpoints, config.seed)
    check_strategy(arguments, may_split_weights=False)
    check_processes(run, arguments)
    with run.recording():
        trainer, report = build_trainer(config, run, arguments)
        report_progress(trainer, run, describe_evaluation)
        log_plan(run, trainer, report)
        trainer.train(resume_from_checkpoint=run.find_last_checkpoint())
        speed = trainer.times.summary()
        if speed:  # else an earlier start took the last step
            run.update_record(speed=speed)
            logger.info("%s", describe_speed(speed))
        run.update_record(
            evaluation=measure_at_end(trainer),
            unreadable_images=len(trainer.train_dataset.unreadable),
        )
        if trainer.is_world_process_zero():
            save_encoder(trainer.model, trainer.task.teacher, config.data, encoder_directory)
    trainer.accelerator.end_training()
    logger.info("Saved the encoder in %s", encoder_directory)
    return encoder_directory


def build_trainer(
    config: BootstrapConfig, run: RunFolder, arguments: TrainingArguments
) -> tuple[BootstrapTrainer, InheritanceReport]:
    """Put teacher, student and images together."""
    teacher = load_teacher(config.teacher)
    student, report = build_student(config, teacher)
    kernels = choose_kernels(config.student.kernels, arguments.device)
    student.set_kernels(kernels)
    with arguments.main_process_first(local=False, desc="preparing the images"):  # which may be drawn and are noted
        images = prepare_images(config, run)
    views = open_stored_views(config, teacher, images)
    if views is not None:
        run.update_record(store=views.store.description["content"])
    training, held_out = make_datasets(images, config, run, arguments, views)
    trainer = BootstrapTrainer(
        task=BootstrapTask(teacher, config.loss, kernels),
        evaluation=prepare_evaluation(config, teacher, run.path, arguments.device),
        inherited_names=frozenset(report.copied),
        inherited_learning_rate=config.inherited_learning_rate,
        model=student,
        args=arguments,
        train_dataset=training,
        eval_dataset=held_out,
    )
    return trainer, report


def log_plan(run: RunFolder, trainer: BootstrapTrainer, report: InheritanceReport) -> None:
    """Say and record what will happen."""
    student, dataset = trainer.model, trainer.train_dataset
    counts = {
        "parameters": _count(student),
        "parameters_trained": _count(student, trained_only=True),
        "parameters_of_teacher": _count(trainer.task.teacher),
        "tokens_per_image": student.config.num_tokens,
        "steps": trainer.args.max_steps,
        "global_batch_size": len(dataset) // trainer.args.max_steps,
        "epochs": round(dataset.epochs_after(len(dataset)), 2) or None,  # unknown before tar shards were read
    }
    run.update_record(**counts, kernels=student.kernels)
    logger.info("Student: %s; kernels '%s'.", report, student.kernels)
    logger.info(
        "%d tokens an image; %.1fM parameters, %.1fM of them train (teacher's image tower %.1fM).",
        counts["tokens_per_image"],
        counts["parameters"] / 1e6,
        counts["parameters_trained"] / 1e6,
        counts["parameters_of_teacher"] / 1e6,
    )
    logger.info(
        "%d steps of %d images, %s, on %s.",
        counts["steps"],
        counts["global_batch_size"],
        dataset,
        trainer.args.device,
    )


def save_encoder(student: SparseFormerModel, teacher: Teacher, data: DataConfig, directory: Path) -> None:
    """Write weights, configuration and image processor into one directory that `from_pretrained` reads."""
    processor = SparseFormerImageProcessor(
        size={"height": data.resolution, "width": data.resolution},
        image_mean=list(teacher.preprocessing.mean),
        image_std=list(teacher.preprocessing.std),
    )
    write_model_directory(directory, student, processor)


def _count(module: nn.Module, trained_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)
