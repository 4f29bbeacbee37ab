import gc
import time

import pytest
import torch

from sf_mllm.bench import timing
from sf_mllm.bench.timing import MINIMUM_ROUNDS, Spread, is_out_of_memory, time_call, time_in_turns

CPU = torch.device("cpu")


def test_median_and_quartiles():
    spread = Spread((5.0, 1.0, 3.0, 2.0, 4.0))
    assert spread.median == 3 and spread.quartiles == (2, 4)
    assert Spread((7.0,)).median == 7 and Spread((7.0,)).quartiles == (7, 7)
    assert Spread((1.0, 2.0)).median == 1.5


def test_ratios_are_taken_round_by_round():
    slowing_down = Spread((1.0, 10.0, 100.0))
    twice = Spread((2.0, 20.0, 200.0))
    assert twice.over(slowing_down).samples == (2, 2, 2)
    assert twice.minus(slowing_down).per(10).samples == (0.1, 1, 10)
    with pytest.raises(ValueError, match="shorter"):
        twice.over(Spread((1.0,)))


def test_works_are_called_in_turns_each_round_in_the_other_direction():
    calls = []
    works = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    times = time_in_turns(works, CPU, repeats=3, warmup=1)
    assert "".join(calls) == "abc" + "abc" + "cba" + "abc"
    assert {name: len(spread.samples) for name, spread in times.items()} == {"a": 3, "b": 3, "c": 3}


def test_times_are_milliseconds_of_one_call():
    times = time_in_turns({"slow": lambda: time.sleep(0.02), "fast": lambda: None}, CPU, repeats=3)
    assert min(times["slow"].samples) >= 20
    assert times["fast"].median < 5


def test_a_limit_of_time_ends_after_enough_rounds(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])

    def work():
        now[0] += 4

    assert len(time_in_turns({"a": work}, CPU, repeats=100, seconds=1)["a"].samples) == MINIMUM_ROUNDS
    assert len(time_in_turns({"a": work, "b": work}, CPU, repeats=100, seconds=30)["a"].samples) == 8
    assert len(time_in_turns({"a": work}, CPU, repeats=3, seconds=1)["a"].samples) == 3
    assert time_call(work, CPU) == 4000


def test_the_garbage_collector_waits_until_the_end():
    seen = []
    time_in_turns({"a": lambda: seen.append(gc.isenabled())}, CPU, repeats=2)
    assert seen == [False, False] and gc.isenabled()
    with pytest.raises(ZeroDivisionError):
        time_in_turns({"a": lambda: 1 // 0}, CPU, repeats=1)
    assert gc.isenabled()


def test_what_is_out_of_memory():
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**55)
    assert is_out_of_memory(caught.value)
