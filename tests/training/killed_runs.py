"""Runs of stage one that end by SIGKILL, each in a process of its own."""

import multiprocessing
import os
import signal
from typing import Any

import torch


def _run_until_step_5(arguments: list[str]) -> None:
    from sf_mllm.training.bootstrap.__main__ import main
    from sf_mllm.training.progress import ProgressReporter

    def kill(self: ProgressReporter, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)

    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    torch.set_num_threads(1)
    multiprocessing.set_start_method("fork", force=True)  # of data workers, which a server would keep alive
    ProgressReporter.on_step_end = kill
    main(arguments)


def run_until_killed_at_step_5(*arguments: str) -> int | None:
    """Start the command and return how its process ended: -SIGKILL, if it came to step 5.

    The processes are forks of a server that has imported what they need, once, and that has computed nothing.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["sf_mllm.training.bootstrap.run"])
    process = context.Process(target=_run_until_step_5, args=(list(arguments),))
    process.start()
    process.join()
    return process.exitcode
