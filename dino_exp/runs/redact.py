"""Keeps passwords and tokens out of what a run records."""

from __future__ import annotations

import re
from collections.abc import Sequence

MASK = "***"
_SECRET_NAME = re.compile(
    r"KEY|TOKEN|SECRET|PASSW|PASSPHRASE|CREDENTIAL|AUTH|COOKIE|JWT|PRIVATE|(?:^|[^A-Z])PASS(?:$|[^A-Z])",
    re.IGNORECASE,
)
# What usually holds a secret. Of code only what says so plainly: models are full of tokens and keys.
_SECRET_FILE = re.compile(
    r".*\.env(?:\..*)?|[._]netrc|\.pypirc|\.npmrc|\.pgpass|\.boto|\.s3cfg|\.git-credentials|.*\.?htpasswd|auth\.json"
    r"|id_(?:rsa|dsa|ecdsa|ed25519)(?:[^a-z].*)?|.*\.(?:pem|key|p8|p12|pfx|kdbx|keystore|jks|asc|gpg|ovpn)"
    r"|.*(?:credential|secret|passwd|password|passphrase|token)s?(?:[^a-z].*)?"
    r"|(?:.*[^a-z])?(?:api|access|auth|private|secret|signing|ssh|service)[-_. ]?(?:key|account)s?(?:[^a-z].*)?"
    r"|(?:.*[-_. ])?keys?(?:\.(?:txt|json|ya?ml|ini|cfg|toml))?",
    re.IGNORECASE,
)
_SECRET_CODE = re.compile(r".*(?:credential|secret|password|token|api_?key)s?\.py", re.IGNORECASE)
# git's own rule (credential_from_url): what lies between `://` and the last `@` before the first of `/?#`.
_USER_INFO = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<user>[^/?#\s]*)@")
_QUERY = re.compile(r"(?P<address>https?://[^\s?#]+)[?#][^\s]*", re.IGNORECASE)


def is_secret_name(name: str) -> bool:
    """Whether a variable or setting of this name may hold a secret. Errs on the side of yes."""
    return _SECRET_NAME.search(name) is not None


def is_secret_file(name: str) -> bool:
    """Whether a file of this name (without folders) may hold a secret. Errs on the side of yes, but for code."""
    return (_SECRET_CODE if name.lower().endswith(".py") else _SECRET_FILE).fullmatch(name) is not None


def strip_credentials(text: str) -> str:
    """`text` with user and password taken out of every address; a user of ssh stays, because it is no secret.

    `https://user:token@host/x?sig=1` becomes `https://host/x`; `git@host:path` is left as it is.
    """
    return _QUERY.sub(lambda found: found["address"], _USER_INFO.sub(_without_user, text))


def mask_arguments(arguments: Sequence[str]) -> list[str]:
    """Command-line words with secrets masked: `a.api_key=x`, `--token=x`, `--token x`, and addresses."""
    masked: list[str] = []
    hide_next = False
    for word in arguments:
        name, equals, _ = word.partition("=")
        if hide_next and not word.startswith("-"):
            masked.append(MASK)
        elif equals and is_secret_name(name):
            masked.append(f"{name}={MASK}")
        else:
            masked.append(strip_credentials(word))
        hide_next = not equals and word.startswith("-") and is_secret_name(word)
    return masked


def _without_user(found: re.Match[str]) -> str:
    scheme, user = found["scheme"], found["user"].partition(":")[0]
    return f"{scheme}://{user}@" if "ssh" in scheme.lower() and user else f"{scheme}://"
