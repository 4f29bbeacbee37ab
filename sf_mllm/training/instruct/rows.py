"""The sources of a run's conversations, opened, and which of their rows training uses."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sf_mllm.cores import count_cores
from sf_mllm.data.conversation_sources import JoinedConversations
from sf_mllm.data.conversation_specs import open_conversations
from sf_mllm.data.mixtures import draw_rows
from sf_mllm.data.row_checks import Problem, RowChecks, check_rows
from sf_mllm.errors import InputError
from sf_mllm.training.instruct.config import InstructConfig
from sf_mllm.training.instruct.sources import SCENES, SourceSettings, parse_sources

logger = logging.getLogger(__name__)

_SCENES_LICENCE = "MIT, drawn by this program"
_SHOWN_PROBLEMS = 3
_HELD_OUT = 16
_MAX_PROCESSES = 16  # each takes about a GiB of memory, and a container may see more cores than it may use
_SCENES_PER_PROCESS = 2000  # fewer are drawn sooner than another process starts


@dataclass(frozen=True)
class RunConversations:
    """The sources of a run, in the order of its configuration."""

    settings: list[SourceSettings]
    source: JoinedConversations

    @property
    def weights(self) -> list[float]:
        """How often a row of each source is seen in an epoch."""
        return [setting.weight for setting in self.settings]

    @property
    def licences(self) -> list[str]:
        """What is known about the licence of each source."""
        pairs = zip(self.settings, self.source.sources, strict=True)
        return [
            setting.licence or source.licence or (_SCENES_LICENCE if setting.conversations == SCENES else "not stated")
            for setting, source in pairs
        ]

    def source_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of the source of each of some rows, [rows]."""
        return np.searchsorted(self.source.ends, rows, side="right")


@dataclass(frozen=True)
class RowPlan:
    """Numbers of rows in the joined source."""

    training: np.ndarray
    """Rows of an epoch, sorted; one may come several times."""
    held_out: np.ndarray
    """Rows to measure on, in random order."""


def find_conversations(config: InstructConfig, scenes_folder: Path) -> RunConversations:
    """Open the sources that a configuration names; the built-in scenes are drawn if they are among them.

    Raises:
        InputError: one of them cannot be used.
    """
    settings = parse_sources(config.data.conversations, config.data.image_root)
    opened = []
    for setting in settings:
        path, image_root = setting.conversations, setting.image_root
        if path == SCENES:
            path, image_root = draw_scenes(scenes_folder, config)
        opened.append(open_conversations(path, image_root))
    return RunConversations(settings, JoinedConversations(opened, ", ".join(source.label for source in opened)))


def plan_rows(config: InstructConfig, conversations: RunConversations, checks: RowChecks) -> RowPlan:
    """Decide which rows are trained on and which are held out.

    Raises:
        InputError: some rows cannot be used and are not to be dropped, or too few can.
    """
    source = conversations.source
    if checks.reasons and not config.data.drop_unusable:
        raise InputError(_describe_refusal(source, checks))
    usable = np.flatnonzero(checks.usable)
    held_out = _count_held_out(config.data.held_out, len(usable))
    source_of = conversations.source_of(usable)
    for number, part in enumerate(source.sources):
        if number not in source_of:
            raise InputError(f"No row of '{part.label}' can be used; repair it or leave it out of data.conversations.")
    if len(usable) <= held_out:
        raise InputError(
            f"'{source.label}' holds {len(usable)} conversations and data.held_out={held_out} of them are kept out of "
            "training, so none is left; lower data.held_out or add rows."
        )
    training, kept_out = draw_rows(
        source_of, conversations.weights, checks.rows["digest"][usable], held_out=held_out, seed=config.data.seed
    )
    plan = RowPlan(usable[training], usable[kept_out])
    for number, part in enumerate(source.sources):
        if number not in conversations.source_of(plan.training):
            raise InputError(
                f"Of '{part.label}' no row is left to train on, with weight {conversations.weights[number]:g} and "
                f"data.held_out={held_out}; raise the weight, lower data.held_out or leave it out."
            )
    return plan


def count_usable(checks: RowChecks, rows: Sequence[int] | slice | np.ndarray = slice(None)) -> dict[str, int]:
    """Count what the usable ones of some rows hold; tokens are those within max_length."""
    chosen = checks.rows[rows][checks.usable[rows]]
    return {
        "rows": len(chosen),
        "images": int(chosen["images"].sum()),
        "tokens": int(chosen["kept_tokens"].sum(dtype=np.int64)),
        "supervised_tokens": int(chosen["kept_answer_tokens"].sum(dtype=np.int64)),
        "truncated_rows": int((chosen["kept_tokens"] < chosen["tokens"]).sum()),
        "lost_answer_tokens": int((chosen["answer_tokens"] - chosen["kept_answer_tokens"]).sum(dtype=np.int64)),
    }


def list_unusable(conversations: RunConversations, checks: RowChecks) -> Iterator[dict[str, Any]]:
    """Yield a record of each row that cannot be used: its source, its place in it, and why."""
    source = conversations.source
    for row, reason in sorted(checks.reasons.items()):
        number, _ = source.locate(row)
        yield {
            "source": source.sources[number].label,
            "place": source.place(row),
            "problem": checks.problem_of(row).words,
            "reason": reason,
        }


def check_conversations(
    config: InstructConfig,
    source: JoinedConversations,
    tokenizer: PreTrainedTokenizerBase,
    image_seq_length: int,
    *,
    decode_images: bool,
) -> RowChecks:
    """Check every row as training with a configuration would use it."""
    return check_rows(
        source,
        tokenizer,
        image_seq_length=image_seq_length,
        max_length=config.data.max_length,
        decode_images=decode_images,
    )


def draw_scenes(folder: Path, config: InstructConfig) -> tuple[str, str]:
    """Export the built-in scenes, unless they are there; return their JSON file and image folder."""
    from sf_mllm.data.scenes import export  # only runs on scenes need the renderer

    logger.info("Drawing %d scenes in %s", config.data.scenes_count, folder)
    count = config.data.scenes_count
    workers = min(count_cores(), _MAX_PROCESSES, 1 + count // _SCENES_PER_PROCESS)
    export.export_scenes(folder, count=count, seed=config.data.seed, workers=workers)
    return str(folder / export.CONVERSATIONS_FILE), str(folder / export.IMAGE_FOLDER)


def _count_held_out(wanted: int | None, num_rows: int) -> int:
    return max(1, min(_HELD_OUT, num_rows // 10)) if wanted is None else wanted


def _describe_refusal(source: JoinedConversations, checks: RowChecks) -> str:
    rows = sorted(checks.reasons)
    counts = checks.count_problems()
    listed = ", ".join(f"{count} {problem}" for problem, count in counts.items())
    shown = "; ".join(f"{source.place(row)}: {checks.reasons[row]}" for row in rows[:_SHOWN_PROBLEMS])
    more = f"; and {len(rows) - _SHOWN_PROBLEMS} more" if len(rows) > _SHOWN_PROBLEMS else ""
    hints = "check data.image_root, " if Problem.MISSING_IMAGE.words in counts else ""
    hints += "raise data.max_length, " if {Problem.NO_ANSWER.words, Problem.CUT_IMAGE.words} & counts.keys() else ""
    return (
        f"{len(rows)} of {len(source)} conversations cannot be trained on ({listed}); mend or remove them, {hints}or "
        f"leave them out with data.drop_unusable=true: {shown}{more}."
    )
