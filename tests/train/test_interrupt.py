import signal
import threading

import pytest

from moesaic.train.interrupt import StopRequest

HANGUP = getattr(signal, "SIGHUP", signal.SIGTERM)  # Windows has none


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, HANGUP])
def test_a_signal_becomes_a_request_and_the_handlers_come_back(number: signal.Signals) -> None:
    started_with = signal.getsignal(number)
    if number is HANGUP:
        signal.signal(number, signal.SIG_DFL)  # the tests themselves may have been started by nohup
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert stop.name is None
        signal.raise_signal(number)
        assert stop.name == number.name
    assert signal.getsignal(number) is before
    signal.signal(number, started_with)


def test_a_lost_terminal_that_is_ignored_stays_so() -> None:
    before = signal.signal(HANGUP, signal.SIG_IGN)  # as nohup starts a process
    try:
        with StopRequest() as stop:
            signal.raise_signal(HANGUP)
            assert (stop.name is None) == (HANGUP.name == "SIGHUP")
    finally:
        signal.signal(HANGUP, before)


def test_a_second_interrupt_stops_at_once_and_a_second_termination_does_not() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.name == "SIGTERM"
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def enter() -> None:
        with StopRequest() as stop:
            seen.append((stop.name, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
