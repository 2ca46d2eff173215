"""The rows of a report in words; without PyTorch, whose import takes longer than a page of them."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def tables(rows: list[Row]) -> str:
    """All sections in Markdown: a line for each row, a column for each number or word in them."""
    parts = []
    for section in dict.fromkeys(row["section"] for row in rows):
        mine = [row for row in rows if row["section"] == section]
        columns = list(dict.fromkeys(key for row in mine for key in row if _shown(key, row[key])))
        lines = [f"\n**{section}**\n", f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
        for row in mine:
            lines.append(f"| {' | '.join([row['name'], *(text(row.get(c)) for c in columns)])} |")
        parts.append("\n".join(lines))
    return "\n".join(parts)


def brief(result: Row) -> str:
    """A row in a line."""
    return ", ".join(f"{key} {text(value)}" for key, value in result.items() if _shown(key, value))


def _shown(key: str, value: Any) -> bool:
    return key not in ("section", "name") and isinstance(value, (bool, int, float, str))


def text(value: Any) -> str:
    """A value in a table."""
    if isinstance(value, bool):
        return "yes" if value else "**NO**"
    if isinstance(value, float):
        return f"{value:.1e}" if value and abs(value) < 0.01 else f"{value:.4g}"
    return "-" if value is None else str(value).replace("|", "/").replace("\n", " ")[:200]
