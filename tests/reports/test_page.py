"""The report: one file, nothing from elsewhere, nothing unescaped, and readable at any stage of a run."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from simmim_scale.config.schema import ReportConfig
from simmim_scale.reports.page import MAX_GALLERY, summarise, write_report
from simmim_scale.reports.reconstructions import draw_reconstructions, gallery_path, save_picture
from simmim_scale.reports.records import OpRow, RunHeader, StepRecord
from simmim_scale.reports.sinks import make_sinks, read_metrics
from simmim_scale.reports.terminal import Terminal

ATTACK = "<script>alert('&')</script>"


class _Outline(HTMLParser):
    """Tags, their balance, and every attribute that could fetch something."""

    VOID = frozenset({"meta", "img", "input", "link", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.sources: list[str] = []
        self.count: dict[str, int] = {}

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.sources += [
            value or "" for name, value in attributes if name in ("src", "href", "xlink:href", "action", "data", "srcset")
        ]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def write_run(run_dir: Path, *, steps: int = 40, pictures: int = 3, fp16: bool = False) -> None:
    header = RunHeader(
        run_dir="runs/a", command=f"simmim pretrain {ATTACK}", device="cpu, 2 threads", world_size=2, versions={"torch": ATTACK},
        ops=(OpRow(op="window_attention", implementation="reference", reason=ATTACK),), plan={f"steps {ATTACK}": steps},
    )  # fmt: skip
    (run_dir / "config.yaml").write_text(f"seed: 0\nnote: {ATTACK}\n")
    with make_sinks(ReportConfig(), run_dir, total_steps=steps, terminal=Terminal((run_dir / "log.txt").open("w"))) as sinks:
        sinks.write_header(header)
        for step in range(1, steps + 1):
            sinks.write_step(
                StepRecord(
                    step=step,
                    epoch=step / 10,
                    loss=math.nan if step == 5 else 1 / step,
                    lr=1e-3,
                    grad_norm=1.0,
                    images_per_second=100.0,
                    data_wait=0.1,
                    seconds=2.0,
                    memory_bytes=2**30,
                    spent={
                        "data wait": 0.5,
                        "compute": 1.5,
                        "validation": 0.0,
                        "saving": 1.0 if step % 10 == 1 else 0.0,
                        "other": 0.25,
                    },
                    loss_scale=1024.0 if fp16 else None,
                    skipped=step == 5,
                    nonfinite_source=ATTACK if step == 5 else None,
                    validation={"val_loss": 0.5 - step / 1000, "val_baseline": 1.0} if step % 10 == 0 else None,
                )
            )
    rng = np.random.default_rng(0)
    for index in range(pictures):
        rows = [tuple(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for _ in range(3))]
        save_picture(draw_reconstructions(rows), gallery_path(run_dir, 10 * (index + 1)))
    if pictures:
        save_picture(draw_reconstructions(rows), run_dir / "reconstructions.png")


def outline(path: Path) -> _Outline:
    parsed = _Outline()
    parsed.feed(path.read_text(encoding="utf-8"))
    parsed.close()
    assert parsed.open == []
    return parsed


def test_page_is_self_contained_and_escaped(tmp_path: Path) -> None:
    write_run(tmp_path)
    page = write_report(tmp_path)
    assert page == tmp_path / "report.html"
    text, parsed = page.read_text(encoding="utf-8"), outline(page)
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert "url(" not in re.sub(r"url\(#", "", text)
    assert all(source.startswith(("data:image/webp;base64,", "#")) for source in parsed.sources)
    assert ATTACK not in text
    assert "&lt;script&gt;alert" in text
    assert parsed.count["script"] == 1
    assert parsed.count["img"] == 4
    assert parsed.count["svg"] == 6  # loss twice (for desk and phone), learning rate, images/s, gradient norm, data wait


def test_page_says_where_the_time_went(tmp_path: Path) -> None:
    write_run(tmp_path, steps=40)
    text = " ".join(write_report(tmp_path).read_text(encoding="utf-8").split())
    assert "Where the time went" in text
    for row in ("data wait</th><td>20s</td><td>21.3%", "compute</th><td>1:00</td><td>63.8%", "saving</th><td>4.0s</td><td>4.3%"):
        assert row in text
    assert "validation</th><td>0.0s</td><td>0.0%" in text
    assert "other</th><td>10s</td><td>10.6%" in text
    assert 'images per second</th><td colspan="3">100' in text


def test_records_without_an_account_have_no_section(tmp_path: Path) -> None:
    write_run(tmp_path)
    path = tmp_path / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    older = [{key: value for key, value in row.items() if not key.startswith("spent_")} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in older))
    assert "Where the time went" not in write_report(tmp_path).read_text(encoding="utf-8")


def test_page_shows_the_numbers(tmp_path: Path) -> None:
    write_run(tmp_path, fp16=True)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    for fact in (
        "54% below a guess from what is visible",
        "step 30, validation loss 0.4700",
        "1:20",
        "Loss scale",
        "Skipped steps",
        "guess",
    ):
        assert fact in text, fact


def test_long_gallery_is_thinned_with_its_ends(tmp_path: Path) -> None:
    write_run(tmp_path, steps=10, pictures=20)
    text = write_report(tmp_path).read_text(encoding="utf-8")
    captions = re.findall(r"<figcaption>step (\d+)", text)
    assert len(captions) == MAX_GALLERY
    assert captions[0] == "10"
    assert captions[-1] == "200"


def test_a_directory_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "holiday.jpg").write_bytes(b"picture")
    with pytest.raises(ValueError, match="is no run directory"):
        write_report(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["holiday.jpg"]


def test_pictures_of_a_normalised_target_say_what_was_put_back(tmp_path: Path) -> None:
    write_run(tmp_path, steps=2, pictures=1)
    for value, said in (("null", False), ("47", True)):
        (tmp_path / "config.yaml").write_text(f"objective: {{norm_target_window: {value}}}\n")
        assert ("local mean and contrast" in write_report(tmp_path).read_text(encoding="utf-8")) == said


def test_run_that_has_barely_begun(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("task: pretrain\n")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "No step has been trained yet" in text
    assert "<script" not in text
    write_run(tmp_path, steps=1, pictures=0)
    outline(write_report(tmp_path))


def test_replaced_images_are_listed_once(tmp_path: Path) -> None:
    folder = tmp_path / "quarantine"
    folder.mkdir()
    (tmp_path / "config.yaml").write_text("task: pretrain\n")
    entry = {"sample": 3, "name": ATTACK, "cause": "truncated", "replacement": 5}
    for rank in (0, 1):
        (folder / f"rank-{rank:05d}.jsonl").write_text(json.dumps(entry) + '\n{"sample": 4, "na')
    text = write_report(tmp_path).read_text(encoding="utf-8")
    assert "could not be decoded: 1<" in text
    assert text.count("(truncated)") == 1
    assert ATTACK not in text


def test_missing_directory_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no run directory"):
        write_report(tmp_path / "none")


def test_summary_of_a_run_without_validation(tmp_path: Path) -> None:
    labels = {tile.label: tile for tile in summarise([{"step": 1, "epoch": 0.1, "loss": None, "lr": 0.1, "grad_norm": None}])}
    assert labels["Training loss"].value == "nan"
    assert "Validation loss" not in labels
    assert summarise([]) == []


def test_best_validation_is_named_when_it_is_not_the_last(tmp_path: Path) -> None:
    records = [{"step": step, "epoch": 0.0, "loss": 1.0, "val_loss": loss} for step, loss in ((1, 0.5), (2, 0.4), (3, 0.45))]
    tiles = {tile.label: tile for tile in summarise(records)}
    assert tiles["Validation loss"].value == "0.4500"
    assert tiles["Best validation"].note == "at step 2"


def test_page_reads_what_the_sinks_write(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 41))


def test_accuracies_get_tiles_and_a_chart(tmp_path: Path) -> None:
    rows = [{"step": step, "epoch": step / 4, "loss": 2.0, "lr": 1e-3, "grad_norm": 1.0} for step in range(1, 5)]
    rows[1] |= {"val_loss": 1.9, "val_top1": 31.25, "val_top5": 80.0}
    rows[3] |= {"val_loss": 1.5, "val_top1": 43.75, "val_top5": 90.0, "val_knn": 20.0}
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report(tmp_path).read_text()
    assert "43.75 %" in page
    assert "31.25 %" not in page
    assert "Accuracy" in page
    assert "neighbours" in page
    plain = [{key: value for key, value in row.items() if key not in ("val_top1", "val_top5", "val_knn")} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in plain))
    assert "Accuracy" not in write_report(tmp_path).read_text()
