"""Intervals cover, pairs are paired, and metrics against scipy and closed forms."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from scipy.ndimage import gaussian_filter

import mrflow as mf
from mrflow import metrics
from mrflow.sweep import ClipScore, Lpips, Measured, ReadText, Row, compare, interval, pareto, seed_of, values
from mrflow.sweep.significance import clopper_pearson, holm, sign_flip, student
from mrflow.sweep.statistics import ConfidenceInterval, compare_differences, family
from mrflow.sweep.timing import seconds, speedup


def row(prompt: str, draw: int, value: float | None, *, chain: str = "a", status: str = "done", kind: str = "x") -> Row:
    """A row with one metric."""
    return Row(
        key=f"{chain}{prompt}{draw}", status=status, chain=chain, model="toy", weights="", prompt=prompt, negative="",
        seed=seed_of(prompt, draw), draw=draw, tags={"kind": kind}, metrics={} if value is None else {"m": value},
        seconds=2.0,
    )  # fmt: skip


def test_the_interval_covers_as_often_as_it_says() -> None:
    """400 draws of 60 prompts with 3 alike pictures each, true mean 0: a 90 % interval holds it about 90 times in 100.

    Were pictures resampled instead of prompts, it would hold it far less often.
    """
    rng, held, naive = np.random.default_rng(1), 0, 0
    for _ in range(400):
        prompts = rng.normal(0, 1, 60)[:, None] + rng.normal(0, 0.1, (60, 3))
        found = interval({str(i): list(v) for i, v in enumerate(prompts)}, level=0.9, draws=500)
        held += found.low <= 0 <= found.high
        flat = interval({str(i): [v] for i, v in enumerate(prompts.ravel())}, level=0.9, draws=500)
        naive += flat.low <= 0 <= flat.high
    assert 0.85 <= held / 400 <= 0.95
    assert naive / 400 < 0.75


def test_the_interval_of_a_mean_is_that_of_the_normal_law() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(3, 2, 500)
    found = interval({str(i): [v] for i, v in enumerate(x)})
    half = 1.96 * x.std() / len(x) ** 0.5
    assert found.mean == pytest.approx(x.mean())
    assert (found.low, found.high) == (
        pytest.approx(x.mean() - half, abs=0.02),
        pytest.approx(x.mean() + half, abs=0.02),
    )
    assert (found.units, found.pictures) == (500, 500)


@given(st.lists(st.lists(st.floats(-5, 5), min_size=1, max_size=4), min_size=1, max_size=8), st.floats(-3, 3))
def test_intervals_hold_the_mean_and_move_with_it(groups: list[list[float]], by: float) -> None:
    table = {str(i): g for i, g in enumerate(groups)}
    found = interval(table, draws=200)
    assert (found.low <= found.mean + 1e-9 and found.mean <= found.high + 1e-9) or len(groups) < 4
    moved = interval({k: [v + by for v in g] for k, g in table.items()}, draws=200)
    assert moved.mean == pytest.approx(found.mean + by, abs=1e-9) and moved.low == pytest.approx(
        found.low + by, abs=1e-9
    )


def test_a_difference_is_called_one_only_when_its_interval_says_so() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(0, 1, 40)
    a = [
        row(f"p{i}", s, base[i] + 0.1 + rng.normal(0, 0.05), kind="x" if i < 20 else "y")
        for i in range(40)
        for s in (0, 1)
    ]
    b = [row(f"p{i}", s, base[i] + rng.normal(0, 0.05), kind="x" if i < 20 else "y") for i in range(40) for s in (0, 1)]
    found = compare(a, b, "m", by="kind")
    assert found.verdict == "higher" and found.difference.mean == pytest.approx(0.1, abs=0.02)
    assert compare(b, a, "m").verdict == "lower"
    assert set(found.groups) == {"x", "y"} and all(g.verdict == "higher" for g in found.groups.values())
    # Unpaired, the same numbers show nothing: prompts differ by far more than the methods.
    alone = interval({str(i): [v] for i, v in enumerate(values(a, "m").values()) for v in [np.mean(v)]})
    assert alone.low < 0 < alone.high
    assert compare(a, a, "m").verdict == "no difference shown"
    assert compare(a[:2], b[:2], "m").verdict == "too few prompts"  # one prompt shows nothing about others


@given(
    st.lists(st.floats(-3, 3).map(lambda v: round(v, 9)), min_size=2, max_size=9)
)  # ties: sums within 1e-12, of scipy within 1e-14
def test_sign_flips_are_those_of_scipy(x: list[float]) -> None:
    want = stats.permutation_test((np.array(x),), np.sum, permutation_type="samples", n_resamples=np.inf).pvalue
    assert sign_flip(x) == pytest.approx(want)


def test_drawn_sign_flips_are_near_those_of_all_patterns() -> None:
    rng = np.random.default_rng(3)
    for mean in (0.1, 0.5, 1.0):
        x = list(rng.normal(mean, 1, 14))
        assert sign_flip(x, flips=5000) == pytest.approx(sign_flip(x, flips=2**14), abs=0.02)
    assert sign_flip([1.0] * 200) == pytest.approx(1 / 20_001)  # never 0
    assert sign_flip([0.0] * 30) == 1.0 and sign_flip([0.0, 1.0]) == 1.0


@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))), st.floats(0.5, 0.999))
def test_exact_intervals_are_those_of_scipy(hits: tuple[int, int], level: float) -> None:
    want = stats.binomtest(*hits).proportion_ci(level, method="exact")
    assert clopper_pearson(*hits, level) == pytest.approx((want.low, want.high), abs=1e-9)


@given(st.integers(1, 200), st.floats(0.5, 0.999))
def test_students_law_is_that_of_scipy(freedom: int, level: float) -> None:
    assert student(level, freedom) == pytest.approx(stats.t.ppf((1 + level) / 2, freedom), rel=1e-5)


def test_holm() -> None:
    """The worked order: times 4, 3, 2, 1, and never below one that came before."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.9, 0.8]) == [1.0, 1.0]


def test_where_all_succeed_the_interval_is_exact() -> None:
    """48 of 48 is not certainty; the bootstrap, which can draw nothing else, says that it is."""
    all_of = {str(i): [1.0, 1.0] for i in range(48)}
    exact = interval(all_of, share=True)
    assert (exact.mean, exact.low, exact.high) == pytest.approx((1.0, 0.025 ** (1 / 48), 1.0))
    assert interval(all_of).low == 1.0
    half = interval({str(i): [float(i < 3)] for i in range(10)}, share=True)
    assert (half.low, half.high) == pytest.approx((0.0667, 0.6525), abs=1e-4)
    mixed = interval({"a": [1.0, 0.0], "b": [1.0]}, share=True)  # no plain shares: as before
    assert mixed == interval({"a": [1.0, 0.0], "b": [1.0]})
    same = compare_differences("score", {str(i): [0.0] for i in range(48)}).difference
    assert -same.low == same.high == pytest.approx(1 - 0.025 ** (1 / 48))
    assert (
        compare_differences("sharpness", {str(i): [0.0] for i in range(48)}).difference.high == 0
    )  # no share: nothing is known


def null(rng: np.random.Generator, prompts: int) -> dict[str, list[float]]:
    """Differences between two methods that are alike: most pictures succeed, some fail badly."""
    a, b = (np.where(rng.random(prompts) < 0.2, rng.exponential(1, prompts), 0.05 * rng.random(prompts)) for _ in "ab")
    return {str(i): [float(x)] for i, x in enumerate(b - a)}


def test_a_table_of_methods_that_are_alike_shows_an_arrow_in_at_most_6_per_cent() -> None:
    """500 tables of 8 comparisons. Uncorrected tests, and bootstrap intervals of few captions, show far more."""
    rng, tables = np.random.default_rng(5), 500
    corrected = alone = 0
    for _ in range(tables):
        found = {i: compare_differences("m", null(rng, 24), draws=1) for i in range(8)}
        alone += any(one.verdict in ("higher", "lower") for one in found.values())
        corrected += any(one.verdict in ("higher", "lower") for one in family(found).values())
    assert corrected / tables <= 0.06
    assert alone / tables > 0.25
    ends = [interval(null(rng, 7), draws=400) for _ in range(1000)]
    assert sum(one.low > 0 or one.high < 0 for one in ends) / 1000 > 0.08


SKEWED = {  # differences of mean 0
    "exponential": lambda rng, n: rng.exponential(1, n) - 1,
    "one in five": lambda rng, n: np.where(rng.random(n) < 0.2, rng.exponential(1, n), 0) - 0.2,
}


@pytest.mark.parametrize(
    ("law", "at_20", "at_100"), [("exponential", (0.06, 0.14), 0.09), ("one in five", (0.13, 0.27), 0.14)]
)
def test_skewed_differences_show_more_false_verdicts_the_fewer_the_prompts(
    law: str, at_20: tuple[float, float], at_100: float
) -> None:
    """What docs/how-to/read-a-report.md says of a single test."""
    rng = np.random.default_rng(0)
    few, many = (np.mean([sign_flip(list(SKEWED[law](rng, n))) <= 0.05 for _ in range(400)]) for n in (20, 100))
    assert at_20[0] < few < at_20[1]
    assert many < min(few, at_100)


def test_a_family_still_finds_what_differs() -> None:
    rng = np.random.default_rng(6)
    found = {i: compare_differences("m", {k: [v[0] + (i == 3)] for k, v in null(rng, 24).items()}) for i in range(12)}
    judged = family(found)
    assert {i for i, one in judged.items() if one.verdict == "higher"} == {3} and judged[3].family == 12
    assert judged[3].p is not None and judged[3].adjusted == pytest.approx(12 * judged[3].p)


def test_few_prompts_get_no_verdict_and_do_not_weaken_others() -> None:
    many, few = ({str(i): [1.0 + i / 100] for i in range(n)} for n in (20, 19))
    found = family(
        {"many": compare_differences("m", many), **{f"few {i}": compare_differences("m", few) for i in range(9)}}
    )
    assert found["many"].verdict == "higher" and found["many"].family == 1
    assert found["few 0"].verdict == "too few prompts" and found["few 0"].adjusted is None


def timed(chain: str, times: list[float], size: int = 4) -> list[Row]:
    """Rows of timed batches: each row of a batch has its seconds."""
    return [
        replace(row(f"{i}.{j}", 0, 1.0, chain=chain), seconds=t, timed=f"{chain}{i}")
        for i, t in enumerate(times)
        for j in range(size)
    ]


def test_the_unit_of_a_time_is_its_batch() -> None:
    """Intervals cover as often as they say; of rows, which repeat the time of their batch, they would be too narrow."""
    rng, held, naive = np.random.default_rng(2), 0, 0
    for _ in range(200):
        rows = timed("a", list(np.exp(rng.normal(0, 0.1, 6))))
        found, wrong = seconds(rows), seconds([replace(r, timed="") for r in rows])
        assert found is not None and wrong is not None and (found.units, found.pictures, wrong.units) == (6, 24, 24)
        true = np.exp(0.005)
        held, naive = held + (found.low <= true <= found.high), naive + (wrong.low <= true <= wrong.high)
    assert 0.91 <= held / 200 <= 0.99
    assert naive / 200 < 0.75


def test_a_speed_up_pairs_batches() -> None:
    slow, fast = timed("a", [8.0, 12.0, 10.0]), timed("b", [4.0, 6.0, 5.0])
    found = speedup(slow, fast)
    assert found is not None and (found.mean, found.low, found.high, found.units) == pytest.approx((2, 2, 2, 3))
    apart = speedup(slow, timed("b", [6.0, 4.0, 5.0]))
    assert apart is not None and apart.low < 1.5 and apart.mean == pytest.approx(2)
    other = speedup(slow, timed("b", [5.0], size=12))  # one batch over all of theirs, by name
    assert other is not None and np.isnan(other.low) and other.units == 1 and str(other) == "1.600"


def test_failed_and_missing_rows_are_counted_never_averaged_as_zero() -> None:
    a = [row("p", 0, 0.8), row("q", 0, 0.6), row("r", 0, None, status="failed"), row("s", 0, None)]
    b = [row("p", 0, 0.7), row("q", 0, 0.5), row("r", 0, 0.1)]
    assert values(a, "m") == {"p": [0.8], "q": [0.6]}
    found = compare(a, b, "m")
    assert found.difference.mean == pytest.approx(0.1) and found.missing == 1
    assert values(a, "seconds") == {"p": [2.0], "q": [2.0], "s": [2.0]}
    with pytest.raises(mf.PlanError, match="no prompt and draw has 'n' in both"):
        compare(a, b, "n")
    with pytest.raises(mf.PlanError, match="no value to average"):
        interval({})
    with pytest.raises(mf.PlanError, match="level must lie"):
        interval({"a": [1.0]}, level=1.0)


@given(st.dictionaries(st.text(max_size=3), st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_the_front_is_what_nothing_beats(points: dict[str, tuple[int, int]]) -> None:
    front = pareto(points)
    for cost, quality in points.values():
        beaten = any(c <= cost and q >= quality and (c, q) != (cost, quality) for c, q in points.values())
        twin = any(points[n] == (cost, quality) for n in front)
        assert (not beaten) == twin
    assert [points[n] for n in front] == sorted(points[n] for n in front)


def test_ssim_is_that_of_scipy() -> None:
    """Gaussian windows of 11 pixels through scipy.ndimage, whole windows only."""
    g = torch.Generator().manual_seed(0)
    x = torch.rand(2, 3, 24, 31, generator=g)
    y = (x + 0.2 * torch.randn(x.shape, generator=g)).clamp(0, 1)

    def one(a: Any, b: Any) -> float:
        def mean(z: Any) -> Any:
            return gaussian_filter(z, 1.5, truncate=10 / 3)[5:-5, 5:-5]

        ma, mb = mean(a), mean(b)
        va, vb, ab = mean(a * a) - ma**2, mean(b * b) - mb**2, mean(a * b) - ma * mb
        top = (2 * ma * mb + 1e-4) * (2 * ab + 9e-4)
        return float((top / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4))).mean())

    want = [
        np.mean([one(a.double().numpy(), b.double().numpy()) for a, b in zip(i, j, strict=True)])
        for i, j in zip(x, y, strict=True)
    ]
    assert metrics.ssim(x, y).tolist() == pytest.approx(want, abs=1e-5)
    assert torch.allclose(metrics.ssim(x, x), torch.ones(2))
    with pytest.raises(mf.PlanError, match="at least 11 pixels"):
        metrics.ssim(x[..., :8], x[..., :8])


def test_power_ratio_sees_which_frequencies_are_lost() -> None:
    """A wave of 1/4 cycle a pixel halved: its ring has a quarter of the power, the coarse ring all of it."""
    at = torch.arange(64.0)
    coarse, fine = torch.cos(2 * torch.pi * at / 32), torch.cos(2 * torch.pi * at / 4)
    full = (0.5 + 0.1 * (coarse + fine)).expand(1, 3, 64, 64)
    half = (0.5 + 0.1 * (coarse + 0.5 * fine)).expand(1, 3, 64, 64)
    ratio = metrics.power_ratio(half, full, bands=4)[0]
    assert float(ratio[0]) == pytest.approx(1, abs=1e-3) and float(ratio[2]) == pytest.approx(0.25, abs=1e-3)


def made(**more: Any) -> Measured:
    """A picture to measure."""
    x = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(0))
    return Measured(**({"pixels": x, "prompt": "a cat", "seed": 0, "tags": {}, "model": mf.toy()} | more))


def test_text_is_read_by_a_function_of_ones_own() -> None:
    read = ReadText(lambda pixels: "CAP")
    assert read(made()) == {}
    assert read(made(tags={"text": "CAT"})) == {"text": pytest.approx(2 / 3), "text.exact": 0.0}
    assert ReadText(lambda pixels: "CAT")(made(tags={"text": "CAT"})) == {"text": 1.0, "text.exact": 1.0}
    assert ReadText(lambda pixels: "much too long")(made(tags={"text": "CAT"}))["text"] == 0


def test_lpips_against_its_equation(tmp_path: Path) -> None:
    """Random AlexNet and heads: an nn.Sequential of torch's own layers and the published equation are the oracle."""
    from torch import nn

    torch.manual_seed(0)
    sizes = ((3, 8, 11), (8, 12, 5), (12, 16, 3), (16, 12, 3), (12, 8, 3))
    strides, pads = (4, 1, 1, 1, 1), (2, 2, 1, 1, 1)
    convs = [nn.Conv2d(i, o, k, s, p) for (i, o, k), s, p in zip(sizes, strides, pads, strict=True)]
    state = {
        f"features.{n}.{k}": v for n, c in zip((0, 3, 6, 8, 10), convs, strict=True) for k, v in c.state_dict().items()
    }
    heads = {f"lin{i}.model.1.weight": torch.rand(1, o, 1, 1) for i, (_, o, _) in enumerate(sizes)}
    torch.save(state, tmp_path / "alex.pth")
    torch.save(heads, tmp_path / "lin.pth")
    measure = Lpips(str(tmp_path / "alex.pth"), str(tmp_path / "lin.pth"))
    x, y = torch.rand(2, 3, 96, 80, generator=torch.Generator().manual_seed(1))
    pool, total = nn.MaxPool2d(3, 2), torch.zeros(())
    mean, std = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = (((2 * z - 1) - mean[:, None, None])[None] / std[:, None, None] for z in (x, y))
    with torch.no_grad():
        for i, conv in enumerate(convs):
            a, b = (conv(pool(z) if i in (1, 2) else z).relu() for z in (a, b))
            unit = [z / (z.norm(dim=1, keepdim=True) + 1e-10) for z in (a, b)]
            total = total + ((unit[0] - unit[1]) ** 2 * heads[f"lin{i}.model.1.weight"]).sum(1).mean()
        found = measure(made(pixels=x, reference=y))
    assert found["lpips"] == pytest.approx(float(total), rel=1e-4)
    assert measure(made(pixels=x, reference=x))["lpips"] == 0 and measure(made(pixels=x)) == {}
    with pytest.raises(mf.WeightsError, match="are they AlexNet and LPIPS"):
        Lpips(str(tmp_path / "lin.pth"), str(tmp_path / "alex.pth"))(made(pixels=x, reference=y))


@pytest.mark.filterwarnings("ignore")
def test_clip_score_is_the_cosine_of_a_local_model(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    from tests.tiny import clip_tokenizer

    folder = tmp_path / "clip"
    size = clip_tokenizer(folder)
    text = CLIPTextConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, vocab_size=size
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, image_size=32, patch_size=8
    )
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=8)).eval()
    model.save_pretrained(folder)
    found = ClipScore(str(folder))(made())["clip"]
    assert 0 <= found <= 100
    with pytest.raises(mf.WeightsError, match="there is no CLIP model in"):
        ClipScore(str(tmp_path / "gone"))(made())


def test_many_prompts_are_judged_by_limit_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    """With many prompts nothing is drawn at random, and what is said is what drawing would have said."""
    rng = np.random.default_rng(0)
    skewed = {f"{i}": list(rng.exponential(1, 1 + i % 3)) for i in range(1500)}
    shifted = list(rng.standard_t(3, 700) + 0.11)
    exact, p = interval(skewed), sign_flip(shifted)
    monkeypatch.setattr("mrflow.sweep.statistics.MANY", 10**9)
    monkeypatch.setattr("mrflow.sweep.significance.MANY", 10**9)
    drawn = interval(skewed, draws=4000)
    assert exact.mean == pytest.approx(drawn.mean)
    width = drawn.high - drawn.low
    assert exact.low == pytest.approx(drawn.low, abs=0.06 * width)
    assert exact.high == pytest.approx(drawn.high, abs=0.06 * width)
    assert 1e-3 < p == pytest.approx(sign_flip(shifted), rel=0.15)


def test_an_interval_is_written_in_the_form_that_is_asked_for() -> None:
    """Where nothing varies, or there are too few to say, the mean stands alone."""
    some = ConfidenceInterval(0.125, -0.25, 0.5, 4, 4)
    assert (str(some), f"{some:.1f}", f"{some:+.2f}") == (
        "0.125 [-0.250, 0.500]", "0.1 [-0.2, 0.5]", "+0.12 [-0.25, +0.50]"
    )  # fmt: skip
    for ends in ((2.0, 2.0), (float("nan"), float("nan"))):
        alone = ConfidenceInterval(2.0, *ends, 4, 4)
        assert (str(alone), f"{alone:.1f}") == ("2.000", "2.0")
