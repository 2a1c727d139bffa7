"""Pushing a finished model to the Hugging Face hub, with the login of its own client (`hf auth login`, or HF_TOKEN)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import validate_repo_id

from mobius_train.errors import MobiusError

# A folder with one of these is a model in diffusers' layout.
MODELS = ("model_index.json", "vae/config.json", "config.json")


def check_login(name: str) -> None:
    """Check that this machine is logged in to the hub. Changes nothing there.

    Args:
        name: of the repository that will be pushed to.

    Raises:
        MobiusError: it is not, the name is not valid, or the hub cannot be reached.
    """
    with _naming(f"cannot push to {name}"):
        validate_repo_id(name)
        HfApi().whoami()


def make_repository(name: str, private: bool) -> str:
    """Make a model repository on the hub, if there is none of this name, and return its whole name.

    Called before a training, because it also checks that the login may write there.

    Args:
        name: OWNER/NAME, or NAME for one of the user who is logged in.
        private: of a new repository. One that exists stays as it is.

    Raises:
        MobiusError: the name is not valid, the login may not write there, or the hub cannot be reached.
    """
    with _naming(f"cannot make the repository {name}"):
        whole = str(HfApi().create_repo(name, private=private, exist_ok=True).repo_id)
        # One that exists may be another's.
        HfApi().auth_check(whole, write=True)
        return whole


def check_model(folder: Path) -> None:
    """
    Raises:
        MobiusError: the folder has no model.
    """
    if not any((folder / file).is_file() for file in MODELS):
        raise MobiusError(f"{folder} has no model in diffusers' layout: name a folder such as final/ of a run")


def push_folder(folder: Path, name: str) -> str:
    """Push a finished model, with all files of its folder, and return the address of the commit.

    Args:
        folder: such as a run's final/.
        name: of a repository that exists.

    Raises:
        MobiusError: it cannot be pushed.
    """
    with _naming(f"{folder} was not pushed to {name}"):
        commit = HfApi().upload_folder(
            repo_id=name, folder_path=folder, commit_message=f"Upload {folder.resolve().parent.name} with mobius-train"
        )
        return str(commit.commit_url)


@contextmanager
def _naming(problem: str) -> Iterator[None]:
    try:
        yield
    except OfflineModeIsEnabled as error:
        raise MobiusError(
            f"{problem}: HF_HUB_OFFLINE is set, so nothing is sent: start with HF_HUB_OFFLINE=0"
        ) from error
    # The client raises errors of its own, of the network, and ValueError, on which it documents nothing.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise MobiusError(
            f"{problem}: {reason[0]}. Check the name and the network, and log in with `hf auth login` as a user who may"
            " write there"
        ) from error
