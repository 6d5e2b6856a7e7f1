"""What the database must not tell whoever steals a copy of it.

One secret, kept outside the database, is the root of every key here (HKDF-SHA256, one key a purpose). With it the
database keeps MACs of what is looked up and ciphertexts of what must be shown again. The database knows a
fingerprint of the secret, so that a program with another one stops at its start instead of failing at every
code.
"""

from __future__ import annotations

import base64
import hmac
import os
import tempfile
from functools import lru_cache
from hashlib import sha256
from pathlib import Path

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from accounts.database import Database, insert_if_absent
from accounts.errors import DatabaseUnfit
from accounts.models import Meta

MIN_SECRET_CHARACTERS = 32
_NONCE_BYTES = 12
_FINGERPRINT = "secret_fingerprint"


class Secrets:
    """Keyed MACs and sealed boxes; each purpose has keys of its own."""

    def __init__(self, secret: str) -> None:
        if len(secret) < MIN_SECRET_CHARACTERS:
            raise ValueError(f"must have at least {MIN_SECRET_CHARACTERS} characters")
        self._secret = secret.encode()
        self._key = lru_cache(maxsize=None)(self._derive)

    def mac(self, purpose: str, text: str) -> str:
        """64 hexadecimal digits: equal for equal texts, and nothing to guess a short text by without the secret."""
        return hmac.new(self._key(f"mac {purpose}"), text.encode(), sha256).hexdigest()

    def seal(self, purpose: str, plain: bytes, owner: str) -> str:
        """A text that only `open` with the same purpose and owner turns back."""
        nonce = os.urandom(_NONCE_BYTES)
        box = AESGCM(self._key(f"seal {purpose}")).encrypt(nonce, plain, owner.encode())
        return base64.b64encode(nonce + box).decode()

    def open(self, purpose: str, sealed: str, owner: str) -> bytes:
        """What was sealed. Raises ValueError when it was changed, moved to another owner, or sealed by
        another secret.
        """
        raw = base64.b64decode(sealed)
        try:
            return AESGCM(self._key(f"seal {purpose}")).decrypt(
                raw[:_NONCE_BYTES], raw[_NONCE_BYTES:], owner.encode()
            )
        except InvalidTag:
            raise ValueError(f"a sealed {purpose} of {owner} does not open") from None

    @property
    def fingerprint(self) -> str:
        """Tells two secrets apart and gives neither away."""
        return self.mac("fingerprint", "")[:32]

    def _derive(self, purpose: str) -> bytes:
        return HKDF(hashes.SHA256(), 32, salt=None, info=f"lingua-metering {purpose}".encode()).derive(
            self._secret
        )


def check_secret(database: Database, secrets: Secrets) -> None:
    """Note the fingerprint at the first use. Raises DatabaseUnfit when the database was kept under another
    secret.
    """
    with database.write() as session:
        insert_if_absent(session, Meta, {"name": _FINGERPRINT, "value": secrets.fingerprint})
        known = session.get_one(Meta, _FINGERPRINT).value
    require_fingerprint(known, secrets)


def require_fingerprint(known: str, secrets: Secrets) -> None:
    """Raises DatabaseUnfit, one line, when `known` is another secret's."""
    if not hmac.compare_digest(known, secrets.fingerprint):
        raise DatabaseUnfit(
            "METERING_ACCOUNTS_SECRET is not the one that this accounts database was kept under "
            f"(fingerprint {known[:8]}..., given {secrets.fingerprint[:8]}...)"
        )


def secret_in_file(file: Path) -> str:
    """The secret in a file, made at the first use, readable by the owner only; a kill leaves all of it or
    nothing.
    """
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=file.name, suffix=".new", dir=file.parent)
        aside = Path(name)
        with os.fdopen(descriptor, "w") as out:
            out.write(base64.urlsafe_b64encode(os.urandom(48)).decode() + "\n")
            out.flush()
            os.fsync(out.fileno())
        try:
            # Unlike a rename this never replaces the one that another process made meanwhile.
            file.hardlink_to(aside)
        except FileExistsError:
            pass
        finally:
            aside.unlink()
    return file.read_text(encoding="utf-8").strip()
