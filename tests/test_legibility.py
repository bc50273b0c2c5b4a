"""The legibility of small text: pages of known height, a reader that is held to its controls, on tiny checkpoints."""

import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from experiments import legibility
from experiments.legibility import legible, main, page
from tests.tiny import write_flux_repo

PAGES: list[legibility.Page] = []


def nearest(pixels: NDArray[np.uint8]) -> str:
    """A reader of a closed set: the word of the newest page whose own box is likest."""
    sheet, best, found = PAGES[-1], -1.0, ""
    for (left, top, right, bottom), word in zip(sheet.boxes, sheet.words, strict=True):
        own = sheet.pixels[..., top:bottom, left:right]
        size = pixels.shape[:2]
        own = legibility.torch.nn.functional.interpolate(own, size, mode="bicubic", align_corners=False)
        a, b = own[0].mean(0).numpy().ravel(), pixels.mean(-1).ravel()
        fit = float(np.corrcoef(a, b)[0, 1]) if b.std() else 0.0
        if fit > best:
            best, found = fit, word
    return found if best > 0.5 else ""


@pytest.mark.parametrize("height", [8, 24])
def test_a_page_has_letters_of_its_height(height: int) -> None:
    sheet = page(512, height, 0)
    assert len(sheet.words) > 5
    dark = (sheet.pixels[0].mean(0) < 0.6).numpy()
    heights = [int(dark[top:bottom, left:right].any(1).sum()) for left, top, right, bottom in sheet.boxes]
    assert abs(np.median(heights) - height) <= max(2, height // 3)  # some letters reach below the line
    assert page(512, height, 0).words == sheet.words != page(512, height, 1).words


def test_the_reader_reads_the_page_and_nothing_else() -> None:
    PAGES.append(sheet := page(256, 16, 0))
    assert np.mean(legible(sheet.pixels, sheet.words, sheet.boxes, nearest)) > 0.95
    assert np.mean(legible(sheet.pixels, sheet.words, sheet.boxes, nearest, shift=1)) < 0.4
    assert np.mean(legible(sheet.pixels * 0 + 0.5, sheet.words, sheet.boxes, nearest)) == 0


def test_every_row_is_made_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def drawn(side: int, height: int, number: int, font: Path | None = None) -> legibility.Page:
        PAGES.append(page(side, height, number, font))
        return PAGES[-1]

    monkeypatch.setattr(legibility, "page", drawn)
    out = tmp_path / "scores.json"
    options = ["--model", "pocket", "--size", "256", "--heights", "16", "--pages", "1", "--out", str(out)]
    options += ["--ocr", "tests.test_legibility:nearest", "--device", "cpu"]
    assert main(options) == 0
    lines = {line.split("|")[1].strip(): line for line in capsys.readouterr().out.splitlines() if line[:1] == "|"}
    assert set(legibility.rows(256, None, 0.12, 1)) <= set(lines)
    means = {name: float(lines[name].split("|")[2].split()[0]) for name in legibility.rows(256, None, 0.12, 1)}
    assert means["picture"] > 0.95 and means["other"] < 0.4
    assert means["staged path"] <= means["autoencoder"] + 0.05 <= means["picture"] + 0.1
    kept = json.loads(out.read_text())
    monkeypatch.setattr(legibility, "legible", lambda *_, **__: pytest.fail("read again"))
    assert main(options) == 0 and json.loads(out.read_text()) == kept
    assert main([*options, "--sigma", "0.3"]) == 2
    assert "give another --out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--ocr", "nowhere:read"], "module:function"),
        (["--ocr", "tests.test_legibility:nearest", "--rows", "sampled"], "no row is called sampled"),
        (["--ocr", "tests.test_legibility:nearest", "--heights", "200"], "no word of 200 px fits"),
    ],
)
def test_what_cannot_be_is_said_before_a_model_is_loaded(
    options: list[str], text: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrflow.load", lambda *_, **__: pytest.fail("a model was loaded"))
    assert main(["--model", "pocket", "--size", "256", "--pages", "1", *options]) == 2
    assert text in capsys.readouterr().err


def test_a_large_model_is_asked_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_flux_repo(tmp_path / "repo")
    PAGES.append(page(128, 12, 0))
    options = ["--model", str(folder), "--size", "128", "--heights", "12", "--pages", "1", "--sr", "lanczos"]
    assert main([*options, "--ocr", "tests.test_legibility:nearest", "--device", "cpu"]) == 0
    rows = [line.split("|")[2].split() for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    means = [cell[0] for cell in rows if cell[0][0].isdigit() and "." in cell[0]]
    assert len(means) == 7 and float(means[0]) == 1  # the picture is read; random networks leave what they leave
