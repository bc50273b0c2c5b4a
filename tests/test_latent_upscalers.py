"""Networks that enlarge latents from files: LSSGen's upsampler as it is saved, read safely, held to its promise."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mrflow as mf
from mrflow.errors import PlanError, WeightsError
from tests.test_cli import call, here  # noqa: F401
from tests.test_sr import Evil

WIDTHS, UPS = (8, 12, 12), (True, False, True)
PROMPT = "a red circle"


def weights(
    channels: int = 16,
    *,
    widths: tuple[int, ...] = WIDTHS,
    ups: tuple[bool, ...] = UPS,
    prefix: str = "upsampler.",
) -> dict[str, Tensor]:
    """The tensors of such a network, by the names that LSSGen gives them."""
    g = torch.Generator().manual_seed(0)
    sizes: dict[str, tuple[int, ...]] = {"conv_in": (widths[0], channels, 3, 3)}
    before = widths[0]
    for i, (width, up) in enumerate(zip(widths, ups, strict=True)):
        at = f"up_blocks.{i}."
        sizes |= {f"{at}norm1": (before,), f"{at}norm2": (width,), f"{at}conv2": (width, width, 3, 3)}
        sizes[f"{at}conv1"] = (before, width, 4, 4) if up else (width, before, 3, 3)
        sizes |= {f"{at}skip_proj": (width, before, 1, 1)} if width != before else {}
        before = width
    sizes |= {"norm_out": (before,), "conv_out": (channels, before, 3, 3)}
    out: dict[str, Tensor] = {}
    for name, shape in sizes.items():
        outs = shape[1] if name.endswith("conv1") and shape[-1] == 4 else shape[0]
        out[f"{prefix}{name}.weight"] = 0.2 * torch.randn(shape, generator=g) + (1.0 if len(shape) == 1 else 0.0)
        out[f"{prefix}{name}.bias"] = 0.2 * torch.randn(outs, generator=g)
    return out


def by_hand(state: dict[str, Tensor], x: Tensor, *, groups: int, skip: str) -> Tensor:
    """The network as the paper's code has it, one operation a line."""
    w = {name.removeprefix("upsampler."): t for name, t in state.items()}

    def norm(name: str, y: Tensor, eps: float) -> Tensor:
        parts = y.reshape(len(y), groups, -1)
        parts = (parts - parts.mean(2, keepdim=True)) / (parts.var(2, unbiased=False, keepdim=True) + eps).sqrt()
        out: Tensor = parts.view_as(y) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]
        return out

    def conv(name: str, y: Tensor) -> Tensor:
        weight, bias = w[f"{name}.weight"], w[f"{name}.bias"]
        if weight.shape[-1] != 4:
            return F.conv2d(y, weight, bias, padding=weight.shape[-1] // 2)
        spread = torch.zeros(*y.shape[:2], 2 * y.shape[2] - 1, 2 * y.shape[3] - 1)
        spread[..., ::2, ::2] = y
        return F.conv2d(F.pad(spread, (2, 2, 2, 2)), weight.flip(2, 3).transpose(0, 1), bias)

    y = conv("conv_in", x)
    for i, up in enumerate(UPS):
        at = f"up_blocks.{i}."
        beside = conv(f"{at}skip_proj", y) if f"{at}skip_proj.weight" in w else y
        if up:
            beside = F.interpolate(beside, scale_factor=2.0, mode=skip)
        y = F.silu(conv(f"{at}conv1", norm(f"{at}norm1", y, 1e-6)))
        y = F.silu(conv(f"{at}conv2", norm(f"{at}norm2", y, 1e-6))) + beside
    return conv("conv_out", F.silu(norm("norm_out", y, 1e-5)))


def folder(where: Path, *, channels: int = 16, skip: str = "bilinear", **more: Any) -> Path:
    where.mkdir(parents=True, exist_ok=True)
    save_file(weights(channels), where / "diffusion_pytorch_model.safetensors")
    (where / "config.json").write_text(json.dumps({"norm_num_groups": 4, "interpolate": skip, "act_fn": "silu"} | more))
    return where


@pytest.mark.parametrize("skip", ["bilinear", "nearest"])
def test_a_file_is_the_network_written_by_hand(tmp_path: Path, skip: str) -> None:
    net = mf.LatentCheckpoint(str(folder(tmp_path, skip=skip)), "pocket")
    assert (net.scale, net.channels, net.skip, net.groups) == (4, 16, skip, 4)
    x = torch.randn(2, 16, 5, 7, generator=torch.Generator().manual_seed(1))
    got, want = net(x), by_hand(weights(), x, groups=4, skip=skip)
    assert got.shape == (2, 16, 20, 28) and got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with FlopCounterMode(display=False) as counted:
        net(x)
    assert counted.get_total_flops() == net.flops_per_cell * x[:, 0].numel()


def test_norms_of_small_values_are_those_written_by_hand(tmp_path: Path) -> None:
    """The last norm has another epsilon than the blocks', which only values about as small can show."""
    state = weights()
    for name in ("up_blocks.1.skip_proj", "up_blocks.1.conv2", "up_blocks.2.conv2"):
        for leaf in ("weight", "bias"):
            state[f"upsampler.{name}.{leaf}"] *= 1e-3
    save_file(state, tmp_path / "small.safetensors")
    x = torch.randn(1, 16, 5, 7, generator=torch.Generator().manual_seed(1))
    got = mf.LatentCheckpoint(str(tmp_path / "small.safetensors"), "pocket", groups=4)(x)
    torch.testing.assert_close(got, by_hand(state, x, groups=4, skip="bilinear"), rtol=1e-4, atol=1e-5)


def test_settings_that_nobody_gives_are_the_published_ones(tmp_path: Path) -> None:
    save_file(weights(4, widths=(32, 32, 32)), tmp_path / "alone.safetensors")
    alone = mf.LatentCheckpoint(str(tmp_path / "alone.safetensors"))
    assert (alone.skip, alone.groups) == ("bilinear", 32)
    (tmp_path / "config.json").write_text(json.dumps({"norm_num_groups": 16}))
    beside = mf.LatentCheckpoint(str(tmp_path / "alone.safetensors"))
    assert (beside.skip, beside.groups) == ("nearest", 16)


def test_pickles_of_tensors_are_read_and_code_is_not(tmp_path: Path) -> None:
    want = mf.LatentCheckpoint(str(folder(tmp_path / "f")), "pocket")
    x = torch.randn(1, 16, 4, 4)
    torch.save({"state_dict": weights(prefix="")}, tmp_path / "net.pth")
    assert torch.equal(mf.LatentCheckpoint(str(tmp_path / "net.pth"), "pocket", groups=4)(x), want(x))
    torch.save({**weights(), "evil": Evil(tmp_path / "ran")}, tmp_path / "evil.pth")
    with pytest.raises(WeightsError, match="could run code"):
        mf.LatentCheckpoint(str(tmp_path / "evil.pth"), groups=4)
    assert not (tmp_path / "ran").exists()


def test_what_is_no_such_file_says_so(tmp_path: Path) -> None:
    def refused(change: Any, text: str, **more: Any) -> None:
        state = weights()
        change(state)
        save_file(state, tmp_path / "x.safetensors")
        with pytest.raises((WeightsError, PlanError), match=text):
            mf.LatentCheckpoint(str(tmp_path / "x.safetensors"), **{"groups": 4} | more)

    refused(lambda s: None, "divisible", groups=5)
    refused(lambda s: None, "skip must be one of", skip="lanczos")
    refused(lambda s: None, "(?i)sha-?256", sha256="0" * 64)
    refused(lambda s: s.pop("upsampler.norm_out.bias"), "norm_out.bias")
    refused(lambda s: s.update(more=torch.zeros(1)), "more")
    refused(lambda s: s["upsampler.conv_in.bias"].fill_(torch.nan), "holds NaN or infinity")
    refused(lambda s: s.pop("upsampler.conv_in.weight"), "no latent upsampler of LSSGen")
    refused(lambda s: s.update({"upsampler.conv_out.weight": torch.zeros(4, 12, 3, 3)}), "conv_out")
    with pytest.raises(WeightsError):
        mf.LatentCheckpoint(str(tmp_path / "none.safetensors"))
    with pytest.raises(WeightsError, match="act_fn must be 'silu'"):
        mf.LatentCheckpoint(str(folder(tmp_path / "relu", act_fn="relu")))


def test_a_chain_draws_records_and_refuses_with_it(tmp_path: Path) -> None:
    where = folder(tmp_path / "net")
    model = mf.load("pocket", device="cpu")
    recipe: dict[str, Any] = {"low": (32, 32), "size": (128, 128), "steps": 1}
    chain = mf.recipes.latent(upscaler=mf.LatentCheckpoint(str(where), "pocket"), **recipe)
    result = mf.run(chain, model, PROMPT)
    assert result.pixels.shape == (1, 3, 128, 128)
    result.save(tmp_path / "a.png")
    record = mf.read_record(tmp_path / "a.png")
    assert "LatentCheckpoint" in (text := json.dumps(record["chain"])) and str(tmp_path) not in text
    file = where / "diffusion_pytorch_model.safetensors"
    again = mf.replay(tmp_path / "a.png", model=model, files=[file])
    assert torch.equal(again.pixels, result.pixels)
    with pytest.raises(PlanError, match="knows latents of 'flux1'"):
        mf.plan(mf.recipes.latent(upscaler=mf.LatentCheckpoint(str(where)), **recipe), model.info)
    four = mf.LatentCheckpoint(str(folder(tmp_path / "four", channels=4)), "pocket")
    with pytest.raises(PlanError, match="enlarges latents of 4 channels; pocket's have 16"):
        mf.plan(mf.recipes.latent(upscaler=four, **recipe), model.info)


def test_the_command_line_takes_it(tmp_path: Path) -> None:
    where = folder(tmp_path / "net")
    words = ["plan", "--model", "pocket", "--sr", f"latent:{where}", "--low", "32", "--size", "128"]
    code, out, err = call(*words)
    assert code == 0, err
    assert re.search("Lift", out)
    code, _, err = call(*words[:4], f"latent:{tmp_path / 'none'}", *words[5:])
    assert code != 0 and "none" in err


def test_one_of_the_users_own_on_the_command_line(here: Path) -> None:  # noqa: F811
    (here / "mine.py").write_text(
        "from dataclasses import dataclass\nimport mrflow as mf\nfrom torch.nn import functional as F\n\n\n"
        "@dataclass(frozen=True)\nclass Twice(mf.LatentUpscaler):\n    space: str = 'pocket'\n    scale = 2\n\n"
        "    def __call__(self, latents):\n        return F.interpolate(latents, scale_factor=2.0)\n\n\nnet = Twice()\n"
    )
    words = ("a big red circle", "--low", "32", "--size", "64", "--steps", "1", "--sr", "mine.py:net")
    code, _, err = call("generate", *words, "--out", "a.png")
    assert code == 0, err
    assert "mine:Twice" in str(mf.read_record(here / "a.png"))
    for more in (("refine", "a.png", "--sr", "mine.py:net"), ("plan", "--sr", "mine.py:net", "--ladder", "32,64")):
        code, _, err = call(*more)
        assert code == 2 and "over pixels" in " ".join(err.split()), err
    code, _, err = call("plan", "--sr", "mine.py:other")
    assert code == 2 and "its upscalers are net" in " ".join(err.split())
