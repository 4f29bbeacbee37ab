"""The decoder that reads features back out of tokens: what it sees, and that it learns."""

import pytest
import torch

from sf_mllm.training.bootstrap.feature_decoder import FeatureDecoder, StudentWithDecoder
from sf_mllm.training.bootstrap.losses import average_in_rois, reconstruction_loss
from tests.encoder.tiny import tiny_model


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return FeatureDecoder(16, 2, "gelu", 1e-5)


def tiles(rows, columns):
    """Regions [1, rows * columns, 4] that tile the image, row by row."""
    corners = [(x / columns, y / rows) for y in range(rows) for x in range(columns)]
    return torch.tensor([[(x, y, x + 1 / columns, y + 1 / rows) for x, y in corners]])


def test_places_are_coded_like_regions(decoder):
    """A decoder that hears nothing from the tokens says the code of each cell: rows first, (x, y) in order."""
    torch.nn.init.zeros_(decoder.attn.out_proj.weight)
    torch.nn.init.zeros_(decoder.mlp.fc2.weight)
    torch.nn.init.zeros_(decoder.mlp.fc2.bias)
    output = decoder(torch.randn(2, 3, 16), torch.rand(2, 3, 4), (2, 3))
    expected = decoder.place_code(tiles(2, 3)).expand(2, -1, -1)
    torch.testing.assert_close(output, expected)


def test_the_order_of_tokens_means_nothing_and_their_regions_do(decoder):
    latents, rois = torch.randn(2, 5, 16), torch.rand(2, 5, 4)
    output = decoder(latents, rois, (3, 3))
    order = torch.tensor([3, 1, 4, 0, 2])
    torch.testing.assert_close(decoder(latents[:, order], rois[:, order], (3, 3)), output)
    assert (decoder(latents, rois[:, order], (3, 3)) - output).abs().max() > 1e-3


def test_gradients_reach_the_tokens_but_not_the_regions(decoder):
    latents = torch.randn(2, 5, 16, requires_grad=True)
    rois = torch.rand(2, 5, 4, requires_grad=True)
    decoder(latents, rois, (3, 3)).square().sum().backward()
    assert latents.grad.abs().min() > 0 and rois.grad is None
    assert all(parameter.grad is not None for parameter in decoder.parameters())


def test_it_learns_to_put_tokens_at_their_places(decoder):
    """Tokens that hold the averages of tiles are enough to read the map back: of new maps, too."""
    generator = torch.Generator().manual_seed(0)
    rois = tiles(2, 2).expand(64, -1, -1)
    optimizer = torch.optim.Adam(decoder.parameters(), lr=3e-3)
    for _ in range(300):
        feature_map = torch.randn(64, 16, 2, 2, generator=generator)
        loss = reconstruction_loss(decoder(average_in_rois(feature_map, rois, 1), rois, (2, 2)), feature_map).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1  # measured: 0.06; 1 without the tokens


def test_a_student_with_a_decoder_is_the_student_and_more():
    torch.manual_seed(0)
    student = tiny_model()
    model = StudentWithDecoder(student)
    pixels = torch.randn(2, 3, 32, 32)
    output = model(pixels, grid=(3, 2), output_hidden_states=True, output_sampling_points=True)
    alone = student(pixels, output_hidden_states=True, output_sampling_points=True)
    torch.testing.assert_close({name: output[name] for name in alone}, dict(alone), rtol=0, atol=0)
    latents = alone.last_hidden_state[:, -alone.rois.shape[2] :]
    torch.testing.assert_close(output.reconstruction, model.decoder(latents, alone.rois[:, -1], (3, 2)))
    assert output.reconstruction.shape == (2, 6, student.config.hidden_size)
