"""The conversations of an instruct run: found, checked, and split into training and held-out ones."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from sf_mllm.config import write_text_atomically
from sf_mllm.data.conversation_sources import ChosenConversations, JoinedConversations
from sf_mllm.data.conversation_specs import open_conversations
from sf_mllm.data.conversations import ConversationDataset
from sf_mllm.data.image_sources import digest
from sf_mllm.data.mixtures import draw_rows
from sf_mllm.data.row_checks import RowChecks, check_rows
from sf_mllm.errors import InputError
from sf_mllm.training.instruct_config import InstructConfig
from sf_mllm.training.instruct_sources import SCENES, SourceSettings, parse_sources
from sf_mllm.training.processes import main_process_first
from sf_mllm.training.run_folder import RunFolder, is_main_process
from sf_mllm.vlm.processing_sf_llava import SFLlavaProcessor

logger = logging.getLogger(__name__)

_CHECKS_FILE = "row_checks.npz"
_DROPPED_FILE = "dropped.jsonl"
_SHOWN_PROBLEMS = 3
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
        return [setting.licence or source.licence or "not stated" for setting, source in pairs]

    def source_of(self, rows: np.ndarray) -> np.ndarray:
        """Return the number of the source of each of some rows, [rows]."""
        return np.searchsorted(self.source.ends, rows, side="right")


@dataclass(frozen=True)
class RowPlan:
    """Numbers of rows in the joined source."""

    training: np.ndarray
    """Rows of an epoch, sorted; one may come several times."""
    held_out: np.ndarray
    """Rows to measure on, sorted."""


def prepare_data(
    config: InstructConfig, run: RunFolder, processor: SFLlavaProcessor
) -> tuple[ConversationDataset, ConversationDataset, dict[str, int]]:
    """Find and check all conversations and split off the held-out ones.

    Of several processes the main one checks the rows; the others and later starts read what it found, so a resumed run
    leaves out the same rows.

    Returns:
        Training data, held-out data, and the counts of all usable rows together.

    Raises:
        InputError: data cannot be used, changed since the run began, or holds unusable rows that are not to be dropped.
    """
    data = config.data
    with main_process_first():  # scenes are drawn and tables are converted once
        conversations = find_conversations(config, run.path / "scenes")
    _refuse_other_data(run.record.get("data"), conversations)
    checks = _check_once(config, run, processor, conversations.source)
    plan = plan_rows(config, conversations, checks)
    if is_main_process():
        _list_dropped(run.path / _DROPPED_FILE, conversations, checks)
    counts = count_usable(checks)
    if counts["truncated_rows"]:
        logger.warning(
            "%d of %d conversations lose their end at data.max_length=%d, in all %d tokens of answers.",
            counts["truncated_rows"],
            counts["rows"],
            data.max_length,
            counts["lost_answer_tokens"],
        )
    run.update_record(
        data={
            "sources": _describe_sources(conversations, plan),
            "held_out": len(plan.held_out),
            "rows_an_epoch": len(plan.training),
            **counts,
            "dropped": checks.count_problems(),
        }
    )

    def dataset(rows: np.ndarray) -> ConversationDataset:
        return ConversationDataset(
            ChosenConversations(conversations.source, rows),
            processor.tokenizer,
            processor.image_processor,
            image_seq_length=processor.image_seq_length,
            max_length=data.max_length,
            lengths=checks.rows["kept_tokens"][rows],
        )

    return dataset(plan.training), dataset(plan.held_out), counts


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
    source, held_out = conversations.source, config.data.held_out
    if checks.reasons and not config.data.drop_unusable:
        raise InputError(_describe_refusal(source, checks))
    usable = np.flatnonzero(checks.usable)
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
    from sf_mllm.data import scenes  # only runs on scenes need the renderer

    logger.info("Drawing %d scenes in %s", config.data.scenes_count, folder)
    count = config.data.scenes_count
    workers = min(os.cpu_count() or 1, _MAX_PROCESSES, 1 + count // _SCENES_PER_PROCESS)
    scenes.export_scenes(folder, count=count, seed=config.data.seed, workers=workers)
    return str(folder / scenes.CONVERSATIONS_FILE), str(folder / scenes.IMAGE_FOLDER)


def _check_once(
    config: InstructConfig, run: RunFolder, processor: SFLlavaProcessor, source: JoinedConversations
) -> RowChecks:
    """Check the rows in the main process at a run's first start; everywhere else read what came out."""
    path = run.path / _CHECKS_FILE
    tokenizer, image_seq_length = processor.tokenizer, processor.image_seq_length
    key = digest(source.fingerprint, len(tokenizer), tokenizer.chat_template, image_seq_length, config.data.max_length)
    with main_process_first():
        # Before the first checkpoint images may have been repaired since an earlier start looked at them.
        is_known = not is_main_process() or run.find_last_checkpoint() is not None
        checks = RowChecks.load(path, key) if is_known else None
        if checks is None:
            checks = check_conversations(
                config, source, tokenizer, image_seq_length, decode_images=config.data.drop_unusable
            )
            if is_main_process():
                checks.save(path, key)
    return checks


def _refuse_other_data(earlier: dict[str, Any] | None, conversations: RunConversations) -> None:
    """Compare the sources with those that a run began with.

    Raises:
        InputError: one of them changed.
    """
    for before, source in zip(earlier["sources"] if earlier else (), conversations.source.sources, strict=False):
        if before["fingerprint"] != source.fingerprint:
            raise InputError(
                f"'{source.label}' changed since this run began; restore it or start a new run in another output_dir."
            )


def _describe_sources(conversations: RunConversations, plan: RowPlan) -> list[dict[str, Any]]:
    """Return what `run.json` keeps about each source."""
    an_epoch = np.bincount(conversations.source_of(plan.training), minlength=len(conversations.settings))
    return [
        {
            "conversations": source.label,
            "fingerprint": source.fingerprint,
            "rows": len(source),
            "weight": weight,
            "rows_an_epoch": int(count),
            "licence": licence,
        }
        for source, weight, count, licence in zip(
            conversations.source.sources, conversations.weights, an_epoch, conversations.licences, strict=True
        )
    ]


def _describe_refusal(source: JoinedConversations, checks: RowChecks) -> str:
    rows = sorted(checks.reasons)
    counts = ", ".join(f"{count} {problem}" for problem, count in checks.count_problems().items())
    shown = "; ".join(f"{source.place(row)} {checks.reasons[row]}" for row in rows[:_SHOWN_PROBLEMS])
    more = f"; and {len(rows) - _SHOWN_PROBLEMS} more" if len(rows) > _SHOWN_PROBLEMS else ""
    return (
        f"{len(rows)} of {len(source)} conversations cannot be trained on ({counts}): {shown}{more}. Mend or remove "
        "them, raise data.max_length where it cuts them off, or leave them out with data.drop_unusable=true."
    )


def _list_dropped(path: Path, conversations: RunConversations, checks: RowChecks) -> None:
    """Write one JSON row for each conversation that is left out; no file if there is none."""
    if not checks.reasons:
        path.unlink(missing_ok=True)
        return
    lines = []
    for row, reason in sorted(checks.reasons.items()):
        number, _ = conversations.source.locate(row)
        problem = checks.problem_of(row).words
        entry = {"source": conversations.source.sources[number].label, "place": conversations.source.place(row)}
        lines.append(json.dumps({**entry, "problem": problem, "reason": reason}) + "\n")
    write_text_atomically(path, "".join(lines))
    logger.warning("%d conversations cannot be used and are left out; %s lists them.", len(lines), path)
