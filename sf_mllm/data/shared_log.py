"""What the readers of images find out, kept in files that workers, processes and resumed starts of a run share."""

import json
import logging
from pathlib import Path
from typing import Any

from sf_mllm.errors import InputError

logger = logging.getLogger(__name__)


class SharedLog:
    """A file of JSON rows to which any process may append; none is ever changed.

    Args:
        path: of the file, made with the first row.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = 0

    def append(self, row: dict[str, Any]) -> None:
        """Add a row, in one write, so that rows of several processes do not mix."""
        with self.path.open("ab", buffering=0) as file:
            file.write(json.dumps(row).encode() + b"\n")

    def read_new(self) -> list[dict[str, Any]]:
        """Return the rows that this object has not returned yet; a line torn by a kill is left out."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        rows = []
        for line in lines:
            if line.endswith(b"\n"):
                self._offset += len(line)
                try:
                    rows.append(json.loads(line))
                except ValueError:
                    logger.debug("A torn line in %s was left out.", self.path)
        return rows


class UnreadableImages:
    """The images of a run that could not be decoded, each counted and logged once.

    Args:
        log: names and reasons.
        max_share: an `InputError` is raised once more than this share of the images has failed.
    """

    def __init__(self, log: SharedLog, max_share: float) -> None:
        self.max_share = max_share
        self._log = log
        self._names: set[str] = set()

    def __len__(self) -> int:
        """Images that have failed so far."""
        return len(self._find_names())

    def note(self, name: str, error: InputError, num_images: int, allowed: int | None = None) -> None:
        """Count an image that could not be decoded.

        Args:
            name: of the image.
            error: why.
            num_images: how many images there are, or have been read.
            allowed: failures that are accepted; by default the share of `num_images`.

        Raises:
            InputError: too many images have failed.
        """
        if name not in self._names and name not in self._find_names():
            self._log.append({"image": name, "error": str(error)})
            logger.warning("Replaced an image that cannot be read: %s", error)
        allowed = int(self.max_share * num_images) if allowed is None else allowed
        if len(self) > allowed:
            raise InputError(
                f"{len(self)} of {num_images} images cannot be read, {allowed} are allowed; remove them or raise "
                f"data.max_unreadable_share (the last one: {error})"
            )

    def _find_names(self) -> set[str]:
        self._names.update(row["image"] for row in self._log.read_new())
        return self._names
