# What a person may want: 'make' lists it.

PREFIX ?= /usr/local
BINDIR = $(PREFIX)/bin
UNITDIR = $(PREFIX)/lib/systemd/system
SYSUSERSDIR = $(PREFIX)/lib/sysusers.d
TMPFILESDIR = $(PREFIX)/lib/tmpfiles.d
DOCDIR = $(PREFIX)/share/doc/blxrep
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
	$(DBUSDIR)/org.blxrep.conf $(POLKITDIR)/org.blxrep.policy \
	$(DOCDIR)/config.example.yaml $(DOCDIR)/README.md $(DOCDIR)/LICENSE-MIT $(DOCDIR)/LICENSE-APACHE

.PHONY: help build release demo test lint bench install uninstall clean

help: ## This list
	@sed -n 's/^\([a-z]*\):.*## /  make \1	/p' $(firstword $(MAKEFILE_LIST)) | expand -t 18

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

lint: ## Formatting, clippy, scripts, units, licences
	tools/cargo fmt --check
	tools/cargo clippy --workspace --all-targets -- --deny warnings
	tools/lint

bench: ## Measure, in a release build (sudo make bench)
	@tools/install-deps test
	tools/cargo build --package blxrep --release
	tools/with-bpffs bench/run

install: release ## Install below DESTDIR and PREFIX (/usr/local)
	$(INSTALL) -m 755 target/release/blxrep $(DESTDIR)$(BINDIR)/blxrep
	$(INSTALL) -m 755 target/release/blxctl $(DESTDIR)$(BINDIR)/blxctl
	for unit in blxrep-agent blxrep-dispatcher; do \
	    $(INSTALL_FILE) systemd/$$unit.service $(DESTDIR)$(UNITDIR)/$$unit.service && \
	    sed -i 's#/usr/bin/blxrep#$(BINDIR)/blxrep#' $(DESTDIR)$(UNITDIR)/$$unit.service || exit 1; \
	done
	$(INSTALL_FILE) systemd/blxrep.sysusers $(DESTDIR)$(SYSUSERSDIR)/blxrep.conf
	$(INSTALL_FILE) systemd/blxrep.tmpfiles $(DESTDIR)$(TMPFILESDIR)/blxrep.conf
	$(INSTALL_FILE) dbus/org.blxrep.conf $(DESTDIR)$(DBUSDIR)/org.blxrep.conf
	$(INSTALL_FILE) dbus/org.blxrep.policy $(DESTDIR)$(POLKITDIR)/org.blxrep.policy
	$(INSTALL_FILE) systemd/config.example.yaml $(DESTDIR)$(DOCDIR)/config.example.yaml
	for file in README.md LICENSE-MIT LICENSE-APACHE; do $(INSTALL_FILE) $$file $(DESTDIR)$(DOCDIR)/$$file || exit 1; done
	for program in blxrep blxctl; do \
	    rm -rf target/generated && target/release/$$program generate target/generated && \
	    $(INSTALL_FILE) -t $(DESTDIR)$(MANDIR) target/generated/man/man1/*.1 && \
	    $(INSTALL_FILE) -t $(DESTDIR)$(BASHDIR) target/generated/completions/bash/* && \
	    $(INSTALL_FILE) -t $(DESTDIR)$(ZSHDIR) target/generated/completions/zsh/* && \
	    $(INSTALL_FILE) -t $(DESTDIR)$(FISHDIR) target/generated/completions/fish/* || exit 1; \
	done
	rm -rf target/generated
	@if [ -z "$(DESTDIR)" ] && [ -d /run/systemd/system ]; then \
	    systemd-sysusers && systemd-tmpfiles --create blxrep.conf && systemctl daemon-reload; \
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
