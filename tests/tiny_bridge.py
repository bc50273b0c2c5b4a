"""Tiny random pipelines of the families that only diffusers runs, whole, made in memory."""

from pathlib import Path
from typing import Any

import torch

from tests.parity.test_flux import scatter
from tests.tiny import CHAT, clip_tokenizer, kl, qwen_tokenizer, t5_tokenizer

SCATTERED = 5


def spread(*modules: Any) -> None:
    """All parameters far from where they start."""
    for seed, module in enumerate(modules, SCATTERED):
        scatter(module.eval(), seed)


def qwen3(folder: Path, *, width: int, layers: int) -> tuple[Any, Any]:
    """Qwen3 and its tokenizer with a chat template."""
    from transformers import Qwen2Tokenizer, Qwen3Config, Qwen3ForCausalLM

    size = qwen_tokenizer(folder)
    tokenizer = Qwen2Tokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHAT
    config = Qwen3Config(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=1024,
        bos_token_id=size - 3,
        eos_token_id=size - 1,
        pad_token_id=size - 3,
    )
    return Qwen3ForCausalLM(config), tokenizer


def klein(folder: Path, *, distilled: bool = False) -> Any:
    """A Flux2KleinPipeline whose batch norm has statistics of its own."""
    from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
    from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler

    encoder, tokenizer = qwen3(folder / "tokenizer", width=16, layers=28)
    transformer = Flux2Transformer2DModel(
        in_channels=32,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        timestep_guidance_channels=32,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(32, 32, 64, 64),
        layers_per_block=1,
        latent_channels=8,
        sample_size=64,
    )
    spread(transformer, vae, encoder)
    generator = torch.Generator().manual_seed(2)
    vae.bn.running_mean.copy_(0.3 * torch.randn(32, generator=generator))
    vae.bn.running_var.copy_(0.5 + torch.rand(32, generator=generator))
    scheduler = Scheduler(use_dynamic_shifting=True, shift=3.0)
    return Flux2KleinPipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        transformer=transformer,
        is_distilled=distilled,
    )


def z_image(folder: Path) -> Any:
    """A ZImagePipeline with Turbo's scheduler."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    encoder, tokenizer = qwen3(folder / "tokenizer", width=16, layers=3)
    transformer = ZImageTransformer2DModel(
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    vae = kl((32, 32, 64, 64))
    spread(transformer, vae, encoder)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return ZImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer, transformer=transformer
    )


def sd3(folder: Path, *, t5: bool = True) -> Any:
    """A StableDiffusion3Pipeline as 3.5 Medium has its blocks, with or without T5."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import (
        CLIPTextConfig,
        CLIPTextModelWithProjection,
        CLIPTokenizer,
        T5Config,
        T5EncoderModel,
        T5TokenizerFast,
    )

    size, words = clip_tokenizer(folder / "clip"), t5_tokenizer(folder / "t5")
    transformer = SD3Transformer2DModel(
        sample_size=16,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=40,
        pos_embed_max_size=24,
        dual_attention_layers=(0, 1),
        qk_norm="rms_norm",
    )
    clips = [
        CLIPTextModelWithProjection(
            CLIPTextConfig(
                vocab_size=size,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=3,
                num_attention_heads=2,
                max_position_embeddings=77,
                projection_dim=projection,
                bos_token_id=size - 2,
                eos_token_id=size - 1,
                pad_token_id=size - 1,
            )
        )
        for projection in (16, 24)
    ]
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=words, d_model=48, d_ff=64, d_kv=8, num_heads=3, num_layers=2, tie_word_embeddings=False,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    vae = kl((32, 32, 64, 64))
    vae.register_to_config(scaling_factor=1.5305, shift_factor=0.0609)
    spread(transformer, vae, *clips, encoder)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "clip")
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=vae,
        transformer=transformer,
        text_encoder=clips[0],
        tokenizer=tokenizer,
        text_encoder_2=clips[1],
        tokenizer_2=tokenizer,
        text_encoder_3=encoder if t5 else None,
        tokenizer_3=T5TokenizerFast.from_pretrained(folder / "t5") if t5 else None,
    )


def flux2_dev(folder: Path) -> Any:
    """A Flux2Pipeline; Qwen3 stands for Mistral's text model, of which the pipeline takes three layers' states."""
    from diffusers import Flux2Pipeline, Flux2Transformer2DModel

    base = klein(folder)
    encoder, tokenizer = qwen3(folder / "dev", width=16, layers=31)
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content[0].text }}<|im_end|>\n{% endfor %}"
    )
    transformer = Flux2Transformer2DModel(**{**base.transformer.config, "guidance_embeds": True})
    spread(transformer, encoder)
    return Flux2Pipeline(
        scheduler=base.scheduler, vae=base.vae, text_encoder=encoder, tokenizer=tokenizer, transformer=transformer
    )


def krea2(folder: Path, *, distilled: bool = False) -> Any:
    """A Krea2Pipeline with a text model of Qwen3-VL of four layers, three of which are read."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        Krea2Pipeline,
        Krea2Transformer2DModel,
    )
    from transformers import Qwen2Tokenizer, Qwen3VLConfig, Qwen3VLModel

    size = qwen_tokenizer(folder / "tokenizer")
    text = dict(
        vocab_size=size, hidden_size=16, intermediate_size=32, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
    )  # fmt: skip
    vision = dict(
        depth=1, hidden_size=16, intermediate_size=24, num_heads=2, out_hidden_size=16, num_position_embeddings=16,
        deepstack_visual_indexes=[0],
    )  # fmt: skip
    encoder = Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=vision))
    transformer = Krea2Transformer2DModel(
        in_channels=64,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=48,
        timestep_embed_dim=32,
        text_hidden_dim=16,
        num_text_layers=3,
        text_num_attention_heads=2,
        text_num_key_value_heads=1,
        text_intermediate_size=24,
        num_layerwise_text_blocks=1,
        num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(base_dim=16, z_dim=16)
    spread(transformer, vae, encoder)
    for name, p in vae.named_parameters():
        if name.endswith("gamma"):
            p.data = 1 + 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=6400, base_shift=0.5, max_shift=1.15
    )
    return Krea2Pipeline(
        scheduler=scheduler,
        vae=vae,
        text_encoder=encoder,
        tokenizer=Qwen2Tokenizer.from_pretrained(folder / "tokenizer"),
        transformer=transformer,
        text_encoder_select_layers=(1, 2, 4),
        is_distilled=distilled,
    )


class Words:
    """Stands for Qwen3-VL's processor: its tokenizer, and a chat's text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], **more: Any) -> Any:
        return self.tokenizer(text, **more)

    def apply_chat_template(self, messages: list[Any], **_: Any) -> list[list[int]]:
        said = "".join(f"<|im_start|>{m['role']}\n{m['content'][0]['text']}<|im_end|>\n" for m in messages)
        return [self.tokenizer(said)["input_ids"]]


def qwen21(folder: Path) -> Any:
    """A QwenImage21Pipeline; a tokenizer stands for its processor, which only condition images need."""
    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )
    from transformers import Qwen2Tokenizer, Qwen3VLForConditionalGeneration

    config = krea2(folder).text_encoder.config
    tokenizer = Qwen2Tokenizer.from_pretrained(folder / "tokenizer")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>"]})
    config.text_config.vocab_size = len(tokenizer)
    encoder = Qwen3VLForConditionalGeneration(config)
    transformer = QwenImage21Transformer2DModel(
        in_channels=8,
        out_channels=8,
        num_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        context_in_dim=16,
        axes_dims_rope=(4, 6, 6),
    )
    generator = torch.Generator().manual_seed(3)
    mean, std = torch.randn(8, generator=generator).tolist(), (0.5 + torch.rand(8, generator=generator)).tolist()
    vae = AutoencoderKLQwenImage21(
        base_dim=8, decoder_base_dim=8, z_dim=8, num_res_blocks=1, latents_mean=mean, latents_std=std
    )
    spread(transformer, vae, encoder)
    for name, p in vae.named_parameters():
        if name.endswith("gamma"):
            p.data = 1 + 0.3 * torch.randn(p.shape, generator=generator)
    vae.decoder.conv_out.weight.data *= 0.02  # far from black and white
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=256, max_image_seq_len=4096, base_shift=0.5, max_shift=1.15
    )
    return QwenImage21Pipeline(
        scheduler=scheduler, vae=vae, text_encoder=encoder, processor=Words(tokenizer), transformer=transformer
    )
