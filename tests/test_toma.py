"""Token merging: exact where tokens are alike, a mean elsewhere, and nothing at ratio 0."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import mrflow as mf
from mrflow.caches import ToMA
from mrflow.caches.toma import chosen, destinations
from mrflow.cost import forward_flops
from mrflow.errors import PlanError
from mrflow.models.layers import Rope
from tests.parity.test_flux import relative
from tests.parity.test_official import pipeline, words
from tests.test_qwen import repo as qwen_repo  # noqa: F401  (fixture)

pytestmark = pytest.mark.filterwarnings("ignore")
GRIDS = st.tuples(st.integers(1, 9), st.integers(1, 9))


def rope(tokens: int, *, text: int = 3) -> Rope:
    rows = torch.arange(float(text + tokens))[:, None]
    return Rope(rows, -rows)


@given(GRIDS, st.floats(0, 0.95), st.integers(1, 4), st.integers(0, 99))
def test_merging_is_a_weighted_mean_on_any_grid(grid: tuple[int, int], ratio: float, tile: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    h, w = grid
    x = torch.randn(2, h * w, 6, generator=g)
    how = chosen(x, grid, rope(h * w), ToMA(ratio, tile))
    ones = torch.ones(2, h * w, 1)
    fewer = how.down(ones)
    torch.testing.assert_close(fewer, torch.ones_like(fewer))  # rows sum to 1
    torch.testing.assert_close(how.up(fewer), ones)  # and so do the shares that come back
    assert how.rope.cos.shape == (2, 3 + fewer.shape[1], 1)
    assert fewer.shape[1] <= h * w
    places = how.rope.cos[0, :, 0]
    assert places[:3].tolist() == [0, 1, 2]  # text keeps its positions
    assert len(set(places.tolist())) == len(places)  # no destination twice


@given(st.integers(0, 99), st.integers(1, 16))
def test_destinations_are_greedy_facility_location(seed: int, k: int) -> None:
    g = torch.Generator().manual_seed(seed)
    unit = torch.nn.functional.normalize(torch.randn(16, 5, generator=g), dim=-1)
    likeness = (unit @ unit.T)[None, None]
    found = destinations(likeness, k)[0, 0].tolist()
    chosen_: list[int] = [int(likeness[0, 0].sum(-1).argmax())]
    while len(chosen_) < k:  # by the definition, one candidate at a time
        values = {j: float(likeness[0, 0][:, [*chosen_, j]].max(1).values.sum()) for j in range(16) if j not in chosen_}
        chosen_.append(max(values, key=lambda j: values[j]))
    cover = [float(likeness[0, 0][:, picks].max(1).values.sum()) for picks in (found, chosen_)]
    assert cover[0] == pytest.approx(cover[1], abs=1e-4)
    assert len(set(found)) == k


def test_alike_tokens_come_back_exactly() -> None:
    """Two clusters in a tile, two destinations: what is constant over each cluster is not changed."""
    a, b = torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0])
    x = torch.stack([a, b, b, a])[None]
    how = chosen(x, (2, 2), rope(4), ToMA(0.5, 2))
    y = torch.stack([a, b, b, a])[None] * 7
    torch.testing.assert_close(how.up(how.down(y)), y)
    torch.testing.assert_close(how.up(how.down(x)), x)


def test_ratio_zero_keeps_every_token() -> None:
    x = torch.randn(1, 16, 64, generator=torch.Generator().manual_seed(0))
    how = chosen(x, (4, 4), rope(16), ToMA(0.0))
    assert relative(how.up(how.down(x)), x) < 1e-3


def model_of(family: str, tmp_path: Path, qwen_repo: Path) -> tuple[Any, dict[str, Any]]:  # noqa: F811
    if family == "flux":
        pipeline(tmp_path, guidance=True)
        return mf.load(tmp_path, device="cpu"), {"condition": mf.Condition(words(1))}
    return mf.load(qwen_repo if family == "qwen" else "pocket", device="cpu"), {}


@pytest.mark.parametrize("family", ["flux", "qwen", "pocket"])
def test_on_every_model(family: str, tmp_path: Path, qwen_repo: Path) -> None:  # noqa: F811
    model, more = model_of(family, tmp_path, qwen_repo)
    prompt = "" if more else "a big red circle"

    def draw(cache: Any) -> mf.Result:
        return mf.run(mf.Sample(64, 96, mf.Shifted(3), cache=cache) >> mf.Decode(), model, prompt, **more)

    plain, none = draw(None), draw(ToMA(0.0))
    assert relative(none.pixels, plain.pixels) < 1e-5
    late = draw(ToMA(0.5, skip=99))
    assert relative(late.pixels, plain.pixels) < 1e-5  # no block is merged
    merged = draw(ToMA(0.5, every=1, skip=0))
    assert relative(merged.pixels, plain.pixels) > 1e-4
    assert merged.nfe == plain.nfe
    planned = mf.plan(merged.chain, model.info)
    assert merged.stages[0].flops == pytest.approx(planned.rows[0].work.flops)
    assert merged.stages[0].flops < plain.stages[0].flops
    rare = draw(ToMA(0.5, every=3, skip=0))
    assert relative(rare.pixels, plain.pixels) < relative(merged.pixels, plain.pixels)


def test_pictures_do_not_depend_on_their_neighbours() -> None:
    model = mf.load("pocket", device="cpu")
    chain = mf.Sample(64, 64, mf.Shifted(3), cache=ToMA(0.5, every=1, skip=0)) >> mf.Decode()
    both = mf.run(chain, model, ["a big red circle", "the blue word CAT"], seed=[1, 2]).pixels
    assert relative(both[1:], mf.run(chain, model, "the blue word CAT", seed=2).pixels) < 1e-3


def test_the_share_is_that_of_shorter_sequences() -> None:
    """All blocks merged in every evaluation, no text: QKV and attention of half the tokens, all of a single block."""
    info = mf.FLUX
    assert info.architecture is not None
    a = info.architecture
    share = ToMA(0.5, every=1, skip=0).share(info, 4096)
    d, t, n = a.hidden, a.text_tokens, 4096
    attention = 4 * d * ((t + n) ** 2 - (t + n // 2) ** 2)
    saved = a.double_blocks * (8 * d * d * n // 2 + attention) + a.single_blocks * (24 * d * d * n // 2 + attention)
    assert share == pytest.approx(1 - saved / forward_flops(info, 4096), rel=1e-6)
    assert ToMA().share(info, 4096) > 0.8  # the published setting saves little


@pytest.mark.parametrize("bad", [{"ratio": 1.0}, {"tile": 0}, {"every": 0}, {"skip": -1}, {"sharpness": 0.0}], ids=str)
def test_settings_that_cannot_be(bad: dict[str, Any]) -> None:
    with pytest.raises(PlanError):
        ToMA(**bad)
