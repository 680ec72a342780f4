"""What a client asked for and cannot have; anything that it sent and that cannot be right is `rlt.errors.Refused`."""


class Missing(LookupError):
    """Not there, or another tenant's, which a client is not told apart (404)."""


class Gone(LookupError):
    """Was there: a session that is over, a result that was kept long enough (410)."""


class WrongKey(PermissionError):
    """401."""


class Busy(RuntimeError):
    """A queue is full: come again (429)."""


class Unavailable(RuntimeError):
    """The database does not answer, or has no room: come again (503)."""
