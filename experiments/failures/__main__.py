"""Where does staged sampling fail: at which size of letters, faces, grids and textures, and why?

Each question is a sweep over held-out captions of the hard world, tagged by size of detail; it goes on where it stopped
(runs/failures/MODEL/QUESTION), and its tables are printed as Markdown.

    python -m experiments.failures map --model runs/pocket-4/pocket-4.safetensors --figure
    python -m experiments.failures budget --model FILE --details letters
    python -m experiments.failures mends --model FILE        # the cheapest chain that keeps what native sampling reads
    python -m experiments.failures frontier --model FILE --figure FILE.svg --page docs/how-to/rivals.md
                                             # every method at equal planned cost, and which to try first (make figure)
    python -m experiments.failures slots --model FILE         # the same of solvers, guidance and schedules

`map`: native, staged, rivals, and staged sampling's own settings. `budget`: the truth is put in at each stage in turn,
and each difference is what one stage loses. Captions and reader are those of the embedded model's world; for large
models see `experiments.legibility`.
"""

import argparse
import sys
from pathlib import Path

import mrflow as mf
from experiments.asking import add_making, exit_code
from experiments.failures import first, tables
from experiments.failures.details import DETAILS, prompts
from experiments.failures.questions import FITTED, QUESTIONS, Setting, fitted
from mrflow.models import info
from mrflow.models.pocket.model import SHIPPED
from mrflow.scenes.hard import HARD, held_out_hard_captions
from mrflow.sweep import Legible, Sweep, run_sweep
from mrflow.sweep.local import Progress
from mrflow.sweep.report import write_report
from mrflow.sweep.summary import load_rows


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--model", default="pocket", help="an embedded model, or a file of such weights")
    parser.add_argument("--captions", type=int, default=20, help="of each size of detail (default: 20)")
    parser.add_argument("--details", nargs="+", choices=DETAILS, help="(default: all)")
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help="of detail, such as 8%% or 1/32 (default: all)")
    parser.add_argument("--methods", nargs="+", metavar="LABEL", help="only these, and the reference (default: all)")
    add_making(parser)
    parser.add_argument("--low", type=int, help="side of the low stage (default: half)")
    parser.add_argument("--out", type=Path, help="the folder (default: runs/failures/MODEL/QUESTION)")
    parser.add_argument("--figure", type=Path, help="of `map`, `frontier` and `slots`: an SVG file")
    parser.add_argument("--page", type=Path, help="of `frontier` and `slots`: the page that says what to try first")
    args = parser.parse_args()
    return exit_code(run, args)


def run(args: argparse.Namespace) -> None:
    """Make the rows that are missing, and print what all of them say.

    Raises:
        MrflowError: the model is not there, a size does not fit it, or no detail has it; before anything is drawn.
    """
    facts = info(args.model)
    size = args.size or facts.size[0]
    taught = args.model in ("pocket", *SHIPPED)
    setting = Setting(args.low or size // 2, size, args.steps, args.few, taught)
    chains = QUESTIONS[args.question](setting, facts)
    reference = next(iter(chains))
    folder = args.out or Path("runs") / "failures" / Path(args.model).stem / args.question
    model = mf.load(args.model, device=args.device)
    more = FITTED.get(args.question, ())
    if unknown := set(args.methods or ()) - set(chains) - set(more):
        known = ", ".join((*chains, *more))
        raise mf.PlanError(f"no method is called {', '.join(sorted(unknown))}; there are {known}")
    if wanted := [label for label in more if not args.methods or label in args.methods]:
        beside = folder.with_name(f"{folder.name}-fitted.json")  # a sweep's folder is its own
        beside.parent.mkdir(parents=True, exist_ok=True)
        chains |= fitted(setting, model, held_out_hard_captions(HARD, 4, seed=1), beside, wanted)
    if args.methods:
        chains = {label: chain for label, chain in chains.items() if label in {reference, *args.methods}}
    asked = prompts(args.captions, args.details, args.sizes)
    few = len({p.tags["size"] for p in asked}) == len({p.tags["detail"] for p in asked})
    if args.figure is not None and args.question not in FITTED and few:
        raise mf.PlanError("a figure needs two sizes of a detail at least; give more --sizes, or none")
    sweep = Sweep(chains, asked, metrics=[Legible()], model=args.model)
    sweep.plans(facts)

    def show(at: Progress) -> None:
        if at.done % 100 == 0 or at.done == at.total:
            print(f"{at.done} of {at.total} rows", file=sys.stderr, flush=True)

    done = run_sweep(sweep, model, folder, batch=args.batch, on_progress=show)
    if done.failed:
        print(f"{done.failed} rows failed; the report says why", file=sys.stderr)
    rows, _ = load_rows(folder)
    texts = {prompt.text for prompt in sweep.prompts}
    rows = [r for r in rows if r.chain in sweep.chains and r.prompt in texts and r.draw in sweep.seeds]
    write_report(folder, folder / "report.html", title=f"failures: {args.question}")
    print(f"{rows[0].weights}, {args.captions} captions a size, {size} px from {setting.low} px\n")
    if args.question == "budget":
        print("\n".join(tables.budget(rows)))
        return
    print("\n".join([*tables.half_legible(rows, size=size, low=setting.low, reference=reference), ""]))
    print("\n".join([*tables.by_size(rows, reference), ""]))
    if args.question in ("mends", *FITTED):
        print("\n".join(tables.cheapest(rows, reference)))
    if args.question in FITTED:
        timed = args.question == "frontier"  # a slot changes what is made of forwards, not how long they take
        table = first.table_of(rows, reference, size=size, low=setting.low, timed=timed)
        first.write_table(table, folder.with_name(f"{folder.name}.json"))
        print("\n".join(["", *first.section(table)]))
        if args.figure is not None:
            first.draw(table, args.figure)
        if args.page is not None:
            first.write_section(table, args.page, args.question)
    elif args.figure is not None:
        from experiments.failures.figure import draw

        draw(rows, args.figure, size=size, low=setting.low)


if __name__ == "__main__":
    sys.exit(main())
