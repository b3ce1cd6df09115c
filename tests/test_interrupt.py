"""Signals to a command: exit codes, what is closed, the second one."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from fastrl.interrupt import Terminated, deferred, terminated_by_signal

LIVE_BAR = """
import sys, time
from fastrl import cli
from fastrl.console import Console

def wait(parser, argv):
    with Console(live=True).progress("sft", 10) as progress:
        progress.update(1, {})
        try:
            print("ready", file=sys.__stderr__, flush=True)
            time.sleep(60)
        finally:
            if argv:
                print("closing", file=sys.__stderr__, flush=True)
                time.sleep(60)
    return 0

cli._doctor = wait
sys.exit(cli.main(["doctor", *sys.argv[1:]]))
"""
SHOW_CURSOR = b"\x1b[?25h"


def start(*words):
    process = subprocess.Popen([sys.executable, "-c", LIVE_BAR, *words], stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    assert process.stderr.readline() == b"ready\n"
    return process


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_command_with_its_code_and_gives_the_terminal_back(number, code):
    process = start()
    process.send_signal(number)
    shown, said = process.communicate(timeout=10)
    assert process.returncode == code and b"fastrl: stopped" in said and b"Traceback" not in said
    assert SHOW_CURSOR in shown


def test_a_second_sigterm_ends_a_command_at_once():
    process = start("slow")
    process.send_signal(signal.SIGTERM)
    assert process.stderr.readline() == b"closing\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == -signal.SIGTERM


def test_what_handles_errors_lets_it_pass_and_the_handler_before_comes_back():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Terminated), terminated_by_signal():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except Exception:
            pytest.fail("taken for an error")
    assert signal.getsignal(signal.SIGTERM) is before


def test_another_thread_leaves_signals_alone():
    seen = []

    def work():
        with terminated_by_signal():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize("number, raised", [
    (signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_deferred_signal_waits_and_the_next_one_does_not(number, raised, capfd):
    with terminated_by_signal():
        handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
        with deferred() as request:
            os.kill(os.getpid(), number)
            assert request.signal == number
            with pytest.raises(raised):
                request.answer()
            request.answer()  # once is enough
        assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == handlers
        with pytest.raises(raised), deferred() as request:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)
            pytest.fail("the second one waited")
    assert "a second signal stops at once" in capfd.readouterr().err


def test_a_request_that_nobody_answers_is_answered_at_the_end():
    with pytest.raises(KeyboardInterrupt), deferred():
        os.kill(os.getpid(), signal.SIGINT)


def test_signals_that_nobody_handles_are_not_deferred():
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    with deferred():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
