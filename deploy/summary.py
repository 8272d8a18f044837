"""The summary of a CI job: the report in Markdown, never larger than a job summary may be.

GitHub drops a step's summary above 1,024 KiB without a word of what was in it, so ours stays under 900.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from deploy import report

MOST_BYTES = 900 * 1024
LIMITS = ((2000, 400), *report.MARKDOWN_LIMITS)  # most rows of a table, most characters of a text
FENCE = re.compile(r"`{3,}")
NOTICE = "_Cut here, {} lines before its end, to fit a job summary; report.html has all of it._\n"


def render(results: Mapping[str, Any], most: int = MOST_BYTES) -> str:
    """The report of results.json with all its tables, in at most ``most`` bytes.

    Raises MeasureError when the results were written in another version of the format.
    """
    return cut(report.render_markdown(results, LIMITS, most), most)


def failed(lines: Sequence[str], exit_code: int, most: int = MOST_BYTES) -> str:
    """What a run that ended before its report leaves: the lines it said, and its exit code."""
    said = report.fenced("\n".join(lines) or "no message")
    return cut(
        f"# Compression: ERROR\n\nEnded with exit code {exit_code}, nothing was judged.\n\n{said}\n", most
    )


def unfinished(stages: Sequence[tuple[str, str]]) -> str:
    """What a run that was asked to stop before its report leaves: stages with their status."""
    rows = "".join(f"| {name} | {status} |\n" for name, status in stages)
    return f"# Compression: not judged yet\n\n| Stage | Status |\n| --- | --- |\n{rows}"


def cut(markdown: str, most: int) -> str:
    """``markdown`` in at most ``most`` bytes: whole lines from its start, then a line that says so.

    A table is cut between two of its rows; a code block that does not fit is left out, a folded part closed.
    """
    if len(markdown.encode()) <= most:
        return markdown
    lines, closing = markdown.split("\n"), "\n\n</details>"
    room = most - len(NOTICE.encode()) - 12 - len(closing) * markdown.count("<details>")
    kept = _whole_lines(lines, room)
    text = "\n".join(lines[:kept])
    open_parts = text.count("<details>") - text.count("</details>")
    return f"{text}{closing * open_parts}\n\n{NOTICE.format(f'{len(lines) - kept:,}')}"


def _whole_lines(lines: Sequence[str], room: int) -> int:
    """How many lines fit into ``room`` bytes and end outside of a code block."""
    size, whole, fence = 0, 0, ""
    for number, line in enumerate(lines, start=1):
        size += len(line.encode()) + 1
        if size > room:
            break
        found = FENCE.match(line)
        if found and not fence:
            fence = found[0]
        elif fence and line.rstrip() == fence:
            fence = ""
        whole = whole if fence else number
    return whole
