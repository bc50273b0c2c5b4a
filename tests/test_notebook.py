"""What notebooks show: chains, plans, results, tables; the sampling path; progress with previews; labelled sheets."""

import io
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image, ImageDraw

import mrflow as mf
from mrflow.display import html
from mrflow.display.sheet import GAP, MARGIN, draw_comparison
from mrflow.records.pictures import Images, strip
from mrflow.sweep import run_sweep
from tests.test_sweep import SIZE, paper

EVIL = "<script>alert('x')</script>"


@pytest.fixture(scope="module")
def result() -> mf.Result:
    return mf.run(paper(), mf.toy(), ["a", EVIL], seed=(1, 2), keep="path")


def test_reprs_are_short_and_say_what_it_is(result: mf.Result) -> None:
    chain = paper()
    assert repr(chain) == "Chain(Sample >> Decode >> Upscale >> Encode >> Reinject >> Refine >> Decode)"
    assert repr(mf.plan(chain, mf.toy())) == "Plan(toy: 7 stages, NFE 3, Pixels 32x32)"
    large = repr(mf.plan(mf.recipes.native(size=(1024, 1024), steps=50), mf.FLUX))
    assert re.fullmatch(r"Plan\(.*: 2 stages, NFE 50, \d.* PFLOP, Pixels 1024x1024\)", large), large
    assert re.fullmatch(r"Result\(2 items, .*Pixels 32x32, NFE \d+, .* s\)", repr(result)), repr(result)
    assert repr(result.images) == f"<2 images, {SIZE[0]}x{SIZE[1]}>" and repr(Images()) == "<0 images, none>"


def test_tables_for_notebooks_hold_no_markup_of_prompts(result: mf.Result) -> None:
    text = result._repr_html_()
    assert "<script" not in text and "&lt;script&gt;" in text and text.count("<tr>") == 8
    assert html.html_table(["<h>"], [["<i>"]], caption="<c>").count("&lt;") == 3
    assert "Reinject" in paper()._repr_html_() and "sigma 0.12" in paper()._repr_html_()
    planned = mf.plan(paper(), mf.toy())._repr_html_()
    assert planned.count("<tr>") == 8 and '<td style="text-align:left">Refine</td>' in planned


def test_pictures_are_one_strip(result: mf.Result) -> None:
    data = result.images._repr_png_()
    assert data is not None and data == result._repr_png_()
    with Image.open(io.BytesIO(data)) as shown:
        assert shown.size == (2 * SIZE[1] + 6, SIZE[0])
        assert shown.crop((0, 0, SIZE[1], SIZE[0])).tobytes() == result.images[0].tobytes()
    many = [Image.new("RGB", (600, 300), "red")] * 40
    assert strip(many).size == (8 * 262 - 6, 4 * 134 - 6)
    assert Images()._repr_png_() is None
    latents = mf.run(paper()[:1], mf.toy(), "a")
    assert latents._repr_png_() is None and "<img" not in latents._repr_html_()


def test_the_path_is_decoded_step_by_step(result: mf.Result, tmp_path: Path) -> None:
    seen: list[Any] = []
    plain = mf.run(paper(), mf.toy(), ["a", EVIL], seed=(1, 2), on_event=seen.append)
    steps = [(e.index, e.step.to, e.step.denoised) for e in seen if isinstance(e, mf.Stepped)]
    for (stage, sigma, estimate), kept in zip(steps, result.path, strict=True):
        assert (stage, sigma) == (kept.stage, kept.sigma) and torch.equal(estimate, kept.estimate)
    assert torch.equal(plain.pixels, result.pixels) and plain.path == ()
    frames = result.frames(1)
    assert len(steps) <= len(frames) <= len(steps) + 2  # what decodes to the frame before it comes once
    assert {frame.size for frame in frames} == {SIZE[::-1]} and frames[-1].tobytes() == result.images[1].tobytes()
    for name in ("a.gif", "a.webp", "a.png"):
        assert result.animate(tmp_path / name, 1, milliseconds=50) == tmp_path / name
        with Image.open(tmp_path / name) as moving:
            assert moving.n_frames == len(frames) and moving.size == SIZE[::-1]  # type: ignore[attr-defined]


def test_a_path_that_was_not_kept_is_told(result: mf.Result, tmp_path: Path) -> None:
    with pytest.raises(mf.PlanError, match=r'did not keep its path; run\(..., keep="path"\) does'):
        mf.run(paper(), mf.toy(), "a", keep=True).animate(tmp_path / "x.gif")
    with pytest.raises(mf.PlanError, match=r"must end in .gif, .webp, .png, got 'x.mp4'"):
        result.animate(tmp_path / "x.mp4")
    with pytest.raises(mf.PlanError, match="there is no picture 2: the run made 2"):
        result.animate(tmp_path / "x.gif", 2)
    with pytest.raises(mf.PlanError, match="keep takes False, True"):
        mf.run(paper(), mf.toy(), "a", keep="paths")  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A stand-in for IPython with a kernel: what cells show, in the order of updates."""
    shown: list[str] = []

    class Handle:
        def update(self, markup: str) -> None:
            shown.append(markup)

    def display(markup: str, *, display_id: bool) -> Handle:
        assert display_id and not shown
        shown.append(markup)
        return Handle()

    ipython, parts = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = lambda: SimpleNamespace(kernel=1)  # type: ignore[attr-defined]
    parts.HTML, parts.display = str, display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", parts)
    monkeypatch.setattr("mrflow.display.progress.EVERY_SECONDS", 0.0)
    return shown


def test_a_notebook_shows_progress_and_previews(notebook: list[str], result: mf.Result) -> None:
    model = mf.toy()
    again = mf.run(paper(), model, ["a", EVIL], seed=(1, 2), on_event=mf.ShowProgress(model, every=2))
    assert torch.equal(again.pixels, result.pixels)  # watching changes nothing
    assert "<progress" in notebook[0] and "Sample: step 1 of " in "".join(notebook)
    assert "<img" not in notebook[1] and "<img" in notebook[2] and 'value="7" max="7"' in notebook[-1]
    with pytest.raises(mf.PlanError, match="every must be a whole number"):
        mf.ShowProgress(every=0)


def test_a_notebook_shows_the_progress_of_a_sweep(notebook: list[str], tmp_path: Path) -> None:
    run_sweep(mf.Sweep({"one": paper()}, ["a", "b"]), mf.toy(), tmp_path, batch=1, on_progress=mf.ShowProgress())
    assert "1 of 2 rows" in notebook[0] and "2 of 2 rows" in notebook[-1]


def test_a_terminal_has_one_line_and_a_file_none(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for stream, lines in ((Terminal(), 1), (io.StringIO(), 0)):
        monkeypatch.setattr("sys.stderr", stream)
        mf.run(paper(), mf.toy(), "a", on_event=mf.ShowProgress(mf.toy()))
        assert stream.getvalue().count("\n") == lines
        assert ("[####################] done" in stream.getvalue()) == bool(lines)


def test_real_ipython_picks_the_tables_and_the_strip(result: mf.Result) -> None:
    shell: Any = pytest.importorskip("IPython.core.interactiveshell").InteractiveShell.instance()
    for shown, kinds in (
        (result, {"text/html", "image/png"}),
        (result.images, {"image/png"}),
        (paper(), {"text/html"}),
    ):
        data, _ = shell.display_formatter.format(shown)
        assert kinds <= data.keys() and len(data["text/plain"]) < 120


def test_pairs_stand_side_by_side(result: mf.Result) -> None:
    other = mf.run(mf.recipes.native(size=SIZE, steps=2), mf.toy(), ["a", EVIL], seed=(1, 2))
    sheet = draw_comparison(result, other)
    width, height = SIZE[1], SIZE[0]
    for i in range(2):
        for place, made in enumerate((result, other)):
            left = MARGIN + i * (2 * width + MARGIN + GAP) + place * (width + MARGIN)
            part = sheet.crop((left, 72, left + width, 72 + height))
            assert part.tobytes() == made.images[i].tobytes(), (i, place)


def test_small_pictures_cut_no_line_of_their_sheet(result: mf.Result, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = list[tuple[float, str]]()
    write = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, xy: tuple[float, float], words: str, **more: Any) -> None:
        drawn.append((xy[0] + self.textlength(words, more["font"]), words))
        write(self, xy, words, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    one = mf.run(paper(), mf.toy(), "a red ring at the top", seed=1)
    sheet = draw_comparison(one, one)
    assert any(words.endswith("x as fast") for _, words in drawn)
    assert "a red ring at the top (seed 1)" in [words for _, words in drawn]
    assert max(right for right, _ in drawn) <= sheet.width - MARGIN + 1


def test_long_captions_take_several_lines_of_their_sheet(monkeypatch: pytest.MonkeyPatch) -> None:
    """With their seeds, and no line over the pictures below; one without end, or of one word, is cut."""
    drawn = list[tuple[tuple[float, float], str]]()
    write = ImageDraw.ImageDraw.text

    def text(self: ImageDraw.ImageDraw, xy: tuple[float, float], words: str, **more: Any) -> None:
        drawn.append((xy, words))
        write(self, xy, words, **more)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    four = ["a red star at the top left,\na blue ring at the right", "two words", "so on " * 100, "x" * 500]
    made = mf.run(mf.recipes.native(size=(64, 64), steps=1), mf.toy(), four, seed=12)
    sheet = draw_comparison(made, made)
    below = [(y, words) for (_, y), words in drawn if words not in ("staged", "native")][2:]
    lines = [words for _, words in below]
    first = below[: next(i for i, line in enumerate(lines) if line.endswith("12)")) + 1]
    assert 1 < len(first) <= 3 and " ".join(words for _, words in first) == f"{' '.join(four[0].split())} (seed 12)"
    assert [line for line in lines if line.startswith("so on")][2].endswith("...")
    assert [line[-3:] for line in lines if line.startswith("x")] == ["..."]
    tops = sorted(y for (_, y), words in drawn if words == "staged")
    assert first[-1][0] + 12 < tops[-1]
    assert max(y for (_, y), _ in drawn) + 14 <= sheet.height
