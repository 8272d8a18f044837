"""JUnit XML for a CI server: one test case per gate, and one for what ended a run early.

An inconclusive gate is a failure of type "inconclusive": it is no permission to ship. Standard library only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from xml.sax.saxutils import escape, quoteattr

from deploy.tables import gate_label, gate_verdict
from deploy.values import rows, section, text, visible

SUITE = "compress"


def render(results: Mapping[str, Any]) -> str:
    """The gates of results.json as a JUnit document; a skipped case when none was judged."""
    cases = [_gate(row) for row in rows(results, "gates")]
    if not cases:
        cases = [_case("gates", '<skipped message="no gate was judged"/>')]
    named = section(results, "model").get("name")
    return _document(
        cases, {"model": text(named, "unknown"), "verdict": text(results.get("verdict"), "none")}
    )


def failed(lines: Sequence[str], exit_code: int) -> str:
    """The document of a run that ended before its gates: one case, an error with the lines that were said."""
    said = "\n".join(lines) or "no message"
    attributes = (
        f"message={_attribute(lines[0] if lines else said)} type={_attribute(f'exit code {exit_code}')}"
    )
    return _document([_case("run", f"<error {attributes}>{_content(said)}</error>")], {})


def _gate(row: Mapping[str, Any]) -> str:
    verdict, said = gate_verdict(row), text(row.get("message"), "no message")
    inside = f"<system-out>{_content(said)}</system-out>"
    if verdict != "pass":
        inside = f"<failure message={_attribute(said)} type={_attribute(verdict)}>{_content(said)}</failure>"
    return _case(gate_label(row), inside)


def _case(name: str, inside: str) -> str:
    return f'    <testcase classname="{SUITE}.gates" name={_attribute(name)}>{inside}</testcase>\n'


def _document(cases: Sequence[str], properties: Mapping[str, str]) -> str:
    body = "".join(cases)
    counts = f'tests="{len(cases)}" failures="{body.count("<failure ")}" '
    counts += f'errors="{body.count("<error ")}" skipped="{body.count("<skipped ")}"'
    listed = "".join(
        f"      <property name={_attribute(name)} value={_attribute(value)}/>\n"
        for name, value in properties.items()
    )
    listed = f"    <properties>\n{listed}    </properties>\n" if listed else ""
    suite = f'  <testsuite name="{SUITE}" {counts}>\n{listed}{body}  </testsuite>\n'
    head = '<?xml version="1.0" encoding="UTF-8"?>\n'
    return f'{head}<testsuites name="{SUITE}" {counts}>\n{suite}</testsuites>\n'


def _attribute(said: str) -> str:
    return quoteattr(visible(said))


def _content(said: str) -> str:
    """Text between tags; what XML cannot hold at all (control characters) becomes its escape."""
    return escape("\n".join(visible(line) for line in said.split("\n")))
