"""Look at the conversations of an instruct run before any GPU is used.

python -m sf_mllm.training.check_data CONFIG.yaml [key=value ...] [--json FILE]
"""

import sys
from collections.abc import Sequence

from sf_mllm.errors import CommandLineParser, InputError, report_input_errors


@report_input_errors
def main(argv: Sequence[str] | None = None) -> int:
    """Read the command line, check, print a report; return 0 if training would accept the data and 1 if not."""
    parser = CommandLineParser(
        prog="python -m sf_mllm.training.check_data",
        description="Read, tokenise and decode all conversations and images that an instruct run would use, and report "
        "per source what is in them and what is wrong with them. Needs the tokenizer of the decoder and the "
        "configuration of the encoder, no weights. The exit status is 0 if training would accept the data, else 1.",
    )
    parser.add_argument("config", metavar="CONFIG.yaml", help="run configuration, see configs/finetune/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, as for the training")
    parser.add_argument("--json", metavar="FILE", help="also write the report there, with every unusable row")
    options = parser.parse_intermixed_args(argv)

    # The heavy imports come after parsing, so that --help and a mistyped option answer at once.
    from sf_mllm.config import load_run_config
    from sf_mllm.training.instruct.config import InstructConfig

    config = load_run_config(InstructConfig, options.config, options.overrides)

    from sf_mllm.training.check_data.report import format_report, make_report, write_report
    from sf_mllm.training.instruct.part_files import count_tokens_of_image, load_tokenizer
    from sf_mllm.training.progress import configure_logging

    configure_logging()
    tokens_per_image = count_tokens_of_image(config.encoder)
    tokenizer = load_tokenizer(config.decoder, config.chat_template)
    try:
        report = make_report(config, tokenizer, tokens_per_image)
    except InputError as error:  # of the data, which training would refuse with the same sentence
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.json:
        write_report(report, options.json)
    print(format_report(report))
    return 0 if report["accepted"] else 1


if __name__ == "__main__":
    sys.exit(main())
