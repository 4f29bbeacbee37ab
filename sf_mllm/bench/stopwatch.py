"""Times another process: `python -m sf_mllm.bench.stopwatch COMMAND ...`, which prints what it took as JSON.

A process of its own, because Linux counts the memory of the process that starts a command as the command's.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

_RUSAGE_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss: bytes on macOS, KiB on Linux


@dataclass(frozen=True)
class ProcessTimes:
    """What a process took.

    Attributes:
        first_output_ms: from its start to the first character on stdout that is no blank.
        end_ms: from its start to its end.
        peak_bytes: most memory that it held at a time.
        status: exit status.
        errors: what it wrote to stderr.
    """

    first_output_ms: float
    end_ms: float
    peak_bytes: int
    status: int
    errors: str


def time_process(command: Sequence[str]) -> ProcessTimes:
    """Start a command and read what it says."""
    with tempfile.TemporaryFile() as errors:
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors)
        assert process.stdout is not None
        output = process.stdout.fileno()
        while (read := os.read(output, 1)).isspace():
            pass
        first_output = time.perf_counter()
        while read:
            read = os.read(output, 4096)
        _, status, usage = os.wait4(process.pid, 0)
        ended = time.perf_counter()
        process.returncode = os.waitstatus_to_exitcode(status)  # wait4 has collected it
        process.stdout.close()
        errors.seek(0)
        return ProcessTimes(
            first_output_ms=1e3 * (first_output - began),
            end_ms=1e3 * (ended - began),
            peak_bytes=usage.ru_maxrss * _RUSAGE_UNIT,
            status=process.returncode,
            errors=errors.read().decode(errors="replace"),
        )


if __name__ == "__main__":
    print(json.dumps(asdict(time_process(sys.argv[1:]))))
