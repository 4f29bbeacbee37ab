"""The folder of one training run: what was asked, what happened, and where to go on after an interruption.

Both stages use it in the same order::

    run = RunFolder.open(config, config.output_dir)          # creates it, or picks up an earlier start
    if run.is_complete: ...                                  # the same command after the end does nothing
    arguments = make_training_arguments(config.train, run.checkpoints, config.seed)      # training/arguments.py
    with run.recording():                                    # run.json holds the outcome, whatever it is
        trainer = SomeTrainer(model=..., args=arguments, ...)
        report_progress(trainer, run)                        # training/progress.py: metrics.jsonl and a line to read
        trainer.train(resume_from_checkpoint=run.find_last_checkpoint())
        with write_directory_atomically(run.path / "encoder") as directory:
            model.save_pretrained(directory)

Content: `config.yaml` (resolved), `run.json` (command, revision, versions, device, counts, outcome), `metrics.jsonl`
(one row a logged step), `checkpoints/` (the Trainer's), and the stage's result. Stage two adds `row_checks.npz` (what
each row of its data was found to hold) and, where rows are left out, `dropped.jsonl`.
"""

import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from sf_mllm.config import dump_run_config, to_plain, write_text_atomically
from sf_mllm.errors import InputError
from sf_mllm.training.environment import describe_device, describe_revision, describe_versions, peak_memory_gib

logger = logging.getLogger(__name__)

_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
_KEYS_FREE_TO_CHANGE = ("output_dir", "save.push_to_hub")
"""Between two starts the folder may be moved or named by another relative path, and an upload be asked for."""


@dataclass
class RunFolder:
    """Paths and records of one run; open it with `RunFolder.open`."""

    path: Path

    @classmethod
    def open(cls, config: Any, output_dir: str | Path) -> "RunFolder":
        """Create a run folder, or take up the one that an earlier start with the same configuration left.

        A start that ended before its first checkpoint, for example because a path was mistyped, leaves nothing to go on
        with: its configuration and its record are replaced.

        Args:
            config: the resolved run configuration, a dataclass.
            output_dir: the folder; made with its parents if missing.

        Raises:
            InputError: the folder holds a run with another configuration (the differing keys are named) or something
                that is no run, or cannot be made.
        """
        run = cls(Path(output_dir))
        try:
            run.checkpoints.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"Run folder '{run.path}' cannot be made: {error.strerror}; set output_dir to a writable folder."
            ) from error
        if run.config_file.exists() and (run.is_complete or any(run.checkpoints.iterdir())):
            differing = run._differing_keys(config)
            if differing:
                raise InputError(
                    f"Run folder '{run.path}' holds a run with another configuration: {', '.join(differing)}; "
                    "give the same values to go on with it, or another output_dir to start a new run."
                )
        elif is_main_process():
            run.record_file.unlink(missing_ok=True)
            dump_run_config(config, run.config_file)
        return run

    @property
    def checkpoints(self) -> Path:
        """Folder of the Trainer's checkpoints; its `output_dir`."""
        return self.path / "checkpoints"

    @property
    def config_file(self) -> Path:
        """The resolved configuration."""
        return self.path / "config.yaml"

    @property
    def metrics_file(self) -> Path:
        """One JSON row for each logged step."""
        return self.path / "metrics.jsonl"

    @property
    def record_file(self) -> Path:
        """What ran, on what, and how it ended."""
        return self.path / "run.json"

    @property
    def record(self) -> dict[str, Any]:
        """Content of `run.json`; empty before the first start."""
        try:
            return json.loads(self.record_file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}

    @property
    def is_complete(self) -> bool:
        """Whether an earlier start came to its end."""
        return self.record.get("outcome") == "complete"

    def update_record(self, **entries: Any) -> None:
        """Set entries of `run.json`; only the main process writes."""
        if is_main_process():
            text = json.dumps(self.record | entries, indent=2, ensure_ascii=False, default=str)
            write_text_atomically(self.record_file, text + "\n")

    def find_last_checkpoint(self) -> str | None:
        """Return the newest whole checkpoint, or None; what a kill left half-written is removed, with a log line.

        The Trainer writes `trainer_state.json` last, so a checkpoint in which that file can be read is whole.
        """
        whole: dict[int, Path] = {}
        for folder in sorted(self.checkpoints.iterdir()):
            match = _CHECKPOINT_NAME.fullmatch(folder.name)
            if match is None:
                continue
            if _read_global_step(folder) == int(match[1]):
                whole[int(match[1])] = folder
            elif is_main_process():
                logger.warning("Removed %s: an interruption left it incomplete.", folder)
                shutil.rmtree(folder)
        return str(whole[max(whole)]) if whole else None

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write `run.json` at the start and, with outcome, time and memory, at the end of the block.

        Raises:
            InputError: as raised in the block; one that crossed from a data loader's worker becomes one sentence again.
        """
        began = time.monotonic()
        last_checkpoint = self.find_last_checkpoint()
        start = {"at": _now(), "resumed_from": Path(last_checkpoint).name if last_checkpoint else None}
        self.update_record(
            command=sys.orig_argv,
            **describe_revision(),
            versions=describe_versions(),
            device=describe_device(),
            starts=[*self.record.get("starts", []), start],
            outcome="running",
        )
        outcome = "interrupted"
        try:
            yield
            outcome = "complete"
        except InputError as error:
            sentence = strip_worker_traceback(str(error))
            outcome = f"failed: {sentence}"
            raise InputError(sentence) from error
        except Exception as error:
            outcome = f"failed: {type(error).__name__}: {error}"
            raise
        finally:
            self.update_record(
                outcome=outcome,
                ended_at=_now(),
                wall_time_of_last_start_s=round(time.monotonic() - began, 1),
                peak_memory_gib=peak_memory_gib(),
            )

    def _differing_keys(self, config: Any) -> list[str]:
        """Say what changed against the stored configuration, one entry a key."""
        earlier = OmegaConf.to_container(OmegaConf.load(self.config_file))
        assert isinstance(earlier, dict)
        before, now = _flatten(earlier), _flatten(to_plain(config))
        return [
            f"{key} (was {before.get(key, 'not set')}, now {now.get(key, 'not set')})"
            for key in sorted(before.keys() | now.keys())
            if key not in _KEYS_FREE_TO_CHANGE and before.get(key) != now.get(key)
        ]


@contextmanager
def write_directory_atomically(target: str | Path) -> Iterator[Path]:
    """Give a temporary directory to write into; when the block ends well it becomes `target`, replacing an earlier one.

    Raises:
        RuntimeError: the block wrote nothing.
    """
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    for left_by_a_kill in target.parent.glob(f".{target.name}.*"):
        shutil.rmtree(left_by_a_kill)
    temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        yield temporary
        if not any(temporary.iterdir()):
            raise RuntimeError(f"nothing was written for {target}")
        # mkdtemp and safetensors make private files; a model is read by others as any file of this user is.
        temporary.chmod(0o777 & ~_umask())
        for path in temporary.rglob("*"):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def is_main_process() -> bool:
    """Whether this process writes the records; right before the process group exists, too (torchrun sets RANK)."""
    return int(os.environ.get("RANK", "0")) == 0


def strip_worker_traceback(message: str) -> str:
    """Return the original message of an exception that torch carried over from a data loader's worker."""
    return message.strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.{InputError.__name__}: ")


def _read_global_step(checkpoint: Path) -> int | None:
    try:
        return int(json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, KeyError):
        return None


def _flatten(values: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = list(value) if isinstance(value, tuple) else value
    return flat


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
