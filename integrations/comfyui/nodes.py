"""One node a stage: each takes a chain and gives it back one stage longer; the last one runs it.

Nothing here knows more than mrflow's own objects. ComfyUI itself is only asked for its progress bar.
"""

from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image

import mrflow as mf
from mrflow.cli.options import ModelOptions, refuse
from mrflow.cli.parsing import load_model, names_network, parse_lora, upscaler

Inputs = dict[str, dict[str, Any]]
SIDE = {"min": 16, "max": 8192, "step": 16}
STEPS = {"min": 1, "max": 1000}
SLOTS = {
    "solver": ("STRING", {"default": "", "tooltip": "as in Python, such as Heun or DPMpp2M; empty is Euler"}),
    "schedule": ("STRING", {"default": "", "tooltip": "such as Karras, or Beta(20), whose 20 counts; empty is usual"}),
    "guidance": ("STRING", {"default": "", "tooltip": "such as CFG(4) or Interval(CFG(4), 0.2, 1); empty is its own"}),
    "cache": ("STRING", {"default": "", "tooltip": "such as TeaCache(0.25); empty is none"}),
}  # fmt: skip
KINDS: dict[str, Any] = {
    "solver": mf.Solver,
    "schedule": mf.Schedule,
    "guidance": mf.Guidance,
    "cache": mf.caches.Cache,
}


def slots(words: dict[str, str], steps: int) -> dict[str, Any]:
    """What samples, from the words that are not empty; a schedule without steps has these."""
    return {k: mf.parse(word, KINDS[k], steps=steps) for k, word in words.items() if word.strip()}


def located(word: str, *rooms: str) -> str:
    """A file by its name: that of the path if there is one, else of these of ComfyUI's folders of models.

    Raises:
        PlanError: a file's bare name that is in none of them.
    """
    try:
        import folder_paths
    except ImportError:
        return word
    if not word or Path(word).exists():
        return word
    for room in rooms:
        if path := folder_paths.get_full_path(room, word):
            return path
    if names_network(word) and Path(word).name == word:
        searched = [Path.cwd(), *(each for room in rooms for each in folder_paths.get_folder_paths(room))]
        raise mf.PlanError(f"there is no file {word} in {', '.join(map(str, searched))}; put it there or give its path")
    return word


def adapter(word: str) -> mf.Lora:
    """A LoRA from FILE or FILE:STRENGTH."""
    found = parse_lora(word, "lora")
    return replace(found, path=located(found.path, "loras"))


class Node:
    """What ComfyUI asks of a node."""

    CATEGORY = "mrflow"
    FUNCTION = "make"
    RETURN_TYPES: ClassVar[tuple[str, ...]] = ("MRFLOW_CHAIN",)
    RETURN_NAMES: ClassVar[tuple[str, ...]] = ("chain",)
    REQUIRED: ClassVar[dict[str, Any]] = {}
    OPTIONAL: ClassVar[dict[str, Any]] = {}

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """Sockets and widgets."""
        return {"required": dict(cls.REQUIRED), "optional": dict(cls.OPTIONAL)}


class Load(Node):
    """A model: pocket, a hub id, a folder, or a file, which may lie in ComfyUI's diffusion_models or checkpoints."""

    RETURN_TYPES = ("MRFLOW_MODEL",)
    RETURN_NAMES = ("model",)
    REQUIRED = {
        "where": ("STRING", {"default": "pocket"}),
        "dtype": (["file's own", "float32", "bfloat16", "float16"],),
        "offload": (["none", "phase", "block"],),
        "storage": (["file's own", "fp8"],),
    }
    OPTIONAL = {
        "lora": ("STRING", {"default": "", "tooltip": "FILE or FILE:STRENGTH, merged into the weights"}),
        "vae": ("STRING", {"default": "", "tooltip": "the autoencoder, where it is not beside the model"}),
        "text": ("STRING", {"default": "", "tooltip": "the folder of text encoders and tokenizers, likewise"}),
    }

    def make(
        self, where: str, dtype: str, offload: str, storage: str, lora: str = "", vae: str = "", text: str = ""
    ) -> tuple[mf.Backbone]:
        """Load it."""
        own = {"file's own": None}
        one = adapter(lora) if lora else None
        options = ModelOptions(
            dtype=own.get(dtype, dtype), offload=offload, storage=own.get(storage, storage),
            lora=[f"{one.path}:{one.strength}"] if one else None, vae=located(vae, "vae") or None, text=text or None,
        )  # fmt: skip
        return (load_model(located(where, "diffusion_models", "checkpoints"), options),)


class Sample(Node):
    """Noise to latents: begins a chain."""

    REQUIRED = {
        "height": ("INT", {"default": 512, **SIDE}),
        "width": ("INT", {"default": 512, **SIDE}),
        "steps": ("INT", {"default": 12, **STEPS}),
    }
    OPTIONAL = {
        **SLOTS,
        "lora": ("STRING", {"default": "", "tooltip": "FILE or FILE:STRENGTH, on in this stage alone"}),
    }

    def make(
        self, height: int, width: int, steps: int, solver: str = "", schedule: str = "", guidance: str = "",
        cache: str = "", lora: str = "",
    ) -> tuple[mf.Chain[Any, Any]]:  # fmt: skip
        """Begin."""
        words = {"solver": solver, "schedule": schedule, "guidance": guidance, "cache": cache}
        settings = {"schedule": mf.Shifted(steps), **slots(words, steps)}
        return (mf.Chain((mf.Sample(height, width, lora=adapter(lora) if lora else (), **settings),)),)


class Longer(Node):
    """A node that puts one stage behind a chain."""

    CHAIN: ClassVar[dict[str, Any]] = {"chain": ("MRFLOW_CHAIN",)}

    @classmethod
    def INPUT_TYPES(cls) -> Inputs:
        """The chain, and the stage's own settings."""
        return {"required": {**cls.CHAIN, **cls.REQUIRED}, "optional": dict(cls.OPTIONAL)}

    def make(self, chain: mf.Chain[Any, Any], **settings: Any) -> tuple[mf.Chain[Any, Any]]:
        """One stage more; what does not fit together says so."""
        return (chain >> self.stage(**settings),)

    def stage(self, **settings: Any) -> mf.Stage[Any, Any]:
        """The stage."""
        raise NotImplementedError


class Decode(Longer):
    """Latents to pixels."""

    def stage(self) -> mf.Stage[Any, Any]:
        return mf.Decode()


class Encode(Longer):
    """Pixels to latents."""

    REQUIRED = {"posterior": ("BOOLEAN", {"default": False})}

    def stage(self, posterior: bool) -> mf.Stage[Any, Any]:
        return mf.Encode(posterior=posterior)


class Upscale(Longer):
    """Super-resolution to a size. `net` is what mrflow's --sr takes: own, lanczos, a file of upscale_models, ..."""

    REQUIRED = {
        "net": ("STRING", {"default": "lanczos"}),
        "height": ("INT", {"default": 1024, **SIDE}),
        "width": ("INT", {"default": 1024, **SIDE}),
    }

    def stage(self, net: str, height: int, width: int) -> mf.Stage[Any, Any]:
        found = upscaler(located(net, "upscale_models"), "net")
        if not isinstance(found, mf.Upscaler | None):
            raise mf.PlanError(f"{net} enlarges latents; this node goes over pixels")
        return mf.Upscale(found, (height, width))


class Reinject(Longer):
    """Mix in noise of this level."""

    REQUIRED = {"sigma": ("FLOAT", {"default": 0.12, "min": 0.001, "max": 1.0, "step": 0.01})}

    def stage(self, sigma: float) -> mf.Stage[Any, Any]:
        return mf.Reinject(sigma)


class Refine(Longer):
    """Noisy latents to clean ones."""

    REQUIRED = {"steps": ("INT", {"default": 1, **STEPS})}
    OPTIONAL = SLOTS

    def stage(
        self, steps: int, solver: str = "", schedule: str = "", guidance: str = "", cache: str = ""
    ) -> mf.Stage[Any, Any]:
        words = {"solver": solver, "schedule": schedule, "guidance": guidance, "cache": cache}
        return mf.Refine(**{"schedule": mf.DirectSigma(steps), **slots(words, steps)})


class Run(Node):
    """Runs a chain on a model: pictures, and the plan as a table."""

    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("images", "plan")
    REQUIRED = {
        "model": ("MRFLOW_MODEL",),
        "chain": ("MRFLOW_CHAIN",),
        "prompt": ("STRING", {"multiline": True, "default": ""}),
        "seed": ("INT", {"default": 0, "min": 0, "max": 2**62, "control_after_generate": True}),
        "batch": ("INT", {"default": 1, "min": 1, "max": 64}),
    }
    OPTIONAL = {
        "negative": ("STRING", {"multiline": True, "default": ""}),
        "previews": (
            "INT",
            {
                "default": 0,
                "min": 0,
                "max": 1000,
                "tooltip": "show the estimate of every n-th step; 0 is none",
            },
        ),
    }

    def make(
        self,
        model: mf.Backbone,
        chain: mf.Chain[Any, Any],
        prompt: str,
        seed: int,
        batch: int,
        negative: str = "",
        previews: int = 0,
    ) -> tuple[Any, str]:
        """Images (batch, height, width, 3) in [0, 1], as ComfyUI has them, and the plan as text."""
        planned = mf.plan(chain, model.info, batch=batch)
        refuse(
            bool(negative.strip()) and not planned.work.negative, "negative",
            f"with this chain: {model.info.name} draws without a second branch (guidance CFG(4) has one)",
        )  # fmt: skip
        bar, steps = progress(sum(len(row.sigmas) - 1 for row in planned.rows if row.sigmas)), count(1)

        def listen(event: mf.Event) -> None:
            if isinstance(event, mf.Stepped):
                number, step = next(steps), event.step
                seen = previews and number % previews == 0 and step.denoised.ndim == 4
                bar(number, picture(model, step.denoised[:1]) if seen else None)
            elif isinstance(event, mf.StageBegan):
                bar(None, None)

        seeds = [seed + i for i in range(batch)]
        result = mf.run(chain, model, prompt, seed=seeds, negative=negative or None, on_event=listen)
        return result.pixels.permute(0, 2, 3, 1).cpu(), str(planned)


def picture(model: mf.Backbone, latents: Any) -> Any:
    """The first item of latents (1, channels, height, width), decoded, as ComfyUI takes previews."""
    pixels = model.decode(latents.float())[0].clamp(0, 1)
    return "JPEG", Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).cpu().numpy()), 512


def progress(total: int) -> Any:
    """Shows a step's number and preview in ComfyUI's progress bar; nothing without ComfyUI.

    Raises:
        InterruptProcessingException: of ComfyUI, where its user cancelled; it stops the run.
    """
    try:
        from comfy.model_management import throw_exception_if_processing_interrupted as stop
        from comfy.utils import ProgressBar
    except ImportError:
        return lambda number, preview: None
    bar = ProgressBar(total)
    return lambda number, preview: stop() if number is None else bar.update_absolute(number, total, preview)


STAGES = {c.__name__: c for c in (Load, Sample, Decode, Upscale, Encode, Reinject, Refine, Run)}
NODE_CLASS_MAPPINGS = {f"Mrflow{name}": node for name, node in STAGES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {f"Mrflow{name}": f"mrflow {name}" for name in STAGES}
