"""`python -m sf_mllm.cli`: one answer or a conversation."""

import os
import sys

from sf_mllm.cli.arguments import parse_arguments
from sf_mllm.errors import report_input_errors


@report_input_errors
def main(arguments: list[str] | None = None) -> int:
    """Run the chat.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, 2 after bad input, 130 after Ctrl-C.
    """
    options = parse_arguments(arguments)
    try:
        from sf_mllm.cli.chat import run  # after parsing: torch takes seconds to import

        return run(options)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away; nothing is left to say, not even at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


if __name__ == "__main__":
    sys.exit(main())
