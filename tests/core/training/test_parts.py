"""Random streams, held-out tracking, processes, progress."""

import io
import logging

import pytest
import torch
from rich.console import Console
from torch import nn

from flowbridge.core.errors import ConfigurationError
from flowbridge.core.execution import progress
from flowbridge.core.training.held_out import HeldOutTracker
from flowbridge.core.training.objective import cosine, warming_up
from flowbridge.core.training.processes import Processes, is_main_process, local_processes
from flowbridge.core.training.streams import random_stream, stream_seed


def test_streams_are_those_of_every_version_so_far():
    assert stream_seed(3, 7) == 3 * 1_000_003 + 7
    assert stream_seed(3, 7, 500_000_009) == 3 * 1_000_003 + 7 + 500_000_009
    assert stream_seed(-3, 7) == -3 * 1_000_003 + 7
    expected = torch.rand(4, generator=torch.Generator().manual_seed(3 * 1_000_003 + 7))
    assert torch.equal(torch.rand(4, generator=random_stream(3, 7)), expected)


def test_neighbouring_streams_differ_and_enormous_seeds_are_taken():
    streams = {(seed, number): random_stream(seed, number) for seed in range(4) for number in range(50)}
    assert len({tuple(torch.rand(2, generator=stream).tolist()) for stream in streams.values()}) == 200
    for seed in (2**63, 2**100, -(2**100)):
        assert 0.0 <= float(torch.rand(1, generator=random_stream(seed, 1))) < 1.0


def test_the_tracker_keeps_the_best_and_counts_the_others():
    tracker, module = HeldOutTracker(2), nn.Linear(1, 1, bias=False)

    def see(value):
        with torch.no_grad():
            module.weight.fill_(value)
        tracker.update(value, module)

    untouched = nn.Linear(1, 1, bias=False)
    before = untouched.weight.detach().clone()
    tracker.restore(untouched)
    assert torch.equal(untouched.weight, before)
    seen = []
    for value in (3.0, 1.0, float("nan"), 0.5, 0.5, 2.0):
        see(value)
        seen.append((tracker.best, tracker.waited, tracker.finished))
    assert seen == [(3.0, 0, False), (1.0, 0, False), (1.0, 1, False), (0.5, 0, False), (0.5, 1, False), (0.5, 2, True)]
    other = HeldOutTracker(2)
    other.load_state_dict(tracker.state_dict())
    assert other.finished
    other.restore(module)
    assert module.weight.item() == 0.5
    endless = HeldOutTracker()
    for _ in range(10):
        endless.update(1.0, module)
    assert not endless.finished


def test_schedules():
    assert cosine(2.0, 1.0, 0, 10) == 2.0
    assert cosine(2.0, 1.0, 5, 10) == pytest.approx(1.5)
    assert cosine(2.0, 1.0, 10, 10) == cosine(2.0, 1.0, 12, 10) == 1.0
    assert cosine(2.0, 1.0, 0, 0) == 2.0
    decay = warming_up(0.5)
    assert [decay(count) for count in (0, 1, 2, 8, 100)] == [0.0, 2 / 11, 3 / 12, 0.5, 0.5]


def test_one_process_without_torchrun():
    alone = Processes.of_this_training()
    assert (alone, is_main_process(), local_processes()) == (Processes(1, 1, 0), True, 1)
    batch = torch.arange(6)
    assert torch.equal(alone.share(batch), batch)
    assert alone.whole(batch) is batch
    assert alone.agree("this") == "this"


def test_what_torchrun_says(monkeypatch):
    for name, value in {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "6", "LOCAL_WORLD_SIZE": "2", "RANK": "4"}.items():
        monkeypatch.setenv(name, value)
    assert Processes.of_this_training() == Processes(6, 2, 4)
    assert (is_main_process(), local_processes()) == (False, 2)


def test_shares_are_disjoint_and_equal_or_refused():
    parts = [Processes(3, 3, rank).share(torch.arange(12)) for rank in range(3)]
    assert sorted(torch.cat(parts).tolist()) == list(range(12))
    assert {len(part) for part in parts} == {4}
    Processes(3).require_equal_shares({"a": 96, "b": None})
    with pytest.raises(ConfigurationError, match=r"3 processes cannot share batches of 64.*training.b a multiple of 3"):
        Processes(3).require_equal_shares({"a": 96, "b": 64})


def test_progress_is_a_bar_on_a_terminal_and_lines_in_the_log_elsewhere(monkeypatch, caplog):
    caplog.set_level(logging.INFO, "flowbridge")
    monkeypatch.setattr(progress, "_SECONDS", 0.0)
    silent = Console(file=io.StringIO(), force_terminal=False)
    monkeypatch.setattr(progress, "console", silent)
    assert list(progress.track("ab", "letters", 2)) == ["a", "b"]
    with progress.progress_bar("hidden", 3, shown=False) as bar:
        bar.update(1)
    assert [record.getMessage() for record in caplog.records] == ["letters: 1 of 2", "letters: 2 of 2"]
    assert silent.file.getvalue() == ""
    caplog.clear()
    terminal = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(progress, "console", terminal)
    with progress.progress_bar("learning", 3) as bar:
        bar.update(1, "loss 0.5")
        bar.update(2, "loss 0.25", description="still learning")
    assert all(part in terminal.file.getvalue() for part in ("still learning", "2/3", "loss 0.25"))
    assert not caplog.records
