"""Tenants by their keys, of which only hashes are kept."""

import hashlib

from sqlalchemy import Connection, insert, select

from rlt.errors import Refused
from rlt.serving.database import notes, tenants
from rlt.serving.errors import WrongKey

KEY_START = "tml-"  # clients refuse keys that begin otherwise
KEY_LENGTH = 12


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode()).hexdigest()  # keys are long and random: no slow hash is needed


def add_tenant(connection: Connection, tenant: str, key: str) -> None:
    """A tenant whose key this is; the same pair again changes nothing.

    Raises:
        Refused: a key that clients would not send, or another tenant's.
    """
    if not key.startswith(KEY_START) or len(key) < KEY_LENGTH:
        raise Refused(f"the key of {tenant} must begin with {KEY_START} and have {KEY_LENGTH} characters or more")
    before = connection.execute(select(tenants.c.id).where(tenants.c.key_hash == _hash(key))).scalar_one_or_none()
    if before not in (None, tenant):
        raise Refused(f"the key of {tenant} is also that of {before}: each needs its own")
    connection.execute(tenants.delete().where(tenants.c.id == tenant))  # a new key takes the old one's place
    connection.execute(insert(tenants).values(id=tenant, key_hash=_hash(key)))


def secret(connection: Connection, new: str) -> str:
    """The server's own, which stays the same when it starts again."""
    found = connection.execute(select(notes.c.text).where(notes.c.name == "secret")).scalar_one_or_none()
    if found is None:
        connection.execute(insert(notes).values(name="secret", text=new))
    return found or new


def tenant_of(connection: Connection, key: str | None) -> str:
    found = connection.execute(select(tenants.c.id).where(tenants.c.key_hash == _hash(key or ""))).scalar_one_or_none()
    if found is None:
        raise WrongKey("the key in X-API-Key is not known here")
    return found
