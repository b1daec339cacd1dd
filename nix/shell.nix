# What a developer needs: 'nix develop', or 'nix-shell nix/shell.nix'.
{ pkgs ? import <nixpkgs> { } }:

let
  package = pkgs.callPackage ./package.nix { };
in
pkgs.mkShell {
  inputsFrom = [ package ];
  inherit (package) CLANG BLXREP_BPF_CFLAGS;

  packages = with pkgs; [
    btrfs-progs
    cargo-deny
    clippy
    dbus
    deadnix
    e2fsprogs
    fio
    jq
    nixpkgs-fmt
    rustfmt
    shellcheck
    util-linux
    xfsprogs
  ];
}
