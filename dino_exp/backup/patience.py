"""How long to wait for a place far away, which troubles pass by themselves, and when to try again."""

from __future__ import annotations

import errno
from dataclasses import dataclass

# What trying again does not mend: the wrong place, no right to be there, no room, a call that is not offered.
_LASTING = (
    FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, FileExistsError, ImportError,
    NotImplementedError, ValueError, TypeError, AttributeError, LookupError, MemoryError,
)  # fmt: skip
_LASTING_ERRNO = (
    errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EINVAL, errno.EPERM, errno.EACCES, errno.ENAMETOOLONG, errno.ENOTSUP,
)  # fmt: skip
# By name, because the packages that define them need not be installed: botocore, google-auth, paramiko.
_CREDENTIALS = (
    "NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound", "NoRegionError",
    "TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError", "DefaultCredentialsError", "RefreshError",
    "AuthenticationException", "PasswordRequiredException", "BadHostKeyException", "NoAuthTokenError",
)  # fmt: skip
_WRONG_CALLS = ("ParamValidationError", "InvalidRegionError", "UnknownEndpointError")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """Bounds of waiting, in seconds: for one answer, and between tries, where it doubles from `first` to `most`."""

    num_tries: int = 5
    answer_secs: float = 120.0
    first_secs: float = 1.0
    most_secs: float = 30.0

    def delay_secs(self, num_failed: int, draw: float) -> float:
        """How long to wait after so many failures; `draw` from 0 to 1 keeps clients from coming back all at once."""
        return min(self.most_secs, self.first_secs * 2.0 ** (num_failed - 1)) * (0.5 + 0.5 * draw)


def lacks_credentials(error: BaseException) -> bool:
    """Whether the backend says that it does not know who we are."""
    return type(error).__name__ in _CREDENTIALS


def is_passing(error: BaseException) -> bool:
    """Whether the same call may succeed in a while. An error that nobody has named here may: tries are bounded."""
    if isinstance(error, _LASTING) or lacks_credentials(error):
        return False
    if type(error).__name__ in _WRONG_CALLS:
        return False
    return not (isinstance(error, OSError) and error.errno in _LASTING_ERRNO)
