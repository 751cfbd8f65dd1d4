"""Results of a sweep as tables and a page, from run directories written by hand."""

import csv
import json

from simmim_scale.sweeps.collect import collect, list_table, markdown, tables
from simmim_scale.sweeps.expand import expand
from simmim_scale.sweeps.page import write_results
from simmim_scale.sweeps.run import State, state_of
from simmim_scale.sweeps.spec import load_sweep


def write_run(stage, values, *, finished=True, avg_dist=7.0):
    stage.run_dir.mkdir(parents=True)
    (stage.run_dir / "config.yaml").write_text("x: 1\n")
    records = [{"step": step, "loss": 1.0, "val_loss": value, "avg_dist": avg_dist} for step, value in enumerate(values, start=1)]
    (stage.run_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if finished:
        (stage.run_dir / "weights").mkdir()
        (stage.run_dir / "weights" / "model.safetensors").write_bytes(b"x")


def test_a_table_says_what_is_final_and_what_was_published(write_sweep, sweep_tree):
    path = write_sweep(sweep_tree)
    sweep = load_sweep(path)
    runs = expand(sweep, path)
    write_run(runs[0].stages[0], [0.9, 0.5])
    write_run(runs[1].stages[0], [0.8, 0.25], avg_dist=9.0)
    write_run(runs[2].stages[0], [0.75], finished=False)
    assert [state_of(run.stages[0]) for run in runs] == [State.FINISHED, State.FINISHED, State.INTERRUPTED, State.NEW]
    table = list_table(sweep, runs, collect(sweep, runs))
    assert table.headings == ("cell", "ratio", "AvgDist", "Loss", "ImageNet (published)")
    assert table.rows == (
        ("8 px", ".3", "7.0", "0.5000", ""),
        ("8 px", ".5", "9.0", "0.2500", "82.8"),
        ("16 px", ".3", "7.0", "0.7500 (step 1)", ""),
        ("16 px", ".5", "", "", ""),
    )
    text = markdown(table)
    assert "| 8 px | .5 | 9.0 | 0.2500 | 82.8 |" in text
    assert "Published figures: nowhere" in text


def test_a_grid_is_laid_out_like_the_published_one(write_sweep, sweep_tree):
    path = write_sweep({**sweep_tree, "layout": "grid", "leave_out": [{"cell": "16 px", "ratio": ".3"}]})
    sweep = load_sweep(path)
    runs = expand(sweep, path)
    write_run(runs[1].stages[0], [0.25])
    (table,) = tables(sweep, runs, collect(sweep, runs))
    assert table.headings == ("cell \\ ratio", ".3", ".5")
    assert table.rows == (("8 px", "", "0.2500 (82.8)"), ("16 px", "not run", ""))


def test_digits_and_missing_metrics(write_sweep, sweep_tree):
    sweep_tree["stages"]["pretrain"] |= {"digits": 1}
    path = write_sweep(sweep_tree)
    sweep = load_sweep(path)
    runs = expand(sweep, path)
    write_run(runs[0].stages[0], [82.84])
    write_run(runs[1].stages[0], [], finished=False)
    rows = list_table(sweep, runs, collect(sweep, runs)).rows
    assert rows[0][2] == "82.8"
    assert rows[1][2] == "interrupted"


def test_the_page_stands_alone(write_sweep, sweep_tree):
    sweep_tree["title"] = "Masks & <cells>"
    path = write_sweep(sweep_tree)
    sweep = load_sweep(path)
    runs = expand(sweep, path)
    for number, run in enumerate(runs):
        write_run(run.stages[0], [0.9, 0.8 - number / 10, 0.5 - number / 10])
    paths = {path.name: path for path in write_results(sweep, runs, collect(sweep, runs))}
    page = paths["sweep.html"].read_text()
    assert "4 of 4 trainings finished" in page
    assert "<cells>" not in page, "text is escaped"
    assert page.count("<svg") == 1
    assert "16 px, .5" in page
    assert "http" not in page
    rows = list(csv.reader(paths["table.csv"].read_text().splitlines()))
    assert len(rows) == 5
    assert rows[2][-1] == "82.8"
