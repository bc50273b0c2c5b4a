"""How far does a rectified flow of the FLUX architecture get at width 128 on procedural scenes?

Trains the text encoder and the transformer together on cached latents: first at the low resolution, then at both.
sigma is logit-normal, shifted by the number of tokens as the model's schedules are; one caption in ten is dropped.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

import mrflow as mf
from experiments.train_pocket.autoencoder import State, loaded
from experiments.train_pocket.data import grid, pictures, unit
from experiments.train_pocket.loop import Loop, Run, finished, flat_then_linear, log, save_whole
from experiments.train_pocket.muon import Muon
from mrflow.models.flux import Flux, image_ids, pack
from mrflow.models.pocket.model import FLUX_PARAMS, POCKET, TEXT_LENGTH, VOCABULARY, WIDTH, Pocket, text_encoder
from mrflow.models.pocket.networks import CompactSR, tokenise
from mrflow.scenes.grammar import World

SIZES = {128: 16000, 256: 5000}
BATCH = {128: 32, 256: 8}
RATE = 2e-3
SHOWN = (
    "a big red circle at the left on coarse dots",
    "a green triangle left of a blue square",
    "three black crosses on medium checks",
    "five purple stars",
    "a small sad face at the right",
    "the big blue word CAT",
    "the small brown word HOUSE",
)


class Trainee(nn.Module):
    """What is trained here."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        heads = FLUX_PARAMS.heads * width // WIDTH
        self.text = text_encoder(width)
        self.flow = Flux(replace(FLUX_PARAMS, context=width, pooled=width, hidden=width, heads=heads))


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention whose backward is fast on a CPU at these lengths."""
    weights: Tensor = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return weights @ v


@torch.inference_mode()
def cached_latents(
    run: Run, name: str, world: World, autoencoder: State, sizes: Mapping[int, int]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Latents (half precision) and caption ids of so many pictures at each size, made once."""
    path = run.folder / f"{name}-latents.pt"
    if path.exists():
        saved: dict[int, tuple[Tensor, Tensor]] = torch.load(path, weights_only=True)
        return saved
    auto = loaded(autoencoder, run.device)
    out = {}
    for size, count in sizes.items():
        images, captions = pictures(world, run.count(count), size, 11)
        chunks = [auto.encode(unit(part.to(run.device))).half().cpu() for part in images.split(50)]
        out[size] = (torch.cat(chunks), tokenise(captions, VOCABULARY, TEXT_LENGTH)[0])
        log.info("encoded %d pictures at %d px", len(images), size)
    save_whole(out, path)
    return out


def optimisers(net: Trainee, rate: float) -> Sequence[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in net.named_parameters():
        inside = "blocks" in name and p.ndim == 2 and "mod" not in name
        (matrices if inside else rest).append(p)
    return Muon(matrices, lr=rate), torch.optim.AdamW(rest, lr=rate, weight_decay=0.0, betas=(0.9, 0.99))


def loss_at(net: Trainee, latents: Tensor, ids: Tensor) -> Tensor:
    """Mean squared error of the velocity at random noise levels."""
    b, _, h, w = latents.shape
    tokens, device = (h // 2) * (w // 2), latents.device
    s = torch.sigmoid(torch.randn(b, device=device))
    factor = math.exp(POCKET.shift.mu(tokens))
    sigma = factor * s / (1 + (factor - 1) * s)
    eps = torch.randn_like(latents)
    x = latents + sigma.view(b, 1, 1, 1) * (eps - latents)
    ids = torch.where(torch.rand(b, 1, device=device) < 0.1, torch.zeros_like(ids), ids)
    context, pooled = net.text(ids)
    places = image_ids(h // 2, w // 2, device=device), torch.zeros(ids.shape[1], 3, device=device)
    velocity = net.flow(pack(x), places[0], context, places[1], pooled, sigma, None)
    return F.mse_loss(velocity.float(), pack(eps - latents))


def backbone(net: Trainee, autoencoder: State, device: torch.device) -> Pocket:
    """The model as it is now; of the super-resolution net only the shape."""
    auto = loaded(autoencoder, device)
    return Pocket(text=net.text, flow=net.flow, autoencoder=auto, sr=CompactSR(), version="trainee", device=device)


def drawn(net: Trainee, autoencoder: State, device: torch.device, sizes: Iterable[int]) -> Image.Image:
    """What it draws now, 12 guided steps: a row at each size."""
    model = backbone(net, autoencoder, device)
    rows = [mf.run(mf.recipes.native(size=(size, size), steps=12), model, SHOWN, seed=0).pixels.cpu() for size in sizes]
    net.train()
    return grid(rows)


def train(
    run: Run,
    name: str,
    world: World,
    steps: tuple[int, int],
    autoencoder: State,
    *,
    high_share: float,
    start: State | None = None,
    width: int = WIDTH,
    shared: str = "",
) -> State:
    """The weights of flow and text encoder after `steps` at the low resolution alone and then at both.

    `high_share` is the share of the high resolution in the second part; at either a step costs about the same. With no
    steps in the second part, the high resolution is neither rendered nor drawn. `width` is the transformer's. `shared`
    names the file of latents, which runs on the same pictures may share; without it, it is named as the part is.
    """
    if (done := finished(run, name)) is not None:
        return done
    sizes = SIZES if steps[1] else {128: SIZES[128]}
    data, device = cached_latents(run, shared or name, world, autoencoder, sizes), run.device
    torch.manual_seed(0)
    net = Trainee(width)
    net.flow.reset(torch.Generator().manual_seed(0))
    if start is not None:
        net.load_state_dict(start)
    net = net.to(device)
    low, total = run.count(steps[0]), run.count(sum(steps), 2)
    loop = Loop(
        name,
        run,
        dict(net.named_parameters()),
        optimisers(net, RATE),
        total,
        factor=flat_then_linear(0.3),
        warmup=200,
        decay=0.998,
        draw=lambda: drawn(net, autoencoder, device, sizes),
    )
    if device.type == "cpu":
        net.flow.attention = plain_attention
    for step in loop:
        size = 256 if step >= low and torch.rand(()).item() < high_share else 128
        latents, ids = data[size]
        pick = torch.randint(len(latents), (run.batch * BATCH[size],))
        with run.autocast():
            loss = loss_at(net, latents[pick].float().to(device), ids[pick].to(device))
        loop.learn(loss, f"{size} px", len(pick))
    return loop.finish()
