"""Paths of the demo model that ships with the package."""

from pathlib import Path

from sf_mllm.errors import InputError, nearest

DEMO_PREFIX = "demo:"
DEMO_ROOT = Path(__file__).parent / "demo_model"
DEMO_PARTS = ("clip", "decoder", "sf_llava")


def resolve_demo(path: str) -> str:
    """Turn "demo:clip", "demo:decoder" or "demo:sf_llava" into a directory path; return any other path unchanged.

    Raises:
        InputError: no part of that name ships with the package.
    """
    if not path.startswith(DEMO_PREFIX):
        return path
    part = path[len(DEMO_PREFIX) :]
    if part not in DEMO_PARTS:
        raise InputError(
            f"'{path}' names no part of the demo model.{nearest(part, DEMO_PARTS)} "
            f"Parts: {', '.join(DEMO_PREFIX + name for name in DEMO_PARTS)}."
        )
    return str(DEMO_ROOT / part)
