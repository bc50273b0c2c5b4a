"""BasicSR(options, weights): the import shim everywhere, the rest against the real package (make test-basicsr)."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mrflow as mf
from mrflow.upscalers import basicsr_package
from mrflow.upscalers.nets import RRDBParams
from mrflow.upscalers.torchvision_shim import LOST, use_shim
from tests.sr_files import rrdb

real = pytest.mark.skipif(
    importlib.util.find_spec("basicsr") is None, reason="basicsr is not installed here; make test-basicsr has it"
)
OPTIONS = """
scale: 2
network_g:
  type: RRDBNet
  num_in_ch: 3
  num_out_ch: 3
  scale: 2
  num_feat: 8
  num_block: 2
  num_grow_ch: 4
path:
  pretrain_network_g: net.pth
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with an option file and weights, and a module that imports torchvision as basicsr does."""
    (tmp_path / "options.yml").write_text(OPTIONS)
    torch.save({"params_ema": rrdb(RRDBParams(8, 2, 4, unshuffle=2))}, tmp_path / "net.pth")
    (tmp_path / "old_library.py").write_text(
        "import torchvision\n"
        "from torchvision.models import vgg as vgg\n"
        "from torchvision.transforms.functional import normalize\n"
        "from torchvision.transforms.functional_tensor import rgb_to_grayscale\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "old_library", raising=False)
    yield tmp_path
    sys.modules.pop("old_library", None)


def _fake_torchvision(folder: Path) -> None:
    """A torchvision as it is since 0.17: without functional_tensor."""
    for name in ("", "models", "models/vgg", "transforms"):
        (folder / "torchvision" / name).mkdir(parents=True, exist_ok=True)
        (folder / "torchvision" / name / "__init__.py").write_text("__version__ = '0.29'\n")
    (folder / "torchvision" / "transforms" / "functional.py").write_text(
        "def normalize(x): return x\ndef rgb_to_grayscale(x): return ('grey', x)\n"
    )


def _forget() -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "torchvision"]:
        del sys.modules[name]


def test_the_shim_gives_the_lost_module_back(here: Path) -> None:
    _forget()
    _fake_torchvision(here)
    importlib.invalidate_caches()
    try:
        with pytest.raises(ImportError, match="functional_tensor"):
            importlib.import_module("old_library")
        with use_shim():
            library = importlib.import_module("old_library")
        assert library.rgb_to_grayscale(3) == ("grey", 3)
        assert LOST not in sys.modules and "torchvision" in sys.modules
    finally:
        _forget()


@pytest.mark.parametrize("broken", [False, True])
def test_the_shim_stands_in_for_a_torchvision_that_is_not_there(here: Path, *, broken: bool) -> None:
    if not broken and importlib.util.find_spec("torchvision") is not None:
        pytest.skip("torchvision is installed here")
    if broken:
        (here / "torchvision").mkdir()
        (here / "torchvision" / "__init__.py").write_text(
            "raise RuntimeError('operator torchvision::nms does not exist')"
        )
        importlib.invalidate_caches()
    _forget()
    with use_shim():
        library = importlib.import_module("old_library")
    assert not [n for n in sys.modules if n.split(".")[0] == "torchvision"]
    for use in (library.normalize, library.vgg.vgg19, library.rgb_to_grayscale):
        with pytest.raises(ImportError, match=r"torchvision\..* is needed here, and torchvision cannot be imported"):
            use(1)


@pytest.mark.skipif(importlib.util.find_spec("basicsr") is not None, reason="basicsr is installed here")
def test_without_basicsr_the_word_is_clear(here: Path) -> None:
    with pytest.raises(mf.PlanError, match=r"pip install 'mrflow\[basicsr\]'"):
        mf.BasicSR(str(here / "options.yml"))


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("scale: 2", "has no network_g with a type"),
        ("[1, 2]", "has no network_g with a type"),
        ("a: [", "is not an option file in YAML"),
        (OPTIONS.replace("path:\n  pretrain_network_g: net.pth", ""), "names no weights"),
        (OPTIONS.replace("scale: 2", "scale: big"), "must give the scale"),
    ],
)
def test_options_that_cannot_work(here: Path, text: str, error: str) -> None:
    (here / "options.yml").write_text(text)
    with pytest.raises(mf.PlanError, match=error):
        mf.BasicSR(str(here / "options.yml"))


@real
def test_a_registered_network_equals_ours(here: Path) -> None:
    """basicsr's own RRDBNet is the oracle of our reading of it, weights found by the option file."""
    theirs, ours = mf.BasicSR(str(here / "options.yml")), mf.Checkpoint(str(here / "net.pth"))
    x = torch.rand(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    assert theirs.scale == 2
    assert float((theirs(x) - ours(x)).abs().max()) < 1e-4
    mf.testing.check_stage(mf.Upscale(theirs))
    assert torch.equal(mf.BasicSR(str(here / "options.yml"), str(here / "net.pth"))(x), theirs(x))


@real
@pytest.mark.filterwarnings("ignore:torch.meshgrid")
@pytest.mark.parametrize(
    "settings",
    [
        {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 2, "upscale": 2},
        {"type": "SRVGGNetCompact", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_conv": 2, "upscale": 2},
        {
            "type": "SwinIR", "upscale": 2, "in_chans": 3, "img_size": 16, "window_size": 8, "depths": [2],
            "embed_dim": 12, "num_heads": [2], "mlp_ratio": 2, "upsampler": "pixelshuffle", "resi_connection": "1conv",
        },
    ],
    ids=lambda s: s["type"],
)  # fmt: skip
def test_other_architectures(here: Path, settings: dict[str, Any]) -> None:
    import yaml

    basicsr_package()
    from basicsr.archs import build_network  # type: ignore[import-not-found]

    net = build_network(settings).eval()
    torch.save({"params": net.state_dict()}, here / "other.pth")
    (here / "other.yml").write_text(yaml.safe_dump({"scale": 2, "network_g": settings}))
    up = mf.BasicSR(str(here / "other.yml"), str(here / "other.pth"))
    x = torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        assert torch.allclose(up(x), net(x), atol=1e-5)
    assert up(torch.rand(1, 3, 13, 9)).shape == (1, 3, 26, 18)


@real
def test_a_network_of_ones_own_registered_in_the_registry(here: Path) -> None:
    basicsr_package()
    from basicsr.utils.registry import ARCH_REGISTRY  # type: ignore[import-not-found]

    class Twice(nn.Module):
        def __init__(self, gain: float = 1.0) -> None:
            super().__init__()
            self.gain = nn.Parameter(torch.tensor(gain))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.gain * x.repeat_interleave(2, -1).repeat_interleave(2, -2)

    if "Twice" not in ARCH_REGISTRY:
        ARCH_REGISTRY.register(Twice)
    (here / "own.yml").write_text("scale: 2\nnetwork_g: {type: Twice, gain: 3.0}\n")
    torch.save({"params": {"gain": torch.tensor(0.5)}}, here / "own.pth")
    x = torch.rand(1, 3, 3, 4)
    assert torch.allclose(
        mf.BasicSR(str(here / "own.yml"), str(here / "own.pth"))(x), mf.Interpolate(2, "nearest")(x) / 2
    )


@real
def test_what_does_not_fit_is_named(here: Path) -> None:
    (here / "bad.yml").write_text(OPTIONS.replace("type: RRDBNet", "type: Nothing"))
    with pytest.raises(mf.PlanError, match=r"basicsr has no network 'Nothing'; it has .*RRDBNet"):
        mf.BasicSR(str(here / "bad.yml"))
    (here / "bad.yml").write_text(OPTIONS.replace("num_feat", "number"))
    with pytest.raises(mf.PlanError, match="network_g does not fit RRDBNet"):
        mf.BasicSR(str(here / "bad.yml"))
    (here / "bad.yml").write_text(OPTIONS.replace("num_block: 2", "num_block: 3"))
    with pytest.raises(mf.WeightsError, match=r"does not fit RRDBNet: 30 problems: body\.2"):
        mf.BasicSR(str(here / "bad.yml"))


@real
def test_a_picture_is_replayed(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    up = mf.BasicSR(str(here / "options.yml"))
    chain = mf.recipes.paper(up, low=(32, 32), size=(64, 64), steps=2)
    result = mf.run(chain, mf.toy(), "a")
    result.save(here / "out.png")
    assert str(here) not in str(mf.read_record(here / "out.png"))
    again = mf.replay(here / "out.png", model=mf.toy(), files=[here])
    assert torch.equal(again.pixels, result.pixels)
