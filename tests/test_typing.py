"""What users write passes mypy, with their mistakes found: tests/user_code is checked and never run."""

import sys
from pathlib import Path

from tests.processes import REPO, run

USER_CODE = Path(__file__).with_name("user_code")


def test_user_code_type_checks_and_each_expected_mistake_is_found():
    # --strict warns of a `type: ignore` that hides nothing. Errors inside of packages are not a user's.
    options = ["--strict", "--follow-imports=silent", "--cache-dir=/dev/null", "--python-executable", sys.executable]
    run(sys.executable, "-m", "mypy", *options, *map(str, sorted(USER_CODE.glob("*.py"))), cwd=REPO)
