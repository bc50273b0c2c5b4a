"""A chain and its model with the manners of a diffusers pipeline. diffusers itself is not needed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from mrflow._checks import MAX_SEED, check_whole, is_number, is_whole, require
from mrflow.backbone import Backbone
from mrflow.errors import PlanError
from mrflow.result import Result
from mrflow.runner import Event, Stepped, run
from mrflow.spec import Latents, Pixels, Start
from mrflow.stage import A, AnyChain, B, Chain, Stage, plan

Kind = Literal["pil", "pt", "np", "latent"]
StepEnd = Callable[["ChainPipeline", int, Tensor, dict[str, Any]], object]
Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True)
class PipelineOutput:
    """What a call gives: `images` as asked for, and the whole `result` of the run."""

    images: Any
    result: Result

    def __getitem__(self, key: int | str) -> object:
        return getattr(self, key) if isinstance(key, str) else tuple(getattr(self, f.name) for f in fields(self))[key]


class ChainPipeline:
    """Call it as a diffusers pipeline. Make it with `to_diffusers`."""

    def __init__(self, chain: AnyChain, model: Backbone) -> None:
        self.chain, self.model = chain, model

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.model.device

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators | None = None,
        output_type: Kind = "pil",
        return_dict: bool = True,
        callback_on_step_end: StepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> PipelineOutput | tuple[Any]:
        """Pictures for prompts, each prompt `num_images_per_prompt` times.

        A list of generators gives each picture its generator's initial seed; one generator gives the first picture its
        own, the next that plus one, and so on; none draws seeds from torch's global generator. No generator is
        advanced. `output_type="latent"` gives clean float32 latents (b, channels, height, width) and skips the last
        Decode. The callback sees every solver step, counted over all stages, with `latents` at its end; it may look,
        not change. Sizes, steps and guidance are the chain's: what is said of them is only compared.

        Raises:
            PlanError: what is asked for is not what the chain does, or cannot be; before any work.
        """
        check_whole("num_images_per_prompt", num_images_per_prompt, 1, wanted="a whole number above 0")
        if output_type not in ("pil", "pt", "np", "latent"):
            raise PlanError(f"output_type must be 'pil', 'pt', 'np' or 'latent', got {output_type!r}")
        if odd := sorted(set(callback_on_step_end_tensor_inputs) - {"latents"}):
            raise PlanError(f"a callback can be given latents, not {odd[0]}")
        prompts = [prompt] if isinstance(prompt, str) else prompt
        require(isinstance(prompts, Sequence) and len(prompts) > 0, "prompt", "text, or a list of texts", prompt)
        for name, value in (("height", height), ("width", width), ("num_inference_steps", num_inference_steps)):
            require(value is None or is_whole(value), name, "a whole number", value)
        require(guidance_scale is None or is_number(guidance_scale), "guidance_scale", "a number", guidance_scale)
        listens = callback_on_step_end is None or callable(callback_on_step_end)
        require(listens, "callback_on_step_end", "a function", callback_on_step_end)
        prompts = [each for each in prompts for _ in range(num_images_per_prompt)]
        seeds = seeds_of(generator, len(prompts))
        chain = self._chain(output_type)
        self._compare(chain, height, width, num_inference_steps, guidance_scale, len(prompts))
        result = run(
            chain,
            self.model,
            prompts,
            seed=seeds,
            negative=one(negative_prompt),
            on_event=None if callback_on_step_end is None else self._relay(callback_on_step_end),
        )
        images: Any = result.data
        if output_type == "pil":
            images = result.images
        elif output_type == "np":
            images = result.pixels.permute(0, 2, 3, 1).cpu().numpy()
        return PipelineOutput(images, result) if return_dict else (images,)

    def _chain(self, output_type: Kind) -> AnyChain:
        if output_type != "latent":
            return self.chain
        if len(self.chain) < 2 or self.chain.stages[-1].takes is not Latents:
            raise PlanError("output_type='latent' needs a chain that ends in Decode()")
        return self.chain[:-1]

    def _compare(
        self, chain: AnyChain, height: int | None, width: int | None, steps: int | None, scale: float | None, batch: int
    ) -> None:
        """Refuse what a caller says of the picture where the chain says otherwise."""
        planned = plan(chain, self.model.info, batch=batch)
        space, out = self.model.info.space, planned.out
        made = (0, 0)
        if isinstance(out, Pixels):
            made = (out.height, out.width)
        elif isinstance(out, Latents):
            made = (out.height * space.downscale, out.width * space.downscale)
        for name, asked, side in (("height", height, made[0]), ("width", width, made[1])):
            if asked is not None and asked != side:
                raise PlanError(f"{name}={asked} was asked for, but the chain makes {made[0]}x{made[1]}")
        own = getattr(getattr(self.chain.stages[0], "schedule", None), "steps", None)
        if steps is not None and steps != own:
            raise PlanError(f"num_inference_steps={steps} was asked for, but the chain samples in {own}")
        if scale is not None:
            raise PlanError(f"guidance_scale={scale:g} was asked for, but the chain says its own: guidance=")

    def _relay(self, callback: StepEnd) -> Callable[[Event], None]:
        done = 0

        def listen(event: Event) -> None:
            nonlocal done
            if not isinstance(event, Stepped):
                return
            latents = event.step.x
            given = callback(self, done, torch.tensor(1000 * event.step.sigma), {"latents": latents})
            done += 1
            if isinstance(given, dict) and given.get("latents", latents) is not latents:
                raise PlanError("callback_on_step_end gave other latents; it may look, not change")

        return listen


def to_diffusers(chain: Chain[A, B] | Stage[A, B], model: Backbone) -> ChainPipeline:
    """A callable with the manners of a diffusers pipeline that runs `chain` on `model`.

    Raises:
        PlanError: the chain does not begin with noise and end in pixels, or does not fit the model.
    """
    whole = AnyChain(chain.stages) if isinstance(chain, Chain) else AnyChain((chain,))
    if whole.takes is not Start or whole.gives is not Pixels:
        raise PlanError(
            f"a pipeline makes pictures from prompts, but this chain takes {whole.takes.__name__} and gives "
            f"{whole.gives.__name__}"
        )
    plan(whole, model.info)
    for stage in whole:
        stage.check(model)
    return ChainPipeline(whole, model)


def seeds_of(generator: Generators | None, count: int) -> list[int]:
    """Seeds for `count` pictures."""
    if generator is None:
        return [int(seed) for seed in torch.randint(2**62, (count,))]
    given = [generator] if isinstance(generator, torch.Generator) else generator
    right = isinstance(given, Sequence) and all(isinstance(each, torch.Generator) for each in given)
    require(right, "generator", "a torch.Generator, or a list of them", generator)
    if isinstance(generator, torch.Generator):
        return [(generator.initial_seed() + i) % MAX_SEED for i in range(count)]
    if len(generator) != count:
        raise PlanError(f"{len(generator)} generators were given for {count} pictures; give one, or one for each")
    return [each.initial_seed() % MAX_SEED for each in generator]


def one(negative: str | Sequence[str] | None) -> str | None:
    """The negative prompt of all pictures."""
    if negative is None or isinstance(negative, str):
        return negative
    require(isinstance(negative, Sequence), "negative_prompt", "text, or a list of equal texts", negative)
    different = set(negative)
    if len(different) != 1:
        raise PlanError(f"{len(different)} different negative prompts were given; a run takes one for all its pictures")
    return different.pop()
