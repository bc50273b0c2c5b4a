"""Pictures made again from the records that they carry, and files told for people."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from mrflow._checks import check_path
from mrflow.backbone import Backbone
from mrflow.errors import RecordError
from mrflow.models import load
from mrflow.models.describe import describe
from mrflow.models.pocket.model import embedded_file
from mrflow.records.chains import decode_chain
from mrflow.records.files import known_files
from mrflow.records.pictures import describe_record, read_record
from mrflow.result import Result
from mrflow.runner import run
from mrflow.stage import AnyChain


def model_of_record(record: dict[str, object]) -> str:
    """The file of the embedded model that made a picture: a record is data from outside, and loads no other.

    Raises:
        RecordError: the picture was made by a model that does not come with mrflow.
    """
    name = str(record.get("model", "pocket"))
    if (file := embedded_file(name, str(record.get("weights")))) is None:
        raise RecordError(f"the picture was made by {name}, which is not embedded; give it: --model or replay(model=)")
    return str(file)


def replay(
    path: str | Path,
    *,
    model: Backbone | None = None,
    types: Iterable[type] = (),
    start: Tensor | None = None,
    files: Iterable[str | Path] = (),
) -> Result:
    """Make a picture again from the record it carries; the same pixels on the same versions and device.

    A picture that was made in a batch may differ by rounding (one level of 255): it is made again alone.

    `model` is the loaded model where it is not embedded; `types` are the classes of your own that its chain uses;
    `start` the pixels that it began with, where it did not begin with noise; `files` the files (or folders of them) of
    the super-resolution networks and adapters that it used: a record holds their names and SHA-256, not their places.

    Raises:
        RecordError: there is no record, or this model is not the one that made the picture.
    """
    record = read_record(path)
    files = tuple(files)
    with known_files(files):
        chain: AnyChain = decode_chain(record.get("chain"), types)
    prompt, seed, negative, name = (record.get(k) for k in ("prompt", "seed", "negative", "model"))
    if not (isinstance(prompt, str) and isinstance(seed, int) and isinstance(negative, str) and isinstance(name, str)):
        raise RecordError(f"{path}: its record lacks the prompt, seed, negative or model")
    if "start" in record and start is None:
        raise RecordError(f"{path} was made from a picture ({record['start']}); give it, --start FILE or start=")
    backbone = load(model_of_record(record)) if model is None else model
    weights = record.get("weights")
    if backbone.info.name != name or backbone.info.version != weights:
        raise RecordError(
            f"{path} was made by {name} {weights}, but the model given is {backbone.info.name} {backbone.info.version}"
        )
    with known_files(files):
        return run(chain, backbone, prompt, seed=seed, negative=negative, start=start)


CHECKPOINTS = (".safetensors", ".json", ".pth", ".pt", ".ckpt", ".bin", ".param")  # how checkpoints' names end


def is_checkpoint(path: Path) -> bool:
    """Whether a name is that of a checkpoint, or a folder's, and not a picture's."""
    return path.is_dir() or path.suffix in CHECKPOINTS


def inspect_file(path: str | Path) -> list[str]:
    """What a file or folder is, in lines: how a PNG was made, or what a checkpoint holds."""
    where = check_path("the file", path)
    if is_checkpoint(where):
        return describe(where)
    return describe_record(read_record(where))
