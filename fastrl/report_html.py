"""The page around the report's figures: style and the few HTML elements it is made of."""

from collections.abc import Iterable, Sequence
from html import escape

from fastrl.console import printable
from fastrl.report_svg import format_number

PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5d6872; --line: #dde2e6;
  --page: #ffffff; --panel: #f6f8f9; --c0: #0063a8; --c1: #b34700; --c2: #00755a; --c3: #93377a;
  --c4: #8a6100; --c5: #3d6fd9; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e9ec; --soft: #98a4ae; --line: #343d45;
  --page: #14181b; --panel: #1d2327; --c0: #58b4f0; --c1: #f0914a; --c2: #3fc7a1; --c3: #df8bc8;
  --c4: #e0b03c; --c5: #91b0ff; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 76rem; background: var(--page);
  color: var(--ink); font: 16px/1.55 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.75rem 0 .5rem; padding-top: .75rem;
  border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 1.5rem 0 .25rem; }
p { margin: .25rem 0 .75rem; max-width: 46rem; }
.soft, figcaption, .card small { color: var(--soft); }
nav { display: flex; flex-wrap: wrap; gap: .25rem 1rem; margin: .75rem 0 1.25rem;
  font-size: .9rem; }
a { color: var(--c0); }
.cards, .plots { display: grid; gap: .75rem; margin: 1rem 0; }
.cards { grid-template-columns: repeat(auto-fill, minmax(11rem, 1fr)); }
.plots { grid-template-columns: repeat(auto-fill, minmax(min(20rem, 100%), 1fr)); }
.card, figure { background: var(--panel); border-radius: .5rem; padding: .75rem; margin: 0; }
.card b { display: block; font-size: 1.5rem; line-height: 1.3; }
.card small { display: block; font-size: .8rem; line-height: 1.4; }
figure h4 { margin: 0; font: 600 .9rem/1.4 ui-monospace, monospace; display: flex;
  justify-content: space-between; gap: .5rem; flex-wrap: wrap; }
figure h4 span { font-weight: 400; color: var(--soft); }
figcaption { font-size: .82rem; line-height: 1.4; }
.legend { display: flex; flex-wrap: wrap; gap: 0 .9rem; font-size: .8rem; }
.legend svg { width: 1.6rem; height: .6rem; display: inline-block; margin-right: .3rem; }
svg { display: block; width: 100%; height: auto; margin: .4rem 0; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
svg text.name { font-size: 12px; fill: var(--ink); }
svg path { fill: none; }
.grid { stroke: var(--line); } .axis { stroke: var(--soft); }
.base { stroke: var(--soft); stroke-dasharray: 4 3; }
.line { stroke-width: 1.7; stroke-linejoin: round; } .whisker { stroke-width: 3; }
.thin { stroke-width: 1; } circle.seed { opacity: .4; } figure.wide { grid-column: 1 / -1; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); } .s3 { --c: var(--c3); }
.s4 { --c: var(--c4); } .s5 { --c: var(--c5); }
[class^=s] > path { stroke: var(--c); } [class^=s] > circle { fill: var(--c); }
.s1 > .line { stroke-dasharray: 6 2; } .s2 > .line { stroke-dasharray: 2 2; }
.s3 > .line { stroke-dasharray: 8 2 2 2; } .s4 > .line { stroke-dasharray: 10 4; }
.s5 > .line { stroke-dasharray: 1 3; }
circle.dot { opacity: 0; } circle.dot:hover { opacity: .55; }
svg.spark { width: 5rem; margin: 0; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; font-size: .875rem; line-height: 1.45; }
th, td { padding: .35rem .75rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
thead th { font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 500; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.samples table { table-layout: fixed; width: 100%; min-width: 48rem; }
.samples td, .samples tbody th { white-space: pre-wrap; overflow-wrap: anywhere; }
code, pre { font: .82rem/1.5 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { background: var(--panel); border-radius: .5rem; padding: .75rem; overflow-x: auto;
  white-space: pre-wrap; margin: .5rem 0; }
details { margin: .5rem 0; } summary { cursor: pointer; }
@media print { details > * { display: revert; } body { max-width: none; } }
"""


def page(title: str, body: Iterable[str]) -> str:
    """Return a whole HTML document that may load nothing: its policy allows inline style only."""
    return "\n".join([
        "<!doctype html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title>", f"<style>{PAGE_STYLE}</style>", "</head>", "<body>",
        *body, "</body>", "</html>", "",
    ])


def text(value: object) -> str:
    """Return a value as HTML text; markup and control characters in it are shown, not obeyed."""
    return escape(printable(str(value)))


def paragraph(content: str) -> str:
    """Return a paragraph of plain text."""
    return f"<p>{text(content)}</p>"


def section(anchor: str, title: str, parts: Sequence[str]) -> str:
    """Return a section of HTML parts, or nothing when it would be empty."""
    if not any(parts):
        return ""
    return (f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{text(title)}</h2>'
            + "\n".join(part for part in parts if part) + "</section>")


def card(value: str, title: str, note: str) -> str:
    """Return one large number with its name."""
    return (f'<div class="card"><small>{text(title)}</small><b>{text(value)}</b>'
            f"<small>{text(note)}</small></div>")


def figure(title: str, note: str, plot: str, sentence: str, *, is_wide: bool = False) -> str:
    """Return a plot (HTML) with its title, a note beside it and one plain sentence."""
    width = ' class="wide"' if is_wide else ""
    return (f"<figure{width}><h4>{text(title)} <span>{text(note)}</span></h4>{plot}"
            f"<figcaption>{text(sentence)}</figcaption></figure>")


def details(title: str, content: str) -> str:
    """Return HTML that is folded until a person opens it; nothing when there is none."""
    return f"<details><summary>{text(title)}</summary>{content}</details>" if content else ""


def table(columns: Sequence[str], rows: Sequence[Sequence[object]], *, caption: str = "",
          raw_columns: Sequence[int] = ()) -> str:
    """Return a table with a header row; the first cell of a row is its header.

    Args:
        columns: Header texts.
        rows: One value per column; numbers are right-aligned, None is an empty cell.
        caption: Shown above.
        raw_columns: Columns whose cells are HTML already.
    """
    if not rows:
        return ""
    is_number = [any(isinstance(row[i], float | int) for row in rows) for i in range(len(columns))]
    head = "".join(f'<th scope="col"{_number_class(n)}>{text(name)}</th>'
                   for name, n in zip(columns, is_number, strict=True))
    body = []
    for row in rows:
        cells = [str(value) if i in raw_columns else _cell(value) for i, value in enumerate(row)]
        rest = "".join(f"<td{_number_class(n)}>{cell}</td>"
                       for cell, n in zip(cells[1:], is_number[1:], strict=True))
        body.append(f'<tr><th scope="row"{_number_class(is_number[0])}>{cells[0]}</th>{rest}</tr>')
    # A caption inside would be as wide as the table and run out of a narrow screen with it.
    above = f'<p class="soft">{text(caption)}</p>' if caption else ""
    return (f'{above}<div class="scroll" tabindex="0" role="region" '
            f'aria-label="{text(caption or columns[0])}"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{''.join(body)}</tbody></table></div>")


def _number_class(is_number: bool) -> str:
    return ' class="number"' if is_number else ""


def _cell(value: object) -> str:
    if value is None:
        return ""
    return format_number(value) if isinstance(value, float) else text(value)
