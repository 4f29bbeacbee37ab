"""Stage one from configuration to encoder directory, step by step."""

import logging
from pathlib import Path

from torch import nn
from transformers import TrainingArguments, set_seed

from sf_mllm.data.images import HeldOutImages, ImageFiles, TrainingImages, digest_names, find_images, hold_out
from sf_mllm.encoder.image_processing_sparseformer import SparseFormerImageProcessor
from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.encoder.weights_vit import InheritanceReport
from sf_mllm.errors import InputError
from sf_mllm.training.arguments import make_training_arguments
from sf_mllm.training.bootstrap_config import BootstrapConfig, DataConfig
from sf_mllm.training.bootstrap_trainer import (
    BootstrapTask,
    BootstrapTrainer,
    count_trained_blocks,
    freeze_inherited_top,
)
from sf_mllm.training.progress import report_progress
from sf_mllm.training.run_folder import RunFolder, write_directory_atomically
from sf_mllm.training.teachers import Teacher, load_teacher

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
    arguments = make_training_arguments(config.train, run.checkpoints, config.seed)
    with run.recording():
        trainer, report = build_trainer(config, run, arguments)
        report_progress(trainer, run)
        log_plan(run, trainer, report)
        trainer.train(resume_from_checkpoint=run.find_last_checkpoint())
        run.update_record(
            agreement=measure_agreement(trainer),
            unreadable_images=trainer.train_dataset.files.num_unreadable + trainer.eval_dataset.files.num_unreadable,
        )
        if trainer.is_world_process_zero():
            save_encoder(trainer.model, trainer.task.teacher, config.data, encoder_directory)
    logger.info("Saved the encoder in %s", encoder_directory)
    return encoder_directory


def build_trainer(
    config: BootstrapConfig, run: RunFolder, arguments: TrainingArguments
) -> tuple[BootstrapTrainer, InheritanceReport]:
    """Put teacher, student and images together."""
    teacher = load_teacher(config.teacher)
    student, report = build_student(config, teacher)
    training, held_out = prepare_images(config, run)
    trainer = BootstrapTrainer(
        task=BootstrapTask(teacher, config.loss),
        inherited_names=frozenset(report.copied),
        inherited_learning_rate=config.inherited_learning_rate,
        model=student,
        args=arguments,
        train_dataset=order_images(training, config, arguments),
        eval_dataset=HeldOutImages(held_out, config.data.resolution),
    )
    return trainer, report


def build_student(config: BootstrapConfig, teacher: Teacher) -> tuple[SparseFormerModel, InheritanceReport]:
    """Inherit from the teacher and freeze what stays as it is; the same seed gives the same start."""
    set_seed(config.seed)
    student, report = SparseFormerModel.from_vit(
        teacher.vit, start_from_class_token=config.student.start_from_class_token, **config.student.overrides
    )
    num_trained = config.student.trained_cortex_blocks
    if num_trained is None:
        num_trained = count_trained_blocks(len(student.cortex), report.first_block)
    if not 0 <= num_trained <= len(student.cortex):
        raise InputError(
            f"student.trained_cortex_blocks={num_trained}, but the student has {len(student.cortex)} cortex blocks; "
            "give a number from 0 to that."
        )
    freeze_inherited_top(student, num_trained)
    return student, report


def prepare_images(config: BootstrapConfig, run: RunFolder) -> tuple[ImageFiles, ImageFiles]:
    """List the files, draw the scenes first if they are wanted, and split them into (training, held-out).

    Raises:
        InputError: the folder cannot be used, or its files changed since the run began.
    """
    folder = config.data.images
    if folder == "scenes":
        folder = str(run.path / "scenes")
        draw_scenes(Path(folder), config)
    paths = find_images(folder)
    data = {"images": folder, "files": len(paths), "file_names_sha256": digest_names(paths, folder)}
    earlier = run.record.get("data")
    if earlier and earlier["file_names_sha256"] != data["file_names_sha256"]:
        raise InputError(
            f"The files in '{folder}' changed since this run began ({earlier['files']} then, {len(paths)} now); "
            "restore them or start a new run in another output_dir."
        )
    run.update_record(data=data)
    training, held_out = hold_out(paths, config.data.held_out, config.seed)
    share = config.data.max_unreadable_share
    return ImageFiles(training, share), ImageFiles(held_out, share)


def draw_scenes(folder: Path, config: BootstrapConfig) -> None:
    """Export the built-in scenes as an image folder, unless they are there."""
    from sf_mllm.data.scenes import export_scenes  # only runs on scenes need the renderer

    logger.info("Using %d built-in scenes in %s", config.data.scenes_count, folder)
    export_scenes(folder, count=config.data.scenes_count, seed=config.seed)


def order_images(files: ImageFiles, config: BootstrapConfig, arguments: TrainingArguments) -> TrainingImages:
    """Lay out the crops of the whole run; a number of epochs becomes a number of steps in `arguments`."""
    batch_size = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    if arguments.max_steps <= 0:
        arguments.max_steps = max(1, round(arguments.num_train_epochs * len(files) / batch_size))
    return TrainingImages(
        files,
        num_samples=arguments.max_steps * batch_size,
        resolution=config.data.resolution,
        min_crop_area=config.data.min_crop_area,
        flip=config.data.flip,
        seed=config.seed,
    )


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
        "epochs": round(dataset.num_epochs, 2),
    }
    run.update_record(**counts)
    logger.info("Student: %s.", report)
    logger.info(
        "%d tokens an image; %.1fM parameters, %.1fM of them train (teacher's image tower %.1fM).",
        counts["tokens_per_image"],
        counts["parameters"] / 1e6,
        counts["parameters_trained"] / 1e6,
        counts["parameters_of_teacher"] / 1e6,
    )
    logger.info(
        "%d steps of %d images, %.4g epochs of %d images, on %s.",
        counts["steps"],
        counts["global_batch_size"],
        counts["epochs"],
        len(dataset.files),
        trainer.args.device,
    )


def measure_agreement(trainer: BootstrapTrainer) -> dict[str, float]:
    """Return the held-out measures at the last step, which the Trainer may have taken already."""
    taken = [row for row in trainer.state.log_history if "eval_embedding_cosine" in row]
    is_recent = taken and taken[-1]["step"] == trainer.state.global_step
    measures = taken[-1] if is_recent else trainer.evaluate()
    return {name: value for name, value in measures.items() if name.startswith("eval_")}


def save_encoder(student: SparseFormerModel, teacher: Teacher, data: DataConfig, directory: Path) -> None:
    """Write weights, configuration and image processor into one directory that `from_pretrained` reads."""
    processor = SparseFormerImageProcessor(
        size={"height": data.resolution, "width": data.resolution},
        image_mean=list(teacher.preprocessing.mean),
        image_std=list(teacher.preprocessing.std),
    )
    with write_directory_atomically(directory) as temporary:
        student.save_pretrained(temporary)
        processor.save_pretrained(temporary)


def _count(module: nn.Module, trained_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)
