"""Files of hub repositories: huggingface_hub's cache, `HF_HUB_OFFLINE` and progress bars."""

from pathlib import Path

from mrflow.checkpoints.safetensors import chosen_checkpoint
from mrflow.errors import ResourceError
from mrflow.records.files import expand_home, locate


def fetch_file(repository: str, name: str) -> Path:
    """The local path of one file of a hub repository."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    owner, _, revision = repository.partition("@")
    try:
        return Path(hf_hub_download(owner, name, revision=revision or None))
    except LocalEntryNotFoundError as error:
        raise ResourceError(
            f"{repository}/{name} is not here and cannot be fetched ({first_line(error)}); with HF_HUB_OFFLINE=1 "
            "nothing is ever fetched"
        ) from None
    except (HfHubHTTPError, OSError, ValueError) as error:
        raise ResourceError(f"{repository}/{name} is not here and cannot be fetched: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def located_folder(where: str, sha256: str = "") -> tuple[Path, str]:
    """The one safetensors file of an adapter's folder, as a path or `owner/name/folder` on the hub, and its SHA-256.

    Raises:
        WeightsError: it is not there, or another one than `sha256` says.
    """
    path = expand_home(where)
    parts = where.split("/")
    if path.is_dir():
        path = chosen_checkpoint(path)
    elif not path.exists() and not path.is_absolute() and len(parts) == 3 and path.suffix != ".safetensors":
        repository = "/".join(parts[:2])
        fetch_file(repository, f"{parts[2]}/config.json")
        path = fetch_file(repository, f"{parts[2]}/diffusion_pytorch_model.safetensors")
    return locate(str(path), sha256)
