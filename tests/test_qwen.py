"""Qwen-Image: packed passes against single ones, ways of running, files of every layout and broken ones."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import mrflow as mf
from mrflow.cost import evaluated_sigmas, memory
from mrflow.display.notes import collect_notes
from mrflow.errors import PlanError, WeightsError
from mrflow.models import info
from mrflow.models.cuda_graphs import CudaGraph, GraphPool
from mrflow.models.describe import describe
from mrflow.models.fields import ModulationTables
from mrflow.models.flux.weights import FLUX_AUTOENCODER
from mrflow.models.layers import attention
from mrflow.models.qwen.backbone import Qwen
from mrflow.models.qwen.field import QwenField, qwen_step
from mrflow.models.qwen.transformer import packed_attention, positions_qwen
from mrflow.models.qwen.weights import QWEN_AUTOENCODER, wan
from tests.parity.test_flux import relative
from tests.tiny import write_qwen_repo

pytestmark = pytest.mark.filterwarnings("ignore")
UP = mf.Lanczos(2)
CHAIN = mf.recipes.paper(UP, low=(48, 64), size=(96, 128), steps=3)
PROMPTS = ["a cat", "a much longer tale of two towns", "a dog"]


@pytest.fixture(scope="session")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen_repo(tmp_path_factory.mktemp("qwen") / "repo")


def loaded(where: Any, **more: Any) -> Qwen:
    model = mf.load(where, device="cpu", **more)
    assert isinstance(model, Qwen)
    return model


def draw(model: mf.Backbone, *, chain: Any = CHAIN, batch: int = 1, **more: Any) -> mf.Result:
    return mf.run(chain, model, PROMPTS[:batch], seed=list(range(batch)), **more)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.integers(1, 9))
def test_packed_attention_is_attention_of_each_item(texts: list[int], image: int) -> None:
    texts = sorted(texts)
    g = torch.Generator().manual_seed(sum(texts) * image)
    total = sum(texts) + image * len(texts)
    q, k, v = (torch.randn(1, 2, total, 4, generator=g) for _ in range(3))
    got = packed_attention(q, k, v, texts=texts, image=image)
    at = 0
    for i, length in enumerate(texts):
        start = sum(texts) + i * image
        mine = torch.cat((torch.arange(at, at + length), torch.arange(start, start + image)))
        want = attention(q[:, :, mine], k[:, :, mine], v[:, :, mine])
        assert torch.allclose(got[:, :, mine], want, atol=1e-6)
        at += length


@pytest.mark.parametrize(
    ("h", "w", "rows", "columns", "start"),
    [(32, 32, (-16, 15), (-16, 15), 16), (58, 104, (-29, 28), (-52, 51), 52), (83, 83, (-42, 40), (-42, 40), 41)],
)
def test_positions_are_the_published_ones(
    h: int, w: int, rows: tuple[int, int], columns: tuple[int, int], start: int
) -> None:
    p = positions_qwen(h, w, 3)
    assert p[:3].tolist() == [[start + i] * 3 for i in range(3)]
    grid = p[3:]
    assert (grid[0, 1], grid[-1, 1]) == rows and (grid[0, 2], grid[-1, 2]) == columns
    assert bool((grid[:, 0] == 0).all()) and len(grid) == h * w
    with pytest.raises(PlanError, match="beyond position 4096"):
        positions_qwen(h, w, 4097 - start)


def test_one_pass_is_two_forwards(repo: Path) -> None:
    model = loaded(repo)
    cond, negative = model.condition(PROMPTS), model.condition([" "]).repeat(3)
    x = torch.randn(3, 16, 6, 10, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        c, u = model.field(cond, mf.FieldOptions(beside=(negative,)))(x, 0.7).chunk(2)
        assert relative(c, model.field(cond)(x, 0.7)) < 1e-6
        assert relative(u, model.field(negative)(x, 0.7)) < 1e-6
        assert relative(c, u) > 1e-3
        for i in range(3):
            one = model.field(model.condition([PROMPTS[i]]))(x[i : i + 1], 0.7)
            assert relative(c[i : i + 1], one) < 1e-6


def test_packed_and_in_turns_give_the_same_picture(repo: Path) -> None:
    model = loaded(repo)
    calls: list[int] = []
    model.transformer.img_in.register_forward_hook(lambda *_: calls.append(1))
    both = draw(model, batch=3).pixels
    packed = len(calls)
    guidance = mf.CFG(4.0, rescale=True, packed=False)
    turns = mf.recipes.paper(UP, low=(48, 64), size=(96, 128), steps=3, guidance=guidance)
    assert relative(draw(model, chain=turns, batch=3).pixels, both) < 1e-5
    assert (packed, len(calls) - packed) == (4, 8)


def test_branches_take_turns_when_memory_runs_out(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(repo)
    want = draw(model).pixels
    step = model._step

    def limited(*args: Tensor, key: object = None) -> Tensor:
        if isinstance(key, tuple) and len(key[1]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(*args, key=key)

    monkeypatch.setattr(model, "_step", limited)
    result = draw(model)
    assert relative(result.pixels, want) < 1e-5
    notes = [n for stage in result.stages for n in stage.notes]
    assert len(notes) == 2 and "take turns" in notes[0]


def test_a_batch_is_its_items(repo: Path) -> None:
    model = loaded(repo)
    both = draw(model, batch=3).pixels
    for i, prompt in enumerate(PROMPTS):
        assert relative(mf.run(CHAIN, model, prompt, seed=i).pixels, both[i : i + 1]) < 5e-5


def test_folding_and_offloading_give_the_same_bits(repo: Path) -> None:
    want = draw(loaded(repo, fold=False), batch=2).pixels
    for offload in ("none", "phase", "block"):
        for fold in (True, False):
            assert torch.equal(draw(loaded(repo, offload=offload, fold=fold), batch=2).pixels, want), (offload, fold)


@pytest.mark.parametrize("storage", [None, "fp8"])
@pytest.mark.parametrize("offload", ["none", "phase", "block"])
@pytest.mark.parametrize("fold", [True, False])
def test_memory_is_predicted_to_the_byte_for_weights(repo: Path, offload: Any, storage: Any, fold: bool) -> None:
    model = loaded(repo, offload=offload, storage=storage, fold=fold)
    predicted = memory(mf.plan(CHAIN, model.info), offload=offload, fold=fold, value_bytes=0)
    draw(model)
    assert predicted is not None and model.ledger.peak == predicted.peak


def test_a_chain_folds_the_modulations_away(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MRFLOW_CACHE", str(tmp_path / "cache"))
    want = draw(loaded(repo), batch=2).pixels
    read: list[str] = []
    from mrflow.checkpoints import safetensors as checkpoint

    mapped = checkpoint.map_tensor
    monkeypatch.setattr(
        checkpoint, "map_tensor", lambda entry, files: read.append(str(entry.start)) or mapped(entry, files)
    )
    model = loaded(repo, fold=CHAIN)
    first = len(read)
    assert torch.equal(draw(model, batch=2).pixels, want)
    assert model.info.footprint is not None and model.info.footprint.modulation == 0
    full = loaded(repo).info
    assert model.info.architecture == full.architecture and full.footprint is not None
    assert model.info.footprint.total == full.footprint.total - full.footprint.modulation
    assert len(list((tmp_path / "cache").iterdir())) == 1
    read.clear()
    assert torch.equal(draw(loaded(repo, fold=CHAIN), batch=2).pixels, want)
    assert len(read) == first - 10  # five linears of weight and bias were not read again
    (kept,) = (tmp_path / "cache").iterdir()
    kept.write_bytes(b"broken")
    assert torch.equal(draw(loaded(repo, fold=CHAIN), batch=2).pixels, want)
    assert kept.stat().st_size > 100
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("MRFLOW_CACHE", str(tmp_path / "file" / "below"))
    with collect_notes() as notes:
        assert torch.equal(draw(loaded(repo, fold=CHAIN), batch=2).pixels, want)
    assert len(notes) == 1 and "could not be kept" in notes[0]
    with pytest.raises(PlanError, match=r"loaded with fold=chain, for the levels of that chain; sigma 0\.\d+ is not"):
        draw(model, chain=mf.recipes.native(size=(64, 64), steps=5))
    with pytest.raises(PlanError, match="prompt too"):
        from tests.parity.test_official import pipeline

        pipeline(tmp_path / "flux", guidance=True)
        mf.load(tmp_path / "flux", device="cpu", fold=CHAIN)
    with pytest.raises(PlanError, match="pocket takes no fold"):
        mf.load("pocket", fold=CHAIN)


def test_levels_of_a_chain(repo: Path) -> None:
    found = evaluated_sigmas(CHAIN, mf.QWEN)
    assert len(found) == 4 and found[0] == 1.0 and found[-1] == 0.12
    heun = evaluated_sigmas(mf.recipes.native(size=(64, 64), steps=2, solver=mf.Heun()), mf.QWEN)
    assert len(heun) >= 2


def test_blocks_are_compiled_once_for_all_resolutions_and_prompts(repo: Path) -> None:
    code = f"""
import torch, mrflow as mf
from torch._dynamo.testing import CompileCounter
counter = CompileCounter()
where, chain = {str(repo)!r}, mf.recipes.paper(mf.Lanczos(2), low=(32, 32), size=(64, 64), steps=3)
plain = mf.run(chain, mf.load(where, device="cpu"), "a cat").pixels
model = mf.load(where, device="cpu", compile=counter)
first = mf.run(chain, model, "a cat").pixels
compiled = counter.frame_count
for n in range(6):
    mf.run(chain, model, "a dog" + " and a cat" * n, seed=3)
assert counter.frame_count == compiled, (counter.frame_count, compiled)
assert (first - plain).norm() < 1e-4 * plain.norm(), float((first - plain).norm())
print(compiled)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr[-2000:]
    # Norm, heads, two gates; two of them again where a view begins or ends elsewhere.
    assert done.stdout.split()[-1] == "6"


def test_graphs_of_two_resolutions_and_six_prompt_lengths_are_recorded_once(
    repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One for each pair of a resolution and a length, few enough for one pool, so that coming back records nothing."""
    model, plain, captured = loaded(repo), loaded(repo), list[object]()

    def capture(f: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> tuple[Callable[[], None], Tensor]:
        captured.append(f)
        output = f(*inputs).clone()
        return lambda: output.copy_(f(*inputs)), output  # type: ignore[return-value]

    pool = GraphPool(capture=capture)
    monkeypatch.setattr(model, "_step", CudaGraph(partial(qwen_step, model.transformer), pool))
    given = [model.condition(["a dog" + " and a cat" * n, "a cat"]).tensors for n in range(6)]
    lengths = [[int(n) for n in one["mask"].sum(1)] for one in given]
    assert len({tuple(one) for one in lengths}) == 6
    texts = [
        [tensors["context"][i, :n] for i, n in enumerate(one)] for tensors, one in zip(given, lengths, strict=True)
    ]
    for count in (0, 12, 12):  # the first call of each runs itself, the second is recorded, the third is replayed
        for h in (2, 4):
            for words in texts:
                tokens, found = torch.randn(1, 4 * h, 64), list[Tensor]()
                for each in (model, plain):
                    table = ModulationTables(each._tables, None)
                    field = QwenField(each.transformer, [words[:1], words[1:]], step=each._step, table=table)
                    with torch.inference_mode():
                        found.append(field.velocity(tokens, 0.5, h, 4))
                assert torch.equal(*found)
        assert len(captured) == count
    assert len(pool.kept) == 12


def test_wan_names_give_the_same_autoencoder(repo: Path, tmp_path: Path) -> None:
    names: dict[str, str] = {}
    tensors = load_file(repo / "vae" / "diffusion_pytorch_model.safetensors")
    for name in tensors:
        names[name] = wan(name)[0]
    assert len(set(names.values())) == len(tensors)
    save_file({names[n]: t for n, t in tensors.items()}, tmp_path / "qwen_image_vae.safetensors")
    shutil.copy(repo / "transformer" / "diffusion_pytorch_model.safetensors", tmp_path / "net.safetensors")
    shutil.copy(repo / "transformer" / "config.json", tmp_path / "config.json")
    ours, theirs = (QWEN_AUTOENCODER.prepare(p).read() for p in (repo / "vae", tmp_path / "qwen_image_vae.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    model = loaded(tmp_path / "net.safetensors", text=repo)
    assert relative(draw(model).pixels, draw(loaded(repo)).pixels) < 1e-6
    assert "Qwen-Image autoencoder" in "\n".join(describe(tmp_path / "qwen_image_vae.safetensors"))


def test_an_fp8_file_and_fp8_storage(repo: Path, tmp_path: Path) -> None:
    tensors = load_file(repo / "transformer" / "diffusion_pytorch_model.safetensors")
    plain = {k: t.to(torch.float8_e4m3fn) for k, t in tensors.items()}
    save_file(plain, tmp_path / "net.safetensors")
    shutil.copy(repo / "transformer" / "config.json", tmp_path / "config.json")
    model = loaded(tmp_path / "net.safetensors", vae=repo / "vae", text=repo)
    assert model.transformer.dtype == torch.bfloat16
    for file, want in ((model, 0.5), (loaded(repo, storage="fp8"), 0.2)):
        assert 0 < relative(draw(file).pixels, draw(loaded(repo)).pixels) < want


def test_long_prompts_lose_words_and_say_so(repo: Path) -> None:
    model = loaded(repo)
    with collect_notes() as notes:
        assert model.condition(["a" * 400])["context"].shape[1] == 512
    assert len(notes) == 1 and notes[0].startswith("Qwen-Image reads 512 tokens of a prompt and does not see: 'aaa")
    with collect_notes() as notes:
        model.condition(["a" * 300])
    assert notes == []


def edit(folder: Path, part: str, change: Callable[[dict[str, Tensor]], Any]) -> None:
    (path,) = (folder / part).glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def configure(folder: Path, part: str, **values: Any) -> None:
    path = folder / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


QKV = "transformer_blocks.0.attn.to_q.weight"
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a missing key": (lambda f: edit(f, "transformer", lambda t: t.pop(QKV)), f"1 problems: {QKV} is missing"),
    "an extra key": (
        lambda f: edit(f, "transformer", lambda t: t.update(more=torch.ones(1))),
        "more is not expected",
    ),
    "an extra key of the autoencoder": (
        lambda f: edit(f, "vae", lambda t: t.update(more=torch.ones(1))),
        "more is not expected",
    ),
    "a wrong shape": (lambda f: edit(f, "transformer", lambda t: t.update({QKV: torch.ones(2, 2)})), r"\(2, 2\)"),
    "another layer count": (lambda f: configure(f, "transformer", num_layers=7), r"num_layers 7 \(weights: 2\)"),
    "an edit model": (lambda f: configure(f, "transformer", zero_cond_t=True), "zero_cond_t: another model"),
    "text without its norm": (
        lambda f: edit(f, "text_encoder", lambda t: t.pop("model.norm.weight")),
        "model.norm.weight is missing",
    ),
    "no words": (lambda f: empty(f / "tokenizer"), "tokenizer .*vocab.json and merges.txt"),
    "FLUX's autoencoder": (
        lambda f: edit(f, "vae", lambda t: (t.clear(), t.update({"decoder.up.0.block.0.norm1.weight": torch.ones(1)}))),
        "is not a Qwen-Image autoencoder: it looks like a FLUX autoencoder",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_wrong_is_said(what: str, repo: Path, tmp_path: Path) -> None:
    shutil.copytree(repo, tmp_path / "r")
    change, said = SPOILT[what]
    change(tmp_path / "r")
    with pytest.raises(WeightsError, match=said):
        loaded(tmp_path / "r")


def test_what_load_refuses_of_the_encoder_plan_refuses(repo: Path, tmp_path: Path) -> None:
    shutil.copytree(repo, tmp_path / "r")
    config = json.loads((repo / "text_encoder" / "config.json").read_text())
    configure(tmp_path / "r", "text_encoder", text_config=config["text_config"] | {"num_hidden_layers": 7})
    for use in (loaded, lambda p: info(str(p))):
        with pytest.raises(WeightsError, match=r"num_hidden_layers 7 \(weights: 2\)"):
            use(tmp_path / "r")


def test_its_autoencoder_is_not_taken_for_flux(repo: Path) -> None:
    with pytest.raises(WeightsError, match="is not a FLUX autoencoder: it looks like a Qwen-Image autoencoder"):
        FLUX_AUTOENCODER.prepare(repo / "vae").read()


def test_vision_tower_and_head_are_never_read(repo: Path, tmp_path: Path) -> None:
    shutil.copytree(repo, tmp_path / "r")

    def spoil(tensors: dict[str, Tensor]) -> None:
        for name in tensors:
            if name.startswith(("visual.", "lm_head.")):
                tensors[name] = torch.full_like(tensors[name], float("nan"))

    edit(tmp_path / "r", "text_encoder", spoil)
    edit(tmp_path / "r", "vae", lambda t: t.update({n: x * float("nan") for n, x in t.items() if "time_conv" in n}))
    assert torch.equal(draw(loaded(tmp_path / "r")).pixels, draw(loaded(repo)).pixels)


def test_conditions_of_another_model_are_refused(repo: Path) -> None:
    model = loaded(repo)
    for tensors, said in (
        ({"pooled": torch.ones(1, 3)}, "needs a condition with context"),
        ({"context": torch.ones(1, 3, 7)}, r"needs context \(batch, tokens, 32\)"),
        ({"context": torch.ones(1, 3, 32), "mask": torch.zeros(1, 3, dtype=torch.bool)}, "no text at all"),
    ):
        with pytest.raises(PlanError, match=said):
            mf.run(CHAIN, model, condition=mf.Condition(tensors))
    plain = mf.Condition({"context": torch.randn(1, 5, 32)})
    assert mf.run(mf.recipes.native(size=(32, 32), steps=1), model, condition=plain).nfe == 2


def test_the_command_line_draws_from_a_folder(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_cli import call

    monkeypatch.chdir(tmp_path)
    words = ["--model", str(repo), "--size", "64x64", "--low", "32x32", "--steps", "2", "--sr", "lanczos"]
    code, out, err = call("generate", "a cat", *words, "--device", "cpu", "--out", "x.png")
    assert code == 0 and out.strip() == "x.png", err
    assert json.loads(call("inspect", "--json", "x.png")[1])["model"] == "qwen-image"
    code, out, _ = call("plan", "--model", "qwen-image", "--recipe", "paper")
    assert code == 0 and "offload block" in out and "native    50 steps: 100 forwards" in out
    code, out, _ = call("inspect", str(repo))
    assert code == 0 and "Qwen-Image transformer" in out and "Qwen2.5-VL text encoder" in out
