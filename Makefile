# Each target sets up what it needs in .venv, from a clone with nothing but Python 3.11.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
SERVE ?=

.PHONY: help setup serve test lint chromium bench aarch64-check npu-contract npu-contract-older npu-triton clean

help: ## show the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

$(VENV)/.ready: pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.ready-dev: $(VENV)/.ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

setup: $(VENV)/.ready-dev ## install everything, tools for development included

serve: $(VENV)/.ready ## serve the embedded model on 127.0.0.1:8000 (SERVE="--model PATH" for another)
	$(BIN)/upwell serve $(SERVE)

lint: $(VENV)/.ready-dev ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/mypy

# The web page's tests drive it. Not being able to install it is said by those tests, in CI as a failure.
chromium:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || { \
	test "$$(id -u)" = 0 && command -v apt-get >/dev/null && export DEBIAN_FRONTEND=noninteractive && apt-get update -qq && \
	timeout 300 apt-get install -y -qq --no-install-recommends chromium chromium-driver >/dev/null; } || \
	echo "chromium isn't here and can't be installed: the web page's tests won't run"

test: lint chromium npu-contract npu-triton ## lint, types and all tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -q

bench: $(VENV)/.ready-dev ## speed against transformers on the same weights
	$(BIN)/python benchmarks/vs_transformers.py

aarch64-check: ## compile the kernels for aarch64 and test them under qemu (g++-aarch64-linux-gnu, qemu-user)
	tests/kernels/check_aarch64.sh

# torch_npu in a venv of its own, beside the development venv's torch: once installed, `import torch` loads it.
NPU_VENV := .venv-npu
NPU_RUN := STUB_DEVICES=1 UPWELL_KERNELS=off TORCH_DEVICE_BACKEND_AUTOLOAD=0 LD_LIBRARY_PATH=$(NPU_VENV)/stubs PYTHONPATH=. $(NPU_VENV)/bin/python -m
WHEELS := 2.10.0.post4 2.12.0 2.13.0

$(NPU_VENV)/.ready: $(VENV)/.ready-dev
	$(PYTHON) -m venv --without-pip $(NPU_VENV)
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
	  > $$($(NPU_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/torch.pth
	for version in $(WHEELS); do \
	  $(BIN)/python -m pip download --quiet --no-deps --dest $(NPU_VENV)/wheels torch_npu==$$version || exit 1; done
	$(BIN)/python -m pip --python $(NPU_VENV)/bin/python install --quiet --no-deps --no-index \
	  --find-links $(NPU_VENV)/wheels \
	  torch_npu==$$($(BIN)/python -c "import torch; print(torch.__version__.split('+')[0])")
	PYTHONPATH=. $(NPU_VENV)/bin/python -m contract.stubs $(NPU_VENV)/stubs
	@touch $@

npu-contract: $(NPU_VENV)/.ready ## hold the Ascend path against the real torch_npu wheels, without a card (docs/ascend.md)
	$(NPU_RUN) contract.facts upwell/devices/npu_operators.json
	$(NPU_RUN) contract.wheel upwell/devices/npu_operators.json $(NPU_VENV)/wheels/*.whl
	$(NPU_RUN) contract.check

# The torches that Ascend documents a CANN for. PyPI's for x86 are CUDA's (1.4 GB): no package of CUDA comes with them,
# its libraries are stubs as well.
OLDER := 2.10.0:2.10.0.post4 2.12.0:2.12.0

npu-contract-older: $(NPU_VENV)/.ready ## the same traces over torch 2.10.0 and 2.12.0 (downloads 1.4 GB)
	for pair in $(OLDER); do \
	  older=$(NPU_VENV)-$${pair%%:*}; \
	  test -e $$older/.ready || { $(PYTHON) -m venv --without-pip $$older && \
	  cp $(NPU_VENV)/lib/python3*/site-packages/torch.pth $$older/lib/python3*/site-packages/ && \
	  $(BIN)/python -m pip --python $$older/bin/python install --quiet --no-deps torch==$${pair%%:*} && \
	  $(BIN)/python -m pip --python $$older/bin/python install --quiet --no-deps --no-index \
	    --find-links $(NPU_VENV)/wheels torch_npu==$${pair##*:} && \
	  PYTHONPATH=. $$older/bin/python -m contract.stubs $$older/stubs && touch $$older/.ready; } || exit 1; \
	  $(subst $(NPU_VENV),$$older,$(NPU_RUN)) contract.check || exit 1; done

# triton-ascend and its compiler, beside the development venv's torch. triton-ascend wants pybind11 and an old numpy.
TRITON_VENV := .venv-triton
TRITON_RUN := UPWELL_KERNELS=off OMP_NUM_THREADS=1 PYTHONPATH=. $(TRITON_VENV)/bin/python -m

$(TRITON_VENV)/.ready: $(VENV)/.ready-dev
	$(PYTHON) -m venv --without-pip $(TRITON_VENV)
	$(BIN)/python -m pip --python $(TRITON_VENV)/bin/python install --quiet --disable-pip-version-check \
	  triton-ascend==3.2.0 ascendnpu-ir==1.2.0 pybind11 'numpy<2'
	$(BIN)/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])" \
	  > $$($(TRITON_VENV)/bin/python -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/torch.pth
	@touch $@

npu-triton: $(TRITON_VENV)/.ready ## the Triton kernels: under the interpreter, and lowered for three chips (docs/ascend.md)
	$(TRITON_RUN) contract.triton_numbers
	$(TRITON_RUN) contract.triton_lower

clean: ## remove what was built
	rm -rf $(VENV) $(NPU_VENV) $(NPU_VENV)-* $(TRITON_VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache
