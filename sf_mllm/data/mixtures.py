"""Which rows of several sources are trained on, how often, and which are held out."""

from collections.abc import Sequence

import numpy as np


def draw_rows(
    source_of: np.ndarray, weights: Sequence[float], digests: np.ndarray, *, held_out: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into those to train on and those to measure on.

    Held-out rows are drawn as training would see them: a row of weight 2 twice as likely as one of weight 1. Training
    sees neither them nor any row that says the same about the same images, in whichever source. Of the rows left to a
    source, each comes as often as the whole part of the weight says, and the fraction's share of them, drawn by the
    seed, once more; it is the same share in every epoch.

    Args:
        source_of: number of the source of each row, [rows].
        weights: of the sources.
        digests: equal for rows that say the same, [rows].
        held_out: number of rows to measure on.
        seed: of all draws.

    Returns:
        Positions in `source_of`: the training rows of an epoch, sorted, a row as often as it comes; the held-out rows,
        in the order in which they were drawn, so that the first ones are of several sources.
    """
    rng = np.random.default_rng(seed)
    # The smallest of waiting times at these rates are a weighted draw without replacement (Efraimidis, Spirakis 2006).
    waiting = rng.exponential(size=len(source_of)) / np.asarray(weights, dtype=np.float64)[source_of]
    kept_out = np.argsort(waiting)[:held_out]
    is_left = ~np.isin(digests, digests[kept_out])
    training = []
    for number, weight in enumerate(weights):
        rows = np.flatnonzero(is_left & (source_of == number))
        whole, fraction = divmod(weight, 1.0)
        extra = rng.permutation(rows)[: int(np.floor(fraction * len(rows) + 0.5))]
        training += [np.repeat(rows, int(whole)), extra]
    return np.sort(np.concatenate(training)), kept_out
