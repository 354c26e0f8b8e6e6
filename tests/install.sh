#!/usr/bin/env bash
# Installs nanoip2p as a wheel in a fresh environment and runs its commands in an empty folder.
# usage: tests/install.sh PYTHON    PYTHON has the dependencies; its packages are used, so nothing is downloaded
set -euo pipefail
python=$(realpath --no-symlinks "$1")
root=$(realpath "$(dirname "$0")/..")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

fail() { echo "install.sh: $1" >&2; exit 1; }

# A copy, because building writes into the folder that it builds
mkdir "$work/source" "$work/empty"
(cd "$root" && cp -r pyproject.toml LICENSE README.md ./*.py nanoip2p tests "$work/source")
"$python" -m venv --without-pip "$work/venv"
dependencies=$("$python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
site=$("$work/venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
"$python" -m pip --disable-pip-version-check wheel --quiet --no-deps \
    --wheel-dir "$work" "$work/source"
"$python" -m pip --disable-pip-version-check --python "$work/venv/bin/python" install --quiet --no-deps "$work"/*.whl
# Appended to sys.path after the new environment's own packages; addsitedir would run the .pth files in it, and
# one of them may point to an editable nanoip2p
echo "$dependencies" > "$site/dependencies.pth"

cd "$work/empty"
bin=$work/venv/bin
where=$("$bin/python" -c "import nanoip2p; print(nanoip2p.__file__)")
[[ $where == "$work"/venv/* ]] || fail "nanoip2p comes from $where"
[[ ! -e $site/tests ]] || fail "the tests were installed"
for command in nanoip2p-edit nanoip2p-train nanoip2p-dataset; do
    "$bin/$command" --help > help.txt || fail "$command --help"
    grep -q "usage: $command" help.txt || fail "$command --help does not begin with its usage"
done
[[ $("$bin/nanoip2p-edit" --version) == "nanoip2p "* ]] || fail "nanoip2p-edit --version"

input=$root/weights/nano-ip2p/examples/house.png
edit=(--input "$input" --edit "make it night" --output night.png --seed 0 --device cpu --steps 2)
"$bin/nanoip2p-edit" "${edit[@]}" --weights "$root/weights/nano-ip2p" > /dev/null 2>&1 || fail "an edit with --weights"
[[ -s night.png ]] || fail "the edit wrote no picture"
rm night.png

# The nano weights are not installed: one line that says what to do, no traceback, nothing from the Hub
code=0
"$bin/nanoip2p-edit" "${edit[@]}" 2> error.txt || code=$?
[[ $code == 2 && $(wc -l < error.txt) == 1 ]] && grep -q -e "--weights" error.txt \
    || fail "without --weights: exit code $code, $(cat error.txt)"
echo "install.sh: the installed commands work"
