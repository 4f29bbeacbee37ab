"""Stage two: teach a language model to read a SparseFormer encoder's tokens.

python -m sf_mllm.training.instruct CONFIG.yaml [key=value ...]
"""

from collections.abc import Sequence

from sf_mllm.errors import CommandLineParser, report_input_errors
from sf_mllm.training.processes import end_process


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, train, return the exit status."""
    parser = CommandLineParser(
        prog="python -m sf_mllm.training.instruct",
        description="Join a SparseFormer encoder and a language model: train the projector, alone or with LoRA "
        "adapters, on conversations about images. The same command again resumes a run that was interrupted.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="run configuration, see configs/finetune/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides, for example output_dir=runs/mine encoder=runs/bootstrap/demo data.conversations=mine.json",
    )
    options = parser.parse_args(argv)

    # The heavy imports come after parsing, so that --help and a mistyped option answer at once.
    from sf_mllm.config import load_run_config
    from sf_mllm.training.instruct.config import InstructConfig

    config = load_run_config(InstructConfig, options.config, options.overrides)

    from sf_mllm.training.instruct.run import run_instruct
    from sf_mllm.training.progress import configure_logging

    configure_logging()
    run_instruct(config)
    return 0


if __name__ == "__main__":
    end_process(main())
