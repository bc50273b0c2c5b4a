"""The report of a sweep: numbers, safety, files; and the page in a real browser."""

import csv
import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import mrflow as mf
from mrflow.errors import PlanError
from mrflow.sweep import Sharpness, Store, read, run_sweep, seed_of
from mrflow.sweep.grid import fingerprints, row_key
from mrflow.sweep.plots import write_plots
from mrflow.sweep.report import page
from mrflow.sweep.summary import load_rows, summarise
from mrflow.sweep.tables import write_csv, write_parquet
from mrflow.sweep.timing import speedup
from tests.test_cli import call, here  # noqa: F401
from tests.test_pocket import older
from tests.test_statistics import row
from tests.test_sweep import SIZE, Bad, paper

EVIL = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'>"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: Any) -> Path:
    """A sweep with three methods, two kinds of prompts, one of them hostile, and two failed rows."""
    where: Path = tmp_path_factory.mktemp("sweep") / "my sweep's"
    poison = tuple(seed_of(prompt, 1) for prompt in ("first", EVIL, "=third"))
    chains = {"native": mf.recipes.native(size=SIZE, steps=4), "staged": paper(), "poisoned": paper() >> Bad(poison)}
    prompts = [mf.Prompt("first", {"kind": "x"}), mf.Prompt(EVIL, {"kind": "y"}), mf.Prompt("=third", {"kind": "y"})]
    sweep = mf.Sweep(chains, prompts, seeds=(0, 1), metrics=[Sharpness()], pictures="stages")
    run_sweep(sweep, mf.toy(), where)
    return where


def data(html: str) -> dict[str, Any]:
    """The page's data."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    assert found
    value: dict[str, Any] = json.loads(found[1])
    return value


def test_the_page_holds_every_row_and_the_failures(folder: Path) -> None:
    html = page(folder)
    d = data(html)
    assert (d["done"], d["failed"], d["reference"], d["title"]) == (15, 3, "native", "my sweep's")
    assert [c["label"] for c in d["chains"]] == ["native", "staged", "poisoned"]
    poisoned = d["chains"][2]
    assert (poisoned["n"], poisoned["failed"]) == (6, 3)
    assert poisoned["metrics"]["sharpness"]["pictures"] == 3  # the failed ones are not zeros
    assert {i["prompt"] for i in d["items"]} == {"first", EVIL, "=third"} and len(d["items"]) == 6
    assert set(poisoned["groups"]["kind"]) == {"x", "y"}
    cells = [c for i in d["items"] for c in i["cells"].values()]
    assert all(c["picture"] in d["pictures"] for c in cells if "error" not in c)
    assert all(v.startswith("data:image/png;base64,") for v in d["pictures"].values())
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", html)  # nothing is fetched


def test_nothing_from_outside_becomes_markup(folder: Path) -> None:
    html = page(folder)
    assert EVIL not in html and "<img src=x" not in html
    assert html.count("</script>") == 2


def test_linked_pictures(folder: Path) -> None:
    d = data(page(folder, link=True))
    shown = [c["picture"] for i in d["items"] for c in i["cells"].values() if "error" not in c]
    assert len(shown) == 15 and all((folder / name).is_file() for name in shown)
    assert d["linked"] and not d["pictures"]


def test_a_page_that_would_be_too_large_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mrflow.sweep.report.MAX_BYTES", 1000)
    with pytest.raises(mf.PlanError, match="--link refers to them instead"):
        page(folder)


def test_speedup_is_a_ratio_of_sums_over_what_both_have() -> None:
    a = [replace(row(p, 0, 1.0), seconds=s) for p, s in (("p", 8.0), ("q", 4.0), ("r", 100.0))]
    b = [replace(row(p, 0, 1.0, chain="b"), seconds=s) for p, s in (("p", 1.0), ("q", 2.0), ("s", 9.0))]
    found = speedup(a, b)
    assert found is not None and found.mean == pytest.approx(12 / 3) and found.pictures == 2
    assert found.low < 4 < found.high and found.units == 2
    assert speedup(a, [row("p", 0, 1.0, status="failed")]) is None


def test_one_chain_no_reference_no_metrics(tmp_path: Path) -> None:
    run_sweep(mf.Sweep({"only": paper()}, ["a"]), mf.toy(), tmp_path)
    (tmp_path / "sweep.json").unlink()
    d = data(page(tmp_path))
    assert d["reference"] == "" and d["metrics"] == [] and d["chains"][0]["speedup"] is None


def test_what_is_no_sweep(tmp_path: Path) -> None:
    with pytest.raises(mf.PlanError, match="is no sweep's folder"):
        page(tmp_path)
    Store(tmp_path).open({"chains": {}})
    with pytest.raises(mf.PlanError, match="has no rows yet"):
        page(tmp_path)


def test_rows_of_another_model_are_left_out(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    """One folder, filled with two versions of the weights: a table that mixed them would compare nothing."""
    sweep = mf.Sweep({"one": mf.recipes.native(size=SIZE, steps=1)}, ["a", "b"], metrics=[Sharpness()])
    for name in (older(tmp_path_factory.mktemp("weights"), "pocket-0"), "pocket"):
        run_sweep(sweep, mf.load(name, device="cpu"), tmp_path)
    rows, _ = load_rows(tmp_path)
    assert {row.weights for row in rows} == {mf.load("pocket", device="cpu").info.version} and len(rows) == 2
    assert "2 rows of other weights are left out: pocket-0+" in caplog.text


def test_rows_of_older_settings_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A chain that was changed under its label: the old rows stay in the folder and out of the table."""

    def sweep(steps: int, **other: Any) -> mf.Sweep:
        chains = {"one": mf.recipes.native(size=SIZE, steps=1), "other": mf.recipes.native(size=SIZE, steps=steps)}
        return mf.Sweep(chains, ["a", "b"], **other)

    for steps in (2, 3):
        run_sweep(sweep(steps), mf.toy(), tmp_path)
    rows, _ = load_rows(tmp_path)
    assert [(row.chain, row.nfe) for row in rows] == [("one", 1)] * 2 + [("other", 3)] * 2
    assert "left out: 2 rows of other settings or versions" in caplog.text
    run_sweep(mf.Sweep({"third": mf.recipes.native(size=SIZE, steps=4)}, ["a"]), mf.toy(), tmp_path)
    assert [row.nfe for row in load_rows(tmp_path)[0]] == [1, 1, 3, 3, 4]  # what a folder had before stays its own
    run_sweep(sweep(3, negative="no"), mf.toy(), tmp_path)
    assert [row.negative for row in load_rows(tmp_path)[0]] == ["no"] * 4
    said = json.loads((tmp_path / "sweep.json").read_text())
    (tmp_path / "sweep.json").write_text(json.dumps({**said, "versions": {}}))
    with pytest.raises(PlanError, match="has no rows of the settings that it has now"):
        load_rows(tmp_path)


def test_rows_of_shared_noise_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A row whose seed is its number, as when prompts shared their noise, has the key that such a row had."""
    sweep, folder = mf.Sweep({"one": mf.recipes.native(size=SIZE, steps=1)}, ["a"]), Store(tmp_path)
    run_sweep(sweep, mf.toy(), tmp_path)
    one = read(tmp_path)[0]
    made_by = one.versions
    key = row_key(fingerprints(sweep.chains["one"])[-1], one.model, one.weights, "a", one.negative, 0, made_by)
    folder.commit(replace(one, key=key, seed=0))
    assert [row.seed for row in load_rows(tmp_path)[0]] == [seed_of("a", 0)]
    assert "left out: 1 row of other settings or versions" in caplog.text


def test_tables_and_plots(folder: Path, tmp_path: Path) -> None:
    rows, reference = load_rows(folder)
    write_csv(rows, tmp_path / "t.csv")
    with (tmp_path / "t.csv").open(newline="") as f:
        lines = list(csv.DictReader(f))
    assert len(lines) == 18 and {line["tag.kind"] for line in lines} == {"x", "y"}
    assert {line["prompt"] for line in lines} == {"first", EVIL, "'=third"}  # no formula for a spreadsheet
    by_key = {r.key: r for r in rows}
    for line in lines:
        have = by_key[line["key"]].metrics.get("sharpness")
        assert line["metric.sharpness"] == ("" if have is None else str(have))
    parquet = pytest.importorskip("pyarrow.parquet")
    write_parquet(rows, tmp_path / "t.parquet")
    table = parquet.read_table(tmp_path / "t.parquet")
    assert table.num_rows == 18 and table.column("metric.sharpness").null_count == 3
    write_parquet([row for row in rows if row.done], tmp_path / "done.parquet")  # none of which has an error
    assert parquet.read_table(tmp_path / "done.parquet").schema.field("error").type == table.schema.field("error").type
    pytest.importorskip("matplotlib")
    made = write_plots(summarise(rows, reference), tmp_path / "plot")
    assert [p.suffix for p in made] == [".png", ".svg"] and all(p.stat().st_size > 5000 for p in made)


def test_the_command(folder: Path, here: Path) -> None:  # noqa: F811
    shutil.copytree(folder, "s")
    code, out, err = call("report", "s", "--csv")
    assert code == 0 and out.split() == ["s/report.html", "s/report.csv"] and "18 rows, 3 failed" in err
    for words, text in (
        (("nowhere",), "is no sweep's folder"),
        (("s", "--out", "x.pdf"), "--out must end in .html"),
        (("s", "--link", "--out", "x.html"), "the page must lie in s"),
    ):
        code, _, err = call("report", *words)
        assert code == 2 and text in err


FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium, or a skip that says what is missing."""
    selenium = pytest.importorskip("selenium")
    binary = next((p for p in ("chromium", "chromium-browser", "google-chrome") if shutil.which(p)), None)
    program = shutil.which("chromedriver")
    if binary is None or program is None:
        pytest.skip("no Chromium and chromedriver here (Debian: chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    assert selenium
    options = webdriver.ChromeOptions()
    options.binary_location = str(shutil.which(binary))
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(program))
    yield driver
    driver.quit()


@pytest.fixture
def opened(browser: Any, folder: Path) -> Any:
    """The page, opened from disk."""
    path = folder / "report.html"
    path.write_text(page(folder), "utf-8")
    browser.get(path.as_uri())
    assert browser.execute_script("return document.documentElement.dataset.ready") == "yes"
    yield browser
    assert browser.get_log("browser") == []  # no error on the console, no request that failed
    assert browser.execute_script("return window.broken") is None
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert not [name for name in loaded if not name.startswith("data:")]


def texts(driver: Any, query: str) -> list[str]:
    """The text of what a selector finds."""
    found: list[str] = driver.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent.trim())", query
    )
    return found


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
class TestInABrowser:
    """Clicks, sorts, slides, finds; light and dark; narrow."""

    def test_sorting(self, opened: Any) -> None:
        assert texts(opened, "#table tbody td:first-child") == ["native", "poisoned", "staged"]
        head = "#table thead th:nth-child(3)"
        opened.execute_script("document.querySelector(arguments[0] + ' button').click()", head)
        assert texts(opened, "#table tbody td:first-child")[0] == "poisoned"
        assert opened.execute_script("return document.querySelector(arguments[0]).ariaSort", head) == "descending"
        opened.execute_script("document.querySelector(arguments[0] + ' button').click()", head)
        assert texts(opened, "#table tbody td:first-child")[-1] == "poisoned"
        focused = opened.execute_script("return document.activeElement.textContent")
        assert focused == "failed"  # the keyboard stays where it was

    def test_the_slider_by_keyboard(self, opened: Any) -> None:
        from selenium.webdriver.common.by import By
        from selenium.webdriver.common.keys import Keys

        slider = opened.find_element(By.ID, "range")
        before = opened.execute_script("return document.getElementById('slider').style.getPropertyValue('--at')")
        slider.send_keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
        after = opened.execute_script("return document.getElementById('slider').style.getPropertyValue('--at')")
        assert (before, after) == ("50%", "52%")
        assert len(texts(opened, "#slider img")) == 2
        sizes = opened.execute_script("return [...document.querySelectorAll('#slider img')].map(i => i.naturalWidth)")
        assert sizes == [SIZE[1], SIZE[1]]

    def test_finding_and_stepping(self, opened: Any) -> None:
        from selenium.webdriver.common.by import By

        box = opened.find_element(By.ID, "find")
        box.send_keys("FIRST")
        assert len(texts(opened, "#item option")) == 2 and texts(opened, "#item option")[0].startswith("first")
        opened.find_element(By.ID, "next").click()
        assert f"draw 1 · seed {seed_of('first', 1)}" in texts(opened, "#details p")[0]
        box.send_keys(" nothing like it")
        assert texts(opened, "#details p") == ["No prompt has these words."]

    def test_failures_come_first_and_open(self, opened: Any) -> None:
        first = texts(opened, "#worst li")[0]
        assert "failed" in first and "this seed is poison" in first
        opened.execute_script("document.querySelector('#worst button').click()")
        assert any(t.startswith("failed: ") and "this seed is poison" in t for t in texts(opened, "#details p"))
        assert opened.execute_script("return document.getElementById('left').value") == "poisoned"

    def test_stages_replay_and_hostile_prompts(self, opened: Any) -> None:
        from selenium.webdriver.common.by import By

        opened.find_element(By.ID, "find").send_keys("onerror")
        opened.execute_script(
            "const l = document.getElementById('left'); l.value = 'staged'; l.dispatchEvent(new Event('change'))"
        )
        assert EVIL in texts(opened, "#details p")[0]
        assert texts(opened, "#details figcaption") == ["Decode", "Upscale"]
        command = texts(opened, "#details code")[0]
        assert command.startswith("mrflow replay '") and "my sweep'\\''s" in command

    def test_the_chart_and_the_categories(self, opened: Any) -> None:
        labels = opened.execute_script(
            "return [...document.querySelectorAll('#trade .point')].map(p => p.getAttribute('aria-label'))"
        )
        assert len(labels) == 3 and all("sharpness" in text and "times as fast" in text for text in labels)
        assert texts(opened, "#heat thead th") == ["method", "x", "y"]

    def test_dark_and_light(self, opened: Any) -> None:
        from selenium.webdriver.common.by import By

        def paper_of() -> str:
            return str(opened.execute_script("return getComputedStyle(document.body).backgroundColor"))

        light = paper_of()
        opened.find_element(By.ID, "theme").click()
        dark = paper_of()
        assert light != dark and sum(map(int, re.findall(r"\d+", dark)[:3])) < 120
        opened.execute_cdp_cmd(
            "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": "dark"}]}
        )
        opened.refresh()
        assert paper_of() == dark
        opened.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})

    def beside_the_facts(self, opened: Any) -> None:
        facts, button, right = opened.execute_script(
            "return ['facts', 'theme'].map(e => document.getElementById(e).getBoundingClientRect().toJSON())"
            ".concat(document.querySelector('main').getBoundingClientRect().right)"
        )
        assert button["left"] >= facts["right"] and button["top"] < facts["bottom"]
        assert right - button["right"] <= 21

    def test_the_theme_stands_at_the_right_whatever_the_facts_say(self, opened: Any) -> None:
        for words in ("few", "a great many words " * 20):
            opened.execute_script("document.getElementById('facts').textContent = arguments[0]", words)
            self.beside_the_facts(opened)

    def test_a_narrow_screen_does_not_scroll_sideways(self, opened: Any) -> None:
        size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        opened.refresh()
        assert opened.execute_script("return document.documentElement.scrollWidth") <= 400
        self.beside_the_facts(opened)
        opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_rows_are_read_back_as_they_were_written(folder: Path) -> None:
    rows = read(folder)
    assert len(rows) == 18 and sum(not r.done for r in rows) == 3


def test_parts_of_a_score_are_plotted_by_method(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        replace(
            row(p, 0, 1.0, chain=c), metrics={"score": 0.5, "score.a": 0.4} | ({"score.b": 0.6} if p == "p" else {})
        )
        for c in ("ref", "other")
        for p in ("p", "q")
    ]
    made = write_plots(summarise(rows, "ref"), tmp_path / "plot")
    assert [p.name for p in made] == ["plot.png", "plot.svg", "plot-categories.png", "plot-categories.svg"]
    assert all(p.stat().st_size > 3000 for p in made)
