#!/bin/sh
# SPDX-License-Identifier: GPL-2.0-only
#
# Runs the suite in a virtual environment that the first call makes; --help says how. --check: the project's own tests.
#
#   PYTHON      the interpreter to make the environment with (python3)
#   UFFD_VENV   the environment's folder (.venv beside this file); none: run with PYTHON as it is
#
# Exit code 2 and one line that says what to do when the set-up is not usable; else the suite's exit code.
set -eu

die() {
    echo "run_tests.sh: $1" >&2
    exit 2
}

# What the environment was made from. The built module counts too: builds for other environments replace it.
checksum() {
    cat "$here/pyproject.toml" "$native"/*.[ch] "$native"/*.py "$native"/*.so 2>/dev/null | cksum
}

# Whether the environment is that of these sources, told by the times at which they changed where that is enough: to read
# them takes longer than all else that this script does.
fresh() {
    made='' interpreter='' place='' made_with=''
    { read -r made && read -r interpreter && read -r place && read -r made_with; } 2>/dev/null <"$stamp" || true
    # shellcheck disable=SC3013 # dash, bash, busybox and ksh have -ef
    [ "$place" = "$here" ] && [ "$venv/bin/python" -ef "$interpreter" ] && [ -x "$venv/bin/python" ] &&
        [ "${PYTHON:-$made_with}" = "$made_with" ] || return 1
    for extra in $extras; do [ -e "$stamp.$extra" ] || return 1; done
    newer=$(find "$here/pyproject.toml" "$native" -maxdepth 1 -type f -cnewer "$stamp" 2>&1)
    [ -z "$newer" ] || { [ "$made" = "$(checksum)" ] && { touch -c "$stamp" 2>/dev/null || true; }; }
}

check_interpreter() {
    command -v "$python" >/dev/null || die "no $python: apt-get install $packages"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
        die "$python is older than 3.10: name a newer one: PYTHON=python3.12 ./run_tests.sh"
    "$python" -c 'import sys; sys.exit(sys.maxsize < 1 << 32)' ||
        die "$python is a program of 32 bits: name one of 64 bits: PYTHON=/usr/bin/python3 ./run_tests.sh"
    missing=$("$python" -c '
import importlib.util as util, os, shutil, sysconfig
cc = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
header = os.path.join(sysconfig.get_path("include"), "Python.h")
got = {"python3-venv": util.find_spec("ensurepip"), "python3-dev": os.path.exists(header), "gcc": shutil.which(cc)}
print(*[package for package in got if not got[package]])')
    [ -z "$missing" ] || die "missing for the set-up with $python: apt-get install $missing"
}

logged() { # STEP COMMAND...
    step=$1
    shift
    "$@" >>"$venv/setup.log" 2>&1 </dev/null && return
    why=$(grep -i 'error: ' "$venv/setup.log" | grep -v subprocess-exited | head -n 1 | sed 's/^ *//')
    case $why in *"from versions: none"*) why="no network? $why" ;; esac
    die "set-up: $step failed: $why (log: $venv/setup.log)"
}

whole() {
    [ -s "$stamp" ] && [ "${PYTHON:-$made_with}" = "$made_with" ] && "$venv/bin/python" -c 'import pip' 2>/dev/null
}

unfinished() {
    { mkdir -p "$venv" && true >"$stamp" && true >"$venv/setup.log"; } 2>/dev/null ||
        die "cannot write to $venv: name a folder in UFFD_VENV"
}

setup() {
    [ -w "$native" ] || [ ! -s "$stamp" ] || [ -x "$venv/bin/python" ] ||
        die "you may not run $venv/bin/python, which its owner made with $made_with: have it made with PYTHON=/usr/bin/python3"
    [ -w "$native" ] || die "cannot write to $here: copy the project to a folder of yours"
    if [ -e "$venv" ] && [ ! -e "$stamp" ]; then
        rmdir "$venv" 2>/dev/null || die "$venv is not of this script's making: move it, or name another in UFFD_VENV"
    fi
    if whole; then
        echo "run_tests.sh: updating $venv" >&2
    else
        check_interpreter
        rm -rf "$venv"
        unfinished
        echo "run_tests.sh: setting up $venv (once)" >&2
        logged "python -m venv" "$python" -I -m venv "$venv"
        made_with=$python
    fi
    wanted=$extras
    [ ! -e "$stamp.dev" ] || wanted=dev # what an earlier call wanted stays
    unfinished
    # The same as in pyproject.toml: a build without isolation can be repeated without network.
    logged pip "$venv/bin/python" -I -m pip install 'pip>=22.1' 'setuptools>=77' 'cffi>=1.16'
    # As a path: setuptools' finder of modules takes longer to load than half of what --help needs.
    logged pip "$venv/bin/python" -I -m pip install --no-build-isolation --config-settings editable_mode=compat \
        --editable "$here${wanted:+[$wanted]}"
    for extra in $extras; do true >"$stamp.$extra"; done
    printf '%s\n' "$(checksum)" "$(readlink -f "$venv/bin/python")" "$here" "$made_with" >"$stamp"
}

self=$0
[ ! -L "$self" ] || self=$(readlink -f "$self")
case $self in */*) ;; *) self=./$self ;; esac
here=$(CDPATH='' cd "${self%/*}/" && pwd -P)
native=$here/uffd_selftests/abi/native
python=${PYTHON:-python3}
packages="python3-venv python3-dev gcc"
module=uffd_selftests extras='' # of pyproject.toml
if [ "${1-}" = --check ]; then
    module=uffd_selftests.checks extras=dev
    shift
else
    export PYTHONSAFEPATH=1
fi

venv=${UFFD_VENV:-$here/.venv}
case $venv in /* | none) ;; *) venv=$PWD/$venv ;; esac
if [ "$venv" = none ]; then
    for built in "$native"/*.so; do
        [ ! -e "$built" ] || export PYTHONPATH="$here${PYTHONPATH:+:$PYTHONPATH}"
    done
    "$python" -c 'import importlib.util as u, uffd_selftests.abi.native; u.find_spec("pytest").name' 2>/dev/null ||
        die "$python lacks uffd-selftests, cffi or pytest: do without UFFD_VENV=none"
    exec "$python" -m "$module" "$@"
fi
stamp=$venv/uffd-selftests.stamp
fresh || { flock 9 2>/dev/null || true; fresh || setup; } 9<"$here/pyproject.toml"
# Modules in the current folder or in PYTHONPATH are not meant: neither here (-I) nor in the workers.
unset PYTHONPATH
exec "$venv/bin/python" -I -m "$module" "$@"
