"""Pictures by URL, from public addresses only: whoever asks must not reach what the server's network keeps to itself.

A host is looked up once, all its addresses are looked at, and the connection goes to one of those, so that a name
cannot mean another address a moment later. Redirects are followed three times, each under the same rules. Proxies of
the environment are not used.
"""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
import urllib.parse

from glmv_jax.serving.limits import Refused

SECONDS, REDIRECTS = 10.0, 3
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):  # of which some are those of IPv4 by another name
        inner = found.ipv4_mapped or found.sixtofour or (found.teredo or (None, None))[1]
        if inner is None and found in _NAT64:
            inner = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
    return found.is_global and not (found.is_multicast or found.is_reserved)


def fetch(url: str, most: int) -> bytes:
    """What lies there. Raises Refused when it may not be fetched, cannot be, or has more than `most` bytes."""
    until = time.monotonic() + SECONDS
    for _ in range(REDIRECTS + 1):
        try:
            found = _get(url, most, until)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Refused(f"{url[:80]} cannot be fetched ({type(error).__name__}); send the image as base64") from None
        if isinstance(found, bytes):
            return found
        url = urllib.parse.urljoin(url, found)
    raise Refused(f"{url[:80]} leads from one address to the next; send the image as base64")


def _get(url: str, most: int, until: float) -> bytes | str:
    """The bytes, or where they are to be had."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.username is not None:
        raise Refused(f"{url[:80]} is no plain http or https address; send the image as base64")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    connection = http.client.HTTPConnection(parts.hostname, port)
    sock = _connected(parts.hostname, port, until)
    try:
        if parts.scheme == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=parts.hostname)
        connection.sock = sock
        path = urllib.parse.urlunsplit(("", "", parts.path or "/", parts.query, ""))
        connection.request("GET", path, headers={"User-Agent": "glmv_jax", "Accept": "image/*, video/*"})
        reply = connection.getresponse()
        if reply.status in (301, 302, 303, 307, 308) and reply.headers.get("location"):
            return reply.headers["location"]
        if reply.status != 200:
            raise Refused(f"{url[:80]} answers with status {reply.status}; send the image as base64")
        return _read(reply, sock, url, most, until)
    finally:
        connection.close()
        sock.close()


def _connected(host: str, port: int, until: float) -> socket.socket:
    addresses = [(str(found[4][0]), port) for found in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not addresses or not all(is_public(address[0]) for address in addresses):
        raise Refused(f"{host[:80]} is no public address, so nothing is fetched from it; send the image as base64")
    return socket.create_connection(addresses[0], timeout=_left(until))


def _read(reply: http.client.HTTPResponse, sock: socket.socket, url: str, most: int, until: float) -> bytes:
    data = bytearray()
    while True:
        sock.settimeout(_left(until))
        piece = reply.read1(1 << 16)
        if not piece:
            return bytes(data)
        data += piece
        if len(data) > most:
            raise Refused(f"{url[:80]} has more than {most} bytes; send a smaller image")


def _left(until: float) -> float:
    if (left := until - time.monotonic()) <= 0:
        raise TimeoutError
    return left
