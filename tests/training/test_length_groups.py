import torch

from sf_mllm.training.instruct.length_groups import LengthGroupedSampler

LENGTHS = torch.randint(30, 500, (1003,), generator=torch.Generator().manual_seed(0)).tolist()


def padding(rows, batch_size):
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    padded = sum(len(batch) * max(LENGTHS[row] for row in batch) for batch in batches)
    return 1 - sum(LENGTHS) / padded


def test_all_rows_come_once_in_batches_of_similar_length():
    rows = list(LengthGroupedSampler(LENGTHS, batch_size=8, seed=0, epoch=lambda: 0))
    assert sorted(rows) == list(range(1003))
    assert padding(rows, 8) < 0.03 < 0.3 < padding(torch.randperm(1003).tolist(), 8)
    assert max(LENGTHS[row] for row in rows[:8]) == max(LENGTHS[row] for row in rows[:1000])


def test_batches_of_one_stretch_are_in_random_order():
    rows = list(LengthGroupedSampler(LENGTHS, batch_size=8, seed=0, epoch=lambda: 0))
    means = torch.tensor([LENGTHS[row] for row in rows[:1000]]).view(-1, 8).float().mean(dim=1)
    neighbours = torch.corrcoef(torch.stack([means[:-1], means[1:]]))[0, 1]
    assert abs(neighbours) < 0.3  # in falling order it is above 0.9


def test_the_order_depends_on_seed_and_epoch_and_on_nothing_else():
    epoch = 0
    sampler = LengthGroupedSampler(LENGTHS, batch_size=8, seed=3, epoch=lambda: epoch)
    first = list(sampler)
    torch.rand(5)
    assert list(sampler) == first
    epoch = 1
    second = list(sampler)
    assert second != first and sorted(second) == sorted(first)
    assert list(LengthGroupedSampler(LENGTHS, batch_size=8, seed=4, epoch=lambda: 0)) == second


def test_fewer_rows_than_a_batch():
    assert sorted(LengthGroupedSampler([4, 2, 3], batch_size=8, seed=0, epoch=lambda: 0)) == [0, 1, 2]
