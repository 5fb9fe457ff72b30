#!/usr/bin/env bash
# Sets up one host, in the folder of this code: an environment with capvl, and the data's bucket.
#
# host.sh EXTRA [gs://BUCKET/FOLDER]   EXTRA is tpu or cuda; the folder is mounted read-only as ~/data

set -euo pipefail
cd "$(dirname "$0")/.."
command -v uv > /dev/null || [ -x "$HOME/.local/bin/uv" ] || curl -LsSf https://astral.sh/uv/install.sh | sh
export PATH="$HOME/.local/bin:$PATH"
[ -d .venv ] || uv venv --python 3.12 .venv
uv pip install --python .venv -q -e ".[$1]"
data="${2:-}"
if [ -n "$data" ] && ! mountpoint -q "$HOME/data"; then
  if ! command -v gcsfuse > /dev/null; then
    repository="gcsfuse-$(lsb_release -c -s)"
    curl -fsSL https://packages.cloud.google.com/apt/doc/apt-key.gpg | sudo tee /usr/share/keyrings/cloud.google.asc > /dev/null
    echo "deb [signed-by=/usr/share/keyrings/cloud.google.asc] https://packages.cloud.google.com/apt $repository main" |
      sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    sudo apt-get update -qq && sudo apt-get install -qq -y gcsfuse
  fi
  bucket="${data#gs://}"
  mkdir -p "$HOME/data"
  only=()
  [ "$bucket" = "${bucket%%/*}" ] || only=(--only-dir "${bucket#*/}")
  gcsfuse -o ro --implicit-dirs "${only[@]}" "${bucket%%/*}" "$HOME/data"
fi
