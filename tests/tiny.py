"""Complete FLUX.1 repositories that diffusers and transformers write themselves, small enough for a test."""

import json
from pathlib import Path
from typing import Any

import torch

from tests.parity.test_flux import CASES, scatter

VAES: dict[str, dict[str, Any]] = {
    "guided": dict(block_out_channels=(32, 32, 64, 64), layers_per_block=1),
    "plain": dict(block_out_channels=(32, 64, 64, 96), layers_per_block=2),
    "uneven": dict(block_out_channels=(32, 96, 32, 64), layers_per_block=1),
}
WORDS = 27 + 3


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
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5TokenizerFast

    scratch = folder / "scratch"
    clip_size, t5_size = clip_tokenizer(scratch / "tokenizer"), t5_tokenizer(scratch / "tokenizer_2")
    sizes = {**CASES[case], "in_channels": 64, "out_channels": None, "guidance_embeds": guidance}
    transformer = FluxTransformer2DModel(**sizes)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **VAES[case],
    )
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
    return folder
