"""A report as one HTML file: text, a table and pictures, nothing loaded from elsewhere."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

_STYLE = """
body { font: 15px/1.45 sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; border-bottom: 1px solid #999; text-align: right; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; }
td.long { white-space: normal; min-width: 16rem; text-align: left; }
th { border-bottom: 2px solid #000; vertical-align: bottom; }
.wide { overflow-x: auto; margin: 1rem 0 2rem; }
img { max-width: 100%; margin: 0 0 1.5rem; }
pre { white-space: pre-wrap; }
"""


def page(
    title: str,
    lines: Sequence[str],
    table: Sequence[Sequence[str]],
    pictures: Sequence[Path],
    refresh: int | None = None,
) -> str:
    """Put a page together.

    Arguments
    ---------
    title : str
    lines : Sequence[str]
        Paragraphs above the table.
    table : Sequence[Sequence[str]]
        Head and rows; none if empty.
    pictures : Sequence[pathlib.Path]
        PNG files; they become part of the page.
    refresh : int, optional
        Seconds after which a browser reads the page again.

    Returns
    -------
    str
        HTML.
    """
    again = f'<meta http-equiv="refresh" content="{refresh}">' if refresh else ""
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{again}',
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        *(f"<p>{escape(line)}</p>" for line in lines),
    ]
    if table:
        head, *rows = table
        parts += ['<div class="wide"><table><tr>', *_cells("th", head), "</tr>"]
        for row in rows:
            parts += ["<tr>", *_cells("td", row), "</tr>"]
        parts += ["</table></div>"]
    for picture in pictures:
        data = base64.b64encode(picture.read_bytes()).decode()
        parts += [f'<img alt="{escape(picture.stem)}" src="data:image/png;base64,{data}">']
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _cells(tag: str, texts: Sequence[str]) -> list[str]:
    wide = ["", ' class="long"']
    return [f"<{tag}{wide[len(t) > 40]}>{escape(t.strip('`'))}</{tag}>" for t in texts]
