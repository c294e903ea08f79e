"""Turn the Markdown of a report into one HTML page that holds its figures and needs no network.

Only the Markdown that tools/report.py writes: headings, paragraphs, lists, tables, formulas and
figures, one a block; in the text bold, emphasis and code. The frame of the page is report.html.
"""

import base64
import html
import io
import re
from pathlib import Path
from string import Template

import matplotlib
from matplotlib.font_manager import FontProperties
from matplotlib.mathtext import math_to_image

FRAME = Template(Path(__file__).with_name("report.html").read_text())
FIGURE = re.compile(r"!\[(.+)\]\((.+)\)\n\n(.+)", re.DOTALL)  # an image, then its caption


def page_of(blocks, folder):
    """Blocks of Markdown, the title first -> the text of an HTML page; folder: of the figures"""
    body = "\n".join(html_of(block, folder) for block in blocks)
    return FRAME.substitute(title=html.escape(blocks[0].lstrip("# ")), body=body)


def html_of(block, folder):
    """One block of Markdown as HTML"""
    lines = block.split("\n")
    if heading := re.fullmatch("(#+) (.+)", block):
        level = len(heading[1])
        return f"<h{level}>{inline(heading[2])}</h{level}>"
    if figure := FIGURE.fullmatch(block):
        return figure_of(*figure.groups(), folder)
    if block.startswith("$$"):
        return formula(block.strip("$"))
    if block.startswith("- "):
        return "<ul>\n" + "\n".join(f"<li>{inline(line[2:])}</li>" for line in lines) + "\n</ul>"
    if block.startswith("| "):
        return table(lines)
    return f"<p>{inline(block)}</p>"


def inline(text):
    """Bold, emphasis and code within a line"""
    parts = html.escape(text, quote=False).split("`")
    for i, part in enumerate(parts):
        bold = re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", part)
        parts[i] = f"<code>{part}</code>" if i % 2 else re.sub(r"\*(.+?)\*", r"<em>\1</em>", bold)
    return "".join(parts)


def table(lines):
    """A Markdown table; a column whose rule ends in a colon holds numbers"""
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line[1:-1])] for line in lines]
    sides = [' class="number"' * rule.endswith(":") for rule in rows.pop(1)]
    for i, row in enumerate(rows):
        tag, cells = "td" if i else "th", [inline(cell.replace("\\|", "|")) for cell in row]
        cells = [f"<{tag}{side}>{cell}</{tag}>" for side, cell in zip(sides, cells)]
        rows[i] = f"<tr>{''.join(cells)}</tr>"
    head, *body = rows
    rows = f"<thead>{head}</thead>\n<tbody>\n" + "\n".join(body) + "\n</tbody>"
    return f'<div class="wide"><table>\n{rows}\n</table></div>'


def figure_of(label, file, caption, folder):
    """A figure with its PNG file inside, shown at half its pixels: sharp on any screen"""
    data = (Path(folder) / file).read_bytes()
    width = int.from_bytes(data[16:20], "big") // 2  # where a PNG file says it
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    image = f'<img src="{source}" width="{width}" alt="{label}: {Path(file).stem}">'
    text = f"<figcaption>{inline(caption)}</figcaption>"
    return f'<figure>\n<div class="wide">{image}</div>\n{text}\n</figure>'


def formula(tex):
    """A formula drawn by matplotlib, in the colour of the text"""
    file, style = io.StringIO(), {"text.parse_math": True, "savefig.facecolor": "none"}
    with matplotlib.rc_context(style | {"svg.hashsalt": tex}):
        tex = tex.replace(r"\frac", r"\dfrac")  # in a line of its own
        math_to_image(f"${tex}$", file, FontProperties(size=12), format="svg")
    drawn = re.sub("<metadata>.*</metadata>", "", file.getvalue(), flags=re.DOTALL)  # the date
    label = f'role="img" aria-label="{html.escape(tex)}"'
    return f'<div class="wide formula"><svg {label}{drawn.split("<svg", 1)[1]}</div>'
