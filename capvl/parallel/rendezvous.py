"""Processes that were started by hand meet at the coordinator's address before JAX does.

JAX aborts without a sentence where a process is missing or an index is there twice. Here
process 0 listens at the address first, hears each of the others once, and tells all of them
what is wrong, or to go on; then it frees the port for JAX.
"""

import contextlib
import json
import socket
import time

from capvl.errors import UserError


def meet(address: str, count: int, index: int, seconds: float) -> None:
    """Returns when all processes have met.

    Raises:
      UserError: processes are missing after `seconds`, two have one index, they don't agree on
        their number, or the coordinator can't be reached.
    """
    if index:
        _visit(address, count, index, seconds)
    else:
        _host(address, count, seconds)


def _host(address: str, count: int, seconds: float) -> None:
    host, port = _split(address)
    try:
        listener = socket.create_server(("", port), backlog=count, reuse_port=False)
    except OSError as e:
        raise UserError(
            f"Process 0 can't listen at {address} ({e.strerror or e}); does another run use the port, or is there "
            f"another process 0?"
        ) from e
    deadline, guests, wrong = time.monotonic() + seconds, {}, ""
    with listener, contextlib.ExitStack() as stack:
        while len(guests) < count - 1 and not wrong:
            listener.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                guest, (name, _) = listener.accept()
            except TimeoutError:
                missing = ", ".join(str(i) for i in range(1, count) if i not in guests)
                wrong = f"Of {count} processes {missing} did not come to {address} within {seconds:.0f} s."
                break
            stack.enter_context(guest)
            hello = _read(guest)
            if not hello:
                continue  # Somebody who only looked whether the port is open.
            number, theirs = hello["index"], hello["count"]
            if theirs != count:
                wrong = f"Process {number} was started for {theirs} processes, process 0 for {count}."
            elif number in guests or not number:
                wrong = f"Two processes have the index {number}, one of them at {name}."
            guests.setdefault(number, guest)
            if wrong:
                _say(guest, wrong)
        for guest in guests.values():
            _say(guest, wrong)
        for guest in guests.values():  # They hang up first, so that the port is free at once.
            with contextlib.suppress(OSError):
                guest.settimeout(5.0)
                guest.recv(1)
    if wrong:
        raise UserError(wrong)


def _visit(address: str, count: int, index: int, seconds: float) -> None:
    host, port = _split(address)
    deadline, reason = time.monotonic() + seconds, "nobody listens"
    while time.monotonic() < deadline:
        try:
            with socket.create_connection((host, port), timeout=5) as server:
                _say_line(server, {"index": index, "count": count})
                server.settimeout(max(1.0, deadline - time.monotonic() + 5))
                answer = _read(server)
            if answer:
                if answer["wrong"]:
                    raise UserError(answer["wrong"])
                return
            reason = "the connection was closed"
        except OSError as e:
            reason = e.strerror or str(e)
        time.sleep(0.2)
    raise UserError(
        f"Process {index} can't reach the coordinator at {address} within {seconds:.0f} s ({reason}); is process 0 "
        f"running there, and is the port open?"
    )


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise UserError(f"JAX_COORDINATOR_ADDRESS={address!r} should read host:port.")
    return host, int(port)


def _say(guest: socket.socket, wrong: str) -> None:
    with contextlib.suppress(OSError):
        _say_line(guest, {"wrong": wrong})


def _say_line(to: socket.socket, message: dict) -> None:
    to.sendall(json.dumps(message).encode() + b"\n")


def _read(sender: socket.socket) -> dict | None:
    """One JSON line; None where the other side hangs up, or doesn't speak so."""
    try:
        if sender.gettimeout() is None:
            sender.settimeout(5.0)
        with sender.makefile("rb") as lines:
            return json.loads(lines.readline(1000))
    except (OSError, ValueError):
        return None
