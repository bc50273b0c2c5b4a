"""Recorded stages in words."""

import subprocess
import sys

import pytest

import mrflow as mf
from mrflow.caches import TeaCache
from mrflow.records.chains import encode_chain
from mrflow.records.readable import stage_text
from mrflow.stage import AnyChain


@pytest.mark.parametrize(
    ("chain", "texts"),
    [
        (
            mf.recipes.paper(low=(128, 128), size=(256, 256), steps=6),
            [
                "Sample 128x128, Euler, Shifted(6 steps)", "Decode", "Upscale 256x256", "Encode", "Reinject sigma 0.12",
                "Refine Euler, DirectSigma(1 step)", "Decode",
            ],
        ),
        (
            mf.recipes.native(size=(64, 32), steps=50, guidance=mf.CFG(3.5), cache=TeaCache(0.25)),
            ["Sample 64x32, Euler, CFG(scale 3.5, packed), TeaCache(threshold 0.25), Shifted(50 steps)", "Decode"],
        ),
        (mf.recipes.ralu(size=(64, 64)), [
                "SampleRegions 64x64, steps 5, 6, 7, ends 0.3, 0.45, shifts 5.019, 2.589, 2.226, z 6.317, share 0.3",
                "Decode",
            ]),
    ],
)  # fmt: skip
def test_every_setting_is_said(chain: AnyChain, texts: list[str]) -> None:
    said = [" ".join(stage_text(stage)).strip() for stage in encode_chain(chain)]
    assert said == texts


def test_data_from_outside_is_only_text() -> None:
    deep: object = "x"
    for _ in range(100):
        deep = {"type": "Deep", "inner": deep}
    assert "..." in stage_text(deep)[1]
    assert stage_text(None) == ("None", "") and stage_text({"sigma": 1}) == ("?", "sigma 1")
    assert stage_text({"type": "m:Mine", "file": "/home/me/net.pth", "sha256": "ab", "n": list(range(99))}) == (
        "Mine", "file net.pth, n 0, 1, 2, 3, 4, 5, ... (99 in all)",
    )  # fmt: skip


def test_it_needs_no_torch() -> None:
    code = "import sys, mrflow.records.readable; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
