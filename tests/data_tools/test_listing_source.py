"""Lists of paths and URLs: labels, keys, other columns; a server that fails now and then, or for good."""

import http.server
import json
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.download import UnreachableError, download
from data_tools.plan import ShardOptions
from data_tools.sharding import write_shards
from data_tools.sources.listing import list_listing
from simmim_scale.data.shards import NO_LABEL, ShardIndex
from tests.data_tools.layouts import contents, fill, picture


def no_pause(_: float) -> None:
    """Stands for time.sleep: tests do not wait."""


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    return fill(tmp_path / "photos", {f"{name}.jpg": picture(i) for i, name in enumerate(["a", "deep/b", "c.d"])})


def test_csv_with_names_of_classes_and_other_columns(photos: Path, tmp_path: Path) -> None:
    (photos / "list.csv").write_text('path,label,caption\na.jpg,dog,"one, two"\ndeep/b.jpg,cat,\nc.d.jpg,,ünï\n')
    source = list_listing(photos / "list.csv")
    assert source.classes == ("cat", "dog")
    write_shards(source, tmp_path / "out", ShardOptions(shuffle=False))
    index = ShardIndex.load(tmp_path / "out")
    assert [index.key(i) for i in range(3)] == ["a", "deep/b", "c_d"]
    assert index.table["label"].tolist() == [1, 0, NO_LABEL]
    assert [json.loads(index.read_members(i)["json"]).get("caption") for i in range(3)] == ["one, two", None, "ünï"]


def test_jsonl_with_numbers_keys_and_a_root(photos: Path, tmp_path: Path) -> None:
    rows = [{"path": "a.jpg", "label": 3, "key": "first"}, {"path": str(photos / "deep/b.jpg"), "label": 0}]
    (tmp_path / "list.jsonl").write_text("\n".join(map(json.dumps, rows)))
    source = list_listing(tmp_path / "list.jsonl", root=photos)
    assert source.classes == ("0", "1", "2", "3")
    assert [(sample.key, sample.label) for sample in source.samples] == [("first", 3), ("000000001", 0)]


@pytest.mark.parametrize("name", ["list.csv", "list.jsonl"])
def test_whole_numbers_with_a_point_are_classes_by_their_value(tmp_path: Path, name: str) -> None:
    """As pandas writes a column of whole numbers in which one is missing."""
    labels = ["0.0", "1.0", "2.0", "10.0", "11.0", ""]
    fill(tmp_path, {f"{i}.jpg": b"x" for i in range(6)})
    if name.endswith("csv"):
        lines = ["path,label", *(f"{i}.jpg,{label}" for i, label in enumerate(labels))]
    else:
        lines = [f'{{"path": "{i}.jpg", "label": {label or "null"}}}' for i, label in enumerate(labels)]
    (tmp_path / name).write_text("\n".join(lines))
    source = list_listing(tmp_path / name)
    assert [sample.label for sample in source.samples] == [0, 1, 2, 10, 11, NO_LABEL]
    assert source.classes == tuple(map(str, range(12)))


def test_numbers_among_names_are_names(tmp_path: Path) -> None:
    fill(tmp_path, {"a.jpg": b"x", "b.jpg": b"x", "list.csv": b"path,label\na.jpg,911\nb.jpg,mini\n"})
    assert list_listing(tmp_path / "list.csv").classes == ("911", "mini")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("path\n", "lists no images"),
        ("path\ngone.jpg\n", r"line 2.*cannot be looked at"),
        ("path\na.jpg\na.jpg\n", "both would be the sample 'a'"),
        ("file\na.jpg\n", "expected a path or a url"),
        ("path,label\na.jpg,1,2\n", "expected the named columns"),
        ("path,key\na.jpg,../../x\n", r"line 2: the key '../../x' cannot name.*leave the directory.*Change the column key"),
        ("path,key\na.jpg,x.1\n", r"line 2: the key 'x.1' cannot name.*dot.*Change the column key"),
        ("path,label\na.jpg,0\ndeep/b.jpg,-1\n", r"line 3: .*whole, from 0 to 9,999,999, got '-1'\. Leave the label empty"),
        ("path,label\na.jpg,0.0\ndeep/b.jpg,1.5\n", r"line 3: .*whole, from 0 to 9,999,999, got '1.5'"),
        ("path,label\na.jpg,0.0\ndeep/b.jpg,nan\n", r"line 3: .*got 'nan'\. Leave the label empty"),
        ('path\na.jpg\n"deep/b.jpg', "line 3: not valid CSV"),
        ("url\nfile:///etc/passwd\n", "URLs may start with"),
        ("path,label\na.jpg,99999999999\n", "line 2: .*from 0 to 9,999,999"),
    ],
)
def test_wrong_lists_say_why(photos: Path, content: str, message: str) -> None:
    (photos / "list.csv").write_text(content)
    with pytest.raises(ValueError, match=message):
        list_listing(photos / "list.csv")


def test_other_forms_are_refused(photos: Path) -> None:
    fill(
        photos,
        {
            "a.txt": b"a.jpg",
            "bad.jsonl": b'{"path": ',
            "odd.jsonl": b'["a.jpg"]',
            "mixed.jsonl": b'{"path":"a.jpg","label":"x"}\n{"path":"deep/b.jpg","label":1.0}',
        },
    )
    fill(photos, {"second.jsonl": b'{"path": "a.jpg"}\n\n{"path": oops}\n', "list.jsonl": b'{"path":"a.jpg","label":[1]}'})
    for name, message in (
        ("a.txt", "a list ends in"),
        ("bad.jsonl", "line 1: not valid JSONL"),
        ("second.jsonl", r"line 3: not valid JSONL \(Expecting value: column 10\)"),
        ("odd.jsonl", "expected the named columns"),
        ("mixed.jsonl", "line 2: .*whole numbers or texts, got 1.0 among texts"),
        ("list.jsonl", r"line 1: .*whole numbers or texts, got \[1\]"),
        ("none.csv", "cannot be read"),
    ):
        with pytest.raises(ValueError, match=message):
            list_listing(photos / name)


class Server(http.server.BaseHTTPRequestHandler):
    """/ok/N.jpg is an image; /flaky/ fails twice first, each time in another way; /gone/ is 404; /down/ is always 503."""

    seen: Counter[str]

    def do_GET(self) -> None:
        kind, name = self.path.strip("/").split("/")
        self.seen[self.path] += 1
        data = picture(int(name.split(".")[0]))
        if kind == "gone":
            self.send_error(404)
        elif kind == "down" or (kind == "flaky" and self.seen[self.path] == 1):
            self.send_error(503)
        else:
            short = kind == "flaky" and self.seen[self.path] == 2
            self.send_response(200)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if short else data)

    def log_message(self, *_: object) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[tuple[str, Counter[str]]]:
    seen = Counter[str]()
    handler = type("Handler", (Server,), {"seen": seen})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}", seen
        running.shutdown()
        thread.join()


def test_urls_are_tried_again_and_what_is_gone_is_an_error_or_listed(server: tuple[str, Counter[str]], tmp_path: Path) -> None:
    root, seen = server
    urls = [f"{root}/ok/1.jpg", f"{root}/flaky/2.jpg", f"{root}/gone/3.jpg"]
    (tmp_path / "list.csv").write_text("url,label\n" + "".join(f"{url},{i}\n" for i, url in enumerate(urls)))
    source = list_listing(tmp_path / "list.csv")
    with pytest.raises(ValueError, match=r"gone/3\.jpg: unreachable \(HTTP 404.*Correct the URL.*--unreachable leave-out"):
        write_shards(source, tmp_path / "refused", ShardOptions(shuffle=False))
    seen.clear()
    options = ShardOptions(shuffle=False, unreachable="leave-out", undecodable="error")
    result = write_shards(source, tmp_path / "out", options)
    index = ShardIndex.load(tmp_path / "out")
    assert [index.read_members(i)["jpg"] for i in range(2)] == [picture(1), picture(2)]
    assert [(item.name, item.cause[:8]) for item in result.left_out] == [(urls[2], "HTTP 404")]
    assert (seen["/flaky/2.jpg"], seen["/gone/3.jpg"]) == (3, 1)
    write_shards(source, tmp_path / "again", options)
    assert contents(tmp_path / "again") == contents(tmp_path / "out")
    with pytest.raises(ValueError, match="sizes of images behind URLs"):
        write_shards(source, tmp_path / "bytes", ShardOptions(bytes_per_shard=10**6))


def test_a_server_that_is_down_ends_the_run_unless_asked(
    server: tuple[str, Counter[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("data_tools.contents.download", lambda url: download(url, attempts=2, pause=0))
    (tmp_path / "list.csv").write_text(f"url\n{server[0]}/ok/1.jpg\n{server[0]}/down/2.jpg\n")
    source = list_listing(tmp_path / "list.csv")
    with pytest.raises(ValueError, match=r"down/2\.jpg: unreachable \(HTTP 503.*--unreachable leave-out"):
        write_shards(source, tmp_path / "out", ShardOptions())
    result = write_shards(source, tmp_path / "left", ShardOptions(unreachable="leave-out"))
    assert (result.samples, len(result.left_out)) == (1, 1)


def test_downloads_are_bounded(server: tuple[str, Counter[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data_tools.download.MAX_BYTES", 100)
    with pytest.raises(UnreachableError, match="too large"):
        download(f"{server[0]}/ok/1.jpg", sleep=no_pause)
    with pytest.raises(UnreachableError, match="Error"):
        download("http://127.0.0.1:9/x.jpg", attempts=3, sleep=no_pause)
