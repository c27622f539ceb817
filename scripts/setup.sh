#!/usr/bin/env bash
# Build the environments of this clone.
#
#   scripts/setup.sh            .venv (everything but Airflow)
#   scripts/setup.sh airflow    .venv-airflow
#
# Every version is pinned in constraints*.txt. What takes long is kept outside the clone, in
# RECSPARK_CACHE (default ~/.cache/recspark): uv, the Horovod wheel, the Delta jars; uv keeps its own
# cache of packages. A stamp in the environment makes a second run a matter of milliseconds, until one
# of the files it depends on changes.
#
#   RECSPARK_CACHE=DIR      another place for the cache
#   RECSPARK_PYTHON=PATH    the Python 3.11 to use
#   SYSTEM=no               install nothing into the system
set -euo pipefail

what=${1:-main}
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
CACHE=${RECSPARK_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/recspark}
# Slow mirrors are waited for; nothing but the registries is asked.
export UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-180} UV_HTTP_RETRIES=${UV_HTTP_RETRIES:-5}
export UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS=1
unset VIRTUAL_ENV PYTHONPATH PYTHONHOME

# ------------------------------------------------------------------------------------------- progress
RECSPARK_BEGUN=$(date +%s)
export RECSPARK_BEGUN # scripts/build_horovod.py counts from it too
line() { printf '[%4d s] %s\n' "$SECONDS" "$*"; }

retry() { # three times, with a pause
  local try
  for try in 1 2 3; do
    "$@" && return 0
    ((try < 3)) && { echo "failed (try $try of 3): ${*:1:3}; again in $((5 * try)) s"; sleep $((5 * try)); }
  done
  return 1
}

builder='' # the process that fetches, then builds Horovod, while the steps go on

stop() { # nothing may run on after a failure
  trap - EXIT
  [[ -z $builder ]] || kill "$builder" 2>/dev/null || true
}
trap stop EXIT

step() { # step "title" command...: runs it with its output in a log, a line every 15 s
  local title=$1 begun=$SECONDS log pid waited=0 code=0
  shift
  log="$logs/${title%%[ :]*}.log"
  line "$title ..."
  "$@" >"$log" 2>&1 &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    sleep 0.2
    waited=$((waited + 1))
    if [[ -n $builder ]] && ! kill -0 "$builder" 2>/dev/null && ! wait "$builder"; then
      builder=''
      kill "$pid" 2>/dev/null || true
      echo "Horovod could not be built: the messages are above" >&2
      exit 1
    fi
    ((waited % 75)) || line "$title: $(tail -n 1 "$log" | tr -d '\r' | cut -c 1-80)"
  done
  wait "$pid" || code=$?
  if ((code)); then
    tail -n 30 "$log" >&2
    echo "$title failed (whole output: $log)" >&2
    exit 1
  fi
  line "$title: done in $((SECONDS - begun)) s"
}

# ---------------------------------------------------------------------------------------------- stamps
fingerprint() { # of an environment: where it is and the files "$@" it depends on
  { printf '%s\n' "$ROOT" "$CACHE"; cat "$@"; } | sha256sum | cut -d ' ' -f 1
}

fresh() { # fresh VENV FILES...: nothing to do?
  local venv=$1
  shift
  [[ -x $venv/bin/python && -f $venv/.recspark/stamp ]] &&
    [[ $(<"$venv/.recspark/stamp") == "$(fingerprint "$@")" ]]
}

begin_venv() { # begin_venv VENV: an environment at $1 with the right Python, its log folder
  local venv=$1 have=''
  [[ -x $venv/bin/python ]] && have=$("$venv/bin/python" -c 'import sys; print(sys.prefix, *sys.version_info[:2])' 2>/dev/null || true)
  # A copied or moved clone has the old place in every script: start afresh.
  if [[ $have == "$ROOT/$venv 3 11" && -f $venv/.recspark/root && $(<"$venv/.recspark/root") == "$ROOT" ]]; then
    rm -f "$venv/.recspark/stamp"
  else
    "$UV" venv -q --clear --no-project -p "$PYTHON" "$venv"
  fi
  mkdir -p "$venv/.recspark/logs"
  printf '%s\n' "$ROOT" >"$venv/.recspark/root"
  logs=$ROOT/$venv/.recspark/logs
}

end_venv() { # end_venv VENV FILES...
  local venv=$1
  shift
  fingerprint "$@" >"$venv/.recspark/stamp"
}

sync_venv() { # sync_venv VENV FILE: exactly the packages of FILE
  retry "$UV" pip sync --python "$1/bin/python" --build-constraints constraints.txt "$2"
}

requirements() { # requirements CONSTRAINTS WHEEL: its packages, Horovod from the wheel (none: left out), this clone
  if [[ -n $2 ]]; then sed "s|^horovod==.*|horovod @ file://$2|" "$1"; else grep -v '^horovod==' "$1"; fi
  printf -- '-e file://%s\n' "$ROOT"
}

pin() { sed -n "s/^$1==//p" constraints.txt; }

# ------------------------------------------------------------------------------------- system and uv
begin() { # begin [--no-compiler]: looks at the system, brings uv
  local system
  system=$(bash scripts/system.sh "$@") || exit $?
  eval "$system" # PYTHON, JAVA, CXX
  export CXX
  [[ -n $CXX ]] || unset CXX
  line "Python: $PYTHON"
  line "Java: $JAVA"
  [[ -z ${CXX:-} ]] || line "C++: $CXX"
  line "cache: $CACHE"
  mkdir -p "$CACHE/logs"
  BOOTSTRAP=$CACHE/bootstrap-uv$(pin uv)-$("$PYTHON" -c 'import hashlib, sys; print(hashlib.sha256(sys.executable.encode()).hexdigest()[:8])')
  UV=$BOOTSTRAP/bin/uv
  logs=$CACHE/logs
  if [[ ! -f $BOOTSTRAP/ready ]]; then
    step "uv $(pin uv)" bring_uv
  fi
}

bring_uv() { # two clones may do this at once
  if command -v flock >/dev/null; then
    exec 9>"$CACHE/bootstrap.lock"
    flock 9
    [[ ! -f $BOOTSTRAP/ready ]] || return 0
  fi
  "$PYTHON" -m venv --clear "$BOOTSTRAP"
  # setuptools only reads the name out of Horovod's sdist when pip fetches it.
  retry "$BOOTSTRAP/bin/python" -m pip install --disable-pip-version-check --retries 5 --timeout 60 \
    "uv==$(pin uv)" "setuptools==$(pin setuptools)"
  touch "$BOOTSTRAP/ready"
}

# -------------------------------------------------------------------------------------------- Horovod
fetch_horovod() { # the sdist, with pip's own check of the hash
  local file=horovod-$(pin horovod).tar.gz
  [[ ! -f $CACHE/sdist/$file ]] || return 0
  mkdir -p "$CACHE/sdist"
  "$PYTHON" scripts/build_horovod.py --requirement >"$logs/horovod-requirement.txt"
  local scratch
  scratch=$(mktemp -d "$CACHE/sdist/.partial-XXXXXX")
  retry "$BOOTSTRAP/bin/python" -m pip download --disable-pip-version-check --retries 5 --timeout 60 \
    --no-deps --no-build-isolation --no-binary horovod --require-hashes \
    -r "$logs/horovod-requirement.txt" -d "$scratch"
  mv -f "$scratch/$file" "$CACHE/sdist/$file"
  rmdir "$scratch"
}

cached_horovod() { # the path of the wheel; nothing when it must be built
  "$1" scripts/build_horovod.py --cached "$CACHE/horovod" 2>/dev/null || true
}

check_horovod() {
  .venv/bin/python -c '
import horovod.torch as hvd, torch
hvd.init()
assert hvd.gloo_built() and hvd.size() == 1, "horovod was built without gloo"
assert float(hvd.allreduce(torch.ones(1))) == 1.0
'
}

# ------------------------------------------------------------------------------------- which Java Spark runs
note_java() { # Spark takes JAVA_HOME, else `java` on PATH. When neither is fit, tell it the one that is.
  local taken=${JAVA_HOME:+$JAVA_HOME/bin/java} conf=.venv/lib/python3.11/site-packages/pyspark/conf
  [[ -n $taken ]] || taken=$(command -v java 2>/dev/null || true)
  rm -f "$conf/spark-env.sh"
  printf '%s\n' "$JAVA" >.venv/.recspark/java
  if [[ $taken != "$JAVA" ]]; then
    mkdir -p "$conf"
    printf '# by scripts/setup.sh: the Java that is first here is not 17 or 21\nexport JAVA_HOME=%q\n' \
      "$(dirname "$(dirname "$JAVA")")" >"$conf/spark-env.sh"
    line "Spark will run on $JAVA (noted in pyspark/conf/spark-env.sh)"
  fi
}

# ----------------------------------------------------------------------------------------------- main
main() {
  local files=(constraints.txt setup.py scripts/setup.sh scripts/build_horovod.py scripts/delta_jars.py)
  if fresh .venv "${files[@]}" && [[ -x $(cat .venv/.recspark/java 2>/dev/null) ]]; then
    return 0
  fi
  echo "Setting up $ROOT/.venv (the first time some minutes: 3 GB of packages, one compilation)"
  local wheel
  if [[ -n $(cached_horovod "${RECSPARK_PYTHON:-python3.11}") ]]; then begin --no-compiler; else begin; fi
  begin_venv .venv

  wheel=$(cached_horovod "$PYTHON")
  requirements constraints.txt "$wheel" >.venv/.recspark/packages.txt
  if [[ -z $wheel ]]; then
    { fetch_horovod >"$logs/fetch.log" 2>&1 || { tail -n 20 "$logs/fetch.log" >&2; exit 1; }; } &
    builder=$!
    # The compiler needs torch and its own tools first; the other packages come while it works.
    step "torch: and build tools" retry "$UV" pip install --python .venv/bin/python \
      --build-constraints constraints.txt -c constraints.txt torch numpy setuptools packaging cffi \
      cloudpickle psutil pyyaml cmake ninja
    wait "$builder" || { echo "Horovod's sdist could not be fetched: the messages are above" >&2; exit 1; }
    line "horovod: building the wheel beside the other steps ..."
    .venv/bin/python scripts/build_horovod.py "$CACHE/sdist/horovod-$(pin horovod).tar.gz" "$CACHE/horovod" >/dev/null &
    builder=$!
  fi
  step "packages: $(grep -c == constraints.txt) as pinned" sync_venv .venv .venv/.recspark/packages.txt
  step "delta: jars into pyspark" .venv/bin/python scripts/delta_jars.py "$CACHE/jars"
  note_java
  if [[ -n $builder ]]; then
    wait "$builder" || { builder=''; exit 1; }
    builder=''
    wheel=$(cached_horovod "$PYTHON")
    line "horovod: built, kept in $(dirname "$wheel")"
    requirements constraints.txt "$wheel" >.venv/.recspark/packages.txt
    step "horovod: into .venv" sync_venv .venv .venv/.recspark/packages.txt
  fi
  step "check: horovod with torch" check_horovod
  end_venv .venv "${files[@]}"
  line "ready"
}

airflow() {
  local files=(constraints-airflow.txt setup.py scripts/setup.sh)
  fresh .venv-airflow "${files[@]}" && return 0
  echo "Setting up $ROOT/.venv-airflow"
  begin --no-compiler
  begin_venv .venv-airflow
  requirements constraints-airflow.txt '' >.venv-airflow/.recspark/packages.txt
  step "airflow: $(grep -c == constraints-airflow.txt) packages as pinned" sync_venv .venv-airflow .venv-airflow/.recspark/packages.txt
  end_venv .venv-airflow "${files[@]}"
  line "ready"
}

# One at a time in this clone: `make demo` and `make test` may be started together.
if command -v flock >/dev/null && [[ -z ${RECSPARK_LOCKED:-} ]]; then
  mkdir -p build
  RECSPARK_LOCKED=1 exec flock build/.setup.lock bash "$0" "$@"
fi
case $what in
  main) main ;;
  airflow) airflow ;;
  *) echo "usage: scripts/setup.sh [main|airflow]" >&2; exit 2 ;;
esac
