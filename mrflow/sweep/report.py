"""The page of a sweep's folder: one HTML file that opens from disk.

Everything is computed here, once; the page only draws it. Prompts and errors are data from outside: they go into the
page as JSON and onto it as text, never as markup.
"""

import base64
import json
import os
import stat
import struct
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from mrflow._checks import check_path
from mrflow.errors import PlanError
from mrflow.records.files import read_regular, write_bytes
from mrflow.sweep.aims import Scale
from mrflow.sweep.rows import Row
from mrflow.sweep.statistics import number
from mrflow.sweep.store import Store
from mrflow.sweep.summary import load_rows, summarise

MAX_BYTES = 200_000_000  # of embedded pictures; browsers become slow beyond
EMBED_ROWS, MAX_PAGE = 2000, 9_000_000  # with more rows, a page of so many bytes holds as many pictures as go in
SHOWN = 24  # pictures a chain that are shown as its worst
SIGNATURE = b"\x89PNG\r\n\x1a\n"


Loaded = tuple[list[Row], str]  # what `load` gives


def page(
    folder: str | Path,
    *,
    title: str | None = None,
    link: bool = False,
    beside: bool = True,
    loaded: Loaded | None = None,
) -> str:
    """The HTML of a sweep's folder; pictures are embedded as they are saved, or linked to.

    With more than `EMBED_ROWS` rows, as many pictures are embedded as the page may hold, the worst first; the others
    are shown where the page lies in the folder, `beside` them. `loaded` is what `load(folder)` gave, where it was read.

    Raises:
        PlanError: there are no rows, or the pictures would make the file too large to embed.
    """
    where = check_path("the folder", folder)
    rows, reference = loaded or load_rows(where)
    said = Store(where).manifest()
    data = summarise(rows, reference, said)
    large = len(rows) > EMBED_ROWS
    data |= {"title": title or where.resolve().name, "folder": str(where), "beside": beside}
    data["linked"] = link or (large and beside)
    there, items = _Pictures(where), dict[tuple[str, int], dict[str, Any]]()
    sizes: dict[str, list[int]] = {}
    embedded: list[tuple[float, str]] = []  # what to embed, by how soon it should be seen
    first = data["metrics"][0] if data["metrics"] else "seconds"
    for place, row in _rank(rows, first, Scale(**data["scales"][first])):
        item = items.setdefault(
            (row.prompt, row.draw),
            {"prompt": row.prompt, "draw": row.draw, "seed": row.seed, "tags": dict(row.tags), "cells": {}},
        )
        picture = there(row.picture)
        stages = [[name, there(path)] for name, path in row.stage_pictures]
        if row.picture is not None and row.chain not in sizes and picture is not None:
            sizes[row.chain] = _size(where / picture)
        cell: dict[str, Any] = {"seconds": _short(row.seconds)}
        cell |= {"metrics": {name: _short(value) for name, value in row.metrics.items()}} if row.metrics else {}
        cell |= {"picture": picture} if picture is not None else {}
        cell |= {"stages": stages} if stages else {}
        item["cells"][row.chain] = cell if row.done else {"error": row.error}
        embedded += [(place, name) for name in (picture, *(path for _, path in stages)) if name is not None]
    data |= {"items": list(items.values()), "sizes": sizes}
    text = _safe(data)
    pictures: dict[str, str] = {}
    if not link:
        room = max(0, MAX_PAGE - len(text) - len(_template())) if large else MAX_BYTES
        names = [name for _, name in sorted(embedded, key=lambda pair: pair[0])]
        pictures = _embed(where, names, room, all_of_them=not large)
    before, _, after = _template().partition("/*DATA*/")
    return "".join((before, text[:-1], ', "pictures": ', _safe(pictures), "}", after))


def _embed(where: Path, names: Sequence[str], room: int, *, all_of_them: bool) -> dict[str, str]:
    """Pictures as `data:` addresses, the first ones that fit into `room` bytes.

    Raises:
        PlanError: they do not all fit, and must.
    """
    found: dict[str, str] = {}
    for name in names:
        raw = _png(where / name)
        if not raw:
            continue
        room -= len(raw) * 4 // 3 + len(name) + 40
        if room >= 0:
            found[name] = "data:image/png;base64," + base64.b64encode(raw).decode()
        elif all_of_them:
            raise PlanError(
                f"the pictures of {where} would make a file of more than {MAX_BYTES // 1_000_000} MB; "
                "--link refers to them instead (keep the file in the sweep's folder)"
            )
        else:
            break
    return found


def _safe(data: object) -> str:
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    # "</script>" and "<!--" inside a JSON string would end the element that holds it.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _template() -> str:
    return resources.files("mrflow.sweep").joinpath("report.html").read_text("utf-8")


def _rank(rows: Sequence[Row], metric: str, which: Scale) -> list[tuple[float, Row]]:
    """Every row in its order, with how soon its picture is wanted: the page shows the worst of each chain first."""
    worst: dict[str, list[tuple[float, str]]] = {}
    for row in rows:
        if (value := number(row, metric)) is not None:
            good = which.goodness(value)
            worst.setdefault(row.chain, []).append((value if good is None else good, row.key))
    soon = {key for each in worst.values() for _, key in sorted(each)[:SHOWN]}
    return [(place if row.key in soon else place + len(rows), row) for place, row in enumerate(rows)]


def _short(value: float) -> float:
    """Six digits, which is more than the page shows."""
    return float(f"{value:.6g}")


class _Pictures:
    """Which pictures lie in a folder: regular files, to which no link leads out of it."""

    def __init__(self, where: Path) -> None:
        self._where, self._root = str(where), os.path.realpath(where)
        self._inside: dict[str, bool] = {}

    def __call__(self, name: str | None) -> str | None:
        """The name where there is such a picture, else None."""
        if name is None:
            return None
        path = f"{self._where}/{name}"
        room = os.path.dirname(path)
        if room not in self._inside:
            self._inside[room] = os.path.realpath(room).startswith(self._root + os.sep)
        try:
            return name if self._inside[room] and stat.S_ISREG(os.lstat(path).st_mode) else None
        except OSError:
            return None


def _png(path: Path) -> bytes:
    """A picture's file; empty where it is no PNG of a sensible size."""
    try:
        data = read_regular(path, most=MAX_BYTES)
    except (OSError, ValueError):
        return b""
    return data if data.startswith(SIGNATURE) else b""


def _size(path: Path) -> list[int]:
    """Width and height from a PNG's head."""
    try:
        with path.open("rb") as file:
            head = file.read(24)
    except OSError:
        head = b""
    return list(struct.unpack(">II", head[16:24])) if head.startswith(SIGNATURE) and len(head) == 24 else [1, 1]


def write_report(
    folder: str | Path, out: Path, *, title: str | None = None, link: bool = False, loaded: Loaded | None = None
) -> None:
    """Write the page.

    Raises:
        PlanError, ResourceError: as `page`; the file cannot be written.
    """
    beside = out.parent.resolve() == Path(folder).resolve()
    write_bytes(out, page(folder, title=title, link=link, beside=beside, loaded=loaded).encode("utf-8"))
