"""Pictures and tables are drawn from the files: right size, right numbers, typed errors for what is no run."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.table import Table

from fs_fwdllm.errors import CheckpointError, ConfigError
from fs_fwdllm.report import RunFolder, RunRecord, compare_runs, plot_run, summary_table
from fs_fwdllm.report.units import format_bytes, format_count, format_metric, format_seconds
from tests.report.conftest import make_line


def png_size_px(path: Path) -> tuple[int, int]:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    return width, height


def cells(table: Table) -> dict[str, list[str]]:
    """``{fact: [value of each run]}``."""
    columns = [[str(cell) for cell in column.cells] for column in table.columns]
    found = {name: list(values) for name, *values in zip(*columns, strict=True)}
    return found | {"run": [str(column.header) for column in table.columns[1:]]}


def rows(table: Table) -> dict[str, dict[str, str]]:
    """``{run: {column: value}}``."""
    names, *columns = [(str(column.header), [str(cell) for cell in column.cells]) for column in table.columns]
    return {run: {name: cells[place] for name, cells in columns} for place, run in enumerate(names[1])}


def without_eval(number: int) -> dict:
    line = make_line(number)
    line.pop("eval", None)
    return line


def language_model(number: int) -> dict:
    line = make_line(number, peak_device_mib=10.0 * number)
    if "eval" in line:
        line["eval"] = {"loss": 1.0 / number, "token_accuracy": 0.1 * number, "perplexity": 9.0 - number}
    return line


def backprop(number: int) -> dict:
    return make_line(number, backward_passes=8 * number, forward_passes=8 * number, upload_bytes=10**6 * number)


@pytest.mark.parametrize("line", [make_line, without_eval, language_model])
@pytest.mark.parametrize("rounds", [1, 6])
def test_report_has_its_size_whatever_was_recorded(
    write_run: Callable[..., RunFolder], line: Callable[[int], dict], rounds: int
) -> None:
    folder = write_run(rounds, finished=False, line=line)
    assert not folder.report_path.exists()
    assert plot_run(folder.path) == folder.report_path
    assert png_size_px(folder.report_path) == (1500, 960)


def test_the_picture_shows_the_numbers(write_run: Callable[..., RunFolder]) -> None:
    same = [write_run(line=make_line), write_run(line=make_line)]
    for folder in same:  # same configuration but for the folder's name, which is in the title
        folder.path.rename(folder.path.parent / "now")
        (folder.path.parent / "now").joinpath("report.png").unlink()
        plot_run(folder.path.parent / "now")
        (folder.path.parent / "now").rename(folder.path)
    assert same[0].report_path.read_bytes() == same[1].report_path.read_bytes()
    other = write_run(line=lambda number: make_line(number, train_loss=3.0 / number))
    assert other.report_path.read_bytes() != same[0].report_path.read_bytes()


def test_series_are_the_recorded_points(write_run: Callable[..., RunFolder]) -> None:
    record = RunRecord.load(write_run(line=lambda n: make_line(n, train_loss=float("nan") if n == 2 else n)).path)
    assert record.series("round", "train_loss") == ([1, 3, 4, 5, 6], [1, 3, 4, 5, 6])
    assert record.series("bytes", "eval.accuracy") == ([800, 1600, 2400], [0.52, 0.54, 0.56])
    assert record.series("round", "peak_device_mib") == ([], [])


def test_comparison_table_has_the_runs_numbers(write_run: Callable[..., RunFolder], tmp_path: Path) -> None:
    peak_then_fall = {2: 0.6, 4: 0.9, 6: 0.7}
    first = write_run(line=make_line)
    second = write_run(
        line=lambda n: backprop(n) | ({"eval": {"loss": 0.3, "accuracy": peak_then_fall[n]}} if n % 2 == 0 else {}),
        expname="baseline",
        federate={"method": "FedAvg"},
    )
    compared = compare_runs([first.path, second.path], tmp_path / "new" / "both.png")
    assert compared.picture == tmp_path / "new" / "both.png"
    assert png_size_px(compared.picture) == (1600, 1060)
    assert compared.legend == [("1", "forward gradient (central, 8 probes)"), ("2", "FedAvg (backpropagation)")]
    assert compared.warning == ""
    assert rows(compared.result) == {
        "1 small": {"rounds": "6", "end": "0.5600", "best": "0.5600", "majority": "0.2500", "loss": "0.1667"},
        "2 baseline": {"rounds": "6", "end": "0.7000", "best": "0.9000", "majority": "-", "loss": "0.3000"},
    }
    shared = {"down": "1.8 KiB", "time": "9.0 s", "RSS": "506 MiB"}
    assert rows(compared.costs) == {
        "1 small": {"forward": "96", "backward": "-", "up": "600 B"} | shared,
        "2 baseline": {"forward": "48", "backward": "48", "up": "5.7 MiB"} | shared,
    }


def test_smaller_perplexity_is_better_and_the_final_line_has_the_last_word(write_run: Callable[..., RunFolder]) -> None:
    def perplexity_only(number: int) -> dict:
        return make_line(number) | {"eval": {"perplexity": [5.0, 3.0, 4.0][number - 1]}}

    folder = write_run(3, finished=False, line=perplexity_only)
    with folder.metrics_path.open("a") as file:
        file.write('{"final": true, "seconds": 77.0, "eval": {"perplexity": 3.5}}\n')
    summary = RunRecord.load(folder.path).summary()
    assert (summary.metric, summary.final, summary.best) == ("perplexity", 3.5, 3.0)
    assert summary.duration_s == 77.0
    assert summary.upload_bytes == 300


def test_runs_of_one_name_are_told_apart_and_unlike_runs_share_the_loss(
    write_run: Callable[..., RunFolder], tmp_path: Path
) -> None:
    first = write_run(line=make_line, outdir=str(tmp_path / "a"))
    second = write_run(line=language_model, outdir=str(tmp_path / "b"))
    third = write_run(line=without_eval, outdir=str(tmp_path / "c"))
    compared = compare_runs([first.path, second.path, third.path], tmp_path / "both.png")
    assert [name for _, name in compared.legend] == [str(first.path), str(second.path), str(third.path)]
    assert {name: found["end"] for name, found in rows(compared.result).items()} == {
        f"1 {first.path}": "0.3333", f"2 {second.path}": "0.3333", f"3 {third.path}": "0.3333"
    }  # fmt: skip
    assert [found["device"] for found in rows(compared.costs).values()] == ["-", "60 MiB", "-"]


def test_what_is_no_run_is_refused_and_nothing_is_written(
    write_run: Callable[..., RunFolder], config: object, tmp_path: Path
) -> None:
    good = write_run()
    empty = RunFolder.create(good.config())
    output = tmp_path / "both.png"
    bad = {tmp_path / "nothing": "no such", tmp_path: "name the one inside that is meant", empty.path: "holds no round"}
    for path, fragment in bad.items():
        with pytest.raises(CheckpointError, match=fragment):
            plot_run(path)
        with pytest.raises(CheckpointError, match=fragment):
            compare_runs([good.path, path], output)
    for paths, fragment in (([], "none is given"), ([good.path] * 9, "up to 8 configurations .* 9 are given")):
        with pytest.raises(ConfigError, match=fragment):
            compare_runs(paths, output)
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        compare_runs([good.path], tmp_path / "file" / "both.png")
    assert not output.exists()


def test_markup_in_a_name_is_shown_as_it_is(write_run: Callable[..., RunFolder], tmp_path: Path) -> None:
    folder = write_run(expname="_[red]$x_1")
    assert png_size_px(folder.report_path) == (1500, 960)
    compare_runs([folder.path, write_run(expname="$y^{", seed=1, fwdllm={"probes": 4}).path], tmp_path / "both.png")
    assert cells(summary_table(RunRecord.load(folder.path).summary()))["run"] == ["_[red]$x_1"]


@pytest.mark.parametrize(
    ("count_bytes", "text"),
    [(None, "-"), (0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (5 * 2**30, "5.0 GiB")],
)
def test_bytes_read_well(count_bytes: float | None, text: str) -> None:
    assert format_bytes(count_bytes) == text


def test_other_numbers_read_well() -> None:
    assert [format_seconds(s) for s in (None, 0, 59.94)] == ["-", "0.0 s", "59.9 s"]
    assert [format_seconds(s) for s in (59.97, 125, 3599.6, 3720)] == [
        "1 min 00 s",
        "2 min 05 s",
        "1 h 00 min",
        "1 h 02 min",
    ]
    assert [format_count(n) for n in (None, 0, 1234567)] == ["-", "0", "1,234,567"]
    assert [format_metric(v) for v in (None, 1.0, 0.85, 1234.56)] == ["-", "1.000", "0.8500", "1235"]
