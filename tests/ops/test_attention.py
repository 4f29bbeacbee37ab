import pytest
import torch

from sf_mllm.ops.attention import attend


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
def test_gradients_are_finite_for_64_tokens_of_strongly_negative_scores(compiled: bool) -> None:
    """cuDNN's are not, which PyTorch would choose."""
    torch.manual_seed(0)
    packed = torch.randn(2, 64, 3 * 128)
    packed[..., :256] *= 0.1
    packed[..., 0:128:64] = 1.0  # of the queries
    packed[..., 128:256:64] = -120 * 8.0  # of the keys: each score is about -120
    packed = packed.to("cuda", torch.bfloat16).requires_grad_()
    (torch.compile(attend) if compiled else attend)(packed, 2).float().square().sum().backward()
    assert packed.grad.isfinite().all()
