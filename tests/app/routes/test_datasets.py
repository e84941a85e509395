"""Claims about training images over HTTP, against a server process of its own."""

from __future__ import annotations

import io
import itertools
import os
import random
import re
import shutil
import signal
import socket
import stat
import struct
import subprocess
import threading
import time
import unicodedata
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import cv2
import httpx
import numpy as np
import pytest
from PIL import Image

from engines.errors import BadRequest, Conflict, KensaError, UnknownDataset, UploadTooLarge
from engines.image import DEFAULT_LIMITS, SUFFIXES, decode
from engines.store.datasets import Datasets
from engines.store.image_names import checked_name, sent_name
from engines.store.image_zip import MAX_FILES, unzip
from support.damage import damaged, picture, png, saved, seeds
from support.mutations import flat_jpeg, structured_seeds
from support.server import FORM, PART, RAW, Server, agreed, connected_socket, received, serving
from support.waiting import until
from workers.learning.dataset import Category

MB = 1024 * 1024
IMAGE_LIMIT = 200_000  # bytes, of the server that most tests share
UPLOAD_LIMIT = 2 * MB
ZIP = {"Content-Type": "application/zip"}
PNG = {"Content-Type": "image/png"}
_numbers = itertools.count()


class Place:
    """A category that one test has for itself, on a server."""

    def __init__(self, server: Server, root: Path) -> None:
        self.server = server
        self.client = server.client
        self.root = root  # what retrain.py would read
        self.category = f"part-{next(_numbers)}"
        self.url = f"/datasets/{self.category}/train"

    def send(self, *files: tuple[str, bytes], **query: Any) -> httpx.Response:
        """As file parts of a form."""
        return self.client.post(self.url, files=[("file", file) for file in files], params=query)

    def send_zip(self, data: bytes, **query: Any) -> httpx.Response:
        return self.client.post(self.url, content=data, headers=ZIP, params=query)

    def send_raw(self, name: str, data: bytes, **query: Any) -> httpx.Response:
        return self.client.post(self.url, content=data, headers=PNG, params={"name": name, **query})

    def stored(self) -> dict[str, bytes]:
        """Every file below the category's folders, hidden ones too."""
        folders = [self.root / "train" / self.category, self.root / "test" / self.category]
        files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]
        return {path.name: path.read_bytes() for path in files}

    def count(self) -> int:
        """Images that are stored, while others still arrive."""
        return len(list((self.root / "train" / self.category).glob("[!.]*")))

    def arriving(self) -> list[str]:
        return [path.name for path in self.root.glob("uploads/*")]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def server(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with small limits. In the end, no answer had a status that is not documented."""
    settings = {
        "KENSA_DATA_DIR": str(data_dir),
        "KENSA_MAX_IMAGE_BYTES": str(IMAGE_LIMIT),
        "KENSA_MAX_UPLOAD_BYTES": str(UPLOAD_LIMIT),
    }
    seen: set[tuple[str, str, int]] = set()

    def note(answer: httpx.Response) -> None:
        route = _route(answer.request.url.raw_path.decode().partition("?")[0])
        if route is not None:
            seen.add((answer.request.method.lower(), route, answer.status_code))

    with serving(tmp_path_factory.mktemp("server"), **settings) as running:
        running.client.event_hooks["response"].append(note)
        yield running
        paths = running.client.get("/openapi.json").json()["paths"]
        for method, route, status in seen - {("delete", "/datasets/{category}", 405)}:
            assert str(status) in paths[route][method]["responses"], (method, route, status)
        assert "Traceback" not in running.log.read_text()


def _route(path: str) -> str | None:
    """The route that a path of the usual length belongs to."""
    names = ["/datasets", "/{category}", "/{split}", "/{name}", "/thumbnail"]
    depth = path.count("/")
    ours = path.startswith("/datasets") and not re.search(r"%2f|\.\.|%2e", path, re.I)
    return "".join(names[:depth]) if ours and depth <= 5 else None


@pytest.fixture
def place(server: Server, data_dir: Path) -> Place:
    return Place(server, data_dir / "datasets")


def image(seed: int = 0) -> bytes:
    """A small PNG, another one for each seed."""
    noise = np.random.default_rng(seed).integers(0, 256, (24, 32, 3), np.uint8)
    return saved(Image.fromarray(noise), "PNG")


def bmp(size: int, seed: int = 0) -> bytes:
    """A BMP of about `size` bytes."""
    width = 1000
    height = max(1, size // (3 * width))
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return saved(Image.fromarray(noise), "BMP")


def zipped(
    files: dict[str, bytes],
    method: int = zipfile.ZIP_DEFLATED,
    change: Callable[[zipfile.ZipInfo], None] = lambda entry: None,
) -> bytes:
    """A zip; `change` alters each entry before it is written."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", method) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name)
            entry.compress_type = method
            change(entry)
            archive.writestr(entry, data)
    return memory.getvalue()


def named(raw: bytes, data: bytes) -> bytes:
    """A zip with one file, its name in raw bytes that are not marked as UTF-8."""
    stand_in = "N" * len(raw)
    return zipped({stand_in: data}).replace(stand_in.encode(), raw)


def reasons(answer: httpx.Response) -> dict[str, int]:
    return {item["reason"]: item["count"] for item in answer.json()["skipped"]}


def codes(answer: httpx.Response) -> dict[str, str]:
    return {item["name"]: item["code"] for item in answer.json()["refused"]}


# What is sent is stored


@pytest.mark.parametrize("how", ["form", "raw", "zip", "zip in a form"])
def test_an_image_comes_back_as_it_was_sent(place: Place, how: str) -> None:
    data = image()
    answer = {
        "form": lambda: place.send(("01.png", data)),
        "raw": lambda: place.send_raw("01.png", data),
        "zip": lambda: place.send_zip(zipped({"01.png": data})),
        "zip in a form": lambda: place.send(("all.zip", zipped({"01.png": data}))),
    }[how]()
    assert answer.status_code == 201, answer.text
    assert answer.json() == {
        "category": place.category,
        "split": "train",
        "added": ["01.png"],
        "already_there": [],
        "refused": [],
        "skipped": [],
        "images": 1,
    }
    back = place.client.get(f"{place.url}/01.png")
    assert back.content == data
    assert back.headers["content-type"] == "image/png"
    assert place.stored() == {"01.png": data}
    assert place.arriving() == []


def test_an_image_of_every_ending_comes_back(place: Place) -> None:
    for ending in SUFFIXES:
        assert place.send((f"01{ending}", image())).status_code == 201
        back = place.client.get(f"{place.url}/01{ending}")
        assert (back.status_code, back.content) == (200, image()), ending
        assert back.headers["content-type"].startswith("image/")


def test_what_lies_in_folders_of_a_category_may_be_learned_as_retrain_py_does(place: Place) -> None:
    """Somebody copied it there, as other tools keep it."""
    folder = place.root / "train" / place.category / "good"
    folder.mkdir(parents=True)
    asked = {"model": "new", "category": place.category}
    assert place.client.post("/retrain", json=asked).json()["code"] == "bad_dataset"
    (folder / "01.png").write_bytes(image())
    assert len(Category.find(place.root, place.category).train) == 1
    assert Datasets(place.root).most_to_learn(place.category, "train") == 1
    assert place.client.post("/retrain", json=asked).status_code == 202


def test_every_kind_of_image_that_is_read_is_taken(place: Place) -> None:
    ends = {"jpeg": "jpg", "png": "PNG", "bmp": "bmp", "tiff": "TIF"}
    files = {f"{name}.{ends[name.partition('_')[0]]}": data for name, data in seeds().items()}
    answer = place.send(*files.items())
    assert answer.json()["added"] == list(files)
    assert place.stored() == files
    for name in files:
        kind = place.client.get(f"{place.url}/{name}").headers["content-type"]
        assert kind == f"image/{name.partition('_')[0]}"


def test_what_was_sent_is_what_training_reads(place: Place) -> None:
    for split, names in {
        "train": ["b.png", "a.jpg", "検査 1.png"],
        "normal": ["n.png"],
        "anomaly": ["x.png", "y.png"],
    }.items():
        place.url = f"/datasets/{place.category}/{split}"
        answer = place.send(*[(name, image()) for name in names])
        assert answer.json()["images"] == len(names)
    found = Category.find(place.root, place.category)
    assert [path.name for path in found.train] == ["a.jpg", "b.png", "検査 1.png"]
    assert [path.name for path in found.test_normal] == ["n.png"]
    assert [path.name for path in found.test_anomaly] == ["x.png", "y.png"]
    listed = place.client.get("/datasets").json()["datasets"]
    expected = {"category": place.category, "train": 3, "normal": 1, "anomaly": 2}
    assert expected in listed


def test_the_parts_of_a_form_may_have_any_name_and_other_fields_are_read_over(
    place: Place,
) -> None:
    files: Any = [
        ("file", ("1.png", image(1))),
        ("images[]", ("2.png", image(2))),
        ("", ("3.png", image(3))),
        ("comment", (None, b"x" * 100_000)),
        ("zip", ("a", zipped({"4.png": image(4)}))),
        ("写真", ("5.png", image(5))),
    ]
    answer = place.client.post(place.url, files=files)
    assert answer.json()["added"] == ["1.png", "2.png", "3.png", "4.png", "5.png"]


def test_a_form_may_have_more_parts_than_a_process_may_have_files(place: Place) -> None:
    data = saved(Image.new("L", (1, 1)), "PNG")
    answer = place.send(*[(f"{number}.png", data) for number in range(1100)])
    assert len(answer.json()["added"]) == answer.json()["images"] == 1100
    descriptors = Path(f"/proc/{place.server.process.pid}/fd").iterdir()
    assert len(list(descriptors)) < 100


def test_a_zip_may_hold_folders_and_what_is_no_image_is_passed_over(place: Place) -> None:
    files = {
        "photos/": b"",
        "photos/1.png": image(1),
        "./photos/deep/er/2.PNG": image(2),
        "__MACOSX/photos/._1.png": b"x",
        "__MACOSX/3.png": image(3),
        "photos/.DS_Store": b"x",
        ".git/4.png": image(4),
        "photos/Thumbs.db": b"x",
        "readme.txt": b"x" * 3 * MB,  # never unpacked, so it does not count
        "photos/noending": image(5),
    }
    answer = place.send_zip(zipped(files))
    assert answer.status_code == 201
    assert answer.json()["added"] == ["1.png", "2.PNG"]
    assert answer.json()["refused"] == []
    assert reasons(answer) == {
        "a folder": 1,
        "macOS's own": 2,
        "hidden": 2,
        "not an image, by its name": 3,
    }
    assert answer.json()["skipped"][-1]["names"][0] == "photos/Thumbs.db"
    assert set(place.stored()) == {"1.png", "2.PNG"}


def test_a_picture_that_a_library_stumbles_over_loses_no_neighbour_in_a_zip(
    place: Place,
) -> None:
    jpegs = structured_seeds("jpeg")
    files = {f"{number}.png": image(number) for number in range(5)}
    files |= {"turned.jpg": jpegs["jpeg_411_turned"], "third.jpg": flat_jpeg(3, 1)}
    answer = place.send_zip(zipped(files)).json()
    assert answer["added"] == [*(f"{number}.png" for number in range(5)), "turned.jpg"]
    assert [(one["name"], one["code"]) for one in answer["refused"]] == [
        ("third.jpg", "unsupported_image")
    ]


@pytest.mark.parametrize("query", [{}, {"name": "a.webp"}, {"name": "a.jpg"}])
def test_a_webp_is_named_before_its_name_is_judged(place: Place, query: dict[str, str]) -> None:
    answer = place.client.post(
        place.url,
        params=query,
        content=b"RIFF\x1a\0\0\0WEBPVP8 " + bytes(99),
        headers={"Content-Type": "image/webp"},
    )
    assert (answer.status_code, agreed(answer)) == (415, "unsupported_image")
    assert "WebP" in answer.json()["error"]


def test_a_zip_with_a_comment_or_something_before_it_is_read(place: Place) -> None:
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w") as archive:
        archive.comment = b"made by a camera" * 1000
        archive.writestr("1.png", image())
    assert place.send_zip(memory.getvalue()).json()["added"] == ["1.png"]
    archive_of_sfx = b"MZ" + bytes(1000) + zipped({"2.png": image()})
    assert place.send(("photos.zip", archive_of_sfx)).json()["added"] == ["2.png"]


@pytest.mark.skipif(shutil.which("zip") is None, reason="needs zip")
def test_zips_of_the_zip_command_are_read_and_encrypted_ones_refused(
    place: Place, tmp_path: Path
) -> None:
    (tmp_path / "写真").mkdir()
    (tmp_path / "写真" / "検査.png").write_bytes(image())
    for password in ([], ["-P", "secret"]):
        subprocess.run(["zip", "-qr", *password, "a.zip", "写真"], cwd=tmp_path, check=True)
        answer = place.send_zip((tmp_path / "a.zip").read_bytes())
        if password:
            assert (answer.status_code, agreed(answer)) == (422, "bad_request")
            assert "password" in answer.json()["error"]
        else:
            assert answer.json()["added"] == ["検査.png"]
        (tmp_path / "a.zip").unlink()
    assert place.stored() == {"検査.png": image()}


def test_nothing_is_stored_before_the_whole_request_arrived(place: Place) -> None:
    body = PART.replace(b'"a"', b'"1.png"') + image() + b"\r\n" + PART.replace(b'"a"', b'"2.png"')
    head = (
        f"POST {place.url} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\n\r\n"
    )
    with connected_socket(place.server) as connection:
        connection.sendall(head.encode() + body)
        until(lambda: len(place.arriving()) == 1)
        assert place.stored() == {}
    until(lambda: place.arriving() == [])


# Names


@pytest.mark.parametrize(
    "name",
    [
        "a.png",
        "検査 その一.png",
        "全角 空白.png",  # an ideographic space
        "ｶﾞ.JPEG",  # half-width: another name than ガ
        "Größe (1)+&%#?;=@~'[]{}!.png",
        "-rf.png",
        "a.tar.png",
        "あ" * 78 + ".bmp",  # 238 bytes
        "a" * 124 + ".tif",
    ],
)
def test_a_name_is_kept_as_it_is(place: Place, name: str) -> None:
    assert place.send((name, image())).json()["added"] == [name]
    other = f"x{name}"[:40].rstrip(".") + ".png"
    assert place.send_raw(other, image()).json()["added"] == [other]
    assert place.client.get(f"{place.url}/{_quoted(name)}").content == image()
    listed = place.client.get(place.url).json()["images"]
    assert name in [item["name"] for item in listed]
    assert place.client.delete(f"{place.url}/{_quoted(name)}").status_code == 204
    assert set(place.stored()) == {other}


def _quoted(name: str) -> str:
    return "".join(f"%{byte:02X}" for byte in name.encode())


def test_both_forms_of_a_japanese_name_are_one_name(place: Place) -> None:
    decomposed = unicodedata.normalize("NFD", "ガラス.png")  # as macOS writes it
    assert decomposed != "ガラス.png"
    assert place.send((decomposed, image())).json()["added"] == ["ガラス.png"]
    assert place.send(("ガラス.png", image())).json()["already_there"] == ["ガラス.png"]
    assert place.client.get(f"{place.url}/{_quoted(decomposed)}").content == image()
    assert set(place.stored()) == {"ガラス.png"}


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        ("検査.png".encode(), "検査.png"),  # macOS and Linux, without the mark
        (unicodedata.normalize("NFD", "ガ.png").encode(), "ガ.png"),
        ("検査.png".encode("cp932"), "検査.png"),  # Windows in Japanese
        ("表.png".encode("cp932"), "表.png"),  # its second byte is a backslash
        ("写真/ソ.png".encode("cp932"), "ソ.png"),
        (b"caf\x82.png", "café.png"),  # CP437: neither of the others
    ],
)
def test_a_zip_that_does_not_say_its_encoding_is_read_right(
    place: Place, raw: bytes, name: str
) -> None:
    assert place.send_zip(named(raw, image())).json()["added"] == [name]
    assert set(place.stored()) == {name}


def test_a_form_of_an_old_windows_client_is_read_right(place: Place) -> None:
    part = PART.replace(b'"a"', b'"' + "検査.png".encode("cp932") + b'"')
    body = part + image() + b"\r\n--b--\r\n"
    answer = place.client.post(place.url, content=body, headers=FORM)
    assert answer.json()["added"] == ["検査.png"]


WORDS = b"=?utf-8?B?5qSc5p+7LmpwZw==?="  # RFC 2047
DOT_NET = b'filename="' + WORDS + b"\"; filename*=utf-8''%E6%A4%9C%E6%9F%BB.jpg"


@pytest.mark.parametrize(
    ("disposition", "name"),
    [
        (b"form-data; name=file; " + DOT_NET, "検査.jpg"),
        (b'form-data; name="file"; filename="' + WORDS + b'"', "検査.jpg"),
        (b"form-data; name=file; filename==?utf-8?Q?=E6=A4=9C.jpg?=", "検.jpg"),
        (
            b'form-data; filename="=?utf-8?B?5qSc5p+7?= =?utf-8?B?5qSc5p+7LmpwZw==?="',
            "検査検査.jpg",
        ),
        (b"form-data; filename=\"__.jpg\"; filename*=UTF-8'ja'%E6%A4%9C.jpg", "検.jpg"),
        (b"form-data; FILENAME*=utf-8''%E6%A4%9C.jpg; name=x", "検.jpg"),
        (b"form-data; filename*=iso-8859-1''caf%E9.jpg", "caf\xe9.jpg"),
        (b"form-data; filename*=no-such-encoding''%E6%A4%9C.jpg", "検.jpg"),
        (b"form-data; filename*=undefined''%E6%A4%9C.jpg", "検.jpg"),
        (b"form-data; filename*=plain.jpg", "plain.jpg"),
        (b'form-data; filename="=?utf-8?B?a?="', "=?utf-8?B?a?="),
        (b'form-data; filename="a; filename*=b.jpg"', "a; filename*=b.jpg"),
        (b'form-data; filename="a\\"b.jpg"; name="file"', 'a"b.jpg'),
        (b'form-data; filename="C:\\parts\\a.jpg"', "a.jpg"),
        (b"form-data; filename=a b.jpg", "a b.jpg"),
        ('form-data; filename="表.png"'.encode("cp932"), "表.png"),
        (b'form-data; filename=""', ""),
        (b'form-data; name="filename"', None),
        (b"", None),
    ],
)
def test_a_form_says_what_its_file_is_called(disposition: bytes, name: str | None) -> None:
    assert sent_name(disposition) == name


def test_a_form_of_dot_net_keeps_the_name_of_its_picture(place: Place) -> None:
    part = PART.replace(b'filename="a"', DOT_NET)
    assert part != PART
    answer = place.client.post(place.url, content=part + image() + b"\r\n--b--\r\n", headers=FORM)
    assert answer.json()["added"] == ["検査.jpg"]
    assert set(place.stored()) == {"検査.jpg"}


BAD_NAMES = [
    "",
    "a/b.png",
    "/etc/a.png",
    "../a.png",
    "..",
    "a..png",
    "a\\b.png",
    "..\\a.png",
    "a\0.png",
    "a\n.png",
    "a\x7f.png",
    "a\u202egnp.png",  # turns the direction of writing
    "a\u200b.png",  # a space of no width
    "a\u2028.png",
    ".a.png",
    ".png",
    "a",
    "a.",
    "a.webp",
    "a.png.exe",
    "a.png ",
    "a" * 125 + ".png",
    "あ" * 80 + ".png",  # 244 bytes
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused_and_never_changed(place: Place, name: str) -> None:
    with pytest.raises(BadRequest, match="name"):
        checked_name(name)
    answer = place.send_raw(name, image())
    assert (answer.status_code, agreed(answer)) == (422, "bad_request")
    raw = name.replace("\0", "\\0").replace("\n", "\\n").encode()
    part = PART.replace(b'"a"', b'"' + raw.replace(b"\\", b"\\\\") + b'"')
    answer = place.client.post(place.url, content=part + image() + b"\r\n--b--\r\n", headers=FORM)
    assert (answer.status_code, agreed(answer)) == (422, "bad_request")
    assert place.stored() == {}


@pytest.mark.parametrize(
    "path",
    [
        "/datasets/{c}/train/..%2f..%2fsecret.png",
        "/datasets/{c}/train/%2e%2e%2fsecret.png",
        "/datasets/{c}/train/..%5c..%5csecret.png",
        "/datasets/{c}/train/%2fetc%2fsecret.png",
        "/datasets/{c}/train/..",
        "/datasets/{c}/train/%2e%2e",
        "/datasets/{c}/train/../../../secret.png",
        "/datasets/{c}/train/..%252f..%252fsecret.png",
        "/datasets/{c}/train/1.png%00",
        "/datasets/{c}/train/%00",
        "/datasets/{c}/train/%ff%fe.png",
        "/datasets/{c}/train/.png",
        "/datasets/{c}/train/" + "a" * 300 + ".png",
        "/datasets/{c}/train/" + "%E3%81%82" * 128 + ".png",
        "/datasets/{c}/train/secret.txt",
        "/datasets/{c}/train/2.png",
        "/datasets/{c}/nope/1.png",
        "/datasets/../train/1.png",
        "/datasets/%2e%2e/train/1.png",
        "/datasets/..%2f{c}/train/1.png",
        "/datasets/{c}%00/train/1.png",
        "/datasets/{c}%0a/train/1.png",
        "/datasets/{c}%20/train/1.png",
        "/datasets/uploads/train/1.png",
        "/datasets/" + "a" * 65 + "/train/1.png",
    ],
)
def test_no_path_leads_out_of_the_data_or_to_what_is_not_there(place: Place, path: str) -> None:
    place.send(("1.png", image()))
    secret = place.root.parent / "secret.png"
    secret.write_bytes(image(9))
    (place.root / "train" / place.category / "secret.txt").write_bytes(b"x")
    for method in ("GET", "DELETE"):
        for end in ("", "/thumbnail") if method == "GET" else ("",):
            status, body = exact(place.server, method, path.format(c=place.category) + end)
            assert status in (404, 405, 422), body
            assert re.fullmatch(r'\{"error":".+\.","code":"[a-z_]+"\}', body)
    assert secret.read_bytes() == image(9)
    assert set(place.stored()) == {"1.png", "secret.txt"}


def exact(server: Server, method: str, target: str) -> tuple[int, str]:
    """Status and JSON body for a request line that no client tidies up."""
    with connected_socket(server) as connection:
        connection.sendall(f"{method} {target} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head, _, body = received(connection).partition("\r\n\r\n")
    return int(head.split()[1]), body


@pytest.mark.parametrize("split", ["test", "Train", "train%20", "..", "train%2f..", "uploads"])
def test_there_are_three_splits(place: Place, split: str) -> None:
    for method in ("GET", "POST", "DELETE"):
        status, body = exact(place.server, method, f"/datasets/{place.category}/{split}")
        assert status in (404, 405, 422), body
        assert '"code":' in body


@pytest.mark.parametrize("category", ["a b", "a.b", "a" * 65, "a%0a", "%2e%2e", "$(id)"])
def test_a_bad_category_is_refused(place: Place, category: str) -> None:
    before = sorted(place.root.rglob("*"))
    answer = place.client.post(f"/datasets/{category}/train?name=1.png", content=image())
    assert (answer.status_code, agreed(answer)) == (422, "bad_request")
    assert sorted(place.root.rglob("*")) == before
    datasets, given = Datasets(place.root), category.replace("%0a", "\n").replace("%2e", ".")
    for act in (
        lambda: datasets.add(given, "train", "1.png", image()),
        lambda: datasets.images(given, "train"),
        lambda: datasets.delete(given),
    ):
        with pytest.raises(BadRequest):
            act()


def test_links_are_not_followed_out_of_the_data(place: Place, tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(image(1))
    (tmp_path / ".1.png.0123abcd").write_bytes(b"like a half written file")
    place.send(("own.png", image()))
    folder = place.root / "train" / place.category
    (folder / "out.png").symlink_to(tmp_path / "1.png")
    (folder / "in.png").symlink_to("own.png")
    (folder / "circle.png").symlink_to("circle.png")
    (folder / "nowhere.png").symlink_to("nothing.png")
    listed = place.client.get(place.url).json()
    assert [item["name"] for item in listed["images"]] == ["in.png", "own.png"]
    assert place.client.get(f"{place.url}/in.png").content == image()
    for name in ("out.png", "circle.png", "nowhere.png"):
        answer = place.client.get(f"{place.url}/{name}")
        assert (answer.status_code, agreed(answer)) == (404, "unknown_dataset")
        assert place.client.delete(f"{place.url}/{name}").status_code == 404
        assert place.send((name, image()), replace="true").status_code in (201, 409)
    assert (tmp_path / "1.png").read_bytes() == image(1)

    linked = Place(place.server, place.root)
    (place.root / "train" / linked.category).symlink_to(tmp_path)
    (place.root / "test" / linked.category).mkdir(parents=True)
    (place.root / "test" / linked.category / "normal").symlink_to(linked.category)  # a circle
    for answer in (
        linked.send(("2.png", image())),
        linked.client.get(linked.url),
        linked.client.get(f"{linked.url}/1.png"),
        linked.client.delete(f"{linked.url}/1.png"),
        linked.client.delete(linked.url),
    ):
        assert (answer.status_code, agreed(answer)) == (404, "unknown_dataset")
    assert place.client.get("/datasets").status_code == 200
    Datasets(place.root).sweep()
    assert {path.name for path in tmp_path.iterdir()} == {"1.png", ".1.png.0123abcd"}
    (place.root / "train" / linked.category).unlink()
    shutil.rmtree(place.root / "test" / linked.category)


# Zips that mean harm


def _link(entry: zipfile.ZipInfo) -> None:
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16


def _device(entry: zipfile.ZipInfo) -> None:
    entry.create_system, entry.external_attr = 3, (stat.S_IFCHR | 0o777) << 16


@pytest.mark.parametrize(
    "name",
    [
        "/etc/a.png",
        "../a.png",
        "../../../../../../tmp/a.png",
        "a/../../b.png",
        "..\\a.png",
        "a\\b.png",
        "C:\\a.png",
        "\\\\server\\a.png",
        "../",
        "/etc/passwd",
    ],
)
def test_a_zip_that_leads_out_is_refused_by_the_name(place: Place, name: str) -> None:
    answer = place.send_zip(zipped({"1.png": image(1), name: image(), "2.png": image(2)}))
    assert answer.status_code == 201
    assert answer.json()["added"] == ["1.png", "2.png"]
    assert codes(answer) == {name: "bad_request"}
    assert repr(name)[1:-1] in answer.json()["refused"][0]["error"]
    assert set(place.stored()) == {"1.png", "2.png"}


@pytest.mark.parametrize("change", [_link, _device])
def test_a_zip_makes_no_links_or_devices(
    place: Place, change: Callable[[zipfile.ZipInfo], None]
) -> None:
    answer = place.send_zip(zipped({"1.png": b"/etc/passwd"}, change=change))
    assert (answer.status_code, agreed(answer)) == (422, "bad_request")
    assert "1.png" in answer.json()["error"]
    assert place.stored() == {}


def test_a_name_with_a_nul_is_not_cut_off_there(place: Place) -> None:
    data = zipped({"a.pngN.exe": image(), "b.exeN.png": image()}).replace(b"N.", b"\0.")
    answer = place.send_zip(data)
    assert (answer.status_code, agreed(answer)) == (422, "bad_request")
    assert place.stored() == {}


def lying(data: bytes, true: int, said: int) -> bytes:
    """A zip that says another size for what takes `true` bytes unpacked."""
    return data.replace(struct.pack("<I", true), struct.pack("<I", said))


def repeated(times: int, data: bytes) -> bytes:
    """A zip that lists one file many times: small, and large when unpacked."""
    memory = io.BytesIO()
    with zipfile.ZipFile(memory, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", data)
        archive.filelist.extend(archive.filelist * (times - 1))
    return memory.getvalue()


BOMBS: dict[str, tuple[Callable[[], bytes], int, str]] = {
    "a large image": (lambda: zipped({"a.png": bytes(500 * MB)}), 413, "upload_too_large"),
    "an image above the limit": (lambda: zipped({"a.png": bytes(MB)}), 413, "image_too_large"),
    "many images": (
        lambda: zipped({f"{n}.png": bytes(IMAGE_LIMIT - 1) for n in range(11)}),
        413,
        "upload_too_large",
    ),
    "one image, many times": (
        lambda: repeated(5000, bytes(IMAGE_LIMIT)),
        413,
        "upload_too_large",
    ),
    "says it is small": (
        lambda: lying(zipped({"a.png": bytes(500 * MB)}), 500 * MB, 1000),
        400,
        "bad_image",
    ),
    "says it is huge": (
        lambda: lying(zipped({"a.png": image()}), len(image()), 0xFFFFFF00),
        413,
        "upload_too_large",
    ),
    "bzip2": (lambda: zipped({"a.png": bytes(100 * MB)}, zipfile.ZIP_BZIP2), 422, "bad_request"),
    "lzma": (lambda: zipped({"a.png": bytes(100 * MB)}, zipfile.ZIP_LZMA), 422, "bad_request"),
    "a zip in a zip": (
        lambda: zipped({"a.zip": zipped({"a.png": bytes(MB)})}),
        422,
        "bad_request",
    ),
    "a png that is a zip": (
        lambda: zipped({"a.png": zipped({"a.png": bytes(1000)})}),
        415,
        "unsupported_image",
    ),
    "too many files": (lambda: repeated(MAX_FILES + 1, b"x"), 413, "upload_too_large"),
    "no files": (lambda: zipped({}), 422, "bad_request"),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("form", [False, True])
def test_a_zip_bomb_takes_neither_memory_nor_time(place: Place, name: str, form: bool) -> None:
    make, status, code = BOMBS[name]
    data = make()
    assert len(data) < UPLOAD_LIMIT
    place.send_zip(zipped({"1.png": image()}))
    highest, began = place.server.memory("VmHWM"), place.server.cpu_seconds()
    answer = place.send(("all.zip", data)) if form else place.send_zip(data)
    assert place.server.cpu_seconds() - began < 5
    assert place.server.memory("VmHWM") - highest < 30 * MB
    assert (answer.status_code, agreed(answer)) == (status, code), answer.text
    assert set(place.stored()) == {"1.png"}
    assert place.arriving() == []


def test_a_list_of_files_that_fills_the_memory_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(repeated(100_000, b"x"))  # a list of 5 million bytes
    with pytest.raises(BadRequest, match="lists too many"):
        list(unzip(path, DEFAULT_LIMITS, MB))


def test_zips_share_what_one_upload_may_unpack(place: Place) -> None:
    grey = {n: saved(Image.new("L", (440, 440), n), "BMP") for n in range(9)}
    one = {f"{number}.bmp": data for number, data in grey.items()}
    two = {f"x{name}": data for name, data in one.items()}
    unpacked = sum(map(len, one.values()))
    assert unpacked < UPLOAD_LIMIT < 2 * unpacked
    answer = place.send(("one.zip", zipped(one)), ("two.zip", zipped(two)))
    assert answer.status_code == 201
    assert codes(answer) == {"two.zip": "upload_too_large"}
    assert place.stored() == one


def _encrypted(data: bytes) -> bytes:
    """The mark of encryption in both headers of every file."""
    marked = bytearray(data)
    for start, place in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        for found in re.finditer(re.escape(start), data):
            marked[found.start() + place] |= 1
    return bytes(marked)


def test_an_encrypted_zip_is_refused_in_words(place: Place) -> None:
    data = _encrypted(zipped({"1.png": image(), "2.png": image()}))
    for answer in (place.send_zip(data), place.send(("a.zip", data))):
        assert (answer.status_code, agreed(answer)) == (422, "bad_request")
        assert "password" in answer.json()["error"]
    mixed = place.send(("a.zip", data), ("3.png", image()))
    assert mixed.json()["added"] == ["3.png"]
    assert codes(mixed) == {"a.zip": "bad_request"}


@pytest.mark.parametrize("part", [0, 0.3, 0.7, 0.99])
def test_a_zip_that_is_cut_short_is_refused(place: Place, part: float) -> None:
    data = zipped({f"{number}.png": image(number) for number in range(5)})
    cut = data[: int(len(data) * part)]
    for answer in (place.send_zip(cut), place.send(("a.zip", cut))):
        assert answer.status_code in (400, 422)
        agreed(answer)
    assert place.stored() == {}


def test_a_damaged_file_in_a_zip_is_refused_and_the_others_are_taken(place: Place) -> None:
    files = {f"{number}.png": image(number) for number in range(5)}
    data = zipped(files, zipfile.ZIP_STORED).replace(image(2)[50:60], b"0123456789")
    answer = place.send_zip(data)
    assert answer.json()["added"] == ["0.png", "1.png", "3.png", "4.png"]
    assert codes(answer) == {"2.png": "bad_image"}
    assert "2.png" not in place.stored()


def test_whatever_the_bytes_of_a_zip_are_only_agreed_errors_come_out(tmp_path: Path) -> None:
    files = {"a/1.png": image(1), "検査.png": image(2), "3.txt": b"x"}
    seeds = [zipped(files), zipped(files, zipfile.ZIP_STORED), _encrypted(zipped(files))]
    path = tmp_path / "a.zip"
    outcomes = set()
    for number in range(1500):
        chance = random.Random(number)
        data = bytearray(chance.choice(seeds))
        where = range(len(data)) if number % 2 else range(len(data) - 300, len(data))
        for place in chance.sample(where, chance.randint(1, 8)):
            data[place] = chance.choice([0, 255, chance.randrange(256)])
        if chance.random() < 0.2:
            del data[chance.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            for _, found in unzip(path, DEFAULT_LIMITS, MB):
                outcomes.add(type(found).__name__)
        except KensaError as error:
            outcomes.add(type(error).__name__)
    assert {"bytes", "str", "BadImage", "BadRequest", "UploadTooLarge"} <= outcomes


# Images that are refused


def test_damaged_images_are_refused_by_name_and_never_stored(place: Place) -> None:
    files = {f"{file.name}.png": file.data for file in damaged()}
    good = {name for name, data in files.items() if _decodes(data)}
    for sent in (place.send(*files.items()), place.send_zip(zipped(files))):
        assert sent.status_code == 201
        assert {item["name"] for item in sent.json()["refused"]} == set(files) - good
        assert set(sent.json()["added"] + sent.json()["already_there"]) == good
        for item in sent.json()["refused"]:
            assert item["code"] in ("bad_image", "unsupported_image", "image_too_large")
            assert item["error"].endswith(".")
    assert place.stored() == {name: files[name] for name in good}


def _decodes(data: bytes) -> bool:
    try:
        decode(data)
    except KensaError:
        return False
    return True


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"", 400, "bad_image"),
        (image()[:-20], 400, "bad_image"),
        (b"GIF89a" + bytes(100), 415, "unsupported_image"),
        (png(np.zeros((20_000, 1000), np.uint8)), 413, "image_too_large"),
        (bmp(IMAGE_LIMIT + 10_000), 413, "image_too_large"),
    ],
)
def test_when_nothing_is_taken_the_first_refusal_is_the_answer(
    place: Place, data: bytes, status: int, code: str
) -> None:
    for answer in (
        place.send(("1.png", data)),
        place.send_raw("1.png", data),
        place.send_zip(zipped({"1.png": data})),
        place.send(("1.png", data), ("2.txt", image())),
    ):
        assert (answer.status_code, agreed(answer)) == (status, code), answer.text
        assert "1.png" in answer.json()["error"]
    assert place.stored() == {}
    known = [item["category"] for item in place.client.get("/datasets").json()["datasets"]]
    assert place.category not in known
    mixed = place.send(("1.png", data), ("2.png", image()))
    assert mixed.status_code == 201
    assert codes(mixed) == {"1.png": code}
    assert set(place.stored()) == {"2.png"}


NAMED_PART = PART.replace(b'"a"', b'"1.png"')


def _form(*parts: bytes) -> dict[str, Any]:
    return {"content": b"".join(parts), "headers": FORM}


REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "nothing": ({}, 422, "bad_request"),
    "no name": ({"content": image(), "headers": PNG}, 422, "bad_request"),
    "text": ({"content": b"x", "headers": {"Content-Type": "text/html"}}, 415, "unsupported_body"),
    "what curl sends": ({"data": {"file": "x"}}, 415, "unsupported_body"),
    "JSON": ({"json": {}}, 415, "unsupported_body"),
    "a zip that is none": ({"content": b"x", "headers": ZIP}, 422, "bad_request"),
    "a .zip that is none": ({"files": {"f": ("a.zip", image())}}, 422, "bad_request"),
    "a field, not a file": ({"files": {"file": (None, b"x")}}, 422, "bad_request"),
    "form: empty": (_form(b""), 422, "bad_request"),
    "form: only its end": (_form(b"--b--\r\n"), 422, "bad_request"),
    "form: no boundary": (
        {"content": b"x", "headers": {"Content-Type": "multipart/form-data"}},
        422,
        "bad_request",
    ),
    "form: long boundary": (
        {"content": b"x", "headers": {"Content-Type": FORM["Content-Type"] * 10}},
        422,
        "bad_request",
    ),
    "form: noise": (_form(os.urandom(3000)), 422, "bad_request"),
    "form: cut short": (_form(NAMED_PART, image()), 422, "bad_request"),
    "form: cut in a header": (_form(PART[:30]), 422, "bad_request"),
    "form: cut after a part": (
        _form(NAMED_PART, image(), b"\r\n--b\r\n"),
        422,
        "bad_request",
    ),
    "form: no disposition": (_form(b"--b\r\nA: b\r\n\r\nx\r\n--b--\r\n"), 422, "bad_request"),
    "form: endless header": (_form(b"--b\r\n" + b"A" * MB), 422, "bad_request"),
    "form: many headers": (_form(b"--b\r\n" + b"A: b\r\n" * 1000), 422, "bad_request"),
    "form: many parts": (
        _form(b"--b\r\nContent-Disposition: form-data; name=a\r\n\r\n\r\n" * 10_001),
        413,
        "upload_too_large",
    ),
    "replace=maybe": ({"params": {"replace": "maybe"}, "headers": RAW}, 422, "bad_request"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_bad_request_is_refused_in_the_agreed_form(place: Place, name: str) -> None:
    request, status, code = REFUSED[name]
    answer = place.client.post(place.url, **request)
    assert (answer.status_code, agreed(answer)) == (status, code), answer.text
    assert place.stored() == {}
    assert place.arriving() == []


# Names that are taken


def test_the_same_image_again_is_already_there(place: Place) -> None:
    place.send(("1.png", image()))
    changed = (place.root / "train" / place.category / "1.png").stat().st_mtime_ns
    again = place.send(("1.png", image()), ("2.png", image()))
    assert again.status_code == 201
    assert again.json()["already_there"] == ["1.png"]
    assert again.json()["added"] == ["2.png"]
    assert place.send(("1.png", image())).status_code == 201  # nothing new, and all is well
    assert (place.root / "train" / place.category / "1.png").stat().st_mtime_ns == changed


def test_another_image_of_the_same_name_is_a_conflict_unless_it_may_replace(place: Place) -> None:
    place.send(("1.png", image(1)))
    answer = place.send(("1.png", image(2)))
    assert (answer.status_code, agreed(answer)) == (409, "conflict")
    assert "1.png" in answer.json()["error"]
    assert place.stored() == {"1.png": image(1)}
    mixed = place.send(("1.png", image(2)), ("2.png", image(2)))
    assert mixed.json()["added"] == ["2.png"]
    assert codes(mixed) == {"1.png": "conflict"}
    replaced = place.send(("1.png", image(2)), replace="true")
    assert replaced.json()["added"] == ["1.png"]
    assert replaced.json()["images"] == 2
    assert place.stored()["1.png"] == image(2)
    assert place.send(("1.png", image()[:50]), replace="true").status_code == 400
    assert place.stored()["1.png"] == image(2)


@pytest.mark.parametrize("replace", ["true", "false"])
def test_two_images_of_one_name_in_one_upload_do_not_replace_each_other(
    place: Place, replace: str
) -> None:
    files = {"left/1.png": image(1), "right/1.png": image(2), "again/1.png": image(1)}
    answer = place.send_zip(zipped(files), replace=replace)
    assert answer.json()["added"] == answer.json()["already_there"] == ["1.png"]
    assert codes(answer) == {"1.png": "conflict"}
    assert "Two different images" in answer.json()["refused"][0]["error"]
    assert place.stored() == {"1.png": image(1)}


def test_a_folder_that_looks_like_an_image_is_none(place: Place) -> None:
    place.send(("1.png", image()))
    (place.root / "train" / place.category / "2.png").mkdir()
    os.mkfifo(place.root / "train" / place.category / "3.png")
    assert place.client.get(place.url).json()["total"] == 1
    for name in ("2.png", "3.png"):
        assert place.client.get(f"{place.url}/{name}").status_code == 404
        assert place.send((name, image()), replace="true").status_code == 409


def test_of_two_uploads_at_once_one_gets_the_name(place: Place) -> None:
    def send(seed: int) -> int:
        url = f"{place.server.url}{place.url}?name=1.png"
        sent = httpx.post(url, content=image(seed), headers=PNG, trust_env=False, timeout=60)
        return sent.status_code

    for _ in range(5):
        with ThreadPoolExecutor(4) as clients:
            assert sorted(clients.map(send, range(4))) == [201, 409, 409, 409]
        (data,) = place.stored().values()
        assert data in [image(seed) for seed in range(4)]
        assert place.client.delete(place.url).status_code == 204


def test_deleting_while_images_arrive_breaks_nothing(place: Place) -> None:
    done = threading.Event()

    def delete() -> set[int]:
        statuses = set()
        with httpx.Client(base_url=place.server.url, trust_env=False) as client:
            while not done.is_set():
                statuses.add(client.delete(f"/datasets/{place.category}").status_code)
        return statuses

    with ThreadPoolExecutor(1) as other:
        deleted = other.submit(delete)
        data = zipped({f"{number}.png": image(number) for number in range(100)})
        try:
            sent = [place.send_zip(data) for _ in range(3)]
        finally:
            done.set()
        assert deleted.result() <= {204, 404}
    for answer in sent:
        assert answer.status_code == 201
        assert len(answer.json()["added"] + answer.json()["already_there"]) == 100


def test_looking_at_a_category_while_it_is_deleted_breaks_nothing(tmp_path: Path) -> None:
    datasets = Datasets(tmp_path)

    def come_and_go() -> None:
        for _ in range(150):
            datasets.add("part", "train", "1.png", image())
            datasets.delete("part")

    with ThreadPoolExecutor(1) as other:
        changing = other.submit(come_and_go)
        while not changing.done():
            assert datasets.count("part", "train") in (0, 1)
            assert set(datasets.categories()) <= {"part"}
            with suppress(UnknownDataset):
                assert datasets.images("part", "train").total in (0, 1)
            with suppress(UnknownDataset):
                assert datasets.read("part", "train", "1.png") == image()
    assert changing.result() is None


# Limits


@pytest.mark.parametrize(
    "kind", ["multipart/form-data; boundary=b", "image/png", "application/zip"]
)
def test_an_upload_that_says_it_is_too_large_is_refused_unread(place: Place, kind: str) -> None:
    head = (
        f"POST {place.url}?name=a.png HTTP/1.1\r\nHost: localhost\r\n"
        f"Content-Length: {UPLOAD_LIMIT + 1}\r\nContent-Type: {kind}\r\n\r\n"
    )
    with connected_socket(place.server) as connection:
        connection.sendall(head.encode())
        answer = received(connection)
    assert answer.startswith("HTTP/1.1 413 ")
    assert '"code":"upload_too_large"' in answer
    assert place.arriving() == []


@pytest.mark.parametrize(
    "kind", ["multipart/form-data; boundary=b", "image/png", "application/zip"]
)
def test_an_upload_without_a_length_is_read_up_to_the_limit(place: Place, kind: str) -> None:
    head = (
        f"POST {place.url}?name=a.png HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
        f"Content-Type: {kind}\r\n\r\n"
    )
    good = PART.replace(b'"a"', b'"1.png"') + image() + b"\r\n" + PART
    with connected_socket(place.server) as connection:
        connection.sendall(head.encode())
        connection.sendall(b"%x\r\n" % len(good) + good + b"\r\n")
        for _ in range(UPLOAD_LIMIT // 100_000 + 1):  # and there is no end
            connection.sendall(b"%x\r\n" % 100_000 + bytes(100_000) + b"\r\n")
        answer = received(connection)
    assert answer.startswith("HTTP/1.1 413 ")
    assert '"code":"upload_too_large"' in answer
    assert place.stored() == {}
    assert place.arriving() == []


def test_an_upload_without_a_length_is_taken(place: Place) -> None:
    def chunks() -> Iterator[bytes]:
        data = zipped({"1.png": image()})
        yield from (data[place : place + 100] for place in range(0, len(data), 100))

    sent = place.client.post(place.url, content=chunks(), headers=ZIP)
    assert sent.request.headers["transfer-encoding"] == "chunked"
    assert sent.json()["added"] == ["1.png"]


def test_a_form_is_taken_apart_right_wherever_its_blocks_end(place: Place) -> None:
    # Images that hold the beginning of the boundary, cut into pieces of every length.
    data = image() + b"\r\n--b" * 3 + b"\r\n--" + b"\r" * 5  # what follows a PNG is ignored
    boundary = b"----0123456789"
    part = PART.replace(b"--b\r\n", b"--" + boundary + b"\r\n")
    body = b"".join(
        part.replace(b'"a"', b'"%d.png"' % number) + data + b"\r\n" for number in range(3)
    )
    body += b"--" + boundary + b"--\r\n"
    kind = {"Content-Type": f"multipart/form-data; boundary={boundary.decode()}"}
    for length in (1, 2, 3, 7, 61, 1000):
        pieces = (body[place : place + length] for place in range(0, len(body), length))
        sent = place.client.post(place.url, content=pieces, headers=kind)
        assert len(sent.json()["added"] + sent.json()["already_there"]) == 3, sent.text
    assert set(place.stored().values()) == {data}


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A place on a server with the limits that are the default."""
    data = tmp_path_factory.mktemp("roomy")
    folder = tmp_path_factory.mktemp("server")
    with serving(folder, KENSA_DATA_DIR=str(data)) as running:
        yield Place(running, data / "datasets")
    shutil.rmtree(data)


@pytest.mark.parametrize("how", ["form", "zip", "one file"])
def test_memory_stays_flat_when_200_mb_arrive(roomy: Place, how: str) -> None:
    data = bmp(2 * MB)
    files = {f"{number}.bmp": data for number in range(100)}
    roomy.send(("warm.bmp", data))
    roomy.send_zip(zipped({"warm.bmp": data}, zipfile.ZIP_STORED))
    highest = roomy.server.memory("VmHWM")
    if how == "form":
        answer = roomy.send(*files.items())
    elif how == "zip":
        answer = roomy.send_zip(zipped(files, zipfile.ZIP_STORED))
    else:
        answer = roomy.send_raw("a.png", bytes(200 * MB))
    print(f"{how}: {(roomy.server.memory('VmHWM') - highest) / MB:.1f} MB more")
    assert roomy.server.memory("VmHWM") - highest < 60 * MB
    if how == "one file":
        assert (answer.status_code, agreed(answer)) == (413, "image_too_large")
    else:
        assert answer.json()["images"] == 101
        assert roomy.client.delete(roomy.url).status_code == 204
    assert roomy.arriving() == []


def test_the_server_answers_others_while_it_stores(roomy: Place) -> None:
    pixels = cv2.resize(picture(300, 300), (3000, 3000))
    large = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_COMPRESSION, 1])[1].tobytes()
    data = zipped({f"{number}.png": large for number in range(10)}, zipfile.ZIP_STORED)
    with ThreadPoolExecutor(1) as other:
        sent = other.submit(
            httpx.post,
            f"{roomy.server.url}{roomy.url}",
            content=data,
            headers=ZIP,
            timeout=60,
            trust_env=False,
        )
        answers = 0
        while not sent.done():
            assert roomy.client.get("/livez").status_code == 200
            answers += 1
    assert len(sent.result().json()["added"]) == 10
    assert answers > 20  # on the event loop, it would be one for each of the ten images
    roomy.client.delete(roomy.url)


# A full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small file system: needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_is_said_and_leaves_nothing_half_written(
    small_disk: Path, tmp_path: Path
) -> None:
    with serving(tmp_path, KENSA_DATA_DIR=str(small_disk)) as running:
        place = Place(running, small_disk / "datasets")
        large = bmp(8 * MB)
        for answer in (
            place.send(("1.bmp", large)),
            place.send_raw("1.bmp", large),
            place.send_zip(zipped({"1.bmp": large}, zipfile.ZIP_STORED)),
        ):
            assert (answer.status_code, agreed(answer)) == (507, "disk_full")
            assert place.stored() == {}
            assert place.arriving() == []

        # Room for what arrives, but not for all images beside it.
        files = {f"{number}.bmp": bmp(MB, number) for number in range(4)}
        some = place.send_zip(zipped(files, zipfile.ZIP_STORED))
        assert some.status_code == 201
        added, refused = some.json()["added"], codes(some)
        assert added
        assert set(added) | set(refused) == set(files)
        assert set(refused.values()) == {"disk_full"}
        assert place.stored() == {name: files[name] for name in added}

        rest = place.send(*files.items())  # a form needs less: parts go when they are stored
        assert rest.status_code == 201
        assert place.stored().items() <= files.items()
        filler = small_disk / "filler"
        with pytest.raises(OSError, match="No space"):
            filler.write_bytes(bytes(8 * MB))
        assert agreed(place.send(("5.png", image()))) == "disk_full"
        assert place.client.get(place.url).status_code == 200
        assert place.client.delete(f"/datasets/{place.category}").status_code == 204
        filler.unlink()
        assert place.send(("5.png", image())).status_code == 201
    assert "Traceback" not in running.log.read_text()


# Those who leave, and those who are killed


@pytest.mark.parametrize(
    "kind", ["multipart/form-data; boundary=b", "image/png", "application/zip"]
)
def test_a_client_that_leaves_while_sending_leaves_no_file(place: Place, kind: str) -> None:
    before = place.server.log.read_text()
    head = (
        f"POST {place.url}?name=a.png HTTP/1.1\r\nHost: localhost\r\nContent-Length: {MB}\r\n"
        f"Content-Type: {kind}\r\n\r\n"
    )
    good = PART.replace(b'"a"', b'"1.png"') + image() + b"\r\n" + PART
    with connected_socket(place.server) as connection:
        connection.sendall(head.encode() + good + bytes(100_000))
        until(lambda: len(place.arriving()) == 1)
    until(lambda: place.arriving() == [])
    assert place.stored() == {}
    assert place.server.log.read_text() == before
    assert place.send(("1.png", image())).status_code == 201


def _send_quietly(server: Server, place: Place, data: bytes) -> None:
    """Send a zip, whatever becomes of it."""
    host, port = server.url.removeprefix("http://").split(":")
    head = (
        f"POST {place.url} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
        "Content-Type: application/zip\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        try:
            connection.sendall(head.encode() + data)
            connection.recv(1000)
        except OSError:
            pass  # the server is dead


def test_a_server_that_is_killed_while_it_stores_leaves_whole_images_only(tmp_path: Path) -> None:
    data = tmp_path / "data"
    files = {f"{number:03}.bmp": bmp(200_000, number) for number in range(200)}
    packed = zipped(files, zipfile.ZIP_STORED)
    chance = random.Random(0)
    for kill in range(4):
        with serving(tmp_path, KENSA_DATA_DIR=str(data)) as running:
            place = Place(running, data / "datasets")
            place.category, place.url = "part", "/datasets/part/train"
            assert place.arriving() == []  # swept at the start
            assert not [name for name in place.stored() if name.startswith(".")]
            there = place.count()
            with ThreadPoolExecutor(1) as client:
                client.submit(_send_quietly, running, place, packed)
                until(lambda: place.count() > there + 3)  # noqa: B023
                time.sleep(chance.uniform(0, 0.05))
                running.process.send_signal(signal.SIGKILL)
                running.process.wait()
            assert len(place.arriving()) == 1
            stored = {n: d for n, d in place.stored().items() if not n.startswith(".")}
            assert there < len(stored) < len(files), kill
            assert stored.items() <= files.items()
    (data / "datasets" / "train" / "part" / ".000.bmp.0123abcd").write_bytes(b"half")
    with serving(tmp_path, KENSA_DATA_DIR=str(data)) as running:
        place.client, place.server = running.client, running
        done = place.send_zip(packed)
        assert len(done.json()["added"] + done.json()["already_there"]) == len(files)
        assert place.stored() == files
        assert place.arriving() == []


def test_a_server_that_is_killed_while_it_receives_leaves_nothing(tmp_path: Path) -> None:
    data = tmp_path / "data"
    with serving(tmp_path, KENSA_DATA_DIR=str(data)) as running:
        place = Place(running, data / "datasets")
        head = f"POST {place.url} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999999\r\n"
        with connected_socket(running) as connection:
            connection.sendall(head.encode() + b"Content-Type: image/png\r\n\r\n" + bytes(2 * MB))
            until(lambda: any(path.stat().st_size for path in place.root.glob("uploads/*/0")))
            running.process.send_signal(signal.SIGKILL)
            running.process.wait()
    assert len(place.arriving()) == 1
    with serving(tmp_path, KENSA_DATA_DIR=str(data)):
        assert place.arriving() == []
    assert place.stored() == {}


def test_a_server_that_is_told_to_stop_does_not_wait_for_all_images(tmp_path: Path) -> None:
    data = tmp_path / "data"
    large = {f"{number}.png": image(number) for number in range(5000)}
    settings = {"KENSA_DATA_DIR": str(data), "KENSA_SHUTDOWN_GRACE_S": "0"}
    with serving(tmp_path, **settings) as running:
        place = Place(running, data / "datasets")
        with ThreadPoolExecutor(1) as client:
            client.submit(_send_quietly, running, place, zipped(large))
            until(lambda: place.count() > 3)
            running.process.send_signal(signal.SIGTERM)
            assert running.process.wait(timeout=60) == 0
    assert len(place.stored()) < 5000
    assert place.arriving() == []


def test_nothing_is_swept_while_another_process_is_at_work(tmp_path: Path) -> None:
    datasets = Datasets(tmp_path / "datasets")
    datasets.sweep()  # there is nothing yet
    with datasets.upload() as folder:
        Datasets(datasets.root).sweep()
        assert folder.is_dir()
    (datasets.root / "uploads" / "left").mkdir()
    Datasets(datasets.root).sweep()
    assert not (datasets.root / "uploads").exists()


def test_sweeping_takes_only_what_was_half_written_or_half_deleted(tmp_path: Path) -> None:
    datasets = Datasets(tmp_path)
    for split in ("train", "normal"):
        datasets.add("part", split, "1.png", image())
    kept = [tmp_path / "train/part/1.png", tmp_path / "test/part/normal/1.png"]
    kept += [tmp_path / "train/part/.hidden", tmp_path / "train/part/.a.png.0123456"]
    gone = [tmp_path / "train/part/.1.png.0123abcd", tmp_path / "test/part/normal/.x.89abcdef"]
    for path in [*kept[2:], *gone]:
        path.touch()
    for deleted in ("train/.part.0123abcd", "test/.part.0123abcd", "test/part/.anomaly.89abcdef"):
        gone.append(tmp_path / deleted)
        gone[-1].mkdir()
        (gone[-1] / "1.png").touch()
    datasets.sweep()
    assert all(path.exists() for path in kept)
    assert not any(path.exists() for path in gone)


# Looking


def test_a_list_comes_in_pages(place: Place) -> None:
    names = [f"{number:02}.png" for number in range(25)]
    place.send(*[(name, image()) for name in reversed(names)])
    whole = place.client.get(place.url).json()
    assert [item["name"] for item in whole["images"]] == names
    assert whole["images"][0]["bytes"] == len(image())
    assert (whole["total"], whole["offset"], whole["split"]) == (25, 0, "train")
    pages = [
        place.client.get(place.url, params={"offset": offset, "limit": 10}).json()
        for offset in range(0, 40, 10)
    ]
    assert [item["name"] for page in pages for item in page["images"]] == names
    assert [len(page["images"]) for page in pages] == [10, 10, 5, 0]
    assert {page["total"] for page in pages} == {25}


@pytest.mark.parametrize(
    "query", ["offset=-1", "limit=0", "limit=1001", "limit=all", "offset=1e400", "offset=1.5"]
)
def test_a_page_that_cannot_be_is_refused(place: Place, query: str) -> None:
    place.send(("1.png", image()))
    answer = place.client.get(f"{place.url}?{query}")
    assert (answer.status_code, agreed(answer)) == (422, "bad_request")


def test_what_is_not_there_is_not_found(place: Place) -> None:
    for path in (place.url, f"{place.url}/1.png", f"{place.url}/1.png/thumbnail"):
        answer = place.client.get(path)
        assert (answer.status_code, agreed(answer)) == (404, "unknown_dataset")
        assert place.category in answer.json()["error"]
    place.send(("1.png", image()))
    empty = place.client.get(f"/datasets/{place.category}/anomaly").json()
    assert (empty["total"], empty["images"]) == (0, [])
    answer = place.client.get(f"/datasets/{place.category}/anomaly/1.png")
    assert (answer.status_code, agreed(answer)) == (404, "unknown_dataset")


def test_files_that_somebody_copied_there_are_shown_as_training_sees_them(place: Place) -> None:
    place.send(("1.png", image()))
    folder = place.root / "train" / place.category
    decomposed = unicodedata.normalize("NFD", "ガ.png")
    (folder / decomposed).write_bytes(image(1))
    (folder / os.fsdecode("検査.png".encode("cp932"))).write_bytes(image(2))
    (folder / "broken.png").write_bytes(b"x")
    (folder / "huge.png").write_bytes(bytes(IMAGE_LIMIT + 1))
    (folder / "notes.txt").write_bytes(b"x")
    listed = place.client.get(place.url).json()
    assert listed["total"] == len(Category.find(place.root, place.category).train) == 5
    assert decomposed in [item["name"] for item in listed["images"]]
    assert place.client.get(f"{place.url}/{_quoted(decomposed)}").content == image(1)
    broken = place.client.get(f"{place.url}/broken.png/thumbnail")
    assert (broken.status_code, agreed(broken)) == (415, "unsupported_image")
    (folder / "broken.png").write_bytes(image()[:-30])
    broken = place.client.get(f"{place.url}/broken.png/thumbnail")
    assert (broken.status_code, agreed(broken)) == (400, "bad_image")
    for path in ("huge.png", "huge.png/thumbnail"):
        huge = place.client.get(f"{place.url}/{path}")
        assert (huge.status_code, agreed(huge)) == (413, "image_too_large")


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ((400, 300), (256, 192)),
        ((300, 400), (192, 256)),
        ((40, 30), (40, 30)),
        ((3000, 2), (256, 1)),
    ],
)
def test_a_thumbnail_is_a_small_jpeg(
    place: Place, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    place.send(("1.png", saved(Image.new("RGB", size, (200, 30, 90)), "PNG")))
    answer = place.client.get(f"{place.url}/1.png/thumbnail")
    assert answer.headers["content-type"] == "image/jpeg"
    small = Image.open(io.BytesIO(answer.content))
    assert (small.format, small.size) == ("JPEG", expected)
    colour = np.asarray(small).reshape(-1, 3).mean(axis=0)
    assert colour == pytest.approx([200, 30, 90], abs=4)


def test_a_thumbnail_is_upright_and_bright(place: Place) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    place.send(("1.jpg", saved(Image.fromarray(picture(30, 60)), "JPEG", exif=exif)))
    small = decode(place.client.get(f"{place.url}/1.jpg/thumbnail").content)
    assert small.shape == (60, 30, 3)
    twelve_bits = np.full((20, 20), 3000, np.uint16)
    place.send(("2.png", png(twelve_bits)))
    small = decode(place.client.get(f"{place.url}/2.png/thumbnail").content)
    assert small.mean() == pytest.approx(3000 / 16, abs=2)


# Deleting


def test_an_image_a_split_and_a_category_can_be_deleted(place: Place) -> None:
    for split in ("train", "normal", "anomaly"):
        place.url = f"/datasets/{place.category}/{split}"
        place.send(("1.png", image()), ("2.png", image()))
    delete, get = place.client.delete, place.client.get
    base = f"/datasets/{place.category}"

    gone = delete(f"{base}/normal/1.png")
    assert (gone.status_code, gone.content) == (204, b"")
    assert get(f"{base}/normal/1.png").status_code == 404
    assert get(f"{base}/normal").json()["total"] == 1
    assert get(f"{base}/train").json()["total"] == 2
    again = delete(f"{base}/normal/1.png")
    assert (again.status_code, agreed(again)) == (404, "unknown_dataset")

    assert delete(f"{base}/normal").status_code == 204
    assert get(f"{base}/normal").json()["total"] == 0
    assert get(f"{base}/anomaly").json()["total"] == 2
    assert agreed(delete(f"{base}/normal")) == "unknown_dataset"

    assert delete(base).status_code == 204
    for answer in (delete(base), delete(f"{base}/train"), get(f"{base}/train")):
        assert (answer.status_code, agreed(answer)) == (404, "unknown_dataset")
    assert not list(place.root.glob(f"*/{place.category}"))


def test_a_category_ends_with_its_last_split(place: Place) -> None:
    place.url = f"/datasets/{place.category}/anomaly"
    place.send(("1.png", image()))
    assert place.client.delete(place.url).status_code == 204
    assert not list(place.root.glob(f"*/{place.category}"))
    answer = place.client.get(place.url)
    assert (answer.status_code, agreed(answer)) == (404, "unknown_dataset")


def test_deleting_one_category_leaves_those_with_similar_names(place: Place) -> None:
    other = Place(place.server, place.root)
    other.category = f"{place.category}-2"
    other.url = f"/datasets/{other.category}/train"
    for each in (place, other):
        each.send(("1.png", image()))
    assert place.client.delete(f"/datasets/{place.category}").status_code == 204
    assert other.client.get(other.url).json()["total"] == 1


# Without a server


def test_datasets_say_what_they_did(tmp_path: Path) -> None:
    datasets = Datasets(tmp_path / "not yet" / "there")
    assert datasets.categories() == {}
    with pytest.raises(UnknownDataset, match="there is: none"):
        datasets.images("part", "train")
    assert datasets.add("part", "train", "1.png", image()) == ("1.png", False)
    assert datasets.add("part", "train", "1.png", image()) == ("1.png", True)
    with pytest.raises(Conflict):
        datasets.add("part", "train", "1.png", image(1))
    assert datasets.add("part", "train", "1.png", image(1), replace=True) == ("1.png", False)
    assert datasets.read("part", "train", "1.png") == image(1)
    assert datasets.images("part", "train") == ([("1.png", len(image(1)))], 1)
    assert datasets.categories() == {"part": {"train": 1, "normal": 0, "anomaly": 0}}


def test_the_bytes_of_a_zip_are_counted_and_not_only_believed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.zip"
    path.write_bytes(zipped({"1.png": bytes(1000), "2.png": bytes(1000)}))
    monkeypatch.setattr("engines.store.image_zip._check", lambda entries, most: None)
    with pytest.raises(UploadTooLarge):
        list(unzip(path, DEFAULT_LIMITS, 1500))


# The documentation


def test_the_openapi_document_describes_every_route_and_status(server: Server) -> None:
    document = server.client.get("/openapi.json").json()
    ours = {
        path: item
        for path, item in document["paths"].items()
        if path.startswith("/datasets") and not path.endswith("/from-decisions")
    }
    of_every_route = {"400", "401", "403", "408", "431", "500", "503"}
    statuses = {
        f"{method} {path}": set(route["responses"]) - of_every_route
        for path, item in ours.items()
        for method, route in item.items()
    }
    one = "/datasets/{category}/{split}"
    assert statuses == {
        "get /datasets": {"200"},
        f"post {one}": {"201", "404", "409", "413", "415", "422", "507"},
        f"get {one}": {"200", "404", "422"},
        f"delete {one}": {"204", "404", "422"},
        f"get {one}/{{name}}": {"200", "404", "413", "422"},
        f"delete {one}/{{name}}": {"204", "404", "422"},
        f"get {one}/{{name}}/thumbnail": {"200", "404", "413", "415", "422"},
        "delete /datasets/{category}": {"204", "404", "422"},
    }
    for item in ours.values():
        for route in item.values():
            assert route["tags"] == ["datasets"]
            assert route["summary"]
            for status in set(route["responses"]) - {"200", "201", "204"}:
                content = route["responses"][status]["content"]["application/json"]
                assert content["schema"]["$ref"].endswith("/ErrorBody")
                for code, example in content["examples"].items():
                    assert example["value"]["code"] == code
    kinds = set(ours[one]["post"]["requestBody"]["content"])
    assert {"multipart/form-data", "application/zip", "image/jpeg", "image/png"} <= kinds
