#!/bin/sh
# The CPU kernels for aarch64 (Kunpeng) on another machine: compiles all of csrc/ for it, then runs selftest.cpp, built
# for plain NEON and for NEON with byte dot products, under an emulator. Needs Debian's g++-aarch64-linux-gnu, qemu-user.
set -eu
cd "$(dirname "$0")/../.."
CXX=${CXX:-aarch64-linux-gnu-g++}
QEMU=${QEMU:-qemu-aarch64}
for tool in "$CXX" "$QEMU"; do
  command -v "$tool" > /dev/null || {
    echo "check_aarch64: no $tool here (apt-get install g++-aarch64-linux-gnu qemu-user)" >&2
    exit 2
  }
done
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags="-std=c++17 -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi"
[ "${LIBRARY:-yes}" = no ] || "$CXX" $flags -O1 -fPIC -shared csrc/*.cpp -o "$out/_kernels.so"
"$CXX" $flags -O3 -static -DVECTOR_BYTES=16 tests/kernels/selftest.cpp -o "$out/neon"
"$CXX" $flags -O3 -static -DVECTOR_BYTES=16 -DUPWELL_BYTE_DOTS=1 -march=armv8.2-a+dotprod tests/kernels/selftest.cpp -o "$out/dotprod"
for kind in neon dotprod; do
  # A fused multiply-add by vectors must be there, or the compiler has fallen back to scalars.
  "${CXX%g++}objdump" -d "$out/$kind" | grep -Eq 'fmla[[:space:]]+v[0-9]+\.4s' || {
    echo "check_aarch64: $kind has no NEON multiply-adds" >&2
    exit 1
  }
  "$QEMU" -cpu max "$out/$kind"
done
"${CXX%g++}objdump" -d "$out/dotprod" | grep -Eq 'sdot[[:space:]]+v[0-9]+\.4s' || {
  echo "check_aarch64: no byte dot products" >&2
  exit 1
}
