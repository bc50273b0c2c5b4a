"""Runs a study: its sweep (which goes on where it stopped), its page and plot, and its table on stdout.

    python -m experiments.studies trade_off

The folder is runs/studies/NAME; the plot goes to docs/images/studies with --figure.
"""

import argparse
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import mrflow as mf
from experiments.studies.common import LOW, SCORE, SIGNS, SIZE
from mrflow.models import info
from mrflow.sweep import (
    Comparison,
    Row,
    Sweep,
    compare,
    controls,
    family,
    interval,
    run_sweep,
    values,
)
from mrflow.sweep.local import Progress
from mrflow.sweep.plots import write_plots
from mrflow.sweep.report import write_report
from mrflow.sweep.statistics import MIN_PROMPTS, group_rows
from mrflow.sweep.summary import load_rows, summarise
from mrflow.sweep.timing import speedup

NAMES = ("trade_off", "sigma", "solvers", "ladders", "guidance", "caches", "nested_noise", "failures", "students")


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--figure", action="store_true", help="also docs/images/studies/NAME.svg")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--by", help="a tag to split by, instead of the scorer's categories")
    args = parser.parse_args()
    study = import_module(f"experiments.studies.{args.name}")
    sweep = with_controls(study.sweep, LOW, SIZE)
    tags = sorted({tag for prompt in sweep.prompts for tag in prompt.tags})
    if args.by is not None and args.by not in tags:
        parser.error(f"no caption has the tag {args.by!r}; there are {', '.join(tags)}")
    folder = Path("runs") / "studies" / args.name

    def show(at: Progress) -> None:
        if at.done % 100 == 0 or at.done == at.total:
            print(f"{at.done} of {at.total} rows", file=sys.stderr)

    began = time.monotonic()
    done = run_sweep(sweep, mf.load(sweep.model, device="cpu"), folder, batch=args.batch, on_progress=show)
    print(f"{done.made} rows made in {time.monotonic() - began:.0f} s, {done.failed} failed", file=sys.stderr)
    rows, reference = load_rows(folder)
    texts = {prompt.text for prompt in sweep.prompts}
    rows = [r for r in rows if r.chain in sweep.chains and r.prompt in texts and r.draw in sweep.seeds]
    write_report(folder, folder / "report.html", title=args.name.replace("_", " "))
    if args.figure:
        place = Path("docs") / "images" / "studies"
        place.mkdir(parents=True, exist_ok=True)
        if hasattr(study, "draw"):  # a study with a figure of its own
            study.draw([r for r in rows if r.chain in study.sweep.chains], reference, place / f"{args.name}.svg")
        for path in () if hasattr(study, "draw") else write_plots(summarise(rows, reference), place / args.name):
            if path.suffix == ".png" or path.stem != args.name:
                path.unlink()
    print("\n".join(table(rows, sweep.reference, by=args.by)))


def with_controls(sweep: Sweep, low: tuple[int, int], size: tuple[int, int]) -> Sweep:
    """The sweep of a study with the control rows that every table has beside its methods."""
    more = controls(info(sweep.model), low=low, size=size, beside=sweep.chains)
    return replace(sweep, chains={**sweep.chains, **more})


def table(rows: list[Row], reference: str, *, by: str | None = None) -> list[str]:
    """Markdown: speed, the score with its interval, the paired difference, then the score by category.

    All arrows of a table are one family of tests; rows that begin with the truth have none, and no speed.
    """
    chains = group_rows(rows, lambda r: r.chain)
    base = chains[reference]
    yardsticks = {label for label, mine in chains.items() if any(r.rendered for r in mine)}
    apart = {reference, *yardsticks}
    names = [] if by else sorted({m for r in rows for m in r.metrics if m.startswith(f"{SCORE}.")})
    groups = sorted({r.tags[by] for r in rows if by in r.tags}) if by else []
    extra = [m for m in ("psnr", "ssim") if any(m in r.metrics for r in rows)]
    columns: list[tuple[str, str | None]] = [(n, None) for n in names] + [(SCORE, g) for g in groups]
    heads = groups or [n.removeprefix(f"{SCORE}.") for n in names]
    found = _family({label: mine for label, mine in chains.items() if label not in apart}, base, by, columns)
    tests = next((c.family for c in found.values()), 0)
    counts = f"{len({r.prompt for r in base})} captions, {len({r.draw for r in base})} draws of each"
    lines = [
        f"{counts}; {rows[0].weights}",
        f"▲ ▼: sign-flip tests, {tests} in this table, corrected together (Holm, 5 %); "
        f"†: fewer than {MIN_PROMPTS} captions, no verdict",
        "",
    ]
    lines.append(
        "| method | speed-up [95 %] | forwards | legible [95 %] | minus reference [95 %] | "
        + " | ".join(heads + extra)
        + " |"
    )
    lines.append("|---" * (5 + len(heads) + len(extra)) + "|")
    for label, mine in chains.items():
        fast = None if label in yardsticks else speedup(base, mine)
        good = interval(values(mine, SCORE), draws=4000, share=True)
        cells = [
            label,
            "1" if label == reference else "" if fast is None else f"{fast:.1f}",
            str(next((r.nfe for r in mine if r.done), "")),
            str(good),
        ]
        cells.append("")
        if whole := found.get((label, SCORE, None)):
            d = whole.difference
            cells[-1] = f"{d:+.3f}{SIGNS[whole.verdict]}"
        for metric, group in columns:
            part = values(_part(mine, by, group), metric)
            one = found.get((label, metric, group))
            mean = f"{interval(part, draws=1).mean:.2f}" if part else ""
            cells.append(mean + (SIGNS[one.verdict] if one and part else ""))
        for name in extra:
            part = values(mine, name)
            cells.append(str(interval(part, draws=4000)) if part and label != reference else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _family(
    chains: Mapping[str, list[Row]], base: list[Row], by: str | None, columns: list[tuple[str, str | None]]
) -> dict[tuple[str, str, str | None], Comparison]:
    """Every chain against the reference in every column, judged together."""
    out: dict[tuple[str, str, str | None], Comparison] = {}
    for label, mine in chains.items():
        for metric, group in [(SCORE, None), *columns]:
            with suppress(mf.PlanError):  # nothing in common
                out[label, metric, group] = compare(_part(mine, by, group), _part(base, by, group), metric, draws=4000)
    return family(out)


def _part(rows: list[Row], by: str | None, group: str | None) -> list[Row]:
    return rows if by is None or group is None else [r for r in rows if r.tags.get(by) == group]


if __name__ == "__main__":
    main()
