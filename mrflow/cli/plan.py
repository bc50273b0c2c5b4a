"""What `mrflow plan` says: the model, the levels that are visited, and what a chain costs beside native sampling."""

import json

import typer
from rich.console import Console

from mrflow.cli.chains import build
from mrflow.cli.display import width, wrap
from mrflow.cli.options import refuse
from mrflow.cli.parsing import load_chain, parse_shift, upscaler
from mrflow.cli.verbs import PlanOptions
from mrflow.cost import H200, floor_seconds, memory
from mrflow.display.notes import counted
from mrflow.models import info
from mrflow.recipes import native as native_chain
from mrflow.records.pictures import read_image
from mrflow.spec import Latents, Pixels
from mrflow.stage import AnyChain, Plan, human, plan


def plan_chain(err: Console, asked: PlanOptions) -> None:
    """Plan a recipe or a chain of the user's own."""
    own, chain, start = asked.own, asked.chain, asked.start
    facts = info(asked.model, shift=parse_shift(asked.facts.shift), text_tokens=asked.facts.text_tokens)
    refuse(start is not None and chain is None, "--start", "with a recipe, which begins with noise")
    if chain is not None:
        refuse(bool(own.as_options()), ", ".join(own.as_options()), f"beside {chain}, which says all of it")
        whole: AnyChain = load_chain(chain)
    else:
        whole = build(own.name, facts, sr=upscaler(own.sr) or own.sr, **own.words)
    begin = None if start is None else Pixels(asked.batch, *read_image(start).shape[-2:])
    planned = plan(whole, facts, batch=asked.batch, start=begin)
    typer.echo(json.dumps(report(planned), indent=2) if asked.as_json else plan_text(planned, width()))
    for text in planned.notes:
        err.print(text)


def native_plan(planned: Plan) -> Plan | None:
    """The plan of the model's native steps (most: 50) for the picture that a plan ends in."""
    out = planned.out
    if not isinstance(out, Pixels):
        return None
    return plan(
        native_chain(size=(out.height, out.width), steps=planned.model.native_steps), planned.model, batch=out.batch
    )


def model_facts(planned: Plan) -> list[str]:
    """The model that was planned: its blocks, parameters, text length and shift, and the levels that stages visit."""
    facts, a, shift = planned.model, planned.model.architecture, planned.model.shift
    lines = [f"model     {facts.name}"]
    if a is not None:
        blocks = f"{a.double_blocks} double and {a.single_blocks} single blocks"
        lines[0] += f": {blocks} of width {a.hidden}, {a.parameters:,} parameters, text of {a.text_tokens} tokens"
    ends = f"mu {shift.low:g} at {shift.low_tokens} tokens, {shift.high:g} at {shift.high_tokens}"
    lines.append(f"shift     {ends}" + ("" if shift.terminal is None else f", down to {shift.terminal:g}"))
    for number, row in enumerate(planned.rows, 1):
        if row.sigmas:
            lines.append(f"sigmas    {number} {row.name}: {' '.join(f'{sigma:.4g}' for sigma in row.sigmas)}")
    return lines


def comparison(planned: Plan) -> list[str]:
    """Lines on what a plan costs beside native sampling."""
    a, lines = planned.model.architecture, list[str]()
    native = native_plan(planned)
    if a is not None:
        lines.append(f"weights   {human(a.parameters)} parameters (transformer)")
    if memory(planned) is not None and a is not None and a.parameters > 1e9:
        lines += ["memory    on the device at the worst moment, weights in bfloat16 (in fp8):"]
        for mode in ("none", "phase", "block"):
            wide, narrow = memory(planned, offload=mode), memory(planned, offload=mode, storage="fp8")
            if wide is not None and narrow is not None:
                lines.append(
                    f"  offload {mode:<6} {wide.peak / 1e9:5.1f} GB ({narrow.peak / 1e9:.1f} GB), {wide.worst}"
                )
    if native is not None and planned.work.flops and native.work.flops:
        ratio = native.work.flops / planned.work.flops
        lines.append(
            f"native    {planned.model.native_steps} steps: {counted(native.nfe, 'forward')}, "
            f"{human(native.work.flops, 'FLOP')}; this chain: {ratio:.1f}x less"
        )
        if a is not None and a.parameters > 1e9:
            mine, theirs = floor_seconds(planned), floor_seconds(native)
            lines.append(f"{H200[0]}: at least {mine:.3g} s, native {theirs:.3g} s (arithmetic and memory alone)")
    return lines


def plan_text(planned: Plan, columns: int | None = None) -> str:
    """A plan for people, in a terminal's columns if any: the stages, then what it costs beside native sampling."""
    return "\n".join([planned.table(columns), "", *wrap([*model_facts(planned), *comparison(planned)], columns)])


def report(planned: Plan) -> dict[str, object]:
    """A plan as plain data."""
    native = native_plan(planned)
    return {
        "model": planned.model.name,
        "stages": [
            {"name": r.name, "in": str(r.spec), "out": str(r.out), "nfe": r.work.nfe, "flops": r.work.flops}
            | ({"tokens": r.out.tokens} if isinstance(r.out, Latents) else {})
            | ({"estimated": True} if r.work.estimated else {})
            for r in planned.rows
        ],
        "nfe": planned.nfe,
        "flops": planned.work.flops,
        "native_flops": native.work.flops if native else None,
        "memory": {mode: m.moments for mode in ("none", "phase", "block") if (m := memory(planned, offload=mode))},
        "parameters": planned.model.architecture.parameters if planned.model.architecture else None,
    }
