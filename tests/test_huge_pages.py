"""Programs that start themselves again to get huge pages."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxear import cli, huge_pages

ROOT = Path(__file__).parents[1]
PROGRAM = """
import os, sys
from jaxear import huge_pages
huge_pages._can_be_asked_for = lambda: True
print("started", flush=True)
huge_pages.restart_with_huge_pages()
print(os.environ["GLIBC_TUNABLES"], os.getpid(), sys.argv[1:])
"""


def run(tmp_path, **environment):
    inherited = {name: v for name, v in os.environ.items() if name != "GLIBC_TUNABLES"}
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    with subprocess.Popen(
        [sys.executable, str(program), "--out", "two words"],
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        return process.communicate()[0].splitlines(), process.pid


@pytest.mark.skipif(sys.platform != "linux", reason="huge pages are asked for on Linux alone")
def test_a_program_is_started_once_more_with_its_arguments_in_the_same_process(tmp_path):
    lines, pid = run(tmp_path)
    assert lines == ["started"] * 2 + [f"{huge_pages.TUNABLE} {pid} ['--out', 'two words']"]


def test_tunables_of_the_user_are_left_alone(tmp_path):
    lines, pid = run(tmp_path, GLIBC_TUNABLES="")
    assert lines == ["started", f" {pid} ['--out', 'two words']"]


def test_the_command_asks_for_them_and_a_call_from_python_does_not(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(cli, "restart_with_huge_pages", lambda: asked.append(True))
    assert cli.main(["--version"]) == 0
    assert not asked
    monkeypatch.setattr(sys, "argv", ["jaxear", "--version"])
    assert cli.main() == 0
    assert asked


@pytest.mark.parametrize(
    ("library", "state", "platform", "expected"),
    [
        ("glibc 2.36", "always [madvise] never", "linux", True),
        ("glibc 2.35", "always [madvise] never", "linux", True),
        ("glibc 2.31", "always [madvise] never", "linux", False),
        ("glibc 2.36", "[always] madvise never", "linux", False),
        ("glibc 2.36", "always madvise [never]", "linux", False),
        ("glibc 2.36", None, "linux", False),
        ("glibc 2.36", "always [madvise] never", "darwin", False),
        ("", "always [madvise] never", "linux", False),
    ],
)
def test_where_they_are_asked_for(monkeypatch, tmp_path, library, state, platform, expected):
    file = tmp_path / "enabled"
    if state is not None:
        file.write_text(state)
    monkeypatch.setattr(huge_pages, "_STATE", file)
    monkeypatch.setattr(huge_pages.sys, "platform", platform)
    monkeypatch.setattr(huge_pages.os, "confstr_names", {"CS_GNU_LIBC_VERSION": 2}, raising=False)
    monkeypatch.setattr(huge_pages.os, "confstr", lambda name: library, raising=False)
    assert huge_pages._can_be_asked_for() is expected
