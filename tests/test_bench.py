import io
import os
import time
from importlib import import_module
from importlib.util import find_spec

import pytest
from rich.console import Console

from scripts.bench import GROUPS, _until, as_table
from scripts.benchmarks.networks import random_leaves, sam_in_jax, sam_shapes
from scripts.benchmarks.timing import Plan, Row, alternate, largest_difference, random_images
from scripts.benchmarks.torch_process import OUTPUT, torch_process


def test_contenders_take_turns_after_a_warm_up_each():
    calls = []
    names = ("jaxear", "torch")
    contenders = {name: lambda n=name: calls.append(n) for name in names}
    slow = Plan(turns=3, seconds=0.0)  # no time is left after the least turns
    seconds = alternate(slow, contenders)
    assert calls == list(names) * 4
    assert [len(seconds[name]) for name in names] == [3, 3]
    calls.clear()
    seconds = alternate(Plan(turns=3, most_turns=5), contenders, warm_up=False)
    assert calls == list(names) * 5


def test_ratios_are_taken_turn_by_turn():
    row = Row("x", {"jaxear": [1.0, 2.0, 1.0], "torch": [3.0, 4.0, 1.0]}, images=8)
    assert row.ratio("torch") == (2.0, 1.0, 3.0)
    assert row.as_json()["images_per_second"] == {"jaxear": 8.0, "torch": 8 / 3}


def test_what_is_missing_or_too_late_says_so():
    def rows():
        yield Row("first")
        raise ImportError("No module named 'torch'")

    def until(end):
        return list(_until(end, rows, lambda why: Row("group", missing=why)))

    first, second = until(time.perf_counter() + 60)
    assert (first.name, second.missing) == ("first", "No module named 'torch'")
    (late,) = until(time.perf_counter() - 1)
    assert "--minutes" in late.missing


def test_torch_runs_in_a_process_of_its_own():
    plan = Plan(smoke=True)
    settings = dict(os.environ)
    torch = torch_process(plan)
    assert dict(os.environ) == settings
    if find_spec("torch") is None:
        with pytest.raises(ImportError, match="torch"):
            torch.make("sam", plan, 32, 2, False)
        return
    contenders, notes = torch.make("sam", plan, 32, 2, False)
    assert not notes
    ours = sam_in_jax(plan, 32, random_leaves(sam_shapes(plan, 32)))(random_images(2, 32))
    assert largest_difference(ours, contenders.pop(OUTPUT)()) < 1e-5
    assert list(contenders) == ["torch"]
    assert contenders["torch"]() is None
    with pytest.raises(RuntimeError, match=r"torch: AttributeError.*no_such_thing"):
        torch.make("no_such_thing")


@pytest.mark.parametrize("slowdown", [2.9, 3.0])
@pytest.mark.parametrize("backward", [False, True])
def test_bfloat16_is_left_out_where_it_takes_too_long(slowdown, backward, monkeypatch):
    pytest.importorskip("torch")
    in_torch = import_module("scripts.benchmarks.in_torch")
    plan = Plan(smoke=True)
    assert in_torch._slowdown_of_bfloat16(plan, 32, 8) > 0
    monkeypatch.setattr(in_torch, "_slowdown_of_bfloat16", lambda *_: slowdown)
    contenders, notes = in_torch.sam(plan, 32, 8, backward)
    assert ("torch bf16" in contenders) == (slowdown < 3)
    assert ("takes 3 times as long" in notes.get("torch bf16", "")) == (slowdown >= 3)

    def failing(*_):
        raise RuntimeError("not implemented for 'BFloat16'")

    monkeypatch.setattr(in_torch, "_slowdown_of_bfloat16", failing)
    contenders, notes = in_torch.sam(plan, 32, 8, backward)
    assert "torch bf16" not in contenders
    assert notes["torch bf16"] == "RuntimeError: not implemented for 'BFloat16'"


def test_the_table_shows_ratios_and_what_is_missing():
    facts = {"peak_bytes": 2e9, "torch bf16": "TooSlowError: not timed"}
    row = Row("SAM", {"jaxear": [0.1], "torch": [0.25]}, facts=facts)
    report = {
        "device": "cpu",
        "matmul_peak_flops_per_second": {"float32": 1e11},
        "rows": {"sam": [row.as_json()], "timm": [Row("timm", missing="not here").as_json()]},
    }
    console = Console(file=io.StringIO(), width=160)
    console.print(as_table(report))
    shown = console.file.getvalue()
    for words in ("2.50 (2.50 to 2.50)", "100 ms", "2.00 GB", "not here", "0.10 TFLOP/s"):
        assert words in shown
    assert "torch bf16: TooSlowError: not timed" in shown


def test_every_group_of_rows_exists():
    for where in GROUPS.values():
        module, function = where.split(".")
        assert callable(getattr(import_module(f"scripts.benchmarks.{module}"), function))
