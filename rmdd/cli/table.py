"""Tables that stay readable on narrow consoles."""

from collections.abc import Iterator
from typing import Any

from rich.console import Console, ConsoleOptions
from rich.table import Column, Table
from rich.text import Text


class FittedTable(Table):
    """A table of Rich. On a console that is too narrow for it, its columns become rows, or each row becomes a list."""

    def __init__(self, *headers: Column | str, most: int | None = None, **options: Any):
        """Create a table; a table with `most` is `most` characters wide, or as wide as a console that has fewer."""
        super().__init__(*headers, expand=most is not None, **options)
        self.most = most

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Any]:
        if self.most is not None:
            options = options.update(max_width=min(options.max_width, self.most))
        for turn in (False, True):
            table = self._turned() if turn else self
            if _least_width(table) <= options.max_width:
                yield from Table.__rich_console__(table, console, options)
                return
        yield from self._lists()

    def _turned(self) -> Table:
        """Return a table with a row for each column of this table, and a column for each row."""
        first, *others = ([column.header, *column.cells] for column in self.columns)
        turned = Table(title=self.title, caption=self.caption, caption_justify=self.caption_justify, box=self.box)
        turned.add_column(first[0])
        for title, row in zip(first[1:], self.rows, strict=True):
            turned.add_column(title, style=row.style, justify=self.columns[-1].justify)
        for cells in others:
            turned.add_row(*cells)
        return turned

    def _lists(self) -> Iterator[Text | Table | str]:
        """Yield a list of the cells of each row, each cell after the title of its column."""
        yield from [_text(self.title)] if self.title else []
        for cells in zip(*(column.cells for column in self.columns), strict=True):
            grid = Table.grid(padding=(0, 2))
            for column, cell in zip(self.columns, cells, strict=True):
                if _text(cell):
                    grid.add_row(_text(column.header), _text(cell))
            yield grid
            yield ""
        yield from [_text(self.caption)] if self.caption else []


def _text(cell: Any) -> Text:
    return cell if isinstance(cell, Text) else Text(str(cell))


def _least_width(table: Table) -> int:
    """Return the width in characters that a table needs to show every word whole, or half of it if it may be folded."""
    widths = []
    for column in table.columns:
        texts = [str(cell) for cell in (column.header, *column.cells)]
        parts = [part for text in texts for part in (text.splitlines() if column.no_wrap else text.split())]
        longest = max(map(len, parts), default=0)
        widths.append(longest // 2 if column.overflow == "fold" else longest)
    return sum(widths) + 3 * len(widths) + 1  # each column has two spaces of padding and one border
