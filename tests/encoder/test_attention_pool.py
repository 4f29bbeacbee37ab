"""An encoder that pools by attention, as a model of transformers; that it equals its teacher's is in test_from_vit."""

from pathlib import Path

import pytest
import torch

from sf_mllm import SparseFormerModel
from tests.encoder.tiny import tiny_config, tiny_model


def attention_model(**changes: object) -> SparseFormerModel:
    return tiny_model(pooling="attention", **{"use_cls_token": False, **changes})


def test_it_equals_attention_written_out() -> None:
    """One softmax over the tokens for each head, then an MLP with a residual."""
    pool = attention_model().attention_pool
    tokens = torch.randn(2, 5, 32)
    with torch.no_grad():
        keys, values = pool.kv(tokens).chunk(2, dim=-1)  # [2, 5, 32]
        heads = []
        for head in range(2):
            part = slice(16 * head, 16 * head + 16)
            weights = (keys[..., part] @ pool.query[0, part] / 16**0.5).softmax(dim=1)  # [2, 5]
            heads.append((weights[..., None] * values[..., part]).sum(dim=1))
        attended = pool.proj(torch.cat(heads, dim=-1))
        torch.testing.assert_close(pool(tokens), attended + pool.mlp(pool.norm(attended)))


def test_it_reads_the_latents_only() -> None:
    model = attention_model(use_cls_token=True)
    tokens = torch.randn(2, 6, 32)
    normed = model.norm(tokens)
    torch.testing.assert_close(model.pool(tokens, normed), model.attention_pool(normed[:, 1:]))
    order = torch.tensor([0, 3, 1, 5, 4, 2])  # a set of latents, in whatever order
    torch.testing.assert_close(model.pool(tokens, normed), model.pool(tokens[:, order], normed[:, order]))


def test_save_and_load_is_exact(tmp_path: Path) -> None:
    model = attention_model()
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 40, 30)
    loaded = SparseFormerModel.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    with torch.no_grad():  # weights mapped from a file lie elsewhere in memory, which decides the last bit
        torch.testing.assert_close(loaded(pixels).pooler_output, model(pixels).pooler_output)


@pytest.mark.parametrize("mode", ["autocast", "model"])
def test_bf16_stays_near_fp32(mode: str) -> None:
    model = attention_model()
    pixels = torch.randn(2, 3, 40, 30)
    with torch.no_grad():
        reference = model(pixels).pooler_output
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mode == "autocast"):
            output = (model.to(torch.bfloat16) if mode == "model" else model)(pixels).pooler_output
    assert output.dtype == torch.bfloat16
    assert (output.float() - reference).abs().max() < 0.1 * reference.abs().max()


def test_forward_is_one_graph_for_the_compiler() -> None:
    torch.compiler.reset()
    model = attention_model()
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)(pixels)
        torch.testing.assert_close(compiled.pooler_output, model(pixels).pooler_output)


def test_starting_values() -> None:
    """The query of a new model differs from zero, or no gradient would reach the keys."""
    torch.manual_seed(0)
    model = SparseFormerModel(tiny_config(pooling="attention", use_cls_token=False))
    assert 0.5 < model.attention_pool.query.std() < 1.5
    model(torch.randn(2, 3, 32, 32)).pooler_output.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in model.attention_pool.parameters())


def test_other_poolings_have_no_such_part() -> None:
    assert not any("attention_pool" in name for name, _ in tiny_model().named_parameters())
