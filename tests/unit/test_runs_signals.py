import os
import signal
import subprocess
import sys
import threading

import pytest

from dino_exp.runs.signals import STOP_SIGNALS, SignalFlags

LOOP = """
import signal, sys, time
from dino_exp.runs.signals import SignalFlags
if sys.argv[1] == "launcher":
    signal.signal(signal.SIGUSR2, lambda number, frame: print("requeued", number, flush=True))
try:
    with SignalFlags() as flags:
        print("ready", flush=True)
        while flags.stop_signal is None or sys.argv[1] == "deaf":
            if flags.take_save_request():
                print("saved", flush=True)
            time.sleep(0.005)
        print("saved and stopped", flush=True)
        flags.call_previous(flags.stop_signal)
except KeyboardInterrupt:
    print("aborted", flush=True)
    sys.exit(99)
sys.exit(flags.exit_code)
"""


@pytest.fixture
def start():
    processes = []

    def start_loop(mode="plain"):
        process = subprocess.Popen([sys.executable, "-c", LOOP, mode], stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "ready\n"
        return process

    yield start_loop
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_stop_signal_saves_stops_and_exits_with_128_and_its_number(start, number):
    process = start()
    process.send_signal(number)
    assert process.stdout.read() == "saved and stopped\n"
    assert process.wait(timeout=60) == 128 + number


def test_usr1_saves_and_goes_on(start):
    process = start()
    for _ in range(2):
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "saved\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM


def test_a_second_int_aborts_at_once(start):
    process = start("deaf")
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGUSR1)
    assert process.stdout.readline() == "saved\n"  # the first one was only noted
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 99
    assert process.stdout.read() == "aborted\n"


def test_the_handler_of_a_launcher_is_called_after_the_save(start):
    process = start("launcher")
    process.send_signal(signal.SIGUSR2)
    assert process.stdout.read() == f"saved and stopped\nrequeued {int(signal.SIGUSR2)}\n"
    assert process.wait(timeout=60) == 128 + signal.SIGUSR2


def test_the_first_stop_signal_gives_the_exit_code():
    with SignalFlags() as flags:
        assert flags.exit_code == 0
        os.kill(os.getpid(), signal.SIGUSR2)
        os.kill(os.getpid(), signal.SIGTERM)
        assert flags.stop_signal == signal.SIGUSR2
    assert flags.exit_code == 128 + signal.SIGUSR2


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGUSR1)]
    with pytest.raises(ValueError, match="x"), SignalFlags():
        raise ValueError("x")
    assert [signal.getsignal(number) for number in (*STOP_SIGNALS, signal.SIGUSR1)] == before


def test_python_and_default_handlers_are_no_launchers():
    with SignalFlags() as flags:
        assert [flags.call_previous(number) for number in STOP_SIGNALS] == [False, False, False]


def test_outside_the_main_thread_nothing_is_installed_and_that_is_said(caplog):
    before = signal.getsignal(signal.SIGTERM)
    seen = []

    def work():
        with SignalFlags() as flags:
            seen.append((signal.getsignal(signal.SIGTERM), flags.call_previous(signal.SIGTERM)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, False)]
    assert "outside the main thread" in caplog.text
