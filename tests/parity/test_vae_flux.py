"""The FLUX autoencoder against diffusers' AutoencoderKL on tiny random checkpoints."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mrflow.errors import PlanError
from mrflow.models.flux.vae import VaeFlux, VaeParams
from mrflow.models.flux.weights import FLUX_AUTOENCODER
from tests.parity.test_flux import relative
from tests.tiny import kl, save_vae_flux

# channels, blocks, groups, latent channels, scale, shift, and a picture's sides.
CASES: dict[str, tuple[tuple[int, ...], int, int, int, float, float, tuple[int, int]]] = {
    "two levels": ((8, 16), 1, 4, 4, 0.3611, 0.1159, (12, 20)),
    "three levels": ((6, 12, 18), 2, 3, 16, 0.5, -0.25, (20, 12)),
    "four levels": ((16, 8, 24, 32), 1, 8, 6, 1.5305, 0.0609, (24, 56)),
}


def scatter(module: nn.Module) -> None:
    """Every parameter far from where it starts, outputs of order 1."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in module.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            if p.ndim > 1:
                p.copy_((noise + 0.05) * p[0].numel() ** -0.5)
            else:
                p.copy_(0.3 * noise + (0.8 if "norm" in name and name.endswith("weight") else 0.1))


def diffusers_vae(case: str, folder: Path) -> Any:
    """A random model of diffusers, saved by diffusers."""
    channels, blocks, groups, latent, scale, shift, _ = CASES[case]
    theirs = kl(
        channels,
        latent=latent,
        layers_per_block=blocks,
        norm_num_groups=groups,
        scaling_factor=scale,
        shift_factor=shift,
    ).eval()
    scatter(theirs)
    theirs.save_pretrained(folder)
    return theirs


def reference(theirs: Any, pixels: Tensor, noise: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Mode, sample and the mode's picture by diffusers."""
    scale, shift = theirs.config.scaling_factor, theirs.config.shift_factor
    with torch.no_grad():
        posterior = theirs.encode((2 * pixels - 1).to(dtype)).latent_dist
        mode = (posterior.mode() - shift) * scale
        sample = (posterior.mean + posterior.std * noise.to(dtype) - shift) * scale
        picture = theirs.decode(mode / scale + shift).sample
    return mode, sample, picture / 2 + 0.5


def ours_of(vae: VaeFlux, pixels: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mode, sample and the mode's picture by us."""
    with torch.no_grad():
        mode = vae.encode(pixels)
        return mode, vae.encode(pixels, noise), vae.decode(mode)


def sample_inputs(case: str) -> tuple[Tensor, Tensor]:
    """Two pictures, not square, and noise for their latents."""
    channels, _, _, latent, _, _, (h, w) = CASES[case]
    g, m = torch.Generator().manual_seed(1), 2 ** (len(channels) - 1)
    return torch.rand(2, 3, h, w, generator=g), torch.randn(2, latent, h // m, w // m, generator=g)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_float32_and_bfloat16_agree_with_diffusers(case: str, tmp_path: Path) -> None:
    theirs = diffusers_vae(case, tmp_path)
    vae = FLUX_AUTOENCODER.prepare(tmp_path).read()
    pixels, noise = sample_inputs(case)
    want = reference(theirs, pixels, noise, torch.float32)
    for got, wanted in zip(ours_of(vae, pixels, noise), want, strict=True):
        assert got.dtype == torch.float32
        assert relative(got, wanted) < 1e-5

    half = FLUX_AUTOENCODER.prepare(tmp_path, dtype=torch.bfloat16).read()
    rough = reference(theirs.to(torch.bfloat16), pixels, noise, torch.bfloat16)
    for got, theirs_half, wanted in zip(ours_of(half, pixels, noise), rough, want, strict=True):
        # 3e-2 between two bfloat16 runs; ours keeps latents in float32 and must be no further from float32 than theirs.
        assert relative(got, theirs_half) < 3e-2
        assert relative(got, wanted) < 2 * relative(theirs_half, wanted)


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_bfl_layout_gives_the_same_bits(case: str, tmp_path: Path) -> None:
    diffusers_vae(case, tmp_path)
    vae = FLUX_AUTOENCODER.prepare(tmp_path).read()
    native = tmp_path / "native" / "ae.safetensors"
    native.parent.mkdir()
    save_vae_flux(vae, native)
    again = FLUX_AUTOENCODER.prepare(native).read()
    assert again.params == vae.params
    pixels, noise = sample_inputs(case)
    assert all(map(torch.equal, ours_of(vae, pixels, noise), ours_of(again, pixels, noise)))


def test_channels_last_and_batches_change_nothing() -> None:
    vae = VaeFlux(VaeParams((8, 16), 4, 1, 0.3611, 0.1159, 4))
    scatter(vae)
    pixels, noise = sample_inputs("two levels")
    want = ours_of(vae, pixels, noise)
    for i in range(2):
        for got, both in zip(ours_of(vae, pixels[i : i + 1], noise[i : i + 1]), want, strict=True):
            assert relative(got, both[i : i + 1]) < 1e-6
    vae = vae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for got, both in zip(ours_of(vae, pixels, noise), want, strict=True):
        assert relative(got, both) < 1e-6


def test_gradients_reach_every_parameter() -> None:
    vae = VaeFlux(VaeParams((8, 16), 4, 1, 0.3611, 0.1159, 4))
    pixels, noise = sample_inputs("two levels")
    vae.decode(vae.encode(pixels, noise)).square().mean().backward()
    assert all(p.grad is not None for p in vae.parameters())


def test_full_size_has_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        vae = VaeFlux(VaeParams())
    assert sum(p.numel() for p in vae.encoder.parameters()) == 34_274_208
    assert sum(p.numel() for p in vae.decoder.parameters()) == 49_545_475


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PlanError, match="multiples of 8"), torch.device("meta"):
        VaeFlux(VaeParams()).encode(torch.zeros(1, 3, 20, 24, device="meta"))
    with pytest.raises(PlanError, match="groups"):
        VaeParams(channels=(100,))
