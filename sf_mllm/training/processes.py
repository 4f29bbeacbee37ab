"""Training on several processes: what a DeepSpeed configuration must say, who goes first, how a process ends."""

import atexit
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

from sf_mllm.errors import InputError

if TYPE_CHECKING:
    from transformers import TrainingArguments


def check_deepspeed(arguments: "TrainingArguments") -> None:
    """Refuse a DeepSpeed configuration under which a student would train otherwise than in one process.

    Its weights must stay fp32 and autocast decide about products, as without DeepSpeed; DeepSpeed's own bf16 and fp16
    modes would round the weights themselves, among them those that predict coordinates. Stage 3 would split weights
    that inheriting and saving need whole.

    Raises:
        InputError: the configuration says something else; names the one that fits.
    """
    plugin = getattr(arguments, "deepspeed_plugin", None)
    if plugin is None:
        return
    settings = plugin.deepspeed_config
    stage = settings.get("zero_optimization", {}).get("stage", 0)
    if stage > 2:
        raise InputError(
            f"DeepSpeed ZeRO stage {stage} cannot train an encoder; use stage 2, configs/deepspeed/zero2.json."
        )
    if any(settings.get(name, {}).get("enabled") for name in ("bf16", "fp16")):
        raise InputError(
            "The DeepSpeed configuration rounds the weights themselves (bf16.enabled or fp16.enabled); take "
            "configs/deepspeed/zero2.json, whose torch_autocast rounds only products."
        )
    autocast = settings.get("torch_autocast", {})
    dtype = autocast.get("dtype") if autocast.get("enabled") else None
    if dtype != ("bfloat16" if arguments.bf16 else None):
        raise InputError(
            f"train.bf16={str(arguments.bf16).lower()}, but the DeepSpeed configuration's torch_autocast computes in "
            f"{dtype or 'float32'}; make both the same."
        )


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process run a block before the others do; they run theirs even if the main one's failed.

    Unlike accelerate's context of that name this one does not leave the others waiting for a process that is gone.
    """
    from accelerate import PartialState

    state = PartialState()
    if not state.is_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_main_process:
            state.wait_for_everyone()


def end_process(status: int) -> NoReturn:
    """End a training process with an exit status, after all of its work.

    Where gloo connected the processes, which is on CPUs, Python's own teardown is left out: DDP keeps gloo's threads
    alive after their group was destroyed (torch 2.15), and one that lets go of a tensor while the interpreter shuts
    down aborts the process (as in pytorch/pytorch#179291), upon which the launcher calls a complete run failed.
    """
    if not _is_connected_by_gloo():
        sys.exit(status)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _is_connected_by_gloo() -> bool:
    accelerate = sys.modules.get("accelerate")  # not there yet if the command ended before it came to training
    return accelerate is not None and getattr(accelerate.PartialState, "_shared_state", {}).get("backend") == "gloo"
