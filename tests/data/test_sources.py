"""Every layout, written to disk as its data set has it; and lists that are damaged or hostile."""

from __future__ import annotations

import json
import logging
import os
import pickle
from pathlib import Path

import numpy as np
import pytest

from jaxear.data.sources import LAYOUTS, Record, load_records
from jaxear.errors import UserError
from tests.data.conftest import write_image


def images(folder: Path, *names: str) -> Path:
    for name in names:
        write_image(folder / name)
    return folder


def facts(records: list[Record]) -> list[tuple]:
    return [(record.path.name, record.subject, record.side) for record in records]


# Folders


def test_ami(tmp_path):
    images(tmp_path, "subset-1/000_back_ear.jpg", "subset-1/000_zoom_ear.jpg", "001_left_ear.jpg")
    (tmp_path / "Readme.txt").write_text("not a picture")
    records = load_records(tmp_path)
    assert facts(records) == [
        ("001_left_ear.jpg", "001", "right"),  # the view is called left, the ear is the right one
        ("000_back_ear.jpg", "000", "left"),
        ("000_zoom_ear.jpg", "000", "right"),
    ]
    assert [record.view for record in records] == ["left", "back", "zoom"]


def test_iitd(tmp_path):
    images(tmp_path, "010_2.bmp", "010_1.bmp", "002_1.bmp")
    assert facts(load_records(tmp_path)) == [
        ("002_1.bmp", "002", "unknown"),
        ("010_1.bmp", "010", "unknown"),
        ("010_2.bmp", "010", "unknown"),
    ]


def test_awe_takes_the_side_from_the_annotations(tmp_path):
    images(tmp_path, "001/01.png", "001/02.png", "002/01.png")
    entry = {"accessories": 0, "hPitch": 1, "overlap": 0}
    data = {
        "01": {**entry, "file": "01.png", "d": "l"},
        "02": {**entry, "file": "02.png", "d": "r"},
    }
    (tmp_path / "001/annotations.json").write_text(json.dumps({"id": 1, "data": data}))
    assert facts(load_records(tmp_path)) == [
        ("01.png", "001", "left"),
        ("02.png", "001", "right"),
        ("01.png", "002", "unknown"),
    ]


def test_awe_with_other_annotations_says_that_sides_are_unknown(tmp_path, caplog):
    images(tmp_path, "001/01.png")
    (tmp_path / "001/annotations.json").write_text("[1, 2]")
    assert load_records(tmp_path)[0].side == "unknown"
    assert "sides unknown" in caplog.text


def test_earvn(tmp_path):
    images(tmp_path, "Images/001.ALI_HD/001 (1).jpg", "Images/002.Anna/002 (7).jpg")
    assert facts(load_records(tmp_path)) == [
        ("001 (1).jpg", "001.ALI_HD", "unknown"),
        ("002 (7).jpg", "002.Anna", "unknown"),
    ]


def test_plain_folder_with_a_folder_per_subject(tmp_path):
    images(tmp_path, "ann/a.jpg", "ann/b.PNG", "bob/left/c.webp", "bob/R/d.tif", "e.gif")
    images(tmp_path, ".hidden/x.jpg", "__MACOSX/y.jpg", "ann/._a.jpg")
    assert facts(load_records(tmp_path)) == [
        ("a.jpg", "ann", "unknown"),
        ("b.PNG", "ann", "unknown"),
        ("d.tif", "bob", "right"),
        ("c.webp", "bob", "left"),
        ("e.gif", "e.gif", "unknown"),
    ]


def test_files_of_a_single_folder_are_a_subject_each(tmp_path):
    images(tmp_path, "images/a.jpg", "images/b.jpg")
    assert facts(load_records(tmp_path)) == [
        ("a.jpg", "a.jpg", "unknown"),
        ("b.jpg", "b.jpg", "unknown"),
    ]


def test_mostly_one_layout_says_what_is_left_out(tmp_path, caplog):
    images(tmp_path, "000_up_ear.jpg", "000_down_ear.jpg", "overview.jpg")
    assert len(load_records(tmp_path)) == 2
    assert "read as ami; 1 of 3" in caplog.text
    assert "overview.jpg" in caplog.text


def test_ambiguous_folder_says_that_it_is_read_as_a_plain_one(tmp_path, caplog):
    images(tmp_path, "000_up_ear.jpg", "x.jpg", "y.jpg")
    assert len(load_records(tmp_path)) == 3
    assert "only 1 of 3 images are named like ami" in caplog.text


def test_one_clear_layout_says_nothing(tmp_path, caplog):
    images(tmp_path, "001_1.bmp", "001_2.bmp")
    with caplog.at_level(logging.WARNING):
        load_records(tmp_path)
    assert caplog.text == ""


def test_asking_for_a_layout_overrides_the_recognition(tmp_path):
    images(tmp_path, "000_up_ear.jpg", "x.jpg", "y.jpg")
    assert [record.subject for record in load_records(tmp_path, "ami")] == ["000"]
    assert len(load_records(tmp_path, "folder")) == 3
    with pytest.raises(UserError, match="iitd"):
        load_records(tmp_path, "iitd")
    with pytest.raises(UserError, match=r"unknown layout 'amy'.*earvn"):
        load_records(tmp_path, "amy")
    with pytest.raises(UserError, match="path of the file itself"):
        load_records(tmp_path, "csv")


def test_nothing_to_read(tmp_path):
    (tmp_path / "notes.txt").write_text("no pictures")
    with pytest.raises(UserError, match="no images in") as caught:
        load_records(tmp_path)
    assert all(name in str(caught.value) for name, entry in LAYOUTS.items() if not entry.is_list)
    with pytest.raises(UserError, match="there is no file or folder"):
        load_records(tmp_path / "missing")
    with pytest.raises(UserError, match="not a list of images"):
        load_records(tmp_path / "notes.txt")


# CSV


def write_csv(tmp_path: Path, text: str) -> Path:
    images(tmp_path, "img/a.jpg", "img/b.jpg")
    path = tmp_path / "ears.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_csv(tmp_path):
    text = "\ufeffside,path,subject,x,y,w,h\nL,img/b.jpg,s 1,1,2.5,10,20\n,img/a.jpg,s2,,,,\n"
    first, second = load_records(write_csv(tmp_path, text))
    assert first == Record(tmp_path / "img/a.jpg", "s2")
    assert second == Record(tmp_path / "img/b.jpg", "s 1", "left", (1, 2.5, 10, 20))


def test_csv_without_subjects_says_so(tmp_path, caplog):
    records = load_records(write_csv(tmp_path, "path,age\nimg/a.jpg,3\nimg/b.jpg,4\n"))
    assert [record.subject for record in records] == ["a.jpg", "b.jpg"]
    assert "no column subject" in caplog.text
    assert "columns not used: age" in caplog.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("img/a.jpg,s,left,1,2,3,", "line 3: the box"),
        ("img/a.jpg,s,left,1,2,3,four", "line 3: the box"),
        ("img/a.jpg,s,port,1,2,3,4", "line 3: side is 'port'"),
        (",s,left,1,2,3,4", "line 3: the path"),
        ("../../../../etc/passwd,s,,,,,", "line 3: .*outside the data root"),
        ("/etc/passwd,s,,,,,", "line 3: .*outside the data root"),
        ("img/../../other/a.jpg,s,,,,,", "line 3: .*outside the data root"),
        ("outside.jpg,s,,,,,", "line 3: .*outside the data root"),
        ("away/secret.jpg,s,,,,,", "line 3: .*outside the data root"),
        ("a\0b.jpg,s,,,,,", "ears.csv"),
    ],
)
def test_csv_line_that_cannot_be_used_is_named(tmp_path, row, message):
    root = tmp_path / "data"
    secret = write_image(tmp_path / "other/secret.jpg")
    path = write_csv(root, f"path,subject,side,x,y,w,h\nimg/b.jpg,s,,,,,\n{row}\n")
    (root / "outside.jpg").symlink_to(secret)
    (root / "away").symlink_to(secret.parent)
    with pytest.raises(UserError, match=message):
        load_records(path)


def test_csv_root_and_absolute_paths_inside_it(tmp_path):
    images(tmp_path, "pictures/a.jpg")
    path = write_csv(tmp_path / "lists", f"path,subject\n{tmp_path / 'pictures/a.jpg'},s\n")
    with pytest.raises(UserError, match="outside the data root"):
        load_records(path)
    assert load_records(path, root=tmp_path)[0].path == tmp_path / "pictures/a.jpg"
    path.write_text("path,subject\npictures/a.jpg,s\n")
    assert load_records(path, root=tmp_path)[0].path == tmp_path / "pictures/a.jpg"
    with pytest.raises(UserError, match="is not a folder"):
        load_records(path, root=tmp_path / "nowhere")


@pytest.mark.parametrize("content", [b"", b"file\na.jpg\n", b"path\n\xff\xfe\n", b"path\n"])
def test_csv_of_no_use(tmp_path, content):
    path = tmp_path / "ears.csv"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"ears\.csv"):
        load_records(path)


# COCO


def coco(**changes) -> dict:
    content = {
        "images": [
            {"id": 1, "file_name": "img/a.jpg", "subject": 7},
            {"id": 2, "file_name": "img/b.jpg"},
            {"id": 3, "file_name": "img/c.jpg"},
        ],
        "categories": [{"id": 0, "name": "ear"}, {"id": 1, "name": "Left-Ear"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4.5]},
            {"image_id": 2, "category_id": 0, "bbox": [5, 6, 7, 8],
             "attributes": {"subject": "zoe", "side": "R"}},
            {"image_id": 2, "category_id": 0, "bbox": [9, 6, 7, 8]},
        ],
    }  # fmt: skip
    return content | changes


def write_coco(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(content))
    return path


def test_coco(tmp_path, caplog):
    records = load_records(write_coco(tmp_path, coco()))
    assert records == [
        Record(tmp_path / "img/a.jpg", "7", "left", (1, 2, 3, 4.5)),
        Record(tmp_path / "img/b.jpg", "zoe", "right", (5, 6, 7, 8)),
        Record(tmp_path / "img/b.jpg", "b.jpg", "unknown", (9, 6, 7, 8)),
    ]
    assert "1 images have no annotation" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "not COCO"),
        ({"images": []}, "annotations"),
        (coco(annotations=[{"image_id": 9, "bbox": [1, 2, 3, 4]}]), "annotation 0"),
        (coco(annotations=[{"image_id": 1, "bbox": [1, 2, 3]}]), "annotation 0: the box"),
        (coco(annotations=[{"image_id": 1, "bbox": [1, 2, 3, 10**400]}]), "annotation 0: the box"),
        (coco(annotations=[{"image_id": 1, "bbox": [1, 2, 3, True]}]), "annotation 0: the box"),
        (coco(annotations=["x"]), "annotation 0"),
        (coco(annotations=[]), "lists no images"),
        (
            coco(images=[{"id": 1, "file_name": "../x.jpg"}],
                 annotations=[{"image_id": 1, "bbox": [1, 2, 3, 4]}]),
            "annotation 0: .*outside the data root",
        ),
    ],
)  # fmt: skip
def test_coco_of_no_use(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load_records(write_coco(tmp_path, content))


def test_json_that_is_none(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text("{" * 10)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_records(path)
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match="cannot be read as JSON"):
        load_records(path)


# The first system's .npy

PATHS = ["img/a.jpg", "img/ö.jpg"]
BOXES = [[1, 2, 3.5, 4], [5, 6, 7, 8]]


def write_npy(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "boxes.npy"
    np.save(path, content, allow_pickle=True)
    return path


@pytest.mark.parametrize(
    ("paths", "boxes"),
    [
        (PATHS, BOXES),
        (np.array(PATHS), np.array(BOXES)),
        (np.array(PATHS, object), np.asfortranarray(np.array(BOXES))),
        (np.array(PATHS).astype(">U9"), np.array(BOXES).astype(">f4")),
        ([Path(path) for path in PATHS], [np.array(box, np.float16) for box in BOXES]),
        ([np.str_(path) for path in PATHS], [tuple(map(np.float64, box)) for box in BOXES]),
        (PATHS, np.asfortranarray(np.array(BOXES, object))),
    ],
    ids=["lists", "arrays", "fortran", "big-endian", "path objects", "scalars", "objects"],
)
def test_npy_as_numpy_writes_it(tmp_path, paths, boxes):
    path = write_npy(tmp_path, {"image_paths": paths, "bboxes": boxes})
    assert load_records(path) == [
        Record(tmp_path / "img/a.jpg", "a.jpg", box=(1, 2, 3.5, 4)),
        Record(tmp_path / "img/ö.jpg", "ö.jpg", box=(5, 6, 7, 8)),
    ]


@pytest.mark.parametrize("protocol", [2, 3, 4])
@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_npy_of_numpy_1_and_2_and_their_pickle_protocols(tmp_path, protocol, module):
    path = write_npy(tmp_path, {})
    header = path.read_bytes()[:128]
    content = np.array({"image_paths": np.array(PATHS), "bboxes": np.array(BOXES)}, object)
    body = pickle.dumps(content, protocol)
    written = b"numpy._core.multiarray"
    if protocol == 4:  # names are preceded by their length, and the frame by its own
        written, module = (bytes([len(name)]) + name for name in (written, module))
        size = len(body) + (len(module) - len(written)) * body.count(written)
        body = body[:3] + (size - 11).to_bytes(8, "little") + body[11:]
    assert written in body
    path.write_bytes(header + body.replace(written, module))
    assert [record.box for record in load_records(path)] == [tuple(box) for box in BOXES]


def test_npy_boxes_may_be_missing(tmp_path):
    path = write_npy(tmp_path, {"image_paths": PATHS, "bboxes": [None, BOXES[1]]})
    assert [record.box for record in load_records(path)] == [None, (5, 6, 7, 8)]


class Bomb:
    """Unpickling this makes the folder that it names."""

    def __init__(self, target: Path):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def test_npy_that_would_run_code_is_refused_and_does_not_run(tmp_path):
    ran = tmp_path / "ran"
    path = write_npy(tmp_path, {"image_paths": PATHS, "bboxes": [Bomb(ran), None]})
    with pytest.raises(UserError, match=r"refused: its pickle asks for (posix|nt)\.mkdir"):
        load_records(path)
    assert not ran.exists()
    np.load(path, allow_pickle=True)  # the file does what it is feared to do
    assert ran.exists()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"cos\nsystem\n(S'true'\ntR.", "refused: its pickle asks for os.system"),
        (b"(ios\nsystem\n.", "refused: its pickle asks for the pickle opcode INST"),
        (b"\x8c\x05numpy\x8c\x06memmap\x93.", "refused: .*numpy.memmap"),
        (b"cnumpy\ndtype\n\x8c\x02V8\x85R.", "refused: .*the data type 'V8'"),
        (b"cnumpy\nndarray\n)R.", "refused: .*a call of numpy.ndarray"),
        (b"\x80\x04P0\n.", "refused: .*PERSID"),
        (b"\x82\x01.", "refused: .*EXT1"),
        (b"}]Ns.", "damaged: list in place of str"),
        (b"}Na.", "damaged"),
        (b"t.", "damaged"),
        (b"h\x07.", "damaged"),
        (b"", "damaged"),
        (b"\x80\x04}", "damaged"),
        (b"K\x01.", "expected"),
    ],
)
def test_npy_with_a_hostile_or_damaged_pickle(tmp_path, body, message):
    path = write_npy(tmp_path, {})
    path.write_bytes(path.read_bytes()[:128] + body)
    with pytest.raises(UserError, match=message):
        load_records(path)


def test_npy_with_arrays_that_lie_about_their_size(tmp_path):
    path = write_npy(tmp_path, {"image_paths": np.array(PATHS), "bboxes": np.zeros((2, 4))})
    content = path.read_bytes()
    lie = content.replace(b"K\x02K\x04\x86", b"K\x02K\x7f\x86")
    assert lie != content
    path.write_bytes(lie)
    with pytest.raises(UserError, match="8 values in an array of 254"):
        load_records(path)


def test_npy_truncated_anywhere_is_one_clear_error(tmp_path):
    path = write_npy(tmp_path, {"image_paths": np.array(PATHS), "bboxes": np.array(BOXES)})
    content = path.read_bytes()
    for length in range(0, len(content) - 1, 7):
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"boxes\.npy"):
            load_records(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.zeros(3), "not a pickled object"),
        ({"paths": PATHS, "bboxes": BOXES}, "image_paths"),
        ({"image_paths": PATHS, "bboxes": BOXES[:1]}, "equally long"),
        ({"image_paths": PATHS, "bboxes": [[1, 2], [3, 4]]}, "entry 0: the box"),
        ({"image_paths": [3, "b"], "bboxes": BOXES}, "entry 0: the path"),
        ({"image_paths": ["../a.jpg", "b"], "bboxes": BOXES}, "entry 0: .*outside the data root"),
        ({"image_paths": [Path("/etc/passwd")], "bboxes": [None]}, "entry 0: .*outside"),
    ],
)
def test_npy_of_no_use(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load_records(write_npy(tmp_path, content))


# The real data sets


def test_real_ami(photographs):
    records = load_records(photographs / "ami")
    assert len(records) == 700
    assert len({record.subject for record in records}) == 100
    assert sum(record.side == "left" for record in records) == 100
    assert sum(record.side == "right" for record in records) == 600
    assert len({record.view for record in records}) == 7


def test_real_iitd(photographs):
    records = load_records(photographs / "iitd")
    assert len(records) == 227
    assert len({record.subject for record in records}) == 60
