"""Ctrl-C while it must wait."""

import signal

import pytest

from fastdiff.interrupts import held


@pytest.fixture
def ctrl_c_interrupts():
    """As it does not where a shell without job control put the tests in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_ctrl_c_waits_for_the_end_of_what_must_not_be_interrupted():
    done = False
    with pytest.raises(KeyboardInterrupt), held():
        signal.raise_signal(signal.SIGINT)
        done = True
    assert done


def test_it_is_as_before_afterwards():
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    with pytest.raises(ValueError, match="x"), held():
        assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, ())
        raise ValueError("x")
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == before
