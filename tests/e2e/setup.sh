# Sourced by tests/run and tests/demo, from the top of the source: what they
# need to be installed, and how they build.

packages=(
  g++ cmake ninja-build pkg-config
  libcli11-dev libexpected-dev libfmt-dev libgmock-dev libgtest-dev libsodium-dev
  libtomlplusplus-dev libxxhash-dev
  libzstd-dev nlohmann-json3-dev
  binutils bindfs busybox-static cpio gzip libvirt-clients libvirt-daemon
  libvirt-daemon-driver-qemu libvirt-dev mandoc mount python3 python3-pytest
  qemu-system-x86 qemu-utils util-linux xfsprogs xz-utils zstd
)

step() { printf '\n== %s\n' "$*"; }

need_root() {
  if [ "$(id -u)" != 0 ]; then
    echo "$1: run it as root (sudo $1)" >&2
    exit 1
  fi
}

install_missing() {
  local package missing=()
  for package in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)" = installed ] ||
      missing+=("$package")
  done
  # The guest's kernel is fetched once, not installed; apt must know of it.
  if [ ${#missing[@]} -eq 0 ] &&
    { compgen -G 'tests/cache/kernel-*/vmlinuz' >/dev/null ||
      apt-cache show linux-image-cloud-amd64 >/dev/null 2>&1; }; then
    return
  fi
  step "Installing what is missing: ${missing[*]:-nothing, but the package lists}"
  apt-get -qq update
  [ ${#missing[@]} -eq 0 ] ||
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y install --no-install-recommends "${missing[@]}" \
      </dev/null >/dev/null
}

# build FOLDER TARGET [CMAKE ARGUMENTS]: configures and compiles; speaks only of
# failure. Of debug information only the lines: the rest takes a third of the time.
# The compiler collects its garbage less often, for 1 GiB each: a tenth of the time.
build() {
  local folder=$1 target=$2 log=$1/build.log generator=()
  shift 2
  mkdir -p "$folder"
  [ -f "$folder/CMakeCache.txt" ] || ! command -v ninja >/dev/null || generator=(-G Ninja)
  if ! cmake -S . -B "$folder" "${generator[@]}" -DCMAKE_UNITY_BUILD=ON \
    -DCMAKE_CXX_FLAGS='--param=ggc-min-expand=200 --param=ggc-min-heapsize=524288' \
    -DCMAKE_CXX_FLAGS_RELWITHDEBINFO='-O2 -g1 -DNDEBUG' "$@" >"$log" 2>&1 </dev/null ||
    ! cmake --build "$folder" --target "$target" --parallel "$(nproc)" >"$log" 2>&1 </dev/null; then
    cat "$log"
    exit 1
  fi
}
