"""Draw what runs measured: `python -m sf_mllm.training.report RUN_DIR [RUN_DIR ...] --out report.html`."""

import sys
from collections.abc import Sequence

from sf_mllm.errors import CommandLineParser, report_input_errors
from sf_mllm.training.report.write import write_report


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, write the page, return the exit status."""
    parser = CommandLineParser(
        prog="python -m sf_mllm.training.report",
        description="Draw what bootstrap runs measured, as one HTML page; several runs are compared.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN_DIR", help="run folder, for example runs/bootstrap/demo")
    parser.add_argument("--out", default="report.html", help="file to write (default: report.html)")
    options = parser.parse_args(argv)
    write_report(options.runs, options.out)
    print(f"The report is {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
