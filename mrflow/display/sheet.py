"""Pictures and tables for people: what a run cost, and labelled sheets that hold two runs side by side."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import ceil

from PIL import Image, ImageDraw, ImageFont

from mrflow.backbone import Backbone
from mrflow.display.notes import counted
from mrflow.errors import PlanError
from mrflow.records.pictures import to_images
from mrflow.result import Result
from mrflow.runner import run
from mrflow.schedules import Shifted
from mrflow.spec import Pixels
from mrflow.stage import AnyChain, Chain, human, plan
from mrflow.stages import Sample

MARGIN, GAP, PAIRS = 8, 20, 2  # pixels within a pair and between pairs; pairs a row
LINES, LINE = 3, 16  # of a caption at most; pixels from one to the next
INK, PAPER = (30, 30, 34), (250, 250, 250)


def stage_table(result: Result, columns: int | None = None) -> str:
    """Stages with their seconds, share of the time and forwards; in a narrow terminal without what each gives."""
    total = result.seconds
    rows = [("text", "", result.condition_seconds, "")]
    for stage in result.stages:
        nfe = counted(stage.nfe, "forward") if stage.nfe else ("from cache" if stage.cached else "")
        rows.append((stage.name, str(stage.spec), stage.seconds, nfe))
    last = ("total", f"batch of {len(result.seeds)}")
    texts = [last, *(row[:2] for row in rows)]
    name, spec = (max(len(text[k]) for text in texts) for k in (0, 1))
    if columns is not None and name + spec + 22 + max(len(row[3]) for row in rows) > columns:
        spec = 0
    lines = [
        f"{which:<{name}} {what[: spec or 0]:<{spec}} {seconds:8.3f} s {100 * seconds / total:5.1f} %  {nfe}".rstrip()
        for which, what, seconds, nfe in rows
    ]
    memory = f", peak memory {human(result.peak_bytes)}B" if result.peak_bytes else ""
    lines.append(f"{last[0]:<{name}} {last[1] if spec else '':<{spec}} {total:8.3f} s{memory}")
    return "\n".join(lines)


def stage_pictures(result: Result) -> Iterator[tuple[str, list[Image.Image]]]:
    """For each stage that made pixels, before the last: `number-name` and its pictures."""
    for number, stage in enumerate(result.stages[:-1], 1):
        if stage.data is not None and isinstance(stage.spec, Pixels):
            yield f"{number}-{stage.name.lower()}", to_images(stage.data)


def stage_names(chain: AnyChain) -> list[str]:
    """The `number-name` that `stage_pictures` may give, before anything is made."""
    return [f"{number}-{type(stage).__name__.lower()}" for number, stage in enumerate(tuple(chain)[:-1], 1)]


def warm_up(chains: Sequence[AnyChain], model: Backbone, batch: int, prompt: str = "") -> None:
    """Run each chain once, with two steps where it allows that, so that a comparison does not time first calls.

    `prompt` is one that every chain can draw.
    """
    for chain in chains:
        brief: AnyChain = Chain(tuple(replace(s, schedule=Shifted(2)) if isinstance(s, Sample) else s for s in chain))
        try:
            plan(brief, model.info)
        except PlanError:  # stages that go on where the first one ends leave its schedule no choice
            brief = chain
        run(brief, model, [prompt] * batch)


def draw_comparison(staged: Result, native: Result) -> Image.Image:
    """One labelled sheet: for each prompt and seed the two pictures side by side, two such pairs a row."""
    width, height = staged.images[0].size
    across = min(PAIRS, len(staged.images))
    down = -(-len(staged.images) // across)
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    head, pair = 24, 2 * width + MARGIN + GAP
    gain = native.seconds / staged.seconds
    lines = (
        f"staged: {staged.seconds:.2f} s, {counted(staged.nfe, 'forward')}, {gain:.1f}x as fast",
        f"native: {native.seconds:.2f} s, {counted(native.nfe, 'forward')}",
    )
    inner = max(across * pair - GAP, *(ceil(font.getlength(line)) for line in lines))  # small pictures, whole lines
    room = pair - GAP if across > 1 else inner
    captions = [_lines(f"{p} (seed {n})", room, small) for p, n in zip(staged.prompts, staged.seeds, strict=True)]
    foot = 6 + LINE * max(map(len, captions))
    sheet = Image.new("RGB", (inner + 2 * MARGIN, MARGIN + 2 * head + down * (height + foot + head)), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((MARGIN, 5 + i * head), line, fill=INK, font=font)
    for i, caption in enumerate(captions):
        left, top = MARGIN + i % across * pair, 2 * head + i // across * (height + foot + head)
        for place, (name, result) in enumerate((("staged", staged), ("native", native))):
            x = left + place * (width + MARGIN)
            draw.text((x, top + 6), name, fill=INK, font=small)
            sheet.paste(result.images[i], (x, top + head))
        for k, line in enumerate(caption):
            draw.text((left, top + head + height + 2 + k * LINE), line, fill=INK, font=small)
    return sheet


def _lines(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Text in lines of this width in pixels, broken between words; one that does not fit, or the last, is cut."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if lines[-1] and len(lines) < LINES and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return [_fit(line, width, font) for line in lines]


def _fit(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Text cut to a width in pixels, with dots where something is missing."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
