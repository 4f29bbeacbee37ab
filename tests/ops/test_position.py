"""The sinusoidal code of a RoI against its formula, element by element."""

import math

import torch

from sf_mllm.ops.position import encode_rois


def test_formula() -> None:
    width = 24
    count = width // 4
    roi = torch.tensor([0.1, 0.25, 0.7, 1.2], dtype=torch.float64)
    code = encode_rois(roi.float(), width).double()
    expected = []
    for coordinate in roi.tolist():
        angles = [math.pi * coordinate * 128 ** (k / (count - 1)) for k in range(count)]
        expected += [math.sin(a) for a in angles[0::2]] + [math.cos(a) for a in angles[1::2]]
    # fp32 coordinates times frequencies up to 402 leave 1e-5 to 1e-4.
    torch.testing.assert_close(code, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-4)


def test_it_carries_no_gradient_and_stays_fp32() -> None:
    rois = torch.rand(2, 3, 4, requires_grad=True)
    code = encode_rois(rois, 16)
    assert code.shape == (2, 3, 16) and not code.requires_grad
    assert encode_rois(rois.bfloat16(), 16).dtype == torch.float32
