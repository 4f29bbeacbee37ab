"""`python -m sf_mllm.bench`: measure speed and memory on this machine."""

import sys
from collections.abc import Sequence

from sf_mllm.bench.arguments import parse_arguments
from sf_mllm.errors import report_input_errors


@report_input_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: without the program's name; None takes those of the process.

    Returns:
        Exit status: 0, 1 if a model computed a wrong result or failed, 2 after bad input, 130 after Ctrl-C.
    """
    options = parse_arguments(sys.argv[1:] if arguments is None else arguments)
    try:
        if options.command == "plot":
            from sf_mllm.bench.plot import plot_rows

            print(f"The plot is {plot_rows(options.file, options.out, options.accuracy)}")
            return 0
        from sf_mllm.bench.run import run  # after parsing: torch takes seconds to import

        return run(options)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
