"""Processes meet before JAX joins them, or all hear what is wrong."""

import concurrent.futures
import http.server
import socket
import threading

import pytest

from capvl.errors import UserError
from capvl.parallel import distributed
from capvl.parallel.rendezvous import meet


@pytest.fixture
def address():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{s.getsockname()[1]}"


def outcomes(calls) -> list[str]:
    """What each of the processes (count, index, seconds), here threads, is told; "" for go on."""

    def call(arguments):
        try:
            meet(*arguments)
        except UserError as e:
            return str(e)
        return ""

    with concurrent.futures.ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


def test_all_meet_and_the_port_is_free_afterwards(address):
    for _ in range(2):
        assert outcomes([(address, 4, i, 20.0) for i in range(4)]) == [""] * 4
    socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))).close()


def test_the_same_index_twice(address):
    told = outcomes([(address, 3, i, 20.0) for i in (0, 1, 1)])
    assert all("Two processes have the index 1" in sentence for sentence in told)


def test_another_number_of_processes(address):
    told = outcomes([(address, 2, 0, 20.0), (address, 8, 1, 20.0)])
    assert told == ["Process 1 was started for 8 processes, process 0 for 2."] * 2


def test_one_is_missing(address):
    told = outcomes([(address, 4, 0, 2.0), (address, 4, 2, 2.0)])
    assert told == [f"Of 4 processes 1, 3 did not come to {address} within 2 s."] * 2


def test_nobody_at_the_coordinators_address(address):
    (told,) = outcomes([(address, 2, 1, 1.0)])
    assert told.startswith(f"Process 1 can't reach the coordinator at {address} within 1 s")


def test_the_port_is_taken(address):
    with socket.create_server(("127.0.0.1", int(address.rpartition(":")[2]))):
        (told,) = outcomes([(address, 2, 0, 1.0)])
    assert "can't listen" in told and "another process 0" in told


def test_strangers_at_the_port_are_ignored(address):
    host, port = address.split(":")
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        host_outcome = pool.submit(outcomes, [(address, 2, 0, 20.0)])
        while True:
            try:
                with socket.create_connection((host, int(port))) as stranger:
                    stranger.sendall(b"GET / HTTP/1.1\n")
                break
            except ConnectionRefusedError:
                pass
        assert outcomes([(address, 2, 1, 20.0)]) == [""]
        assert host_outcome.result() == [""]


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "whole numbers"),
        ({"JAX_NUM_PROCESSES": "2"}, "whole numbers"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2 should be between 0 and 1."),
        ({"JAX_NUM_PROCESSES": "2", "JOB_COMPLETION_INDEX": "5"}, "between 0 and 1"),
    ],
)
def test_contradicting_variables(monkeypatch, environment, sentence):
    for name in ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=sentence):
        distributed._named_by_hand()


def test_an_address_without_a_port():
    with pytest.raises(UserError, match="should read host:port"):
        meet("coordinator", 2, 1, 1.0)


@pytest.fixture
def metadata(monkeypatch):
    """A metadata server as TPU VMs have one; a dict of its attributes, and requests that it answers with 503 first."""
    attributes, busy = {}, []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            key = self.path.removeprefix("/computeMetadata/v1/instance/attributes/")
            assert self.headers["Metadata-Flavor"] == "Google"
            code = 503 if busy else 200 if key in attributes else 404
            busy[:1] = []
            self.send_response(code)
            self.end_headers()
            self.wfile.write(attributes.get(key, "").encode())

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
    yield attributes, busy
    server.shutdown()
    server.server_close()


def test_hosts_of_tpu_vms(metadata, monkeypatch):
    attributes, busy = metadata
    assert distributed._tpu_vm_hosts() == 1
    attributes["worker-network-endpoints"] = "unknown:unknown:10.0.0.1,unknown:unknown:10.0.0.2"
    assert distributed._tpu_vm_hosts() == 2
    attributes["tpu-env"] = "ACCELERATOR_TYPE: 'v5litepod-16'\nMEGASCALE_NUM_SLICES: '4'\n"
    busy.append("once")
    assert distributed._tpu_vm_hosts() == 8
    monkeypatch.setattr(distributed, "_has_tpus", lambda: True)
    monkeypatch.setattr(distributed, "_by_hand", lambda: False)
    joined = []
    monkeypatch.setattr(distributed, "_initialize", lambda *arguments: joined.append(arguments))
    distributed.start()
    assert joined
    attributes.clear()
    distributed.start()
    assert len(joined) == 1
