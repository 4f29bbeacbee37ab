import numpy as np
import pytest

from sf_mllm.data.mixtures import draw_rows


def draw(sizes, weights, *, digests=None, held_out=4, seed=0):
    source_of = np.repeat(np.arange(len(sizes)), sizes)
    digests = np.arange(len(source_of), dtype=np.uint64) if digests is None else digests
    training, kept_out = draw_rows(source_of, weights, digests, held_out=held_out, seed=seed)
    return source_of, training, kept_out


@pytest.mark.parametrize("seed", range(3))
def test_each_row_comes_as_often_as_its_weight_says(seed):
    weights = [1.0, 0.5, 2.0, 1.25, 0.01]
    source_of, training, kept_out = draw([40, 101, 30, 40, 100], weights, held_out=20, seed=seed)
    assert len(set(kept_out)) == 20 and not set(kept_out) & set(training)
    for number, weight in enumerate(weights):
        left = sorted(set(np.flatnonzero(source_of == number)) - set(kept_out))
        times = np.array([(training == row).sum() for row in left])
        assert set(times) <= {int(weight), int(weight) + 1}
        assert times.sum() == int(weight) * len(left) + int(weight % 1 * len(left) + 0.5)


def test_the_seed_alone_decides():
    first, second, other = (draw([50, 50], [0.5, 1.5], seed=seed)[1:] for seed in (1, 1, 2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    assert not np.array_equal(first[0], other[0]) and not np.array_equal(first[1], other[1])


def test_rows_are_held_out_as_often_as_they_are_trained_on():
    share = np.mean([(draw([300, 100], [1.0, 9.0], held_out=20, seed=seed)[2] >= 300).mean() for seed in range(100)])
    assert abs(share - 0.75) < 0.03  # 900 of 1200 rows an epoch are of the second source; 0.01 is one standard error


def test_rows_that_say_the_same_as_a_held_out_one_are_not_trained_on():
    digests = np.concatenate([np.arange(30), np.arange(30)]).astype(np.uint64)  # the second source repeats the first
    _, training, kept_out = draw([30, 30], [1.0, 1.0], digests=digests, held_out=5)
    assert not set(digests[kept_out]) & set(digests[training])
    assert len(training) == 60 - 2 * len(set(digests[kept_out]))
