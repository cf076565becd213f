import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

COMPILE = """
import sys
if "early" in sys.argv:
    import jax
from jaxear.command import run_command

def command():
    import jax, jax.numpy as jnp
    from jaxear.errors import UserError
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    print(jax.jit(lambda x: x + 1)(jnp.float32(1)), jax.config.jax_compilation_cache_dir)

sys.exit(run_command(command))
"""


def start(home, *arguments, **variables):
    """What a command that compiles one program prints, on stdout and on stderr."""
    inherited = {name: v for name, v in os.environ.items() if not name.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, *arguments],
        env={**inherited, "HOME": str(home), "JAX_PLATFORMS": "cpu", **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), done.stderr


@pytest.mark.parametrize("imported", ["early", "late"])
def test_programs_are_kept_and_damaged_ones_are_compiled_again(tmp_path, imported):
    folder = tmp_path / ".cache" / "jaxear" / "jax"
    assert start(tmp_path, imported) == (f"2.0 {folder}", "")
    (entry,) = (path for path in folder.glob("*-cache") if "lambda" in path.name)
    if imported == "early":
        entry.write_bytes(entry.read_bytes()[:100])
        out, errors = start(tmp_path, imported)
        assert out == f"2.0 {folder}"
        assert "Error reading persistent compilation cache entry" in errors


def test_a_command_runs_where_nothing_can_be_kept_and_jax_s_own_settings_go_before(tmp_path):
    (tmp_path / ".cache").write_text("a file where the folder would be")
    out, errors = start(tmp_path)
    assert out == "2.0 None"
    assert "Compiled programs are not kept" in errors
    assert start(tmp_path, JAX_ENABLE_COMPILATION_CACHE="false") == ("2.0 None", "")
