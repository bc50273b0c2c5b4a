"""Runs a study: its sweep (which goes on where it stopped), its page and plot, and its table on stdout.

    python -m experiments.studies trade_off

The folder is runs/studies/NAME; the plot goes to docs/images/studies with --figure.
"""

import argparse
import sys
import time
from importlib import import_module
from pathlib import Path

import mrflow as mf
from mrflow.sweep import Row, Sweep, compare, interval, run_sweep, values
from mrflow.sweep.local import Progress
from mrflow.sweep.report import load, speedup, summarise, write_plots, write_report
from mrflow.sweep.statistics import grouped

NAMES = ("trade_off", "sigma", "solvers", "ladders", "guidance", "nested_noise", "failures", "rivals")
SIGNS = {"higher": " ▲", "lower": " ▼", "no difference shown": ""}


def main() -> None:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--figure", action="store_true", help="also docs/images/studies/NAME.svg")
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--by", help="a tag to split by, instead of the scorer's categories")
    args = parser.parse_args()
    study = import_module(f"experiments.studies.{args.name}")
    sweep: Sweep = study.sweep
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
    rows, reference = load(folder)
    texts = {prompt.text for prompt in sweep.prompts}
    rows = [r for r in rows if r.chain in sweep.chains and r.prompt in texts and r.draw in sweep.seeds]
    write_report(folder, folder / "report.html", title=args.name.replace("_", " "))
    if args.figure:
        place = Path("docs") / "images" / "studies"
        place.mkdir(parents=True, exist_ok=True)
        if hasattr(study, "draw"):  # a study with a figure of its own
            study.draw(rows, reference, place / f"{args.name}.svg")
        for path in () if hasattr(study, "draw") else write_plots(summarise(rows, reference), place / args.name):
            if path.suffix == ".png" or path.stem != args.name:
                path.unlink()
    print("\n".join(table(rows, sweep.reference, by=args.by)))


def table(rows: list[Row], reference: str, *, by: str | None = None) -> list[str]:
    """Markdown: speed, the score with its interval, the paired difference, then the score by category."""
    chains = grouped(rows, lambda r: r.chain)
    base = chains[reference]
    names = sorted({m for r in rows for m in r.metrics if m.startswith("score.")})
    extra = [m for m in ("psnr", "ssim") if any(m in r.metrics for r in rows)]
    groups = sorted({r.tags[by] for r in rows if by in r.tags}) if by else []
    shares = [m for m in ("stray",) if any(m in r.metrics for r in rows)]
    heads = [*(groups or [n.removeprefix("score.") for n in names]), *(f"{m} %" for m in shares)]
    lines = [
        f"{len({r.prompt for r in base})} captions, {len({r.draw for r in base})} draws a caption; {rows[0].weights}",
        "",
    ]
    lines.append(
        "| method | speed-up | forwards | score [95 %] | minus reference [95 %] | " + " | ".join(heads + extra) + " |"
    )
    lines.append("|---" * (5 + len(heads) + len(extra)) + "|")
    for label, mine in chains.items():
        fast, good = speedup(base, mine, draws=4000), interval(values(mine, "score"), draws=4000)
        cells = [label, f"{fast.mean:.1f}" if fast else "", str(next((r.nfe for r in mine if r.done), "")), str(good)]
        if label == reference:
            cells.append("")
        else:
            found = compare(mine, base, "score", draws=4000)
            d = found.difference
            cells.append(f"{d.mean:+.3f} [{d.low:+.3f}, {d.high:+.3f}]{SIGNS[found.verdict]}")
        for name in names if not groups else []:
            cells.append(_cell(mine, base, name, same=label == reference))
        for group in groups:
            part, other = ([r for r in rs if r.tags.get(by or "") == group] for rs in (mine, base))
            cells.append(_cell(part, other, "score", same=label == reference))
        cells += [_cell(mine, base, name, same=label == reference, digits=3) for name in shares]
        for name in extra:
            found_values = values(mine, name)
            cells.append(str(interval(found_values, draws=4000)) if found_values and label != reference else "")
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _cell(mine: list[Row], base: list[Row], metric: str, *, same: bool, digits: int = 2) -> str:
    found = values(mine, metric)
    if not found:
        return ""
    mean = interval(found, draws=100).mean
    return f"{mean:.{digits}f}" + ("" if same else SIGNS[compare(mine, base, metric, draws=4000).verdict])


if __name__ == "__main__":
    main()
