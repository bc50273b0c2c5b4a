"""Qwen-Image's networks against diffusers on tiny random weights, loaded from what diffusers itself writes."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mrflow.models.qwen.transformer import QwenImage, positions_qwen
from mrflow.models.qwen.weights import QWEN_AUTOENCODER, QWEN_TRANSFORMER
from tests.parity.test_flux import relative
from tests.tiny import QWEN_WIDTHS, write_qwen_repo

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def forward(
    net: QwenImage,
    tokens: Tensor,
    grid: tuple[int, int],
    context: Tensor,
    sigma: Tensor,
    mask: Tensor | None = None,
) -> Tensor:
    """The velocity of a batch in which `mask` (b, t) marks the states that are text, as the reference has it."""
    attend = net.attention
    if mask is not None:
        keys = F.pad(mask, (0, tokens.shape[1]), value=True)[:, None, None]
        attend = partial(F.scaled_dot_product_attention, attn_mask=keys)
    table = net.tables([sigma])[0]
    rope = net.rope(positions_qwen(*grid, context.shape[1]))
    img, text = net.embed_image(tokens), net.embed_text(context)
    return net.head(net.some_blocks(img, text, rope, table, 0, len(net.stack()), attend=attend)[0], table)


@pytest.mark.parametrize("case", QWEN_WIDTHS)
@pytest.mark.parametrize("fuse", [None, True])
def test_the_transformer_in_float32_and_bfloat16(case: str, fuse: bool | None, tmp_path: Path) -> None:
    from diffusers import QwenImageTransformer2DModel

    folder = write_qwen_repo(tmp_path / "r", case=case, words=False) / "transformer"
    g = torch.Generator().manual_seed(1)
    exact = QWEN_TRANSFORMER.prepare(folder, fuse=fuse).read()
    for grid in ((4, 6), (5, 3), (7, 7)):
        tokens = torch.randn(2, grid[0] * grid[1], 64, generator=g)
        context = torch.randn(2, 9, QWEN_WIDTHS[case], generator=g)
        mask = torch.arange(9) < torch.tensor([[9], [6]])
        sigma = torch.tensor([0.86332, 0.12])
        for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
            theirs = QwenImageTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
            ours = QWEN_TRANSFORMER.prepare(folder, dtype=dtype, fuse=fuse).read()
            with torch.no_grad():
                want = theirs(
                    hidden_states=tokens.to(dtype),
                    timestep=(1000 * sigma).to(dtype) / 1000,
                    encoder_hidden_states=context.to(dtype),
                    encoder_hidden_states_mask=mask,
                    img_shapes=[[(1, *grid)]] * 2,
                    return_dict=False,
                )[0]
                got = forward(ours, tokens, grid, context, sigma, mask)
                assert relative(got, want) < limit
                assert relative(forward(exact, tokens, grid, context, sigma), got) > 1e-3  # the mask matters


@pytest.mark.parametrize("case", ["two", "wide"])
def test_the_autoencoder_for_one_frame(case: str, tmp_path: Path) -> None:
    from diffusers import AutoencoderKLQwenImage

    folder = write_qwen_repo(tmp_path / "r", case=case, words=False) / "vae"
    theirs, ours = AutoencoderKLQwenImage.from_pretrained(folder), QWEN_AUTOENCODER.prepare(folder).read()
    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (theirs.config.latents_mean, theirs.config.latents_std))
    g = torch.Generator().manual_seed(1)
    z, x = torch.randn(2, 16, 6, 10, generator=g), torch.rand(2, 3, 48, 80, generator=g)
    with torch.no_grad():
        want = theirs.decode(z[:, :, None] * std + mean).sample[:, :, 0]
        assert relative((2 * ours.decode(z) - 1).clamp(-1, 1), want) < 2e-6
        want = ((theirs.encode(2 * x[:, :, None] - 1).latent_dist.mode() - mean) / std)[:, :, 0]
        assert relative(ours.encode(x), want) < 2e-6
