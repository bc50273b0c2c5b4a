"""How far does a small rectified flow of the FLUX architecture get on procedural scenes?

Trains the text encoder and the transformer together on cached latents, small pictures first, as a `Course` says.
sigma is logit-normal, shifted by the number of tokens as the model's schedules are; one caption in ten is dropped.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import mrflow as mf
from experiments.train_pocket.autoencoder import State, loaded
from experiments.train_pocket.data import grid, pictures, unit
from experiments.train_pocket.loop import Loop, Run, finished, flat_then_linear, log, save_whole
from experiments.train_pocket.muon import Muon
from mrflow.model_info import ModelInfo, Shift
from mrflow.models.flux.initial import reset
from mrflow.models.flux.transformer import Flux, image_ids
from mrflow.models.pocket.model import TEXT_LENGTH, VOCABULARY, Pocket, pocket_params
from mrflow.models.pocket.networks import CompactSR, PocketTextEncoder, tokenise
from mrflow.protocols.tokens import pack
from mrflow.scenes.grammar import World

RATE = 2e-3
SHOWN_STEPS = 12
SHOWN = (
    "a big red circle at the left on coarse dots",
    "a green triangle left of a blue square",
    "three black crosses on medium checks",
    "five purple stars",
    "a small sad face at the right",
    "the big blue word CAT",
    "the small brown word HOUSE",
)


@dataclass(frozen=True)
class Course:
    """What the flow sees. `pictures` and `batch` say how many of each size; `parts` are stretches of so many steps, and
    in each the shares that the sizes have of its steps."""

    pictures: Mapping[int, int]
    batch: Mapping[int, int]
    parts: tuple[tuple[int, Mapping[int, float]], ...]

    def size_at(self, step: int, run: Run) -> int:
        """The size of a step's pictures, drawn where its part of the course has several."""
        ends = accumulate(run.count(steps) for steps, _ in self.parts)
        shares = next((s for end, (_, s) in zip(ends, self.parts, strict=True) if step < end), self.parts[-1][1])
        if len(shares) == 1:
            return next(iter(shares))
        return list(shares)[int(torch.multinomial(torch.tensor(list(shares.values())), 1))]

    @property
    def sizes(self) -> tuple[int, ...]:
        """All that occur, smallest first."""
        return tuple(sorted({size for _, shares in self.parts for size in shares}))


class Trainee(nn.Module):
    """What is trained here."""

    def __init__(self, width: int, head: int, *, words: int = len(VOCABULARY), length: int = TEXT_LENGTH) -> None:
        super().__init__()
        self.text = PocketTextEncoder(vocabulary=words, length=length, width=width)
        self.flow = Flux(pocket_params(width, head))


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention whose backward is fast on a CPU at these lengths."""
    weights: Tensor = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return weights @ v


Renders = tuple[Tensor, list[str]]


def renders(run: Run, world: World, course: Course) -> dict[int, Callable[[], Renders]]:
    """The pictures of each size: on their way already where there are processes to make them, else when called."""
    made: dict[int, Callable[[], Renders]] = {}
    line = ThreadPoolExecutor(1)  # one size after another
    for size in course.sizes:
        make = partial(pictures, world, run.count(course.pictures[size]), size, 11, pool=run.pool)
        made[size] = line.submit(make).result if run.pool is not None else make
    line.shutdown(wait=False)
    return made


def latents_file(run: Run, name: str) -> Path:
    """Where the latents of a part's pictures are kept."""
    return run.folder / f"{name}-latents.pt"


@torch.inference_mode()
def cached_latents(
    run: Run, name: str, autoencoder: State, images: dict[int, Callable[[], Renders]]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Latents (half precision) and caption ids of pictures at each size, made once; `images` is emptied on the way."""
    path = latents_file(run, name)
    if path.exists():
        saved: dict[int, tuple[Tensor, Tensor]] = torch.load(path, weights_only=True)
        return saved
    auto = loaded(autoencoder, run.device)
    out = {}
    for size in list(images):
        found, captions = images.pop(size)()  # nothing else holds them
        chunks = [auto.encode(unit(part.to(run.device))).half().cpu() for part in found.split(50)]
        out[size] = (torch.cat(chunks), tokenise(captions, VOCABULARY, TEXT_LENGTH)[0])
        log.info("encoded %d pictures at %d px", len(found), size)
        del found
    save_whole(out, path)
    return out


def optimisers(net: Trainee, rate: float, dtype: torch.dtype = torch.float32) -> Sequence[torch.optim.Optimizer]:
    """Muon (iterating in `dtype`) for the matrices of the blocks, AdamW for the rest."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, p in net.named_parameters():
        inside = "blocks" in name and p.ndim == 2 and "mod" not in name
        (matrices if inside else rest).append(p)
    return Muon(matrices, lr=rate, dtype=dtype), torch.optim.AdamW(rest, lr=rate, weight_decay=0.0, betas=(0.9, 0.99))


def losses_at(net: Trainee, latents: Tensor, ids: Tensor, *shifts: Shift) -> Tensor:
    """Mean squared error of each item's velocity at a random noise level: (batch); `shifts` are taken in turn."""
    b, _, h, w = latents.shape
    tokens, device = (h // 2) * (w // 2), latents.device
    s = torch.sigmoid(torch.randn(b, device=device))
    factors = torch.tensor([math.exp(shift.mu(tokens)) for shift in shifts], device=device)
    factor = factors[torch.arange(b, device=device) % len(shifts)]
    sigma = factor * s / (1 + (factor - 1) * s)
    eps = torch.randn_like(latents)
    x = latents + sigma.view(b, 1, 1, 1) * (eps - latents)
    ids = torch.where(torch.rand(b, 1, device=device) < 0.1, torch.zeros_like(ids), ids)
    context, pooled = net.text(ids)
    places = image_ids(h // 2, w // 2, device=device), torch.zeros(ids.shape[1], 3, device=device)
    velocity = net.flow(pack(x), places[0], context, places[1], pooled, sigma, None)
    losses: Tensor = (velocity.float() - pack(eps - latents)).square().mean((1, 2))
    return losses


def backbone(net: Trainee, autoencoder: State, device: torch.device, info: ModelInfo) -> Pocket:
    """The model as it is now; of the super-resolution net only the shape."""
    auto, sr = loaded(autoencoder, device), CompactSR()
    return Pocket(text=net.text, flow=net.flow, autoencoder=auto, sr=sr, version="trainee", device=device, info=info)


def drawn(
    net: Trainee,
    autoencoder: State,
    device: torch.device,
    info: ModelInfo,
    sizes: Iterable[int],
    shown: Sequence[str] | None = None,
) -> Image.Image:
    """What it draws now, `SHOWN_STEPS` guided steps: a row at each size."""
    model = backbone(net, autoencoder, device, info)
    chains = [mf.recipes.native(size=(size, size), steps=SHOWN_STEPS) for size in sizes]
    with torch.compiler.set_stance("force_eager"):  # type: ignore[no-untyped-call,unused-ignore]
        rows = [mf.run(chain, model, SHOWN if shown is None else shown, seed=0).pixels.cpu() for chain in chains]
    net.train()
    return grid(rows)


def train(
    run: Run,
    name: str,
    world: World,
    course: Course,
    autoencoder: State,
    *,
    info: ModelInfo,
    width: int,
    head: int,
    start: State | None = None,
    shared: str = "",
    images: dict[int, Callable[[], Renders]] | None = None,
) -> State:
    """The weights of flow and text encoder after a course, from `start` or from nothing.

    `info` has the shift of the noise levels; `width` and `head` are the transformer's. `shared` names the file of
    latents, which runs on the same pictures may share; without it, it is named as the part is. `images` are the
    course's `renders`, where they were begun before, and are used up.
    """
    if (done := finished(run, name)) is not None:
        return done
    device = run.device
    data = cached_latents(run, shared or name, autoencoder, images or renders(run, world, course))
    if device.type == "cuda":
        data = {size: (latents.to(device), ids.to(device)) for size, (latents, ids) in data.items()}
    torch.manual_seed(0)
    net = Trainee(width, head)
    reset(net.flow, torch.Generator().manual_seed(0))
    if start is not None:
        net.load_state_dict(start)
    net = net.to(device)
    loop = Loop(
        name,
        run,
        dict(net.named_parameters()),
        optimisers(net, RATE),
        sum(run.count(steps) for steps, _ in course.parts),
        factor=flat_then_linear(0.3),
        warmup=200,
        decay=0.998,
        draw=lambda: drawn(net, autoencoder, device, info, course.sizes),
    )
    prepare(net.flow)
    for step in loop:
        size = course.size_at(step, run)
        latents, ids = data[size]
        pick = torch.randint(len(latents), (run.items(course.batch[size]),), device=latents.device)
        with run.autocast():
            loss = losses_at(net, latents[pick].float().to(device), ids[pick].to(device), info.shift).mean()
        loop.learn(loss, f"{size} px", len(pick))
    return loop.finish()


def prepare(flow: Flux) -> None:
    """Make a transformer's training fast: its blocks compiled on CUDA, a quicker backward on a processor."""
    if flow.img_in.weight.device.type == "cpu":
        flow.attention = plain_attention
        return
    torch.set_float32_matmul_precision("high")  # for Muon; the network runs in bfloat16
    torch._dynamo.config.recompile_limit = 64  # two kinds of block at every size
    for block in flow.stack():
        block.compile(dynamic=False)
