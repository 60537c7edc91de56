"""Run a command with secrets from files: ``python -m registry.cli.secret_files COMMAND …``.

libpq, MLflow and S3 clients read secrets from the environment, but ``docker inspect`` shows the
environment that a container is configured with. So containers get secrets as files: ``NAME_FILE``
is the path of the file with the value of ``NAME``. The command replaces this process.

The command and its children cannot gain privileges. Swarm ignores Compose's ``no-new-privileges``,
so the images set it themselves, through this module.
"""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from registry.core.errors import UsageError
from registry.core.process_lifetime import forbid_new_privileges

NAMES = (
    "AWS_ACCESS_KEY_ID",
    "AWS_SECRET_ACCESS_KEY",
    "CONVOY_SERVICE_KEY",
    "MLFLOW_AUTH_ADMIN_PASSWORD",
    "MLFLOW_FLASK_SERVER_SECRET_KEY",
    "MLFLOW_READER_PASSWORD",
    "MLFLOW_TRACKING_PASSWORD",
    "PGPASSWORD",
)


def with_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """A copy of ``environment`` with the secrets of ``NAMES`` read from their ``NAME_FILE``.

    Raises:
        UsageError: a file cannot be read, or is empty.
    """
    found = dict(environment)
    for name in NAMES:
        file = environment.get(f"{name}_FILE")
        if not file:
            continue
        try:
            found[name] = Path(file).read_text().strip()
        except (OSError, ValueError) as error:
            raise UsageError(f"{name}_FILE={file!r} cannot be read: {error}") from error
        if not found[name]:
            raise UsageError(f"{name}_FILE={file!r} is empty; write the secret into it")
    return found


def main(command: list[str]) -> int:
    """Replace this process by ``command``, with its secrets in the environment.

    Returns:
        The exit status 2, and only if a secret or the command cannot be read or started. The reason
        is then on standard error.
    """
    forbid_new_privileges()
    try:
        os.execvpe(command[0], command, with_secrets(os.environ))  # noqa: S606 - the operator's own
    except UsageError as error:
        print(error, file=sys.stderr)
    except (OSError, IndexError) as error:
        print(f"cannot run {' '.join(command)!r}: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
