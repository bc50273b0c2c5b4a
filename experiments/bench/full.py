"""What do whole chains cost at full size on a GPU? FLUX.1-dev with random weights, which cost what trained ones do.

Native sampling and MrFlow (12 + 1, 512 to 1024 px; Lanczos instead of a super-resolution net), with CUDA graphs and
without, in bfloat16; one transformer step of ours beside diffusers' on the same weights, where diffusers is installed;
the peak of memory beside the predicted one. Pictures are noise: nothing here says anything about quality.

    python -m experiments.bench.full --native-steps 50
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import mrflow as mf
from mrflow.cost import memory
from mrflow.models.flux.backbone import Flux1
from mrflow.models.flux.transformer import Flux, FluxParams, image_ids
from mrflow.models.flux.vae import VaeFlux, VaeParams
from mrflow.models.offload import RuntimeOptions

LOW, HIGH, TEXT = (512, 512), (1024, 1024), 512
CUDA = torch.device("cuda")


def filled(net: nn.Module) -> nn.Module:
    """A net of the meta device on the GPU: bfloat16, matrices normal with deviation 0.02, vectors zero, scales one."""
    net = net.to(torch.bfloat16).to_empty(device=CUDA)
    generator = torch.Generator(CUDA).manual_seed(0)
    for name, p in net.named_parameters():
        if p.ndim > 1 and not name.endswith("gamma"):
            p.data.normal_(0, 0.02, generator=generator)
        else:
            p.data.fill_(1.0 if name.endswith(("scale", "gamma", "norm.weight")) else 0.0)
    return net


def words() -> mf.Condition:
    """An encoded prompt."""
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(1, TEXT, FluxParams.context, generator=generator)
    pooled = torch.randn(1, FluxParams.pooled, generator=generator)
    return mf.Condition({"context": context.bfloat16(), "pooled": pooled.bfloat16()})


def timed(call: Callable[[], object], repeats: int) -> str:
    """Median and spread of the seconds of a call; of several, after one that is not counted."""
    if repeats > 1:
        call()
    found: list[float] = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return f"{statistics.median(found):.4f} s ({min(found):.4f} to {max(found):.4f})"


def chains(flow: Flux, vae: VaeFlux, native_steps: int) -> None:
    """Native and staged."""
    staged = mf.recipes.paper(mf.Lanczos(2), low=LOW, size=HIGH)
    native = mf.recipes.native(size=HIGH, steps=native_steps)
    cond, info = words(), replace(mf.FLUX, version="random")
    for graphs in (True, False):
        model = Flux1(flow=flow, vae=vae, text=None, info=info, device=CUDA, runtime=RuntimeOptions(graphs=graphs))
        rows: list[tuple[str, mf.Chain[mf.Start, mf.Pixels], int]] = [("MrFlow 12 + 1", staged, 5)]
        rows += [(f"native {native_steps}", native, 1)] if graphs else []
        for label, chain, repeats in rows:
            torch.cuda.reset_peak_memory_stats()

            def call(chain: Any = chain, model: Any = model) -> Tensor:  # noqa: ANN401
                return mf.run(chain, model, condition=cond, seed=0).pixels

            took = timed(call, repeats)
            peak = torch.cuda.max_memory_allocated() / 1e9
            planned = memory(mf.plan(chain, model.info))
            said = f"{planned.peak / 1e9:.1f}" if planned else "?"
            print(f"| {label} | graphs {graphs} | {took} | {peak:.1f} GB, predicted {said} GB |", flush=True)


def beside_diffusers(flow: Flux) -> None:
    """One step of FLUX.1-dev: ours eager, ours as a user runs it is in `chains`, and diffusers'."""
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        theirs: Any = FluxTransformer2DModel(guidance_embeds=True)
    theirs = filled(theirs).eval()
    cond, one = words(), torch.ones(1, device=CUDA)
    context, pooled = cond["context"].to(CUDA), cond["pooled"].to(CUDA)
    text_ids = torch.zeros(context.shape[1], 3, device=CUDA)
    for side in (32, 64):
        ids = image_ids(side, side, device=CUDA)
        x = torch.randn(1, side * side, 64, device=CUDA, dtype=torch.bfloat16)

        def ours(x: Tensor = x, ids: Tensor = ids) -> object:
            return flow(x, ids, context, text_ids, pooled, 0.5 * one, 3.5 * one)

        def other(x: Tensor = x, ids: Tensor = ids) -> object:
            half = (0.5 * one).bfloat16()
            return theirs(
                hidden_states=x,
                timestep=half,
                guidance=(3.5 * one).bfloat16(),
                pooled_projections=pooled,
                encoder_hidden_states=context,
                txt_ids=text_ids,
                img_ids=ids,
                return_dict=False,
            )

        with torch.inference_mode():
            print(f"| step, {16 * side} px | ours {timed(ours, 10)} | diffusers {timed(other, 10)} |", flush=True)


def main() -> None:
    """Print rows of a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--native-steps", type=int, default=50)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("a CUDA device is needed")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with torch.device("meta"):
        nets = Flux(FluxParams()), VaeFlux(VaeParams())
    flow, vae = (filled(net) for net in nets)
    assert isinstance(flow, Flux) and isinstance(vae, VaeFlux)
    chains(flow, vae, args.native_steps)
    if find_spec("diffusers") is not None:
        beside_diffusers(flow)


if __name__ == "__main__":
    main()
