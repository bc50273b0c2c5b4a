"""Small pieces of HTML for notebooks. Texts are escaped: prompts and errors never become markup."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from html import escape


def html_table(heads: Sequence[object], lines: Iterable[Sequence[object]], *, caption: str = "") -> str:
    """A table; what is None is an empty cell, and numbers stand to the right."""
    head = "".join(f"<th>{escape(str(each))}</th>" for each in heads)
    body = "".join(f"<tr>{''.join(map(_cell, line))}</tr>" for line in lines)
    top = f"<caption>{escape(caption)}</caption>" if caption else ""
    return f"<table>{top}<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _cell(value: object) -> str:
    side = "right" if isinstance(value, int | float) else "left"
    return f'<td style="text-align:{side}">{escape("" if value is None else str(value))}</td>'


def picture(png: bytes, text: str = "") -> str:
    """A PNG inside the page, never wider than it."""
    source = b64encode(png).decode()
    return f'<img style="max-width:100%" alt="{escape(text, quote=True)}" src="data:image/png;base64,{source}">'
