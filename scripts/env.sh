# Sourced by the other scripts: makes .venv once, installs the pinned requirements, and puts it first on PATH.
# A second call costs nothing; changed requirements update the environment. REQUIREMENTS names another list of packages.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
requirements=${REQUIREMENTS:-requirements.txt}
if ! cat requirements*.txt | cmp -s - ".venv/installed-$requirements"; then
    python=${PYTHON:-$(command -v python3 || command -v python)} || { echo "no python3 on PATH" >&2; exit 1; }
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
        echo "Python 3.11 or newer is needed, $python is $("$python" --version); name another one with PYTHON=..." >&2
        exit 1
    }
    echo "installing $requirements into .venv (a few minutes, once)"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --requirement "$requirements"
    cat requirements*.txt > ".venv/installed-$requirements"
    [ "$requirements" != requirements-tests.txt ] || cp ".venv/installed-$requirements" .venv/installed-requirements.txt
fi
PATH="$PWD/.venv/bin:$PATH"
