"""Run a command with secrets that lie in files: ``python -m registry.cli.secret_files COMMAND …``.

Containers are given secrets as files, while libpq, MLflow and S3 clients look for them in the
environment, where ``docker inspect`` would show them. ``NAME_FILE`` says where the value of
``NAME`` lies; the command takes this process's place.

The command and all that it starts can gain no privileges: Swarm ignores Compose's
``no-new-privileges``, so the images set it themselves.
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
    """``environment`` with each of ``NAMES`` whose ``NAME_FILE`` it has.

    Raises:
        UsageError: such a file cannot be read, or is empty.
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
            raise UsageError(f"{name}_FILE={file!r} is empty")
    return found


def main(command: list[str]) -> int:
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
