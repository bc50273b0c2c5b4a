"""Held against real networks, a real reader and real vocabularies: `make test-real`."""

import base64
import csv
import gzip
import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import regex
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import save_file
from torch import Tensor, nn

import mrflow as mf
from experiments.real.packages import NETWORKS, network, photograph, shipped
from experiments.real.reader import read_array
from mrflow.models.qwen.text import CLOSING, DROPPED, TEMPLATE
from mrflow.sweep.metrics import Lpips, Measured
from mrflow.upscalers import load_upscaler
from mrflow.upscalers.weights import read_state

ncnn = pytest.importorskip("ncnn", reason="real networks are not installed here; make test-real has them")
State = dict[str, Tensor]


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    return photograph("chelsea.png")[None, :, 20:84, 100:180].contiguous()


def by_ncnn(param: Path, pixels: Tensor, *, fast: bool) -> Tensor:
    net = ncnn.Net()
    for name in ("vulkan_compute", "fp16_storage", "fp16_arithmetic", "fp16_packed", "bf16_storage"):
        setattr(net.opt, f"use_{name}", False)
    net.opt.use_winograd_convolution = net.opt.use_sgemm_convolution = fast
    net.load_param(str(param))
    net.load_model(str(param.with_suffix(".bin")))
    values = np.ascontiguousarray(pixels[0].numpy())
    extractor = net.create_extractor()
    extractor.input("data", ncnn.Mat(values))
    return torch.from_numpy(np.array(extractor.extract("output")[1]))[None]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_agree_with_ncnn_and_spandrel(name: str, pixels: Tensor, tmp_path: Path) -> None:
    """Within twice what two of ncnn's own algorithms differ by; a bias that is moved by 0.001 is seen."""
    fast, slow = (by_ncnn(network(name), pixels, fast=f) for f in (True, False))
    bound = 2 * distance(fast, slow)
    ours = load_upscaler(network(name))(pixels)
    assert min(distance(ours, fast), distance(ours, slow)) <= bound
    state = {k: v.contiguous() for k, v in read_state(network(name)).items()}
    save_file(state, tmp_path / "net.safetensors")
    assert distance(mf.Spandrel(str(tmp_path / "net.safetensors"))(pixels), ours) <= bound
    last = [k for k in state if k.endswith("bias")][-1]
    save_file({**state, last: state[last] + 0.001}, tmp_path / "moved.safetensors")
    assert distance(load_upscaler(tmp_path / "moved.safetensors")(pixels), slow) > bound


def old(state: State) -> State:
    """First-generation names of a x4 RRDBNet of 23 blocks."""
    numbers = {"conv_first": 0, "conv_up1": 3, "conv_up2": 6, "conv_hr": 8, "conv_last": 10}
    out: State = {}
    for name, tensor in state.items():
        new = re.sub(r"body\.(\d+)\.rdb(\d)\.conv(\d)", r"model.1.sub.\1.RDB\2.conv\3.0", name)
        new = new.replace("conv_body", "model.1.sub.23")
        head, _, tail = name.partition(".")
        out[f"model.{numbers[head]}.{tail}" if head in numbers else new] = tensor
    return out


def trunk(state: State) -> State:
    """Names that BSRGAN and ESRGAN's early releases use."""
    words = {"conv_body": "trunk_conv", "conv_up1": "upconv1", "conv_up2": "upconv2", "conv_hr": "HRconv"}
    out: State = {}
    for name, tensor in state.items():
        head, _, tail = name.partition(".")
        new = re.sub(r"body\.(\d+)\.rdb(\d)\.", r"RRDB_trunk.\1.RDB\2.", name)
        out[f"{words[head]}.{tail}" if head in words else new] = tensor
    return out


@pytest.mark.parametrize("naming", [dict, old, trunk])
def test_every_naming_and_format_is_the_same_network(naming: Any, pixels: Tensor, tmp_path: Path) -> None:
    state = naming(read_state(network("x4plus")))
    expected = load_upscaler(network("x4plus"))(pixels)
    torch.save({"params_ema": state}, tmp_path / "a.pth")
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "a.safetensors")
    for file in ("a.pth", "a.safetensors"):
        assert torch.equal(load_upscaler(tmp_path / file)(pixels), expected)


@pytest.mark.parametrize(("dtype", "least"), [("bfloat16", 45.0), ("float16", 60.0)])
@pytest.mark.parametrize("name", NETWORKS)
def test_half_precision(name: str, dtype: Any, least: float, pixels: Tensor) -> None:
    """PSNR against float32, in decibels; the figures are on the page on real inputs."""
    full, half = (load_upscaler(network(name), dtype=d)(pixels).clamp(0, 1) for d in (None, dtype))
    psnr = float(-10 * (full - half).square().mean().log10())
    print(f"\n{name} {dtype}: {psnr:.1f} dB")
    assert least < psnr < 120


def written(text: str, height: int, size: int = 256) -> np.ndarray[Any, Any]:
    font = ImageFont.truetype(str(shipped("matplotlib", "mpl-data/fonts/ttf/DejaVuSans.ttf")), height)
    image = Image.new("RGB", (size, size), (236, 230, 214))
    ImageDraw.Draw(image).text((16, size // 2 - height), text, font=font, fill=(30, 30, 40))
    return np.asarray(image)


def test_a_real_reader_scores_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Words that matplotlib's font writes, through the OneIG text score: read; under another's words: not."""
    from experiments.oneig import main

    words = ["HARBOUR", "quiet river", "MARKET 24", "open late", "Fresh bread", "NORTH", "lantern", "two pears"]
    tiles = tmp_path / "tiles" / "text" / "written"
    tiles.mkdir(parents=True)
    for i, word in enumerate(words):
        Image.fromarray(written(word, 32)).save(tiles / f"{i:03}-0.png")
    scores = []
    for shift in (0, 1):
        content = tmp_path / f"content-{shift}.csv"
        with content.open("w", newline="") as f:
            csv.writer(f).writerows(
                [("id", "text_content"), *((f"{i:03}", words[(i + shift) % len(words)]) for i in range(len(words)))]
            )
        args = ["text", str(tmp_path / "tiles"), "--name", "written", "--content", str(content)]
        monkeypatch.setattr(sys, "argv", ["oneig", *args, "--ocr", "experiments.real.reader:read"])
        assert main() == 0
        scores.append(capsys.readouterr().out)
    print(*scores)
    rows = [re.findall(r"[\d.]+", s.splitlines()[-1].split("]")[1]) for s in scores]  # ED, CR, WAC, clipped distance
    (distance, complete, accuracy, _), (other, none, nothing, _) = ([float(v) for v in row] for row in rows)
    assert (distance, complete, accuracy) == (0, 1, 1)
    assert other > 5 and (none, nothing) == (0, 0)


def test_the_reader_reads_the_embedded_worlds_words() -> None:
    from mrflow.scenes.grammar import parse_caption
    from mrflow.scenes.render import render

    captions = [f"the big blue word {w}" for w in ("CAT", "SUN", "HAPPY", "TREE")]
    read = []
    for caption in captions:
        picture = render(parse_caption(caption), 256)
        read.append(read_array((255 * picture).round().astype(np.uint8)))
    right = [a.upper() == c.rsplit(" ", 1)[1] for a, c in zip(read, captions, strict=True)]
    assert sum(right) >= 3, read


def test_lpips_with_real_linear_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """On a random trunk (the real one cannot be had here): our arithmetic, not a number for any table."""
    torch.manual_seed(0)
    sizes = ((3, 64, 11, 4, 2), (64, 192, 5, 1, 2), (192, 384, 3, 1, 1), (384, 256, 3, 1, 1), (256, 256, 3, 1, 1))
    layers: list[nn.Module] = []
    for i, (a, b, k, stride, padding) in enumerate(sizes):
        layers += [nn.Conv2d(a, b, k, stride, padding), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(3, 2)] if i in (0, 1, 4) else []
    features = nn.Sequential(*layers)
    trunk_net = nn.ModuleDict({"features": features})
    fake, models = ModuleType("torchvision"), ModuleType("torchvision.models")
    models.alexnet = lambda **_: trunk_net  # type: ignore[attr-defined]
    fake.models = models  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchvision", fake)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    monkeypatch.setitem(sys.modules, "tqdm", sys.modules.get("tqdm") or ModuleType("tqdm"))
    import lpips

    theirs = lpips.LPIPS(net="alex", version="0.1", pnet_rand=True, verbose=False).eval()
    save_file({f"features.{k}": v.clone() for k, v in features.state_dict().items()}, tmp_path / "a.safetensors")
    ours = Lpips(str(tmp_path / "a.safetensors"), str(shipped("lpips", "weights/v0.1/alex.pth")))
    a, b = (photograph(p)[:, 40:168, 40:168] for p in ("chelsea.png", "coffee.png"))
    with torch.no_grad():
        want = float(theirs(2 * a[None] - 1, 2 * b[None] - 1))
    got = ours(measured(a, b))["lpips"]
    assert got == pytest.approx(want, rel=1e-5)
    assert ours(measured(a, a))["lpips"] == 0


def measured(pixels: Tensor, reference: Tensor) -> Measured:
    import dataclasses

    blank = {f.name: None for f in dataclasses.fields(Measured)}
    return Measured(**{**blank, "pixels": pixels, "reference": reference})  # type: ignore[arg-type]


SPLIT = (  # how Qwen's tokenizer cuts text before its byte pairs are merged (its published tokenizer.json)
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def qwen_tokens(text: str) -> int:
    """How many tokens Qwen's real ranks make of a text; each <|...|> is one."""
    ranks = {}
    for line in shipped("dashscope", "resources/qwen.tiktoken").read_text("ascii").splitlines():
        token, rank = line.split()
        ranks[base64.b64decode(token)] = int(rank)
    count = 0
    for piece in re.split(r"(<\|\w+\|>)", text):
        if re.fullmatch(r"<\|\w+\|>", piece):
            count += 1
            continue
        for word in regex.findall(SPLIT, piece):
            parts = [bytes([b]) for b in word.encode()]
            while len(parts) > 1:
                best = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1 << 30))
                if parts[best] + parts[best + 1] not in ranks:
                    break
                parts[best : best + 2] = [parts[best] + parts[best + 1]]
            count += len(parts)
    return count


def test_qwens_template_by_its_real_vocabulary() -> None:
    before, _, after = TEMPLATE.partition("{}")
    assert qwen_tokens(before) == DROPPED == 34
    assert qwen_tokens(after) == CLOSING == 5
    assert qwen_tokens(TEMPLATE.format(" ")) - DROPPED == 6
    assert qwen_tokens(TEMPLATE.format("a cat")) - DROPPED == 7


def test_clips_vocabulary(tmp_path: Path) -> None:
    """transformers' tokenizer, as mrflow opens it, from the real merges: the tokens of open_clip's own code."""
    from mrflow.models.encoders import tokenizer_of

    packed = shipped("open_clip", "bpe_simple_vocab_16e6.txt.gz")
    merges = gzip.decompress(packed.read_bytes()).decode("utf-8").split("\n")[1 : 49152 - 256 - 2 + 1]
    spec = importlib.util.spec_from_file_location("clip_tokenizer", shipped("open_clip", "tokenizer.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    theirs = module.SimpleTokenizer(str(packed))
    words = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {words.get(k, k): v for k, v in theirs.encoder.items()}
    start, end = words.values()
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": start}
    config |= dict.fromkeys(("eos_token", "unk_token", "pad_token"), end)
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = tokenizer_of("CLIPTokenizer", tmp_path, len(vocabulary))
    for text in ("a photo of a cat", "Zürich 2024, façade!", "the word «ΔELTA» isn't here", "東京 🗼 at night"):
        want = theirs(text)[0].tolist()
        got = ours(text, padding="max_length", max_length=77, truncation=True)["input_ids"]
        end = want.index(49407)
        assert got[: end + 1] == want[: end + 1], text
