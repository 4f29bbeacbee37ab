"""One line every few seconds while a teacher store is made."""

import logging
import time

from sf_mllm.training.progress import format_clock

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_LINES = 10.0


class ReinforceProgress:
    """Counts what one process has done and estimates what is left.

    Args:
        num_groups: groups that this process makes.
        num_all_groups: of the store.
        num_all_images: of those; None if nobody has counted them.
        num_crops: of each image.
    """

    def __init__(self, num_groups: int, num_all_groups: int, num_all_images: int | None, num_crops: int) -> None:
        self.num_groups = num_groups
        self.num_crops = num_crops
        self.num_expected = None if num_all_images is None else num_all_images * num_groups / max(1, num_all_groups)
        self.num_images = self.num_files = self.num_bytes = 0
        self._began = self._last_line = time.monotonic()

    def add(self, num_images: int) -> None:
        """Count images that the teacher is shown, and log a line when it is time."""
        self.num_images += num_images
        if time.monotonic() - self._last_line > _SECONDS_BETWEEN_LINES:
            self.report()

    def add_file(self, num_bytes: int) -> None:
        """Count a group that is written."""
        self.num_files += 1
        self.num_bytes += num_bytes

    def report(self) -> None:
        """Log where the process is."""
        self._last_line = time.monotonic()
        elapsed = self._last_line - self._began
        expected = self.num_expected
        if expected is None and self.num_files:  # what is under way counts as done: a little too early
            expected = self.num_images / self.num_files * self.num_groups
        left = max(0.0, elapsed * (expected / self.num_images - 1)) if expected and self.num_images else None
        logger.info(
            "group %d/%d  %d images  %.4g images/s  %.4g crops/s  %.3g GB  left %s",
            self.num_files,
            self.num_groups,
            self.num_images,
            self.num_images / max(elapsed, 1e-3),
            self.num_images * self.num_crops / max(elapsed, 1e-3),
            self.num_bytes / 1e9,
            "?" if left is None else format_clock(left),
        )
