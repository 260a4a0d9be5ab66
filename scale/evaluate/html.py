"""The page of a report: one file that opens without a network, and without a script.

Apart from the report because it knows markup and nothing of metrics. Every text that comes from
data is escaped; pictures stand inside the file.
"""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

_NARROW = 560
"""Pixels; a wider piece is scrolled on a narrow screen, where its words would be too small."""

STYLE = """
:root { color-scheme: light; --ink:#26303d; --quiet:#5d6876; --rule:#e3e7ec; --faint:#f6f8fa;
  --good:#00795c; --bad:#b4420a; --blue:#0072b2; }
* { box-sizing: border-box; }
body { margin:0; background:#fff; color:var(--ink); font:16px/1.55 system-ui,-apple-system,
  "Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif; }
main { max-width:1140px; margin:0 auto; padding:32px 28px 80px; }
header p { margin:.2em 0 0; color:var(--quiet); }
h1 { font-size:1.85rem; line-height:1.2; margin:0; letter-spacing:-.015em; font-weight:650; }
h2 { font-size:1.25rem; margin:2.6em 0 .7em; padding-top:1.1em; border-top:1px solid var(--rule);
  font-weight:620; letter-spacing:-.005em; }
section:first-of-type h2 { margin-top:1em; padding-top:.8em; }
h3 { font-size:1rem; margin:1.7em 0 .5em; font-weight:620; }
p { margin:.5em 0; max-width:76ch; }
code { font:.88em ui-monospace,SFMono-Regular,Menlo,Consolas,monospace; }
.verdicts { display:grid; gap:14px;
  grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr)); }
.verdict { border:1px solid var(--rule); border-left:4px solid #9aa3af; border-radius:8px;
  padding:12px 16px 13px; }
.verdict.better { border-left-color:var(--good); } .verdict.worse { border-left-color:var(--bad); }
.verdict h4 { margin:0 0 .3em; font-size:.98rem; font-weight:620; display:flex; gap:10px;
  align-items:baseline; justify-content:space-between; }
.verdict p { margin:0; font-size:.92rem; line-height:1.5; }
.verdict p.quiet { margin-top:.45em; }
.chip { font-size:.72rem; font-weight:600; letter-spacing:.04em; text-transform:uppercase;
  padding:.12em .6em; border-radius:99px; background:#eef1f4; color:var(--quiet);
  white-space:nowrap; }
.better .chip { background:#def3ec; color:var(--good); }
.worse .chip { background:#fbe7dc; color:var(--bad); }
td .chip { font-size:.66rem; margin-right:.3em; }
.answer { border-left:4px solid #9aa3af; padding:.1em 0 .1em 16px; margin:.9em 0; }
.answer.alarm { border-left-color:var(--bad); background:#fdf0e7; border-radius:0 8px 8px 0;
  padding:.5em 16px .6em; }
.answer p { margin:0; max-width:none; font-size:.92rem; } .answer b { font-weight:620; }
.answer p.lead { font-size:1.1rem; line-height:1.45; margin-bottom:.25em; }
.quiet { color:var(--quiet); font-size:.86rem; }
.points { margin:.6em 0; padding-left:1.2em; font-size:.94rem; } .points li { margin:.3em 0; }
.points b { font-weight:620; }
.limits { background:var(--faint); border-radius:8px; margin:1em 0; padding:.55em 1em .55em 2em;
  font-size:.86rem; color:#465160; } .limits li { margin:.12em 0; }
.scroll { overflow-x:auto; margin:1em 0; }
table { border-collapse:collapse; width:100%; font-size:.88rem; font-variant-numeric:tabular-nums; }
p.wide { max-width:none; }
th, td { text-align:right; padding:.45em .7em; vertical-align:baseline; }
th:first-child, td:first-child { text-align:left; padding-left:.2em; }
td.text, th.text { text-align:left; }
thead th { font-weight:600; border-bottom:1.5px solid #b9c1cb; vertical-align:bottom;
  line-height:1.3; }
thead code { display:block; color:var(--quiet); font-weight:400; font-size:.76em; }
tbody th { font-weight:500; white-space:nowrap; }
tbody th, thead th:first-child { position:sticky; left:0; background:#fff; }
tbody tr { border-bottom:1px solid var(--rule); }
tbody tr.model th { font-weight:650; }
tbody tr.first td, tbody tr.first th { border-top:1.5px solid #b9c1cb; }
tbody tr.ceiling { color:#465160; font-style:italic; }
td small { display:block; color:var(--quiet); font-size:.8em; white-space:nowrap; }
td.best { background:#e6f1f9; font-weight:650; }
td.best::before { content:"\\2022\\00a0"; color:var(--blue); }
td.best small { font-weight:400; }
figure { margin:1.6em 0 2.6em; }
figure h3 { margin:0 0 .3em; }
.pieces { display:flex; flex-wrap:wrap; align-items:flex-start; margin:.2em 0; }
.pieces img { display:block; flex:none; max-width:100%; height:auto; }
@media (max-width:760px) { .pieces.wide { overflow-x:auto; flex-wrap:nowrap; }
  .pieces.wide img { max-width:none; } }
figcaption { color:var(--quiet); font-size:.88rem; max-width:84ch; }
details { margin:1em 0; } summary { cursor:pointer; color:var(--blue); font-size:.93rem; }
dl { display:grid; grid-template-columns:max-content 1fr; gap:.3em 1.4em; font-size:.88rem; }
dt { color:var(--quiet); } dd { margin:0; overflow-wrap:anywhere; }
nav { margin-top:.7em; font-size:.9rem; display:flex; gap:1.3em; flex-wrap:wrap; }
a { color:var(--blue); text-decoration:none; } a:hover { text-decoration:underline; }
@media print { main { padding:0; max-width:none; } nav { display:none; }
  figure, .verdict, tr { break-inside:avoid; } }
"""


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a table: a text, a smaller text below it, and whether it is the best.

    A cell that holds a verdict has it in a chip, with its outcome as the colour.
    """

    text: str
    small: str = ""
    is_best: bool = False
    chip: str = ""
    outcome: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its name, its cells, and the classes of its markup."""

    name: str
    cells: Sequence[Cell | str]
    kind: str = ""


def table(
    columns: Sequence[tuple[str, str]],
    rows: Iterable[Row],
    *,
    caption: str = "",
    text_columns: Sequence[int] = (),
) -> str:
    """Return a table.

    Parameters
    ----------
    columns
        (heading, smaller text below it); the first is that of the rows' names.
    text_columns
        Numbers of the columns that hold words, counted without the first.
    """
    # Not a <caption>: on a narrow screen it would be as wide as the table, and cut.
    parts = [paragraph(caption, "quiet wide")] if caption else []
    parts.append('<div class="scroll"><table>')
    parts.append("<thead><tr>")
    for place, (heading, small) in enumerate(columns):
        code = f"<code>{escape(small)}</code>" if small else ""
        kind = ' class="text"' if place - 1 in text_columns else ""
        parts.append(f'<th scope="col"{kind}>{escape(heading)}{code}</th>')
    parts.append("</tr></thead><tbody>")
    for row in rows:
        kind = f' class="{escape(row.kind)}"' if row.kind else ""
        parts.append(f'<tr{kind}><th scope="row">{escape(row.name)}</th>')
        for place, item in enumerate(row.cells):
            cell = item if isinstance(item, Cell) else Cell(item)
            kinds = [k for k, on in (("best", cell.is_best), ("text", place in text_columns)) if on]
            kinds += [escape(cell.outcome)] if cell.outcome else []
            attribute = f' class="{" ".join(kinds)}"' if kinds else ""
            chip = f'<span class="chip">{escape(cell.chip)}</span> ' if cell.chip else ""
            small = f"<small>{escape(cell.small)}</small>" if cell.small else ""
            parts.append(f"<td{attribute}>{chip}{escape(cell.text)}{small}</td>")
        parts.append("</tr>")
    parts.append("</tbody></table></div>")
    return "".join(parts)


def verdict(*, title: str, chip: str, outcome: str, text: str, small: str = "") -> str:
    """Return one verdict card; the outcome stands in the chip too, not only in the colour."""
    quiet = f'<p class="quiet">{escape(small)}</p>' if small else ""
    return (
        f'<div class="verdict {escape(outcome)}"><h4>{escape(title)}'
        f'<span class="chip">{escape(chip)}</span></h4><p>{escape(text)}</p>{quiet}</div>'
    )


def heading(text: str) -> str:
    """Return a heading inside a section."""
    return f"<h3>{escape(text)}</h3>"


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph."""
    attribute = f' class="{escape(kind)}"' if kind else ""
    return f"<p{attribute}>{escape(text)}</p>"


def points(items: Iterable[tuple[str, str]], *, kind: str = "points") -> str:
    """Return a list of lines: (first words, the rest)."""
    lines = [
        f"<li>{f'<b>{escape(head)}</b> ' if head else ''}{escape(rest)}</li>"
        for head, rest in items
    ]
    return f'<ul class="{kind}">{"".join(lines)}</ul>' if lines else ""


def answer(lead: str, head: str, check: str, *, alarm: bool) -> str:
    """Return the answer about one model: the verdict, and below it what was checked."""
    return (
        f'<div class="answer{" alarm" if alarm else ""}"><p class="lead">{escape(lead)}</p>'
        f"<p><b>{escape(head)}</b> {escape(check)}</p></div>"
    )


def cards(items: Iterable[str]) -> str:
    """Return verdict cards, as many beside each other as there is room for."""
    return f'<div class="verdicts">{"".join(items)}</div>'


def picture(
    *, name: str, title: str, caption: str, alt: str, pieces: Sequence[tuple[bytes, int]]
) -> str:
    """Return a figure whose PNGs stand inside the page, the first one with its description."""
    images = "".join(
        f'<img width="{width}" alt="{escape(alt, quote=True) if place == 0 else ""}" '
        f'src="data:image/png;base64,{b64encode(data).decode("ascii")}">'
        for place, (data, width) in enumerate(pieces)
    )
    kind = "pieces wide" if max(width for _, width in pieces) > _NARROW else "pieces"
    return (
        f'<figure id="{escape(name)}"><h3>{escape(title)}</h3><div class="{kind}">{images}</div>'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def facts(items: Mapping[str, str]) -> str:
    """Return names with their values."""
    lines = [f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in items.items()]
    return f"<dl>{''.join(lines)}</dl>"


def fold(title: str, inside: str, *, is_open: bool = False) -> str:
    """Return a part that is closed until it is asked for, or can be closed."""
    state = " open" if is_open else ""
    return f"<details{state}><summary>{escape(title)}</summary>{inside}</details>"


def section(name: str, title: str, inside: str) -> str:
    """Return a section with its heading."""
    return f'<section id="{escape(name)}"><h2>{escape(title)}</h2>{inside}</section>'


def page(*, title: str, subtitle: str, sections: Mapping[str, tuple[str, str]]) -> str:
    """Return the whole page.

    Parameters
    ----------
    sections
        Name -> (heading, content), in order; the names are the anchors of the table of contents.
    """
    links = "".join(
        f'<a href="#{escape(name)}">{escape(heading)}</a>'
        for name, (heading, _) in sections.items()
    )
    body = "".join(section(name, *parts) for name, parts in sections.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<link rel="icon" href="data:,">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p><nav>{links}</nav></header>"
        f"{body}</main></body></html>\n"
    )
