#!/usr/bin/env bash
# What the system must bring: Python 3.11, Java 17 or 21, a C++ compiler (only where the Horovod wheel
# is not cached yet).
#
#   scripts/system.sh [--no-compiler]
#
# Prints three shell assignments (PYTHON=, JAVA=, CXX=) on standard output, words on standard error.
# What is missing is installed when that is possible (root, apt-get) and not forbidden (SYSTEM=no);
# else it stops with the exact command for this system. RECSPARK_PYTHON names a Python to use;
# JAVA_HOME and CXX are obeyed.
set -euo pipefail

say() { printf '%s\n' "$*" >&2; }

compiler=yes
[[ ${1:-} == --no-compiler ]] && compiler=no

# ----------------------------------------------------------------------------------------- what is there
# Each find_* sets `found` (empty: missing) and `why` (what was seen instead).

find_python() {
  found='' why=''
  local path missing
  # Every python3.11 on PATH, not only the first: a shim may be there that starts nothing.
  for path in $(type -aP ${RECSPARK_PYTHON:-python3.11 python3} || true); do
    [[ $("$path" -c 'import sys; print(*sys.version_info[:2])' 2>/dev/null) == '3 11' ]] || continue
    missing=$("$path" - <<'PY'
import importlib.util, os, sysconfig
missing = [name for name in ("venv", "ensurepip") if importlib.util.find_spec(name) is None]
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    missing.append("Python.h")
print(*missing, sep=", ")
PY
)
    [[ $compiler == no && $missing == Python.h ]] && missing=''
    if [[ -z $missing ]]; then
      # Past any shim and any virtual environment (make puts .venv/bin first on PATH).
      found=$("$path" -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))')
      return
    fi
    [[ -n $why ]] || why="$path is there, but lacks: $missing"
  done
  [[ -n $why ]] || why="no ${RECSPARK_PYTHON:-python3.11} that is Python 3.11 on PATH"
}

java_major() { # of the program $1; empty when it does not run
  local text
  text=$("$1" -version 2>&1) || return 0
  if [[ $text =~ version\ \"([0-9]+) ]]; then printf '%s' "${BASH_REMATCH[1]}"; fi
}

find_java() {
  found='' why=''
  local candidate major
  local candidates=()
  [[ -n ${JAVA_HOME:-} ]] && candidates+=("$JAVA_HOME/bin/java")
  candidate=$(type -P java) && candidates+=("$candidate")
  # Another version may be first on PATH while a good one is installed beside it.
  if [[ ${RECSPARK_JAVA_DIRS-unset} == unset ]]; then
    RECSPARK_JAVA_DIRS='/usr/lib/jvm/* /opt/homebrew/opt/openjdk@17 /opt/homebrew/opt/openjdk@21'
  fi
  for candidate in $RECSPARK_JAVA_DIRS; do
    candidates+=("$candidate/bin/java")
  done
  for candidate in ${candidates[@]+"${candidates[@]}"}; do
    [[ -x $candidate ]] || continue
    major=$(java_major "$candidate")
    if [[ $major == 17 || $major == 21 ]]; then
      found=$candidate
      return
    fi
    [[ -n $why ]] || why="$candidate is Java ${major:-that does not run}; Spark 4.0 runs on 17 and 21 only"
  done
  [[ -n $why ]] || why="no java on PATH, JAVA_HOME not set"
}

find_cxx() {
  found='' why=''
  local candidate path
  for candidate in ${CXX:-} c++ g++ clang++; do
    path=$(command -v "$candidate" 2>/dev/null) || continue
    found=$path
    return
  done
  why="no c++, g++ or clang++ on PATH"
}

# ---------------------------------------------------------------------------------- what to do about it
release() { # a field of os-release
  (. "${RECSPARK_OS_RELEASE:-/etc/os-release}" 2>/dev/null && printf '%s' "${!1:-}")
}

package_manager() {
  local name
  for name in apt-get dnf apk brew; do
    command -v "$name" >/dev/null 2>&1 && { printf '%s' "$name"; return 0; }
  done
  return 0
}

packages() { # the packages for the needs "$@" with the manager $manager; nothing when it has none
  local need
  for need in "$@"; do
    case $manager:$need in
      apt-get:java)
        # Debian 13 and later have 21 only; every older Debian and Ubuntu in use has 17.
        if [[ $(release ID) == debian && $(release VERSION_ID) =~ ^[0-9]+$ && $(release VERSION_ID) -ge 13 ]]; then
          printf 'openjdk-21-jre-headless '
        else
          printf 'openjdk-17-jre-headless '
        fi ;;
      apt-get:compiler) printf 'g++ ' ;;
      apt-get:python)
        # Only Debian 12 has Python 3.11 among its own packages.
        [[ $(release ID) == debian && $(release VERSION_ID) == 12 ]] &&
          printf 'python3.11 python3.11-venv python3.11-dev ' ;;
      dnf:java) printf 'java-21-openjdk-headless ' ;;
      dnf:compiler) printf 'gcc-c++ ' ;;
      dnf:python) printf 'python3.11 python3.11-devel ' ;;
      apk:java) printf 'openjdk17-jre-headless ' ;;
      apk:compiler) printf 'g++ ' ;;
      brew:java) printf 'openjdk@17 ' ;;
      brew:compiler) printf 'gcc ' ;;
      brew:python) printf 'python@3.11 ' ;;
    esac || true
  done
}

look() { # fills needs and reasons
  needs=() reasons=()
  find_python; PYTHON=$found
  [[ -n $found ]] || { needs+=(python); reasons+=("Python 3.11 with its venv module and headers: $why"); }
  find_java; JAVA=$found
  [[ -n $found ]] || { needs+=(java); reasons+=("Java 17 or 21: $why"); }
  CXX_FOUND=''
  if [[ $compiler == yes ]]; then
    find_cxx; CXX_FOUND=$found
    [[ -n $found ]] || { needs+=(compiler); reasons+=("a C++ compiler (to build Horovod once): $why"); }
  fi
}

look
if ((${#needs[@]})); then
  for reason in "${reasons[@]}"; do say "missing: $reason"; done
  manager=$(package_manager)
  wanted=$(packages "${needs[@]}")
  wanted=${wanted% }
  case $manager in
    apt-get) command="apt-get update && apt-get install -y --no-install-recommends $wanted" ;;
    dnf) command="dnf install -y $wanted" ;;
    apk) command="apk add $wanted" ;;
    brew) command="brew install $wanted" ;;
    *) command='' ;;
  esac
  by_hand=''
  if [[ " ${needs[*]} " == *' python '* && $wanted != *python* ]]; then
    by_hand="This system has no package of Python 3.11. Install it with pyenv (pyenv install 3.11) or uv (uv python install 3.11), then: make setup RECSPARK_PYTHON=/path/to/python3.11"
  fi
  if [[ -n $by_hand ]]; then
    say "$by_hand"
    [[ -z $wanted ]] && exit 3
  fi
  if [[ -z $command ]]; then
    say "No apt-get, dnf, apk or brew here: install the above by hand, then run make again."
    exit 3
  fi
  if [[ $manager != apt-get || ${SYSTEM:-yes} == no || $(id -u) != 0 || -n $by_hand ]]; then
    [[ $(id -u) == 0 || $manager == brew ]] || command="sudo sh -c '$command'"
    [[ ${SYSTEM:-yes} == no ]] && say "SYSTEM=no: nothing is installed into the system."
    say "Install with:"
    say "    $command"
    exit 3
  fi
  say "installing with apt-get (SYSTEM=no forbids it): $wanted"
  export DEBIAN_FRONTEND=noninteractive
  for try in 1 2 3; do
    if apt-get -q -o Acquire::Retries=5 update >&2 &&
      apt-get -q -o Acquire::Retries=5 install -y --no-install-recommends $wanted >&2; then
      break
    fi
    if ((try == 3)); then
      say "apt-get failed three times. Try it by hand:"
      say "    $command"
      exit 3
    fi
    say "apt-get failed; again in 10 s"
    sleep 10
  done
  hash -r
  look
  if ((${#needs[@]})); then
    for reason in "${reasons[@]}"; do say "still missing after the installation: $reason"; done
    exit 3
  fi
fi

printf 'PYTHON=%q\nJAVA=%q\nCXX=%q\n' "$PYTHON" "$JAVA" "$CXX_FOUND"
