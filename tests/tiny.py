"""Complete FLUX.1 repositories that diffusers and transformers write themselves, small enough for a test."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from mrflow.checkpoints.safetensors import save_file, to_layout
from mrflow.models.flux.vae import VaeFlux
from mrflow.models.flux.weights import bfl, vae_layout
from tests.parity.test_flux import CASES, scatter

VAES: dict[str, dict[str, Any]] = {
    "guided": dict(channels=(32, 32, 64, 64), layers_per_block=1),
    "plain": dict(channels=(32, 64, 64, 96), layers_per_block=2),
    "uneven": dict(channels=(32, 96, 32, 64), layers_per_block=1),
}
WORDS = 27 + 3


def kl(channels: tuple[int, ...] = (32, 64), *, latent: int = 16, **settings: Any) -> Any:
    """An AutoencoderKL with FLUX's normalisation; two channels give a downscale of 2, four of 8."""
    from diffusers import AutoencoderKL

    usual = {"layers_per_block": 1, "scaling_factor": 0.3611, "shift_factor": 0.1159}
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        block_out_channels=channels,
        latent_channels=latent,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **(usual | settings),
    )


def save_vae_flux(vae: VaeFlux, path: Path) -> None:
    """Write an autoencoder in BFL's layout; scale, shift and groups go into the file's metadata."""
    p = vae.params
    config = {
        "_class_name": "AutoencoderKL",
        "scaling_factor": p.scale,
        "shift_factor": p.shift,
        "norm_num_groups": p.groups,
    }
    save_file(to_layout(vae.state_dict(), vae_layout(vae, bfl(""))), path, metadata={"config": json.dumps(config)})


def bytes_as_letters() -> list[str]:
    """The printable stand-ins of all bytes, as byte-level vocabularies write them."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {b: chr(b) for b in plain}
    rest = (b for b in range(256) if b not in letters)
    letters |= {b: chr(256 + n) for n, b in enumerate(rest)}
    return [letters[b] for b in range(256)]


def clip_tokenizer(folder: Path) -> int:
    """CLIP's tokenizer without merges: a token a letter; gives the size of its vocabulary."""
    letters = bytes_as_letters()
    names = [*letters, *(f"{c}</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    special = {"bos_token": names[-2], "eos_token": names[-1], "unk_token": names[-1], "pad_token": names[-1]}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": 77, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(names)


def t5_tokenizer(folder: Path) -> int:
    """A unigram tokenizer of letters with T5's special tokens; gives the size of its vocabulary."""
    from transformers import T5TokenizerFast

    letters = "▁abcdefghijklmnopqrstuvwxyz,.!"
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), *((c, -2.0 - i / 100) for i, c in enumerate(letters))]
    tokenizer = T5TokenizerFast(vocab=vocabulary, extra_ids=0)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def write_flux_repo(
    folder: Path,
    *,
    case: str = "guided",
    guidance: bool = True,
    dtype: torch.dtype = torch.float32,
    shard: str = "10GB",
) -> Path:
    """A FluxPipeline with every part, saved by diffusers; all parameters are far from where they start."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    scratch = folder / "scratch"
    clip_size, t5_size = clip_tokenizer(scratch / "tokenizer"), t5_tokenizer(scratch / "tokenizer_2")
    sizes = {**CASES[case], "in_channels": 64, "out_channels": None, "guidance_embeds": guidance}
    transformer = FluxTransformer2DModel(**sizes)
    vae = kl(**VAES[case])
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=clip_size,
            hidden_size=sizes["pooled_projection_dim"],
            intermediate_size=2 * sizes["pooled_projection_dim"],
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            hidden_act="quick_gelu",
            bos_token_id=0,
            eos_token_id=2,
            pad_token_id=1,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=t5_size,
            d_model=sizes["joint_attention_dim"],
            d_ff=3 * sizes["joint_attention_dim"],
            d_kv=8,
            num_heads=3,
            num_layers=3,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
            relative_attention_num_buckets=8,
            relative_attention_max_distance=32,
        )
    )
    for seed, module in enumerate((transformer, vae, clip, t5), 3):
        scatter(module.eval(), seed)
    published = dict(base_image_seq_len=256, base_shift=0.5, max_image_seq_len=4096, max_shift=1.15)
    pipe = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            **published, shift=3.0 if guidance else 1.0, use_dynamic_shifting=guidance
        ),
        vae=vae.to(dtype),
        transformer=transformer.to(dtype),
        text_encoder=clip.to(dtype),
        text_encoder_2=t5.to(dtype),
        tokenizer=CLIPTokenizer.from_pretrained(scratch / "tokenizer"),
        tokenizer_2=T5TokenizerFast.from_pretrained(scratch / "tokenizer_2"),
    )
    pipe.save_pretrained(folder, max_shard_size=shard)
    shutil.rmtree(scratch)
    return folder


def qwen_tokenizer(folder: Path) -> int:
    """Qwen2's tokenizer without merges: a token a byte, and the template's marks; gives the size of its vocabulary."""
    names = bytes_as_letters()
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = {
        str(len(names) + i): {
            "content": mark, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
            "special": True,
        }
        for i, mark in enumerate(marks)
    }  # fmt: skip
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": added,
        "eos_token": marks[2],
        "pad_token": marks[0],
        "unk_token": None,
        "bos_token": None,
        "model_max_length": 131072,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(names) + len(marks)


QWENS: dict[str, dict[str, Any]] = {
    "two": dict(num_layers=2, attention_head_dim=16, num_attention_heads=2, axes_dims_rope=(4, 6, 6)),
    "three": dict(num_layers=3, attention_head_dim=24, num_attention_heads=3, axes_dims_rope=(4, 12, 8)),
    "wide": dict(num_layers=1, attention_head_dim=32, num_attention_heads=4, axes_dims_rope=(8, 10, 14)),
}
QWEN_WIDTHS = {"two": 32, "three": 48, "wide": 64}


def write_qwen_repo(
    folder: Path, *, case: str = "two", dtype: torch.dtype = torch.float32, words: bool = True, shard: str = "10GB"
) -> Path:
    """A QwenImagePipeline with every part, saved by diffusers; all parameters are far from where they start."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    scratch, width = folder / "scratch", QWEN_WIDTHS[case]
    size = qwen_tokenizer(scratch / "tokenizer")
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=64, out_channels=16, joint_attention_dim=width, **QWENS[case]
    )
    vae = AutoencoderKLQwenImage(base_dim=8 * (1 + len(case) % 3), z_dim=16)
    encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=dict(
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                vocab_size=size,
                max_position_embeddings=4096,
                rms_norm_eps=1e-6,
                rope_parameters={
                    "mrope_section": [width // 8 - 2 * (width // 24), width // 24, width // 24],
                    "rope_type": "default",
                    "rope_theta": 1000000.0,
                },
                bos_token_id=size - 3,
                eos_token_id=size - 1,
            ),
            vision_config=dict(
                depth=1,
                hidden_size=16,
                num_heads=2,
                out_hidden_size=width,
                intermediate_size=24,
                fullatt_block_indexes=[0],
            ),
        )
    )
    for seed, module in enumerate((transformer, vae, encoder), 3):
        scatter(module.eval(), seed)
        for name, p in module.named_parameters():
            if name.endswith("gamma"):
                generator = torch.Generator().manual_seed(seed)
                p.data = 1 + 0.3 * torch.randn(p.shape, generator=generator)
    pipe = QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_image_seq_len=256,
            base_shift=0.5,
            max_image_seq_len=8192,
            max_shift=0.9,
            shift=1.0,
            shift_terminal=0.02,
            time_shift_type="exponential",
            use_dynamic_shifting=True,
        ),
        vae=vae.to(dtype),
        transformer=transformer.to(dtype),
        text_encoder=encoder.to(dtype) if words else None,
        tokenizer=Qwen2Tokenizer.from_pretrained(scratch / "tokenizer") if words else None,
    )
    pipe.save_pretrained(folder, max_shard_size=shard)
    return folder


# Qwen3's template for turns of users.
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
    "{% if not enable_thinking %}<think></think>{% endif %}"
)
ZIMAGES: dict[str, dict[str, Any]] = {
    "two": dict(dim=32, n_layers=2, n_refiner_layers=1, n_heads=2, n_kv_heads=2, axes_dims=[4, 6, 6]),
    "three": dict(dim=72, n_layers=3, n_refiner_layers=2, n_heads=3, n_kv_heads=3, axes_dims=[4, 12, 8]),
}
ZIMAGE_WIDTHS = {"two": 16, "three": 24}


def write_zimage_repo(
    folder: Path, *, case: str = "two", dtype: torch.dtype = torch.float32, factor: float = 3.0, shard: str = "10GB"
) -> Path:
    """A ZImagePipeline with every part, saved by diffusers; all parameters are far from where they start."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3Model

    scratch, width = folder / "scratch", ZIMAGE_WIDTHS[case]
    size = qwen_tokenizer(scratch / "tokenizer")
    tokenizer = Qwen2Tokenizer.from_pretrained(scratch / "tokenizer")
    tokenizer.chat_template = CHAT
    transformer = ZImageTransformer2DModel(cap_feat_dim=width, axes_lens=[1024, 64, 64], **ZIMAGES[case])
    vae = kl(**VAES["guided"])
    encoder = Qwen3Model(
        Qwen3Config(
            vocab_size=size,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=8,
            max_position_embeddings=1024,
            bos_token_id=size - 3,
            eos_token_id=size - 1,
            pad_token_id=size - 3,
        )
    )
    for seed, module in enumerate((transformer, vae, encoder), 3):
        scatter(module.eval(), seed)
    pipe = ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=factor),
        vae=vae.to(dtype),
        transformer=transformer.to(dtype),
        text_encoder=encoder.to(dtype),
        tokenizer=tokenizer,
    )
    pipe.save_pretrained(folder, max_shard_size=shard)
    return folder
