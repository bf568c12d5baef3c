"""What is seen while it runs."""

import logging

import pytest
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar

from lightning_xai_compress.callbacks.console import progress

from toy import compression, fit, trainer


def test_the_schedule_is_printed_once_as_a_table(tmp_path, capsys):
    fit(tmp_path, [compression(tmp_path)])

    out = capsys.readouterr().out
    rows = [line.split() for line in out.splitlines() if line.startswith(("from epoch", "0 ", "2 ", "4.75 ", "8 "))]
    assert out.count("estimated size") == 1
    assert rows[1][:4] == ["0", "warm-up", "0.0%", "32"]
    assert rows[2][:2] == ["2", "pruning"]
    assert rows[3][:5] == ["4.75", "quantized", "training", "50.0%", "3"]
    assert rows[4] == ["8", "end"]


def test_the_estimated_size_is_near_the_real_one_for_the_layers(tmp_path):
    from lightning_xai_compress.report import estimated_bytes

    # 100,000 weights, 90 % zeros, 3 bits: about 0.47 + 0.1 * 2.55 bits a weight
    assert estimated_bytes(400_000, 100_000, 0.9, 3.0) == pytest.approx(100_000 * (0.469 + 0.255) / 8, rel=0.01)
    assert estimated_bytes(400_000, 100_000, 0.0, None) == 400_000


def test_each_step_is_logged_once(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="lightning.pytorch.utilities.rank_zero"):
        fit(tmp_path, [compression(tmp_path)])

    lines = [record.getMessage() for record in caplog.records if "[compression]" in record.getMessage()]
    assert sum("pruned to" in line for line in lines) == 6
    assert sum("quantized to" in line for line in lines) == 1
    assert len(lines) == len(set(lines))


def test_relevance_and_export_have_a_bar_beside_tqdm(tmp_path, capsys):
    fit(tmp_path, [compression(tmp_path), TQDMProgressBar()], enable_progress_bar=True)

    seen = "".join(capsys.readouterr())
    assert "relevance:   0%" in seen
    assert "export:   0%" in seen


def test_bars_live_within_the_rich_progress(tmp_path):
    pytest.importorskip("rich")
    bar = RichProgressBar()

    run = trainer(tmp_path, [bar], enable_progress_bar=True)
    bar._trainer = run
    bar._init_progress(run)
    with progress(run, "relevance", 3) as advance:
        advance()
        seen = [(task.description, task.completed, task.total) for task in bar.progress.tasks]
    assert ("[white]relevance", 1, 3) in seen
    assert not bar.progress.tasks
    bar._stop_progress()


def test_without_a_bar_nothing_is_shown(tmp_path, capsys):
    run = trainer(tmp_path)
    with progress(run, "relevance", 3) as advance:
        advance()
    assert capsys.readouterr().out == ""
