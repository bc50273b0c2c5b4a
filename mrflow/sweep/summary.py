"""What a sweep's folder shows, in numbers: its rows, what each chain is, what was measured, where it ran."""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from mrflow.display.notes import counted
from mrflow.errors import PlanError
from mrflow.records.readable import stage_text
from mrflow.sweep.aims import BUILT_IN, COSTS, Scale, from_plain, scale_for, to_plain
from mrflow.sweep.rows import Row, row_key, seed_of
from mrflow.sweep.statistics import (
    MIN_PROMPTS,
    Columns,
    Comparison,
    ConfidenceInterval,
    caveat,
    compare_differences,
    differences,
    family,
    group_rows,
    interval,
    is_share,
    number,
)
from mrflow.sweep.store import Store, read
from mrflow.sweep.styles import styles
from mrflow.sweep.timing import seconds, speedup

log = logging.getLogger(__name__)
REASONS = 4  # of rows without a number, that are told one by one


def load_rows(folder: str | Path) -> tuple[list[Row], str]:
    """The rows of a folder, and the label of its reference chain ("" where it has none).

    Where the folder was filled with several models, those of the one that ran last; a warning names the others. A chain
    that was changed under its label, a changed negative prompt and other versions of the packages leave rows behind,
    which are left out likewise.

    Raises:
        PlanError: it is no sweep's folder, or has no rows yet.
    """
    rows = read(folder)
    if not rows:
        raise PlanError(f"{folder} has no rows yet; run mrflow sweep first")
    said = Store(folder).manifest()
    mine = [row for row in rows if row.weights == said.get("weights")]
    if mine and len(mine) < len(rows):
        others = sorted({row.weights for row in rows} - {mine[0].weights})
        log.warning("%d rows of other weights are left out: %s", len(rows) - len(mine), ", ".join(others))
        rows = mine
    mine = [row for row in rows if _is_current(row, said)]
    if len(mine) < len(rows):
        log.warning("left out: %s of other settings or versions", counted(len(rows) - len(mine), "row"))
        rows = mine
    if not rows:
        raise PlanError(f"{folder} has no rows of the settings that it has now; run mrflow sweep first")
    order = {label: place for place, label in enumerate(said.get("chains", {}))}
    rows.sort(key=lambda r: (order.get(r.chain, len(order)), r.prompt, r.draw))
    reference = said.get("reference")
    known = {row.chain for row in rows}
    return rows, reference if isinstance(reference, str) and reference in known else ""


def _is_current(row: Row, said: Mapping[str, Any]) -> bool:
    """Whether a row is what the sweep that ran last would make under this label."""
    chain = cast("dict[str, str]", said.get("prints", {})).get(row.chain)
    if row.seed != seed_of(row.prompt, row.draw):  # drawn when prompts still shared their noise
        return False
    if chain is None or not {"negative", "versions"} <= said.keys():
        return True
    return row.key == row_key(chain, row.model, row.weights, row.prompt, said["negative"], row.seed, said["versions"])


def metrics_of(rows: Sequence[Row]) -> list[str]:
    """The metrics that rows have: `score` first, then whole ones, then parts of others."""
    names = {name for row in rows for name in row.metrics}
    return sorted(names, key=lambda n: (n != "score", "." in n, n))


def summarise(
    rows: Sequence[Row], reference: str, said: Mapping[str, Any] | None = None, *, draws: int = 4000
) -> dict[str, Any]:
    """All numbers of the page, without pictures; `said` is what sweep.json says (`Store.manifest`).

    Comparisons of the table of methods, over all metrics, are one family; those of a tag's table are one each. Rows
    that begin with the truth are yardsticks: they have no speed-up, and are not compared.
    """
    by_chain, said = group_rows(rows, lambda r: r.chain), said or {}
    metrics = metrics_of(rows)
    tags = sorted({tag for row in rows for tag in row.tags})
    base = by_chain.get(reference, [])
    columns = {label: Columns.of(mine, metrics) for label, mine in by_chain.items()}
    parts = {
        (label, tag): {
            value: Columns.of(part, metrics)
            for value, part in group_rows((r for r in mine if tag in r.tags), lambda r, t=tag: r.tags[t]).items()  # type: ignore[misc]
        }
        for label, mine in by_chain.items()
        for tag in tags
    }
    yardsticks = {label for label, mine in by_chain.items() if any(r.rendered for r in mine)}
    others = [label for label in by_chain if label != reference and label not in yardsticks]
    theirs = {m: columns[reference].by_pair(m) if base else {} for m in metrics}
    whole, whole_size = _family({(label, ""): columns[label] for label in others}, theirs, draws)
    by_tag = {
        tag: _family({(label, v): p for label in others for v, p in parts[label, tag].items()}, theirs, draws)
        for tag in tags
    }
    look = styles(by_chain)
    chains: list[dict[str, Any]] = []
    for label, mine in by_chain.items():
        done = [r for r in mine if r.done]
        groups: dict[str, Any] = {
            tag: {
                value: {"metrics": _means(part, draws), "compare": by_tag[tag][0].get((label, value), {})}
                for value, part in parts[label, tag].items()
            }
            for tag in tags
        }
        chains.append(
            {
                "label": label,
                "style": look[label],
                **_run_facts(mine, [] if label in yardsticks else base),
                "metrics": _means(columns[label], draws),
                "compare": whole.get((label, ""), {}),
                "groups": groups,
                "stages": stages_of(label, mine, said),
                "replay": replay_words(label, said),
                "missing": {m: missing(done, m, said)[:REASONS] for m in metrics if None in columns[label].numbers[m]},
            }
        )
    first = rows[0]
    return {
        "model": first.model,
        "weights": first.weights,
        "reference": reference,
        "metrics": metrics,
        "tags": tags,
        "families": {"": whole_size, **{tag: size for tag, (_, size) in by_tag.items()}},
        "enough": MIN_PROMPTS,
        "chains": chains,
        "done": sum(r.done for r in rows),
        "failed": sum(not r.done for r in rows),
        "scales": to_plain(scales(rows, said)),
        "origin": origin(rows),
    }


def _run_facts(mine: Sequence[Row], base: Sequence[Row]) -> dict[str, Any]:
    """What a chain's pictures took: rows, forwards, operations, memory, time, and the speed beside `base` if any."""
    done = [r for r in mine if r.done]
    return {
        "n": len(mine),
        "failed": len(mine) - len(done),
        "nfe": done[0].nfe if done else None,
        "flops": done[0].flops if done else None,
        "peak": max((r.peak_bytes for r in done), default=0) or None,
        "seconds": _plain(seconds(done)),
        "speedup": _plain(speedup(base, mine)) if base else None,
    }


def scales(rows: Sequence[Row], said: Mapping[str, Any]) -> dict[str, Scale]:
    """The scale of every number that rows have: what their metrics said, else the built-in one."""
    known = {**COSTS, **BUILT_IN, **from_plain(said.get("aims", {}))}
    return {name: scale_for(name, known) for name in (*metrics_of(rows), *COSTS)}


def origin(rows: Sequence[Row]) -> dict[str, Any]:
    """Where and when rows were made: versions and machines with how many rows each, the first and last time."""
    machines = Counter(f"{row.device} ({row.machine})" if row.machine else row.device for row in rows if row.device)
    made_by = Counter(" ".join(f"{n} {v}" for n, v in sorted(row.versions.items())) for row in rows if row.versions)
    times = sorted(row.time for row in rows if row.time)
    return {
        "machines": machines.most_common(),
        "versions": made_by.most_common(),
        "times": [times[0][:16], times[-1][:16]] if times else [],
    }


def stages_of(label: str, rows: Sequence[Row], said: Mapping[str, Any]) -> list[list[str]]:
    """Name and settings of every stage of a chain; of a folder that does not say, the names that its rows have."""
    encoded = said.get("chains", {}).get(label)
    if encoded:
        return [list(stage_text(stage)) for stage in encoded]
    first = next((row for row in rows if row.stages), None)
    return [] if first is None else [[stage["name"], ""] for stage in first.stages]


def replay_words(label: str, said: Mapping[str, Any]) -> list[str]:
    """What `mrflow replay` needs for a chain's pictures besides their path: files of its types, networks, the model."""
    own: Mapping[str, str] = said.get("own", {})
    modules = dict.fromkeys(name.partition(":")[0] for name in _types(said.get("chains", {}).get(label)) if ":" in name)
    words = [word for module in modules if module in own for word in ("--with", own[module])]
    words += [word for file in said.get("used", {}).get(label, ()) for word in ("--file", str(file))]
    return words + (["--model", said["model_at"]] if said.get("model_at") else [])


def _types(data: object) -> Iterator[str]:
    """The names of all types in recorded data."""
    if isinstance(data, dict):
        own = cast("dict[str, object]", data)
        if isinstance(own.get("type"), str):
            yield str(own["type"])
        data = list(own.values())
    if isinstance(data, list):
        for each in cast("list[object]", data):
            yield from _types(each)


def missing(rows: Sequence[Row], metric: str, said: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Why rows that are done have no such number, and how many each: the most frequent reasons first."""
    found: Counter[str] = Counter()
    measures: Mapping[str, list[str]] = said.get("measures", {})

    def gives(name: str) -> bool:
        known = measures.get(name)
        return not known or any(metric == base or metric.startswith(f"{base}.") for base in known)

    for row in rows:
        if number(row, metric) is not None:
            continue
        errors = [f"{name} failed: {text}" for name, text in row.unmeasured.items() if gives(name)]
        if errors:
            found["; ".join(errors)] += 1
        elif any(gives(name) for name in row.measured):
            found["the metric does not apply"] += 1
        else:
            found["not measured, as the metric was added later or the reference's picture was not there"] += 1
    return found.most_common()


def _plain(found: ConfidenceInterval | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in found.__dict__.items()}


def _mean(found: Mapping[str, Sequence[float]], metric: str, draws: int) -> dict[str, Any] | None:
    share = is_share(metric)
    if not found:
        return None
    whole = interval(found, draws=draws, share=share)
    said = caveat(found, whole, share=share)
    return {**(_plain(whole) or {}), **({"caveat": said} if said else {})}


def _means(rows: Columns, draws: int) -> dict[str, Any]:
    found = {metric: _mean(rows.values(metric), metric, draws) for metric in rows.numbers}
    return {metric: value for metric, value in found.items() if value is not None}


Place = tuple[str, str]  # a chain's label and a tag's value
VERDICTS = {"higher": "higher", "lower": "lower", "no difference shown": "none", "too few prompts": "few"}


def _family(
    parts: Mapping[Place, Columns], base: Mapping[str, Mapping[tuple[str, int], float]], draws: int
) -> tuple[dict[Place, dict[str, Any]], int]:
    """Parts of chains against the reference's numbers, `base`, metric by metric; and how many tests that made."""
    found: dict[tuple[Place, str], Comparison] = {}
    for metric, theirs in base.items():
        for place, rows in parts.items():
            if between := differences(rows.by_pair(metric), theirs):
                found[place, metric] = compare_differences(metric, between, draws=draws)
    out: dict[Place, dict[str, Any]] = {}
    size = 0
    for (place, metric), one in family(found).items():
        facts: dict[str, Any] = {"verdict": VERDICTS[one.verdict], "p": one.adjusted}
        if one.caveat:
            facts["caveat"] = one.caveat
        out.setdefault(place, {})[metric] = {**(_plain(one.difference) or {}), **facts}
        size = one.family
    return out, size
