"""All that is asked of an embedded model of the hard world, one piece after another, from one command.

Scores, the failure map, the error budget, the mends, the frontier, three fine-tunes and the transfer to them. Each is a
command that goes on where it stopped; what it prints is kept in runs/evidence/MODEL/PIECE.md. Before it begins, each
says how long it should take on two idle cores (from single measurements; a busy machine takes longer).

    python -m experiments.evidence --model FILE --student STUDENT    # or `make evidence MODEL=FILE STUDENT=STUDENT`
    python -m experiments.evidence --model FILE --plan               # the commands and their times, nothing is run
    python -m experiments.evidence --model FILE --trial --out DIR    # one caption, few steps: does everything run?
"""

import argparse
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from experiments.failures.questions import SIGMAS, TRUTHS
from mrflow.errors import MrflowError
from mrflow.models import info
from mrflow.records.pictures import write_bytes
from mrflow.scenes.looks import LOOKS

LEAST = 20  # captions of a category, below which there are no verdicts
SETTINGS = (
    *(f"sigma {sigma:g}" for sigma in SIGMAS),
    *("2 refining steps", "4 refining steps", "Lanczos", "latents enlarged", "lift", "SelfLift", "SPEED", "RALU"),
)
TAUGHT = dict.fromkeys(LOOKS, 600) | {"runes": 2400}  # steps; an alphabet takes longer than a light or outlines
PATHS = ("truth", "autoencoder", "staged path", "mean", "other")


@dataclass(frozen=True)
class Piece:
    """A command, how many captions of each category it asks for, and its seconds: some at once, some a caption.

    The seconds are of two idle cores at 256 px; one core at 128 px takes about as long.
    """

    name: str
    command: tuple[str, ...]
    captions: int = 0
    each: float = 0.0
    fixed: float = 10.0

    @property
    def seconds(self) -> float:
        """What it should take."""
        return self.fixed + self.each * self.captions


def pieces(
    model: Path, folder: Path, *, captions: int, student: Path | None, trial: bool, ocr: str | None = None
) -> list[Piece]:
    """All pieces, in order, with so many captions of each category; mends have one size, with four times as many."""
    few = ("--steps", "2", "--few", "2") if trial else ()
    one = ("--details", "letters", "--sizes", "13%", "8%") if trial else ()
    many = captions if trial else 4 * captions
    native, staged = ("2", "1") if trial else ("24", "12")
    doses = ("--doses", "letters 8%") if trial else ()
    rows = (*PATHS, "one forward", f"native {native}", f"staged {staged} + 1")

    def failures(question: str, name: str, count: int, each: float, *more: str) -> Piece:
        words = ("experiments.failures", question, "--model", str(model), "--captions", str(count), *few, *more)
        return Piece(name, (*words, "--out", str(folder / name)), count, each)

    scores = ("experiments.hard_scores", "--model", str(model), "--captions", str(max(2, captions)), *doses)
    scores += ("--steps", native, staged)
    tiny = ("--batch", "0.1", "--scale", "0.01") if trial else ()
    loras = folder / "loras"
    pupil = () if student is None else ("--student", str(student))
    asked = ("experiments.transfer", "--model", str(model), "--loras", str(loras), "--captions", str(captions))
    figure = ("--figure", str(folder / "map.svg"))
    native_staged = ("--methods", "staged", "one forward", *TRUTHS)
    two = one or ("--details", "letters", "--sizes", "13%", "8%")
    heights = ("--heights", "12", "24", "--pages", "1") if trial else ()
    read = ("experiments.legibility", "--model", str(model), "--ocr", str(ocr), *heights)
    pages = Piece("legibility", (*read, "--out", str(folder / "legibility.json")), fixed=120.0)
    found = [
        Piece("scores", (*scores, "--rows", *rows, "--out", str(folder / "scores.json")), captions, 43.0),
        failures("map", "map", captions, 37.0, *native_staged, *figure, *one),
        failures("map", "settings", captions, 14.0, "--methods", "staged", *SETTINGS, *two),
        failures("budget", "budget", captions, 33.0, *one),
        failures("mends", "mends", many, 12.7, "--details", "letters", "--sizes", "13%"),
        failures("frontier", "frontier", captions, 16.6, *two),
        *(
            Piece(
                f"fine-tune {look}",
                (
                    "experiments.train_pocket.finetune",
                    look,
                    "--model",
                    str(model),
                    "--out",
                    str(loras),
                    "--bf16",
                    "--steps",
                    str(2 if trial else steps),
                    *tiny,
                ),
                fixed=0.55 * steps,
            )
            for look, steps in TAUGHT.items()
        ),
        Piece("transfer", (*asked, *few, *pupil, "--out", str(folder / "transfer")), captions, 31.0),
    ]
    return found if ocr is None else [*found, pages]


def told(found: list[Piece]) -> list[str]:
    """A line a piece: its name, its time and its command."""
    lines = [f"{p.name}: {p.seconds / 60:.0f} min: python -m {shlex.join(p.command)}" for p in found]
    return [*lines, f"all: {sum(p.seconds for p in found) / 60:.0f} min on two idle cores"]


def done(piece: Piece, folder: Path) -> None:
    """Run a piece and keep what it prints.

    Raises:
        subprocess.CalledProcessError: it failed; the same command resumes.
    """
    began = time.monotonic()
    text = subprocess.run([sys.executable, "-m", *piece.command], check=True, stdout=subprocess.PIPE).stdout
    print(text.decode(), flush=True)
    if text:
        write_bytes(folder / f"{piece.name}.md", text)
    print(f"{piece.name}: done in {(time.monotonic() - began) / 60:.1f} min", file=sys.stderr, flush=True)


def main() -> int:
    """Run the pieces, or say what they are."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="a file of pocket's weights that knows the hard world"
    )
    parser.add_argument("--student", type=Path, help="its few-step student, for the transfer")
    parser.add_argument("--ocr", metavar="MODULE:FUNCTION", help="also printed text, as `experiments.legibility`")
    parser.add_argument("--captions", type=int, default=LEAST, help=f"of each category (default: {LEAST})")
    parser.add_argument("--only", nargs="+", metavar="PIECE", help="some of the pieces (default: all)")
    parser.add_argument("--plan", action="store_true", help="say what would be run")
    parser.add_argument("--trial", action="store_true", help="one caption of a size of detail, in two steps")
    parser.add_argument("--out", type=Path, help="the folder (default: runs/evidence/MODEL)")
    args = parser.parse_args()
    folder: Path = args.out or Path("runs") / "evidence" / args.model.stem
    count = 1 if args.trial else args.captions
    if count < 1:
        parser.error("--captions must be at least 1")
    found = pieces(args.model, folder, captions=count, student=args.student, trial=args.trial, ocr=args.ocr)
    if unknown := set(args.only or ()) - {piece.name for piece in found}:
        names = ", ".join(piece.name for piece in found)
        parser.error(f"no piece is called {', '.join(sorted(unknown))}; there are {names}")
    found = [piece for piece in found if not args.only or piece.name in args.only]
    try:
        info(str(args.model))
        if args.student is not None and not args.student.is_file():
            parser.error(f"{args.student} is not there")
        print("\n".join(told(found)), file=sys.stderr, flush=True)
        if args.plan:
            return 0
        folder.mkdir(parents=True, exist_ok=True)
        for piece in found:
            print(f"{piece.name}: about {piece.seconds / 60:.0f} min", file=sys.stderr, flush=True)
            done(piece, folder)
    except MrflowError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        print(f"{shlex.join(map(str, error.cmd))} failed; the same command resumes there", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
