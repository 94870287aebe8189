"""Refuses every socket that leaves this machine, in the suite's process and in every Python that it starts."""

import sys


class RefusedError(RuntimeError):
    """Something went for the network."""


def refuse(event: str, args: tuple) -> None:
    """An audit hook: connections and look-ups go to this machine alone."""
    if event in ("socket.connect", "socket.sendto"):
        address = args[1]
        host = address[0] if isinstance(address, tuple) else "localhost"  # else a name in the file system
    elif event == "socket.getaddrinfo":
        host = args[0]
    else:
        return
    host = host.decode() if isinstance(host, bytes) else host
    if host and host != "localhost" and not host.startswith("127.") and host not in ("::1", "0.0.0.0", "::"):
        raise RefusedError(f"{event} to {host}: tests are offline")


sys.addaudithook(refuse)
