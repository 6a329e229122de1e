#!/bin/sh
# Builds, checks and times the model of this folder with the TensorRT of this machine.
#
#   sh verify.sh [--trtexec PATH] [--gpu NAME]
#
# --trtexec PATH  the trtexec to use; by default that of the PATH, or of the usual places
# --gpu NAME      the check fails unless the name of the GPU contains NAME
#
# Needs sh and trtexec. With python3 (3.8 or later) and numpy it checks more, and it says what it could not check.
# Writes result.json, and the files of trtexec to results/.
# Exit codes: 0 no check failed, 1 a check failed, 2 it could not run.

set -u
LC_ALL=C
export LC_ALL

tab=$(printf '\t')
results=results
checks=$results/checks.tsv
version=unknown
gpu=unknown
capability=unknown
python_version=none
numpy_version=none
trtexec=
wanted_gpu=
no_figures='{}'

# --- recording ---------------------------------------------------------------------------------------------------

# One line of text without control characters.
clean() {
  printf '%s' "$1" | tr '\t\n\r' '   ' | tr -d '\000-\037\177'
}

# record STATUS NAME TEXT [FIGURES]: a check, whose figures are a JSON object.
record() {
  printf '%s\t%s\t%s\t%s\n' "$1" "$(clean "$2")" "$(clean "$3")" "${4:-$no_figures}" >>"$checks"
}

quote_json() {
  printf '"%s"' "$(clean "$1" | sed 's/\\/\\\\/g; s/"/\\"/g')"
}

count_checks() {
  awk -F "$tab" -v status="$1" '$1 == status { count++ } END { print count + 0 }' "$checks"
}

# write_result VERDICT
write_result() {
  {
    printf '{\n "format": "qdq result 2",\n "verdict": "%s",\n' "$1"
    printf ' "passed": %s,\n "failed": %s,\n "not_checked": %s,\n' \
      "$(count_checks passed)" "$(count_checks failed)" "$(count_checks 'not checked')"
    printf ' "expected_sha256": %s,\n' "$(quote_json "$expected_digest")"
    printf ' "model_sha256": %s,\n' "$(quote_json "$model_digest")"
    printf ' "environment": {\n'
    printf '  "tensorrt": %s,\n' "$(quote_json "$version")"
    printf '  "gpu": %s,\n' "$(quote_json "$gpu")"
    printf '  "compute_capability": %s,\n' "$(quote_json "$capability")"
    printf '  "system": %s,\n' "$(quote_json "$(uname -s -r -m)")"
    printf '  "python": %s,\n' "$(quote_json "$python_version")"
    printf '  "numpy": %s\n },\n' "$(quote_json "$numpy_version")"
    printf ' "checks": ['
    separator=
    while IFS="$tab" read -r status name text figures; do
      printf '%s\n  {"name": %s, "status": "%s", "text": %s, "figures": %s}' \
        "$separator" "$(quote_json "$name")" "$status" "$(quote_json "$text")" "$figures"
      separator=,
    done <"$checks"
    printf '\n ]\n}\n'
  } >result.json.partial && mv result.json.partial result.json
}

print_table() {
  awk -F "$tab" '{ printf "%-12s %-26s %s\n", $1, $2, $3 }' "$checks"
}

# finish VERDICT CODE
finish() {
  write_result "$1"
  print_table
  printf '%s: %s passed, %s failed, %s not checked; see result.json\n' "$1" \
    "$(count_checks passed)" "$(count_checks failed)" "$(count_checks 'not checked')"
  exit "$2"
}

# give_up TEXT: what keeps this script from running; result.json says so, too.
give_up() {
  echo "verify.sh: $1" >&2
  record "not checked" everything "$1"
  finish "could not run" 2
}

# --- the environment ---------------------------------------------------------------------------------------------

usage() {
  echo "verify.sh: $1" >&2
  echo "usage: sh verify.sh [--trtexec PATH] [--gpu NAME]" >&2
  exit 2
}

read_arguments() {
  while [ $# -gt 0 ]; do
    case "$1" in
      --trtexec) [ $# -ge 2 ] || usage "--trtexec needs a path"; trtexec=$2; shift ;;
      --trtexec=*) trtexec=${1#*=} ;;
      --gpu) [ $# -ge 2 ] || usage "--gpu needs a name"; wanted_gpu=$2; shift ;;
      --gpu=*) wanted_gpu=${1#*=} ;;
      *) usage "unknown argument: $1" ;;
    esac
    shift
  done
  case "$trtexec" in
    '' | /*) ;;
    */*) trtexec=$PWD/$trtexec ;;  # given relative to the folder of the caller
  esac
}

find_trtexec() {
  if [ -n "$trtexec" ]; then
    command -v "$trtexec" >/dev/null 2>&1 || give_up "there is no program $trtexec; correct --trtexec."
    return
  fi
  for candidate in trtexec /usr/src/tensorrt/bin/trtexec /usr/local/tensorrt/bin/trtexec /opt/tensorrt/bin/trtexec; do
    if command -v "$candidate" >/dev/null 2>&1; then
      trtexec=$candidate
      return
    fi
  done
  give_up "trtexec was not found; give --trtexec PATH (it comes with TensorRT, on Jetson in /usr/src/tensorrt/bin)."
}

# Sets version, as in 10.3.0, and release, one of those of commands.sh. Every trtexec prints its version in its first
# line, [TensorRT v100300], even if it refuses --version.
find_version() {
  "$trtexec" --version >"$results/version.log" 2>&1
  number=$(sed -n 's/.*\[TensorRT v\([0-9]\{4,6\}\)\].*/\1/p' "$results/version.log" | head -n 1)
  if [ -n "$number" ]; then
    if [ "$number" -lt 10000 ]; then # 8601 is 8.6.1
      number=$((number / 1000 * 10000 + number / 100 % 10 * 100 + number % 100))
    fi
  else
    dotted=$(sed -n 's/.*[Vv]ersion[: v]*\([0-9][0-9]*\.[0-9][0-9]*\.[0-9][0-9]*\).*/\1/p' "$results/version.log" |
      head -n 1)
    [ -n "$dotted" ] || give_up "$trtexec does not print a version of TensorRT: $(head -n 1 "$results/version.log")"
    number=$(echo "$dotted" | awk -F . '{ print 10000 * $1 + 100 * $2 + $3 }')
  fi
  version=$((number / 10000)).$((number / 100 % 100)).$((number % 100))
  release=
  for entry in $releases; do
    if [ "$number" -ge "${entry%%:*}" ]; then release=${entry#*:}; fi
  done
  [ -n "$release" ] || give_up "TensorRT $version is older than 8.6, the oldest that this bundle has commands for."
  reason=$(refuse "$release")
  [ -z "$reason" ] || give_up "$reason"
}

# Ends where the GPU does not have the types of the file; commands.sh sets least_sm, 0 if every GPU has them. trtexec
# describes the GPU before it notices that there is no such engine.
require_gpu() {
  [ "$least_sm" -gt 0 ] || return
  "$trtexec" --loadEngine="$results/none.plan" >"$results/gpu.log" 2>&1
  sm=$(sed -n 's/.*Compute Capability: *\([0-9]*\)\.\([0-9]*\).*/\1\2/p' "$results/gpu.log" | head -n 1)
  [ -n "$sm" ] || return
  [ "$sm" -ge "$least_sm" ] ||
    give_up "$engine needs a GPU of SM $least_sm or higher, and this one has SM $sm; make the bundle of an int8 file."
}

find_python() {
  for python in python3 python; do
    versions=$("$python" -c '
import platform, sys, numpy
print(platform.python_version(), numpy.__version__)
sys.exit(sys.version_info < (3, 8))' 2>/dev/null) || continue
    python_version=${versions% *}
    numpy_version=${versions#* }
    return
  done
  python=
}

# --- checks that need no python ----------------------------------------------------------------------------------

# Prints the digests of files as sha256sum does; with -c it compares those of a list.
sum_files() {
  if command -v sha256sum >/dev/null 2>&1; then
    sha256sum "$@"
  else
    shasum -a 256 "$@"
  fi
}

check_files() {
  if ! expected_digest=$(sum_files expected.json 2>/dev/null); then
    expected_digest=
    record "not checked" files "neither sha256sum nor shasum is here"
    return
  fi
  expected_digest=${expected_digest%% *}
  sed -n 's/^  "\(.*\)": "\([0-9a-f]\{64\}\)",\{0,1\}$/\2  \1/p' expected.json >"$results/digests"
  total=$(wc -l <"$results/digests" | tr -d ' ')
  if [ "$total" = 0 ]; then
    record failed files "expected.json lists no files: it is damaged; copy the bundle again"
    return
  fi
  sum_files -c "$results/digests" >"$results/digests.log" 2>/dev/null
  good=$(grep -c ': OK$' "$results/digests.log")
  wrong=
  for name in $(sed -n 's/: FAILED.*//p' "$results/digests.log"); do # no name has a space
    if [ -f "$name" ]; then wrong="$wrong $name (changed)"; else wrong="$wrong $name (missing)"; fi
  done
  if [ "$good" != "$total" ]; then
    record failed files "not as they were bundled:$wrong; copy the bundle again"
  else
    record passed files "all $total files are as they were bundled"
  fi
}

# build NAME: builds an engine and writes its log, layers, profile and times to results/.
build() {
  echo "building and timing the $1 engine ..." >&2
  run_step "$release" "$1" >"$results/$1.log" 2>&1
  code=$?
  if [ $code -ne 0 ]; then
    record failed "build $1" "trtexec ended with code $code: $(find_error "$results/$1.log"); see $results/$1.log"
    return 1
  fi
  if [ ! -s "$results/$1.plan" ]; then
    record failed "build $1" "trtexec reports success, but wrote no engine; see $results/$1.log"
    return 1
  fi
  record passed "build $1" "TensorRT $version"
}

# The first error in a log of trtexec, or its last line.
find_error() {
  error=$(sed -n 's/.*\[E\] *//p' "$1" | head -n 1)
  printf '%s' "${error:-$(tail -n 1 "$1")}" | cut -c 1-300
}

check_gpu() {
  gpu=$(sed -n 's/.*Selected Device: *//p' "$results/$engine.log" | head -n 1)
  gpu=${gpu:-unknown}
  capability=$(sed -n 's/.*Compute Capability: *//p' "$results/$engine.log" | head -n 1)
  capability=${capability:-unknown}
  [ -n "$wanted_gpu" ] || return
  if [ "$gpu" = unknown ]; then
    record "not checked" gpu "trtexec prints no name of the GPU"
  elif printf '%s' "$gpu" | grep -qiF -- "$wanted_gpu"; then
    record passed gpu "$gpu"
  else
    record failed gpu "this GPU is $gpu, and --gpu asks for $wanted_gpu"
  fi
}

# run_pairs: the outputs of every pair, as JSON.
run_pairs() {
  pair=0
  while [ $pair -lt "$pairs" ]; do
    if ! run_step "$release" "outputs.$pair" >"$results/outputs.$pair.log" 2>&1; then
      record failed "run pair $pair" "$(find_error "$results/outputs.$pair.log"); see $results/outputs.$pair.log"
    fi
    pair=$((pair + 1))
  done
}

# From 11.1 on trtexec itself compares each output with its references.
check_references() {
  case " $comparing " in
    *" $release "*) ;;
    *)
      [ -n "$python" ] ||
        record "not checked" references "the trtexec of TensorRT $version cannot compare outputs; that of 11.1 can"
      return
      ;;
  esac
  position=0
  while [ $position -lt "$outputs" ]; do
    check_output $position
    position=$((position + 1))
  done
}

# check_output POSITION: one output against the references of all pairs, a group of pairs of equal shape at a time.
check_output() {
  name=$(name_output "$1")
  if ! has_step "$release" "references.$1.0"; then
    record "not checked" "references $name" "trtexec cannot compare $(type_output "$1")"
    return
  fi
  group=0
  while has_step "$release" "references.$1.$group"; do
    log=$results/references.$1.$group.log
    if run_step "$release" "references.$1.$group" >"$log" 2>&1; then code=0; else code=1; fi
    losses=$(sed -n 's/.*Accuracy loss for tensor .*(l2): *\([-+0-9.a-zA-Z]*\).*/\1/p' "$log")
    if printf '%s' "$losses" | grep -qi nan; then # for trtexec NaN is below every limit
      record failed "references $name" "trtexec finds a mean squared difference of NaN; see $log"
      return
    fi
    worst=$(echo "$losses" | sort -n | tail -n 1)
    if [ -z "$worst" ]; then
      record failed "references $name" "trtexec compared nothing: $(find_error "$log"); see $log"
      return
    fi
    if [ $code -ne 0 ]; then
      record failed "references $name" "trtexec finds a mean squared difference of $worst, beyond the tie floor; see $log"
      return
    fi
    group=$((group + 1))
  done
  record passed "references $name" "within the tie floor on $pairs pairs, by trtexec"
}

# find_median FILE: of the times that --exportTimes wrote, in milliseconds.
find_median() {
  [ -f "$1" ] || return
  tr ',{}' '[\n*]' <"$1" |
    sed -n 's/.*"computeMs"[ :]*\([0-9][0-9.e+-]*\).*/\1/p' | sort -n |
    awk '{ times[NR] = $1 } END { if (NR) printf "%.6g", (times[int((NR + 1) / 2)] + times[int(NR / 2) + 1]) / 2 }'
}

check_time() {
  quantized_ms=$(find_median "$results/$engine.times.json")
  if [ -z "$quantized_ms" ]; then
    record failed time "trtexec wrote no times of the $engine engine; see $results/$engine.log"
    return
  fi
  if ! has_step "$release" float; then
    record "not checked" time \
      "$engine takes $quantized_ms ms; the bundle has no float network to compare with (--with-float)" \
      "{\"int8_ms\": $quantized_ms}"
    return
  fi
  float_ms=$(find_median "$results/float.times.json")
  if [ -z "$float_ms" ]; then
    record "not checked" time "$engine takes $quantized_ms ms; there is no time of the float engine" \
      "{\"int8_ms\": $quantized_ms}"
    return
  fi
  speedup=$(awk -v quantized="$quantized_ms" -v float="$float_ms" 'BEGIN { printf "%.4g", float / quantized }')
  figures="{\"int8_ms\": $quantized_ms, \"float_ms\": $float_ms, \"speedup\": $speedup}"
  text="$engine takes $quantized_ms ms, the float engine $float_ms ms: $speedup times as fast"
  if awk -v quantized="$quantized_ms" -v float="$float_ms" 'BEGIN { exit !(quantized < float) }'; then
    record passed time "$text" "$figures"
  else
    costs=$(cat "$results/costs.txt" 2>/dev/null)
    record failed time \
      "$engine is not faster: $text; ${costs:-the layers were not read: there is no python with numpy}" "$figures"
  fi
}

# --- checks in python --------------------------------------------------------------------------------------------

run_verify_py() {
  if [ -z "$python" ]; then
    for name in numbers census profile; do
      record "not checked" $name "needs python3 (3.8 or later) with numpy, and there is none"
    done
    return
  fi
  if ! "$python" verify.py "$engine" >"$results/verify.tsv" 2>"$results/verify.log"; then
    record failed verify.py "it stopped: $(tail -n 1 "$results/verify.log"); see $results/verify.log"
  fi
  cat "$results/verify.tsv" >>"$checks"
}

# -----------------------------------------------------------------------------------------------------------------

read_arguments "$@"
CDPATH= cd -- "$(dirname -- "$0")" || exit 2
if [ ! -f expected.json ]; then
  echo "verify.sh: the folder $PWD has no expected.json; copy the bundle again." >&2
  exit 2
fi
rm -rf "$results" result.json # nothing of an earlier run may be taken for this one
if ! mkdir "$results" || ! : >"$checks"; then
  echo "verify.sh: this folder cannot be written to; copy the bundle to one that can." >&2
  exit 2
fi
expected_digest=
model_digest=
[ -f commands.sh ] || give_up "the bundle has no commands.sh; copy it again."
model_digest=$(sed -n 's/^ "model_sha256": "\(.*\)",$/\1/p' expected.json)
# shellcheck source=/dev/null
. ./commands.sh

check_files
find_trtexec
find_version
require_gpu
find_python
if build "$engine"; then
  check_gpu
  if has_step "$release" float; then build float; fi
  run_pairs
  check_references
  run_verify_py
  check_time
else
  names="references numbers census profile time"
  if [ -n "$wanted_gpu" ]; then names="gpu $names"; fi
  for name in $names; do
    record "not checked" $name "there is no $engine engine"
  done
fi
if [ "$(count_checks failed)" -gt 0 ]; then finish failed 1; fi
finish passed 0
