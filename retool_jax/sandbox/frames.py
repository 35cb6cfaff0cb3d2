"""The frame in which pool and supervisor speak, both ways: two sizes, a header as JSON, bytes behind it."""

from __future__ import annotations

import asyncio
import json
import socket
import struct

SIZES = struct.Struct('!IQ')  # bytes of the header and of the payload


def pack(header: dict, *payload: bytes) -> bytes:
    """One frame; the pieces of the payload follow one another."""
    words = json.dumps(header).encode()
    return b''.join((SIZES.pack(len(words), sum(map(len, payload))), words, *payload))


async def read(reader: asyncio.StreamReader) -> tuple[dict, bytes]:
    """Waits for the next frame: its header and its payload.

    Raises:
        asyncio.IncompleteReadError: the other end has closed.
    """
    size, payload_size = SIZES.unpack(await reader.readexactly(SIZES.size))
    header = json.loads(await reader.readexactly(size))
    return header, await reader.readexactly(payload_size)


def receive(link: socket.socket) -> dict:
    """The header of a frame without a payload, from a socket that blocks."""
    size, _ = SIZES.unpack(link.recv(SIZES.size, socket.MSG_WAITALL))
    return json.loads(link.recv(size, socket.MSG_WAITALL))
