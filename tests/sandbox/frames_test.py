"""What goes over a wire arrives: frames between pool and supervisor, requests through the jail's wall."""

from __future__ import annotations

import asyncio
import io
import socket

import pytest

from retool_jax.sandbox import frames
from retool_jax.sandbox.inside import protocol


def test_frames_are_read_one_after_another_with_their_payloads():
    sent = [({'op': 'run', 'code': 'é'}, b'\0\xff' * 40000), ({}, b''), ({'op': 'alive'}, b'x')]

    async def read() -> list:
        reader = asyncio.StreamReader(limit=1024)
        reader.feed_data(b''.join(frames.pack(header, payload[:3], payload[3:]) for header, payload in sent))
        reader.feed_eof()
        found = [await frames.read(reader) for _ in sent]
        with pytest.raises(asyncio.IncompleteReadError):
            await frames.read(reader)
        return found

    assert asyncio.run(read()) == sent


def test_a_frame_that_is_cut_off_is_no_frame():
    whole = frames.pack({'op': 'alive'}, b'12345')

    async def read(data: bytes) -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(data)
        reader.feed_eof()
        await frames.read(reader)

    for size in range(len(whole)):
        with pytest.raises(asyncio.IncompleteReadError):
            asyncio.run(read(whole[:size]))


def test_a_blocking_socket_gives_the_header_and_keeps_what_follows():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(frames.pack({'path': 'warm'}) + frames.pack({'op': 'cancel'}))
        assert frames.receive(theirs) == {'path': 'warm'}
        assert frames.receive(theirs) == {'op': 'cancel'}


def test_a_request_arrives_behind_the_wall_as_it_was_sent():
    header = protocol.header(
        code=7, stdin=3, files=[['/box/a', 2], ['/box/b', 0]], seed=5, echo=True, cpu_s=1.5, address_bytes=1 << 30
    )
    request = protocol.read(io.BytesIO(header + b'print()' + b'in\n' + b'\n\xff'))
    assert request == {
        'code': b'print()',
        'stdin': b'in\n',
        'files': {'/box/a': b'\n\xff', '/box/b': b''},
        'seed': 5,
        'echo': True,
        'cpu_s': 1.5,
        'address_bytes': 1 << 30,
    }
