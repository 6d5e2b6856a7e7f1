"""Access tokens: JWT, signed with EdDSA (Ed25519), verified by anybody with the published keys (JWKS).

Laws:
- The newest key that is not retired signs. `rotate` adds one and retires the others in one transaction.
- A retired key verifies until every token that it may have signed has expired: the life of a token, and the
  time for which a process may go on signing with what it has in its cache (`CACHE_MS`).
- Private keys lie in the database sealed (`accounts.secrets`): every process of the API has them, a stolen
  copy has not.
- A token names its log-in or the node's secret, which the API looks up each time: so a log-out counts at once
  here, and for a program that only verifies signatures after at most the token's life.
"""

from __future__ import annotations

import base64
import secrets as random
import threading
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from sqlalchemy import delete, or_, select, update
from sqlalchemy.orm import Session

from accounts import audit
from accounts.audit import Action, Actor
from accounts.database import Database, lock_for
from accounts.errors import Reason, Refused
from accounts.models import SigningKey
from accounts.secrets import Secrets

ISSUER = "lingua-metering"
AUDIENCE = "lingua-metering"
ALGORITHM = "EdDSA"
CACHE_MS = 5_000
_SEAL = "signing key"


class SubjectKind(StrEnum):
    """Whom a token speaks for; the first half of its `sub`."""

    USER = "user"
    NODE = "node"


@dataclass(frozen=True)
class Claims:
    """What a valid token says."""

    kind: SubjectKind
    subject_id: str
    role: str
    """`user` or `operator`, or `node`; the database has the last word."""
    session: str
    """Of a user the log-in, of a node a mark of its secret."""
    expires_at_ms: int


@dataclass(frozen=True)
class _Key:
    kid: str
    public: Ed25519PublicKey
    private: Ed25519PrivateKey
    retired: bool
    expires_at_ms: int | None


class AccessTokens:
    """Signs and verifies; safe to share between threads."""

    def __init__(self, database: Database, secrets: Secrets, life_s: int) -> None:
        self._database = database
        self._secrets = secrets
        self.life_s = life_s
        self._lock = threading.Lock()
        self._keys: list[_Key] = []
        self._read_at_ms = -CACHE_MS

    def issue(self, kind: SubjectKind, subject_id: str, role: str, session: str, now_ms: int) -> str:
        """A signed token. Makes the first key when there is none."""
        key = self._signing_key(now_ms)
        now_s = now_ms // 1000
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": f"{kind}/{subject_id}",
            "role": role,
            "sid": session,
            "jti": random.token_urlsafe(12),
            "iat": now_s,
            "exp": now_s + self.life_s,
        }
        return jwt.encode(claims, key.private, ALGORITHM, headers={"kid": key.kid, "typ": "at+jwt"})

    def verify(self, token: str, now_ms: int) -> Claims:
        """What the token says. Raises Refused, BAD_TOKEN, for one that is not ours, broken or expired."""
        try:
            kid = jwt.get_unverified_header(token).get("kid")
            key = self._verifying_key(kid, now_ms)
            if key is None:
                raise Refused(Reason.BAD_TOKEN, "the token is signed with a key that is not known")
            # The clock is an argument here, so the instants are compared below.
            said: dict[str, Any] = jwt.decode(
                token,
                key.public,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                issuer=ISSUER,
                options={
                    "verify_exp": False,
                    "verify_iat": False,
                    "require": ["exp", "iat", "sub", "sid", "role"],
                },
            )
            kind, _, subject_id = str(said["sub"]).partition("/")
            claims = Claims(
                SubjectKind(kind), subject_id, str(said["role"]), str(said["sid"]), int(said["exp"]) * 1000
            )
        except (jwt.InvalidTokenError, ValueError, TypeError):
            raise Refused(Reason.BAD_TOKEN, "the token is not valid") from None
        if claims.expires_at_ms <= now_ms:
            raise Refused(Reason.BAD_TOKEN, "the token has expired")
        return claims

    def jwks(self, now_ms: int) -> dict[str, Any]:
        """The public keys that verify now, as a JWK set (RFC 7517)."""
        self._signing_key(now_ms)
        return {
            "keys": [
                {
                    "kty": "OKP",
                    "crv": "Ed25519",
                    "use": "sig",
                    "alg": ALGORITHM,
                    "kid": key.kid,
                    "x": _unpadded(key.public.public_bytes_raw()),
                }
                for key in self._fresh(now_ms)
                if _verifies(key, now_ms)
            ]
        }

    def rotate(self, actor: Actor, now_ms: int, *, at_once: bool = False) -> str:
        """Sign with a new key from now on; its kid. `at_once`: what older keys signed is worth nothing any more."""
        with self._database.write() as session:
            lock_for(session, "signing keys")
            last_ms = now_ms if at_once else now_ms + self.life_s * 1000 + CACHE_MS
            session.execute(delete(SigningKey).where(SigningKey.expires_at_ms <= now_ms))
            session.execute(
                update(SigningKey)
                .where(or_(SigningKey.expires_at_ms.is_(None), SigningKey.expires_at_ms > last_ms))
                .values(retired_at_ms=now_ms, expires_at_ms=last_ms)
            )
            kid = self._add(session, now_ms)
            audit.record(
                session,
                actor,
                Action.KEY_ROTATED,
                f"signing_key/{kid}",
                at_ms=now_ms,
                payload={"at_once": at_once},
            )
        with self._lock:
            self._read_at_ms = -CACHE_MS
        return kid

    def _signing_key(self, now_ms: int) -> _Key:
        for key in self._fresh(now_ms):
            if not key.retired:
                return key
        with self._database.write() as session:
            lock_for(session, "signing keys")
            if not session.scalar(select(SigningKey.kid).where(SigningKey.retired_at_ms.is_(None)).limit(1)):
                self._add(session, now_ms)
        return next(key for key in self._fresh(now_ms, again=True) if not key.retired)

    def _verifying_key(self, kid: object, now_ms: int) -> _Key | None:
        for again in (False, True):
            for key in self._fresh(now_ms, again=again):
                if key.kid == kid and _verifies(key, now_ms):
                    return key
        return None

    def _fresh(self, now_ms: int, *, again: bool = False) -> list[_Key]:
        """The keys, the newest first, as they were at most CACHE_MS ago; `again`: as they are."""
        with self._lock:
            # A clock that went back must not make the cache last for ever.
            if not again and 0 <= now_ms - self._read_at_ms < CACHE_MS:
                return self._keys
            with self._database.read() as session:
                rows = session.scalars(
                    select(SigningKey).order_by(SigningKey.created_at_ms.desc(), SigningKey.kid.desc())
                ).all()
                self._keys = [self._load(row) for row in rows]
            self._read_at_ms = now_ms
            return self._keys

    def _load(self, row: SigningKey) -> _Key:
        private = Ed25519PrivateKey.from_private_bytes(
            self._secrets.open(_SEAL, row.private_key_sealed, row.kid)
        )
        return _Key(row.kid, private.public_key(), private, row.retired_at_ms is not None, row.expires_at_ms)

    def _add(self, session: Session, now_ms: int) -> str:
        private = Ed25519PrivateKey.generate()
        kid = random.token_hex(8)
        raw = private.private_bytes(
            serialization.Encoding.Raw, serialization.PrivateFormat.Raw, serialization.NoEncryption()
        )
        session.add(
            SigningKey(
                kid=kid,
                public_key=_unpadded(private.public_key().public_bytes_raw()),
                private_key_sealed=self._secrets.seal(_SEAL, raw, kid),
                created_at_ms=now_ms,
            )
        )
        session.flush()
        return kid


def _verifies(key: _Key, now_ms: int) -> bool:
    return key.expires_at_ms is None or now_ms < key.expires_at_ms


def _unpadded(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
