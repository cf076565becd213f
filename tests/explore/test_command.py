"""`jaxear explore`: what it refuses before any page is there."""

import socket
import sys

import pytest

from jaxear.cli import main as jaxear
from jaxear.explore.__main__ import main

# Gradio makes an event loop that it never closes.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed:ResourceWarning")


def test_help(capsys):
    with pytest.raises(SystemExit) as caught:
        jaxear(["explore", "--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for flag in ("--run", "--host", "--port", "--ears", "--no_browser"):
        assert flag in text


@pytest.mark.parametrize("missing", ["gradio", "fastapi"])
def test_without_gradio_it_says_how_to_get_it(monkeypatch, capsys, missing):
    for name in ("jaxear.explore.server", "jaxear.explore.page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, missing, None)
    assert main(["--run", "runs/none"]) == 2
    assert "pip install 'jaxear[explore]'" in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path, capsys):
    pytest.importorskip("gradio", reason="needs the `explore` extra")
    assert main(["--run", str(tmp_path), "--port", "0"]) == 2
    assert "is not a run" in capsys.readouterr().err


def test_a_port_in_use_is_refused_before_anything_is_loaded(tmp_path, capsys):
    pytest.importorskip("gradio", reason="needs the `explore` extra")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["--run", str(tmp_path), "--port", str(port)]) == 2
    error = capsys.readouterr().err
    assert f"port {port}: Address already in use. Give another --port" in error
    assert main(["--run", str(tmp_path), "--port", "70000"]) == 2
    assert "70000" in capsys.readouterr().err
