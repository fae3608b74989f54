import socket
import threading
import time

import pytest

from t5style.parallel.local import free_port
from t5style.parallel.rendezvous import StartupError, roll_call


def together(*calls):
    """Runs roll calls at the same time; what each returned (None) or raised, and the seconds it all took."""
    results = [None] * len(calls)

    def call(index, arguments):
        try:
            roll_call(**arguments)
        except StartupError as error:
            results[index] = error

    began = time.monotonic()
    threads = [threading.Thread(target=call, args=item) for item in enumerate(calls)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results, time.monotonic() - began


def arguments(port, processes, process, timeout=20.0, **more):
    return {
        "address": f"localhost:{port}",
        "num_processes": processes,
        "process_id": process,
        "timeout": timeout,
    } | more


def test_all_present():
    port = free_port()
    results, _ = together(*(arguments(port, 4, process) for process in range(4)))
    assert results == [None] * 4
    # The port is free again at once: JAX takes it next.
    with socket.create_server(("", port)):
        pass


def test_the_absent_are_named_to_all_who_came():
    port = free_port()
    hosts = {1: "worker-1.example", 3: "worker-3.example"}
    results, seconds = together(
        arguments(port, 4, 0, 1.0, hosts=hosts), arguments(port, 4, 2, 1.0, hosts=hosts)
    )
    for error in results:
        assert "only 2 of 4 processes have started; absent: 1 (worker-1.example), 3 (worker-3" in str(error)
    assert seconds < 8


def test_no_coordinator():
    port = free_port()
    (error,), seconds = together(arguments(port, 2, 1, 0.5))
    assert f"did not reach process 0 at localhost:{port} within 0.5 s" in str(error)
    assert seconds < 5


def test_disagreements_are_errors_at_once():
    port = free_port()
    results, seconds = together(arguments(port, 3, 0), arguments(port, 2, 1))
    assert all("told there are 2 processes, process 0 on" in str(error) for error in results)
    port = free_port()
    results, seconds_twice = together(arguments(port, 3, 0), arguments(port, 3, 1), arguments(port, 3, 1))
    assert all("Two programs say they are process 1" in str(error) for error in results)
    assert seconds + seconds_twice < 15


def test_a_stranger_and_a_restarted_process_do_no_harm():
    port = free_port()
    results = {}

    def call(process):
        (results[process],), _ = together(arguments(port, 3, process))

    def start(process):
        thread = threading.Thread(target=call, args=(process,))
        thread.start()
        return thread

    threads = [start(0)]
    for line in (b"GET / HTTP/1.1\r\n\r\n", b'{"process": 1, "processes": 3, "host": "gone"}\n'):
        while True:
            try:
                with socket.create_connection(("localhost", port)) as connection:
                    connection.sendall(line)
                    time.sleep(0.2)
                break
            except ConnectionRefusedError:
                time.sleep(0.05)
    threads.append(start(2))
    time.sleep(0.5)  # process 0 has heard of 1 and of 2 now, but 1 has gone
    threads.append(start(1))
    for thread in threads:
        thread.join()
    assert results == {0: None, 1: None, 2: None}


def test_a_port_in_use_and_a_bad_address():
    with (
        socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
        if socket.has_dualstack_ipv6()
        else (socket.create_server(("", 0))) as server
    ):
        with pytest.raises(StartupError, match=r"cannot listen on port .* another port"):
            roll_call(f"localhost:{server.getsockname()[1]}", 2, 0, 1.0)
    with pytest.raises(StartupError, match="must be HOST:PORT"):
        roll_call("localhost", 2, 0, 1.0)
