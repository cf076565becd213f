"""Prepare many small photographs, some of them odd or damaged, and measure speed and memory.

    python scripts/bench_data.py --files 2000 --out bench.json
    python scripts/bench_data.py --data photographs/

Writes --files pictures of 160x200 into a temporary folder, one in a hundred of a kind that breaks
careless programs; runs `jaxear data prepare` on them in a process of its own; checks that every
picture came out upright and every file that is none was listed; and times preparation
(`prepare_store`: decode, resize to 128x128, hash, write, sync) against loops that only decode. With
--data it only does the latter, on the photographs in a folder of your own. The loops are
    decode          PIL.Image.open, load, convert to RGB
    draft           the same after PIL's draft(), as preparation does it: a JPEG of more than six
                    times the size wanted is decoded at a half, a quarter or an eighth
    decode_resize   decode, then PIL's bicubic resize to 128 pixels and numpy.asarray
    decode_write    decode, and write and sync as many bytes as preparation; what memory for them
                    costs depends much on the machine
in as many threads of the same kind of pool, each handed 16 files at a time as in preparation. Each
is timed right after preparation of the same files, in turns; the figures are medians of the turns,
and shares medians of the ratios of two that followed each other.
"""

from __future__ import annotations

from jaxear.process_memory import restart_to_keep_memory

if __name__ == "__main__":
    restart_to_keep_memory()  # as `jaxear data prepare` does

import argparse
import json
import os
import resource
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from jaxear.data.images import DRAFT_GAP, to_square
from jaxear.data.records import Record
from jaxear.data.sources import data_root, load_records
from jaxear.data.store import Settings, open_store, prepare_store

SIZE = (160, 200)
SIDE = 128
NOISE = 10


def pattern(number: int, scale: int) -> Image.Image:
    """A picture of its own, which no turn or mirroring leaves as it is, with as much noise as makes
    its JPEG about as many bytes a pixel as those of the AMI ears have (0.4).
    """
    rng = np.random.default_rng(number)
    colours = rng.integers(40, 216, (5, 4, 3), np.uint8)
    colours[0, 0] = 240  # the brightest corner is at the top left
    smooth = np.asarray(
        Image.fromarray(colours).resize(
            (scale * SIZE[0], scale * SIZE[1]), Image.Resampling.BICUBIC
        )
    )
    noise = rng.integers(-NOISE, NOISE + 1, (*smooth.shape[:2], 1), np.int16)
    return Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))


def jpeg(picture: Image.Image, path: Path, **options: Any) -> None:
    picture.save(path, "JPEG", quality=90, **options)


def turned(picture: Image.Image, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be seen, turn it by 90 degrees clockwise
    jpeg(picture.transpose(Image.Transpose.ROTATE_90), path, exif=exif)


def sixteen_bits(picture: Image.Image, path: Path) -> None:
    Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257).save(path, "PNG")


def animated(picture: Image.Image, path: Path) -> None:
    other = Image.new("RGB", picture.size)
    picture.save(path, "WEBP", save_all=True, append_images=[other], quality=90)


def truncated(picture: Image.Image, path: Path) -> None:
    jpeg(picture, path)
    os.truncate(path, path.stat().st_size // 2)


def huge(picture: Image.Image, path: Path) -> None:
    def chunk(name: bytes, data: bytes) -> bytes:
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes((20_000 // 8 + 1) * 20_000), 9)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


Writer = Callable[[Image.Image, Path], None]
ODD: dict[str, tuple[str, Writer]] = {
    "CMYK": ("jpg", lambda p, path: jpeg(p.convert("CMYK"), path)),
    "16 bits": ("png", sixteen_bits),
    "alpha": ("png", lambda p, path: p.convert("RGBA").save(path)),
    "turned": ("jpg", turned),
    "palette": ("png", lambda p, path: p.quantize(256).save(path)),
    "animated": ("webp", animated),
}
BAD: dict[str, tuple[str, Writer]] = {
    "truncated": ("jpg", truncated),
    "empty": ("jpg", lambda p, path: path.touch()),
    "text": ("jpg", lambda p, path: path.write_text("404 Not Found") and None),
    "1x1": ("png", lambda p, path: p.resize((1, 1)).save(path)),
    "20,000x20,000": ("png", huge),
}


def write_files(folder: Path, n: int, workers: int, scale: int) -> dict[str, tuple[str, int]]:
    """Files and, by name, the kind and the number of each; one in a hundred is odd or bad."""
    kinds = {**ODD, **BAD}
    files = {}

    def write(number: int) -> None:
        kind = "plain"
        suffix, writer = "jpg", jpeg
        if number % 100 == 0:
            kind = list(kinds)[number // 100 % len(kinds)]
            suffix, writer = kinds[kind]
        path = folder / f"{number // 100:04}" / f"{number:06}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        writer(pattern(number, scale), path)
        files[path.relative_to(folder).as_posix()] = (kind, number)

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(write, range(n)))
    return files


def check(
    cache: Path, folder: Path, files: dict[str, tuple[str, int]], scale: int
) -> dict[str, Any]:
    """How many of each kind were prepared and how many were refused, and what is wrong."""
    store = open_store(cache)
    kept: Counter[str] = Counter()
    refused: Counter[str] = Counter()
    reasons, wrong = {}, []
    for record, found in zip(store.records, store.found, strict=True):
        name = record.path.relative_to(folder).as_posix()
        kind, number = files.pop(name)
        if isinstance(found, str):
            refused[kind] += 1
            reasons[kind] = found
        else:
            kept[kind] += 1
            picture = (
                pattern(number, scale).convert("L" if kind == "16 bits" else "RGB").convert("RGB")
            )
            expected = to_square(np.asarray(picture), SIDE).astype(int)
            if np.abs(store.pixels[found] - expected).mean() > 8:
                wrong.append(f"{name} ({kind}) came out otherwise")
        if isinstance(found, str) != (kind in BAD):
            wrong.append(f"{name} ({kind}): {found}")
    wrong += [f"{name} is missing" for name in files]
    return {"kept": dict(kept), "refused": dict(refused), "reasons": reasons, "wrong": wrong}


def decode_all(
    paths: list[Path],
    workers: int,
    *,
    draft: bool = False,
    resize: bool = False,
    write: bool = False,
) -> None:
    """The least that can be done with Pillow, in threads."""

    def decode(some: list[Path]) -> bytes:
        for path in some:
            with Image.open(path) as image:
                if draft:
                    image.draft(None, (DRAFT_GAP * SIDE, DRAFT_GAP * SIDE))
                image.load()
                picture = image.convert("RGB")
            if resize:
                scale = SIDE / max(picture.size)
                size = round(scale * picture.width), round(scale * picture.height)
                np.asarray(picture.resize(size, Image.Resampling.BICUBIC))
        return bytes(len(some) * SIDE * SIDE * 3) if write else b""

    with ThreadPoolExecutor(workers) as pool, tempfile.TemporaryFile() as file:
        for pictures in pool.map(decode, [paths[i : i + 16] for i in range(0, len(paths), 16)]):
            file.write(pictures)
        if write:
            os.fsync(file.fileno())


Seconds = tuple[float, float]  # on the wall's clock, and of the processor

LOOPS: dict[str, dict[str, bool]] = {
    "decode": {},
    "draft": {"draft": True},
    "decode_resize": {"resize": True},
    "decode_write": {"write": True},
}


def compare(folder: Path, records: list[Record], workers: int, turns: int) -> dict[str, float]:
    """Images per second of preparing and of each loop, and the first's share of the others: of
    wall-clock time, and (`cpu_share_of_...`) of the processor time of all threads, which says more
    on a machine that others use as well."""
    paths = [record.path for record in records]
    pairs: dict[str, list[tuple[Seconds, Seconds]]] = {name: [] for name in LOOPS}
    for turn in range(turns + 1):
        for name, options in LOOPS.items():
            with tempfile.TemporaryDirectory() as cache:
                prepared = timed(
                    prepare_store, cache, records, folder, Settings(SIDE), workers=workers
                )
            looped = timed(decode_all, paths, workers, **options)
            if turn:  # the first fills the disk's cache
                pairs[name].append((prepared, looped))
    walls = [prepared[0] for some in pairs.values() for prepared, _ in some]
    result = {"prepare": len(paths) / statistics.median(walls)}
    for name, some in pairs.items():
        result[name] = len(paths) / statistics.median(looped[0] for _, looped in some)
        for i, share in enumerate(("share_of", "cpu_share_of")):
            result[f"{share}_{name}"] = statistics.median(b[i] / a[i] for a, b in some)
    return result


def timed(work: Callable[..., Any], *args: Any, **options: Any) -> Seconds:
    start = time.perf_counter(), time.process_time()
    work(*args, **options)
    return time.perf_counter() - start[0], time.process_time() - start[1]


def show_speed(result: dict[str, Any]) -> str:
    loops = "; ".join(
        f"{name} {result[name]:.0f} (share {result[f'share_of_{name}']:.2f}, of processor time "
        f"{result[f'cpu_share_of_{name}']:.2f})"
        for name in LOOPS
    )
    return f"images/s: prepare {result['prepare']:.0f}; {loops}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=2000, help="how many files (default 2000)")
    parser.add_argument("--scale", type=int, default=1, help="pictures so many times as wide")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="threads")
    parser.add_argument("--compared", type=int, default=1000, help="files that are timed")
    parser.add_argument("--turns", type=int, default=5, help="times that each of both is timed")
    parser.add_argument("--data", help="only time the photographs in this folder")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    options = parser.parse_args()
    if options.data:
        records = load_records(options.data)
        result = compare(data_root(options.data), records, options.workers, options.turns)
        finish(options, result, show_speed(result))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder, cache = Path(temporary, "photographs"), Path(temporary, "prepared")
        folder.mkdir()
        files = write_files(folder, options.files, options.workers, options.scale)
        start = time.perf_counter()
        command = [sys.executable, "-m", "jaxear.data", "prepare", str(folder)]
        command += ["--out", str(cache), "--workers", str(options.workers)]
        subprocess.run(command, check=True)
        result: dict[str, Any] = {
            "files": options.files,
            "size": [options.scale * side for side in SIZE],
            "workers": options.workers,
            "seconds": time.perf_counter() - start,
            "peak_mb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024,
        }
        plain = [r for r in load_records(folder) if int(r.path.stem) % 100]
        result |= compare(folder, plain[: options.compared], options.workers, options.turns)
        result |= check(cache, folder, files, options.scale)
    table = Table("kind", "kept", "refused", "reason")
    for kind in ("plain", *ODD, *BAD):
        counts = (str(result[what].get(kind, 0)) for what in ("kept", "refused"))
        table.add_row(kind, *counts, result["reasons"].get(kind, ""))
    Console().print(table)
    finish(
        options,
        result,
        f"{result['seconds']:.1f} s and {result['peak_mb']:.0f} MB at most, with Python's start; "
        + show_speed(result),
    )
    if result["wrong"]:
        sys.exit("\n".join(result["wrong"][:20]))


def finish(options: argparse.Namespace, result: dict[str, Any], summary: str) -> None:
    print(summary)
    if options.out:
        options.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
