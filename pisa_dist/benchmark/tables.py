"""Tables that can be written as Markdown and as HTML."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape


@dataclass(frozen=True)
class Item:
    """An entry: `strength` in [0, 1] shades it, None leaves it plain; `is_best` sets it in bold."""

    text: str
    strength: float | None = None
    is_best: bool = False


@dataclass(frozen=True)
class Table:
    """A title, rows under a header, and a note that says how to read them."""

    title: str
    header: Sequence[str]
    rows: list[list[Item]] = field(default_factory=list)
    note: str = ""
    num_text_columns: int = 1  # the first ones, aligned to the left

    def add(self, entries: Iterable[Item | str]) -> None:
        """Append a row."""
        self.rows.append([Item(entry) if isinstance(entry, str) else entry for entry in entries])

    def markdown(self) -> str:
        """As Markdown."""
        ends = ["---"] * self.num_text_columns + ["--:"] * (len(self.header) - self.num_text_columns)
        lines = [f"## {self.title}", "", *([self.note, ""] if self.note else [])]
        lines += [_markdown_row(self.header), _markdown_row(ends)]
        for row in self.rows:
            lines.append(_markdown_row([f"**{item.text}**" if item.is_best else item.text for item in row]))
        return "\n".join(lines) + "\n"

    def html(self) -> str:
        """As HTML, in a frame that scrolls sideways where the page is narrow."""
        head = "".join(f"<th{self._kind(i)}>{escape(text)}</th>" for i, text in enumerate(self.header))
        rows = (
            "".join(f"<td{self._kind(i, item)}>{_html_text(item)}</td>" for i, item in enumerate(row))
            for row in self.rows
        )
        body = "\n".join(f"<tr>{row}</tr>" for row in rows)
        note = f"<p class=note>{escape(self.note)}</p>\n" if self.note else ""
        return (
            f"<h2>{escape(self.title)}</h2>\n{note}<div class=frame><table>\n"
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>\n"
        )

    def _kind(self, column: int, item: Item | None = None) -> str:
        side = " class=text" if column < self.num_text_columns else ""
        if item is None or item.strength is None:
            return side
        return f'{side} style="background:{_shade(item.strength)}"'


def _markdown_row(entries: Sequence[str]) -> str:
    return "| " + " | ".join(entry.replace("|", "\\|") for entry in entries) + " |"


def _html_text(item: Item) -> str:
    return f"<b>{escape(item.text)}</b>" if item.is_best else escape(item.text)


def _shade(strength: float) -> str:
    """From white (0) to a blue on which black text stays readable (1)."""
    strength = min(1.0, max(0.0, strength))
    return "#" + "".join(f"{round(255 + strength * (end - 255)):02x}" for end in (150, 197, 235))
