"""How commands check the certificate of the gateway that they ask."""

from __future__ import annotations

import ssl
from pathlib import Path

from gateway.errors import SettingsError
from gateway.tenants.loopback import is_loopback_url

CACERT_HELP = (
    "whom to trust at an https URL, in PEM (default: on this machine tls_cert of the environment or the file of settings, not "
    "that of a flag of serve; else the system's own)"
)
_BY_NAME = "ask by a name that is in it: --url"
_RENEW = "the gateway needs one that is valid now"
_REMEDIES = {9: _RENEW, 10: _RENEW, 62: _BY_NAME, 64: _BY_NAME}  # by OpenSSL's X509_V_ERR_*


def trust(url: str, cacert: Path | None, own: Path | None) -> ssl.SSLContext | bool:
    """What a client at `url` takes as its check: the authorities in `cacert`, or those of the system.

    By the loopback it is asked that the answer comes with our `own` certificate, whatever name is in it. Raises SettingsError.
    """
    if not url.startswith("https:"):
        return True
    try:
        if cacert is not None:
            context = ssl.create_default_context(cafile=cacert)
            context.verify_flags |= (
                ssl.VERIFY_X509_PARTIAL_CHAIN
            )  # the file may be the gateway's certificate without its authority
            return context
        if own is None or not is_loopback_url(url):
            return ssl.create_default_context()
        context = ssl.create_default_context(cafile=own)
    except OSError as error:
        raise SettingsError(f"cannot check the gateway's certificate by {cacert or own}: {error.strerror or error}") from None
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.check_hostname = False
    return context


def tls_trouble(url: str, error: BaseException, *, broke_off: bool) -> str:
    """Say what was wrong with the certificate, or with the scheme, that kept a client from `url`; "" if it was something else.

    `broke_off`: the connection was made, and ended before an answer.
    """
    cause: BaseException | None = error
    while cause is not None:
        # aiohttp's own are such errors too, without these fields: what they come from has them.
        if isinstance(cause, ssl.SSLCertVerificationError) and hasattr(cause, "verify_code"):
            remedy = _REMEDIES.get(
                cause.verify_code, "--cacert FILE names the gateway's certificate, or its authority's, in PEM"
            )
            return f"the certificate of {url} is not trusted: {cause.verify_message}; {remedy}"
        if isinstance(cause, ssl.SSLError) and getattr(cause, "reason", None) == "WRONG_VERSION_NUMBER":
            return f"what listens at {url} does not speak HTTPS; ask it by --url {url.replace('https:', 'http:', 1)}"
        cause = cause.__cause__ or cause.__context__
    if broke_off and url.startswith("http:"):
        secure = url.replace("http:", "https:", 1)
        return (
            f"what listens at {url} broke off without an answer; it may speak HTTPS: ask by --url {secure}, with --cacert FILE"
            " for a certificate that the system does not trust"
        )
    return ""
