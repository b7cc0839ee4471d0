"""One HTML page in one file: tables and pictures in it, nothing loaded, nothing executed."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

__all__ = ["facts", "heading", "page", "paragraph", "picture", "preformatted", "table"]

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #e1e5ea; --blue: #0072b2; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 70rem; padding: 2rem 1.25rem 4rem; color: var(--ink); background: #fff;
       font: 16px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", sans-serif; }
h1 { font-size: 1.55rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.15rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 2px solid var(--line); }
p { margin: .5rem 0; max-width: 48rem; }
p.soft { color: var(--soft); font-size: .9rem; }
dl { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.2rem, 1fr)); gap: .75rem; margin: 1.25rem 0; }
dl div { border: 1px solid var(--line); border-left: 4px solid var(--blue); border-radius: 4px; padding: .6rem .8rem; }
dt { color: var(--soft); font-size: .8rem; }
dd { margin: 0; font-size: 1.25rem; font-weight: 600; font-variant-numeric: tabular-nums; }
dd small { display: block; font-size: .78rem; font-weight: 400; color: var(--soft); }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .65rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tr > :first-child, .left { text-align: left; }
th[scope=row] { color: var(--ink); font-weight: 400; white-space: normal; max-width: 19rem; }
thead th { white-space: normal; }
tbody tr:hover { background: #f5f8fb; }
.wrap td { white-space: normal; overflow-wrap: anywhere; }
.wrap th, .wrap td { vertical-align: top; }
.wrap th[scope=row] { white-space: nowrap; }
img { display: block; max-width: 100%; height: auto; margin: 1rem 0; }
pre { overflow-x: auto; font-size: .82rem; background: #f5f7f9; padding: .8rem 1rem; border-radius: 4px; }
@media print { body { max-width: none; padding: 0; } h2 { break-after: avoid; } img, dl { break-inside: avoid; } }
"""
# Even text that slipped through unescaped could load and run nothing.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def page(title: str, parts: Iterable[str]) -> str:
    """Return the page of that title, made of the parts that the other functions return."""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{chr(10).join(parts)}
</body>
</html>
"""


def heading(text: str) -> str:
    """Return a heading within the page."""
    return f"<h2>{escape(text)}</h2>"


def paragraph(text: str, soft: bool = False) -> str:
    """Return a paragraph; a soft one stands back."""
    return f'<p class="soft">{escape(text)}</p>' if soft else f"<p>{escape(text)}</p>"


def preformatted(text: str) -> str:
    """Return lines as they are."""
    return f"<pre>{escape(text)}</pre>"


def picture(png: bytes, description: str) -> str:
    """Return a PNG picture, which is part of the page."""
    return f'<img alt="{escape(description)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def facts(entries: Iterable[tuple[str, str, str]]) -> str:
    """Return figures that stand out: what it is, the figure, and what more there is to say of it."""
    cells = (
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(more)}</small></dd></div>"
        for name, value, more in entries
    )
    return f"<dl>{''.join(cells)}</dl>"


def table(rows: Sequence[Sequence[str]], left: Iterable[int] = (0,), wrap: bool = False) -> str:
    """Return a table, the first row its heading and the first column the names of the rows.

    Args:
        rows: cells, as many in each.
        left: columns of text; the others are numbers.
        wrap: long cells may break.
    """
    of_text = set(left)

    def cell(column: int, text: str, tag: str, scope: str) -> str:
        place = ' class="left"' if column in of_text else ""
        return f"<{tag}{scope}{place}>{escape(text)}</{tag}>"

    head = "".join(cell(i, text, "th", ' scope="col"') for i, text in enumerate(rows[0]))
    body = "".join(
        "<tr>"
        + "".join(
            cell(i, text, "th" if i == 0 else "td", ' scope="row"' if i == 0 else "") for i, text in enumerate(row)
        )
        + "</tr>\n"
        for row in rows[1:]
    )
    kind = ' class="wrap"' if wrap else ""
    return f'<div class="scroll"><table{kind}><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
