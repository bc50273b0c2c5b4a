"""Is a small x2 net, trained on what the autoencoder really decodes, better than bicubic?

Pairs: a scene through the autoencoder (its latents noised a little, as sampled ones are), and the same scene drawn at
twice the side. Loss: L1 + 0.3 gradient L1; in the last part of the steps a hinge GAN at weight 0.004 with a patch
discriminator, where one is asked for.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from experiments.train_pocket.autoencoder import State, gradient_l1, loaded
from experiments.train_pocket.data import grid, pictures, unit
from experiments.train_pocket.loop import Loop, Run, cosine, finished, log
from mrflow.metrics import psnr
from mrflow.models.pocket.networks import CompactSR
from mrflow.scenes.grammar import World
from mrflow.scenes.hard import HardWorld

PAIRS = 1500  # at each size
HELD = 100  # the last of them are for measuring
CROP = 64  # of the small picture's side


def discriminator() -> nn.Sequential:
    """Patches of 22 x 22 pixels to a score each."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(24, 48, 4, 2, 1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(48, 1, 4, 1, 1),
    )


def bicubic(x: Tensor) -> Tensor:
    """Twice as large."""
    return F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False).clamp(0, 1)


@torch.inference_mode()
def decoded(small: Tensor, autoencoder: State, device: torch.device) -> Tensor:
    """What the autoencoder makes of pictures (uint8), with a little noise on their latents; uint8 again."""
    auto = loaded(autoencoder, device)
    out: list[Tensor] = []
    for part in small.split(50):
        z = auto.encode(unit(part.to(device)))
        out.append((auto.decode(z + 0.1 * torch.randn_like(z)).clamp(0, 1) * 255).round().byte().cpu())
    return torch.cat(out).clone()


def train(
    run: Run,
    name: str,
    world: World | HardWorld,
    steps: int,
    autoencoder: State,
    *,
    sizes: Sequence[int] = (128,),
    pairs: int = PAIRS,
    crops: int = 8,
    gan: float = 1.0,
    start: State | None = None,
) -> State:
    """The super-resolution net's weights; `sizes` are those of small pictures, `crops` how many of them a batch has.

    `gan` is the share of the steps before the GAN begins (1: none).
    """
    if (done := finished(run, name)) is not None:
        return done
    device, held = run.device, run.count(HELD)
    count = run.count(pairs) + held
    torch.manual_seed(0)
    data: list[tuple[Tensor, Tensor]] = []
    for size in sizes:
        small, large = (pictures(world, count, side, 21, pool=run.pool)[0] for side in (size, 2 * size))
        data.append((decoded(small, autoencoder, device), large))
        log.info("made %d pairs at %d px", len(large), size)
    net, critic = CompactSR(), discriminator().to(device)
    if start is not None:
        net.load_state_dict(start)
    net = net.to(device)
    optimiser = torch.optim.AdamW(net.parameters(), lr=1e-3, betas=(0.9, 0.99))
    second = torch.optim.AdamW(critic.parameters(), lr=3e-4, betas=(0.5, 0.9))
    tests = [(unit(small[-held:]), unit(large[-held:])) for small, large in data]

    def draw() -> Image.Image:
        few, true = (part[:4] for part in tests[-1])
        return grid([bicubic(few), net(few.to(device)).clamp(0, 1), true])

    loop = Loop(
        name,
        run,
        dict(net.named_parameters()),
        [optimiser],
        run.count(steps),
        factor=cosine,
        clip=False,
        keep={"critic": critic, "its optimiser": second},
        draw=draw,
    )
    for _ in loop:
        inputs, large = data[int(torch.randint(len(data), ()))]
        pick = torch.randint(len(inputs) - held, (run.items(crops),))
        i, j = (int(v) for v in torch.randint(0, inputs.shape[-1] - CROP + 1, (2,)))
        cut = unit(inputs[pick, :, i : i + CROP, j : j + CROP].to(device))
        true = unit(large[pick, :, 2 * i : 2 * (i + CROP), 2 * j : 2 * (j + CROP)].to(device))
        out = net(cut)
        loss = (out - true).abs().mean() + 0.3 * gradient_l1(out, true)
        adversarial = loop.progress >= gan
        loop.learn(loss - 0.004 * critic(out).mean() if adversarial else loss, items=len(pick))
        if adversarial:
            loss_d = F.relu(1 - critic(true)).mean() + F.relu(1 + critic(out.detach())).mean()
            second.zero_grad()
            loss_d.backward()
            second.step()
    with loop.averaged():
        for size, (x, y) in zip(sizes, tests, strict=True):
            found = torch.cat([net(part.to(device)).clamp(0, 1).cpu() for part in x.split(20)])
            after, before = psnr(found, y).mean(), psnr(bicubic(x), y).mean()
            log.info("%s: %.2f dB, bicubic %.2f dB, to %d px", name, after, before, 2 * size)
    return loop.finish()
