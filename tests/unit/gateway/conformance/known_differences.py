"""Where our HTTP differs from h11's on purpose, by the name of what is odd, with the reason.

Whatever is not listed here has to be understood alike; what is listed and never differs fails a test too.
"""

from __future__ import annotations

_LINES = "llhttp takes lines that end in CR LF alone: who reads LF as an end sees other headers"
_SMUGGLING = "two readings of where the body ends: refused whatever the two say"
_NO_CONTROL = "a value holds no control characters (RFC 9110, 5.5)"
_NO_FOLDING = "folded lines are refused, as they may be (RFC 9112, 5.2)"
_NO_SPACE = "whitespace behind a size is no part of the grammar (RFC 9112, 7.1)"
_NO_URL = "it is neither a path nor a URL (RFC 9112, 3.2)"
_EXTENSION = "an extension that breaks the grammar of RFC 9112, 7.1.1"
_TOO_LARGE = "it does not fit into 64 bits; h11 waits for what never comes"
_ZEROS = "leading zeros change nothing; h11 takes twenty digits"
_EMPTY_LINES = "empty lines before a message are passed over, as a server should (RFC 9112, 2.2)"
_OTHER_NAMES = "llhttp also knows RTSP and ICE; taken for HTTP/1.0, behind which the connection ends"
_OLD_NAME = "llhttp takes Proxy-Connection for Connection: the connection ends"

_REFUSED = {
    "a control character in a value": _NO_CONTROL,
    "DEL in a value": _NO_CONTROL,
    "LF in a value": _LINES,
    "a folded line": _NO_FOLDING,
    "lines that end in LF": _LINES,
    "one line that ends in LF": _LINES,
    "a head that ends in LF": _LINES,
    "an empty line with a space": "h11 takes it for the end of the head: it is a folded line",
    "a length twice": _SMUGGLING,
    "a length in a list": _SMUGGLING,
    "a length and chunks": _SMUGGLING,
    "a space behind a size": _NO_SPACE,
    "a space behind the last size": _NO_SPACE,
    "a space around an extension": "recipients may take it, llhttp does not",
    "an extension that is none": _EXTENSION,
    "an extension in open quotes": _EXTENSION,
    "a line end in an extension": "h11 takes a lone CR there: who reads it as a line's end sees other chunks",
    "NUL in an extension": _EXTENSION,
    "a trailer about the body": "llhttp refuses a length behind the body that it would be of",
    "a trailer that ends in LF": _LINES,
    "a folded trailer": _NO_FOLDING,
    "another version": "only HTTP/1.0 and 1.1 are spoken here",
}
_TAKEN = {
    "a length with zeros": _ZEROS,
    "a size with very many zeros": _ZEROS,
    "empty lines before": _EMPTY_LINES,
    "LF before": _EMPTY_LINES,
    "CR before": _EMPTY_LINES,
}

REFUSED_REQUESTS = _REFUSED | {
    "a huge length": _TOO_LARGE,
    "a huge size": _TOO_LARGE,
    "a trailer about the connection": "whether another request follows was said in the head; llhttp would obey the trailer",
    "the preface of HTTP/2": "only HTTP/1.0 and 1.1 are spoken here",
    "a method that nobody knows": "llhttp knows the registered methods alone; none other has a meaning here",
    "a line of another protocol": "methods of RTSP are none of HTTP's",
    "an absolute target that is none": _NO_URL,
    "a target of another scheme": "without a host it is no URL that HTTP has",
    "a target that is none": _NO_URL,
    "a tunnel": "there are no tunnels here",
    "a body longer than its length": "what is left over begins the next request, whose method nobody knows",
    "a head that is too large": "heads are bounded",
}
TAKEN_REQUESTS = _TAKEN | {
    "two spaces in the request line": "its words may be parted by more than one space (RFC 9112, 3)",
    "a line of another protocol": _OTHER_NAMES,
}
CLOSED_REQUESTS = {
    "an upgrade": "the request is answered, without its wish, and is the connection's last: what follows may be no HTTP",
    "the old name": _OLD_NAME,
}

REFUSED_ANSWERS = _REFUSED | {
    "an interim answer that ends the connection": "no answer can follow behind the connection's end",
    "bytes behind it": "nobody asked for them; what comes in one piece with them is given up too",
}
TAKEN_ANSWERS = _TAKEN | {
    "an odd reason": "nobody reads a reason, and the client gets one of our own",
    "a status line of another protocol": _OTHER_NAMES,
    "a trailer about the body": "the body came in chunks and was whole; a coding named behind it changes nothing",
}
OTHERWISE_REUSED = {
    "an empty line behind it": "it is passed over before the next answer (RFC 9112, 2.2)",
    "HTTP/1.0": "kept alive if the replica says so, which h11 does not know",
    "a trailer about the connection": "llhttp obeys it: the connection is not used again",
    "the old name": _OLD_NAME,
}
