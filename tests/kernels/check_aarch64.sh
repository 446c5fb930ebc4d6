#!/bin/sh
# The CPU kernels for aarch64 (Kunpeng) on another machine: compiles all of csrc/ for it, then runs selftest.cpp, built
# for plain NEON, with byte dot products, and with dot products of BF16 too, under an emulator. Needs Debian's g++-aarch64-linux-gnu, qemu-user.
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
flags="-std=c++17 -fwrapv -ffp-contract=fast -fno-math-errno -fno-trapping-math -Wno-psabi"
[ "${LIBRARY:-yes}" = no ] || "$CXX" $flags -O1 -fPIC -shared csrc/*.cpp -o "$out/_kernels.so"
"$CXX" $flags -O3 -static -DVECTOR_BYTES=16 tests/kernels/selftest.cpp -o "$out/neon"
flags="$flags -DUPWELL_BYTE_DOTS=1"
"$CXX" $flags -O3 -static -DVECTOR_BYTES=16 -march=armv8.2-a+dotprod tests/kernels/selftest.cpp -o "$out/dotprod"
"$CXX" $flags -O3 -static -DVECTOR_BYTES=16 -DUPWELL_BF16_DOTS=1 -march=armv8.2-a+dotprod+bf16 tests/kernels/selftest.cpp -o "$out/bf16"
has() {  # has KIND INSTRUCTION WHAT: or the compiler has fallen back to something slower
  "${CXX%g++}objdump" -d "$out/$1" | grep -Eq "$2[[:space:]]+v[0-9]+\.4s" || {
    echo "check_aarch64: $1 has no $3" >&2
    exit 1
  }
}
for kind in neon dotprod bf16; do
  has "$kind" fmla "NEON multiply-adds"
  "$QEMU" -cpu max "$out/$kind"
done
has dotprod sdot "byte dot products"
has bf16 bfdot "dot products of BF16"
