"""Make a teacher store: ask the teacher once about fixed crops of every image, for any number of runs.

python -m sf_mllm.training.reinforce CONFIG.yaml store.path=DIRECTORY [key=value ...]
"""

import sys
from collections.abc import Sequence

from sf_mllm.errors import CommandLineParser, report_input_errors


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, make the store, return the exit status."""
    parser = CommandLineParser(
        prog="python -m sf_mllm.training.reinforce",
        description="Store what the teacher of a bootstrap run says about its images. The run reads it with the same "
        "configuration and store.path. The same command again goes on after an interruption.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="configuration of the run, see configs/bootstrap/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides, for example store.path=/path/to/store store.crops=8 data.images=/path/to/images",
    )
    options = parser.parse_args(argv)

    # The heavy imports come after parsing, so that --help and a mistyped option answer at once.
    from sf_mllm.config import load_run_config
    from sf_mllm.training.bootstrap.config import BootstrapConfig, refuse_expanded_braces

    refuse_expanded_braces(options.overrides)
    config = load_run_config(BootstrapConfig, options.config, options.overrides)

    from sf_mllm.training.progress import configure_logging
    from sf_mllm.training.reinforce.run import make_store

    configure_logging()
    make_store(config)
    return 0


if __name__ == "__main__":
    sys.exit(main())
