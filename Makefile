# FlowSAGE. `make run` and `make test` set up everything that they need on a bare Debian machine; run them as root
# (XDP, network namespaces). `make help` lists the rest.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-print-directory

VENV := .venv
PYTHON := $(VENV)/bin/python
STAMPS := build/stamps
SUDO := $(shell [ "$$(id -u)" = 0 ] || echo sudo)

# What the machine needs: building the objects (clang, libbpf-dev), loading them (libbpf1, bpftool), BCC for the
# run-time backend and the benchmark, the lab's scan (nmap), replay, checks and a Kafka broker in the tests (tcpreplay,
# tshark, promtool; Java).
APT := python3-venv clang clang-format llvm make iproute2 ethtool procps libbpf1 libbpf-dev linux-libc-dev bpftool \
       python3-bpfcc linux-headers-amd64 nmap tcpreplay tshark prometheus default-jre-headless openssl systemd
# Where no Kafka lies beside the checkout, Maven fetches it for the tests.
ifeq ($(KAFKA_HOME)$(wildcard $(or $(FLOWSAGE_SHARED),../shared)/kafka/lib/kafka_2.13-*.jar),)
APT += maven
endif
# A CPU build of torch where pip offers one: PyTorch's own index first, then what the configured index has.
TORCH := torch==2.13.0
TORCH_INDEX := https://download.pytorch.org/whl/cpu

ROOMS := bpf collector graph models pipelines
SOURCES := $(foreach r,$(ROOMS),$(wildcard $(r)/*.py $(r)/*/*.py))
KERNELS := $(wildcard graph/*.py models/*.py)
OBJECTS := bpf/flow.bpf.o bpf/counter.bpf.o
# Who removes the virtual environment gets it again.
$(shell [ -x $(PYTHON) ] || rm -f $(STAMPS)/venv $(STAMPS)/packages $(STAMPS)/warm)
# The editable install links files one by one, so it is repeated when a file comes or goes, not when one changes.
$(shell mkdir -p $(STAMPS); printf '%s\n' $(SOURCES) | cmp -s - $(STAMPS)/modules || printf '%s\n' $(SOURCES) > $(STAMPS)/modules)

.PHONY: help
help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

.PHONY: setup
setup: $(STAMPS)/warm $(OBJECTS)  ## install what the machine lacks, build the objects; leaves .venv/bin/flowsage

$(STAMPS)/apt: Makefile
	@missing=""; for p in $(APT); do \
	  dpkg-query -W -f='$${Status}' $$p 2>/dev/null | grep -q 'ok installed' || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then \
	  command -v apt-get >/dev/null || { echo "FlowSAGE's set-up needs apt-get (Debian, Ubuntu); install these yourself:$$missing" >&2; exit 1; }; \
	  echo "setup: installing Debian packages:$$missing"; \
	  $(SUDO) apt-get update -qq; \
	  $(SUDO) env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing > build/apt.log 2>&1 || { tail -20 build/apt.log >&2; exit 1; }; \
	fi; touch $@

$(STAMPS)/venv: $(STAMPS)/apt
	@[ -x $(PYTHON) ] || { echo "setup: creating $(VENV)"; /usr/bin/python3 -m venv --system-site-packages $(VENV); }; touch $@

# The objects come first: the editable install links them too.
$(STAMPS)/packages: $(STAMPS)/venv pyproject.toml $(STAMPS)/modules | $(OBJECTS)
	@export PIP_DISABLE_PIP_VERSION_CHECK=1; \
	$(PYTHON) -c 'import torch' 2>/dev/null || { echo "setup: installing $(TORCH) (CPU)"; \
	  $(PYTHON) -m pip install -q --retries 0 --timeout 10 --index-url $(TORCH_INDEX) $(TORCH) > build/torch.log 2>&1 || \
	  $(PYTHON) -m pip install -q $(TORCH); }; \
	echo "setup: installing FlowSAGE and its Python packages"; \
	$(PYTHON) -m pip install -q -e '.[test]' 2>&1 | { grep -v '^WARNING' || true; }; touch $@

$(STAMPS)/warm: $(STAMPS)/packages $(KERNELS)
	@echo "setup: compiling the numeric kernels"; $(PYTHON) -m flowsage.models.warm; touch $@

.PHONY: bpf
bpf: $(OBJECTS)  ## build the kernel objects

$(OBJECTS): %.bpf.o: %.bpf.c $(wildcard bpf/*.h) $(STAMPS)/apt
	@echo "setup: building $@"; $(MAKE) -C bpf $(notdir $@)

.PHONY: run
run: setup  ## the lab with a scan in it, or IFACE=eth0 to watch that interface
ifdef IFACE
	@$(SUDO) $(VENV)/bin/flowsage run --interface $(IFACE) $(ARGS)
else
	@$(SUDO) $(VENV)/bin/flowsage run --lab $(ARGS)
endif

.PHONY: test
test: setup  ## the whole test suite (real XDP, real namespaces: root)
	@$(SUDO) $(PYTHON) -m pytest -q $(ARGS)

.PHONY: lint
lint: setup  ## ruff, mypy --strict, clang-format
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy
	@clang-format --dry-run --Werror bpf/*.c bpf/*.h

.PHONY: bench
bench: setup  ## the table of measured numbers, and build/bench.json
	@$(SUDO) $(PYTHON) -m tests.bench $(ARGS)

.PHONY: evaluate
evaluate: setup  ## every table of detection; DATA=FOLDER of the labelled flow files, ARGS="rank benign" for parts
	@$(PYTHON) -m tests.evaluate $(or $(DATA),../shared/data) $(ARGS)

.PHONY: clean
clean:  ## remove what set-up and builds left in this folder
	@rm -rf $(VENV) build *.egg-info $(OBJECTS); find . -name __pycache__ -prune -exec rm -rf {} +
