"""Stores of prepared images: what is in them, what is done again, and what breaks none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxear import cli
from jaxear.config import DataConfig
from jaxear.data import load_records, prepare_image, store
from jaxear.data.decoding import read_file
from jaxear.data.pipeline import cache_folder, load_split
from jaxear.data.records import Record
from jaxear.data.store import Settings, is_store, open_store, prepare_store
from jaxear.errors import UserError
from tests.data.conftest import corner_picture, write_image

SETTINGS = Settings(16)
N = 12


@pytest.fixture
def photos(tmp_path) -> Path:
    """Twelve subjects with a picture each, of different greys."""
    for i in range(N):
        write_image(tmp_path / "photos" / f"{i:03}" / "a.png", (40, 40), (10 + 10 * i,) * 3)
    return tmp_path / "photos"


def prepare(photos: Path, cache: Path, **options) -> store.Store:
    return prepare_store(cache, load_records(photos), photos, SETTINGS, **options)


def grey(prepared: store.Store, i: int) -> int:
    row = prepared.found[i]
    assert isinstance(row, int)
    return int(prepared.pixels[row, 8, 8, 0])


@pytest.fixture
def decoded(monkeypatch):
    """The names of the folders of the files that are read to be decoded, as they are."""
    names: list[str] = []

    def spy(path):
        names.append(path.parent.name)
        return read_file(path)

    monkeypatch.setattr(store, "read_file", spy)
    return names


def tree(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_store_holds_what_prepare_image_makes(photos, tmp_path):
    prepared = prepare(photos, tmp_path / "cache")
    records = load_records(photos)
    assert prepared.records == records
    for record, row in zip(records, prepared.found, strict=True):
        expected = prepare_image(record, image_size=16, mirror_left=True)
        np.testing.assert_array_equal(prepared.pixels[row], expected)
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    first = manifest["records"][0]
    assert first["path"] == "000/a.png"
    assert first["size"] == records[0].path.stat().st_size
    assert len(first["sha256"]) == 64
    assert sorted(tree(tmp_path / "cache")) == [".lock", "images.u8", "manifest.json"]


def test_paths_are_relative_to_the_data(tmp_path):
    root = tmp_path / "photos"
    names = ["a.png", "sub/a.png", "sub/b.png", "../elsewhere/a.png"]
    records = [Record(write_image(root / name, (40, 40)), "s") for name in names]
    prepare_store(tmp_path / "cache", records, root, SETTINGS)
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    assert [entry["path"] for entry in manifest["records"]] == names


def test_records_are_the_same_when_a_store_is_opened_again(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(photos)
    prepared = prepare(Path("../photos"), tmp_path / "cache")
    assert prepared.records == open_store(tmp_path / "cache").records == load_records(photos)
    assert prepared.found == open_store(tmp_path / "cache").found == list(range(N))


def test_boxes_sides_and_views_come_back(tmp_path):
    Image.fromarray(corner_picture()).save(tmp_path / "x.png")
    (tmp_path / "list.csv").write_text(
        "path,subject,side,x,y,w,h,view\nx.png,a,left,0,0,30,20,front\nx.png,b,r,30,20,30,20,\n"
    )
    records = load_records(tmp_path / "list.csv")
    prepared = prepare_store(tmp_path / "cache", records, tmp_path.resolve(), SETTINGS)
    assert prepared.records == records
    colours = [prepared.pixels[row, 8, 8].tolist() for row in prepared.found]
    assert colours == [[220, 30, 30], [240, 240, 240]]


def test_pictures_are_mapped_and_only_those_asked_for_are_read(photos, tmp_path):
    config = DataConfig(
        data=str(photos), image_size=16, val_fraction=0.3, cache_dir=str(tmp_path / "c")
    )
    train = load_split(config, "train")
    assert isinstance(train.take(np.array([0])), np.ndarray)
    with (cache_folder(config) / "images.u8").open("r+b") as file:
        file.write(bytes([77]) * 16 * 16 * 3 * N)
    assert (train.take(np.array([1, 0])) == 77).all()  # the file is looked at, no copy of it
    assert (train.images == 77).all()
    assert train.images.shape == (len(train), 16, 16, 3)


def test_splits_are_those_of_memory(photos, tmp_path):
    (photos / "004" / "a.png").write_bytes(b"damaged")
    shares = {"val_fraction": 0.3, "test_fraction": 0.2, "max_bad": 0.5, "image_size": 16}
    for split in ("train", "val", "test", "all"):
        kept = load_split(DataConfig(str(photos), cache_dir=str(tmp_path / "c"), **shares), split)
        memory = load_split(DataConfig(str(photos), cache_dir="none", **shares), split)
        assert kept.records == memory.records
        assert kept.rejected == memory.rejected
        np.testing.assert_array_equal(kept.images, memory.images)
        np.testing.assert_array_equal(kept.take(np.arange(len(kept))[::-1]), memory.images[::-1])
    assert len(list((tmp_path / "c").iterdir())) == 1


def test_only_changed_and_new_files_are_decoded_again(photos, tmp_path, decoded):
    prepare(photos, tmp_path / "cache")
    assert len(decoded) == N
    reader = open_store(tmp_path / "cache")
    before = np.array(reader.pixels)
    decoded.clear()
    written = (tmp_path / "cache" / "manifest.json").stat().st_mtime_ns
    prepare(photos, tmp_path / "cache")
    assert decoded == []
    assert (tmp_path / "cache" / "manifest.json").stat().st_mtime_ns == written
    (photos / "011" / "a.png").unlink()
    prepare(photos, tmp_path / "cache")  # from now on nothing but the reader uses its picture
    write_image(photos / "003" / "a.png", (40, 40), (200,) * 3)
    write_image(photos / "003" / "b.png", (40, 40), (201,) * 3)
    after = prepare(photos, tmp_path / "cache")
    assert decoded == ["003", "003"]
    assert [record.path.parent.name for record in after.records].count("011") == 0
    expected = [10, 20, 30, 200, 201, 50, 60, 70, 80, 90, 100, 110]
    assert [grey(after, i) for i in range(N)] == expected
    np.testing.assert_array_equal(reader.pixels, before)  # who reads it is not disturbed


def test_a_file_that_changes_after_it_was_read_is_decoded_again(photos, tmp_path, monkeypatch):
    def read_and_change(path):
        found = read_file(path)
        if path.parent.name == "007":
            write_image(path, (40, 40), (222,) * 3)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(store, "read_file", read_and_change)
        assert grey(prepare(photos, tmp_path / "cache"), 7) == 80
    assert grey(prepare(photos, tmp_path / "cache"), 7) == 222


def test_a_file_that_went_bad_keeps_its_picture_and_is_tried_again(
    photos, tmp_path, decoded, caplog
):
    records = load_records(photos)
    first = prepare_store(tmp_path / "cache", records, photos, SETTINGS)
    (photos / "002" / "a.png").unlink()
    (photos / "005" / "a.png").write_bytes(b"damaged")
    again = prepare_store(tmp_path / "cache", records, photos, SETTINGS)
    assert again.found == first.found
    assert (
        "there is no such file; the picture that was prepared of it before is used" in caplog.text
    )
    decoded.clear()
    write_image(photos / "005" / "a.png", (40, 40), (250,) * 3)
    assert grey(prepare_store(tmp_path / "cache", records, photos, SETTINGS), 5) == 250
    assert decoded == ["002", "005"]


def test_files_may_vanish_while_a_run_reads(photos, tmp_path):
    config = DataConfig(data=str(photos), image_size=16, cache_dir=str(tmp_path / "c"))
    ears = load_split(config, "all")
    for record in ears.records:
        record.path.unlink()
    np.testing.assert_array_equal(ears.take(np.arange(N))[:, 8, 8, 0], 10 + 10 * np.arange(N))


def test_what_cannot_be_used_is_listed_with_its_reason(photos, tmp_path):
    (photos / "001" / "a.png").write_bytes(b"")
    (photos / "004" / "a.png").write_bytes(b"text")
    content = (photos / "007" / "a.png").read_bytes()
    (photos / "007" / "a.png").write_bytes(content[:50])
    write_image(photos / "008" / "a.png", (1, 1))
    reasons = {i: why for i, why in enumerate(prepare(photos, tmp_path / "c").found)
               if isinstance(why, str)}  # fmt: skip
    assert sorted(reasons) == [1, 4, 7, 8]
    assert reasons[1] == "the file is empty"
    assert reasons[4] == "not an image in a format that can be read"
    assert "too small" in reasons[8]
    config = DataConfig(str(tmp_path / "c"), image_size=16, max_bad=0.3)
    with pytest.raises(UserError, match="4 of 12 images"):
        load_split(config, "all")


def test_neither_threads_nor_tasks_change_a_store(photos, tmp_path, monkeypatch):
    for i in (0, 1, 4, 11):
        (photos / f"{i:03}" / "a.png").write_bytes(b"damaged")
    once: dict[str, bytes] | None = None
    for workers, task, chunk in ((1, 16, 2**24), (3, 2, 2**24), (4, 1, 1), (1, 5, 16 * 16 * 3 * 7)):
        monkeypatch.setattr(store, "_TASK", task)
        monkeypatch.setattr(store, "_CHUNK_BYTES", chunk)
        cache = tmp_path / f"{workers}-{task}"
        seen: list[tuple[int, int]] = []
        prepare(photos, cache, workers=workers, report=lambda *done, seen=seen: seen.append(done))
        assert seen[0] == (0, N)
        assert seen[-1] == (N, N)
        assert seen == sorted(seen)
        once = once or tree(cache)
        assert tree(cache) == once


def test_all_threads_have_some_of_a_few_photographs(photos, tmp_path, monkeypatch):
    both = threading.Barrier(2, timeout=30)  # which breaks where one thread reads two files alone

    def meet(path):
        both.wait()
        return read_file(path)

    monkeypatch.setattr(store, "read_file", meet)
    assert all(isinstance(row, int) for row in prepare(photos, tmp_path / "c", workers=2).found)


def test_no_more_is_begun_than_may_be_kept_in_memory():
    begun: list[int] = []
    with ThreadPoolExecutor(4) as pool:
        results = store._in_order(pool, lambda i: begun.append(i) or i, iter(range(20)), 3)
        for i in range(20):
            assert next(results) == i
            assert len(begun) <= i + 4
    assert sorted(begun) == list(range(20))


def test_the_command_does_not_wait_for_jax():
    code = "import sys, jaxear.data.__main__; sys.exit({'jax', 'grain'} & {*sys.modules} or 0)"
    subprocess.run([sys.executable, "-c", code], check=True)


SLOW = """
import sys, time
from pathlib import Path
from jaxear.data import load_records, prepare_image, store
photos, cache, pause = sys.argv[1:]
def slow(record, **settings):
    time.sleep(float(pause))
    return prepare_image(record, **settings)
store.prepare_image = slow
store._CHUNK_BYTES = 1
store.prepare_store(cache, load_records(photos), Path(photos), store.Settings(16), workers=1)
"""


def start(photos: Path, cache: Path, pause: float) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", SLOW, str(photos), str(cache), str(pause)])


def wait_for(what) -> None:
    deadline = time.monotonic() + 60
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_killed_preparation_is_gone_on_with(photos, tmp_path, decoded):
    cache = tmp_path / "cache"
    process = start(photos, cache, 0.2)
    journal = cache / "journal.jsonl"
    wait_for(lambda: journal.exists() and journal.read_text().count("\n") >= 5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (cache / "manifest.json").exists()
    assert is_store(cache)
    with pytest.raises(UserError, match="not finished"):
        open_store(cache)
    with journal.open("a") as file, (cache / "images.u8").open("ab") as pixels:
        file.write('{"path": "half a li')  # as if killed in the middle of writing
        pixels.write(b"half a picture")
    process = start(photos, cache, 0.2)
    wait_for(lambda: journal.read_text().count("\n") >= 7)
    process.send_signal(signal.SIGKILL)
    process.wait()
    prepare(photos, cache)
    assert 0 < len(decoded) <= N - 6
    prepare(photos, tmp_path / "whole")
    assert tree(cache) == tree(tmp_path / "whole")


def test_of_two_at_once_one_prepares_and_the_other_waits(photos, tmp_path, decoded):
    cache = tmp_path / "cache"
    process = start(photos, cache, 0.1)
    wait_for((cache / "journal.jsonl").exists)
    prepare(photos, cache)
    assert process.wait() == 0
    assert decoded == []
    prepare(photos, tmp_path / "whole")
    assert tree(cache) == tree(tmp_path / "whole")


def test_the_command_makes_a_store_that_load_split_reads(photos, tmp_path, capsys, decoded):
    cache = tmp_path / "prepared"
    arguments = ["data", "prepare", str(photos), "--out", str(cache), "--image-size", "24"]
    assert cli.main([*arguments, "--fit", "crop", "--workers", "2"]) == 0
    assert "12 images of 12 subjects" in capsys.readouterr().out
    os.rename(photos, tmp_path / "elsewhere")  # the photographs are needed no more
    ears = load_split(DataConfig(str(cache), image_size=24, fit="crop"), "all")
    np.testing.assert_array_equal(ears.images[:, 8, 8, 0], 10 + 10 * np.arange(N))
    with pytest.raises(UserError, match=r"image_size is 24, not 16; fit is crop.*--image-size 24"):
        load_split(DataConfig(str(cache), image_size=16), "all")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prepare", "DATA"], "out"),
        (["prepare", "nowhere", "--out", "x"], "no file or folder nowhere"),
        (["prepare", "DATA", "--out", "DATA"], "something else"),
        (["prepare", "DATA", "--out", "x", "--workers", "0"], "workers must be at least 1"),
        (["prepare", "DATA", "--out", "x", "--max-bad", "7"], "between 0 and 1"),
        (["prepare", "DATA", "--out", "x", "--box-margin", "-1"], "box-margin must be at least 0"),
        (["mend", "DATA", "--out", "x"], "mend"),
    ],
)
def test_mistakes_on_the_command_line(photos, tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    given = [str(photos) if argument == "DATA" else argument for argument in arguments]
    (photos / "011" / "a.png").write_bytes(b"damaged")
    assert cli.main(["data", *given]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_other_settings_and_damaged_stores_are_refused(photos, tmp_path):
    cache = tmp_path / "cache"
    prepare(photos, cache)
    with pytest.raises(UserError, match="image_size is 16, not 32"):
        prepare_store(cache, load_records(photos), photos, Settings(32))
    manifest = json.loads((cache / "manifest.json").read_text())
    for damage in (
        {"records": [manifest["records"][0] | {"row": N}]},
        {"records": [manifest["records"][0] | {"row": -1}]},
        {"records": [{"path": "x"}]},
        {"records": 3},
        {"settings": {"image_size": "large"}},
    ):
        (cache / "manifest.json").write_text(json.dumps(manifest | damage))
        with pytest.raises(UserError, match="damaged"):
            open_store(cache)
    (cache / "manifest.json").write_text(json.dumps(manifest)[:-9])
    with pytest.raises(UserError, match=r"manifest\.json cannot be read"):
        open_store(cache)


def test_paths_of_a_manifest_are_never_opened(photos, tmp_path):
    cache = tmp_path / "cache"
    prepare(photos, cache)
    manifest = json.loads((cache / "manifest.json").read_text())
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)  # opening it would wait for ever
    for entry in manifest["records"]:
        entry["path"] = "../../../../.." + str(pipe)
    manifest["records"][0]["path"] = str(pipe)
    (cache / "manifest.json").write_text(json.dumps(manifest))
    ears = load_split(DataConfig(str(cache), image_size=16), "train")
    assert len(ears.images) == len(ears)


def test_a_cache_that_cannot_be_written_is_an_error(photos, tmp_path):
    (tmp_path / "file").touch()
    config = DataConfig(str(photos), image_size=16, cache_dir=str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be kept in"):
        load_split(config, "all")


def test_real_photographs(ami, tmp_path):
    config = DataConfig(str(ami), image_size=64, cache_dir=str(tmp_path))
    ears = load_split(config, "all")
    assert len(ears) == 700
    assert not ears.rejected
    expected = prepare_image(ears.records[0], image_size=64, mirror_left=True)
    np.testing.assert_array_equal(ears.take(np.array([0]))[0], expected)
