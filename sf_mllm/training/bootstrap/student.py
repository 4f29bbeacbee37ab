"""Stage one's student: what it inherits and which of its parts train."""

from transformers import set_seed

from sf_mllm.encoder.modeling_sparseformer import SparseFormerModel
from sf_mllm.encoder.weights_vit import InheritanceReport
from sf_mllm.errors import InputError
from sf_mllm.training.bootstrap.config import BootstrapConfig
from sf_mllm.training.bootstrap.teachers import Teacher


def build_student(config: BootstrapConfig, teacher: Teacher) -> tuple[SparseFormerModel, InheritanceReport]:
    """Inherit from the teacher and freeze what stays as it is; the same seed gives the same start."""
    set_seed(config.seed)
    student, report = SparseFormerModel.from_vit(
        teacher.vit, start_from_class_token=config.student.start_from_class_token, **config.student.overrides
    )
    num_blocks = len(student.cortex)
    num_trained = config.student.trained_cortex_blocks
    if num_trained is None:
        num_trained = count_trained_blocks(num_blocks, report.first_block)
    elif num_trained == "all":
        num_trained = num_blocks
    if not isinstance(num_trained, int) or not 0 <= num_trained <= num_blocks:
        raise InputError(
            f"student.trained_cortex_blocks={num_trained}, but the student has {num_blocks} cortex blocks; "
            'give a number from 0 to that, or "all".'
        )
    freeze_inherited_top(student, num_trained, train_head=config.student.train_head)
    return student, report


def freeze_inherited_top(student: SparseFormerModel, num_trained_blocks: int, *, train_head: bool) -> None:
    """Freeze the cortex blocks above the first few and, unless it trains, the head; the rest trains."""
    student.requires_grad_(True)
    head = () if train_head else (student.norm, student.attention_pool, student.projection)
    for module in (*student.cortex[num_trained_blocks:], *head):
        if module is not None:
            module.requires_grad_(False)


def count_trained_blocks(num_blocks: int, first_teacher_block: int) -> int:
    """Inherited blocks that train by the paper's rule: those below two thirds of the teacher's depth.

    Args:
        num_blocks: blocks of the student's cortex.
        first_teacher_block: index of the teacher's block that became the first of them.

    Source: arXiv 2312.01987.
    """
    depth = first_teacher_block + num_blocks
    return min(max(round(2 * depth / 3) - first_teacher_block, 0), num_blocks)
