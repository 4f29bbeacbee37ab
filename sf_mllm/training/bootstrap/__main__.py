"""Stage one: make a SparseFormer encoder from a CLIP ViT.

python -m sf_mllm.training.bootstrap CONFIG.yaml [key=value ...] [--report]
"""

from collections.abc import Sequence
from pathlib import Path

from sf_mllm.errors import CommandLineParser, report_input_errors
from sf_mllm.training.processes import end_process


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, train, return the exit status."""
    parser = CommandLineParser(
        prog="python -m sf_mllm.training.bootstrap",
        description="Compress a CLIP ViT into a SparseFormer encoder, from unlabelled images. The same command again "
        "resumes a run that was interrupted.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="run configuration, see configs/bootstrap/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="overrides, for example output_dir=runs/mine data.images=/path/to/images train.max_steps=1000",
    )
    parser.add_argument(
        "--report", action="store_true", help="draw what the run measured into report.html in its folder"
    )
    options = parser.parse_intermixed_args(argv)

    # The heavy imports come after parsing, so that --help and a mistyped option answer at once.
    from sf_mllm.config import load_run_config
    from sf_mllm.training.bootstrap.config import BootstrapConfig, refuse_expanded_braces

    refuse_expanded_braces(options.overrides)
    config = load_run_config(BootstrapConfig, options.config, options.overrides)

    from sf_mllm.training.report.write import require_matplotlib, write_report

    if options.report:
        require_matplotlib()  # before hours are spent on the run

    from sf_mllm.training.bootstrap.run import run_bootstrap
    from sf_mllm.training.progress import configure_logging
    from sf_mllm.training.run_folder import is_main_process

    configure_logging()
    run_bootstrap(config)
    if options.report and is_main_process():
        write_report([config.output_dir], Path(config.output_dir) / "report.html")
    return 0


if __name__ == "__main__":
    end_process(main())
