# What a developer needs. 'nix develop', or 'nix-shell nix/shell.nix'.
{
  pkgs ? import <nixpkgs> { },
}:

let
  package = pkgs.callPackage ./package.nix { };
in
pkgs.mkShell {
  inputsFrom = [ package ];
  inherit (package) BLXREP_BPF_CFLAGS;
  # As in package.nix: flags that the target bpf does not know.
  hardeningDisable = [
    "stackprotector"
    "zerocallusedregs"
  ];

  packages = with pkgs; [
    btrfs-progs
    cargo-deny
    clippy
    dbus
    e2fsprogs
    fio
    jq
    rustfmt
    shellcheck
    util-linux
    xfsprogs
  ];
}
