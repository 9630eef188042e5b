"""What may be odd about a message, whichever it is, by name: each changes a valid one."""

from __future__ import annotations

from tests.unit.gateway.conformance.changes import (
    Change,
    Choices,
    begins_with,
    chunked,
    first_header_is_folded,
    framing,
    head_ends_in,
    lines_end_in,
    new_header,
    one_line_ends_in,
)

_HEADERS: Choices = {
    "a space before the colon": [b"x-a : b", b"content-length : 5", b"Transfer-Encoding\t: chunked"],
    "no colon": [b"x-a", b"content-length 5"],
    "an empty name": [b": b", b":"],
    "a name that is no token": [b"x(a): b", b"x a: b", b"x\xe4: b", b'"x": y', b"x@: y", b"x\x00: y", b"x\x7f: y"],
    "NUL in a value": [b"x-a: b\x00c", b"x-a: \x00"],
    "a control character in a value": [b"x-a: b\x01c", b"x-a: \x1f"],
    "DEL in a value": [b"x-a: b\x7fc"],
    "form feed or vertical tab in a value": [b"x-a: b\x0cc", b"x-a: \x0bb"],
    "CR in a value": [b"x-a: b\rc", b"x-a: b\rtransfer-encoding: chunked", b"x-a: \r", b"x-a: b\r\r"],
    "LF in a value": [b"x-a: b\nx-b: c", b"x-a: b\ncontent-length: 3"],
    "a folded line": [
        b"x-a: b\r\n c", b"x-a:\r\n\tb", b"x-a: b\r\n \r\n c", b"transfer-encoding:\r\n chunked", b"content-length:\r\n 5",
    ],
    "two connections": [b"connection: keep-alive\r\nconnection: close", b"connection: close\r\nconnection: keep-alive"],
    "the old name": [b"proxy-connection: close", b"proxy-connection: keep-alive"],
}  # fmt: skip
_LENGTHS: Choices = {
    "no length": [b"content-length:", b"content-length: \t"],
    "a length that is none": [
        b"content-length: +5", b"content-length: -5", b"content-length: 0x5", b"content-length: 5x", b"content-length: 5_0",
        b"content-length: 5 5", b"content-length: 5.0", b"content-length: \xb2", b"content-length: 5;",
        b"content-length: 1e1", b'content-length: "5"', b"content-length: 5\x00", b"content-length: ,5",
    ],
    "a length with zeros": [b"content-length: 05", b"content-length: 0000000000000000000000000000005"],
    "a huge length": [b"content-length: 18446744073709551621", b"content-length: 99999999999999999999999999"],
    "a large length": [b"content-length: 9223372036854775808", b"content-length: 4294967301"],
    "a length twice": [b"content-length: 5\r\ncontent-length: 5", b"Content-Length: 5\r\nx-a: b\r\nCONTENT-LENGTH: 5"],
    "a length in a list": [b"content-length: 5, 5", b"content-length: 5,5"],
    "two lengths": [
        b"content-length: 5\r\ncontent-length: 6", b"content-length: 0\r\ncontent-length: 5", b"content-length: 5, 6",
    ],
}  # fmt: skip
_CODINGS: Choices = {
    "another coding": [
        b"transfer-encoding: gzip", b"transfer-encoding: identity", b"transfer-encoding: xchunked",
        b"transfer-encoding: chunkedx", b"transfer-encoding: chunked, identity", b"transfer-encoding: chunked;q=1",
        b"transfer-encoding: \x0bchunked", b"transfer-encoding: chunked\x00", b'transfer-encoding: "chunked"',
        b"transfer-encoding: chunked ;a=b",
    ],
    "a coding before the chunks": [b"transfer-encoding: gzip, chunked", b"transfer-encoding: identity,chunked"],
    "chunked in a list": [b"transfer-encoding: ,chunked", b"transfer-encoding: chunked,", b"transfer-encoding: chunked,,"],
    "chunked twice": [b"transfer-encoding: chunked, chunked", b"transfer-encoding: chunked\r\ntransfer-encoding: chunked"],
    "two codings": [
        b"transfer-encoding: chunked\r\ntransfer-encoding: identity",
        b"transfer-encoding: identity\r\ntransfer-encoding: chunked",
        b"transfer-encoding: gzip\r\nx-a: b\r\ntransfer-encoding: chunked",
    ],
    "no coding": [b"transfer-encoding:", b"transfer-encoding: \t"],
    "a length and chunks": [
        b"transfer-encoding: chunked\r\ncontent-length: 5", b"content-length: 5\r\ntransfer-encoding: chunked",
        b"content-length: 5\r\nTransfer-Encoding:chunked",
    ],
    "a length and another coding": [
        b"content-length: 5\r\ntransfer-encoding: identity", b"transfer-encoding: gzip\r\ncontent-length: 5",
    ],
}  # fmt: skip
_CHUNKS: Choices = {
    "a size with zeros": [b"0005\r\nhello\r\n", b"00000000000000000005\r\nhello\r\n"],
    "a size with very many zeros": [b"0" * 30 + b"5\r\nhello\r\n"],
    "a size that is none": [
        b"0x5\r\nhello\r\n", b"+5\r\nhello\r\n", b"-1\r\nhello\r\n", b"\r\n", b"g\r\nhello\r\n", b"5g\r\nhello\r\n",
        b"5_\r\nhello\r\n", b" 5\r\nhello\r\n", b"\t5\r\nhello\r\n", b"5 5\r\nhello\r\n", b"5\x00\r\nhello\r\n",
        b"5,\r\nhello\r\n", b";a\r\nhello\r\n", b"\xb2\r\nhi\r\n", b"\n5\r\nhello\r\n", b"5\x0b\r\nhello\r\n",
    ],
    "a huge size": [b"fffffffffffffffff\r\nhello\r\n", b"10000000000000005\r\nhello\r\n", b"1" * 25 + b"\r\nhello\r\n"],
    "a space behind a size": [b"5 \r\nhello\r\n", b"5\t\r\nhello\r\n", b"5  \r\nhello\r\n"],
    "a space around an extension": [
        b"5 ;a\r\nhello\r\n", b"5; a\r\nhello\r\n", b"5;a =b\r\nhello\r\n", b"5;a= b\r\nhello\r\n", b"5;a \r\nhello\r\n",
    ],
    "an extension that is none": [
        b"5;\r\nhello\r\n", b"5;=\r\nhello\r\n", b"5;a=\r\nhello\r\n", b"5;(\r\nhello\r\n", b"5;;\r\nhello\r\n",
    ],
    "an extension in open quotes": [b'5;a="b\r\nhello\r\n', b'5;a="b"c\r\nhello\r\n'],
    "a line end in an extension": [
        b"5;a\nb\r\nhello\r\n", b"5;\n\r\nhello\r\n", b'5;a="\n"\r\nhello\r\n', b"5;a\rb\r\nhello\r\n",
        b'5;a="\r\n"\r\nhello\r\n', b"2;\nxx\r\n48\r\n0\r\n\r\n",
    ],
    "NUL in an extension": [b"5;a\x00\r\nhello\r\n", b"5;a=\x01\r\nhello\r\n"],
    "a size's line that ends in LF": [b"5\nhello\r\n", b"5;a\nhello\r\n"],
    "a size's line that ends in CR": [b"5\rhello\r\n", b"5\r\rhello\r\n", b"5\r\r\nhello\r\n", b"5\r \nhello\r\n"],
    "a chunk that ends in LF": [b"5\r\nhello\n"],
    "a chunk that ends in CR": [b"5\r\nhello\r", b"5\r\nhello\r\r\n", b"5\r\nhello\rX"],
    "a chunk longer than its size": [b"5\r\nhello!\r\n", b"2\r\nhello\r\n", b"4\r\nhello\r\n", b"3\r\nhello\r\n"],
    "a chunk without an end": [b"5\r\nhello", b"5\r\nhello0\r\n"],
}  # fmt: skip
_LAST_CHUNKS: Choices = {
    "a last line that ends in LF": [b"0\n", b"0;a\n"],
    "a last line that ends in CR": [b"0\r", b"0\r\r\n"],
    "a space behind the last size": [b"0 \r\n", b"0\t\r\n"],
    "no last chunk": [b""],
}
_TRAILERS: Choices = {
    "a trailer about the body": [b"content-length: 5", b"transfer-encoding: chunked", b"transfer-encoding: x"],
    "a trailer about the connection": [b"connection: close", b"Connection: keep-alive", b"proxy-connection: close"],
    "a trailer that is none": [b"x", b"x : y", b": y", b"x(: y", b"x: \x00"],
    "a trailer that ends in LF": [b"x: y\nz: a", b"x: y\n"],
    "a CR in a trailer": [b"x: y\rz", b"x: \r"],
    "a folded trailer": [b"x: y\r\n z", b"x:\r\n y", b"x: y\r\n x: y"],
}

MESSAGE_ODDITIES: dict[str, Change] = {
    **{name: new_header(values) for name, values in _HEADERS.items()},
    **{name: framing(values, is_chunked=False) for name, values in _LENGTHS.items()},
    **{name: framing(values, is_chunked=True) for name, values in _CODINGS.items()},
    **{name: chunked(values, "chunk") for name, values in _CHUNKS.items()},
    **{name: chunked(values, "last") for name, values in _LAST_CHUNKS.items()},
    **{name: chunked(values, "trailer") for name, values in _TRAILERS.items()},
    "lines that end in LF": lines_end_in(b"\n"),
    "lines that end in CR": lines_end_in(b"\r"),
    "lines that end in CR CR LF": lines_end_in(b"\r\r\n"),
    "one line that ends in LF": one_line_ends_in(b"\n"),
    "one line that ends in CR": one_line_ends_in(b"\r"),
    "a head that ends in LF": head_ends_in(b"\n"),
    "a head that ends in CR": head_ends_in(b"\r", b"\r\r\n"),
    "an empty line with a space": head_ends_in(b" \r\n\r\n", b"\t\r\n\r\n"),
    "empty lines before": begins_with(b"\r\n\r\n", b"\r\n" * 5),
    "LF before": begins_with(b"\n", b"\n\n", b"\r\n\n"),
    "CR before": begins_with(b"\r", b"\r\r\n", b"\r\rGET"),
    "something before": begins_with(b" ", b"\x00", b"hello\r\n", b"\t\r\n", b"\xef\xbb\xbf"),
    "a folded first header": first_header_is_folded,
}
