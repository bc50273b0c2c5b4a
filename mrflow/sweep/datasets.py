"""A sweep as a folder that the `datasets` library loads: pictures with a line of facts each."""

import json
from collections.abc import Sequence
from pathlib import Path

from mrflow.errors import PlanError, ResourceError
from mrflow.records.files import beneath, filling, read_regular, write_bytes
from mrflow.sweep.rows import Row
from mrflow.sweep.tables import flat

MAX_PICTURE = 1 << 30
LEFT_OUT = ("picture", "status", "error")  # of a row's facts: those that all exported ones share
CARD = """---
tags:
- mrflow
- image-generation
---
# {name}

{count} pictures of a sweep of mrflow: {chains} methods, model {model}. `load_dataset("imagefolder", data_dir=...)` of
the datasets library reads the folder; each picture has its chain, prompt, seed, costs and metrics.
"""


def write_dataset(rows: Sequence[Row], folder: str | Path, out: Path) -> int:
    """Copy the pictures of rows that are done into a new folder, with `metadata.jsonl` and a card; how many.

    The layout is Hugging Face's "imagefolder". Rows that failed have no picture, and are left out.

    Raises:
        PlanError: there is no picture, or `out` holds files. ResourceError: a file cannot be read or written.
    """
    done = [row for row in rows if row.picture is not None]
    if not done:
        raise PlanError(f"{folder} has no picture to export")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise PlanError(f"{out} exists and is not empty; choose another --out")
    names, lines = flat(done)
    text: list[str] = []
    try:
        with filling(out) as draft:
            train = draft / "train"
            train.mkdir()
            for row, line in zip(done, lines, strict=True):
                name = f"{row.key}.png"
                path = beneath(Path(folder), str(row.picture))
                if path is None:
                    raise ValueError(f"{row.picture} does not lie in {folder}")
                write_bytes(train / name, read_regular(path, most=MAX_PICTURE))
                facts = {key: value for key, value in zip(names, line, strict=True) if key not in LEFT_OUT}
                text.append(json.dumps({"file_name": name, **facts}))
            write_bytes(train / "metadata.jsonl", ("\n".join(text) + "\n").encode())
            chains = len({row.chain for row in done})
            card = CARD.format(name=out.name, count=len(done), chains=chains, model=done[0].model)
            write_bytes(draft / "README.md", card.encode())
    except (OSError, ValueError) as error:
        raise ResourceError(f"{out} could not be filled: {error}") from None
    return len(done)
