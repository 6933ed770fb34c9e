"""Tables as CSV and Markdown, and report.html, of a study."""

from __future__ import annotations

import csv
import io
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from csdiv.models.checkpoint import versions
from csdiv.models.folder import write_atomically
from csdiv.models.report import document, figure_html

Value = str | float | int | None


@dataclass(frozen=True)
class Table:
    """Rows of names and numbers.

    Attributes:
        name: of the CSV file. title: above the table.
        columns: headings, with units; an accuracy's with its metric's name.
        rows: as many values each; None where there is none. Floats are shown with ``digits``.
        note: below the table.
    """

    name: str
    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[Value]]
    note: str = ""
    digits: int = 2

    def shown(self, value: Value) -> str:
        if value is None:
            return "–"
        return f"{value:.{self.digits}f}" if isinstance(value, float) else str(value)

    def to_csv(self) -> str:
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        writer.writerows([self.columns, *(["" if v is None else v for v in row] for row in self.rows)])
        return buffer.getvalue()

    def to_markdown(self) -> str:
        lines = [f"**{self.title}**", ""] + [
            f"| {' | '.join(cells)} |"
            for cells in (self.columns, ["---"] * len(self.columns), *([self.shown(v) for v in r] for r in self.rows))
        ]
        return "\n".join([*lines, "", self.note, ""] if self.note else [*lines, ""])

    def to_html(self) -> str:
        head = "".join(f"<th>{escape(name)}</th>" for name in self.columns)
        body = "\n".join(f"<tr>{''.join(f'<td>{escape(self.shown(v))}</td>' for v in row)}</tr>" for row in self.rows)
        table = f'<div class="wide"><table>\n<tr>{head}</tr>\n{body}\n</table></div>'
        return f"<h2>{escape(self.title)}</h2>\n{table}\n<p>{escape(self.note)}</p>"


@dataclass
class StudyReport:
    """What a study found: paragraphs, tables, and figures {file below figures/: caption}."""

    title: str
    paragraphs: list[str]
    tables: list[Table]
    figures: dict[str, str] = field(default_factory=dict)


def write_study(directory: Path, report: StudyReport, options: dict[str, Any], publish: Path | None = None) -> None:
    """Writes ``report.html``, ``report.md`` and a CSV file for each table; figures are in ``directory``/figures.

    Args:
        options: of the study, for the report.
        publish: a directory that report.md, the CSV files and the figures are copied to.
    """
    directory.mkdir(parents=True, exist_ok=True)
    run_with = Table("versions", "Options and versions", ("", "value"), [
        *((name, str(value)) for name, value in options.items()), *versions().items()
    ])  # fmt: skip
    figures = [f"![{caption}](figures/{name})\n\n{caption}\n" for name, caption in report.figures.items()]
    parts = [f"# {report.title}", *report.paragraphs, *(t.to_markdown() for t in (*report.tables, run_with)), *figures]
    write_atomically(directory / "report.md", "\n\n".join(part.strip() for part in parts) + "\n")
    for table in report.tables:
        write_atomically(directory / f"{table.name}.csv", table.to_csv())
    body = [f"<h1>{escape(report.title)}</h1>", *(f"<p>{escape(text)}</p>" for text in report.paragraphs)]
    body += [table.to_html() for table in report.tables]
    body += [figure_html(directory / "figures" / name, caption) for name, caption in report.figures.items()]
    write_atomically(directory / "report.html", document(report.title, "\n".join([*body, run_with.to_html()])))
    if publish is not None:
        (publish / "figures").mkdir(parents=True, exist_ok=True)
        for name in ("report.md", *(f"{table.name}.csv" for table in report.tables)):
            shutil.copy(directory / name, publish / name)
        for name in report.figures:
            shutil.copy(directory / "figures" / name, publish / "figures" / name)
    print(f"report: {directory / 'report.html'}")
