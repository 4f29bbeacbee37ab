"""Our encoder against stored tensors of the official code."""

import pytest
import torch

from sf_mllm import load_official_checkpoint
from tests.encoder.official_fixtures import NAMES, read_fixture

# fp32 noise of the official code against its own fp64 run reaches 2e-5 on tokens; a real mistake costs 1e-3 and more.
TOLERANCE = 1e-4


@pytest.mark.parametrize(("name", "case"), [*((name, "") for name in NAMES), ("btsp_augreg_a", ".b")])
def test_every_stored_tensor_is_reproduced(name: str, case: str) -> None:
    state, tensors, official_config = read_fixture(name)
    model = load_official_checkpoint(state, official_config=official_config)
    narrow_tokens = []
    model.focusing.narrow.register_forward_hook(lambda module, args, output: narrow_tokens.append(output[0]))
    stem_features = []
    model.stem.register_forward_hook(lambda module, args, output: stem_features.append(output))
    with torch.no_grad():
        output = model(tensors[f"input{case}"], output_hidden_states=True)

    first_latent = int(model.config.use_cls_token)
    ours = {
        "output": output.pooler_output,
        "tokens.norm": output.last_hidden_state,
        "tokens.unit.0": narrow_tokens[-1],
        "tokens.unit.1": output.hidden_states[0][:, first_latent:],
        "rois.final": output.rois[:, -1],
        "rois.unit.0": output.rois[:, model.config.focusing_repeats],
        "rois.unit.1": output.rois[:, -1],
        "rois.unit.2": output.rois[:, -1],
        "features": stem_features[0],
    }
    for step in range(output.rois.shape[1] - 1):
        ours[f"rois.step.{step}"] = output.rois[:, step + 1]
    # The last cortex block is seen through the final norm only: hidden_states[-1] is normalised.
    not_exposed = {"input", "tokens.final", "tokens.unit.2"}
    stored = {
        key.removesuffix(".b")
        for key in tensors
        if key.endswith(".b") == bool(case) and key.removesuffix(".b") not in not_exposed
    }
    assert stored <= ours.keys()
    for key in stored:
        torch.testing.assert_close(ours[key], tensors[key + case], rtol=0, atol=TOLERANCE, msg=lambda m, k=key: k + m)


@pytest.mark.parametrize("name", NAMES)
def test_final_norm_of_the_stored_tokens(name: str) -> None:
    state, tensors, official_config = read_fixture(name)
    model = load_official_checkpoint(state, official_config=official_config)
    normed = model.norm(tensors["tokens.final"])
    torch.testing.assert_close(normed, tensors["tokens.norm"], rtol=0, atol=TOLERANCE)
    pooled = model.projection(model.pool(tensors["tokens.final"], normed))
    torch.testing.assert_close(pooled, tensors["output"], rtol=0, atol=TOLERANCE)
