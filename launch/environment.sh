# Sourced by the scripts beside it: an environment with this project, made when there is none. What is installed is
# what the project and the extra need, in the lock file's versions.
#
#   VENV    folder of the environment to use or make (default: .venv in the repository)
#   PYTHON  interpreter to make it with (default: python3)
#
# With an environment already active (VIRTUAL_ENV) and VENV unset, that one is used.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="${VENV:-${VIRTUAL_ENV:-$root/.venv}}"

# ensure_environment [EXTRA]: installs this project with the extra.
ensure_environment() {
  local extra="${1:-}" stamp="$venv/.delo-llava${1:+-$1}"
  if [ ! -x "$venv/bin/python" ]; then
    local python="${PYTHON:-python3}"
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "error: Python 3.11 or newer is needed" >&2
      echo "  given: $("$python" --version 2>&1)" >&2
      echo "  fix:   name one: PYTHON=python3.11 bash $0" >&2
      exit 2
    fi
    "$python" -m venv "$venv"
  fi
  export PATH="$venv/bin:$PATH"
  if [ ! -e "$stamp" ] || [ "$root/requirements.lock" -nt "$stamp" ] || [ "$root/pyproject.toml" -nt "$stamp" ]; then
    python -m pip install --quiet --disable-pip-version-check -c "$root/requirements.lock" -e "$root${extra:+[$extra]}"
    touch "$stamp"
  fi
}
