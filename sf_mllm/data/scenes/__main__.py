"""Export procedural scenes: `python -m sf_mllm.data.scenes OUT --count N`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from sf_mllm.data.scenes.domains import DOMAINS
from sf_mllm.data.scenes.export import IMAGE_SUFFIXES, export_scenes
from sf_mllm.errors import CommandLineParser, report_input_errors


@report_input_errors
def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = CommandLineParser(
        prog="python -m sf_mllm.data.scenes", description="Export procedural scenes: images and LLaVA conversations."
    )
    parser.add_argument("directory", type=Path, help="directory to create")
    parser.add_argument("--count", type=int, required=True, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="give held-out data another seed (default: 0)")
    parser.add_argument("--image-size", type=int, default=224, help="side in pixels (default: 224)")
    parser.add_argument("--min-objects", type=int, default=1, help="fewest objects in a scene (default: 1)")
    parser.add_argument("--max-objects", type=int, default=8, help="most objects in a scene, up to 8 (default: 8)")
    parser.add_argument("--domain", choices=sorted(DOMAINS), default="plain", help="of the scenes (default: plain)")
    parser.add_argument("--turns", type=int, default=6, help="questions an image (default: 6)")
    parser.add_argument("--image-format", choices=sorted(IMAGE_SUFFIXES), default="jpeg", help="default: jpeg")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    directory = export_scenes(**vars(parser.parse_args(arguments)))
    print(f"Scenes are in {directory}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
