"""PP-OCR (Apache-2.0, in rapidocr) as a text reader: `experiments.oneig text --ocr experiments.real.reader:read`."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@cache
def _engine() -> Any:  # noqa: ANN401 (an optional package without types)
    from rapidocr import RapidOCR

    return RapidOCR(params={"Global.log_level": "error"})


def read_array(pixels: "np.ndarray[Any, Any]") -> str:
    """The text in (h, w, 3) of 8 bits, red first; its lines joined by spaces, "" where none is found."""
    return _text(pixels)


def read_line(pixels: "np.ndarray[Any, Any]") -> str:
    """The text in a picture of one line, (h, w, 3) of 8 bits: recognised as it is, not looked for first."""
    return _text(pixels, use_det=False, use_cls=False)


def _text(pixels: "np.ndarray[Any, Any]", **how: bool) -> str:
    return " ".join(_engine()(np.ascontiguousarray(pixels[..., ::-1]), **how).txts or ())


def read(paths: list[Path]) -> list[str]:
    """The text in each picture."""
    texts: list[str] = []
    for path in paths:
        with Image.open(path) as image:
            texts.append(read_array(np.asarray(image.convert("RGB"))))
    return texts
