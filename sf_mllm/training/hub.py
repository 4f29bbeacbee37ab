"""Upload a finished directory to the Hugging Face hub, by the hub library's own calls."""

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from sf_mllm.errors import InputError, first_line


def check_repository_name(name: str) -> None:
    """Refuse what can be no repository, before hours of work and not after them.

    Raises:
        InputError: the name is not of the form owner/name.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise InputError(f"Hub repository '{name}' has no valid name: {first_line(error)}.") from error
    if name.count("/") != 1:
        raise InputError(f"Hub repository '{name}' names no owner; give owner/name.")


def push_to_hub(directory: str | Path, name: str) -> str:
    """Upload a directory in one commit and return its address.

    A repository that does not exist yet is made, and is private. The token is the one that `hf auth login` stored, or
    the environment's HF_TOKEN.

    Raises:
        InputError: the hub cannot be reached or refuses.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=directory, commit_message="Upload model")
    except Exception as error:  # the network and the hub's refusals come in many types
        raise InputError(
            f"'{directory}' is complete, but it cannot be uploaded to hub repository '{name}': {first_line(error)}; "
            f"once that is mended, hf upload {name} {directory} uploads it."
        ) from error
    return str(commit.repo_url)
