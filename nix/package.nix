# Both programs, with everything 'make install' installs.
{
  lib,
  rustPlatform,
  llvmPackages,
  installShellFiles,
  libbpf,
  linuxHeaders,
}:

rustPlatform.buildRustPackage {
  pname = "blxrep";
  version = (lib.importTOML ../Cargo.toml).workspace.package.version;

  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../Cargo.toml
      ../Cargo.lock
      ../Makefile
      ../README.md
      ../LICENSE-MIT
      ../LICENSE-APACHE
      ../blxctl
      ../clippy.toml
      ../daemon
      ../dbus
      ../docs
      ../ebpf
      ../systemd
    ];
  };

  cargoLock.lockFile = ../Cargo.lock;

  # clang compiles the BPF object (ebpf/build.rs); ring and zstd need a C compiler, which stdenv has.
  nativeBuildInputs = [
    llvmPackages.clang
    installShellFiles
  ];
  env.BLXREP_BPF_CFLAGS = "-I${lib.getDev libbpf}/include -I${linuxHeaders}/include";
  # The wrapped clang adds these by itself, and the target bpf knows neither.
  hardeningDisable = [
    "stackprotector"
    "zerocallusedregs"
  ];

  # The tests need root, loop devices and BPF, which a build has not.
  doCheck = false;

  # The programs are installed by cargo; the files beside them are the project's own.
  postInstall = ''
    for unit in blxrep-agent blxrep-dispatcher; do
      install -D -m 644 systemd/$unit.service $out/lib/systemd/system/$unit.service
      substituteInPlace $out/lib/systemd/system/$unit.service --replace-fail /usr/bin/blxrep $out/bin/blxrep
    done
    install -D -m 644 systemd/blxrep.sysusers $out/lib/sysusers.d/blxrep.conf
    install -D -m 644 systemd/blxrep.tmpfiles $out/lib/tmpfiles.d/blxrep.conf
    install -D -m 644 dbus/org.blxrep.conf $out/share/dbus-1/system.d/org.blxrep.conf
    install -D -m 644 dbus/org.blxrep.policy $out/share/polkit-1/actions/org.blxrep.policy
    for name in org.blxrep.Agent org.blxrep.Dispatcher; do
      install -D -m 644 dbus/$name.service $out/share/dbus-1/system-services/$name.service
    done
    for name in Manager Job Disk; do
      install -D -m 644 dbus/org.blxrep.$name.xml $out/share/dbus-1/interfaces/org.blxrep.$name.xml
    done
    for program in blxrep blxctl; do
      $out/bin/$program generate generated
    done
    installManPage generated/man/man1/*.1
    installShellCompletion --bash generated/completions/bash/* --zsh generated/completions/zsh/* \
      --fish generated/completions/fish/*
    install -D -m 644 systemd/config.example.yaml $out/share/doc/blxrep/config.example.yaml
  '';

  meta = {
    description = "Live replication of disks over the network, for disaster recovery";
    homepage = "https://github.com/blxrep/blxrep";
    license = with lib.licenses; [
      mit
      asl20
    ];
    platforms = [
      "x86_64-linux"
      "aarch64-linux"
    ];
    mainProgram = "blxrep";
  };
}
