"""Argument checks: what passes, what is refused, and in which words."""

import importlib.util
import math
import re
import sys
from pathlib import Path

import pytest

import mrflow as mf
from mrflow._checks import check_number, check_whole, is_number, is_whole, require

PACKAGE = Path(mf.__file__).parent


@pytest.mark.parametrize("value", [True, False, None, "3", 1.0, math.nan, [1]])
def test_what_is_no_whole_number(value: object) -> None:
    assert not is_whole(value)
    with pytest.raises(mf.PlanError, match=re.escape(f"steps must be a whole number from 1 to 9, got {value!r}")):
        check_whole("steps", value, 1, 9)


@pytest.mark.parametrize("value", [True, None, "3", math.nan, math.inf, -math.inf, 1j, 10**400])
def test_what_is_no_number(value: object) -> None:
    assert not is_number(value)
    with pytest.raises(mf.PlanError, match=re.escape(f"mu must be a finite number, got {value!r}")):
        check_number("mu", value)
    with pytest.raises(mf.PlanError, match=re.escape(f"churn must be from 0 to 50, got {value!r}")):
        check_number("churn", value, 0, 50)


def test_ends_belong_to_a_range_and_the_words_name_them() -> None:
    for value in (1, 9):
        check_whole("n", value, 1, 9)
        check_number("x", value, 1.0, 9.0)
        check_number("x", value, 1)
    for call, words in (
        (lambda: check_whole("n", 0, 1), "n must be a whole number of at least 1, got 0"),
        (lambda: check_whole("n", 10, 1, 9), "n must be a whole number from 1 to 9, got 10"),
        (
            lambda: check_whole("n", -1, 0, wanted="a whole number of steps from 0"),
            "a whole number of steps from 0, got -1",
        ),
        (lambda: check_number("x", 0.5, 1), "x must be a finite number of at least 1, got 0.5"),
        (lambda: check_number("x", 9.5, 1.0, 9.0), "x must be from 1 to 9, got 9.5"),
        (lambda: require(False, "x", "even", 3), "x must be even, got 3"),
    ):
        with pytest.raises(mf.PlanError, match=words):
            call()  # type: ignore[no-untyped-call]


def test_no_module_checks_whole_numbers_by_itself() -> None:
    texts = {p: p.read_text(encoding="utf-8") for p in PACKAGE.rglob("*.py")}
    own = {
        p.name
        for p, text in texts.items()
        if re.search(r"isinstance\([\w.]+, bool\) or|not isinstance\([\w.]+, bool\)", text)
    }
    assert own == {"_checks.py"}


def test_a_field_is_held_to_its_type_also_where_annotations_are_text(tmp_path: Path) -> None:
    words = (
        "from __future__ import annotations",
        "from dataclasses import dataclass",
        "from typing import Annotated",
        "from mrflow._checks import Bound, Checked, check_number",
        "@dataclass(frozen=True)",
        "class Tint(Checked):",
        "    much: Annotated[float | None, Bound(check_number, 0.0, 1.0)] = None",
    )
    (tmp_path / "textual_tint.py").write_text("\n".join(words), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("textual_tint", tmp_path / "textual_tint.py")
    assert spec is not None and spec.loader is not None
    with pytest.MonkeyPatch.context() as patch:
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "textual_tint", module)
        spec.loader.exec_module(module)
        module.Tint()
        module.Tint(1.0)
        with pytest.raises(mf.PlanError, match="much must be from 0 to 1, got 2"):
            module.Tint(2.0)
