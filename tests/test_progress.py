"""Progress is a bar on a terminal, plain lines elsewhere, and silent where it is disabled."""

from __future__ import annotations

import io
import re

import pytest

from pisa_dist import progress
from pisa_dist.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Pipe(io.StringIO):
    flushed = 0

    def flush(self) -> None:
        self.flushed += 1


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the clock shows; a wide terminal, whatever the one that runs the tests."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    return now


def test_a_pipe_gets_one_flushed_line_per_evaluation(clock: list[float]) -> None:
    pipe = Pipe()
    with Progress(300, stream=pipe) as shown:
        for done in range(1, 51):
            shown.advance(done, 0.5)
        assert pipe.getvalue() == ""
        clock[0] += 4
        shown.evaluated({"round": 50, "train_loss": 0.12344, "test_accuracy": 0.9123})
        assert pipe.flushed == 1
    assert pipe.getvalue() == "round   50/300  loss 0.1234  accuracy 0.9123  12.5 rounds/s\n"


def test_unknown_numbers_are_left_out() -> None:
    pipe = Pipe()
    with Progress(10_000, stream=pipe) as shown:
        shown.evaluated({"round": 0, "train_loss": 2.5, "test_accuracy": None})
        shown.evaluated({"round": 0})
    assert pipe.getvalue() == "round     0/10000  loss 2.5000\nround     0/10000\n"


def test_a_resumed_run_counts_only_its_own_rounds_as_speed(clock: list[float]) -> None:
    pipe = Pipe()
    with Progress(200, start_round=100, stream=pipe) as shown:
        clock[0] += 10
        shown.evaluated({"round": 120})
    assert pipe.getvalue().endswith("  2.0 rounds/s\n")


def test_a_terminal_gets_a_bar_with_loss_accuracy_speed_and_time_left(clock: list[float]) -> None:
    terminal = Terminal()
    with Progress(300, stream=terminal) as shown:
        clock[0] += 2
        shown.evaluated({"round": 30, "train_loss": 0.7, "test_accuracy": 0.75})
        shown.advance(60, 0.5)
        shown.advance(90, None)
        shown.advance(150, 0.25)
    last = terminal.getvalue().rsplit("\r", 1)[-1]
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", last)
    assert re.search(r"round 150/300 .*loss 0\.2500  accuracy 0\.7500  75\.0 rounds/s left \S*:\S*", text)


def test_a_resumed_bar_starts_where_the_run_does() -> None:
    terminal = Terminal()
    with Progress(300, start_round=120, stream=terminal):
        pass
    assert "120/300" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())


def test_the_cursor_comes_back_when_training_fails() -> None:
    terminal = Terminal()
    with pytest.raises(RuntimeError, match="diverged"), Progress(3, stream=terminal):
        raise RuntimeError("diverged")
    hidden, shown = terminal.getvalue().rfind("\x1b[?25l"), terminal.getvalue().rfind("\x1b[?25h")
    assert 0 <= hidden < shown


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    terminal = Terminal()
    with Progress(5, stream=terminal) as shown:
        shown.evaluated({"round": 5})
    assert terminal.getvalue() == "round    5/5\n"


def test_forced_colour_does_not_make_a_pipe_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    pipe = Pipe()
    with Progress(5, stream=pipe) as shown:
        shown.evaluated({"round": 5})
    assert pipe.getvalue() == "round    5/5\n"


@pytest.mark.parametrize("stream", [Terminal, Pipe])
def test_a_disabled_rank_writes_nothing(stream: type[io.StringIO]) -> None:
    silent = stream()
    with Progress(5, enabled=False, stream=silent) as shown:
        shown.advance(1, 0.5)
        shown.evaluated({"round": 1, "train_loss": 0.5})
    assert silent.getvalue() == ""


def test_lines_go_to_standard_output_unless_told(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress(5) as shown:
        shown.evaluated({"round": 5})
    assert capsys.readouterr().out == "round    5/5\n"
