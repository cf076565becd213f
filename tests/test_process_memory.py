"""Programs that start themselves again to keep their memory."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxear import cli, process_memory

ROOT = Path(__file__).parents[1]
KEPT = ":".join(process_memory.KEPT)
KEPT_IN_HUGE_PAGES = f"{KEPT}:{process_memory.HUGE_PAGES}"
PROGRAM = """
import os, sys
from jaxear import process_memory
process_memory.tunables = lambda: "glibc.malloc.perturb=0"
print("started", flush=True)
process_memory.restart_to_keep_memory()
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


@pytest.mark.skipif(sys.platform != "linux", reason="memory is kept on Linux alone")
def test_a_program_is_started_once_more_with_its_arguments_in_the_same_process(tmp_path):
    lines, pid = run(tmp_path)
    assert lines == ["started"] * 2 + [f"glibc.malloc.perturb=0 {pid} ['--out', 'two words']"]


def test_tunables_of_the_user_are_left_alone(tmp_path):
    lines, pid = run(tmp_path, GLIBC_TUNABLES="")
    assert lines == ["started", f" {pid} ['--out', 'two words']"]


def test_the_command_asks_for_it_and_a_call_from_python_does_not(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(cli, "restart_to_keep_memory", lambda: asked.append(True))
    assert cli.main(["--version"]) == 0
    assert not asked
    monkeypatch.setattr(sys, "argv", ["jaxear", "--version"])
    assert cli.main() == 0
    assert asked


@pytest.mark.parametrize(
    ("library", "state", "platform", "expected"),
    [
        ("glibc 2.36", "always [madvise] never", "linux", KEPT_IN_HUGE_PAGES),
        ("glibc 2.35", "always [madvise] never", "linux", KEPT_IN_HUGE_PAGES),
        ("glibc 2.31", "always [madvise] never", "linux", ""),
        ("glibc 2.36", "[always] madvise never", "linux", KEPT),
        ("glibc 2.36", "always madvise [never]", "linux", KEPT),
        ("glibc 2.36", None, "linux", KEPT),
        ("glibc 2.36", "always [madvise] never", "darwin", ""),
        ("", "always [madvise] never", "linux", ""),
    ],
)
def test_what_is_asked_for_where(monkeypatch, tmp_path, library, state, platform, expected):
    file = tmp_path / "enabled"
    if state is not None:
        file.write_text(state)
    monkeypatch.setattr(process_memory, "_STATE", file)
    monkeypatch.setattr(process_memory.sys, "platform", platform)
    monkeypatch.setattr(
        process_memory.os, "confstr_names", {"CS_GNU_LIBC_VERSION": 2}, raising=False
    )
    monkeypatch.setattr(process_memory.os, "confstr", lambda name: library, raising=False)
    assert process_memory.tunables() == expected


MANY_LARGE_ARRAYS = """
import ctypes, resource
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE: pages are of 4 kB
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def allocate():
    bytes(bytearray(2**26))
allocate()
before = faults()
for _ in range(20):
    allocate()
print(faults() - before)
"""


@pytest.mark.skipif(not process_memory.tunables(), reason="glibc does not know the settings")
def test_what_is_freed_is_used_again():
    def faults(settings: str) -> int:
        environment = {**os.environ, "GLIBC_TUNABLES": settings}
        command = [sys.executable, "-c", MANY_LARGE_ARRAYS]
        return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    assert faults("") > 100_000
    assert faults(KEPT) < 1000


STEPS_OF_JAX = """
import ctypes, resource
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE: pages are of 4 kB
from jaxear.process_memory import keep_memory_of_jax
keep_memory_of_jax()
import jax, jax.numpy as jnp
step = jax.jit(lambda a, b: a @ b @ a)  # 100 MB in between
a, b = jnp.ones((5000, 2)), jnp.ones((2, 5000))
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
counts = [faults()]
for _ in range(15):
    step(a, b).block_until_ready()
    counts.append(faults())
print(sorted(after - before for before, after in zip(counts, counts[1:]))[7])
"""


@pytest.mark.skipif(not process_memory.tunables(), reason="glibc does not know the settings")
def test_what_a_step_of_jax_frees_the_next_uses_again():
    def faults(settings: str) -> int:
        environment = {**os.environ, "GLIBC_TUNABLES": settings, "PYTHONPATH": str(ROOT)}
        environment["JAX_PLATFORMS"] = "cpu"
        command = [sys.executable, "-c", STEPS_OF_JAX]
        return int(subprocess.run(command, env=environment, capture_output=True, check=True).stdout)

    assert faults("") > 20_000  # in the median; now and then the heap must still grow
    assert faults(process_memory.tunables()) < 1000


def test_other_programs_leave_jax_as_it_is(monkeypatch):
    changed = []
    monkeypatch.setattr(jax.config, "update", lambda *setting: changed.append(setting))
    monkeypatch.setattr(process_memory, "tunables", lambda: KEPT)
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    process_memory.keep_memory_of_jax()
    assert not changed
    monkeypatch.setenv("GLIBC_TUNABLES", KEPT)
    process_memory.keep_memory_of_jax()
    assert changed == [("jax_cpu_enable_async_dispatch", False)]
