"""Registering, logging in, refreshing, logging out."""

from __future__ import annotations

import jwt
import pytest
from argon2 import PasswordHasher
from sqlalchemy import func, select

from accounts import audit, logins, users
from accounts.attempts import DEFAULT_LIMITS, Guarded, Limit
from accounts.audit import Action
from accounts.context import Accounts, AccountsConfig
from accounts.errors import Reason, Refused
from accounts.models import AuditEntry, RefreshToken, User
from accounts.passwords import Argon2Parameters
from tests.accounts.support import CHEAP, PASSWORD, Client, Clock, at_once, problem_of

HERE = "192.0.2.1"


def refreshed(client: Client, token: str):  # type: ignore[no-untyped-def]
    return client.http.post("/v1/refresh", json={"refresh_token": token})


def test_register_and_log_in(client: Client) -> None:
    """By username in any case or by address; the profile is theirs."""
    client.register("Ada")
    for login in ("Ada", "aDa", "ADA@example.com"):
        member = client.log_in(login)
        profile = client.http.get("/v1/me", headers=member.auth).json()
        assert (profile["username"], profile["email"], profile["role"]) == ("Ada", "Ada@example.com", "user")


def test_a_taken_username_is_said_and_a_taken_address_is_not(client: Client, accounts: Accounts) -> None:
    """The answer for a taken address is that for a free one, and nobody is made."""
    client.register("ada")
    body = {"username": "ADA", "email": "other@example.com", "password": PASSWORD}
    assert problem_of(client.http.post("/v1/register", json=body)) == "username-taken"
    free = client.http.post("/v1/register", json=body | {"username": "bob"})
    taken = client.http.post("/v1/register", json=body | {"username": "eve", "email": "ADA@EXAMPLE.COM"})
    assert (
        (free.status_code, free.json()) == (taken.status_code, taken.json()) == (202, {"status": "accepted"})
    )
    with accounts.database.read() as session:
        assert sorted(session.scalars(select(User.username))) == ["ada", "bob"]


def test_one_of_many_registrations_at_once_wins(accounts: Accounts) -> None:
    """One user comes of it, whichever they share: the name or the address."""

    def register(number: int) -> bool:
        try:
            users.register(accounts, "ada", f"ada{number % 2}@example.com", PASSWORD, HERE)
        except Refused as refused:
            assert refused.reason is Reason.USERNAME_TAKEN
            return False
        return True

    assert sum(at_once(6, register)) == 1
    with accounts.database.read() as session:
        assert session.scalar(select(func.count()).select_from(User)) == 1


@pytest.mark.parametrize(
    ("password", "why"),
    [
        ("aaaaaaaaaaaa", "4 different"),
        ("ada.lovelace", "username"),
        ("ada.lovelace@example.com", "username or the e-mail"),
    ],
)
def test_a_weak_password_is_refused(client: Client, password: str, why: str) -> None:
    """With the reason, and without the password."""
    body = {"username": "ada.lovelace", "email": "ada.lovelace@example.com", "password": password}
    refused = client.http.post("/v1/register", json=body)
    assert problem_of(refused) == "weak-password"
    assert why in refused.json()["detail"]


def test_a_wrong_password_and_an_unknown_user_get_the_same_answer(client: Client) -> None:
    """Nothing in the answer tells them apart."""
    client.register("ada")
    wrong = client.http.post("/v1/login", json={"login": "ada", "password": "not the password"})
    unknown = client.http.post("/v1/login", json={"login": "nobody", "password": "not the password"})
    assert problem_of(wrong) == "bad-credentials"
    assert wrong.content == unknown.content
    assert wrong.headers == unknown.headers


def test_an_unknown_user_costs_a_hash_as_well(accounts: Accounts) -> None:
    """With a hash that takes long, refusing an unknown user takes about as long as a known one."""
    import time

    costly = Accounts(
        accounts.database,
        accounts.secrets,
        AccountsConfig(argon2=Argon2Parameters(time_cost=8, memory_kib=16_384, parallelism=1)),
        accounts.now_ms,
    )
    users.register(costly, "ada", "ada@example.com", PASSWORD, HERE)

    def cpu_s(login: str) -> float:
        before_s = time.thread_time()
        with pytest.raises(Refused):
            logins.log_in(costly, login, "not the password", HERE)
        return time.thread_time() - before_s

    known_s, unknown_s = min(cpu_s("ada") for _ in range(3)), min(cpu_s("eve") for _ in range(3))
    assert 0.5 < unknown_s / known_s < 2


def test_too_many_wrong_passwords_stop_the_right_one_too(client: Client, clock: Clock) -> None:
    """Ten from one address; the eleventh is not even looked at. Later it works again."""
    client.register("ada")
    for _ in range(10):
        wrong = client.http.post("/v1/login", json={"login": "ada", "password": "wrong"})
        assert problem_of(wrong) == "bad-credentials"
    stopped = client.http.post("/v1/login", json={"login": "ada", "password": PASSWORD})
    assert problem_of(stopped) == "too-many-attempts"
    assert 0 < int(stopped.headers["retry-after"]) <= 900
    clock.go_on(int(stopped.headers["retry-after"]))
    client.log_in("ada")


def test_right_passwords_do_not_count(client: Client) -> None:
    """More log-ins than wrong ones would be allowed."""
    client.register("ada")
    for _ in range(12):
        client.log_in("ada")


def test_guesses_at_once_all_count(accounts: Accounts) -> None:
    """No more of them are looked at than the limit says, however many come at once."""
    users.register(accounts, "ada", "ada@example.com", PASSWORD, HERE)

    def guess(_number: int) -> Reason:
        with pytest.raises(Refused) as caught:
            logins.log_in(accounts, "ada", "wrong", HERE)
        return caught.value.reason

    answers = at_once(16, guess)
    assert answers.count(Reason.BAD_CREDENTIALS) == 10
    assert answers.count(Reason.TOO_MANY_ATTEMPTS) == 6


def test_every_process_counts_in_the_same_place(accounts: Accounts) -> None:
    """Another process on the same database refuses what this one counted."""
    limits = DEFAULT_LIMITS | {Guarded.LOGIN_ACCOUNT: Limit(1, 60_000)}
    one, other = (
        Accounts(
            accounts.database, accounts.secrets, AccountsConfig(argon2=CHEAP, limits=limits), accounts.now_ms
        )
        for _ in range(2)
    )
    with pytest.raises(Refused, match="not right"):
        logins.log_in(one, "ada", "wrong", HERE)
    with pytest.raises(Refused, match="too many"):
        logins.log_in(other, "ada", "wrong", "192.0.2.2")


def test_a_hash_is_made_anew_when_the_parameters_change(accounts: Accounts) -> None:
    """At the next log-in, without a word; the old hash verified."""
    users.register(accounts, "ada", "ada@example.com", PASSWORD, HERE)
    dearer = Accounts(
        accounts.database,
        accounts.secrets,
        AccountsConfig(argon2=Argon2Parameters(time_cost=2, memory_kib=16, parallelism=1)),
        accounts.now_ms,
    )
    logins.log_in(dearer, "ada", PASSWORD, HERE)
    with accounts.database.read() as session:
        hashed = session.scalars(select(User.password_hash)).one()
    assert hashed.startswith("$argon2id$v=19$m=16,t=2,p=1$")
    assert PasswordHasher().verify(hashed, PASSWORD)
    logins.log_in(dearer, "ada", PASSWORD, HERE)


def test_a_refresh_token_works_once_and_gives_the_next(client: Client) -> None:
    """Each one opens the next door."""
    token = client.register().refresh
    for _ in range(3):
        done = refreshed(client, token)
        assert done.status_code == 200
        assert done.headers["cache-control"] == "no-store"
        assert done.json()["refresh_token"] != token
        token = done.json()["refresh_token"]
    headers = {"Authorization": f"Bearer {done.json()['access_token']}"}
    assert client.http.get("/v1/me", headers=headers).status_code == 200


def test_a_reused_refresh_token_revokes_the_family(client: Client, accounts: Accounts) -> None:
    """The thief's and the owner's newest tokens end, another log-in of the user goes on, and it is in the log."""
    member = client.register("ada")
    other = client.log_in("ada")
    newest = refreshed(client, member.refresh).json()
    assert problem_of(refreshed(client, member.refresh)) == "refresh-reused"
    assert problem_of(refreshed(client, newest["refresh_token"])) == "bad-token"
    headers = {"Authorization": f"Bearer {newest['access_token']}"}
    assert problem_of(client.http.get("/v1/me", headers=headers)) == "bad-token"
    assert refreshed(client, other.refresh).status_code == 200
    with accounts.database.read() as session:
        [entry] = audit.page(session, before=None, limit=10, action=Action.REFRESH_REUSED)
        assert entry.target == f"user/{member.user_id}"


def test_two_uses_at_once_never_both_succeed(accounts: Accounts) -> None:
    """Exactly one does, and the log-in ends, because nobody can tell which one was the thief."""
    users.register(accounts, "ada", "ada@example.com", PASSWORD, HERE)
    for _ in range(5):
        token = logins.log_in(accounts, "ada", PASSWORD, HERE).refresh_token

        def use(_number: int, token: str = token) -> str | Reason:
            try:
                return logins.refresh(accounts, token, HERE).refresh_token
            except Refused as refused:
                return refused.reason

        answers = at_once(4, use)
        [won] = [answer for answer in answers if not isinstance(answer, Reason)]
        assert Reason.REFRESH_REUSED in answers
        with pytest.raises(Refused) as caught:
            logins.refresh(accounts, won, HERE)
        assert caught.value.reason is Reason.BAD_TOKEN


def test_refresh_tokens_lie_hashed(client: Client, accounts: Accounts) -> None:
    """What is in the database is no token."""
    member = client.register()
    with accounts.database.read() as session:
        [stored] = session.scalars(select(RefreshToken.token_hash))
    assert member.refresh not in stored
    assert problem_of(refreshed(client, stored)) == "bad-token"


def test_a_login_ends_when_it_is_not_refreshed(client: Client, clock: Clock) -> None:
    """A moment before its end it is refreshed and lives on; at its end it is over."""
    member = client.register()
    clock.go_on(2_592_000 - 1)
    token = refreshed(client, member.refresh).json()["refresh_token"]
    clock.go_on(2_592_000)
    assert problem_of(refreshed(client, token)) == "bad-token"


def test_a_login_ends_after_90_days_however_often_it_is_refreshed(client: Client, clock: Clock) -> None:
    """Three months later the password is asked for again."""
    token = client.register().refresh
    for _ in range(9):
        clock.go_on(864_000 - 10)
        done = refreshed(client, token)
        assert done.status_code == 200
        token = done.json()["refresh_token"]
    clock.go_on(100)
    assert problem_of(refreshed(client, token)) == "bad-token"


def test_used_tokens_are_forgotten_once_they_would_have_expired(client: Client, clock: Clock) -> None:
    """So that a log-in of months does not fill the table."""
    token = client.register().refresh
    for _ in range(5):
        clock.go_on(1_500_000)
        token = refreshed(client, token).json()["refresh_token"]
    with client.accounts.database.read() as session:
        assert session.scalar(select(func.count()).select_from(RefreshToken)) == 2


def test_logging_out_ends_access_at_once(client: Client) -> None:
    """Access and refresh tokens; repeating it, or a made-up token, gets the same answer."""
    member = client.register()
    for token in (member.refresh, member.refresh, "lmr_made_up"):
        assert client.http.post("/v1/logout", json={"refresh_token": token}).status_code == 204
    assert problem_of(client.http.get("/v1/me", headers=member.auth)) == "bad-token"
    assert problem_of(refreshed(client, member.refresh)) == "bad-token"


def test_changing_the_password_revokes_every_login(client: Client) -> None:
    """This one and others; the new password opens, the old one does not; it is in the audit log."""
    member, other = client.register("ada"), client.log_in("ada")
    new = "another long password"
    body = {"current_password": "not it", "new_password": new}
    assert (
        problem_of(client.http.post("/v1/me/password", json=body, headers=member.auth)) == "bad-credentials"
    )
    body["current_password"] = PASSWORD
    assert client.http.post("/v1/me/password", json=body, headers=member.auth).status_code == 204
    for gone in (member, other):
        assert problem_of(client.http.get("/v1/me", headers=gone.auth)) == "bad-token"
        assert problem_of(refreshed(client, gone.refresh)) == "bad-token"
    old = client.http.post("/v1/login", json={"login": "ada", "password": PASSWORD})
    assert problem_of(old) == "bad-credentials"
    client.log_in("ada", new)
    [entry] = client.audit(client.operator(), action="password.changed")
    assert (entry["target"], entry["payload"]) == (f"user/{member.user_id}", {"logins_revoked": 2})


def test_a_login_on_its_way_does_not_outlive_a_change_of_the_password(accounts: Accounts) -> None:
    """Its password was right when it was checked, and is not when the log-in is written: it is refused."""
    users.register(accounts, "ada", "ada@example.com", PASSWORD, HERE)

    class Slow(Accounts):
        """Changes the password between the check and what follows."""

    slow = Slow(accounts.database, accounts.secrets, accounts.config, accounts.now_ms)
    outdated = slow.passwords.outdated

    def change_meanwhile(hashed: str) -> bool:
        with accounts.database.read() as session:
            user_id = session.scalars(select(User.user_id)).one()
        users.change_password(accounts, user_id, PASSWORD, "another long password", HERE)
        return outdated(hashed)

    slow.passwords.outdated = change_meanwhile  # type: ignore[method-assign]
    with pytest.raises(Refused) as caught:
        logins.log_in(slow, "ada", PASSWORD, HERE)
    assert caught.value.reason is Reason.BAD_CREDENTIALS


def test_of_two_changes_of_the_password_at_once_one_wins(accounts: Accounts) -> None:
    """The password is one of the two, and only its change was said to have worked."""
    users.register(accounts, "ada", "ada@example.com", PASSWORD, HERE)
    with accounts.database.read() as session:
        user_id = session.scalars(select(User.user_id)).one()

    def change(number: int) -> bool:
        try:
            users.change_password(accounts, user_id, PASSWORD, f"a new long password {number}", HERE)
        except Refused:
            return False
        return True

    changed = at_once(4, change)
    assert sum(changed) == 1
    logins.log_in(accounts, "ada", f"a new long password {changed.index(True)}", HERE)


def test_my_logins(client: Client) -> None:
    """They are listed, this one marked; all of them can be ended."""
    first, second = client.register("ada"), client.log_in("ada")
    listed = client.http.get("/v1/me/logins", headers=second.auth).json()["items"]
    assert [login["current"] for login in listed] == [True, False]
    assert client.http.delete("/v1/me/logins", headers=second.auth).status_code == 204
    for gone in (first, second):
        assert problem_of(client.http.get("/v1/me", headers=gone.auth)) == "bad-token"


def test_an_access_token_expires(client: Client, clock: Clock) -> None:
    """A second before its end it works; at its end it does not."""
    member = client.register()
    clock.go_on(599)
    assert client.http.get("/v1/me", headers=member.auth).status_code == 200
    clock.go_on(1)
    assert problem_of(client.http.get("/v1/me", headers=member.auth)) == "bad-token"


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer x"}, {"Authorization": "Basic eDp5"}])
def test_without_a_token_nothing_is_shown(client: Client, headers: dict[str, str]) -> None:
    """The answer says how to come in."""
    refused = client.http.get("/v1/me", headers=headers)
    assert problem_of(refused) == "bad-token"
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")


def test_anybody_verifies_a_token_with_the_published_keys(client: Client) -> None:
    """Ed25519, a key id in the header, the account as subject."""
    member = client.register()
    header = jwt.get_unverified_header(member.access)
    assert (header["alg"], header["typ"]) == ("EdDSA", "at+jwt")
    keys = jwt.PyJWKSet.from_dict(client.http.get("/.well-known/jwks.json").json())
    claims = jwt.decode(
        member.access,
        keys[header["kid"]].key,
        algorithms=["EdDSA"],
        audience="lingua-metering",
        issuer="lingua-metering",
        options={"verify_exp": False, "verify_iat": False},
    )
    assert (claims["sub"], claims["role"]) == (f"user/{member.user_id}", "user")
    assert claims["exp"] - claims["iat"] == 600


def test_audit_has_registrations(client: Client, accounts: Accounts) -> None:
    """Registering is in the log."""
    member = client.register()
    with accounts.database.read() as session:
        [entry] = session.scalars(select(AuditEntry).where(AuditEntry.action == "user.registered"))
        assert (entry.actor_id, entry.target) == (member.user_id, f"user/{member.user_id}")
