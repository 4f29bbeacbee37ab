import pytest
import torch

from sf_mllm.bench.choices import PRECISIONS
from sf_mllm.bench.correctness import WrongResultError, check_output, check_reference
from sf_mllm.bench.precision import TOLERANCES


@pytest.fixture
def reference():
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def test_equal_and_nearly_equal_outputs_pass(reference):
    assert check_output(reference.clone(), reference, "float32") == 0
    assert 0 < check_output(reference.bfloat16(), reference, "bfloat16") < 0.01
    assert check_output(torch.cat([reference, reference]), reference, "float32") == 0  # of a larger batch
    assert check_output(reference[:1], reference, "float32") == 0


WRONG = {
    "other order": lambda tokens, tolerance: tokens.flip(1),
    "other image": lambda tokens, tolerance: tokens.flip(0),
    "zeros": lambda tokens, tolerance: torch.zeros_like(tokens),
    "a little too far": lambda tokens, tolerance: tokens * (1 + 1.01 * tolerance),
    "not a number": lambda tokens, tolerance: tokens * float("nan"),
}


@pytest.mark.parametrize("precision", TOLERANCES)
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_wrong_outputs_do_not(reference, precision, change):
    with pytest.raises(WrongResultError, match="wrong: relative error"):
        check_output(change(reference, TOLERANCES[precision]), reference, precision)


def test_every_precision_has_a_tolerance():
    assert TOLERANCES.keys() == PRECISIONS.keys()


def test_another_number_of_tokens_is_wrong(reference):
    with pytest.raises(WrongResultError, match=r"shape \[2, 4, 8\], in eager float32 \[2, 5, 8\]"):
        check_output(reference[:, 1:], reference, "float32")


def test_a_reference_must_be_one(reference):
    check_reference(reference)
    with pytest.raises(WrongResultError, match="different inputs give the same output"):
        check_reference(reference[:1].repeat(2, 1, 1))
    with pytest.raises(WrongResultError, match="not finite"):
        check_reference(reference.masked_fill(reference > 1, float("inf")))
