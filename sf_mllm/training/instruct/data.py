"""The data of an instruct run: checked conversations, split into training and held-out ones, as data sets."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainingArguments

from sf_mllm.config import write_text_atomically
from sf_mllm.data.conversation_sources import ChosenConversations, JoinedConversations
from sf_mllm.data.conversations import ConversationDataset
from sf_mllm.data.image_sources import digest
from sf_mllm.data.row_checks import RowChecks
from sf_mllm.errors import InputError
from sf_mllm.training.instruct.config import InstructConfig
from sf_mllm.training.instruct.rows import (
    RowPlan,
    RunConversations,
    check_conversations,
    count_usable,
    find_conversations,
    list_unusable,
    plan_rows,
)
from sf_mllm.training.run_folder import RunFolder, is_main_process
from sf_mllm.vlm.processing_sf_llava import SFLlavaProcessor

logger = logging.getLogger(__name__)

_CHECKS_FILE = "row_checks.npz"
_DROPPED_FILE = "dropped.jsonl"


def prepare_data(
    config: InstructConfig, run: RunFolder, processor: SFLlavaProcessor, arguments: TrainingArguments
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
    with arguments.main_process_first(local=False, desc="opening conversations"):  # some are drawn or converted once
        conversations = find_conversations(config, run.path / "scenes")
    _refuse_other_data(run.record.get("data"), conversations)
    checks = _check_once(config, run, processor, arguments, conversations.source)
    plan = plan_rows(config, conversations, checks)
    if is_main_process():
        _write_dropped(run.path / _DROPPED_FILE, conversations, checks)
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


def _check_once(
    config: InstructConfig,
    run: RunFolder,
    processor: SFLlavaProcessor,
    arguments: TrainingArguments,
    source: JoinedConversations,
) -> RowChecks:
    """Check the rows in the main process at a run's first start; everywhere else read what came out."""
    path = run.path / _CHECKS_FILE
    tokenizer, image_seq_length = processor.tokenizer, processor.image_seq_length
    key = digest(source.fingerprint, len(tokenizer), tokenizer.chat_template, image_seq_length, config.data.max_length)
    with arguments.main_process_first(local=False, desc="checking conversations"):
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


def _write_dropped(path: Path, conversations: RunConversations, checks: RowChecks) -> None:
    """Write one JSON row for each conversation that is left out; no file if there is none."""
    lines = [json.dumps(row) + "\n" for row in list_unusable(conversations, checks)]
    if not lines:
        path.unlink(missing_ok=True)
        return
    write_text_atomically(path, "".join(lines))
    logger.warning(
        "%d of %d conversations cannot be used and are left out; %s lists them.",
        len(lines),
        len(conversations.source),
        path,
    )
