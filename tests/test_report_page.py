"""What the page says of numbers with a known scale: directions, fronts, degenerate intervals, ties, missing ones."""

import json
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import mrflow as mf
from mrflow.sweep import Fidelity, Lpips, Row, Scale, SceneScore, Sharpness, Store, Stray, run_sweep, seed_of, table
from mrflow.sweep.local import manifest
from mrflow.sweep.maker import Maker
from mrflow.sweep.plots import draw_point, front_of, limits, speed_ticks, write_plots
from mrflow.sweep.report import page
from mrflow.sweep.styles import styles
from mrflow.sweep.summary import load_rows, summarise
from tests.test_cli import call, here  # noqa: F401
from tests.test_report import browser, data, texts  # noqa: F401
from tests.test_sweep import SIZE, paper

METHODS = {"ref 8": (8.0, 1.0), "clean 4": (4.0, 0.2), "dirty 2": (2.0, 5.0), "slow": (16.0, 0.5)}  # seconds, stray
LONG = "RuntimeError: " + "x" * 300 + "\nand a second line"
UNREAD = "ValueError: unreadable " + "y" * 200


def made(store: Store, maker: Maker, label: str, pair: tuple[mf.Prompt, int], number: int) -> Row:
    """A row whose numbers follow from its label and its number."""
    prompt, draw = pair
    seconds, stray = METHODS[label]
    key, place = maker.key(label, pair), list(METHODS).index(label)
    facts: dict[str, Any] = {
        "key": key, "chain": label, "model": "toy", "weights": maker.weights, "prompt": prompt.text,
        "negative": maker.negative, "seed": seed_of(prompt.text, draw), "draw": draw, "tags": dict(prompt.tags),
        "versions": maker.made_by, "device": "cpu", "machine": f"machine {place % 2}",
        "time": f"2026-01-0{place + 1}T00:{number:02d}:00.000000+00:00",
    }  # fmt: skip
    if label == "dirty 2" and number == 23:
        return Row(status="failed", error=LONG, cause="error", **facts)
    metrics = {
        "score": 0.0 if label == "dirty 2" and number < 12 else 1.0, "stray": stray + number / 1000,
        "sharpness": place + number / 100, "fit.glyph.right": float(not (place < 2 and number < 15)),
        "lpips": 9.0 if number < 5 and place == 0 else 3.0 if number < 10 else 1.0, "fit.corner": 1.0,
        "fit.boundary_iou": 1.0,
    }  # fmt: skip
    unmeasured = {}
    if label == "slow" and number < 4:
        del metrics["score"]
        unmeasured = {"SceneScore()": UNREAD} if number < 2 else {}
    buffer = BytesIO()
    Image.new("RGB", SIZE[::-1], (60 * place, 10 * number, 0)).save(buffer, "PNG")
    picture = store.picture_path(key)
    picture.parent.mkdir(exist_ok=True)
    picture.write_bytes(buffer.getvalue())
    measured = [repr(m) for m in maker.sweep.metrics if repr(m) not in unmeasured]
    return Row(
        status="done", seconds=seconds, timed=f"{label} {number // 6}", metrics=metrics, measured=measured,
        unmeasured=unmeasured, picture=picture.relative_to(store.folder).as_posix(), stages=[], nfe=8, flops=1e9,
        **facts,
    )  # fmt: skip


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four methods with 24 prompts each, all numbers known."""
    folder = tmp_path_factory.mktemp("scored")
    chains = {label: mf.recipes.native(size=SIZE, steps=i + 2) for i, label in enumerate(list(METHODS)[:3])}
    prompts = [mf.Prompt(f"prompt {i}", {"kind": "ab"[i % 2]}) for i in range(24)]
    metrics = [SceneScore(), Stray(), Sharpness(), Fidelity(), Lpips("a", "b")]
    sweep = mf.Sweep({**chains, "slow": paper()}, prompts, metrics=metrics)
    store, model = Store(folder), mf.toy()
    maker = Maker(sweep, model, store)
    store.open(manifest(sweep, model))
    for label in METHODS:
        for number, pair in enumerate(sweep.pairs):
            row = made(store, maker, label, pair, number)
            store.row_path(row.key).parent.mkdir(exist_ok=True)
            store.commit(row)
    return folder


def summary(folder: Path) -> dict[str, Any]:
    return summarise(*load_rows(folder), Store(folder).manifest())


def test_what_each_chain_is_and_where_it_ran(scored: Path) -> None:
    found = summary(scored)
    chains = {c["label"]: c for c in found["chains"]}
    assert chains["ref 8"]["stages"][0] == [
        "Sample", f"{SIZE[0]}x{SIZE[1]}, Euler, Shifted(2 steps)",
    ]  # fmt: skip
    assert [name for name, _ in chains["slow"]["stages"]] == [
        "Sample", "Decode", "Upscale", "Encode", "Reinject", "Refine", "Decode",
    ]  # fmt: skip
    assert found["origin"]["machines"] == [("cpu (machine 0)", 48), ("cpu (machine 1)", 48)]
    assert found["origin"]["times"] == ["2026-01-01T00:00", "2026-01-04T00:23"]
    assert found["origin"]["versions"] == [(" ".join(f"{n} {v}" for n, v in sorted(versions().items())), 96)]
    (scored / "sweep.json").rename(scored / "away")  # a folder that does not say
    try:
        assert summary(scored)["chains"][0]["stages"] == []
    finally:
        (scored / "away").rename(scored / "sweep.json")


def versions() -> dict[str, str]:
    from mrflow.sweep.grid import versions as found

    return found()


def test_rows_without_a_number_are_told_with_the_reason(scored: Path) -> None:
    slow = next(c for c in summary(scored)["chains"] if c["label"] == "slow")
    assert slow["missing"] == {
        "score": [(f"SceneScore() failed: {UNREAD}", 2), ("the metric does not apply", 2)],
    }  # fmt: skip
    assert slow["metrics"]["score"]["pictures"] == 20


def test_intervals_without_spread_are_marked(scored: Path) -> None:
    chains = {c["label"]: c for c in summary(scored)["chains"]}
    assert chains["ref 8"]["metrics"]["score"]["caveat"] == "no failure in 24: up to 0.12 could hide"
    assert chains["clean 4"]["compare"]["score"]["caveat"] == "equal in all 24: up to 0.12 could differ"
    assert chains["clean 4"]["metrics"]["fit.corner"]["caveat"] == "all 24 prompts alike: no interval"
    assert "caveat" not in chains["dirty 2"]["metrics"]["score"]
    assert "caveat" not in chains["ref 8"]["metrics"]["stray"]


def test_a_metric_says_its_scale(scored: Path) -> None:
    assert summary(scored)["scales"]["stray"] == {"aim": "lower", "low": 0, "high": 100, "unit": "%"}
    said = json.loads((scored / "sweep.json").read_text())
    said["aims"] = {
        "stray": {"aim": "higher", "low": None, "high": 7, "unit": "u"},
        "score": {"aim": "worst"},
        "lpips": 3,
    }
    found = summarise(*load_rows(scored), said)["scales"]
    assert found["stray"] == said["aims"]["stray"]
    assert found["score"]["aim"] == "higher" and found["lpips"]["aim"] == "lower"  # what makes no sense is not taken
    for wrong in (("up", None, None), ("lower", 1, 1), ("lower", 2, 1)):
        with pytest.raises(mf.PlanError, match="aim of a number must be|needs low < high"):
            Scale(*wrong)  # type: ignore[arg-type]


def test_the_copied_command_makes_a_picture_of_a_chain_in_a_file(here: Path) -> None:  # noqa: F811
    (here / "my chains.py").write_text(
        "from dataclasses import dataclass\nimport mrflow as mf\n"
        "@dataclass(frozen=True)\nclass Darker(mf.Stage[mf.Pixels, mf.Pixels]):\n"
        "    by: float = 0.5\n"
        "    def plan(self, spec, model):\n        return spec\n"
        "    def apply(self, state, out, ctx):\n        return state.data * self.by\n"
        "low = mf.recipes.native(size=(64, 64), steps=1)\n"
        "sweep = mf.Sweep({'own': low >> Darker(), 'plain': low}, ['a red circle'])\n"
    )
    code, _, err = call("sweep", "my chains.py", "--out", "s")
    assert code == 0, err
    found = data(page("s"))
    own, plain = found["chains"]
    assert own["replay"] == ["--with", str(here / "my chains.py")] and plain["replay"] == []
    picture = found["items"][0]["cells"]["own"]["picture"]
    words = ["replay", f"s/{picture}", *own["replay"], "--out", "again.png"]
    code, _, err = call(*words)
    assert code == 0, err
    with Image.open(here / "again.png") as a, Image.open(here / "s" / picture) as b:
        assert a.convert("RGB").tobytes() == b.convert("RGB").tobytes()
    assert call(*words[:2], "--out", "more.png")[0] != 0  # without the file it cannot


def test_plots_follow_the_scale(scored: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for metric, label in (("stray", "stray, %: lower is better ↓"), ("sharpness", "sharpness")):
        made = write_plots(summary(scored), tmp_path / metric, metric=metric)
        assert f"<!-- {label} -->" in made[1].read_text("utf-8")
    points = {"fast": (8.0, 5.0), "middle": (4.0, 0.2), "slow": (1.0, 0.5)}
    assert front_of(points, Scale("lower")) == ["fast", "middle"] and front_of(points, Scale("higher")) == ["fast"]
    assert front_of(points, Scale("one")) == ["fast", "middle", "slow"]
    assert front_of(points, Scale(None)) == front_of(points, Scale("uniform")) == []


def test_an_axis_keeps_to_what_can_be_and_is_not_dwarfed_by_an_interval() -> None:
    share = Scale("higher", 0, 1)
    low, high = limits([(1.0, 0.6, 1.0), (0.9, 0.8, 0.95)], share)
    assert 0.7 < low < 0.76 and 1 < high < 1.02  # the first interval goes on below
    assert limits([(0.9, 0.8, 1.5), (0.7, 0.6, 0.8)], share)[1] < 1.1
    low, high = limits([(1.0, 1.0, 1.0)], share)
    assert low < 1 < high < 1.1
    assert limits([(3.0, -50.0, 90.0), (4.0, 3.9, 4.1)], Scale(None)) == pytest.approx((1.34, 5.66))


@pytest.mark.parametrize("slowest", [0.004, 0.6, 0.77, 1.0, 3.4, 700.0])
@pytest.mark.parametrize("ratio", [1.69, 2.0, 40.0])
def test_an_axis_of_speeds_has_round_ticks(slowest: float, ratio: float) -> None:
    ticks = speed_ticks(slowest, slowest * ratio)
    assert 3 <= len(ticks) <= 12 and all(slowest <= t <= slowest * ratio for t in ticks)
    assert all(len(f"{t:g}".strip("0.").replace(".", "")) <= 3 for t in ticks)


def test_an_interval_beyond_the_axes_ends_in_an_arrow() -> None:
    pytest.importorskip("matplotlib").use("Agg")
    from matplotlib import pyplot

    _, axes = pyplot.subplots()
    axes.set(xlim=(0, 1), ylim=(0, 1))
    draw_point(axes, (0.5, 0.4, 2.0), (2.0, 0.5, 3.0), "k", "o")
    drawn = {line.get_marker(): (*map(float, line.get_xdata()), *map(float, line.get_ydata())) for line in axes.lines}
    pyplot.close()
    assert drawn[">"] == (1.0, 2.0) and drawn["^"] == (0.5, 1.0) and drawn["o"] == (0.5, 1.0)
    assert not {"<", "v"} & drawn.keys()


CONTRASTS = """
document.documentElement.dataset.theme = arguments[0];
const parse = c => { const m = c.match(/[\\d.]+/g).map(Number); return [m.slice(0, 3), m[3] ?? 1]; };
const light = c => c.map(v => (v /= 255, v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4))
  .reduce((sum, v, i) => sum + v * [.2126, .7152, .0722][i], 0);
const card = parse(getComputedStyle(document.querySelector("#heat-section")).backgroundColor)[0], out = [];
for (const cell of document.querySelectorAll("#heat td:not(:first-child)")) {
  const [shade, a] = parse(getComputedStyle(cell).backgroundColor);
  const under = light(card.map((v, i) => a * shade[i] + (1 - a) * v));
  const told = (what, style) => { const l = light(parse(style.color)[0]);
    out.push([what, (Math.max(l, under) + .05) / (Math.min(l, under) + .05)]); };
  told("text", getComputedStyle(cell));
  const before = getComputedStyle(cell, "::before");
  if (before.content !== "none") told("text", before);
  for (const e of cell.querySelectorAll("span"))
    told(/[▲▼]/.test(e.textContent) ? "arrow" : "text", getComputedStyle(e));
}
return out;
"""


def parts(html: str) -> tuple[str, str, str]:
    """A page's data, and what comes before and after it."""
    start = '<script type="application/json" id="data">'
    before, _, rest = html.partition(start)
    text, _, after = rest.partition("</script>")
    return before + start, text, "</script>" + after


@pytest.fixture
def opened(browser: Any, scored: Path) -> Iterator[Any]:  # noqa: F811
    """The page of known numbers, opened from disk."""
    path = scored / "report.html"
    path.write_text(page(scored), "utf-8")
    browser.get(path.as_uri())
    assert browser.execute_script("return document.documentElement.dataset.ready") == "yes"
    yield browser
    assert browser.get_log("browser") == []


def choose(driver: Any, name: str, value: str) -> None:
    driver.execute_script(
        "const e = document.getElementById(arguments[0]); e.value = arguments[1]; e.dispatchEvent(new Event('change'))",
        name, value,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
class TestInABrowser:
    """Chromium, on numbers that are known."""

    def front(self, driver: Any) -> list[str]:
        line = "return document.querySelector('#trade .front')?.dataset.front ?? ''"
        return [label for label in str(driver.execute_script(line)).split("|") if label]

    def test_front_colours_and_axis_follow_the_aim(self, opened: Any) -> None:
        choose(opened, "metric", "stray")
        assert self.front(opened) == ["dirty 2", "clean 4"]  # fastest first; less is better
        assert texts(opened, "#trade .ylabel") == ["stray, %: lower is better ↓"]
        kinds = opened.execute_script(
            "return Object.fromEntries([...document.querySelectorAll('#table tbody tr')].map(r => "
            "[r.cells[0].textContent.trim(), r.cells[4].className]))"
        )
        assert kinds == {"ref 8": "", "clean 4": "good", "dirty 2": "bad", "slow": "good"}
        choose(opened, "metric", "score")
        assert self.front(opened) == ["dirty 2", "clean 4"] and texts(opened, "#note") == ["0 to 1, higher is better"]
        choose(opened, "metric", "sharpness")
        assert self.front(opened) == [] and "no front is drawn" in texts(opened, "#front")[0]
        worst = texts(opened, "#worst li")
        assert len(worst) == 1 and "neither good nor bad" in texts(opened, "#ties")[0]  # the failed row alone

    def test_no_tick_lies_outside_the_range(self, opened: Any) -> None:
        for metric in ("score", "stray", "lpips", "fit.boundary_iou"):
            choose(opened, "metric", metric)
            ticks = [float(t) for t in texts(opened, "#trade .ytick")]
            assert (
                len(ticks) > 2 and min(ticks) >= 0 and (metric not in ("score", "fit.boundary_iou") or max(ticks) == 1)
            )

    def test_names_of_ties_lie_on_nothing(self, browser: Any, scored: Path, tmp_path: Path) -> None:  # noqa: F811
        """Three methods in each of four places, with names too long for the room between them."""
        before, text, after = parts(page(scored, link=True))
        found = json.loads(text)
        first = found["chains"][0]
        found["chains"] = [
            {**first, "label": f"a method of long name {i}" if i % 3 else f"m{i}", "style": [i % 10, i % 8]}
            | {"speedup": {"mean": 1 + i // 3, "low": 1 + i // 3 - 0.1, "high": 1 + i // 3 + 0.1}}
            for i in range(12)
        ]
        path = tmp_path / "ties.html"
        path.write_text(before + json.dumps(found) + after)
        size = {"width": 1280, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get(path.as_uri())
        boxes = browser.execute_script(
            "return Object.fromEntries(['.name text', '.name path', '.mark', '.err'].map(q => [q, "
            "[...document.querySelectorAll('#trade ' + q)].map(e => e.getBoundingClientRect())"
            ".map(r => [r.left, r.top, r.right, r.bottom])]))"
        )
        names, marks = boxes[".name text"], boxes[".mark"]
        assert len(names) == len(boxes[".name path"]) == len(marks) == 12  # each with its mark beside it
        room = browser.execute_script("return document.querySelector('#trade svg').getBoundingClientRect().right")
        assert max(n[2] for n in names) <= room
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        others = [*marks, *boxes[".err"]]
        for i, name in enumerate(names):
            low = [name[0] + 1, name[1] + 2, name[2] - 1, name[3] - 2]  # a line's height holds some air
            for a, b, c, d in others + names[:i]:
                assert not (a < low[2] and low[0] < c and b < low[3] and low[1] < d), texts(browser, ".name")[i]

    def test_degenerate_intervals_and_missing_numbers(self, opened: Any) -> None:
        choose(opened, "metric", "score")
        assert "no failure in 24: up to 0.12 could hide" in texts(opened, "#table .note")
        assert "4 without score" in texts(opened, "#table .note")
        said = texts(opened, "#missing p")[0]
        assert said.startswith("slow: 4 of 24 pictures have no score: SceneScore() failed: ValueError: unreadable")
        assert said.endswith("yy (2 of them); the metric does not apply (2 of them).")
        choose(opened, "metric", "fit.corner")
        assert all("[" not in t for t in texts(opened, "#table td:nth-child(4)"))

    def test_ties_are_cut(self, opened: Any) -> None:
        choose(opened, "metric", "score")  # 12 pictures at 0, all others at 1
        assert len(texts(opened, "#worst li")) == 1 + 12 and texts(opened, "#ties") == [""]
        choose(opened, "metric", "fit.glyph.right")  # 30 at 0
        assert len(texts(opened, "#worst li")) == 1 + 24
        assert texts(opened, "#ties") == ["24 of the 30 that share the worst value, 0.000."]
        choose(opened, "metric", "lpips")  # 5 at 9, 35 at 3
        assert len(texts(opened, "#worst li")) == 1 + 5
        assert texts(opened, "#ties") == ["35 more share the value 3.000."]
        choose(opened, "metric", "fit.corner")
        assert texts(opened, "#ties") == ["All 95 have 1.000: none is worse than another."]

    @pytest.mark.parametrize("width", [400, 1280])
    def test_everything_fits(self, opened: Any, width: int) -> None:
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        opened.refresh()
        wide = opened.execute_script(
            "return [document.documentElement, "
            "...document.querySelectorAll('section, .scroll, #trade, #worst, .worst .t')]"
            ".filter(e => e.scrollWidth > e.clientWidth + 1).map(e => e.id || e.className || e.tagName)"
        )
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        assert wide == []

    @pytest.mark.parametrize("theme", ["light", "dark"])
    @pytest.mark.parametrize("width", [400, 1280])
    def test_shaded_cells_can_be_read(self, opened: Any, theme: str, width: int) -> None:
        """Contrast of WCAG 2: 4.5 for numbers and their names, 3 for arrows."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        choose(opened, "metric", "score")
        said = opened.execute_script(CONTRASTS, theme)
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        assert len(said) >= 20 and min(float(c) for what, c in said if what == "text") >= 4.5
        assert min(float(c) for _, c in said) >= 3

    def test_legend_and_one_colour_a_method(self, opened: Any) -> None:
        assert texts(opened, "#legend li") == ["ref 8 (reference)", "clean 4", "dirty 2", "slow"]
        colours = opened.execute_script(
            "const of = q => [...document.querySelectorAll(q)].map(e => getComputedStyle(e).color);"
            "return [of('#legend svg'), of('#chains summary svg')]"
        )
        assert len(set(colours[0])) == 4 and colours[0] == colours[1]

    def test_the_command_names_the_folder_that_the_page_lies_in(
        self,
        browser: Any,  # noqa: F811
        scored: Path,
        tmp_path: Path,
    ) -> None:
        """Also where folder and page have moved since."""
        moved = tmp_path / "it's moved"
        shutil.copytree(scored, moved)
        (moved / "report.html").write_text(page(scored), "utf-8")
        browser.get((moved / "report.html").as_uri())
        words = shlex.split(texts(browser, "#details code")[0])
        assert words[:2] == ["mrflow", "replay"] and Path(words[2]).is_file() and moved in Path(words[2]).parents


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_twenty_thousand_rows_are_paged(browser: Any, scored: Path, tmp_path: Path) -> None:  # noqa: F811
    """As many items as 20,000 rows have; the list of pictures holds a window of them, and all can be reached."""
    before, text, after = parts(page(scored, link=True))
    found = json.loads(text)
    found["items"] = [{**found["items"][i % 24], "prompt": f"prompt {i}", "draw": i} for i in range(5000)]
    path = tmp_path / "large.html"
    path.write_text(before + json.dumps(found) + after)
    browser.get(path.as_uri())
    assert len(texts(browser, "#item option")) == 200
    assert texts(browser, "#place") == ["1 of 5000; the list shows 200 of them"]
    browser.execute_script("document.getElementById('previous').click()")
    assert texts(browser, "#place")[0].startswith("5000 of 5000") and "prompt 4999" in texts(browser, "#details p")[0]
    assert len(browser.execute_script("return [...document.querySelectorAll('img')]")) < 60


def test_no_two_methods_look_the_same() -> None:
    alike = styles(f"sigma {i}" for i in range(80))
    assert len(set(alike.values())) == 80
    assert {look.marker for look in list(alike.values())[:10]} == {0}  # a family, while there are colours
    apart = styles(("native 8", "paper", "native 12"))
    assert [tuple(look) for look in apart.values()] == [(0, 0), (1, 1), (2, 0)]


def test_the_table_of_methods(scored: Path) -> None:
    found = table(scored)
    assert found.heads == ("method", "rows", "score ↑", "lpips ↓", "sharpness", "stray, % ↓", "speed-up over ref 8 ↑")
    cells = {line[0]: line[1:] for line in found.lines}
    assert cells["dirty 2"][0] == "24 (1 failed)" and cells["ref 8"][1].endswith("1.000] *")
    assert (cells["clean 4"][-1], cells["slow"][-1]) == ("2.00", "0.50")  # the same in every row
    assert "* no failure in 24: up to 0.12 could hide" in found.notes
    assert repr(found).startswith("<4 methods: rows, score") and "<td" in found._repr_html_()
    text = str(found).splitlines()
    assert len({len(line) for line in text[:6]}) == 1 and text[1].startswith("|---")
    assert found.text(len(text[0])) == found.text() == str(found)
    narrow = found.text(60).splitlines()
    assert max(map(len, narrow)) <= 60 and [line for line in narrow if line[0] not in " *"] == [
        c[0] for c in found.lines
    ]
    assert "  stray, % ↓             5.012 [4.986, 5.038]"[:24] in "\n".join(narrow) and narrow[-1] == found.notes[-1]
    assert table(scored, "fit.corner").lines[0][2] == "1.000 *"
    with pytest.raises(mf.PlanError, match="no row of .* has the metric 'nothing'; there are score, "):
        table(scored, "nothing")


def test_a_report_is_made_where_torch_cannot_be_imported(tmp_path: Path) -> None:
    run_sweep(mf.Sweep({"n": mf.recipes.native(size=(16, 16), steps=1)}, ["a"]), mf.toy(), tmp_path)
    code = "import sys; sys.modules['torch'] = None; from mrflow.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, "report", str(tmp_path)], check=True)
    assert (tmp_path / "report.html").exists()
