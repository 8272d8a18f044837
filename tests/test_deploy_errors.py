"""One line per error, with its exit code and without control characters."""

from __future__ import annotations

import pytest

from deploy.errors import ArtifactError, DeployError, ExportError, MeasureError, RunnerError


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (("broke",), "broke"),
        (("broke", "here"), "here: broke"),
        (("broke", "", "mend it"), "broke; mend it"),
        (("broke", "here", "mend it"), "here: broke; mend it"),
        (("two\n  lines\r\n", "a\tb", "\x1b[31mred\u202e"), "a\\tb: two lines; \\x1b[31mred\\u202e"),
    ],
)
def test_text(arguments: tuple[str, ...], text: str) -> None:
    assert str(DeployError(*arguments)) == text


def test_exit_codes() -> None:
    classes = DeployError, MeasureError, ExportError, RunnerError, ArtifactError
    assert [one.exit_code for one in classes] == [1, 3, 4, 6, 8]
