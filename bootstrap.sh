#!/usr/bin/env bash
# Sets up everything on a Debian machine with Python 3.11, then runs the main job or the tests.
#   bash bootstrap.sh compile [ARGUMENTS]   compile a model; by default the bundled decoder for arm64
#   bash bootstrap.sh test [ARGUMENTS]      lint, types, layering, then all tests (ARGUMENTS go to pytest)
# A second run finds everything in place and starts at once. OPTIMIZER_VENV names another virtual environment.
set -euo pipefail
cd "$(dirname "$0")"
venv=${OPTIMIZER_VENV:-.venv}

install_system_packages() { # the Debian packages named that are not there yet
  local missing=()
  for package in "$@"; do
    dpkg-query -W -f='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing+=("$package")
  done
  if [ ${#missing[@]} -gt 0 ]; then
    local sudo=sudo
    [ "$(id -u)" = 0 ] && sudo=
    $sudo apt-get update -q
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -q -y --no-install-recommends "${missing[@]}"
  fi
}

set_up() { # extras of setup.cfg
  local stamp="$venv/.optimizer-$1"
  if [ "$stamp" -nt setup.cfg ] && [ "$stamp" -nt bootstrap.sh ]; then
    return
  fi
  local packages=(ca-certificates)
  if ! python3.11 -c 'import ensurepip, venv' 2>/dev/null; then
    packages+=(python3.11 python3.11-venv)
  fi
  if [ "$1" = test ] && ! command -v g++ >/dev/null; then
    packages+=(g++)
  fi
  install_system_packages "${packages[@]}"
  [ -x "$venv/bin/python" ] || python3.11 -m venv "$venv"
  "$venv/bin/python" -m pip install --quiet --editable ".[$1]"
  # The emulator runs arm64 packages here; without it they are built but not executed.
  "$venv/bin/python" -m targets.emulator install || echo "bootstrap: no emulator; arm64 code will not be executed" >&2
  touch "$stamp"
}

mode=${1:-}
[ $# -eq 0 ] || shift
case "$mode" in
  compile)
    set_up verify
    [ $# -gt 0 ] || set -- --target arm64
    exec "$venv/bin/python" -m optimizer compile "$@"
    ;;
  test)
    set_up test
    PATH="$(cd "$venv" && pwd)/bin:$PATH"
    export PATH
    ruff check .
    ruff format --check .
    lint-imports
    basedpyright --pythonpath "$venv/bin/python"
    exec python -m pytest -n 2 --dist worksteal "$@"
    ;;
  *)
    sed -n 's/^#   bash/usage: bash/p' "$0" >&2
    exit 2
    ;;
esac
