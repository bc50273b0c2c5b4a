"""Which method first on which budget: one table (JSON) of the rows of `frontier`, and the page's section made of it."""

import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import mrflow as mf
from experiments.failures.questions import SPEEDS
from experiments.looks import looks
from mrflow.records.files import write_bytes
from mrflow.sweep import Comparison, ConfidenceInterval, Row, compare, family, interval, values
from mrflow.sweep.statistics import MIN_PROMPTS, group_rows
from mrflow.sweep.timing import speedup

METRIC = "legible"
BEGIN, END = "<!-- first: made by experiments.failures {} --page -->", "<!-- first: end -->"
Table = dict[str, Any]


def table_of(rows: Sequence[Row], reference: str, *, size: int, low: int, timed: bool = True) -> Table:
    """All that the section and the figure say, as plain data; not how fast rows were by the clock where not `timed`.

    At each speed, every method is held against the one that reads most there: sign-flip tests, corrected together over
    all speeds (Holm, 5 %). Differences from the reference are another such family.
    """
    chains = group_rows(rows, lambda r: r.chain)
    scores = {label: values(mine, METRIC) for label, mine in chains.items()}
    means = {label: interval(found, draws=4000, share=True) for label, found in scores.items() if found}
    at = {label: place(label) for label in means if label != reference}
    best = {s: max((la for la, (_, own) in at.items() if own == s), key=lambda la: means[la].mean) for s in SPEEDS if
            any(own == s for _, own in at.values())}  # fmt: skip
    lost, behind = dict[str, Comparison](), dict[str, Comparison]()
    for label, (_, speed) in at.items():
        with suppress(mf.PlanError):
            lost[label] = compare(chains[label], chains[reference], METRIC, draws=4000)
        if label != best[speed]:
            with suppress(mf.PlanError):
                behind[label] = compare(chains[label], chains[best[speed]], METRIC, draws=4000)
    lost, behind = family(lost), family(behind)
    entries: list[dict[str, Any]] = []
    for label, (method, speed) in at.items():
        one, other = lost.get(label), behind.get(label)
        entries.append(
            {
                "method": method,
                "speed": speed,
                "operations": round(_flops(chains[reference]) / _flops(chains[label]), 3),
                "measured": _ends(speedup(chains[reference], chains[label])) if timed else None,
                "forwards": next((r.nfe for r in chains[label] if r.done), 0),
                "reads": _ends(means[label]),
                "minus reference": _ends(one.difference) if one else None,
                "verdict": one.verdict if one else "",
                "behind the best": other.verdict if other else ("best" if label == best[speed] else ""),
            }
        )
    return {
        "weights": rows[0].weights,
        "size": size,
        "low": low,
        "captions": len({r.prompt for r in chains[reference]}),
        "draws": len({r.draw for r in chains[reference]}),
        "reference": {"label": reference, "reads": _ends(means[reference])},
        "entries": entries,
    }


def place(label: str) -> tuple[str, int]:
    """Method and speed of a label of `frontier`, such as "lift, 8x"."""
    method, _, speed = label.rpartition(", ")
    return method, int(speed.rstrip("x"))


def section(table: Table) -> list[str]:
    """The page's section: for each speed what to try first, and every method's numbers."""
    whole, captions = table["reference"], table["captions"]
    enough = captions >= MIN_PROMPTS
    lines = [
        f"Measured on {table['weights']}, {captions} held-out captions of the hard world, {table['draws']} draws of "
        f"each, {table['size']} px from {table['low']} px: the share of letters, faces, cells and textures read, "
        f"with 95 % intervals. {whole['label']} reads {_text(whole['reads'])}. Speeds are counted operations of "
        f"{whole['label']} over a method's; at each, a method's dearest setting that is within 0.95 and 1.25 of it.",
        "",
    ]
    if not enough:
        lines += [
            f"**A rehearsal**: {captions} captions are fewer than the {MIN_PROMPTS} that a verdict takes, so none is "
            "given; the numbers show that the machinery runs.",
            "",
        ]
    for speed in sorted({e["speed"] for e in table["entries"]}):
        mine = sorted((e for e in table["entries"] if e["speed"] == speed), key=lambda e: -e["reads"][0])
        if enough:
            first, rest = mine[0], mine[1:]
            alike = [e["method"] for e in rest if e["behind the best"] == "no difference shown"]
            worse = [e["method"] for e in rest if e["behind the best"] == "lower"]
            if first["reads"][1] <= 0.0:
                lines.append(f"- **{speed}x**: nothing is legible by any method.")
                continue
            lines.append(
                f"- **{speed}x**: try {first['method']} first, which reads {_text(first['reads'])}. Not told apart "
                f"from it: {', '.join(alike) or 'none'}. Below it: {', '.join(worse) or 'none'}."
            )
    timed = any(e["measured"] for e in table["entries"])
    titles = ["method", "speed", "by operations", *["by the clock [95 %]"] * timed, "forwards", "reads [95 %]"]
    titles.append("minus reference")
    lines += ["", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
    for e in sorted(table["entries"], key=lambda e: (e["speed"], -e["reads"][0])):
        clock = [_text(e["measured"], 1)] * timed
        cells = [e["method"], f"{e['speed']}x", f"{e['operations']:.1f}", *clock, str(e["forwards"])]
        cells += [_text(e["reads"]), _text(e["minus reference"], sign=True)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def write_table(table: Table, path: Path) -> None:
    """The table as JSON."""
    write_bytes(path, (json.dumps(table, indent=1) + "\n").encode())


def write_section(table: Table, page: Path, question: str = "frontier") -> None:
    """Put the section between the two marks of its question on a page.

    Raises:
        PlanError: the page has no such marks.
    """
    text = page.read_text(encoding="utf-8")
    mark = BEGIN.format(question)
    before, begin, rest = text.partition(mark)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise mf.PlanError(f"{page} has no section to fill: it must hold the lines {mark} and {END}")
    body = "\n".join(section(table))
    write_bytes(page, f"{before}{mark}\n\n{body}\n\n{END}{after}".encode())


def draw(table: Table, path: Path) -> None:
    """The figure: share read against speed, a line a method."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as plt

    plt.rcParams["svg.hashsalt"] = "mrflow"
    figure, axes = plt.subplots(figsize=(9, 6), layout="constrained")
    look = looks(e["method"] for e in table["entries"])
    for method, (colour, marker) in look.items():
        points = sorted((e["operations"], *e["reads"]) for e in table["entries"] if e["method"] == method)
        x, y = [p[0] for p in points], [p[1] for p in points]
        spread = [max(0.0, p[1] - p[2]) for p in points], [max(0.0, p[3] - p[1]) for p in points]
        axes.errorbar(x, y, spread, label=method, color=colour, marker=marker, markersize=5, elinewidth=0.6)
    axes.axhline(table["reference"]["reads"][0], color="#999999", linewidth=0.8, linestyle=":")
    axes.set(xscale="log", ylim=(-0.02, 1.04), xlabel="speed, by counted operations: faster is better →")
    axes.set_ylabel("share read: higher is better ↑ [95 %]")
    axes.set_xticks(SPEEDS, [f"{s}x" for s in SPEEDS])
    axes.minorticks_off()
    axes.grid(alpha=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1.0), frameon=False, fontsize=8)
    axes.set_title(
        f"{table['weights']}, {table['captions']} captions; dotted: {table['reference']['label']}", fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _flops(rows: Sequence[Row]) -> float:
    """Counted operations of a picture, the mean."""
    found = [r.flops for r in rows if r.done]
    return sum(found) / len(found)


def _ends(found: ConfidenceInterval | None) -> list[float | None] | None:
    """Mean, low and high, rounded; None for an end that is not known."""
    if found is None:
        return None
    return [None if math.isnan(v) else round(v, 4) for v in (found.mean, found.low, found.high)]


def _text(ends: Sequence[float | None] | None, digits: int = 2, *, sign: bool = False) -> str:
    if not ends:
        return ""
    mean, *rest = (None if v is None else f"{v:{'+' if sign else ''}.{digits}f}" for v in ends)
    return str(mean) + ("" if None in rest else f" [{rest[0]}, {rest[1]}]")
