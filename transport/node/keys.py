"""Mutual authentication and encryption between nodes: TLS 1.3, and certificates of an authority of the installation's own.

A directory has `ca.pem`, the authority's certificate, and `node.pem`, this node's certificate and key. A certificate names its
node, and a caller accepts only the node that it meant to call. `make_keys` makes both with the package `cryptography`.
"""

import datetime
import ipaddress
import os
import ssl
from pathlib import Path

from transport.node.messages import NodeError

CA, CA_KEY, NODE = "ca.pem", "ca-key.pem", "node.pem"
VALID_DAYS = 3650
BACKDATED_DAYS = 2
"""Certificates are valid from before they were made: hosts' clocks may differ."""


def server_context(keys: Path | None) -> ssl.SSLContext | None:
    """Return the context of a node that is called; None without keys. Raises NodeError."""
    if keys is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    return _loaded(context, keys)


def client_context(keys: Path | None) -> ssl.SSLContext | None:
    """Return the context of a node that calls, with the called one's name as `server_hostname`; None without keys.

    Raises NodeError.
    """
    if keys is None:
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    return _loaded(context, keys)


def _loaded(context: ssl.SSLContext, keys: Path) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        mode = (keys / NODE).stat().st_mode
        if mode & 0o077 and not _systemds(keys / NODE):
            raise NodeError(f"{keys / NODE} holds a private key and can be read by others: chmod 600 it")
        context.load_verify_locations(keys / CA)
        context.load_cert_chain(keys / NODE)
    except (OSError, ssl.SSLError) as error:
        raise NodeError(f"the keys in {keys}: {error}; `peerkv node-keys` makes them") from error
    return context


def _systemds(path: Path) -> bool:
    """Tell whether systemd made the file for this service alone: such a credential has an ACL, which shows as mode 0440."""
    directory = os.environ.get("CREDENTIALS_DIRECTORY", "")
    if not os.path.isabs(directory):
        return False
    return path.resolve().is_relative_to(Path(directory).resolve()) and not path.stat().st_mode & 0o037


def caller(certificate: object) -> str:
    """Return the node that a verified certificate (as `getpeercert` returns it) names. Raises NodeError if it names none."""
    if isinstance(certificate, dict):
        for kind, name in certificate.get("subjectAltName", ()):
            if kind == "DNS":
                return str(name)
    raise NodeError("a certificate that names no node")


def check_address(host: str, keys: Path | None) -> None:
    """Raise NodeError if a node without keys is to be called from other hosts, or if the address is not one address."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError as error:
        raise NodeError(f"{host!r} is no IP address: name the one address that other nodes reach this one by") from error
    if address.is_unspecified:
        raise NodeError(f"{host} is every address: name the one that other nodes reach this one by")
    if keys is None and not address.is_loopback:
        raise NodeError(f"without keys a node listens on loopback alone, not on {host}: `peerkv node-keys` makes some")


def make_keys(directory: Path, nodes: list[str]) -> list[Path]:
    """Make an authority in `directory`, unless one is there, and a directory with its keys for each of `nodes`.

    Return these directories. Raises NodeError if `cryptography` is not installed, or a node's keys are there already.
    """
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        how = ".venv/bin/pip install -e '.[encryption]' in the clone"
        raise NodeError(f"keys are made with the package cryptography: {how}") from error
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = [directory / node for node in nodes]
    if there := [each for each in made if (each / NODE).exists()]:
        raise NodeError(f"{there[0]} has keys already: remove it to make new ones")
    if not (directory / CA_KEY).exists():
        key = ec.generate_private_key(ec.SECP256R1())
        _write(directory / CA_KEY, _pem(key))
        _write(directory / CA, _signed("peerkv nodes", key, None, key), 0o644)
    authority = x509.load_pem_x509_certificate((directory / CA).read_bytes())
    signer = load_pem_private_key((directory / CA_KEY).read_bytes(), None)
    for node, place in zip(nodes, made, strict=True):
        place.mkdir(mode=0o700, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        _write(place / NODE, _pem(key) + _signed(node, key, authority, signer))
        _write(place / CA, (directory / CA).read_bytes(), 0o644)
    return made


def _pem(key: object) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    assert isinstance(key, EllipticCurvePrivateKey)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _signed(name: str, key: object, authority: object, signer: object) -> bytes:
    """Return a certificate for `name`: the authority's own if there is no `authority` yet."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.serialization import Encoding
    from cryptography.x509.oid import NameOID

    assert isinstance(key, EllipticCurvePrivateKey)
    assert isinstance(signer, EllipticCurvePrivateKey)
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(authority.subject if isinstance(authority, x509.Certificate) else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=BACKDATED_DAYS))
        .not_valid_after(now + datetime.timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=authority is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()), critical=False)
    )
    if authority is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    return builder.sign(signer, hashes.SHA256()).public_bytes(Encoding.PEM)


def _write(path: Path, content: bytes, mode: int = 0o600) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
        file.write(content)
