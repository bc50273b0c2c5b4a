"""Does the stacked speed-up keep its quality on fine-tunes that its student and its settings have not seen?

Three fine-tunes of the embedded model (`experiments.train_pocket.finetune`: a dim style, new shapes, a new alphabet)
are drawn with the base model's student and the base model's settings, on the same held-out captions as the base model
itself, each read exactly in its own look. What is asked is the difference of differences: how much more of what native
sampling reads does a fast chain lose on a fine-tune than on the base? It goes on where it stopped.

    python -m experiments.transfer --model FILE --student STUDENT     # a LoRA a look from runs/transfer/MODEL
    python -m experiments.transfer --model FILE --captions 2          # a trial, of staged sampling alone
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import mrflow as mf
from experiments.asking import add_making, exit_code
from experiments.failures.details import DETAILS
from experiments.failures.questions import Setting
from experiments.studies.common import SIGNS
from mrflow.checkpoints.safetensors import read_header
from mrflow.model_info import ModelInfo, Shift
from mrflow.models import info
from mrflow.scenes.hard import HARD, HardWorld, held_out_hard_captions
from mrflow.scenes.looks import LOOKS
from mrflow.stage import AnyChain
from mrflow.sweep import (
    Comparison,
    Legible,
    Prompt,
    Row,
    Sweep,
    compare,
    compare_differences,
    family,
    interval,
    run_sweep,
    values,
)
from mrflow.sweep.control_rows import controls
from mrflow.sweep.statistics import MIN_PROMPTS, by_pair, differences, group_rows
from mrflow.sweep.summary import load_rows
from mrflow.sweep.timing import speedup

Chain = mf.Chain[mf.Start, mf.Pixels]
Rows = Mapping[str, Sequence[Row]]  # by model: "base" or the name of a look
NATIVE, STAGED, STACKED, BARE = "native", "staged", "student, staged", "without the fine-tune"
KEPT = 0.05  # a loss up to which quality is called kept


@dataclass(frozen=True)
class Category:
    """Captions of one kind and size of detail, and the number that says how much of it was read."""

    kind: str
    world: HardWorld
    metric: str


CATEGORIES = {
    "objects": Category("objects", HARD, "legible.binding"),
    "letters 13%": Category("sign", DETAILS["letters"].worlds["13%"], "legible.letters"),
    "letters 8%": Category("sign", DETAILS["letters"].worlds["8%"], "legible.letters"),
    "grid 4x4": Category("grid", DETAILS["grid"].worlds["4x4"], "legible.cells"),
}
CHANGED = {  # what each look draws otherwise
    "dusk": ("objects", "letters 13%", "letters 8%"),
    "shapes": ("objects", "grid 4x4"),
    "runes": ("letters 13%", "letters 8%"),
}


def prompts(count: int, names: Sequence[str]) -> list[Prompt]:
    """So many held-out captions of each category, tagged with its name."""
    found = {name: held_out_hard_captions(CATEGORIES[name].world, count, kind=CATEGORIES[name].kind) for name in names}
    return [Prompt(text, {"category": name}) for name, texts in found.items() for text in texts]


def chains(s: Setting, facts: ModelInfo, look: str, student: mf.students.Student | None) -> dict[str, Chain]:
    """Native sampling first, then the fast chains and the control rows, with the truth in a look."""
    out: dict[str, Chain] = {NATIVE: s.native(s.steps), STAGED: s.staged()}
    if student is not None:
        out["student"] = mf.recipes.few(student, size=s.whole)
        out[STACKED] = mf.recipes.stacked(student, low=s.small, size=s.whole)
    for label, chain in controls(facts, low=s.small, size=s.whole, staged=fast(out), beside=out).items():
        stages = [replace(stage, look=look) if isinstance(stage, mf.Truth) else stage for stage in chain]
        out[label] = cast(Chain, AnyChain(tuple(stages)))
    return out


def student_of(file: Path, shift: float | None = None) -> mf.students.Student:
    """A student as it was taught: the shift is what its file says, 2 where it says none.

    Raises:
        MrflowError: the file is not there or cannot be read.
    """
    factor = shift or float(read_header(file).metadata.get("shift", 2))
    return mf.students.Student(2, mf.Lora(str(file)), Shift.fixed(factor), mf.Distilled())


def fast(found: Mapping[str, Chain]) -> Chain:
    """The stacked speed-up: the student in the low stage where there is one, else staged sampling."""
    return found.get(STACKED, found[STAGED])


def losses(rows: Rows, label: str) -> dict[tuple[str, str], tuple[Comparison, Comparison, Comparison]]:
    """By look and category: a chain minus native on the base, on the fine-tune, and the second minus the first.

    The last two are tested, all of them together (Holm).
    """
    tested: dict[tuple[str, str, int], Comparison] = {}
    base: dict[tuple[str, str], Comparison] = {}
    for look in rows.keys() & CHANGED.keys():
        for name in CHANGED[look]:
            metric = CATEGORIES[name].metric
            parts = [{c: by_pair(_part(rows[m], c, name), metric) for c in (NATIVE, label)} for m in ("base", look)]
            lost = [differences(part[label], part[NATIVE]) for part in parts]
            if not (lost[0] and lost[1]):
                continue
            both = {
                text: [b - a for a, b in zip(lost[0][text], lost[1][text], strict=True)]
                for text in lost[1]
                if len(lost[0].get(text, ())) == len(lost[1][text])
            }
            base[look, name] = compare_differences(metric, lost[0], draws=4000)
            for i, each in enumerate((lost[1], both)):
                tested[look, name, i] = compare_differences(metric, each, draws=4000, share=None if i == 0 else False)
    tested = family(tested)
    return {key: (found, tested[*key, 0], tested[*key, 1]) for key, found in base.items()}


def verdict(read: float, bare: float, tuned: Comparison, more: Comparison) -> str:
    """What a row of the table says, in words."""
    if read < 0.5 or read - bare < 0.2:
        return f"nothing: native sampling reads {read:.2f} of it ({bare:.2f} {BARE})"
    if more.verdict == "too few prompts":
        return f"no verdict from fewer than {MIN_PROMPTS} captions"
    if more.verdict == "lower":
        return f"does not transfer: {-more.difference.mean:.2f} more is lost than on the base"
    if more.difference.low >= -KEPT:
        kept = "and is kept" if tuned.difference.low >= -KEPT else "with the loss that the base has"
        return f"transfers ({kept})"
    return f"not shown either way: up to {max(0.0, -more.difference.low):.2f} more may be lost"


def table(rows: Rows, label: str) -> list[str]:
    """The answer: a line a look and category, and its verdict."""
    found = losses(rows, label)
    tests = next((two.family for _, two, _ in found.values()), 0)
    lines = [
        f"`{label}` minus native sampling, share read [95 %], paired by caption. {SIGNS['higher'].strip()} "
        f"{SIGNS['lower'].strip()}: sign-flip tests, {tests} in this table, corrected together (Holm, 5 %).",
        "",
        f"| fine-tune | detail | native reads | {BARE} | on the base | on the fine-tune | more | verdict |",
        "|---" * 8 + "|",
    ]
    for (look, name), (base, tuned, more) in sorted(found.items(), key=lambda item: list(CHANGED).index(item[0][0])):
        read, bare = (_mean(rows[which], chain, name) for which, chain in ((look, NATIVE), (f"{look}, base", STAGED)))
        cells = [f"{c.difference:+.2f}" for c in (base, tuned, more)]
        cells = [cells[0], *(f"{text}{SIGNS[c.verdict]}" for text, c in zip(cells[1:], (tuned, more), strict=True))]
        said = verdict(read, bare, tuned, more)
        lines.append(f"| {look} | {name} | {read:.2f} | {bare:.2f} | {' | '.join(cells)} | {said} |")
    return lines


def every_row(rows: Rows) -> list[str]:
    """For each model a table of all its chains: the share read, beside native sampling's; one family a model."""
    lines = list[str]()
    for model, mine in rows.items():
        by_chain = group_rows(mine, lambda r: r.chain)
        names = [name for name in CATEGORIES if any(r.tags["category"] == name for r in mine)]
        tests: dict[tuple[str, str], Comparison] = {}
        for label in by_chain:
            for name in names:
                if label != NATIVE and NATIVE in by_chain and not any(r.rendered for r in by_chain[label]):
                    parts = (_part(mine, label, name), _part(mine, NATIVE, name))
                    with suppress(mf.PlanError):
                        tests[label, name] = compare(*parts, CATEGORIES[name].metric, draws=4000)
        tests = family(tests)
        count = next((c.family for c in tests.values()), 0)
        lines += [
            f"**{model}** (`{mine[0].weights}`): share read [95 %]; arrows beside {NATIVE}, {count} tests (Holm, 5 %); "
            f"†: fewer than {MIN_PROMPTS} captions.",
            "",
            f"| method | speed-up | {' | '.join(names)} |",
            "|---" * (2 + len(names)) + "|",
        ]
        for label, each in by_chain.items():
            timed = NATIVE in by_chain and not any(r.rendered for r in each)
            quick = speedup(by_chain[NATIVE], each) if timed else None
            cells = [label, "" if quick is None else f"{quick.mean:.1f}"]
            for name in names:
                scores = values(_part(mine, label, name), CATEGORIES[name].metric)
                sign = SIGNS[tests[label, name].verdict] if (label, name) in tests else ""
                i = interval(scores, draws=4000, share=True) if scores else None
                cells.append("" if i is None else f"{i:.2f}{sign}")
            lines.append(f"| {' | '.join(cells)} |")
        lines.append("")
    return lines


def _part(rows: Sequence[Row], chain: str, name: str) -> list[Row]:
    return [r for r in rows if r.chain == chain and r.tags["category"] == name]


def _mean(rows: Sequence[Row], chain: str, name: str) -> float:
    scores = values(_part(rows, chain, name), CATEGORIES[name].metric)
    return interval(scores, draws=1).mean if scores else float("nan")


def main() -> int:
    """Run and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="a file of pocket's weights that knows the hard world"
    )
    parser.add_argument("--student", type=Path, help="its few-step student (default: none, staged sampling is asked)")
    parser.add_argument("--shift", type=float, help="of the student's noise levels (default: as its file says, or 2)")
    parser.add_argument("--loras", type=Path, help="folder of LOOK-lora.safetensors (default: runs/transfer/MODEL)")
    parser.add_argument("--looks", nargs="+", choices=LOOKS, default=list(LOOKS))
    parser.add_argument("--captions", type=int, default=20, help="of each category (default: 20)")
    add_making(parser)
    parser.add_argument("--out", type=Path, help="the folder of the rows (default: beside the LoRAs)")
    args = parser.parse_args()
    return exit_code(run, args)


def run(args: argparse.Namespace) -> None:
    """Make the rows that are missing, and print what all of them say.

    Raises:
        MrflowError: a file is not there or a size does not fit; before anything is drawn.
    """
    folder: Path = args.loras or Path("runs") / "transfer" / args.model.stem
    loras = {look: folder / f"{look}-lora.safetensors" for look in args.looks}
    if missing := [look for look, path in loras.items() if not path.is_file()]:
        raise mf.PlanError(
            f"{loras[missing[0]]} is not there; make it with python -m experiments.train_pocket.finetune {missing[0]} "
            f"--model {args.model}"
        )
    facts = info(str(args.model))
    size = args.size or facts.size[0]
    setting = Setting(size // 2, size, args.steps, args.few)
    student = None
    if args.student is not None:
        student = student_of(args.student, args.shift)
    sweeps = {"base": Sweep(chains(setting, facts, "", student), _wanted(args, list(CATEGORIES)), metrics=[Legible()])}
    for look in args.looks:
        wanted = _wanted(args, CHANGED[look])
        sweeps[look] = Sweep(chains(setting, facts, look, student), wanted, metrics=[Legible(look)])
        sweeps[f"{look}, base"] = Sweep({STAGED: setting.staged()}, wanted, metrics=[Legible(look)])
    for sweep in sweeps.values():
        sweep.plans(facts)
    rows = {name: _drawn(sweep, name, loras.get(name), args, folder) for name, sweep in sweeps.items()}
    label = STACKED if student is not None else STAGED
    print(f"{rows['base'][0].weights}, {args.captions} captions a category, {size} px from {setting.low} px\n")
    print("\n".join([*table(rows, label), ""]))
    print("\n".join(every_row(rows)))


def _wanted(args: argparse.Namespace, names: Sequence[str]) -> list[Prompt]:
    return prompts(args.captions, names)


def _drawn(sweep: Sweep, name: str, lora: Path | None, args: argparse.Namespace, folder: Path) -> list[Row]:
    place = (args.out or folder) / f"rows-{name.replace(', ', '-')}"
    model = mf.load(str(args.model), device=args.device, lora=None if lora is None else str(lora))
    done = run_sweep(replace(sweep, model=str(args.model)), model, place, batch=args.batch)
    if done.failed:
        print(f"{done.failed} rows of {name} failed; {place} says why", file=sys.stderr)
    texts = {prompt.text for prompt in sweep.prompts}
    return [r for r in load_rows(place)[0] if r.chain in sweep.chains and r.prompt in texts and r.draw in sweep.seeds]


if __name__ == "__main__":
    sys.exit(main())
