"""Work that several processes must not do at the same time."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import PartialState


@contextmanager
def main_process_first() -> Iterator[None]:
    """Let the main process run a block before the others do; they run theirs even if the main one's failed.

    Unlike accelerate's context of that name this one does not leave the others waiting for a process that is gone.
    """
    state = PartialState()
    if not state.is_main_process:
        state.wait_for_everyone()
    try:
        yield
    finally:
        if state.is_main_process:
            state.wait_for_everyone()
