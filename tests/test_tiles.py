"""Refinement in tiles: exact where the network is local, no seam where it is not, memory of a tile."""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import mrflow as mf
from mrflow.backbone import Positions
from mrflow.cost import decode_flops, encode_flops, forward_flops, memory
from mrflow.models.pocket.model import Pocket
from mrflow.protocols.tokens import pack, unpack
from mrflow.stages.tiles import Layout
from mrflow.testing import check_stage
from tests.live import LiveBytes
from tests.parity.test_flux import relative
from tests.parity.test_official import pipeline, words
from tests.test_cli import call, here  # noqa: F401
from tests.test_qwen import repo as qwen_repo  # noqa: F401  (fixture)

PROMPT = "a big red circle at the left on coarse dots"


@lru_cache
def pocket() -> Pocket:
    model = mf.load("pocket", device="cpu")
    assert isinstance(model, Pocket)
    return model


def noisy(side: int, sigma: float) -> mf.State[mf.Latents]:
    """Noised latents of an enlarged picture of `PROMPT`."""
    small = mf.run(mf.Sample(side // 2, side // 2, mf.Shifted(8)) >> mf.Decode(), pocket(), PROMPT).pixels
    chain = mf.Upscale() >> mf.Encode() >> mf.Reinject(sigma)
    made = mf.run(chain, pocket(), PROMPT, start=small)
    assert isinstance(made.spec, mf.Latents)
    return mf.State(made.spec, made.data)


def refined(given: mf.State[mf.Latents], tiles: mf.Tiles | None) -> Tensor:
    return mf.run(mf.Refine(tiles=tiles), pocket(), PROMPT, start=given).data


def seam(off: Tensor, at: Sequence[int], reach: int = 4) -> float:
    """How much larger the steps of a picture are across the columns and rows `at` than those `reach` to both sides."""
    found = []
    for picture in (off, off.mT):
        step = picture.diff(dim=-1).square().mean((0, 1, 2)).sqrt()
        for each in at:
            near = torch.cat((step[each - 1 - reach : each - 1], step[each : each + reach]))
            found.append(step[each - 1] / near.mean())
    return float(torch.stack(found).mean())


# One field, several sequences


def test_parts_of_a_row_go_through_the_network_by_themselves(tmp_path: Path, qwen_repo: Path) -> None:  # noqa: F811
    """Each part is what it is alone, texts of different lengths too; as one sequence the two would see each other."""
    pipeline(tmp_path, guidance=True)
    flux, qwen = (mf.load(w, device="cpu") for w in (tmp_path, qwen_repo))
    prompts = ["a cat", "a much longer prompt of a cat"]
    conds = (mf.Condition(words(2)), qwen.condition(prompts), pocket().condition([PROMPT, PROMPT]))
    at = torch.cartesian_prod(torch.arange(3), torch.arange(4)).float()
    two = Positions(torch.cat((at, at + 5)), 8, 9, parts=2)
    for model, cond in zip((flux, qwen, pocket()), conds, strict=True):
        row = torch.randn(2, 16, 2, 2 * 24, generator=torch.Generator().manual_seed(2))
        with torch.inference_mode():
            got = model.field(cond, mf.FieldOptions(positions=two))(row, 0.6)
            one = [model.field(cond, mf.FieldOptions(positions=Positions(p, 8, 9))) for p in (at, at + 5)]
            want = torch.cat([field(x, 0.6) for field, x in zip(one, row.chunk(2, -1), strict=True)], -1)
            joint = model.field(cond, mf.FieldOptions(positions=replace(two, parts=1)))(row, 0.6)
        assert relative(got, want) < 1e-5
        assert relative(joint, want) > 1e-3


def test_parts_are_of_one_length_and_without_a_cache() -> None:
    with pytest.raises(mf.PlanError, match="3 positions are not 2 sequences"):
        Positions(torch.zeros(3, 2), 1, 3, parts=2)
    with pytest.raises(mf.PlanError, match="a cache remembers one sequence"):
        mf.FieldOptions(cache=mf.caches.TaylorSeer(2), positions=Positions(torch.zeros(2, 2), 1, 2, parts=2))


# The layout


@given(st.integers(1, 20), st.integers(1, 20), st.integers(2, 8), st.integers(0, 4), st.booleans())
def test_a_field_that_is_local_is_the_same_in_tiles(h: int, w: int, tile: int, overlap: int, local: bool) -> None:
    """Its values, and the places that it is told, are those of the whole grid."""
    overlap = min(overlap, tile // 2)
    tiles = mf.Tiles(4 * tile, 4 * overlap, "local" if local else "global")
    layout = tiles.layout(mf.Latents(1, 2 * h, 2 * w, mf.toy().info.space))
    places = layout.places
    assert places.parts == len(layout.begins)
    if not local:
        tokens = set(map(tuple, places.at.tolist()))
        assert tokens == {(float(i), float(j)) for i in range(h) for j in range(w)}

    def told(x: Tensor, sigma: float) -> Tensor:
        rows, columns = places.at.T.view(2, 1, -1, 1)
        shift = 0 if local else (rows + 0.1 * columns) * torch.ones(1, 1, 12)
        return unpack(sigma * pack(x).sin() + shift, 1, len(places.at))

    x = torch.randn(2, 3, 2 * h, 2 * w, generator=torch.Generator().manual_seed(h * w))
    at = torch.cartesian_prod(torch.arange(h), torch.arange(w)).view(-1, 2).float()
    shift = 0 if local else (at[:, :1] + 0.1 * at[:, 1:]) * torch.ones(1, 1, 12)
    want = unpack(0.3 * pack(x).sin() + shift, h, w)
    torch.testing.assert_close(layout.field(told, 2)(x, 0.3), want, atol=1e-4, rtol=1e-4)


def test_one_tile_fades_into_the_next() -> None:
    """Tiles that disagree, 0 on the left and 1 on the right: a line over the four cells that both have."""
    layout = mf.Tiles(16, 8).layout(mf.Latents(1, 8, 12, mf.toy().info.space))
    row = layout.field(lambda x, _: torch.cat((0 * x.chunk(2, -1)[0], 0 * x.chunk(2, -1)[1] + 1), -1), 2)
    want = torch.tensor([0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1]).expand(1, 3, 8, 12)
    torch.testing.assert_close(row(torch.zeros(1, 3, 8, 12), 0.5), want)


def test_corners_are_weighted_by_both_directions() -> None:
    """Of 2 x 2 tiles only the last is 1: what it weighs is the product of a rise downwards and one across."""
    layout = mf.Tiles(16, 8).layout(mf.Latents(1, 12, 12, mf.toy().info.space))
    row = layout.field(lambda x, _: torch.cat([0 * part + (i == 3) for i, part in enumerate(x.chunk(4, -1))], -1), 2)
    rise = torch.tensor([0, 0, 0, 0, 0.2, 0.4, 0.6, 0.8, 1, 1, 1, 1])
    want = (rise[:, None] * rise).expand(1, 3, 12, 12)
    torch.testing.assert_close(row(torch.zeros(1, 3, 12, 12), 0.5), want)


def test_the_stage_holds_its_laws_in_tiles() -> None:
    """Forwards are those of every tile, noise levels and items as without tiles."""
    model = mf.toy(positions=True)
    spec = mf.Latents(2, 16, 24, model.info.space, 0.3)
    for tiles in (mf.Tiles(16, 4), mf.Tiles((16, 24), 8, "local"), mf.Tiles(64, 8)):  # the last: in one
        stage = mf.Refine(mf.DirectSigma(2), tiles=tiles)
        check_stage(stage, spec=spec, model=model)
    assert mf.plan(mf.Refine(mf.DirectSigma(2), tiles=mf.Tiles(16, 4)), model.info, start=spec).nfe == 2 * 3 * 4


def test_a_picture_no_larger_than_a_tile_is_refined_whole() -> None:
    state = noisy(128, 0.3)
    assert torch.equal(refined(state, mf.Tiles(128, 64)), refined(state, None))
    assert not torch.equal(refined(state, mf.Tiles(64, 32)), refined(state, None))


# Seams, on the embedded model


def test_seams_are_gone_with_an_overlap_and_seen_without() -> None:
    """At 256 px against the whole: what differs jumps at the border of tiles without overlap, and not with one."""
    state = noisy(256, 0.3)
    whole = refined(state, None)
    latents = {n: refined(state, mf.Tiles(128, n)) for n in (0, 64)}
    assert seam(latents[0] - whole, [16]) > 1.7
    assert seam(latents[64] - whole, [8, 16, 24]) < 1.0
    with torch.inference_mode():
        picture, *others = (pocket().decode(z) for z in (whole, *latents.values()))
    near = [float(mf.metrics.psnr(each, picture)) for each in others]
    assert near[1] > near[0] + 1 and near[1] > 39
    local = refined(state, mf.Tiles(128, 64, "local"))
    assert (latents[64] - whole).norm() < 0.85 * (local - whole).norm()  # places in the whole picture are nearer to it


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_512_pixels_in_tiles_are_near_the_whole() -> None:
    """Twice the side that pocket knows, in tiles that it knows: a seam without overlap, none with half a tile."""
    state = noisy(512, 0.3)
    whole = refined(state, None)
    apart, over = (refined(state, mf.Tiles(256, n)) for n in (0, 128))
    assert seam(apart - whole, [32]) > 1.7
    assert seam(over - whole, [16, 32, 48]) < 1.0
    with torch.inference_mode():
        assert float(mf.metrics.psnr(pocket().decode(over), pocket().decode(whole))) > 36


@pytest.mark.slow
def test_2048_pixels_take_the_memory_of_a_tile() -> None:
    """Finite, and the most that lives at once is near what is predicted: a whole forward would need 7 times as much."""
    model = pocket()
    spec = mf.Latents(1, 256, 256, model.info.space, 0.12)
    given = mf.State(spec, torch.randn(spec.shape, generator=torch.Generator().manual_seed(0)))
    stage = mf.Refine(guidance=mf.Distilled(), tiles=mf.Tiles(512, 64))
    assert model.info.footprint is not None
    predicted, whole = (
        memory(mf.plan(each, model.info, start=spec), value_bytes=4) for each in (stage, replace(stage, tiles=None))
    )
    assert predicted is not None and whole is not None
    values, all_values = (m.peak - model.info.footprint.total for m in (predicted, whole))
    assert all_values > 7 * values
    with LiveBytes() as live:
        out = mf.run(stage, model, PROMPT, start=given).data
    assert bool(out.isfinite().all())
    assert 0.8 * values < live.peak < 1.25 * values


# Plans


def test_ladders_to_4096_are_planned() -> None:
    sizes, tiles = [(1024, 1024), (2048, 2048), (4096, 4096)], mf.Tiles(1024, 256)
    planned = mf.plan(mf.recipes.ladder(sizes, upscalers=mf.Lanczos(2), tiles=tiles), mf.FLUX)
    refinements = [row for row in planned.rows if row.name == "Refine"]
    assert planned.out == mf.Pixels(1, 4096, 4096)
    assert [row.work.nfe for row in refinements] == [9, 25]  # tiles begin every 768 pixels, the last at the border
    one = forward_flops(mf.FLUX, 64 * 64)
    assert [row.work.flops for row in refinements] == pytest.approx([9 * one, 25 * one])
    assert {row.tokens for row in refinements} == {64 * 64}
    found, plain = memory(planned), memory(mf.plan(mf.recipes.ladder(sizes, upscalers=mf.Lanczos(2)), mf.FLUX))
    assert found is not None and plain is not None
    tiled, whole = ([v for k, v in m.moments.items() if k.startswith("Refine")] for m in (found, plain))
    assert tiled[1] - tiled[0] < 0.2e9 and whole[1] - tiled[1] > 5e9
    large = decode_flops(mf.FLUX, 4096, 4096) + encode_flops(mf.FLUX, 4096, 4096)
    assert planned.work.flops > large  # the autoencoder is counted whole


@pytest.mark.parametrize(
    ("stage", "model", "message"),
    [
        (mf.Refine(tiles=mf.Tiles(1000)), mf.FLUX, "size of 1000 pixels is not a multiple of 16; try 992"),
        (mf.Refine(tiles=mf.Tiles(1024, 250)), mf.FLUX, "overlap of 250 pixels is not a multiple of 16; try 256"),
        (mf.Refine(tiles=mf.Tiles(16, 4)), mf.toy().info, "draws on whole grids only"),
        (mf.Refine(tiles=mf.Tiles(), cache=mf.caches.TaylorSeer(2)), mf.FLUX, "leave out the cache or tiles"),
        (mf.Refine(tiles=mf.Tiles(), policy=mf.PiFlow("x")), mf.FLUX, "leave out the policy or tiles"),
        (mf.Refine(tiles=1024), mf.FLUX, r"tiles takes Tiles\(size, overlap\)"),  # type: ignore[arg-type]
    ],
)
def test_tiles_that_cannot_be_are_refused(stage: mf.Refine, model: mf.ModelInfo, message: str) -> None:
    with pytest.raises(mf.PlanError, match=message):
        mf.plan(stage, model, start=mf.Latents(1, 256, 256, model.space, 0.12))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: mf.Tiles(0), "size must be"),
        (lambda: mf.Tiles((512, 512, 512)), "size must be"),  # type: ignore[arg-type]
        (lambda: mf.Tiles(512, 272), "overlap must be"),
        (lambda: mf.Tiles(512, -16), "overlap must be"),
        (lambda: mf.Tiles(512, 64, "here"), "positions must be"),  # type: ignore[arg-type]
    ],
)
def test_tiles_that_make_no_sense(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(mf.PlanError, match=message):
        make()


def test_tiles_come_back_from_a_record(tmp_path: Path) -> None:
    chain = mf.recipes.paper(low=(64, 64), size=(128, 128), steps=2, tiles=mf.Tiles((64, 128), 32))
    made = mf.run(chain, pocket(), PROMPT)
    made.save(tmp_path / "out.png")
    torch.testing.assert_close(mf.replay(tmp_path / "out.png", model=pocket()).pixels, made.pixels)


def test_tiles_on_the_command_line(here: Path) -> None:  # noqa: F811
    code, out, err = call(
        "plan", "--model", "flux1-dev", "--ladder", "1024,2048,4096", "--sr", "lanczos", "--tiles", "1024"
    )
    assert code == 0 and " 25 " in out, err
    done = call("generate", PROMPT, "--size", "128x128", "--steps", "1", "--tiles", "64,32", "--out", "t.png")
    assert done[0] == 0, done[2]
    record = mf.read_record(here / "t.png")
    assert "{'overlap': 32, 'positions': 'global', 'size': 64, 'type': 'Tiles'}" in str(record)
    assert call("refine", "t.png", "--tiles", "64", "--out", "u.png")[0] == 0
    for words_, message in (
        (("--tiles", "a"), "--tiles takes pixels a side"),
        (("--tiles", "64", "--recipe", "native"), "--tiles does nothing with the recipe native"),
    ):
        code, _, err = call("plan", *words_)
        assert code == 2 and message in err.replace("\n", " ")


def test_a_layout_is_a_value() -> None:
    spec = mf.Latents(1, 24, 32, mf.toy().info.space)
    layout = mf.Tiles((16, 24), 4).layout(spec)
    assert layout == Layout(12, 16, 4, 6, 1, layout.begins)
    assert layout.begins[:4] == ((0, 0), (0, 5), (0, 10), (3, 0))
    assert layout.tile(spec) == replace(spec, height=8, width=12)
