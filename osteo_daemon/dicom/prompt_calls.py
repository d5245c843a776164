"""System calls on sockets that never wait, made without giving up the interpreter's lock.

Python's own socket methods let other threads run during each call, and then wait for their turn: 5 ms and more while
others compute. A thread that accepts connections that way takes some hundred in a second on a busy node, and the one
that matters stands behind a flood of others. On sockets that do not block, each of these calls takes microseconds.
Linux: accept4(2), recv(2), shutdown(2), close(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from typing import Final

# unlike CDLL, PyDLL keeps the lock
_libc: Final = ctypes.PyDLL(None, use_errno=True)
_recv: Final = _libc.recv
_recv.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_recv.restype = ctypes.c_ssize_t
_accept4: Final = _libc.accept4
_accept4.argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)

_ADDRESS_BYTES: Final = 128  # struct sockaddr_storage
_FAMILY: Final = struct.Struct("@H")
_PORT: Final = struct.Struct("!H")
_IPV6: Final = struct.Struct("!I16s")
_SCOPE: Final = struct.Struct("@I")
_FLAGS: Final = socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
_LATER: Final = frozenset({errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR})
# accept(2): errors of a connection that has gone meanwhile, which stand for that connection alone
_GONE: Final = frozenset(
    {
        errno.ECONNABORTED,
        errno.ENETDOWN,
        errno.EPROTO,
        errno.ENOPROTOOPT,
        errno.EHOSTDOWN,
        errno.ENONET,
        errno.EHOSTUNREACH,
        errno.EOPNOTSUPP,
        errno.ENETUNREACH,
        errno.EPERM,
    }
)

Address = tuple[str, int] | tuple[str, int, int, int]
"""As Python's sockets give it: host, port, and for IPv6 flow information and scope."""


def accept(listening: int) -> tuple[int, Address] | None:
    """Take the next connection; it does not block, and child processes do not inherit it.

    Args:
        listening: descriptor of a listening socket that does not block.

    Returns:
        Its descriptor and where it comes from; None when there is none.

    Raises:
        OSError: none can be taken now: out of descriptors or memory.
    """
    address = ctypes.create_string_buffer(_ADDRESS_BYTES)
    while True:
        length = ctypes.c_uint32(_ADDRESS_BYTES)
        descriptor = _accept4(listening, address, ctypes.byref(length), _FLAGS)
        if descriptor >= 0:
            return descriptor, _address(address.raw)
        error = ctypes.get_errno()
        if error in _LATER:
            return None
        if error not in _GONE:
            raise OSError(error, os.strerror(error))


def has_spoken(descriptor: int) -> bool | None:
    """Whether there is something to read; None when nothing is and the other end has not closed. Takes nothing.

    Raises:
        OSError: the connection broke.
    """
    count = _receive(descriptor, socket.MSG_PEEK, 1)
    return None if count is None else count > 0


def discard(descriptor: int, maximum_bytes: int) -> bool:
    """Read what is there, and throw it away; False when the other end has closed, or sent more than it may.

    Raises:
        OSError: the connection broke.
    """
    while maximum_bytes > 0:
        count = _receive(descriptor, 0, min(maximum_bytes, 4096))
        if not count:
            return count is None
        maximum_bytes -= count
    return False


def close(connection: socket.socket) -> None:
    """Close a socket that no other thread uses."""
    _libc.close(connection.detach())


def close_descriptor(descriptor: int) -> None:
    """Close what `accept` gave."""
    _libc.close(descriptor)


def _receive(descriptor: int, flags: int, size: int) -> int | None:
    """How many bytes came; None: none yet."""
    room = ctypes.create_string_buffer(size)
    count = int(_recv(descriptor, room, size, flags | socket.MSG_DONTWAIT))
    if count >= 0:
        return count
    error = ctypes.get_errno()
    if error in _LATER:
        return None
    raise OSError(error, os.strerror(error))


def _address(raw: bytes) -> Address:
    """A struct sockaddr_in or sockaddr_in6."""
    (family,) = _FAMILY.unpack_from(raw)
    (port,) = _PORT.unpack_from(raw, 2)
    if family == socket.AF_INET6:
        flow, host = _IPV6.unpack_from(raw, 4)
        (scope,) = _SCOPE.unpack_from(raw, 24)
        return socket.inet_ntop(socket.AF_INET6, host), port, flow, scope
    return socket.inet_ntop(socket.AF_INET, raw[4:8]), port
