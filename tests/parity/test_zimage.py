"""Z-Image against diffusers on tiny random weights, loaded from what diffusers itself writes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange

import mrflow as mf
from mrflow.checkpoints.safetensors import save_file
from mrflow.cli.chains import build
from mrflow.models.zimage.field import alike
from mrflow.models.zimage.transformer import ZImage, ZImageParams, positions_zimage
from mrflow.models.zimage.weights import ZIMAGE_TRANSFORMER, single_file
from tests.parity.reenact_bridge import official_z_image
from tests.parity.test_bridge import UP
from tests.parity.test_flux import relative
from tests.tiny import ZIMAGE_WIDTHS, ZIMAGES, write_zimage_repo

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


def velocity(net: ZImage, x: torch.Tensor, texts: list[torch.Tensor], sigma: torch.Tensor) -> torch.Tensor:
    """The network's own pieces in a row."""
    h, w = x.shape[2] // 2, x.shape[3] // 2
    tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=2, q=2)
    text, table = net.embed_text(texts), net.tables([sigma])[0]
    rope = net.rope(positions_zimage(h, w, text.shape[1]))
    img, _ = net.some_blocks(net.embed_image(tokens), net.fill(text, h * w), rope, table, 0, len(net.stack()))
    return rearrange(net.head(img, table), "b (h w) (p q c) -> b c (h p) (w q)", h=h, w=w, p=2, q=2)


@pytest.mark.parametrize("case", ZIMAGES)
@pytest.mark.parametrize("fuse", [None, True])
def test_the_transformer_in_float32_and_bfloat16(case: str, fuse: bool | None, tmp_path: Path) -> None:
    """Texts and images that fill whole 32s and that do not."""
    from diffusers import ZImageTransformer2DModel

    folder = write_zimage_repo(tmp_path / "r", case=case) / "transformer"
    g = torch.Generator().manual_seed(1)
    sigma = torch.tensor([0.86332, 0.12])
    for dtype, limit in ((torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        theirs = ZImageTransformer2DModel.from_pretrained(folder, torch_dtype=dtype)
        ours = ZIMAGE_TRANSFORMER.prepare(folder, dtype=dtype, fuse=fuse).read()
        for grid, lengths in (((4, 6), (9, 20)), ((8, 8), (32, 32)), ((5, 3), (33, 40))):
            x = torch.randn(2, 16, 2 * grid[0], 2 * grid[1], generator=g)
            texts = [torch.randn(n, ZIMAGE_WIDTHS[case], generator=g) for n in lengths]
            with torch.no_grad():
                images = list(x[:, :, None].to(dtype).unbind(0))
                out = theirs(images, (1000 - 1000 * sigma) / 1000, [t.to(dtype) for t in texts], return_dict=False)
                got = velocity(ours, x, texts, sigma)
            assert relative(got, -torch.stack(out[0])[:, :, 0]) < limit, (grid, lengths)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zimage_repo(tmp_path_factory.mktemp("z") / "repo")


@pytest.fixture(scope="module")
def pipe(repo: Path) -> Any:
    from diffusers import ZImagePipeline

    made = ZImagePipeline.from_pretrained(repo)
    made.set_progress_bar_config(disable=True)
    return made


PROMPTS = ["a red fox, quite a long way off in the snow of some valley", "tea"]


def theirs(pipe: Any, **more: Any) -> torch.Tensor:
    """The pipeline's own latents of 64 x 96 pixels in three steps."""
    seeds = [torch.Generator().manual_seed(seed) for seed in (5, 8)]
    out: torch.Tensor = pipe(PROMPTS, generator=seeds, num_inference_steps=3, height=64, width=96,
                             output_type="latent", **more).images  # fmt: skip
    return out


NATIVE = mf.Sample(64, 96, mf.Shifted(3), noise=mf.Stream(0))


def test_a_run_from_prompts_is_theirs(repo: Path, pipe: Any) -> None:
    """Two prompts whose texts fill up to different lengths."""
    model = mf.load(repo, device="cpu")
    assert {len(alike(model._states(model.condition(PROMPTS))))} == {2}
    assert relative(mf.run(NATIVE, model, PROMPTS, seed=[5, 8]).data, theirs(pipe, guidance_scale=0.0)) < 2e-5


def test_the_undistilled_model_adds_its_scale_to_the_conditional(tmp_path: Path) -> None:
    from diffusers import ZImagePipeline

    folder = write_zimage_repo(tmp_path / "repo", factor=6.0)
    pipe, model = ZImagePipeline.from_pretrained(folder), mf.load(folder, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    assert (model.info.name, model.info.cfg) == ("z-image", 5.0)
    assert relative(mf.run(NATIVE, model, PROMPTS, seed=[5, 8]).data, theirs(pipe, guidance_scale=4.0)) < 2e-5


def test_the_published_script_of_nine_steps_and_one(repo: Path, pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The model's facts alone give the settings: 9 steps, and a refinement from the last of nine levels, 3/11."""
    norm = F.group_norm  # ours are channels-last, where torch's CPU group norm loses three digits on smooth pictures
    monkeypatch.setattr(F, "group_norm", lambda x, *rest: norm(x.contiguous(), *rest))
    model = mf.load(repo, device="cpu")
    low, size = (64, 96), (128, 192)
    small, large = official_z_image(pipe, PROMPTS, seeds=[5, 8], low=low, size=size, upscale=UP)
    chain = build("official", model.info, low="64x96", size="128x192", sr=UP)
    result = mf.run(chain, model, PROMPTS, seed=[5, 8], keep=True)
    assert result.nfe == 10
    kept = result.stages[1].data
    assert kept is not None and relative(kept, small) < 1e-4
    assert relative(result.pixels, large) < 1e-4


def test_single_files_give_the_same_network(repo: Path, tmp_path: Path) -> None:
    """The other published layout: q, k, v in one matrix, and names of its own."""
    ours = ZIMAGE_TRANSFORMER.prepare(repo / "transformer", fuse=True).read()
    state = {single_file(name)[0]: tensor for name, tensor in ours.state_dict().items()}
    state["norm_final.weight"] = torch.ones(3)  # in files, and used by none
    config = json.loads((repo / "transformer" / "config.json").read_text())
    save_file(state, tmp_path / "z.safetensors", metadata={"config": json.dumps(config)})
    again = ZIMAGE_TRANSFORMER.prepare(tmp_path / "z.safetensors").read().state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.state_dict().items())


def test_files_without_a_config_have_the_published_sizes() -> None:
    """What shapes do not say: rotary axes and their base, as in the defaults of diffusers' class."""
    from inspect import signature

    from diffusers import ZImageTransformer2DModel

    theirs = {name: p.default for name, p in signature(ZImageTransformer2DModel.__init__).parameters.items()}
    ours = ZImageParams()
    assert (list(ours.axes), ours.theta) == (theirs["axes_dims"], theirs["rope_theta"])
    assert (ours.hidden, ours.heads, ours.layers) == (theirs["dim"], theirs["n_heads"], theirs["n_layers"])
    assert (ours.refiners, ours.context) == (theirs["n_refiner_layers"], theirs["cap_feat_dim"])
