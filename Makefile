# What a person may want: 'make' lists it.

PREFIX ?= /usr/local
BINDIR = $(PREFIX)/bin
UNITDIR = $(PREFIX)/lib/systemd/system
SYSUSERSDIR = $(PREFIX)/lib/sysusers.d
TMPFILESDIR = $(PREFIX)/lib/tmpfiles.d
DOCDIR = $(PREFIX)/share/doc/blxrep
ACTIVATIONDIR = $(PREFIX)/share/dbus-1/system-services
INTERFACEDIR = $(PREFIX)/share/dbus-1/interfaces
# What install takes: release builds it first, dev takes what was built for tests.
PROFILE ?= release
BUILT = target/$(PROFILE:dev=debug)
MANDIR = $(PREFIX)/share/man/man1
BASHDIR = $(PREFIX)/share/bash-completion/completions
ZSHDIR = $(PREFIX)/share/zsh/site-functions
FISHDIR = $(PREFIX)/share/fish/vendor_completions.d
# The bus and polkit do not look below /usr/local.
ifeq ($(PREFIX),/usr/local)
DBUSDIR = /etc/dbus-1/system.d
POLKITDIR = /usr/share/polkit-1/actions
else
DBUSDIR = $(PREFIX)/share/dbus-1/system.d
POLKITDIR = $(PREFIX)/share/polkit-1/actions
endif

INSTALL = install -D
INSTALL_FILE = $(INSTALL) -m 644
# Every file that install makes.
INSTALLED = $(BINDIR)/blxrep $(BINDIR)/blxctl \
	$(UNITDIR)/blxrep-agent.service $(UNITDIR)/blxrep-dispatcher.service \
	$(SYSUSERSDIR)/blxrep.conf $(TMPFILESDIR)/blxrep.conf \
	$(ACTIVATIONDIR)/org.blxrep.Agent.service $(ACTIVATIONDIR)/org.blxrep.Dispatcher.service \
	$(addprefix $(INTERFACEDIR)/org.blxrep., Manager.xml Job.xml Disk.xml) \
	$(DBUSDIR)/org.blxrep.conf $(POLKITDIR)/org.blxrep.policy \
	$(DOCDIR)/config.example.yaml $(DOCDIR)/README.md $(DOCDIR)/LICENSE-MIT $(DOCDIR)/LICENSE-APACHE

.PHONY: help build release demo test sim soak fuzz lint bench install uninstall clean test-vm test-vm-all

help: ## This list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

build: ## Build both programs, for debugging
	@tools/install-deps build
	tools/cargo build --workspace

release: ## Build both programs, to be installed
	@tools/install-deps build
	tools/cargo build --workspace --release

demo: ## Replicate and restore a disk on this machine (sudo make demo)
	@tools/install-deps demo
	tools/cargo build --package blxrep
	tools/demo target/debug/blxrep

test: ## All tests (sudo make test)
	@[ "$$(id -u)" -eq 0 ] || { echo "the tests make loop devices, mounts and BPF programs: run 'sudo make test'" >&2; exit 1; }
	@tools/install-deps test
	tools/cargo test --workspace --no-run
	tools/with-bpffs tools/cargo --as-root test --workspace --no-fail-fast

test-vm: ## Agent and dispatcher in virtual machines, on two kernels (sudo make test-vm)
	$(call test-vm,kernel_6_1 --exact)

test-vm-all: ## The same on every pair of kernels (sudo make test-vm-all)
	$(call test-vm,--test-threads 1)

define test-vm
	@[ "$$(id -u)" -eq 0 ] || { echo "the tests mount disks: run 'sudo make $@'" >&2; exit 1; }
	@tools/install-deps test
	tools/cargo build --workspace
	tools/cargo --as-root test --workspace --test vm -- --nocapture $1
endef

SEEDS ?= 2000
FIRST ?= 0
sim: ## The simulation: make sim SEEDS=100000 FIRST=0; TRACE=1 shows every event of seed FIRST
	@BLXREP_SIM_SEEDS=$(SEEDS) BLXREP_SIM_FIRST=$(FIRST) $(if $(TRACE),BLXREP_SIM_TRACE=1) RUST_BACKTRACE=0 \
	    tools/cargo test --quiet --package blxrep --lib simulation:: -- --nocapture

soak: ## A hundred kills of agent and dispatcher under load (sudo make soak)
	@tools/install-deps test
	BLXREP_KILLS=100 tools/with-bpffs tools/cargo --as-root test --package blxrep --test kills -- --nocapture

fuzz: ## Fuzz every decoder, FUZZ_SECONDS (600) each
	tools/fuzz

mutants: ## Break blxrep on purpose, see the tests notice (sudo make mutants)
	@tools/install-deps test
	tools/with-bpffs tools/mutants

lint: ## Formatting, clippy, scripts, units, licences
	tools/cargo fmt --check
	tools/cargo clippy --workspace --all-targets -- --deny warnings
	tools/lint

bench: ## Measure, in a release build (sudo make bench)
	@tools/install-deps test
	tools/cargo build --package blxrep --release --bins --examples
	tools/with-bpffs bench/run
	tools/with-bpffs bench/compare
	tools/with-bpffs bench/restore
	bench/serve

install: $(PROFILE:dev=) ## Install below DESTDIR and PREFIX (/usr/local)
	$(INSTALL) -m 755 $(BUILT)/blxrep $(DESTDIR)$(BINDIR)/blxrep
	$(INSTALL) -m 755 $(BUILT)/blxctl $(DESTDIR)$(BINDIR)/blxctl
	for unit in blxrep-agent blxrep-dispatcher; do \
	    $(INSTALL_FILE) systemd/$$unit.service $(DESTDIR)$(UNITDIR)/$$unit.service && \
	    sed -i 's#/usr/bin/blxrep#$(BINDIR)/blxrep#' $(DESTDIR)$(UNITDIR)/$$unit.service || exit 1; \
	done
	$(INSTALL_FILE) systemd/blxrep.sysusers $(DESTDIR)$(SYSUSERSDIR)/blxrep.conf
	$(INSTALL_FILE) systemd/blxrep.tmpfiles $(DESTDIR)$(TMPFILESDIR)/blxrep.conf
	$(INSTALL_FILE) dbus/org.blxrep.conf $(DESTDIR)$(DBUSDIR)/org.blxrep.conf
	$(INSTALL_FILE) dbus/org.blxrep.policy $(DESTDIR)$(POLKITDIR)/org.blxrep.policy
	for name in org.blxrep.Agent org.blxrep.Dispatcher; do \
	    $(INSTALL_FILE) dbus/$$name.service $(DESTDIR)$(ACTIVATIONDIR)/$$name.service || exit 1; \
	done
	for name in Manager Job Disk; do \
	    $(INSTALL_FILE) dbus/org.blxrep.$$name.xml $(DESTDIR)$(INTERFACEDIR)/org.blxrep.$$name.xml || exit 1; \
	done
	$(INSTALL_FILE) systemd/config.example.yaml $(DESTDIR)$(DOCDIR)/config.example.yaml
	for file in README.md LICENSE-MIT LICENSE-APACHE; do $(INSTALL_FILE) $$file $(DESTDIR)$(DOCDIR)/$$file || exit 1; done
	made=$$(mktemp -d) && for program in blxrep blxctl; do \
	    $(BUILT)/$$program generate $$made && \
	    $(INSTALL_FILE) -t $(DESTDIR)$(MANDIR) $$made/man/man1/$$program*.1 && \
	    $(INSTALL_FILE) -t $(DESTDIR)$(BASHDIR) $$made/completions/bash/* && \
	    $(INSTALL_FILE) -t $(DESTDIR)$(ZSHDIR) $$made/completions/zsh/* && \
	    $(INSTALL_FILE) -t $(DESTDIR)$(FISHDIR) $$made/completions/fish/* || exit 1; \
	done && rm -r $$made
# The bus reads its policy anew: it names a user that was not there when the file came.
	@if [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]; then \
	    systemd-sysusers && systemd-tmpfiles --create blxrep.conf && systemctl daemon-reload && \
	    { ! systemctl -q is-active dbus || systemctl reload dbus; }; \
	fi

uninstall: ## Remove what install installed; configuration and data stay
	rm -f $(addprefix $(DESTDIR),$(INSTALLED))
	for program in blxrep blxctl; do \
	    rm -f $(DESTDIR)$(MANDIR)/$$program.1 $(DESTDIR)$(MANDIR)/$$program-*.1 $(DESTDIR)$(BASHDIR)/$$program \
	        $(DESTDIR)$(ZSHDIR)/_$$program $(DESTDIR)$(FISHDIR)/$$program.fish; \
	done
	rmdir $(DESTDIR)$(DOCDIR) 2>/dev/null || true

clean: ## Remove everything that was built
	tools/cargo clean
