"""Training on several processes: what a DeepSpeed configuration must say, and how a process ends."""

import atexit
import os
import sys
from typing import TYPE_CHECKING, NoReturn

from sf_mllm.errors import InputError

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from sf_mllm.training.run_folder import RunFolder


def describe_strategy(arguments: "TrainingArguments") -> str:
    """Return how processes share the work: "one process", "DDP", "ZeRO-2" (or another stage) or "FSDP"."""
    plugin = getattr(arguments, "deepspeed_plugin", None)
    if plugin is not None:
        return f"ZeRO-{plugin.deepspeed_config.get('zero_optimization', {}).get('stage', 0)}"
    if arguments.fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":  # set by accelerate launch
        return "FSDP"
    return "DDP" if arguments.world_size > 1 else "one process"


def check_strategy(arguments: "TrainingArguments", *, may_split_weights: bool) -> None:
    """Refuse a strategy, or a DeepSpeed configuration, under which a model would train otherwise than in one process.

    Weights must keep their types and autocast decide about products, as without DeepSpeed; DeepSpeed's own bf16 and
    fp16 modes would round the weights themselves, among them those that predict coordinates.

    Args:
        arguments: of the run.
        may_split_weights: whether the run can do with a part of each weight in each process. An encoder in the making
            cannot: inheriting and saving need its weights whole.

    Raises:
        InputError: it is one of those; names the configuration that fits.
    """
    strategy = describe_strategy(arguments)
    if strategy in ("ZeRO-3", "FSDP") and not may_split_weights:
        raise InputError(f"{strategy} cannot train an encoder; use stage 2 of ZeRO, configs/deepspeed/zero2.json.")
    plugin = getattr(arguments, "deepspeed_plugin", None)
    if plugin is None:
        return
    settings = plugin.deepspeed_config
    shipped = f"configs/deepspeed/{'zero3' if strategy == 'ZeRO-3' else 'zero2'}.json"
    if any(settings.get(name, {}).get("enabled") for name in ("bf16", "fp16")):
        raise InputError(
            "The DeepSpeed configuration rounds the weights themselves (bf16.enabled or fp16.enabled); take "
            f"{shipped}, whose torch_autocast rounds only products."
        )
    autocast = settings.get("torch_autocast", {})
    dtype = autocast.get("dtype") if autocast.get("enabled") else None
    if dtype != ("bfloat16" if arguments.bf16 else None):
        raise InputError(
            f"train.bf16={str(arguments.bf16).lower()}, but the DeepSpeed configuration's torch_autocast computes in "
            f"{dtype or 'float32'}; make both the same."
        )


def check_processes(run: "RunFolder", arguments: "TrainingArguments") -> None:
    """Record how many processes share a run, and refuse to resume it with another number or in another way.

    Each step would see other rows, since every process brings a batch of its own; random draws and the parts of
    optimizer states belong to a process, too.

    Raises:
        InputError: the run was begun otherwise; says what to start.
    """
    now = {"processes": arguments.world_size, "strategy": describe_strategy(arguments)}
    before = {name: run.record[name] for name in now if name in run.record}
    if run.find_last_checkpoint() is not None and before and before != now:
        batch = arguments.train_batch_size * arguments.gradient_accumulation_steps
        raise InputError(
            f"Run folder '{run.path}' holds a run with {before['processes']} processes ({before['strategy']}), which "
            f"take {before['processes'] * batch} rows a step, and this start has {now['processes']} "
            f"({now['strategy']}), which take {now['processes'] * batch}; start {before['processes']} processes as "
            "before, or give another output_dir to start a new run."
        )
    run.update_record(**now)


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
