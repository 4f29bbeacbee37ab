"""Where conversations come from: numbered rows that are parsed when they are asked for."""

from collections.abc import Sequence
from typing import Protocol, overload

import numpy as np

from sf_mllm.data.image_sources import digest
from sf_mllm.data.messages import Conversation


class ConversationSource(Protocol):
    """Numbered rows. They stay packed (bytes of a file, or Arrow): a copy in a worker process costs no memory."""

    label: str
    """What messages call the source."""
    licence: str | None
    """What the data set itself says about its licence."""
    fingerprint: str
    """Changes with any text, image name or size of a file of images; does not depend on where the files lie."""

    def __len__(self) -> int:
        """Number of rows, usable or not."""

    def read(self, index: int) -> Conversation:
        """Parse a row.

        Raises:
            InputError: it is malformed; the message says how, not where.
        """

    def place(self, index: int) -> str:
        """Where a row stands, for messages."""


class JoinedConversations:
    """Several sources, one after the other.

    Args:
        sources: at least one.
        label: what messages call them together.
    """

    licence: str | None = None

    def __init__(self, sources: Sequence[ConversationSource], label: str) -> None:
        self.sources = sources
        self.label = label
        self.fingerprint = digest("joined", *(source.fingerprint for source in sources))
        self.ends = np.cumsum([len(source) for source in sources])
        """Number of the first row behind each source."""

    def __len__(self) -> int:
        return int(self.ends[-1])

    def read(self, index: int) -> Conversation:
        """Parse a row."""
        number, row = self.locate(index)
        return self.sources[number].read(row)

    def place(self, index: int) -> str:
        """Where a row stands."""
        number, row = self.locate(index)
        return self.sources[number].place(row)

    def locate(self, index: int) -> tuple[int, int]:
        """Return the number of the source that holds a row, and the row's number in it."""
        number = int(np.searchsorted(self.ends, index, side="right"))
        return number, int(index - (self.ends[number - 1] if number else 0))


class ChosenConversations(Sequence[Conversation]):
    """Some rows of the sources, in an order of their own; each is parsed when it is asked for.

    Args:
        source: of the rows.
        rows: their numbers, [rows]; one may come several times.
    """

    def __init__(self, source: JoinedConversations, rows: np.ndarray) -> None:
        self.source = source
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Conversation]: ...

    def __getitem__(self, index: int | slice) -> Conversation | Sequence[Conversation]:
        if isinstance(index, slice):
            return ChosenConversations(self.source, self.rows[index])
        return self.source.read(int(self.rows[index]))
