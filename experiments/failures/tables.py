"""What rows say: the size at which half is legible, legibility by size, the budget of losses, the cheapest mend."""

from collections.abc import Mapping, Sequence
from contextlib import suppress

import mrflow as mf
from experiments.failures.crossing import Crossing, Curve, crossing
from experiments.failures.details import DETAILS, Detail
from experiments.failures.questions import LOSSES
from experiments.studies.common import SIGNS
from mrflow.sweep import Comparison, Row, compare, family, interval, values
from mrflow.sweep.statistics import MIN_PROMPTS, group_rows
from mrflow.sweep.timing import speedup

CELL = 8  # pixels of a latent cell


def curve(rows: Sequence[Row], detail: Detail) -> Curve:
    """A method's scores of one kind of detail, by size and caption."""
    found: dict[float, Mapping[str, list[float]]] = {}
    for name, size in detail.sizes.items():
        scores = values([r for r in rows if r.tags.get("size") == name], detail.metric)
        if scores:
            found[size] = scores
    return found


def crossings(rows: Sequence[Row]) -> dict[str, dict[str, Crossing]]:
    """By method and kind of detail: the size at which half is legible."""
    out: dict[str, dict[str, Crossing]] = {}
    for label, mine in group_rows(rows, lambda r: r.chain).items():
        curves = {name: curve(mine, detail) for name, detail in DETAILS.items()}
        out[label] = {name: crossing(each) for name, each in curves.items() if len(each) > 1}
    return out


def half_legible(rows: Sequence[Row], *, size: int, low: int, reference: str) -> list[str]:
    """A line a method: the size at which half is legible, in per cent of the side, pixels and low-stage cells."""
    chains, found = group_rows(rows, lambda r: r.chain), crossings(rows)
    kinds = [name for name in DETAILS if any(name in each for each in found.values())]
    if not kinds:
        return ["No size at which half is legible can be said: each detail was asked at one size alone."]
    asked = {name: [size for each, size in DETAILS[name].sizes.items() if _part(rows, name, each)] for name in kinds}
    lines = [
        f"Half legible from this size on, in % of the side [95 %]; 1 % is {size / 100:g} px here and "
        f"{low / 100 / CELL:.2f} latent cells of the low stage.",
        "",
        f"| method | speed-up | {' | '.join(kinds)} |",
        "|---" * (2 + len(kinds)) + "|",
    ]
    for label, each in found.items():
        mine = chains[label]
        fast = None if any(r.rendered for r in mine) else speedup(chains[reference], mine)
        cells = [label, "" if fast is None else f"{fast.mean:.1f}"]
        for name in kinds:
            cells.append(each[name].text(100, 1, (min(asked[name]), max(asked[name]))) if name in each else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def by_size(rows: Sequence[Row], reference: str) -> list[str]:
    """A line a method, a column a size of detail: the share that was read, and whether it differs from the reference.

    All arrows are one family of sign-flip tests (Holm); rows that begin with the truth have none.
    """
    chains = group_rows(rows, lambda r: r.chain)
    columns = [
        (name, size)
        for name, detail in DETAILS.items()
        for size in detail.sizes
        if any(r.tags.get("detail") == name and r.tags.get("size") == size for r in rows)
    ]
    found: dict[tuple[str, str, str], Comparison] = {}
    for label, mine in chains.items():
        if label == reference or any(r.rendered for r in mine):
            continue
        for name, size in columns:
            with suppress(mf.PlanError):
                parts = (_part(mine, name, size), _part(chains[reference], name, size))
                found[label, name, size] = compare(*parts, DETAILS[name].metric, draws=4000)
    found = family(found)
    tests = next((c.family for c in found.values()), 0)
    lines = [
        f"Share read, [95 %]; ▲ ▼ beside {reference}: sign-flip tests, {tests} in this table, corrected together "
        f"(Holm, 5 %); †: fewer than {MIN_PROMPTS} captions, no verdict.",
        "",
        f"| method | {' | '.join(f'{name} {size}' for name, size in columns)} |",
        "|---" * (1 + len(columns)) + "|",
    ]
    for label, mine in chains.items():
        cells = [label]
        for name, size in columns:
            scores = values(_part(mine, name, size), DETAILS[name].metric)
            one = found.get((label, name, size))
            if not scores:
                cells.append("")
                continue
            i = interval(scores, draws=4000, share=True)
            cells.append(f"{i:.2f}{SIGNS[one.verdict] if one else ''}")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def budget(rows: Sequence[Row]) -> list[str]:
    """What each stage loses, by kind and size of detail: paired differences, which add up to the whole loss."""
    chains = group_rows(rows, lambda r: r.chain)
    sizes = [(n, s) for n, d in DETAILS.items() for s in d.sizes if _part(rows, n, s)]
    names = [name for name, pair in LOSSES.items() if all(label in chains for label in pair)]
    found: dict[tuple[str, str, str], Comparison] = {}
    for name, size in sizes:
        for loss in names:
            better, worse = (_part(chains[label], name, size) for label in LOSSES[loss])
            with suppress(mf.PlanError):
                found[name, size, loss] = compare(better, worse, DETAILS[name].metric, draws=4000)
    found = family(found)
    lines = [
        "Share of the detail that each part loses [95 %]; the parts add up to 1 minus what staged sampling reads. "
        "▲: lost, ▼: won back, by sign-flip tests of the whole table (Holm, 5 %).",
        "",
        f"| detail | staged reads | {' | '.join(names)} |",
        "|---" * (2 + len(names)) + "|",
    ]
    for name, size in sizes:
        scores = values(_part(chains["staged"], name, size), DETAILS[name].metric)
        cells = [f"{name} {size}", f"{interval(scores, draws=1).mean:.2f}"]
        for loss in names:
            one = found.get((name, size, loss))
            d = one.difference if one else None
            cells.append(f"{d:+.2f}{SIGNS[one.verdict]}" if one and d else "")
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def cheapest(rows: Sequence[Row], reference: str, *, keep: float = 0.95) -> list[str]:
    """For each size of detail that the reference reads at least half of: the fastest method that keeps so much of it.

    Kept is said where the whole interval of the paired difference lies above -(1 - keep) of the reference's score. With
    fewer than 72 captions of a size, no method can be shown to keep 95 %.
    """
    chains = group_rows(rows, lambda r: r.chain)
    lines = [
        f"The fastest that keeps {keep:.0%} of what {reference} reads, its 95 % interval included.",
        "",
        f"| detail | {reference} reads | fastest | speed-up | reads |",
        "|---|---|---|---|---|",
    ]
    for name, detail in DETAILS.items():
        for size in detail.sizes:
            base = values(_part(chains[reference], name, size), detail.metric)
            if not base or (whole := interval(base, draws=1).mean) < 0.5:
                continue
            best: tuple[float, str, float] | None = None
            for label, mine in chains.items():
                fast = speedup(chains[reference], mine)
                if fast is None or any(r.rendered for r in mine):
                    continue
                part = _part(mine, name, size)
                with suppress(mf.PlanError):
                    d = compare(part, _part(chains[reference], name, size), detail.metric, draws=4000).difference
                    if d.low >= -(1 - keep) * whole and (best is None or fast.mean > best[0]):
                        best = fast.mean, label, interval(values(part, detail.metric), draws=1).mean
            told = f"{best[1]} | {best[0]:.1f} | {best[2]:.2f}" if best else "none | |"
            lines.append(f"| {name} {size} | {whole:.2f} | {told} |")
    return lines


def _part(rows: Sequence[Row], detail: str, size: str) -> list[Row]:
    return [r for r in rows if r.tags.get("detail") == detail and r.tags.get("size") == size]
