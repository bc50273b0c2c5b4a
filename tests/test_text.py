"""FLUX.1's text encoders against diffusers' own encoding, on a tiny repository with every part."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import mrflow as mf
from mrflow.display.notes import collect_notes
from mrflow.errors import PlanError, PromptError, WeightsError
from mrflow.models import info
from mrflow.models.encoders import check_prompt
from mrflow.models.flux.backbone import Flux1
from mrflow.models.flux.text import find_text, prepare_text
from tests.parity.reenact import official
from tests.parity.test_flux import relative, scatter
from tests.tiny import clip_tokenizer, t5_tokenizer, write_flux_repo

pytestmark = pytest.mark.filterwarnings("ignore")
PROMPTS = ["a cat", "", "a long, long tale! " * 3, "Ünïcödé 日本 🙂 and more"]
UP = mf.Lanczos(2)


@pytest.fixture(scope="session")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_flux_repo(tmp_path_factory.mktemp("flux") / "repo")


@pytest.fixture(scope="session")
def pipe(repo: Path) -> Any:
    from diffusers import FluxPipeline

    return FluxPipeline.from_pretrained(repo)


def planned(where: Path) -> object:
    return info(str(where))


def loaded(where: Path, **more: Any) -> Flux1:
    model = mf.load(where, device="cpu", **more)
    assert isinstance(model, Flux1)
    return model


@pytest.mark.parity
@pytest.mark.parametrize("prompt", PROMPTS)
def test_prompts_are_encoded_as_the_reference_does(prompt: str, repo: Path, pipe: Any) -> None:
    cond = loaded(repo).condition([prompt])
    context, pooled, _ = pipe.encode_prompt(prompt, prompt)
    assert cond["context"].shape == (1, 512, 24) and cond["pooled"].shape == (1, 12)
    assert relative(cond["context"], context.detach()) < 1e-5
    assert relative(cond["pooled"], pooled.detach()) < 1e-6


@pytest.mark.parity
def test_in_bfloat16(repo: Path, tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    narrow = FluxPipeline.from_pretrained(repo, torch_dtype=torch.bfloat16)
    cond = loaded(repo, dtype=torch.bfloat16).condition([PROMPTS[2]])
    context, pooled, _ = narrow.encode_prompt(PROMPTS[2], PROMPTS[2])
    assert cond["context"].dtype == torch.bfloat16
    assert relative(cond["context"], context.detach()) < 1e-2
    assert relative(cond["pooled"], pooled.detach()) < 1e-2


@pytest.mark.parity
@pytest.mark.parametrize(("case", "guidance", "length"), [("plain", False, 256), ("uneven", True, 512)])
def test_a_whole_run_from_prompts_is_theirs(case: str, guidance: bool, length: int, tmp_path: Path) -> None:
    from diffusers import FluxPipeline

    folder = write_flux_repo(tmp_path / "r", case=case, guidance=guidance, shard="300KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 1
    words = {"prompt": ["a cat", "a long tale of two " * 4], "max_sequence_length": length}
    size: dict[str, Any] = dict(low=(32, 64), size=(64, 128), steps=4)
    _, want = official(FluxPipeline.from_pretrained(folder), words, seeds=[1, 7], upscale=UP, **size)
    model = loaded(folder)
    assert model.info.name == ("flux1-dev" if guidance else "flux1-schnell")
    result = mf.run(mf.recipes.official(UP, **size), model, words["prompt"], seed=[1, 7])
    assert relative(result.pixels, want) < 1e-4


def test_a_prompt_does_not_depend_on_its_neighbours(repo: Path) -> None:
    model = loaded(repo)
    both = model.condition(PROMPTS)
    for i, prompt in enumerate(PROMPTS):
        one = model.condition([prompt])
        assert torch.equal(one["context"][0], both["context"][i]) and torch.equal(one["pooled"][0], both["pooled"][i])


def test_equal_prompts_are_encoded_once(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = loaded(repo)
    assert model._words is not None
    calls: list[int] = []
    model._words.t5.register_forward_hook(lambda *_: calls.append(1))
    cond = model.condition(["a", "b", "a", "a"])
    assert len(calls) == 2
    assert torch.equal(cond["context"][0], cond["context"][3])
    assert not torch.equal(cond["context"][0], cond["context"][1])


def test_lost_words_are_told(repo: Path) -> None:
    model, long = loaded(repo), "a" * 74 + "bcdef" + "g" * 440
    with collect_notes() as notes:
        model.condition(["a" * 75])
    assert notes == []
    with collect_notes() as notes:
        model.condition([long])
    assert len(notes) == 2
    assert notes[0].startswith("CLIP reads 77 tokens and does not see (T5 still may): 'cdefggg")
    assert notes[1] == "T5 reads 512 tokens and does not see: 'ggggggggg'"
    with collect_notes() as notes:  # of several prompts, which one
        model.condition(["a", long])
    assert notes[1] == f"T5 reads 512 tokens of {long[:40]!r} and does not see: 'ggggggggg'"
    result = mf.run(mf.recipes.native(size=(32, 32), steps=1), model, long)
    assert len(result.notes) == 2 and result.record()["notes"] == list(result.notes)


def test_what_is_no_text_is_refused(repo: Path) -> None:
    model = loaded(repo)
    for prompt in ("a\0b", "\ud800", "a" * 1_000_001):
        with pytest.raises(PromptError):
            model.condition([prompt])
    with pytest.raises(PromptError, match="must be text, got 3"):
        check_prompt(3)
    assert model._words is not None
    for length in (0, 513):
        with pytest.raises(PlanError, match="from 1 to 512"):
            model._words(["a"], length=length)


def test_offloading_does_not_change_words(repo: Path) -> None:
    want = loaded(repo).condition(PROMPTS)
    for offload in ("phase", "block"):
        model = loaded(repo, offload=offload)
        got = model.condition(PROMPTS)
        assert torch.equal(got["context"], want["context"]) and torch.equal(got["pooled"], want["pooled"])
        assert model.info.footprint is not None
        f = model.info.footprint
        assert model.ledger.peak == f.text + (f.text_layers if offload == "phase" else f.text_pair)


def single_files(repo: Path, folder: Path, *, dtype: torch.dtype, both: bool = True) -> Path:
    """The community's way: one file an encoder, no configs; T5's embedding under both names."""
    shutil.copytree(repo / "tokenizer", folder / "tokenizer")
    shutil.copytree(repo / "tokenizer_2", folder / "tokenizer_2")
    clip = load_file(repo / "text_encoder" / "model.safetensors")
    t5 = load_file(repo / "text_encoder_2" / "model.safetensors")
    name = "text_model." if not next(iter(clip)).startswith("text_model.") else ""
    save_file({name + k: v for k, v in clip.items()}, folder / "clip_l.safetensors")
    if both:
        t5["encoder.embed_tokens.weight"] = t5["shared.weight"].clone()
    save_file({k: v.to(dtype) for k, v in t5.items()}, folder / "t5xxl.safetensors")
    return folder


@pytest.mark.parametrize("both", [True, False])
def test_single_files_give_the_same_states(repo: Path, tmp_path: Path, both: bool) -> None:
    # Sizes of a config are read off the shapes; the tiny CLIP has heads of 6, which its file cannot say.
    files = find_text(single_files(repo, tmp_path, dtype=torch.float32, both=both))
    assert files.t5_config == {} and files.clip_config == {}
    context, pooled = prepare_text(files)()([PROMPTS[2]])
    want = loaded(repo).condition([PROMPTS[2]])
    assert relative(context, want["context"]) < 0.2  # the tiny T5's relative distances differ from the published ones
    assert pooled.shape == want["pooled"].shape


def test_what_other_pipelines_keep_in_a_clip_file_is_left_out(repo: Path, tmp_path: Path) -> None:
    """Tables of positions and projections, as CLIP's own repository and older files have them."""
    folder = single_files(repo, tmp_path, dtype=torch.float32, both=False)
    (path,) = (p for p in folder.glob("*.safetensors") if "t5" not in p.name)
    tensors = load_file(path)
    want = prepare_text(find_text(folder))()([PROMPTS[2]])[1]
    prefix = next(name for name in tensors if name.endswith("position_embedding.weight")).removesuffix(
        "position_embedding.weight"
    )
    more = {f"{prefix}position_ids": torch.arange(77)[None], "text_projection.weight": torch.ones(2, 2)}
    save_file({**tensors, **more, "logit_scale": torch.ones(())}, path)
    assert torch.equal(prepare_text(find_text(folder))()([PROMPTS[2]])[1], want)
    save_file({**tensors, f"{prefix}other.weight": torch.ones(2)}, path)
    with pytest.raises(WeightsError, match=r"other\.weight is not expected"):
        prepare_text(find_text(folder))


@pytest.mark.parity
def test_single_files_have_the_published_settings(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    letters, pieces = clip_tokenizer(tmp_path / "tokenizer"), t5_tokenizer(tmp_path / "tokenizer_2")
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=letters,
            hidden_size=128,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=2,  # of 64 channels
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
            eos_token_id=2,
        )
    ).eval()
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=pieces,
            d_model=24,
            d_ff=40,
            d_kv=8,
            num_heads=3,
            num_layers=2,
            feed_forward_proj="gated-gelu",
            layer_norm_epsilon=1e-6,
            relative_attention_num_buckets=32,
            relative_attention_max_distance=128,
            tie_word_embeddings=False,
        )
    ).eval()
    scatter(clip, 5)
    scatter(t5, 6)
    words = {f"text_model.{n.removeprefix('text_model.')}": t for n, t in clip.state_dict().items()}
    save_file(words, tmp_path / "clip_l.safetensors")
    embedding = t5.get_input_embeddings().weight.detach()
    t5.encoder.embed_tokens.weight.data.copy_(embedding)
    save_file({n: t.clone() for n, t in t5.state_dict().items()}, tmp_path / "t5xxl_fp16.safetensors")
    ours = prepare_text(find_text(tmp_path))()
    context, pooled = ours([PROMPTS[2]])
    with torch.no_grad():
        states = t5(ours._tokens(ours.tokenizer_2, PROMPTS[2], 512, "T5", "")).last_hidden_state
        vector = clip(ours._tokens(ours.tokenizer, PROMPTS[2], 77, "CLIP", "")).pooler_output
    assert relative(context, states) < 1e-6 and relative(pooled, vector) < 1e-6


@pytest.mark.parity
def test_half_precision_t5_has_the_values_of_transformers(repo: Path) -> None:
    from transformers import T5EncoderModel

    theirs = dict(T5EncoderModel.from_pretrained(repo / "text_encoder_2", dtype=torch.float16).named_parameters())
    for name, ours in prepare_text(find_text(repo), dtype=torch.float16)().t5.named_parameters():
        assert ours.dtype == theirs[name].dtype and torch.equal(ours, theirs[name]), name


def test_eight_bit_and_half_precision_t5(repo: Path, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    narrow = prepare_text(find_text(single_files(repo, tmp_path / "a", dtype=torch.float8_e4m3fn)))()
    assert {p.dtype for p in narrow.t5.parameters()} == {torch.bfloat16}
    half = prepare_text(find_text(single_files(repo, tmp_path / "b", dtype=torch.float16)))()
    wide = {n for n, p in half.t5.named_parameters() if p.dtype == torch.float32}
    assert wide and all(".wo." in n for n in wide)
    for encoder in (narrow, half):
        context, _ = encoder(["a cat"])
        assert bool(torch.isfinite(context).all())


def drop_tokenizers(folder: Path) -> None:
    shutil.rmtree(folder / "tokenizer")
    shutil.rmtree(folder / "text_encoder_2")


def swap(folder: Path) -> None:
    (folder / "text_encoder").rename(folder / "x")
    (folder / "text_encoder_2").rename(folder / "text_encoder")
    (folder / "x").rename(folder / "text_encoder_2")


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], part: str = "text_encoder_2") -> None:
    path = folder / part / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def pickle_only(folder: Path) -> None:
    (folder / "text_encoder" / "model.safetensors").unlink()
    (folder / "text_encoder" / "pytorch_model.bin").write_bytes(b"PK\x03\x04")


def half_fetched(folder: Path) -> None:
    pickle_only(folder)
    (folder / "tokenizer" / "tokenizer.json").unlink(missing_ok=True)
    (folder / "tokenizer" / "vocab.json").unlink(missing_ok=True)
    for path in (folder / "tokenizer_2").iterdir():
        path.unlink()


def no_vocabulary(folder: Path) -> None:
    for path in (folder / "tokenizer_2").iterdir():
        path.write_text("{")


def no_words(folder: Path) -> None:
    tokenizer = folder / "tokenizer"
    for path in tokenizer.iterdir():
        path.unlink()
    (tokenizer / "vocab.json").write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1}))
    (tokenizer / "merges.txt").write_text("#version: 0.2\n")


def more_words(folder: Path) -> None:
    path = folder / "tokenizer" / "tokenizer.json"
    saved = json.loads(path.read_text())
    saved["model"]["vocab"]["unembedded</w>"] = 1008
    path.write_text(json.dumps(saved))


def endless(folder: Path) -> None:
    path = folder / "tokenizer_2" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"extra_ids": 10**20}))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WO = "encoder.block.0.layer.1.DenseReluDense.wo.weight"
SPOILT: dict[str, tuple[Callable[[Path], Any], str]] = {
    "two parts are missing": (drop_tokenizers, r"text_encoder_2 \(a T5 encoder\), tokenizer .*text="),
    "the wrong way round": (swap, "is not a CLIP text encoder: it looks like a T5 encoder"),
    "an extra key": (lambda f: edit(f, lambda t: t.update(more=torch.ones(2))), "more is not expected"),
    "a missing key": (lambda f: edit(f, lambda t: t.pop(WO)), f"1 problems: {WO} is missing"),
    "a wrong shape": (lambda f: edit(f, lambda t: t.update({WO: torch.ones(3, 3)})), r"wo.weight has shape \(3, 3\)"),
    "cut off": (
        lambda f: (f / "text_encoder" / "model.safetensors").write_bytes(b"1234"),
        "4 bytes, expected at least 8",
    ),
    "a pickle": (pickle_only, r"lacks text_encoder \(a CLIP text encoder; there are only pickles\);"),
    "half fetched": (half_fetched, r"only pickles\), tokenizer \(.*merges.txt\), tokenizer_2 \(.*spiece.model\);"),
    "no tokenizer": (no_vocabulary, "tokenizer_2 holds no tokenizer that can be read"),
    "a tokenizer without words": (no_words, "tokenizer holds a tokenizer that knows no words"),
    "another encoder's tokenizer": (more_words, r"tokenizer holds a tokenizer of 1009 tokens, but .* embeds \d+"),
    "tokens without end": (endless, "tokenizer_2 holds no tokenizer .*_config.json says extra_ids = 1000.*, 100000 at"),
    "a cut tokenizer": (
        lambda f: cut(f / "tokenizer_2" / "tokenizer.json"),
        "tokenizer_2 holds no tokenizer that can be read",
    ),
}


@pytest.mark.parametrize("what", SPOILT)
def test_what_is_wrong_is_said(what: str, repo: Path, tmp_path: Path) -> None:
    shutil.copytree(repo, tmp_path / "r")
    change, said = SPOILT[what]
    change(tmp_path / "r")
    for takes in (loaded, planned):
        with pytest.raises(WeightsError, match=said):
            takes(tmp_path / "r")


def test_a_tokenizer_may_say_that_it_has_no_limit(repo: Path, tmp_path: Path) -> None:
    shutil.copytree(repo, tmp_path / "r")
    for path in (tmp_path / "r").glob("tokenizer*/tokenizer_config.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model_max_length": int(1e30)}))
    planned(tmp_path / "r")


def test_words_from_elsewhere(repo: Path, tmp_path: Path) -> None:
    shutil.copytree(repo, tmp_path / "r")
    for part in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"):
        shutil.rmtree(tmp_path / "r" / part)
    assert loaded(tmp_path / "r")._words is None
    assert loaded(tmp_path / "r", text=repo)._words is not None
    with pytest.raises(WeightsError, match="text must be a folder"):
        loaded(tmp_path / "r", text=tmp_path / "nowhere")


def test_transformers_is_imported_only_for_words(repo: Path, tmp_path: Path) -> None:
    code = (
        "import sys, mrflow as mf; mf.run; mf.load('pocket'); assert 'transformers' not in sys.modules; "
        f"mf.load({str(repo)!r}, device='cpu'); assert 'transformers' in sys.modules; print('fine')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "fine"


def test_the_command_line_draws_from_a_repository(repo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.test_cli import call

    monkeypatch.chdir(tmp_path)
    words = ["--model", str(repo), "--size", "64x64", "--low", "32x32", "--steps", "2", "--sr", "lanczos"]
    more = ["--device", "cpu", "--offload", "phase", "--dtype", "bfloat16", "--storage", "fp8"]
    code, _, err = call("generate", "a cat", *words, *more, "--out", "x.png")
    assert code == 0, err
    record = json.loads(call("inspect", "--json", "x.png")[1])
    assert record["model"] == "flux1-dev" and record["weights"].endswith("/bfloat16/fp8")
    code, again, err = call("replay", "x.png", "--model", str(repo), *more)
    assert code == 0, err
    assert bool((mf.read_image(again.strip()) == mf.read_image("x.png")).all())
    code, _, err = call("generate", "a cat", *words[:-2], "--device", "cpu", "--out", "y.png")
    assert code == 2 and "--sr" in err


@pytest.mark.parametrize(
    ("part", "settings", "words"),
    [
        ("text_encoder", {"num_hidden_layers": 10_000_000}, r"num_hidden_layers 10000000 \(weights: 2\)"),
        ("text_encoder", {"vocab_size": 1 << 40}, "vocab_size 1099511627776"),
        ("text_encoder", {"hidden_act": "os.system"}, "config.json (makes no network|cannot be used)"),
        ("text_encoder", {"num_attention_heads": 0}, "config.json (makes no network|cannot be used)"),
        ("text_encoder_2", {"num_layers": 10_000_000}, r"num_layers 10000000 \(weights: 3\)"),
        ("text_encoder_2", {"d_ff": 1 << 40}, "d_ff 1099511627776"),
        ("text_encoder_2", {"num_layers": "3"}, r"num_layers 3 \(weights: 3\)"),
    ],
)
def test_a_configuration_makes_no_network_larger_than_its_file(
    part: str, settings: dict[str, Any], words: str, repo: Path, tmp_path: Path
) -> None:
    shutil.copytree(repo, tmp_path / "r")
    config = tmp_path / "r" / part / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **settings}))
    for takes in (lambda folder: prepare_text(find_text(folder)), planned):
        with pytest.raises(WeightsError, match=words):
            takes(tmp_path / "r")


def test_whole_models_give_the_same_states(repo: Path, tmp_path: Path) -> None:
    clip, t5 = (load_file(repo / part / "model.safetensors") for part in ("text_encoder", "text_encoder_2"))
    clip = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in clip.items()}
    clip |= {
        "vision_model.embeddings.position_ids": torch.arange(5)[None],
        "vision_model.encoder.layers.0.self_attn.q_proj.weight": torch.randn(8, 8),
        "visual_projection.weight": torch.randn(8, 8),
        "text_projection.weight": torch.randn(8, 8),
        "logit_scale": torch.tensor(4.6),
        "text_model.embeddings.position_ids": torch.arange(77)[None],
    }
    t5 |= {
        "decoder.block.0.layer.0.SelfAttention.q.weight": torch.ones(4, 4),
        "lm_head.weight": torch.ones(4, 4),
        "spiece_model": torch.zeros(64, dtype=torch.uint8),
    }
    shutil.copytree(repo, tmp_path / "r")
    for part, state in (("text_encoder", clip), ("text_encoder_2", t5)):
        save_file({k: v.clone() for k, v in state.items()}, tmp_path / "r" / part / "model.safetensors")
    config = tmp_path / "r" / "text_encoder" / "config.json"
    whole = {"model_type": "clip", "text_config": json.loads(config.read_text()), "vision_config": {}}
    config.write_text(json.dumps(whole))
    got, want = (prepare_text(find_text(place))()(["a fox"], length=8) for place in (tmp_path / "r", repo))
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
