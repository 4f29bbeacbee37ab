import pytest

from tests.tiny_vlm import make_sf_llava


@pytest.fixture(scope="session")
def saved_model(tmp_path_factory):
    """Directory of a tiny random model; tests that damage it work on a copy."""
    directory = tmp_path_factory.mktemp("models") / "tiny"
    model, processor = make_sf_llava()
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory
