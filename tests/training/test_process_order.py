import pytest

from sf_mllm.training import process_order


@pytest.fixture
def events(monkeypatch):
    """What one process of several does, in order; `is_main` is set by the test."""
    happened = []

    class State:
        is_main_process = True

        def wait_for_everyone(self):
            happened.append("wait")

    monkeypatch.setattr(process_order, "PartialState", State)
    return happened, State


@pytest.mark.parametrize(("is_main", "order"), [(True, ["work", "wait"]), (False, ["wait", "work"])])
def test_the_main_process_works_while_the_others_wait(events, is_main, order):
    happened, state = events
    state.is_main_process = is_main
    with process_order.main_process_first():
        happened.append("work")
    assert happened == order


def test_a_failure_of_the_main_process_leaves_nobody_waiting(events):
    happened, _ = events
    with pytest.raises(ZeroDivisionError), process_order.main_process_first():
        _ = 1 / 0
    assert happened == ["wait"]
