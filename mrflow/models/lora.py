"""Low-rank adapters (LoRA; Hu et al. 2021, arXiv 2106.09685) from published files: W + strength alpha / rank up down.

Every key layout is resolved one way: the names that a linear has in Black Forest Labs' and in diffusers' layout are
flattened (dots become underscores) into one table, and a file's names, with their prefixes taken off, are looked up in
it. What a file holds for a part of a fused linear lands on that part's rows.

`merge` writes adapters into weights, for good. `adapt` gives a network that shares every weight with the one it is
given and adds the low-rank products as it goes: nothing is ever changed, so nothing has to be restored.
"""

import copy
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from mrflow.checkpoints.adapters import Lora
from mrflow.checkpoints.lora import AXES, is_text, number_of, read_adapter, scale_factors, squeeze
from mrflow.checkpoints.names import INSIDE, WRAPPERS, bare
from mrflow.checkpoints.safetensors import Entry, map_tensor, some
from mrflow.errors import PlanError, WeightsError
from mrflow.models.family import family_of_network
from mrflow.models.folded import FoldedLinear
from mrflow.models.fp8 import Fp8Linear
from mrflow.models.layers import SplitLinear

N = TypeVar("N", bound=nn.Module)
# How sd-scripts, OneTrainer and LyCORIS begin their names, and what of wrappers is left where dots become underscores.
PREFIXES = (
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
    "lora_",
    *(f"{word}_" for word in (*INSIDE, *sorted(WRAPPERS))),
)


@dataclass(frozen=True)
class Target:
    """A linear of the network, or `rows` of its output from `start` on.

    `swap` says that the halves lie as in diffusers' files, (scale, shift).
    """

    path: str
    start: int
    rows: int
    width: int
    swap: bool = False


@dataclass(frozen=True)
class Piece:
    """What one file holds for one target, by role; its tensors are read when they are needed.

    `scale` (strength alpha / rank) multiplies the low-rank pair and the pair's own bias, `strength` whole changes.
    """

    stem: str
    target: Target
    strength: float
    scale: float
    entries: Mapping[str, Entry]


@dataclass
class Change:
    """The change of one linear: `up` (out, rank) times `down` (rank, in), and where a file has them, a bias and a whole
    matrix. float32, with strength and alpha in `up`."""

    down: Float[Tensor, "r i"]
    up: Float[Tensor, "o r"]
    bias: Float[Tensor, " o"] | None = None
    diff: Float[Tensor, "o i"] | None = None

    @property
    def is_bounded(self) -> bool:
        """Whether float32 holds whatever it adds to a weight."""
        low = (
            self.up.double().abs().sum(0).max() * self.down.double().abs().max() if len(self.down) else torch.zeros(())
        )
        rest = [x for x in (self.bias, self.diff) if x is not None]
        return bool(low < torch.finfo(torch.float32).max) and all(bool(x.isfinite().all()) for x in rest)

    def matrix(self) -> Float[Tensor, "o i"]:
        """What is added to the weight."""
        low = self.up @ self.down
        return low if self.diff is None else low + self.diff


class AdaptedLinear(nn.Module):
    """A linear and what adapters add to it; `weight` is the linear's own."""

    def __init__(self, base: nn.Module, change: Change, *, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        self.base = base
        self.down, self.up = _cast(change.down, dtype).to(device), _cast(change.up, dtype).to(device)
        self.bias_change = None if change.bias is None else _cast(change.bias, dtype).to(device)
        self.diff = None if change.diff is None else _cast(change.diff, dtype).to(device)

    @property
    def weight(self) -> Tensor:
        """The linear's own weight."""
        return cast("Tensor", self.base.weight)

    def forward(self, x: Float[Tensor, "*b i"]) -> Float[Tensor, "*b o"]:
        """base(x) + up (down x) + the rest."""
        out: Tensor = self.base(x)
        if len(self.down):
            out = out + F.linear(F.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        if self.bias_change is not None:
            out = out + self.bias_change
        return out if self.diff is None else out + F.linear(x, self.diff.to(x.dtype))


def _cast(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in a dtype, of any shape.

    Raises:
        WeightsError: one is beyond what the dtype holds.
    """
    out = values.to(dtype)
    if not bool(out.isfinite().all()):
        raise WeightsError(
            f"an adapter's values reach {float(values.abs().max()):.2g}, beyond {str(dtype).removeprefix('torch.')}; "
            "take bfloat16, or a smaller strength"
        )
    return out


def _flat(name: str) -> str:
    """A name as sd-scripts writes it."""
    return name.replace(".", "_")


def targets(net: nn.Module) -> dict[str, Target]:
    """Every linear of a transformer under every name that its family publishes it by, flattened."""
    family = family_of_network(net)
    table: dict[str, Target] = {}
    for path, module in net.named_modules():
        size = _size(module)
        if size is None or ".parts." in path:
            continue
        rows, width = size
        whole = Target(path, 0, rows, width)
        table[_flat(path)] = whole
        published = [name.removesuffix(".weight") for name in family.names(f"{path}.weight")]
        counts: tuple[int, ...] = (rows,)
        if len(published) > 1:
            counts = cast("tuple[int, ...]", net.get_submodule(path.rpartition(".")[0]).rows)
        start = 0
        for name, count in zip(published, counts, strict=True):
            part = Target(path, start, count, width, swap=name == "norm_out.linear")
            table[_flat(name)] = part
            if name.endswith(".to_out.0"):
                table[_flat(name.removesuffix(".0"))] = part
            start += count
        for alias, parts in family.aliases(path).items():
            table[_flat(alias)] = Target(path, 0, rows if parts is None else sum(counts[:parts]), width)
    return table


def _size(module: nn.Module) -> tuple[int, int] | None:
    """Output and input width of a linear of any kind; None for another module."""
    if isinstance(module, SplitLinear):
        return sum(p.out_features for p in module.parts), next(iter(module.parts)).in_features
    if isinstance(module, nn.Linear | FoldedLinear):
        return module.out_features, module.in_features
    if isinstance(module, Fp8Linear):
        return module.weight.shape[0], module.weight.shape[1]
    return None


def resolve(net: nn.Module, lora: Lora, name: str, beside: Container[str] = ()) -> list[Piece]:
    """What an adapter changes in a network. `name` is the model's, for errors; `beside` are names of other things.

    Raises:
        WeightsError: once, for all names that belong nowhere and all shapes that do not fit.
    """
    content, _ = read_adapter(lora.path, lora.sha256)
    table, header = targets(net), content.header
    factors = scale_factors(header)
    pieces: list[Piece] = []
    problems: list[str] = []
    unknown, text = [each for each in content.extra if each not in beside], list[str]()
    for stem, group in content.groups.items():
        module, target = _find(stem, table)
        if target is None:
            (text if is_text(stem) else unknown).append(stem)
            continue
        if problem := _misfit(stem, target, group):
            problems.append(problem)
            continue
        factor = 1.0
        if "down" in group:
            rank = group["down"].shape[0]
            factor = number_of(group["alpha"]) / rank if "alpha" in group else factors(module, rank)
        pieces.append(Piece(stem, target, lora.strength, lora.strength * factor, group))
    problems += _overlaps(pieces)
    path = header.path
    if unknown:
        problems.append(f"{len(unknown)} names that belong nowhere in {name}: {some(unknown)}")
    if text and not lora.skip_text:
        problems.append(
            f"{len(text)} names for text encoders, which are not adapted: {some(text)}; Lora(..., skip_text=True) "
            "leaves them out"
        )
    if problems:
        raise WeightsError(f"{path} does not fit {name}: {some(problems)}")
    return pieces


def _find(stem: str, table: Mapping[str, Target]) -> tuple[str, Target | None]:
    """The stem without what wrappers put before it, and the linear that it names."""
    known = bare(stem, lambda name: _flat(name) in table, also=PREFIXES)
    return (stem, None) if known is None else (known, table[_flat(known)])


def _misfit(stem: str, target: Target, group: Mapping[str, Entry]) -> str:
    rank = group["down"].shape[0] if "down" in group else 0
    want: dict[str, tuple[int, ...]] = {
        "down": (rank, target.width),
        "up": (target.rows, rank),
        "diff": (target.rows, target.width),
        "bias": (target.rows,),
        "diff_b": (target.rows,),
    }
    for role, entry in group.items():
        if role != "alpha" and squeeze(entry.shape, len(want[role])) != want[role]:
            return f"{stem}: {role} has shape {entry.shape}, expected {want[role]}"
    return ""


def _overlaps(pieces: Sequence[Piece]) -> list[str]:
    """Names of one file that change the same rows of the same linear in the same way."""
    out: list[str] = []
    seen: dict[str, list[Piece]] = {}
    for piece in pieces:
        t = piece.target
        for other in seen.setdefault(t.path, []):
            o = other.target
            if t.start < o.start + o.rows and o.start < t.start + t.rows and set(piece.entries) & set(other.entries):
                out.append(f"{other.stem} and {piece.stem} are the same weights")
        seen[t.path].append(piece)
    return out


def changes(net: nn.Module, loras: Sequence[Lora], name: str, *, beside: Container[str] = ()) -> dict[str, Change]:
    """The change of every linear that adapters touch, by the linear's path; several adapters add up.

    `beside` are names in their files that belong to something else.

    Raises:
        WeightsError: as `resolve`.
    """
    by_path: dict[str, list[Piece]] = {}
    for lora in loras:
        for piece in resolve(net, lora, name, beside):
            by_path.setdefault(piece.target.path, []).append(piece)
    files: dict[Path, torch.UntypedStorage] = {}
    out: dict[str, Change] = {}
    for path, pieces in by_path.items():
        for part, start, stop in _parts(net.get_submodule(path), path):
            change = _join(pieces, start, stop, files, turned=_is_scale_first(net, path))
            if change is not None and not change.is_bounded:
                stems = some([piece.stem for piece in pieces])
                raise WeightsError(f"{name}: with their alpha and strength the values of {stems} are beyond float32")
            if change is not None:
                out[part] = change
    return out


def _is_scale_first(net: nn.Module, path: str) -> bool:
    """Whether a linear's rows lie as in diffusers' files, (scale, shift), instead of the other way round."""
    return path == "final_layer.adaLN_modulation.1" and bool(net.get_submodule("final_layer").scale_first)


def _parts(module: nn.Module, path: str) -> Iterator[tuple[str, int, int]]:
    """The matrices of a linear, with the rows that each has of the whole."""
    if not isinstance(module, SplitLinear):
        size = _size(module)
        assert size is not None
        yield path, 0, size[0]
        return
    start = 0
    for i, part in enumerate(module.parts):
        yield f"{path}.parts.{i}", start, start + part.out_features
        start += part.out_features


def _join(
    pieces: Iterable[Piece], start: int, stop: int, files: dict[Path, torch.UntypedStorage], *, turned: bool
) -> Change | None:
    """The change of the rows from `start` to before `stop`; None where no piece touches them."""
    rows = stop - start
    downs, ups, width = list[Tensor](), list[Tensor](), 0
    bias: Tensor | None = None
    diff: Tensor | None = None

    def read(piece: Piece, role: str) -> Tensor:
        x = map_tensor(piece.entries[role], files).float()
        if not bool(x.isfinite().all()):
            raise WeightsError(f"{piece.entries[role].file}: {role} of {piece.stem} holds NaN or infinity")
        x = x.flatten(1) if x.ndim > 2 else x.reshape(-1) if AXES[role] == 1 else x
        return torch.cat(tuple(reversed(x.chunk(2)))) if role != "down" and piece.target.swap != turned else x

    for piece in pieces:
        t = piece.target
        width = t.width
        low, high = max(start, t.start), min(stop, t.start + t.rows)
        if low >= high:
            continue
        theirs, ours = slice(low - t.start, high - t.start), slice(low - start, high - start)
        if "down" in piece.entries:
            downs.append(read(piece, "down"))
            ups.append(torch.zeros(rows, len(downs[-1])))
            ups[-1][ours] = piece.scale * read(piece, "up")[theirs]
        for role, factor in (("bias", piece.scale), ("diff_b", piece.strength)):
            if role in piece.entries:
                bias = torch.zeros(rows) if bias is None else bias
                bias[ours] += factor * read(piece, role)[theirs]
        if "diff" in piece.entries:
            diff = torch.zeros(rows, t.width) if diff is None else diff
            diff[ours] += piece.strength * read(piece, "diff")[theirs]
    if not downs and bias is None and diff is None:
        return None
    none = (torch.zeros(0, width), torch.zeros(rows, 0))
    return Change(torch.cat(downs) if downs else none[0], torch.cat(ups, 1) if ups else none[1], bias, diff)


def merge(net: nn.Module, changed: Mapping[str, Change]) -> None:
    """Write changes into a network's weights: products in float32, rounded once to the weights' dtype."""
    for path, change in changed.items():
        module = net.get_submodule(path)
        if isinstance(module, Fp8Linear):
            device = module.weight.device
            exact = module.weight.float() * module.scale[:, None].float() + change.matrix().to(device)
            module.take([(exact, None)], device)
        else:
            assert isinstance(module, nn.Linear)
            weight = module.weight
            added = weight.float() + change.matrix().to(weight.device)
            module.weight = nn.Parameter(_cast(added, weight.dtype), requires_grad=False)
        if change.bias is not None:
            own, weight = cast("Tensor | None", module.bias), module.weight
            if own is None:
                kept = torch.float32 if weight.dtype.itemsize == 1 else weight.dtype
                own = torch.zeros(len(weight), dtype=kept, device=weight.device)
            module.bias = nn.Parameter((own.float() + change.bias.to(own.device)).to(own.dtype), requires_grad=False)


def adapt(net: N, changed: Mapping[str, Change], *, dtype: torch.dtype, device: torch.device | str) -> N:
    """A network that shares all weights with `net`, whose changed linears add what adapters say."""
    new = {path: AdaptedLinear(net.get_submodule(path), c, dtype=dtype, device=device) for path, c in changed.items()}
    return graft(net, new)


def graft(net: N, modules: Mapping[str, nn.Module]) -> N:
    """A network that shares all modules with `net` but those at these paths, which are given; `net` stays as it is."""
    top = _shallow(net)
    copies: dict[str, nn.Module] = {"": top}
    for path, module in modules.items():
        owner, _, leaf = path.rpartition(".")
        at = ""
        for step in owner.split(".") if owner else ():
            here = f"{at}.{step}" if at else step
            if here not in copies:
                copies[here] = _shallow(copies[at].get_submodule(step))
                copies[at]._modules[step] = copies[here]
            at = here
        copies[at]._modules[leaf] = module
    return top


M = TypeVar("M", bound=nn.Module)


def _shallow(module: M) -> M:
    new = copy.copy(module)
    new.__dict__["_modules"] = dict(module._modules)
    return new


def key_of(loras: Sequence[Lora]) -> tuple[tuple[str, float], ...]:
    """What tells adapters apart: contents and strengths, in order."""
    return tuple((read_adapter(lora.path, lora.sha256)[1], lora.strength) for lora in loras)


def mark_of(loras: Sequence[Lora]) -> str:
    """What is added to a model's version, so that results with and without adapters are never mixed up."""
    return "".join(f"+lora-{sha[:12]}x{strength:g}" for sha, strength in key_of(loras))


def as_loras(given: object) -> tuple[Lora, ...]:
    """Adapters as `load` takes them: one or several, as paths or `Lora`.

    Raises:
        PlanError: something else was given.
    """
    items = given if isinstance(given, list | tuple) else () if given is None else (given,)
    out: list[Lora] = []
    for item in cast("Sequence[object]", items):
        if not isinstance(item, str | Path | Lora):
            raise PlanError(f"lora takes a path, a Lora(path, strength) or several, got {item!r}")
        out.append(item if isinstance(item, Lora) else Lora(str(item)))
    return tuple(out)
