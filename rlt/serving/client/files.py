"""Weights as files: from the server to a folder here, and from there to a hub."""

import tempfile
import uuid
from collections.abc import Coroutine
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlt.errors import Refused

if TYPE_CHECKING:
    from rlt.serving.client.training import TrainingClient


def download_files(model: "TrainingClient", folder: Path, merged: bool) -> Path:
    """The server keeps a copy only meanwhile."""
    if folder.exists() and any(folder.iterdir()):
        raise Refused(f"{folder} has files: download to another folder")
    route = "save_weights_merged" if merged else "save_weights_external"
    name = f"download-{uuid.uuid4().hex[:12]}"
    model.request(route, path=name, ttl_seconds=3600).result()
    place = f"training_runs/{model.model_id}/checkpoints/external_weights/{name}"
    _wait(model, _fetch(model, f"{place}/external_weights_urls", folder))
    _wait(model, model.connection.ask("DELETE", place))
    return folder


def _wait(model: "TrainingClient", work: Coroutine[Any, Any, Any]) -> None:
    model.connection.start(work).result()


async def _fetch(model: "TrainingClient", route: str, folder: Path) -> None:
    urls = (await model.connection.ask("GET", route)).json()["urls"]
    folder.mkdir(parents=True, exist_ok=True)
    for name, url in urls.items():
        await model.connection.fetch(url, folder / name)


def push_folder(
    model: "TrainingClient",
    repository: str,
    merged: bool,
    *,
    token: str | None = None,
    endpoint: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
) -> str:
    """One commit."""
    from httpx import HTTPError
    from huggingface_hub import HfApi

    api = HfApi(endpoint=endpoint, token=token)
    with tempfile.TemporaryDirectory(prefix="rlt-push-") as aside:
        folder = download_files(model, Path(aside) / "weights", merged)
        try:
            name = api.create_repo(repository, private=private, exist_ok=True).repo_id
            message = commit_message or f"Weights of {model.model_id}"
            pushed = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message, revision=revision)
        except (HTTPError, OSError, ValueError, RuntimeError) as error:  # ValueError: no name of a repository
            said = " ".join(str(error).split())
            raise Refused(f"{repository} was not pushed to {api.endpoint}: {said}") from error
    return str(pushed.repo_url)
