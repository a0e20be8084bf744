"""Signals ask a training to stop; a second one, and one outside of training, interrupt."""

import os
import signal

import pytest

from rlhf.run.signals import StopRequest, interrupt_on_signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_and_the_second_acts(number):
    # So that the second one does not end the tests, and does act where they were started with
    # SIGINT ignored.
    old = signal.signal(number, signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT)
    with StopRequest() as stop:
        assert not stop.requested
        os.kill(os.getpid(), number)
        assert stop.requested
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(signal.SIGINT) is before
    signal.signal(number, old)


def test_signals_interrupt_unless_they_do_something_already():
    before = {number: signal.getsignal(number) for number in StopRequest.SIGNALS}
    own = lambda *_: None
    signal.signal(signal.SIGUSR1, own)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with interrupt_on_signals():
        assert signal.getsignal(signal.SIGUSR1) is own
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_batch_systems_warning_may_come_often():
    before = [signal.getsignal(number) for number in StopRequest.SIGNALS]
    with StopRequest() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.requested
    assert [signal.getsignal(number) for number in StopRequest.SIGNALS] == before
