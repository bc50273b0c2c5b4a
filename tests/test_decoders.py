"""Slots for what others train: decoders in the model's decoder's place, upscalers of latents."""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import mrflow as mf
from mrflow.checkpoints.safetensors import save_file
from mrflow.decoders import linear_decoder
from mrflow.errors import PlanError, PromiseError, WeightsError
from mrflow.scenes import FULL, render, sample_scene
from mrflow.scenes.hard import HARD, sample
from tests.parity.test_flux import relative, scatter
from tests.test_cli import call, here  # noqa: F401


def pictures(count: int, seed: int) -> Tensor:
    """Scenes of pocket's two worlds in turn, 128 pixels a side, in [0, 1]."""
    rng = random.Random(seed)
    scenes = [sample(HARD, rng) if i % 2 else sample_scene(FULL, rng) for i in range(count)]
    drawn = [render(scene, 128, oversample=2).transpose(2, 0, 1) for scene in scenes]
    return torch.stack([torch.from_numpy(each.copy()).float() / 255 for each in drawn])


@torch.inference_mode()
def test_the_preview_of_pocket_is_the_one_that_fits_it() -> None:
    """Fitted anew on other scenes it draws the same; on unseen ones its error is a fraction of their spread."""
    model = mf.load("pocket")
    seen, unseen = pictures(24, 1), pictures(8, 2)
    again, latents = linear_decoder(model, seen), model.encode(unseen)
    want = F.avg_pool2d(unseen, model.info.space.downscale)
    assert mf.POCKET_PREVIEW.space == model.info.space.name
    assert float((mf.POCKET_PREVIEW(latents) - again(latents)).abs().mean()) < 0.02
    error = float((mf.POCKET_PREVIEW(latents) - want).pow(2).mean().sqrt())
    spread = float((want - want.mean((0, 2, 3), keepdim=True)).pow(2).mean().sqrt())
    assert error < 0.5 * spread
    turned = mf.LinearDecoder(
        mf.POCKET_PREVIEW.space, mf.POCKET_PREVIEW.weight[::-1], mf.POCKET_PREVIEW.bias
    )  # the control: colours exchanged
    assert float((turned(latents) - want).pow(2).mean().sqrt()) > 1.5 * error


def test_a_preview_is_a_decoder_of_a_chain_and_of_steps() -> None:
    model = mf.load("pocket")
    chain = mf.Sample(64, 64, mf.Shifted(2)) >> mf.Decode(mf.POCKET_PREVIEW)
    side = 64 // model.info.space.downscale
    assert mf.plan(chain, model.info).out == mf.Pixels(1, side, side)
    seen: list[Tensor] = []

    def listen(event: object) -> None:
        if isinstance(event, mf.Stepped):
            seen.append(mf.POCKET_PREVIEW(event.step.denoised))

    result = mf.run(chain, model, "a red circle", on_event=listen)
    assert torch.equal(result.pixels, seen[-1].clamp(0, 1)) and len(seen) == 2


def write_tiny(folder: Path, *, latent: int = 16) -> Any:
    """An AutoencoderTiny with parameters far from where they start."""
    from diffusers import AutoencoderTiny

    tiny = AutoencoderTiny(
        latent_channels=latent, encoder_block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1,) * 4, num_decoder_blocks=(1, 2, 1, 1),
    )  # fmt: skip
    scatter(tiny.eval(), 4)
    tiny.save_pretrained(folder)
    return tiny


@pytest.mark.filterwarnings("ignore")
def test_a_tiny_autoencoder_decodes_as_diffusers_does(tmp_path: Path) -> None:
    """From the whole autoencoder in diffusers' layout, and from the decoder alone as TAESD is published."""
    theirs = write_tiny(tmp_path / "tiny")
    z = 2 * torch.randn(2, 16, 5, 7, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs.decode(z).sample / 2 + 0.5
    ours = mf.TinyDecoder(str(tmp_path / "tiny"))
    assert ours.scale == 8 and relative(ours(z), want) < 1e-6
    own = {f"{int(n.split('.')[2]) + 1}.{n.split('.', 3)[3]}": t.clone()
           for n, t in theirs.state_dict().items() if n.startswith("decoder.")}  # fmt: skip
    save_file(own, tmp_path / "taef1_decoder.safetensors")
    alone = mf.TinyDecoder(str(tmp_path / "taef1_decoder.safetensors"))
    assert torch.equal(alone(z), ours(z))
    assert alone.to_record()["path"] == "taef1_decoder.safetensors" and alone.sha256 != ours.sha256

    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        alone.net(z)
    assert counter.get_total_flops() == pytest.approx(2 * 40 * 56 * alone.flops_per_pixel)


@pytest.mark.filterwarnings("ignore")
def test_files_that_hold_no_tiny_decoder_are_refused(tmp_path: Path) -> None:
    write_tiny(tmp_path / "tiny")
    for name, state in (
        ("other", {"conv.weight": torch.ones(2, 2)}),
        ("encoder", {"0.weight": torch.ones(8, 3, 3, 3), "0.bias": torch.ones(8),
                     "1.weight": torch.ones(16, 8, 3, 3), "1.bias": torch.ones(16)}),
        ("cut", {"1.weight": torch.ones(8, 16, 3, 3), "3.weight": torch.ones(3, 8, 3, 3)}),
    ):  # fmt: skip
        save_file(state, tmp_path / f"{name}.safetensors")
        with pytest.raises(WeightsError, match=r"holds no decoder|bias"):
            mf.TinyDecoder(str(tmp_path / f"{name}.safetensors"))
    with pytest.raises(PlanError, match="decodes 16 latent channels, got 4"):
        mf.TinyDecoder(str(tmp_path / "tiny"))(torch.zeros(1, 4, 2, 2))


@dataclass(frozen=True)
class Fourfold(mf.Decoder):
    """A decoder that enlarges too: 4 pixels where the model's own makes 1."""

    space: str = "pocket"
    honest: bool = True

    @property
    def scale(self) -> int:
        return 16

    @property
    def flops_per_pixel(self) -> float:
        return 10.0

    def __call__(self, latents: Tensor) -> Tensor:
        return F.interpolate(latents[:, :3], scale_factor=16.0 if self.honest else 8.0)


@dataclass(frozen=True)
class Twice(mf.LatentUpscaler):
    """Stands for a trained network: each cell four times, a little brighter, so that it shows."""

    space: str = "pocket"
    factor: int = 2

    @property
    def scale(self) -> int:
        return 2

    @property
    def flops_per_cell(self) -> float:
        return 100.0

    def __call__(self, latents: Tensor) -> Tensor:
        return 1.01 * F.interpolate(latents, scale_factor=float(self.factor))


def test_a_decoder_that_enlarges_replaces_decoding_and_upscaling() -> None:
    model = mf.load("pocket")
    chain = mf.Sample(64, 64, mf.Shifted(1)) >> mf.Decode(Fourfold())
    planned, side = mf.plan(chain, model.info), 64 // model.info.space.downscale * 16
    assert planned.out == mf.Pixels(1, side, side) and planned.rows[-1].work.flops == 10 * side**2
    result = mf.run(chain, model, "a red circle")
    assert result.pixels.shape == (1, 3, side, side) and 0 <= result.pixels.min() <= result.pixels.max() <= 1
    with pytest.raises(PlanError, match=r"Fourfold knows latents of 'flux1', and these are of 'pocket'"):
        mf.plan(mf.Sample(64, 64) >> mf.Decode(Fourfold("flux1")), model.info)
    with pytest.raises(PromiseError, match="Fourfold says scale 16, so it must make"):
        mf.run(mf.Sample(64, 64, mf.Shifted(1)) >> mf.Decode(Fourfold(honest=False)), model, "a red circle")


def test_an_upscaler_of_latents_is_run_as_often_as_the_size_takes() -> None:
    model = mf.load("pocket")
    low = mf.Sample(32, 32, mf.Shifted(1))
    x = mf.run(low, model, "a red circle").data
    for size, times in ((None, 1), ((128, 128), 2), ((96, 96), 2)):
        lifted = low >> mf.Lift(size, upscaler=Twice())
        planned = mf.plan(lifted, model.info)
        assert planned.rows[-1].work.flops == 100 * x.shape[-1] ** 2 * sum(4**i for i in range(times))
        got, want = mf.run(lifted, model, "a red circle").data, x
        for _ in range(times):
            want = Twice()(want)
        if size == (96, 96):
            want = F.interpolate(want, size=got.shape[-2:], mode="bicubic", align_corners=False, antialias=True)
        assert got.shape == planned.out.shape and torch.equal(got, want)
    with pytest.raises(PlanError, match=r"Twice knows latents of 'flux1', and these are of 'pocket'"):
        mf.plan(low >> mf.Lift(upscaler=Twice("flux1")), model.info)
    with pytest.raises(PromiseError, match="Twice says scale 2"):
        mf.run(low >> mf.Lift(upscaler=Twice(factor=3)), model, "a red circle")


@pytest.mark.filterwarnings("ignore")
def test_records_name_decoders(tmp_path: Path) -> None:
    from mrflow.records.chains import decode, encode
    from mrflow.records.files import known_files

    write_tiny(tmp_path / "tiny")
    tiny = mf.TinyDecoder(str(tmp_path / "tiny"))
    with known_files([tiny.path]):
        for stage in (mf.Decode(mf.POCKET_PREVIEW), mf.Decode(tiny), mf.Lift(upscaler=Twice())):
            assert decode(encode(stage), [Twice]) == stage


@pytest.mark.filterwarnings("ignore")
def test_decoders_on_the_command_line(here: Path) -> None:  # noqa: F811
    """A file of a tiny autoencoder, a public value, and one of the user's file, in the last decoder's place."""
    write_tiny(here / "tiny")
    (here / "mine.py").write_text(
        "import mrflow as mf\nnet = mf.LinearDecoder('pocket', ((0.1,) * 16,) * 3, (0.5,) * 3)\n"
        "cache = mf.caches.TaylorSeer(2)\n"
    )
    words = ("generate", "a big red circle", "--size", "64x64", "--steps", "1", "--recipe", "native", "--out")
    for word, made, side in (
        ("POCKET_PREVIEW", "LinearDecoder", 8),
        ("mine.py:net", "LinearDecoder", 8),
        (str(here / "tiny"), "TinyDecoder", 64),
        (f"TinyDecoder('{here / 'tiny'}', 'pocket')", "TinyDecoder", 64),
    ):
        code, _, err = call(*words, f"{side}{made}{len(word)}.png", "--decoder", word)
        assert code == 0, err
        path = here / f"{side}{made}{len(word)}.png"
        assert mf.read_image(path).shape[-2:] == (side, side)
        assert f"'type': '{made}'" in str(mf.read_record(path))
    assert call(*words, "cached.png", "--cache", "mine.py:cache")[0] == 0
    photo = call("refine", "cached.png", "--scale", "2", "--decoder", "POCKET_PREVIEW", "--out", "small.png")
    assert photo[0] == 0 and mf.read_image(here / "small.png").shape[-2:] == (16, 16)
    for word, said in (("TinyDecoder('none.safetensors')", "none.safetensors"), ("Euler", "--decoder")):
        code, _, err = call("plan", "--decoder", word)
        assert code in (2, 3) and said in " ".join(err.split()), err
