"""What a sweep is: chains x prompts x draws, the seed of each draw, and the key of each row."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, cast

from mrflow import __version__
from mrflow._checks import check_seed
from mrflow.errors import PlanError, RecordError
from mrflow.model_info import ModelInfo
from mrflow.models.digests import weights_of
from mrflow.records.chains import Plain, encode_chain, fingerprint
from mrflow.records.files import cache_folder
from mrflow.spec import Pixels, Start
from mrflow.stage import AnyChain, AnyStage, Chain, Plan, plan
from mrflow.sweep.metrics import Metric
from mrflow.sweep.rows import row_key as row_key
from mrflow.sweep.rows import seed_of as seed_of

Pictures = Literal["last", "stages"]


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what it is sorted by in tables: tags such as {"category": "words"}."""

    text: str
    tags: Mapping[str, str] = field(default_factory=dict[str, str], hash=False)


@dataclass(frozen=True)
class Sweep:
    """Chains by label, prompts and draws: every chain draws every prompt as often as there are `seeds`.

    `seeds` number the draws of a prompt. The noise of a draw comes from `seed_of(prompt, draw)`, which is in its row
    and picture: no two prompts share it, and all chains share that of a prompt and draw. `prompts` are texts, `Prompt`s
    with tags, or any iterable of them; `reference` is the label of the chain that the others are held against
    (default: the first). `metrics` are numbers for each picture; `pictures="stages"` keeps every stage's picture too.

    Raises:
        PlanError: nothing to draw, a label or prompt twice, a reference that is none of the chains.
    """

    chains: Mapping[str, AnyChain]
    prompts: Sequence[Prompt]
    seeds: Sequence[int]
    metrics: Sequence[Metric]
    model: str
    negative: str | None
    reference: str
    pictures: Pictures

    def __init__(
        self,
        chains: Mapping[str, AnyChain | AnyStage],
        prompts: Iterable[str | Prompt],
        *,
        seeds: Iterable[int] = (0,),
        metrics: Iterable[Metric] = (),
        model: str = "pocket",
        negative: str | None = None,
        reference: str | None = None,
        pictures: Pictures = "last",
    ) -> None:
        def put(name: str, value: object) -> None:
            object.__setattr__(self, name, value)

        prompts = (prompts,) if isinstance(prompts, str | Prompt) else prompts
        seeds = (seeds,) if isinstance(seeds, int) else seeds
        given: Iterable[object] = (metrics,) if isinstance(metrics, str) or callable(metrics) else metrics
        measures = tuple(cast("Iterable[Metric]", given))
        for metric in measures:
            if isinstance(metric, str | type) or not callable(metric):
                raise PlanError(f"metrics are objects such as mf.sweep.SceneScore(), got {metric!r}")
        if not isinstance(chains, Mapping):
            raise PlanError(f'chains must have labels, such as {{"paper": chain}}, got {chains!r}')
        if isinstance(prompts, Mapping):
            raise PlanError(f"prompts are a list of texts or of Prompt(text, tags), got {prompts!r}")
        whole = {label: c if isinstance(c, Chain) else AnyChain((c,)) for label, c in chains.items()}
        texts = tuple(p if isinstance(p, Prompt) else Prompt(p) for p in prompts)
        put("chains", whole)
        put("prompts", texts)
        put("seeds", tuple(seeds))
        put("metrics", measures)
        put("model", model)
        put("negative", negative)
        put("reference", next(iter(whole), "") if reference is None else reference)
        put("pictures", pictures)
        for what, values in (("chain", self.chains), ("prompt", self.prompts), ("seed", self.seeds)):
            if not values:
                raise PlanError(f"a sweep needs at least one {what}")
        if not all(isinstance(label, str) and label for label in whole):
            raise PlanError("the label of a chain must be text")
        for each in texts:
            if not isinstance(each.text, str):
                raise PlanError(f"a prompt must be text or a Prompt, got {each.text!r}")
        for seed in self.seeds:
            check_seed(seed)
        if len({p.text for p in texts}) != len(texts):
            twice = Counter(p.text for p in texts).most_common(1)[0][0]
            raise PlanError(f"the prompt {twice!r} is there twice; more pictures of it come from more seeds")
        if len(set(self.seeds)) != len(self.seeds):
            raise PlanError("a seed is there twice")
        if self.reference not in whole:
            raise PlanError(f"the reference {self.reference!r} is none of the chains: {', '.join(whole)}")
        if pictures not in ("last", "stages"):
            raise PlanError(f"pictures must be last or stages, got {pictures!r}")

    @property
    def pairs(self) -> list[tuple[Prompt, int]]:
        """Every prompt with every draw."""
        return [(prompt, draw) for prompt in self.prompts for draw in self.seeds]

    @property
    def rows(self) -> int:
        """How many pictures it asks for."""
        return len(self.chains) * len(self.prompts) * len(self.seeds)

    def plans(self, info: ModelInfo) -> dict[str, Plan]:
        """Every chain planned for a model, before any weight is loaded; and held to what a sweep needs.

        Raises:
            PlanError: a chain cannot work, begins or ends with something else than a sweep can give and keep, holds an
                object that cannot be written down, or is another one too. The text names the chain.
        """
        out: dict[str, Plan] = {}
        same: dict[str, str] = {}
        for label, chain in self.chains.items():
            try:
                out[label] = plan(chain, info)
                first = same.setdefault(fingerprints(chain)[-1], label)
            except (PlanError, RecordError) as error:
                raise PlanError(f"chain {label!r}: {error}") from None
            if first != label:
                raise PlanError(
                    f"chains {first!r} and {label!r} are the same, and would share their rows; leave one of them out"
                )
            if not isinstance(out[label].out, Pixels):
                raise PlanError(f"chain {label!r} ends in {out[label].out}; put Decode() at its end")
            if not isinstance(out[label].rows[0].spec, Start):
                raise PlanError(f"chain {label!r} begins with {out[label].rows[0].spec}; a sweep begins with noise")
        return out

    def negative_for(self, info: ModelInfo) -> str:
        """The negative prompt: the sweep's, or else the model's own."""
        return info.negative if self.negative is None else self.negative

    def as_data(self) -> dict[str, list[Plain]]:
        """The chains as plain data."""
        return {label: encode_chain(chain) for label, chain in self.chains.items()}


def fingerprints(chain: AnyChain) -> list[str]:
    """For each stage, a text that changes when it or a stage before it does."""
    out: list[str] = []
    running = ""
    for stage in chain:
        running = hashlib.sha256((running + fingerprint(stage)).encode()).hexdigest()
        out.append(running)
    return out


def versions() -> dict[str, str]:
    """What may change a picture besides chain, model, prompt and seed."""
    import torch

    return {"mrflow": __version__, "torch": torch.__version__}


def model_at(info: ModelInfo) -> str:
    """What `--model` must name to load a model again; empty for one that comes with mrflow.

    `MODEL`, to be filled in, where the files of a model lie in several places.
    """
    if len(info.files) < 2:
        return "".join(info.files)
    try:
        folder = os.path.commonpath([os.path.dirname(file) for file in info.files])
    except ValueError:  # on several drives
        return "MODEL"
    return folder if os.path.isfile(os.path.join(folder, "model_index.json")) else "MODEL"


def weights(info: ModelInfo) -> str:
    """What tells a model's weights: its version and, where its files did not come with mrflow, a digest of all of them.

    Whole files are read for it once (`mrflow.models.digests`).

    Raises:
        WeightsError, ResourceError: a file is gone, or cannot be read.
    """
    if not info.files:
        return info.version

    return weights_of(info.version, info.files, cache_folder())
