"""Ctrl-C while it must wait."""

import signal

import pytest

from fastdiff.interrupts import held


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
