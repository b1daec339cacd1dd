# Both programs, with everything 'make install' installs.
{ lib, stdenv, rustPlatform, llvmPackages, libbpf, linuxHeaders, coreutils }:

rustPlatform.buildRustPackage {
  pname = "blxrep";
  version = (lib.importTOML ../Cargo.toml).workspace.package.version;

  src = lib.fileset.toSource {
    root = ../.;
    fileset = lib.fileset.unions [
      ../Cargo.toml
      ../Cargo.lock
      ../LICENSE-APACHE
      ../LICENSE-MIT
      ../Makefile
      ../README.md
      ../bench/hash.rs
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

  # The BPF object (ebpf/build.rs). The wrapped clang would add hardening flags that the target bpf does not know; this way nothing is
  # taken off the C code of the crates, which stdenv's compiler builds.
  env = {
    CLANG = lib.getExe' llvmPackages.clang-unwrapped "clang";
    BLXREP_BPF_CFLAGS = "-I${lib.getDev libbpf}/include -I${linuxHeaders}/include";
  };

  # That the object is CO-RE. The other tests need root, loop devices and BPF, which a build has not.
  cargoTestFlags = [ "--package" "blxrep-ebpf" ];

  postPatch = ''
    substituteInPlace systemd/*.service --replace-fail /bin/kill ${coreutils}/bin/kill
  '';

  installPhase = ''
    runHook preInstall
    make install PREFIX=$out PROFILE=dev BUILT=target/${stdenv.hostPlatform.rust.cargoShortTarget}/release
    runHook postInstall
  '';

  meta = {
    description = "Live replication of disks over the network, for disaster recovery";
    homepage = "https://github.com/blxrep/blxrep";
    license = with lib.licenses; [ mit asl20 ];
    platforms = [ "x86_64-linux" "aarch64-linux" ];
    mainProgram = "blxrep";
  };
}
