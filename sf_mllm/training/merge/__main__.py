"""Fold trained adapters into their language model and write one directory that loads anywhere.

python -m sf_mllm.training.merge ADAPTER_OR_RUN OUT [options]
"""

import argparse
import sys
from collections.abc import Sequence

from sf_mllm.errors import CommandLineParser, report_input_errors

_DESCRIPTION = """\
Join encoder, language model and a trained adapter to one model directory, which
AutoModelForImageTextToText and AutoProcessor load: with this package, or without it by trust_remote_code=True.
A finished run already has such a directory, its subfolder "model"; this is for a checkpoint in the middle of a run,
for another type of numbers, and for an adapter that came without its run folder.
"""


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, merge, return the exit status."""
    parser = CommandLineParser(
        prog="python -m sf_mllm.training.merge",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "source", metavar="ADAPTER_OR_RUN", help="run folder of stage two, one of its checkpoints, or an adapter"
    )
    parser.add_argument("output", metavar="OUT", help="directory to write; must not exist yet")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: save.dtype of the run, else bfloat16)")
    parser.add_argument("--max-shard-size", metavar="SIZE", help="largest weight file (default: as in the run, or 5GB)")
    parser.add_argument("--encoder", metavar="DIR", help="encoder of the adapter (default: the run's)")
    parser.add_argument("--decoder", metavar="DIR_OR_HUB_ID", help="language model, likewise")
    parser.add_argument("--chat-template", metavar="NAME_OR_FILE", help="where it is not the language model's own")
    parser.add_argument(
        "--no-remote-code",
        dest="remote_code",
        action="store_const",
        const=False,
        help="leave the model's own code out of the directory",
    )
    parser.add_argument("--push-to-hub", metavar="OWNER/NAME", help="upload the directory, too; a new one is private")
    options = parser.parse_args(argv)

    # The heavy imports come after parsing, so that --help and a mistyped option answer at once.
    from sf_mllm.training.merge.run import MergeRequest, run_merge
    from sf_mllm.training.progress import configure_logging

    configure_logging()
    run_merge(MergeRequest(**vars(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
