"""The examples draw what the library draws, without what they show it in."""

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

import mrflow as mf

FOLDER = Path(__file__).parents[1] / "examples"


def test_the_gradio_demo_draws_without_gradio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    demo = runpy.run_path(str(FOLDER / "gradio_demo.py"))
    assert len((FOLDER / "gradio_demo.py").read_text("utf-8").splitlines()) <= 25
    image = demo["draw"]("a big red circle at the left", 3.0)
    want = mf.run(demo["chain"], demo["model"], "a big red circle at the left", seed=3)
    assert np.array_equal(np.asarray(image), np.asarray(want.images[0]))
