"""Signals ask a training to stop; a second one stops it at once, and so does one outside of it."""

import os
import signal
import time

import pytest

from rlhf.distributed import launch
from rlhf.run import signals
from rlhf.run.signals import StopRequest, interrupt_on_signals


@pytest.fixture(autouse=True)
def _harmless():
    """The usual handlers raise, so that no signal ends the tests, however these were started."""
    before = {number: signal.signal(number, signal.default_int_handler) for number in StopRequest.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_the_second_stops_the_work_and_the_third_acts(number, capfd):
    with StopRequest() as stop:
        stop.doing = "the evaluation of step 5"
        with stop.interruptible():
            send(number)
            assert stop.requested
            told = f"{signal.Signals(number).name}: finishing the evaluation of step 5, then saving; again to stop now"
            assert capfd.readouterr().err == f"\n{told}\n"
            with pytest.raises(KeyboardInterrupt):
                send(number)
        assert "stopping now, with the last finished step saved" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            send(number)
    assert signal.getsignal(number) is signal.default_int_handler


def test_a_second_signal_waits_until_an_update_or_a_save_is_done(capfd):
    with StopRequest(speaks=False) as stop:
        send(signal.SIGINT)
        send(signal.SIGINT)  # nothing is interrupted here
        with pytest.raises(KeyboardInterrupt), stop.interruptible():
            pytest.fail("the next step begins")
    assert capfd.readouterr().err == "", "one process speaks for all"


def test_torchruns_echo_is_not_a_second_signal_and_its_patience_is_short(monkeypatch):
    monkeypatch.setenv(launch.TORCHRUN_MARK, "1")
    monkeypatch.setattr(signals, "GRACE_SECONDS", 0.01)
    with StopRequest() as stop, stop.interruptible():
        send(signal.SIGINT)
        send(signal.SIGINT)
        monkeypatch.setattr(signals, "ECHO_SECONDS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            time.sleep(5)  # ended before torchrun would end the process


@pytest.mark.parametrize("training", [True, False])
def test_the_launchers_end_does_not_count_as_a_second_signal(monkeypatch, training):
    """Ctrl-C in a shell ends the launcher, too, while a step is finished or a report written."""
    numbers = []
    monkeypatch.setattr(launch, "_set_death_signal", numbers.append)
    launch._ended.clear()  # as `end_with_launcher` leaves it
    with StopRequest() if training else pytest.raises(KeyboardInterrupt), interrupt_on_signals():
        send(signal.SIGINT)
    assert numbers == [0]
    assert launch._ended.is_set()


def test_signals_interrupt_unless_they_do_something_already():
    own = lambda *_: None
    signal.signal(signal.SIGUSR1, own)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with interrupt_on_signals():
        assert signal.getsignal(signal.SIGUSR1) is own
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGHUP])
def test_a_batch_systems_warning_may_come_often_and_a_terminal_may_go(number):
    with StopRequest() as stop, stop.interruptible():
        for _ in range(3):
            send(number)
        assert stop.requested
    assert signal.getsignal(number) is signal.default_int_handler


def test_nohup_is_respected():
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopRequest() as stop:
        send(signal.SIGHUP)
        assert not stop.requested
